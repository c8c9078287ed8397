//! The whole way: an orchestrator, mutual TLS on a loopback port, a daemon, and sandboxes of the benchmark's launcher.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::call::Input;
use proto::runner::v1::outcome::Kind;

use super::BenchError;
use super::subject::milliseconds;
use crate::config::launcher_policy::HostSize;
use crate::connector::tls::TlsFiles;
use crate::daemon::Daemon;
use crate::daemon::loopback::Loopback;
use crate::dev::{CallOutcome, LinkSettings, Orchestrator, Session};
use crate::sandbox::HostSandboxes;
use crate::work::Sandboxes;

/// Name of the daemon.
pub const RUNNER_ID: &str = "bench";
/// More than any goal opens.
const SESSIONS: u64 = 512;
/// More output under way than any distance of this benchmark can hold.
const OUTPUT_WINDOW: u64 = 16 * 1024 * 1024;
/// Kept of the output of one call.
const OUTPUT_HEAD: u64 = 32 * 1024 * 1024;

/// An orchestrator and the daemon that is connected to it.
pub struct Whole {
    orchestrator: Orchestrator,
    daemon: Daemon,
    serial: AtomicU64,
}

impl Whole {
    /// Begins both and waits until the daemon is there. `settings` is how the orchestrator keeps the link; with `durable`
    /// the daemon keeps a journal; `way` is where the daemon dials for an orchestrator at an address. Certificates and the
    /// identity are kept in `directory`.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn start(
        sandboxes: HostSandboxes,
        directory: &Path,
        (settings, durable): (LinkSettings, bool),
        way: impl AsyncFnOnce(SocketAddr) -> Result<SocketAddr, BenchError>,
    ) -> Result<Self, BenchError> {
        let orchestrator = Orchestrator::start(settings).await?;
        let dialled = way(orchestrator.address()).await?;
        let daemon =
            daemon(sandboxes, orchestrator.write_client_files(directory, RUNNER_ID)?, dialled, directory, durable)?;
        orchestrator.runner().await?;
        Ok(Self { orchestrator, daemon, serial: AtomicU64::new(0) })
    }

    /// The orchestrator.
    pub fn orchestrator(&self) -> &Orchestrator {
        &self.orchestrator
    }

    /// A session with a living sandbox.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn session(&self) -> Result<Session, BenchError> {
        open(&self.orchestrator, &format!("bench-{}", self.number())).await
    }

    fn number(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Milliseconds from sending a call to having its good end with all its output.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn call(&self, session: &Session, input: Input) -> Result<(f64, CallOutcome), BenchError> {
        let call_id = format!("call-{}", self.number());
        // Room for everything that is asked of a call here: what was dropped could not be measured.
        let output = pb::OutputPolicy { head_bytes: OUTPUT_HEAD, ..Default::default() };
        let request =
            pb::Call { call_id: call_id.clone(), input: Some(input), output: Some(output), ..Default::default() };
        let start = Instant::now();
        session.send_call(request);
        let outcome = session.outcome(&call_id).await?;
        let took = milliseconds(start);
        check(&outcome)?;
        Ok((took, outcome))
    }

    /// Ends both in order, with the sandboxes of their sessions.
    ///
    /// # Errors
    /// When the daemon did not keep to the protocol.
    pub async fn end(self) -> Result<(), BenchError> {
        self.daemon.end(Duration::ZERO).await;
        complaints(&self.orchestrator)
    }
}

/// How an orchestrator that expects distant runners keeps its links.
pub fn link_settings(windows: bool) -> LinkSettings {
    LinkSettings { window: OUTPUT_WINDOW, windows, ..LinkSettings::default() }
}

/// A session with a living sandbox.
///
/// # Errors
/// [`BenchError`].
pub async fn open(orchestrator: &Orchestrator, session_id: &str) -> Result<Session, BenchError> {
    let request = pb::OpenSession { session_id: session_id.to_owned(), ..Default::default() };
    Ok(orchestrator.open_session(request).await?)
}

/// A command of the shell, as it is sent.
pub fn bash(command: &str) -> Input {
    Input::Bash(pb::BashInput { command: Some(command.to_owned()), ..Default::default() })
}

/// A call that ended otherwise has no time.
///
/// # Errors
/// [`BenchError::Link`].
pub fn check(outcome: &CallOutcome) -> Result<(), BenchError> {
    let failed = outcome.message.result.as_ref().is_some_and(|result| result.is_error);
    match outcome.message.outcome.as_ref().and_then(|outcome| outcome.kind.as_ref()) {
        Some(Kind::Exited(exited)) if exited.code == 0 && !failed => Ok(()),
        kind => Err(BenchError::Link(format!("a call ended with {kind:?}: {:?}", outcome.message.result))),
    }
}

/// What an orchestrator found wrong.
///
/// # Errors
/// [`BenchError::Link`].
pub fn complaints(orchestrator: &Orchestrator) -> Result<(), BenchError> {
    match orchestrator.complaints().as_slice() {
        [] => Ok(()),
        found => Err(BenchError::Link(format!("the daemon broke the protocol: {}", found.join("; ")))),
    }
}

/// A daemon in this process, with what an earlier one has left in `directory`.
///
/// # Errors
/// [`BenchError::Link`].
pub fn daemon(
    sandboxes: HostSandboxes,
    files: TlsFiles,
    dialled: SocketAddr,
    directory: &Path,
    durable: bool,
) -> Result<Daemon, BenchError> {
    let failed = |error: String| BenchError::Link(format!("the daemon cannot be configured: {error}"));
    std::fs::create_dir_all(directory.join("identity")).map_err(|error| failed(error.to_string()))?;
    let loopback = Loopback {
        runner_id: RUNNER_ID,
        dialled,
        files,
        state_directory: directory.to_owned(),
        run_directory: directory.to_owned(),
        // Large enough for all sessions; admission is not what is measured.
        size: HostSize { memory_bytes: 64 << 30, processors: 2 },
        max_sessions: Some(SESSIONS),
        receipt: sandboxes.receipt(),
        durable,
    };
    loopback.start(Arc::new(sandboxes)).map_err(|error| failed(error.to_string()))
}
