//! `sandbox-runner config check|show`: every problem of the configuration, or what it means.

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
    let loaded = load_beside(&arguments.config);
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

/// Reads and checks the configuration at `path`, the files it names included.
///
/// # Errors
/// Every problem found.
pub(super) fn load(path: &Path) -> Result<Config, Vec<Problem>> {
    load_with(path, passed_credentials())
}

/// The same for a command that only looks, beside the service: what that was given is found where systemd keeps it. Whoever
/// acts with a key must have been given it.
///
/// # Errors
/// Every problem found.
pub(super) fn load_beside(path: &Path) -> Result<Config, Vec<Problem>> {
    let of_service = || Some(PathBuf::from(UNIT_CREDENTIALS)).filter(|directory| directory.is_dir());
    load_with(path, passed_credentials().or_else(of_service))
}

/// Where the service manager has put credentials of this process.
fn passed_credentials() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

fn load_with(path: &Path, credentials: Option<PathBuf>) -> Result<Config, Vec<Problem>> {
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
    match resolve(path, &file, &host(file.runner.state_directory.as_deref(), credentials)) {
        Ok(config) => {
            problems.extend(unreadable_files(path, &config));
            if problems.is_empty() { Ok(config) } else { Err(problems) }
        }
        Err(more) => {
            // A value of the wrong type reads as absent; saying that it is missing too would only confuse.
            let reported: Vec<_> = problems.iter().map(|problem| problem.key.clone()).collect();
            problems.extend(more.into_iter().filter(|problem| !reported.contains(&problem.key)));
            Err(problems)
        }
    }
}

fn show(config: &Config, json: bool) -> ExitCode {
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

fn unreadable_files(path: &Path, config: &Config) -> Vec<Problem> {
    let mut files: Vec<(String, &Path)> = Vec::new();
    if let Some(given) = config.orchestrator.as_ref().and_then(|one| one.files.as_ref()) {
        files.push(("orchestrator.ca_file".to_owned(), &given.ca_file));
        files.push(("orchestrator.certificate_file".to_owned(), &given.certificate_file));
        files.push(("orchestrator.key_file".to_owned(), &given.key_file));
    }
    for (number, claude) in config.claude.iter().enumerate() {
        files.push((format!("claude[{number}].key_file"), &claude.key_file));
        files.extend(claude.ca_file.as_deref().map(|file| (format!("claude[{number}].ca_file"), file)));
    }
    files
        .into_iter()
        .filter_map(|(key, file)| {
            let error = fs::File::open(file).err()?;
            Some(Problem {
                file: path.to_path_buf(),
                key,
                what: format!("{} cannot be read: {error}", file.display()),
                fix: "create the file, or let the runner's user read it".to_owned(),
            })
        })
        .collect()
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
    fn certificate_files_that_cannot_be_read_are_each_a_problem() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("config.toml");
        let text = "[orchestrator]\nendpoint = \"https://o:1\"\nca_file = \"/none/a\"\ncertificate_file = \"/none/b\"\n\
                    key_file = \"/none/c\"\n[runner]\nid = \"r\"\n";
        fs::write(&path, text).expect("written");

        let problems = load(&path).expect_err("problems");

        assert_eq!(problems.len(), 3);
        assert!(problems[2].to_string().contains("orchestrator.key_file: /none/c cannot be read"), "{problems:?}");
    }
}
