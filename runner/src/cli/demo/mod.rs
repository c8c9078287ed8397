//! `sandbox-runner demo`: a whole installation in one command: an orchestrator, a runner connected to it over mutual TLS, a
//! launcher, two sandboxes; shown at work, checked, and gone without a trace.
//!
//! Two processes. The outer one stays what the caller is, makes the throw-away directory and the canary, waits, and removes
//! both whatever happened. The inner one gives up root and does the rest.

mod call;
mod interactive;
mod latency;
mod screen;
mod stage;
mod steps;

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::{complain, say};

/// Interrupted commands end with this, as shells have it.
const INTERRUPTED: u8 = 130;
/// The inner process ends its sandboxes within this; after that it is killed, and the launcher ends them.
const END_TIME: Duration = Duration::from_secs(40);

#[derive(Debug, Args)]
pub(super) struct DemoArguments {
    /// Take tool calls at a prompt instead of showing the prepared ones
    #[arg(long)]
    interactive: bool,
    /// Print one JSON object with every step, receipt and latencies; the show goes to standard error
    #[arg(long, conflicts_with = "interactive")]
    json: bool,
    /// Directory in which a throw-away state directory is made
    #[arg(long, value_name = "DIR", default_value = "/tmp")]
    state_dir: PathBuf,
    /// The throw-away directory; this is the inner process
    #[arg(long, value_name = "DIR", hide = true, requires = "canary")]
    inside: Option<PathBuf>,
    /// The canary of the outer process
    #[arg(long, value_name = "FILE", hide = true)]
    canary: Option<PathBuf>,
}

/// Why there is no show.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("cannot make the throw-away directory in {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot plant the canary in {}", path.display())]
    Canary { path: PathBuf, source: io::Error },
    #[error("cannot start the inner process")]
    Spawn(#[source] io::Error),
    #[error("cannot wait for the inner process")]
    Wait(#[source] io::Error),
    #[error("cannot remove {}", path.display())]
    Remove { path: PathBuf, source: io::Error },
}

/// Runs the subcommand.
pub(super) fn run(arguments: &DemoArguments) -> ExitCode {
    if let (Some(home), Some(canary)) = (&arguments.inside, &arguments.canary) {
        return stage::run(&stage::Plan {
            home: home.clone(),
            canary: canary.clone(),
            interactive: arguments.interactive,
            json: arguments.json,
        });
    }
    match outer(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// A file that every user of the host can read, in a directory that every user can pass through.
struct Canary {
    directory: TempDir,
    file: PathBuf,
}

impl Canary {
    fn plant() -> Result<Self, DemoError> {
        let base = Path::new("/var/tmp");
        let failed = |source| DemoError::Canary { path: base.to_path_buf(), source };
        let directory = tempfile::Builder::new().prefix("sandbox-runner-canary-").tempdir_in(base).map_err(failed)?;
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).map_err(failed)?;
        let file = directory.path().join("canary");
        fs::write(&file, format!("secret of this host: {}\n", uuid::Uuid::new_v4().simple())).map_err(failed)?;
        fs::set_permissions(&file, Permissions::from_mode(0o644)).map_err(failed)?;
        Ok(Self { directory, file })
    }
}

fn outer(arguments: &DemoArguments) -> Result<u8, DemoError> {
    let failed = |source| DemoError::Directory { path: arguments.state_dir.clone(), source };
    let base = fs::canonicalize(&arguments.state_dir).map_err(failed)?;
    let home = tempfile::Builder::new().prefix("sandbox-runner-demo-").tempdir_in(base).map_err(failed)?;
    // The runner is another user when the caller is root, and has to get to its own directories.
    let mode = if nix::unistd::geteuid().is_root() { 0o711 } else { 0o700 };
    fs::set_permissions(home.path(), Permissions::from_mode(mode)).map_err(failed)?;
    let canary = Canary::plant()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DemoError::Wait)?;
    let ended = runtime.block_on(supervise(arguments, home.path(), &canary.file));
    drop(runtime);
    for directory in [canary.directory, home] {
        let path = directory.path().to_path_buf();
        directory.close().map_err(|source| DemoError::Remove { path, source })?;
    }
    ended
}

/// Runs the inner process to its end, whatever is sent to this one.
async fn supervise(arguments: &DemoArguments, home: &Path, canary: &Path) -> Result<u8, DemoError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(DemoError::Wait)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(DemoError::Wait)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DemoError::Wait)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0("sandbox-runner").arg("demo").arg("--inside").arg(home).arg("--canary").arg(canary);
    if arguments.interactive {
        command.arg("--interactive");
    }
    if arguments.json {
        command.arg("--json");
    }
    let mut child = command.spawn().map_err(DemoError::Spawn)?;
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status.map_err(DemoError::Wait)?;
                return Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1));
            }
            // At a prompt an interrupt belongs to the running call, and the terminal has told the inner process already.
            _ = interrupt.recv() => if arguments.interactive { continue },
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
        return end(&mut child).await;
    }
}

async fn end(child: &mut Child) -> Result<u8, DemoError> {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        // Gone already, or told; both are fine.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(END_TIME, child.wait()).await.is_err() {
        say("sandbox-runner: the demo does not end by itself, killing it");
        child.kill().await.map_err(DemoError::Wait)?;
    }
    Ok(INTERRUPTED)
}
