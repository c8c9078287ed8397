//! `sandbox-runner config check|show`: every problem of the configuration, or what it means.

mod files;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{code, embedded, print, say};
use crate::config::file::ConfigFile;
use crate::config::problem::Problem;
use crate::config::resolve::resolve;
use crate::config::resolved::{Config, Host};
use crate::daemon::settings;

/// Where the configuration is when nobody says otherwise.
pub(super) const DEFAULT_PATH: &str = "/etc/sandbox-runner/config.toml";

/// Where systemd keeps the credentials of the shipped unit while it runs (systemd.exec(5), `LoadCredential=`).
pub(super) const UNIT_CREDENTIALS: &str = "/run/credentials/sandbox-runner.service";

#[derive(Debug, Args)]
pub(super) struct ConfigArguments {
    /// Configuration file
    #[arg(long, global = true, value_name = "PATH", env = "RUNNER_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every problem, exit with 78 if there is one
    Check {
        /// Print the problems as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the configuration with all defaults filled in
    Show {
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Runs the subcommand.
pub(super) fn run(arguments: &ConfigArguments) -> ExitCode {
    let loaded = match &arguments.command {
        ConfigCommand::Check { .. } => load_with(&arguments.config, credentials_beside(), true),
        ConfigCommand::Show { .. } => load_beside(&arguments.config),
    };
    match (&arguments.command, loaded) {
        (ConfigCommand::Check { json }, Ok(_)) => {
            print(if *json { "[]" } else { "no problem found" });
            ExitCode::SUCCESS
        }
        (ConfigCommand::Show { json }, Ok(config)) => show(&config, *json),
        (ConfigCommand::Check { json: true }, Err(problems)) => {
            print(&serde_json::json!(problems).to_string());
            ExitCode::from(code::CONFIGURATION)
        }
        (_, Err(problems)) => {
            for problem in &problems {
                say(&format!("sandbox-runner: {problem}"));
            }
            ExitCode::from(code::CONFIGURATION)
        }
    }
}

/// Reads and checks the configuration at `path`, and the files of work queues that it names. Those of the link are looked at when
/// they are used: they may be in the middle of a renewal.
///
/// # Errors
/// Every problem found.
pub(super) fn load(path: &Path) -> Result<Config, Vec<Problem>> {
    load_with(path, passed_credentials(), false)
}

/// The same for a command that only looks, beside the service: what that was given is found where systemd keeps it. Whoever
/// acts with a key must have been given it.
///
/// # Errors
/// Every problem found.
pub(super) fn load_beside(path: &Path) -> Result<Config, Vec<Problem>> {
    load_with(path, credentials_beside(), false)
}

fn credentials_beside() -> Option<PathBuf> {
    let of_service = || Some(PathBuf::from(UNIT_CREDENTIALS)).filter(|directory| directory.is_dir());
    passed_credentials().or_else(of_service)
}

/// Where the service manager has put credentials of this process.
fn passed_credentials() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

fn load_with(path: &Path, credentials: Option<PathBuf>, with_link: bool) -> Result<Config, Vec<Problem>> {
    let problem = |what: String, fix: &str| {
        vec![Problem { file: path.to_path_buf(), key: String::new(), what, fix: fix.to_owned() }]
    };
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        // Nothing is required, so an absent default file means only defaults; an absent file that was named is a mistake.
        Err(error) if error.kind() == io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => String::new(),
        Err(error) => return Err(problem(format!("cannot be read: {error}"), "name a readable file with --config")),
    };
    let (file, mut problems) = ConfigFile::parse_all(path, &text);
    // A value of the wrong type reads as absent; saying that it is missing too would only confuse.
    let mut add = |more: Vec<Problem>| {
        let reported: Vec<_> = problems.iter().map(|problem| problem.key.clone()).collect();
        problems.extend(more.into_iter().filter(|problem| !reported.contains(&problem.key)));
    };
    let in_credentials = files::of_queues(path, &file, credentials.as_deref());
    let resolved = resolve(path, &file, &host(file.runner.state_directory.as_deref(), credentials));
    add(resolved.as_ref().err().cloned().unwrap_or_default());
    add(in_credentials);
    if with_link {
        add(files::of_link(path, &file));
    }
    match resolved {
        Ok(config) if problems.is_empty() => Ok(config),
        _ => Err(problems),
    }
}

fn show(config: &Config, json: bool) -> ExitCode {
    // The name that counts may be in a certificate, where that can be read.
    let runner_id = settings::runner_id(config).unwrap_or_else(|_| config.runner_id.clone());
    let config = &Config { runner_id, ..config.clone() };
    let text = if json {
        serde_json::to_string_pretty(config).map_err(|error| error.to_string())
    } else {
        toml::to_string(config).map_err(|error| error.to_string())
    };
    match text {
        Ok(text) => {
            print(text.trim_end());
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("sandbox-runner: the configuration cannot be shown: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// What this machine has.
fn host(state_directory: Option<&Path>, credentials_directory: Option<PathBuf>) -> Host {
    let state = state_directory.unwrap_or_else(|| Path::new("/var/lib/sandbox-runner"));
    let existing = state.ancestors().find(|path| path.exists()).unwrap_or_else(|| Path::new("/"));
    let free_disk_bytes = nix::sys::statvfs::statvfs(existing)
        .map_or(0, |disk| disk.blocks_available().saturating_mul(disk.fragment_size()));
    let pids = fs::read_to_string("/proc/sys/kernel/pid_max").ok().and_then(|text| text.trim().parse().ok());
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    Host {
        size: embedded::host_size(),
        free_disk_bytes,
        pids: pids.unwrap_or(32_768),
        hostname: hostname.unwrap_or_else(|| "runner".to_owned()),
        credentials_directory,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_file_that_is_absent_is_a_problem() {
        let problems = load(Path::new("/nonexistent/config.toml")).expect_err("a problem");

        assert!(problems[0].to_string().contains("/nonexistent/config.toml: cannot be read"), "{problems:?}");
    }

    #[test]
    fn problems_of_form_and_of_meaning_are_reported_together_and_once() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("config.toml");
        fs::write(&path, "[runner]\nidd = 1\nid = 3\nstate_directory = \"x\"\n").expect("written");

        let mut keys: Vec<_> = load(&path).expect_err("problems").into_iter().map(|problem| problem.key).collect();
        keys.sort();

        assert_eq!(keys, ["runner.id", "runner.idd", "runner.state_directory"]);
    }

    #[test]
    fn files_that_cannot_be_read_are_problems_beside_every_other_one_and_those_of_the_link_only_for_a_check() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("config.toml");
        let text = "[orchestrator]\nendpoint = \"https://o:1\"\nca_file = \"/none/a\"\ncertificate_file = \"/none/b\"\n\
                    key_file = \"/none/c\"\n[[claude]]\nenvironment_id = \"env_1\"\nkey_file = \"/none/d\"\n\
                    [runner]\nid = \"a b\"\n";
        fs::write(&path, text).expect("written");
        let keys = |with_link| {
            let problems = load_with(&path, None, with_link).expect_err("problems");
            problems.into_iter().map(|problem| problem.key).collect::<Vec<_>>()
        };

        let of_link = ["ca_file", "certificate_file", "key_file"].map(|name| format!("orchestrator.{name}"));
        assert_eq!(keys(false), ["runner.id", "claude[0].key_file"]);
        assert_eq!(keys(true)[2..], of_link);
    }
}
