//! `sandbox-runner worker run`: one work item that was claimed by somebody else, served in a sandbox and given back. It takes
//! the flags, variables and standard input of `ant beta:worker run`, so that it can stand in its place below `--on-work`.
//!
//! It is the daemon with one item in place of a queue: the same connector, sessions and journal, with a launcher of its own.
//! Credentials stay in this process: the only child is the launcher, whose environment is empty.

mod handed;
mod place;

use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand};
use tracing::{info, warn};
use zeroize::Zeroizing;

use super::config::{self, DEFAULT_PATH};
use super::embedded::{self, Wishes};
use super::run::{self, RunError};
use super::{code, complain, say};
use crate::config::problem::Problem;
use crate::config::resolve::{Given, GivenError, handed_on};
use crate::config::units::{UnitError, parse_duration};
use crate::connector::claude::{Claim, ClaimError, Reason, Settings};
use crate::daemon::settings::{self, SettingsError};
use crate::sandbox::receipt::Tier;
use crate::sandbox::start::StartedLauncher;
use crate::telemetry::{self, LogFormat, LogLevel};
use handed::HandedError;
use place::{Place, PlaceError};

#[derive(Debug, Args)]
pub(super) struct WorkerArguments {
    #[command(subcommand)]
    command: WorkerCommand,
}

#[derive(Debug, Subcommand)]
enum WorkerCommand {
    /// Serve one work item that was claimed already, and end with it
    Run(Box<ItemArguments>),
}

#[derive(Debug, Args)]
struct ItemArguments {
    /// Environment of the work item
    #[arg(long, value_name = "ID", env = "ANTHROPIC_ENVIRONMENT_ID")]
    environment_id: Option<String>,
    /// Work item
    #[arg(long, value_name = "ID", env = "ANTHROPIC_WORK_ID")]
    work_id: Option<String>,
    /// Session that it asks to serve
    #[arg(long, value_name = "ID", env = "ANTHROPIC_SESSION_ID")]
    session_id: Option<String>,
    /// Key of the environment, where the work item has no secret; use the variable, because command lines can be read by all
    #[arg(long, value_name = "KEY", env = "ANTHROPIC_ENVIRONMENT_KEY", hide_env_values = true)]
    environment_key: Option<Credential>,
    /// File with the secret of the work item, not readable by others
    #[arg(long, value_name = "FILE", env = "ANTHROPIC_WORK_SECRET_FILE")]
    work_secret_file: Option<PathBuf>,
    /// Where the server is [default: that of the environment's section in the configuration, else the public one]
    #[arg(long, value_name = "URL", env = "ANTHROPIC_BASE_URL")]
    base_url: Option<String>,
    /// Workspace of the environment, for a credential that is good for several
    #[arg(long, value_name = "ID", env = "ANTHROPIC_WORKSPACE_ID")]
    workspace_id: Option<String>,
    /// From the end of a turn until the item is given back, such as 60s or 1m30s; 0: never
    #[arg(long, value_name = "TIME", default_value = "60s")]
    max_idle: MaxIdle,
    /// Form of the log lines on standard error
    #[arg(long, value_name = "FORM", default_value = "text")]
    log_format: Format,
    /// Not used: the tools work in /workspace of the sandbox
    #[arg(long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Not used: file tools stay in /workspace, commands reach all of the sandbox
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false")]
    unrestricted_paths: bool,
    /// Let a base URL be http:// that does not lead to this host itself
    #[arg(long)]
    allow_plain_http: bool,
    /// Weakest isolation under which the item is served [default: min_tier of the configuration]
    #[arg(long, value_name = "TIER")]
    min_tier: Option<Tier>,
    /// Keep no journal: what runs when this process dies may run again with the next worker
    #[arg(long)]
    ephemeral: bool,
    /// Configuration file: limits, min_tier, and the section of the environment, whose authorities and proxy are used
    #[arg(long, value_name = "FILE", env = "RUNNER_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Directory for everything this command keeps [default: /var/lib/sandbox-runner for root, else below the home]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Text that is never shown.
#[derive(Clone)]
struct Credential(Zeroizing<String>);

impl FromStr for Credential {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(Zeroizing::new(text.to_owned())))
    }
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credential")
    }
}

/// `None`: never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MaxIdle(Option<Duration>);

impl FromStr for MaxIdle {
    type Err = UnitError;

    /// As Go writes it: numbers with units, one after the other.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if matches!(text, "0" | "0s") {
            return Ok(Self(None));
        }
        let is_number = |character: char| character.is_ascii_digit() || character == '.';
        let mut parts: Vec<String> = Vec::new();
        for character in text.chars() {
            match parts.last_mut() {
                // A number after a unit begins the next part.
                Some(part) if !(is_number(character) && part.ends_with(|last| !is_number(last))) => {
                    part.push(character)
                }
                _ => parts.push(character.to_string()),
            }
        }
        let mut total = Duration::ZERO;
        // Go writes an hour as 1h0m0s.
        for part in parts.iter().filter(|part| !matches!(part.as_str(), "0h" | "0m" | "0s")) {
            total = total.saturating_add(parse_duration(part)?);
        }
        match parts.is_empty() {
            true => parse_duration(text).map(|time| Self(Some(time))),
            false => Ok(Self(Some(total).filter(|total| !total.is_zero()))),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Why the item was not served.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error("the configuration has problems")]
    Config(Vec<Problem>),
    #[error(transparent)]
    Handed(#[from] HandedError),
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error("--{name} {what}; {fix}")]
    Given { name: &'static str, what: String, fix: String },
    #[error("--state-dir {} cannot be made absolute", path.display())]
    StateDirectory { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Runs the subcommand.
pub(super) fn run(arguments: &WorkerArguments, log_level: Option<LogLevel>) -> ExitCode {
    let WorkerCommand::Run(arguments) = &arguments.command;
    let format = match arguments.log_format {
        Format::Text => LogFormat::Text,
        Format::Json => LogFormat::Json,
    };
    telemetry::start(format, log_level.unwrap_or(LogLevel::Info));
    match try_run(arguments) {
        Ok(reason) => ended(reason),
        Err(WorkerError::Config(problems)) => {
            for problem in &problems {
                say(&format!("sandbox-runner: {problem}"));
            }
            ExitCode::from(code::CONFIGURATION)
        }
        Err(WorkerError::Run(error)) => run::failed(&error),
        Err(error) => {
            complain(&error);
            match error {
                WorkerError::Handed(_) | WorkerError::Claim(_) | WorkerError::Given { .. } => ExitCode::from(2),
                WorkerError::Settings(_) => ExitCode::from(code::CONFIGURATION),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Success is an item that was given back, or taken back, in order.
fn ended(reason: Option<Reason>) -> ExitCode {
    let why = match reason {
        Some(
            Reason::Idle | Reason::Waited | Reason::SessionOver | Reason::Stopping | Reason::Shutdown | Reason::Nothing,
        ) => return ExitCode::SUCCESS,
        Some(Reason::LeaseLost) => "its lease was lost: another worker may hold it",
        Some(Reason::Refused) => "the server refuses this worker; the log says why",
        Some(Reason::NotClaimed) => "it could not be acknowledged; the log says why",
        None => "this process was told to end before it had begun",
    };
    say(&format!("sandbox-runner: the work item was not served to its end: {why}"));
    ExitCode::FAILURE
}

fn try_run(arguments: &ItemArguments) -> Result<Option<Reason>, WorkerError> {
    for what in unused(arguments) {
        warn!("{what}");
    }
    let mut config = config::load(&arguments.config).map_err(WorkerError::Config)?;
    let claim = Claim::read(handed::read(arguments)?)?;
    let plain = arguments.allow_plain_http || arguments.base_url.as_deref().is_some_and(leads_here);
    let given = Given {
        base_url: arguments.base_url.as_deref(),
        allow_plain_http: plain,
        workspace_id: arguments.workspace_id.as_deref(),
    };
    let claude =
        handed_on(&config.claude, claim.environment_id(), given).map_err(|GivenError { name, what, fix }| {
            WorkerError::Given { name, what, fix: fix.replace("allow_plain_http = true", "--allow-plain-http") }
        })?;
    let given = arguments.state_dir.as_ref().map(std::path::absolute).transpose().map_err(|source| {
        WorkerError::StateDirectory { path: arguments.state_dir.clone().unwrap_or_default(), source }
    })?;
    let home = run::own_home(&config, given.as_deref());
    let wishes = Wishes { pool: 1, allow_nested: true, ..Wishes::default() };
    let started = embedded::start_in(&home, &wishes).map_err(RunError::from)?;
    // What is in the memory and in the variables of this process is for nobody else of this user.
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        warn!(%error, "other processes of this user can read the variables of this one");
    }
    let place = Place::take(&home.state.join("sessions"), claim.environment_id(), claim.session_id())?;
    // The sessions of this process are those of its item: nothing that is configured beside it is served.
    (config.orchestrator, config.claude) = (None, Vec::new());
    (config.state_directory, config.run_directory) = (place.directory().to_owned(), home.run);
    if let Some(tier) = arguments.min_tier {
        config.min_tier = tier.to_string();
    }
    let mut one = settings::claim(&config, &claude, claim)?;
    one.max_idle = arguments.max_idle.0;
    let board = one.board.clone();
    let served = serve(&config, started, arguments.ephemeral, one);
    // Without a journal of this process nothing is known of an earlier one.
    if place.is_spent(board.owed().filter(|_| !arguments.ephemeral)) {
        place.remove();
    } else {
        info!("the journal is kept for the next work item of this session");
    }
    served?;
    Ok(board.ended())
}

fn serve(
    config: &crate::config::resolved::Config,
    started: StartedLauncher,
    ephemeral: bool,
    one: Settings,
) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(RunError::Runtime)?;
    let (result, process) = runtime.block_on(async {
        match embedded::sandboxes(started) {
            Ok((sandboxes, process)) => (run::serve_with(config, sandboxes, ephemeral, Some(one)).await, Some(process)),
            Err(error) => (Err(error.into()), None),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Some(mut process) = process {
        process.end();
    }
    result.map(drop)
}

/// Flags of the official worker that mean nothing here, each with what is there in its place.
fn unused(arguments: &ItemArguments) -> Vec<String> {
    let mut lines = Vec::new();
    let workdir = arguments.workdir.as_ref().map(|path| path.to_string_lossy().into_owned());
    if let Some(path) = workdir.filter(|path| !matches!(path.as_str(), "" | "." | "/workspace" | "/workspace/")) {
        lines.push(format!("--workdir {path:?} is not used: the tools work in /workspace of the sandbox"));
    }
    if arguments.unrestricted_paths {
        lines.push(
            "--unrestricted-paths is not used: file tools stay in /workspace, commands reach all of the sandbox".into(),
        );
    }
    if std::env::args_os().any(|argument| argument.to_string_lossy().starts_with("--environment-key")) {
        lines
            .push("every user of this host can read a key on a command line: set ANTHROPIC_ENVIRONMENT_KEY".to_owned());
    }
    lines
}

/// Whether an address is one of this host: nobody is on the way there.
pub(super) fn leads_here(url: &str) -> bool {
    let Some(rest) = url.strip_prefix("http://") else { return false };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, _)) => host,
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_the_official_worker_writes_them() {
        let seconds = |text: &str| text.parse::<MaxIdle>().map(|idle| idle.0.map(|time| time.as_secs_f64()));
        assert_eq!(["0", "0s", "0m", "0h0m0s"].map(seconds), [Ok(None), Ok(None), Ok(None), Ok(None)]);
        for (text, expected) in [
            ("60s", 60.0),
            ("1m30s", 90.0),
            ("1m0s", 60.0),
            ("1h0m0s", 3600.0),
            ("1h", 3600.0),
            ("500ms", 0.5),
            ("90", 90.0),
        ] {
            assert_eq!(seconds(text), Ok(Some(expected)), "{text}");
        }
        for wrong in ["", "x", "-1s", "1y", "s"] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_this_host_is_reached_without_encryption_by_itself() {
        for here in ["http://127.0.0.1:8080", "http://localhost/x", "http://[::1]:1"] {
            assert!(leads_here(here), "{here}");
        }
        for elsewhere in
            ["http://10.0.0.1", "http://localhost.example", "http://127.0.0.1.example", "https://h", "http://[::2]"]
        {
            assert!(!leads_here(elsewhere), "{elsewhere}");
        }
    }
}
