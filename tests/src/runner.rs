//! Finds the built programs and drives `sandbox-runner exec` as root or as an ordinary user.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::prober::{self, Row};
use crate::rootfs::{self, PROBER};

/// The ordinary user of the tests: nobody on every distribution, with no home and no subordinate ids.
pub const NOBODY: u32 = 65_534;
/// No sandbox of these suites needs longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Directory in which cargo put the programs of this build, for instance `target/x86_64-unknown-linux-gnu/debug`.
///
/// # Errors
/// When the test binary does not lie where cargo puts it.
pub fn profile_directory() -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe().context("finding the test binary")?;
    let directory = test.parent().and_then(Path::parent).context("the test binary is not below a target directory")?;
    Ok(directory.to_path_buf())
}

/// The target directory itself.
///
/// # Errors
/// When the test binary does not lie where cargo puts it.
pub fn target_directory() -> anyhow::Result<PathBuf> {
    let profile = profile_directory()?;
    // Cargo marks the directories of the target triples as well, and does not mark one that it found made; the directory
    // that holds the embedded program is the one that is meant.
    let above = || profile.ancestors().take(4);
    let holder = above().find(|directory| directory.join("sandbox-init").is_dir());
    let marked = above().filter(|directory| directory.join("CACHEDIR.TAG").exists()).last();
    Ok(holder.or(marked).unwrap_or(&profile).to_path_buf())
}

/// The command under test.
///
/// # Panics
/// When it was not built, with the command that builds it.
pub fn binary() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        if let Some(path) = std::env::var_os("SANDBOX_RUNNER_BINARY") {
            return path.into();
        }
        let path = profile_directory().expect("cargo's own directory").join("sandbox-runner");
        assert!(
            path.exists(),
            "{} does not exist: these suites drive the built command; run `cargo test --workspace`, which builds it",
            path.display()
        );
        path
    })
}

/// `sandbox-init` as a file: what the command carries, for tests that start a launcher themselves.
///
/// # Panics
/// When it was not built.
#[must_use]
pub fn sandbox_init() -> PathBuf {
    if let Some(path) = std::env::var_os("SANDBOX_INIT_UNDER_TEST") {
        return path.into();
    }
    let target = target_directory().expect("cargo's own directory");
    let mut candidates: Vec<PathBuf> = crate::host::files_below(&target.join("sandbox-init"))
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|name| name == "sandbox-init") && path.is_file())
        .filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o100 != 0))
        .collect();
    candidates.sort_by_key(|path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok());
    candidates.pop().unwrap_or_else(|| {
        panic!(
            "no sandbox-init below {}: run `cargo test --workspace`, which builds it",
            target.join("sandbox-init").display()
        )
    })
}

/// Who runs the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Caller {
    /// uid 0.
    Root,
    /// uid 65534, without any privilege.
    Nobody,
}

impl Caller {
    /// Both, for tests that must hold for either.
    pub const BOTH: [Self; 2] = [Self::Root, Self::Nobody];

    /// The uid.
    #[must_use]
    pub fn uid(self) -> u32 {
        match self {
            Self::Root => 0,
            Self::Nobody => NOBODY,
        }
    }

    /// Why this caller cannot be played here.
    #[must_use]
    pub fn obstacle(self) -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some(format!("only root can run the command as uid {}", self.uid()));
        }
        if self == Self::Root {
            return None;
        }
        static REACHABLE: OnceLock<Option<String>> = OnceLock::new();
        REACHABLE
            .get_or_init(|| {
                let status =
                    self.command(binary()).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
                match status {
                    Ok(_) => None,
                    Err(error) => Some(format!("uid {NOBODY} cannot execute {}: {error}", binary().display())),
                }
            })
            .clone()
    }

    /// A command run by this caller.
    #[must_use]
    pub fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if self == Self::Nobody {
            command.uid(NOBODY).gid(NOBODY).current_dir("/");
            command.env("HOME", "/nonexistent");
        }
        command
    }
}

/// One `sandbox-runner exec`.
#[derive(Debug)]
pub struct Exec {
    caller: Caller,
    options: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    state: TempDir,
}

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// All of standard output.
    pub stdout: Vec<u8>,
    /// All of standard error.
    pub stderr: Vec<u8>,
    /// Wall time.
    pub took: Duration,
}

impl Finished {
    /// Exit code, or 128 + signal number as a shell tells it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The prober's lines.
    ///
    /// # Panics
    /// When there are none; the command's own error is in the message.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        prober::rows(&self.stdout).unwrap_or_else(|error| {
            panic!("{error:#}; exit {}, stdout: {}, stderr: {}", self.code(), self.text(), self.errors())
        })
    }
}

impl Exec {
    /// A sandbox with a state directory of its own, so that what it leaves behind can be found.
    ///
    /// # Panics
    /// When the temporary directory is unusable.
    #[must_use]
    pub fn new(caller: Caller) -> Self {
        let state = rootfs::shared_directory("state");
        fs::set_permissions(state.path(), Permissions::from_mode(0o700)).expect("chmod of an own directory");
        if caller == Caller::Nobody {
            chown(state.path(), Some(NOBODY), Some(NOBODY)).expect("chown as root");
        }
        Self { caller, options: Vec::new(), environment: Vec::new(), state }
    }

    /// The same with a root filesystem.
    #[must_use]
    pub fn in_rootfs(caller: Caller, rootfs: &Path) -> Self {
        Self::new(caller).option("--rootfs", rootfs)
    }

    /// Adds `name value`.
    #[must_use]
    pub fn option(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.options.extend([name.into(), value.into()]);
        self
    }

    /// Adds a flag without a value.
    #[must_use]
    pub fn flag(mut self, name: &str) -> Self {
        self.options.push(name.into());
        self
    }

    /// Adds a variable to the environment of the command itself, not of the workload.
    #[must_use]
    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The state directory.
    #[must_use]
    pub fn state_directory(&self) -> &Path {
        self.state.path()
    }

    /// The command line, ready to be started.
    #[must_use]
    pub fn command<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = self.caller.command(binary());
        command.arg("exec");
        if !self.options.iter().any(|option| option == "--state-dir") {
            command.arg("--state-dir").arg(self.state.path());
        }
        command.args(&self.options).arg("--").args(arguments.into_iter().map(Into::into));
        command.envs(self.environment.iter().cloned());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts the prober with `arguments` and waits for its end.
    ///
    /// # Panics
    /// When it cannot be started or does not end.
    #[must_use]
    pub fn prober<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        self.run([OsString::from(PROBER)].into_iter().chain(arguments.into_iter().map(Into::into)))
    }

    /// Starts `arguments` and waits for the end.
    ///
    /// # Panics
    /// When it cannot be started or does not end.
    #[must_use]
    pub fn run<A: Into<OsString>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        finish(self.command(arguments), PATIENCE).expect("the command ends")
    }
}

/// Starts a command and waits for its end; kills it when that takes too long.
///
/// # Errors
/// When it cannot be started or had to be killed.
pub fn finish(mut command: Command, patience: Duration) -> anyhow::Result<Finished> {
    let patience = scaled(patience);
    let begin = Instant::now();
    let mut child = command.spawn().with_context(|| format!("starting {}", command.get_program().display()))?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let status = wait_until(&mut child, begin + patience);
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    let Some(status) = status else {
        bail!(
            "no end within {patience:?}; stdout: {}, stderr: {}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        );
    };
    Ok(Finished { status, stdout, stderr, took: begin.elapsed() })
}

/// Waits for a child; `None` when it had to be killed.
pub fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    wait_until(child, Instant::now() + scaled(patience))
}

/// A time that nothing takes, on this machine: `SANDBOX_TEST_PATIENCE` says how many times slower than a real one it is.
#[must_use]
pub fn scaled(patience: Duration) -> Duration {
    patience * slowness()
}

/// Whether this machine is many times slower than a real one, so that a test may take a smaller measure of the same.
#[must_use]
pub fn is_slow() -> bool {
    slowness() > 2
}

fn slowness() -> u32 {
    std::env::var("SANDBOX_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            _ => break,
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// Reads everything in a thread of its own, because a full pipe would stop the command.
fn drain<R: Read + Send + 'static>(source: Option<R>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut source) = source {
            // Whatever was read until an error is what there was.
            let _ = source.read_to_end(&mut all);
        }
        all
    })
}
