//! `sandbox-runner enroll`: the first certificate of this runner, for a one-time token.
//!
//! The token comes from a file or from standard input, never from an argument or the environment, which other users of the
//! host may read. Started as root, it gives root up before anything is read from the network.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::config::{self, DEFAULT_PATH};
use super::{code, complain, print, run, say};
use crate::config::launcher_policy::IdRanges;
use crate::config::resolved::Config;
use crate::connector::enrollment::{EnrollError, Enrollment, LONGEST_TOKEN, Pin, PinError, Request, Token};
use crate::daemon::settings::{self, SettingsError};
use crate::sandbox::home::Identity;
use crate::sandbox::identity::{IdentityError, become_identity, runner_identity};

#[derive(Debug, Args)]
pub(super) struct EnrollArguments {
    /// Enrolment service
    #[arg(long, value_name = "https://HOST:PORT")]
    endpoint: String,
    /// Name that the service's certificate must have, when it is not the host
    #[arg(long, value_name = "NAME")]
    server_name: Option<String>,
    #[command(flatten)]
    pin: PinArguments,
    /// File with the token; it is emptied when the identity is stored [default: standard input]
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Configuration file
    #[arg(long, value_name = "FILE", env = "RUNNER_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Directory for everything the runner keeps, in place of the configured one
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Ask for another identity although there is one
    #[arg(long)]
    replace: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Whom to trust before anything was said.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct PinArguments {
    /// PEM file with the authority of the service
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// SHA-256 fingerprint of the authority of the service, which has to send it along
    #[arg(long, value_name = "HEX")]
    ca_sha256: Option<String>,
}

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("cannot read the token from {}", path.display())]
    Token { path: PathBuf, source: io::Error },
    #[error("--state-dir {} cannot be made absolute", path.display())]
    StateDirectory { path: PathBuf, source: io::Error },
    #[error("cannot make {} for the user of the runner", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Enroll(#[from] EnrollError),
    #[error("cannot start the async runtime")]
    Runtime(#[source] io::Error),
}

/// Runs the subcommand.
pub(super) fn run(arguments: &EnrollArguments) -> ExitCode {
    let config = match config::load(&arguments.config) {
        Ok(config) => config,
        Err(problems) => {
            for problem in &problems {
                say(&format!("sandbox-runner: {problem}"));
            }
            return ExitCode::from(code::CONFIGURATION);
        }
    };
    match enroll(arguments, &config) {
        Ok((runner_id, directory)) => {
            if arguments.json {
                let identity = serde_json::json!({ "runner_id": runner_id, "directory": directory });
                print(&identity.to_string());
            } else {
                print(&format!("enrolled as {runner_id}, the identity is in {}", directory.display()));
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn enroll(arguments: &EnrollArguments, config: &Config) -> Result<(String, PathBuf), CommandError> {
    let pin = match (&arguments.pin.ca_file, &arguments.pin.ca_sha256) {
        (Some(path), _) => Pin::from_file(path)?,
        (None, text) => Pin::from_hex(text.as_deref().unwrap_or_default())?,
    };
    let target = settings::enrollment_target(config, &arguments.endpoint, arguments.server_name.as_deref())?;
    let source = TokenSource::open(arguments.token_file.as_deref())?;
    let token = source.read()?;
    let state = state_directory(arguments, config)?;
    let directory = settings::identity_directory(&state);
    give_up_root_for(&directory)?;
    let state_id = settings::identity(&config.runner_id, &state)?.state_id;
    let request = Request { target, pin, token, labels: config.labels.clone(), state_id, replace: arguments.replace };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(CommandError::Runtime)?;
    let runner_id = runtime.block_on(async { Enrollment::begin(request, &directory)?.run().await })?;
    source.wipe();
    Ok((runner_id, directory))
}

/// The one that `run` will use.
fn state_directory(arguments: &EnrollArguments, config: &Config) -> Result<PathBuf, CommandError> {
    let given = arguments.state_dir.as_ref().map(|path| {
        std::path::absolute(path).map_err(|source| CommandError::StateDirectory { path: path.clone(), source })
    });
    let given = given.transpose()?;
    if config.launcher_socket.is_some() && given.is_none() {
        return Ok(config.state_directory.clone());
    }
    Ok(run::own_home(config, given.as_deref()).state)
}

/// The identity belongs to the user that the runner has, who must be able to read and to renew it.
fn give_up_root_for(directory: &Path) -> Result<(), CommandError> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let failed = |source| CommandError::Directory { path: directory.to_owned(), source };
    let user = match fs::symlink_metadata(directory) {
        Ok(found) => Identity { uid: found.uid(), gid: found.gid() },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let user = runner_identity(IdRanges::of_this_process(1).runner);
            if let Some(parent) = directory.parent() {
                fs::create_dir_all(parent).map_err(failed)?;
            }
            fs::DirBuilder::new().mode(0o700).create(directory).map_err(failed)?;
            chown(directory, Some(user.uid), Some(user.gid)).map_err(failed)?;
            user
        }
        Err(error) => return Err(failed(error)),
    };
    Ok(become_identity(user)?)
}

/// Where the token comes from. A file stays open, so that it can be emptied also by a process that is not root any more.
struct TokenSource {
    path: PathBuf,
    file: Option<File>,
    writable: bool,
}

impl TokenSource {
    fn open(path: Option<&Path>) -> Result<Self, CommandError> {
        let Some(path) = path else {
            return Ok(Self { path: "standard input".into(), file: None, writable: false });
        };
        let path = path.to_owned();
        if let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) {
            return Ok(Self { path, file: Some(file), writable: true });
        }
        match File::open(&path) {
            Ok(file) => Ok(Self { path, file: Some(file), writable: false }),
            Err(source) => Err(CommandError::Token { path, source }),
        }
    }

    fn read(&self) -> Result<Token, CommandError> {
        // One byte more than is taken, so that what is too long is seen to be.
        let most = LONGEST_TOKEN as u64 + 64;
        let mut bytes = Vec::new();
        let read = match &self.file {
            Some(file) => file.take(most).read_to_end(&mut bytes),
            None => io::stdin().lock().take(most).read_to_end(&mut bytes),
        };
        read.map_err(|source| CommandError::Token { path: self.path.clone(), source })?;
        Ok(Token::parse(&bytes)?)
    }

    /// A token is good once, and what is left of it is good for nothing but being found.
    fn wipe(&self) {
        let Some(file) = &self.file else { return };
        let wiped = self.writable && file.set_len(0).and_then(|()| file.sync_all()).is_ok();
        if !wiped {
            say(&format!("sandbox-runner: {} still holds the token, which is used up; remove it", self.path.display()));
        }
    }
}
