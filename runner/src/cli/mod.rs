//! The command line: one subcommand, one file. Data goes to standard output, everything else to standard error.

mod admin_link;
mod bench;
mod config;
mod daemon_view;
mod demo;
mod doctor;
mod embedded;
mod enroll;
mod exec;
mod floor;
mod journal;
mod launcher;
mod outcome;
mod run;
mod worker;

use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

use crate::telemetry::{self, LogFormat, LogLevel};

/// Exit codes that mean something to service managers and scripts.
mod code {
    /// The host gives less isolation than was asked for.
    pub(super) const BELOW_FLOOR: u8 = 77;
    /// The configuration has problems.
    pub(super) const CONFIGURATION: u8 = 78;
    /// A failure of ours in `exec`, where lower codes belong to the command.
    pub(super) const OURS: u8 = 125;
}

#[derive(Debug, Parser)]
#[command(name = "sandbox-runner", version, about = "Runs agent tool calls in isolated sandboxes on this host")]
struct Arguments {
    /// Least important log line that is written to standard error
    /// [default: what the configuration says for `run`, else warn]
    #[arg(long, global = true, value_name = "LEVEL", env = "RUNNER_LOG")]
    log_level: Option<LogLevel>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take work from the configured orchestrator, until told to end
    Run(run::RunArguments),
    /// Get this runner its certificate, with a one-time token
    Enroll(enroll::EnrollArguments),
    /// Serve one work item of a Claude environment that was claimed already, in place of `ant beta:worker run`
    #[command(visible_alias = "beta:worker")]
    Worker(worker::WorkerArguments),
    /// Show a whole installation at work: orchestrator, runner and two sandboxes, gone afterwards
    Demo(demo::DemoArguments),
    /// Run one command in a new sandbox
    Exec(exec::ExecArguments),
    /// Show how the running daemon stands: link and certificate, what the host is short of, what was measured and counted
    Status(daemon_view::StatusArguments),
    /// List the sessions and calls of the running daemon
    Ps(daemon_view::PsArguments),
    /// Show one session or call in full
    Inspect(daemon_view::InspectArguments),
    /// End a session or a call
    Kill(daemon_view::KillArguments),
    /// Print output of a call
    Logs(daemon_view::LogsArguments),
    /// Measure this runner against other runtimes and the floor of this machine
    Bench(bench::BenchArguments),
    /// Examine this host: which layers of isolation hold, and what would add the missing ones
    Doctor(doctor::DoctorArguments),
    /// Check or show the configuration
    Config(config::ConfigArguments),
    /// Show the journal: what is written down, and what the next runner would begin with
    Journal(journal::JournalArguments),
    /// Become the launcher, the only privileged process; for service managers
    Launcher(launcher::LauncherArguments),
}

/// Runs the program for these arguments, the program's name first.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let parsed = match Arguments::try_parse_from(&arguments) {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error, &arguments),
    };
    // The launcher keeps what it inherits: nothing of ours is set up before.
    if let Command::Launcher(arguments) = &parsed.command {
        return launcher::run(arguments);
    }
    if let Command::Run(arguments) = &parsed.command {
        return run::run(arguments, parsed.log_level);
    }
    if let Command::Worker(arguments) = &parsed.command {
        return worker::run(arguments, parsed.log_level);
    }
    telemetry::start(LogFormat::Text, parsed.log_level.unwrap_or(LogLevel::Warn));
    match parsed.command {
        Command::Run(arguments) => run::run(&arguments, parsed.log_level),
        Command::Worker(arguments) => worker::run(&arguments, parsed.log_level),
        Command::Launcher(arguments) => launcher::run(&arguments),
        Command::Enroll(arguments) => enroll::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Exec(arguments) => exec::run(&arguments),
        Command::Status(arguments) => daemon_view::status(&arguments),
        Command::Ps(arguments) => daemon_view::ps(&arguments),
        Command::Inspect(arguments) => daemon_view::inspect(&arguments),
        Command::Kill(arguments) => daemon_view::kill(&arguments),
        Command::Logs(arguments) => daemon_view::logs(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Config(arguments) => config::run(&arguments),
        Command::Journal(arguments) => journal::run(&arguments),
    }
}

/// Exit code 2 for wrong usage, but 125 for `exec`, where 2 could be the command's own.
fn usage(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    // Writing the text can only fail when nobody reads it.
    let _ = error.print();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ if subcommand(arguments).is_some_and(|command| command == "exec") => ExitCode::from(code::OURS),
        _ => ExitCode::from(2),
    }
}

/// The first word that is no option and no value of one.
fn subcommand(arguments: &[OsString]) -> Option<&OsString> {
    let mut words = arguments.iter().skip(1);
    loop {
        let word = words.next()?;
        if word == "--log-level" {
            words.next();
        } else if !word.as_encoded_bytes().starts_with(b"-") {
            return Some(word);
        }
    }
}

/// Writes an error with all its causes to standard error.
fn complain(error: &dyn Error) {
    say(&format!("sandbox-runner: {}", describe(error)));
}

/// An error with all its causes on one line.
fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent wrapper has the text of what it wraps.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Writes one line to standard error.
#[allow(clippy::print_stderr, reason = "the one place where the command line speaks to people")]
fn say(line: &str) {
    eprintln!("{line}");
}

/// Writes data and a line end to standard output.
fn print(text: &str) {
    use std::io::Write;
    // A reader that has gone away wants no more data, and there is nobody left to tell.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subcommand_is_found_behind_options_and_is_no_value_of_one() {
        let found = |text: &str| {
            let arguments: Vec<OsString> = text.split_whitespace().map(OsString::from).collect();
            subcommand(&arguments).map(|word| word.to_string_lossy().into_owned())
        };
        assert_eq!(found("sandbox-runner exec --memory junk -- x").as_deref(), Some("exec"));
        assert_eq!(found("sandbox-runner --log-level debug exec -- x").as_deref(), Some("exec"));
        assert_eq!(found("sandbox-runner --log-level=debug exec -- x").as_deref(), Some("exec"));
        assert_eq!(found("sandbox-runner --log-level exec ps").as_deref(), Some("ps"));
        assert_eq!(found("sandbox-runner --log-level"), None);
        assert_eq!(found("sandbox-runner"), None);
    }
}
