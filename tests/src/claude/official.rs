//! The worker of the official Python SDK as a process, so that the control plane of the tests is measured against it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Environment, Mock};

/// The program that runs it.
const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/official/worker.py");
/// Where `.ci/tools sdk` installs it.
const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ci/sdk/bin/python");

/// Leaves the test unless the official SDK is installed; gives its Python.
#[macro_export]
macro_rules! needs_official_sdk {
    () => {
        match $crate::claude::official::python() {
            Ok(python) => python,
            Err(reason) => $crate::skip!("{reason}"),
        }
    };
}

/// The Python that has the SDK.
///
/// # Errors
/// The reason why there is none, and what installs it.
pub fn python() -> Result<PathBuf, String> {
    let missing = |why: String| Err(format!("the official SDK is not here ({why}): run `.ci/tools sdk`"));
    match Command::new(PYTHON).args(["-c", "import anthropic.lib.environments"]).output() {
        Ok(output) if output.status.success() => Ok(PathBuf::from(PYTHON)),
        Ok(output) => missing(String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned()),
        Err(error) => missing(format!("{PYTHON}: {error}")),
    }
}

/// A running worker. Dropping it kills it; when the test fails, what it logged is printed.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    home: tempfile::TempDir,
}

impl Worker {
    /// Starts a worker that serves `environment`, and stops to serve a session that is idle for `max_idle` seconds.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(python: &Path, mock: &Mock, environment: &Environment, max_idle: f64) -> Self {
        let home = tempfile::tempdir().expect("a directory of our own");
        std::fs::create_dir(home.path().join("workspace")).expect("a directory in it");
        let log = File::create(home.path().join("log")).expect("a file in it");
        let child = Command::new(python)
            .arg(PROGRAM)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("HOME", home.path())
            .env("LANG", "C.UTF-8")
            .env("NO_PROXY", "127.0.0.1")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("MOCK_URL", mock.base_url())
            .env("MOCK_ENVIRONMENT_ID", &environment.id)
            .env("MOCK_ENVIRONMENT_KEY", &environment.keys[0])
            .env("MOCK_WORKER_ID", format!("official-{}", home.path().file_name().unwrap_or_default().display()))
            .env("MOCK_WORKDIR", home.path().join("workspace"))
            .env("MOCK_MAX_IDLE", max_idle.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("a Python that can be started");
        Self { child, home }
    }

    /// The directory that its tools work in, without links.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn workdir(&self) -> PathBuf {
        self.home.path().join("workspace").canonicalize().expect("the directory of a worker")
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("log")).unwrap_or_default()
    }

    /// Asks it to end.
    ///
    /// # Panics
    /// When its process cannot be signalled.
    pub fn terminate(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"));
        kill(pid, Signal::SIGTERM).expect("a process of our own");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            #[allow(clippy::print_stderr, reason = "the test runner shows it")]
            {
                eprintln!("the official worker logged:\n{}", self.log());
            }
        }
    }
}
