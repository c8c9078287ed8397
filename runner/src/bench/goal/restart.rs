//! A daemon that dies and the next one, which takes over everything: how long sessions have nobody.

use std::path::Path;
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use tokio::sync::oneshot;

use super::Bench;
use super::objective::Objective;
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::bench::whole::{RUNNER_ID, bash, check, complaints, daemon, link_settings};
use crate::dev::{Link, Orchestrator, Session};
use crate::sandbox::HostSandboxes;

/// Sessions of the objective.
const SESSIONS: u32 = 100;
/// Daemons that follow one another.
const RESTARTS: usize = 10;
/// A daemon has come by then, or it never will.
const PATIENCE: Duration = Duration::from_secs(60);

/// S4.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let directory = bench.fresh_directory("restart")?;
    let orchestrator = Orchestrator::start(link_settings(true)).await?;
    // Where the launcher says how many there are, one is left for the measurement at the start of a daemon.
    let slots = bench.subject.sandboxes().host().slots;
    let count = if slots == 0 { SESSIONS } else { SESSIONS.min(slots.saturating_sub(1)) };
    let mut samples = Samples::default();
    let mut sessions = Vec::new();
    let mut runner = Mortal::start(bench.subject.sandboxes(), &orchestrator, &directory).await?;
    for number in 0..count {
        let limits = pb::ResourceLimits {
            cpu_millis: 0,
            memory_bytes: 32 << 20,
            disk_bytes: 16 << 20,
            pids: 32,
            ..Default::default()
        };
        let request =
            pb::OpenSession { session_id: format!("kept-{number}"), limits: Some(limits), ..Default::default() };
        let session = orchestrator.open_session(request).await?;
        check(&session.run(&format!("set-{number}"), bash(&format!("KEPT={number}"))).await?)?;
        sessions.push(session);
    }
    for round in 0..RESTARTS.min(bench.rounds) {
        runner.die().await?;
        let sandboxes = bench.subject.sandboxes().of_next_runner(u64::try_from(round).unwrap_or(0) + 2);
        let mut seen = orchestrator.watch();
        let begin = Instant::now();
        runner = Mortal::begin(sandboxes, &orchestrator, &directory);
        let resumed = async { while !matches!(seen.recv().await, Ok(Link::Resumed(_)) | Err(_)) {} };
        tokio::select! {
            () = resumed => samples.push(milliseconds(begin)),
            error = runner.failed() => return Err(error),
            () = tokio::time::sleep(PATIENCE) => {
                return Err(BenchError::Link(format!("no daemon came back within {} s", PATIENCE.as_secs())));
            }
        }
        // Each is the same shell as before, or the time means nothing.
        for (number, session) in sessions.iter().enumerate() {
            check(&session.run(&format!("look-{round}-{number}"), bash(&format!("[ $KEPT = {number} ]"))).await?)?;
        }
    }
    for session in &sessions {
        Session::close(session, Duration::ZERO).await?;
    }
    runner.die().await?;
    complaints(&orchestrator)?;
    let objective = Objective { p50: Some(2000.0), p99: Some(5000.0) };
    let note = "from opening the journal to the link resumed with every session; a process needs G19 before it";
    Ok(objective.rows(
        "S4",
        &format!("{count} sessions taken over by the next daemon"),
        Unit::Milliseconds,
        &samples,
        note,
    ))
}

/// A daemon on a thread of its own, which can end as by SIGKILL: nothing of it runs on, and nothing is said to anybody.
struct Mortal {
    thread: std::thread::JoinHandle<()>,
    end: oneshot::Sender<()>,
    failure: oneshot::Receiver<BenchError>,
}

impl Mortal {
    /// Starts one and waits until it is there.
    async fn start(
        sandboxes: HostSandboxes,
        orchestrator: &Orchestrator,
        directory: &Path,
    ) -> Result<Self, BenchError> {
        let mut this = Self::begin(sandboxes, orchestrator, directory);
        tokio::select! {
            come = orchestrator.runner() => come.map(drop)?,
            error = this.failed() => return Err(error),
        }
        Ok(this)
    }

    fn begin(sandboxes: HostSandboxes, orchestrator: &Orchestrator, directory: &Path) -> Self {
        let (end, ended) = oneshot::channel();
        let (failed, failure) = oneshot::channel();
        let (files, address) = (orchestrator.write_client_files(directory, RUNNER_ID), orchestrator.address());
        let directory = directory.to_owned();
        let thread = std::thread::spawn(move || {
            let run = || -> Result<(), BenchError> {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.map_err(|error| BenchError::Link(format!("no runtime: {error}")))?;
                let daemon = runtime.block_on(async { daemon(sandboxes, files?, address, &directory, true) })?;
                // Whether it is told to end or nobody is left who could: both end it.
                let _ = runtime.block_on(ended);
                // First the runtime: what is dropped after it cannot tell a sandbox to end.
                drop(runtime);
                drop(daemon);
                Ok(())
            };
            if let Err(error) = run() {
                // Nobody may be listening any more.
                let _ = failed.send(error);
            }
        });
        Self { thread, end, failure }
    }

    /// Resolves when it could not begin.
    async fn failed(&mut self) -> BenchError {
        match (&mut self.failure).await {
            Ok(error) => error,
            Err(_) => std::future::pending().await,
        }
    }

    async fn die(self) -> Result<(), BenchError> {
        // It may have ended by itself.
        let _ = self.end.send(());
        let thread = self.thread;
        let joined = tokio::task::spawn_blocking(move || thread.join()).await;
        let good = matches!(joined, Ok(Ok(())));
        if good { Ok(()) } else { Err(BenchError::Link("the thread of the daemon panicked".to_owned())) }
    }
}
