//! `sandbox-runner launcher`: becomes the launcher, the only privileged process, for service managers and upgrades.
//!
//! One executable is installed, and this is how the privileged program inside of it is started alone. Nothing else happens
//! here: no runtime, no log, no file is opened before. When a running launcher replaces itself, descriptors 3 to 6 are its
//! legacy; they pass through untouched, because the memory file of the program takes the next free number.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Args;

use super::complain;
use crate::sandbox::image::{ExecutableImage, ImageError};

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct LauncherArguments {
    /// Policy file: everything the launcher may ever do
    #[arg(long, value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Go on where the launcher before this one was replaced; used by the launcher itself
    #[arg(long, value_name = "NAME", hide = true)]
    resume: Option<OsString>,
}

/// Why this process did not become the launcher.
#[derive(Debug, thiserror::Error)]
enum BecomeError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot execute the launcher from memory; set vm.memfd_noexec to 1 or 0")]
    Memory(#[source] io::Error),
    #[error("cannot execute the launcher from {}", path.display())]
    File { path: PathBuf, source: io::Error },
}

/// Runs the subcommand; returns only when it fails.
pub(super) fn run(arguments: &LauncherArguments) -> ExitCode {
    let role: [&OsStr; 3] = match (&arguments.policy, &arguments.resume) {
        (Some(policy), _) => ["launcher".as_ref(), "--policy".as_ref(), policy.as_os_str()],
        (None, Some(name)) => ["launcher".as_ref(), "--resume".as_ref(), name],
        // The argument group lets nothing else through.
        (None, None) => return ExitCode::from(2),
    };
    let Err(error) = become_launcher(&role, arguments.policy.as_deref());
    complain(&error);
    ExitCode::FAILURE
}

fn become_launcher(role: &[&OsStr], policy: Option<&Path>) -> Result<Infallible, BecomeError> {
    let refused = match ExecutableImage::in_memory() {
        Ok(image) => execute(&image, role),
        Err(ImageError::Memory { source, .. }) => source,
        Err(error) => return Err(error.into()),
    };
    // Where memory files are not executed, a file in the launcher's own state directory takes their place. A launcher that
    // was replaced no longer sees that directory.
    let state = policy.filter(|_| refused.kind() == io::ErrorKind::PermissionDenied).and_then(state_directory);
    let Some(state) = state else { return Err(BecomeError::Memory(refused)) };
    let image = ExecutableImage::in_directory(&state)?;
    let source = execute(&image, role);
    Err(BecomeError::File { path: image.path(), source })
}

fn execute(image: &ExecutableImage, role: &[&OsStr]) -> io::Error {
    Command::new(image.path()).arg0("sandbox-init").args(role).env_clear().exec()
}

/// The launcher reads and checks the policy itself; here only the one path is looked for.
fn state_directory(policy: &Path) -> Option<PathBuf> {
    let table: toml::Table = std::fs::read_to_string(policy).ok()?.parse().ok()?;
    table.get("state_directory")?.as_str().map(PathBuf::from).filter(|path| path.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_directory_is_the_one_of_the_policy_if_it_is_absolute() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let policy = directory.path().join("launcher.toml");
        for (text, expected) in [
            ("state_directory = \"/s\"\n", Some("/s")),
            ("state_directory = \"s\"\n", None),
            ("state_directory = 3\n", None),
            ("not toml", None),
        ] {
            std::fs::write(&policy, text).expect("written");

            assert_eq!(state_directory(&policy).as_deref(), expected.map(Path::new), "{text}");
        }
    }
}
