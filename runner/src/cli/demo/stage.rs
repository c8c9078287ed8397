//! The inner process of the demo: launcher, runner, orchestrator, two sessions, and the order in which they come and go.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use proto::runner::v1 as pb;
use serde_json::json;

use super::super::embedded::{self, Wishes};
use super::super::{complain, doctor, outcome, print, say};
use super::call::Actor;
use super::latency::{self, Latency};
use super::screen::Screen;
use super::{INTERRUPTED, interactive, steps};
use crate::daemon::Daemon;
use crate::daemon::loopback::{Loopback, LoopbackError};
use crate::dev::{DevError, LinkSettings, Orchestrator, Session};
use crate::sandbox::home::Home;
use crate::sandbox::host::settings as host_settings;
use crate::sandbox::launch::LaunchError;
use crate::sandbox::measure::{MeasureError, Measurement, measure};
use crate::sandbox::start::{LauncherProcess, StartError, StartedLauncher};
use crate::sandbox::{HostSandboxes, receipt::LAYERS};
use crate::shutdown::Signals;
use crate::work::Receipt;

const RUNNER_ID: &str = "demo";
/// The whole show takes seconds; a wedged one must not hang a pipeline.
const PATIENCE: Duration = Duration::from_secs(180);

/// What is to be shown, and where.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) home: PathBuf,
    pub(super) canary: PathBuf,
    pub(super) interactive: bool,
    pub(super) json: bool,
}

/// What stopped the show.
#[derive(Debug, thiserror::Error)]
enum StageError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("the isolation of this host cannot be measured")]
    Measure(#[from] MeasureError),
    #[error(transparent)]
    Dev(#[from] DevError),
    #[error(transparent)]
    Daemon(#[from] LoopbackError),
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
    #[error("the runner (uid {uid}) cannot read the canary itself, so nothing would be proven")]
    Canary { uid: u32, source: std::io::Error },
    #[error("not finished within {} seconds", PATIENCE.as_secs())]
    Patience,
    #[error("interrupted")]
    Interrupted,
}

/// Runs the inner process.
pub(super) fn run(plan: &Plan) -> ExitCode {
    match try_run(plan) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(StageError::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) => {
            complain(&error);
            // Where namespaces are forbidden, nothing above says by what.
            for setting in host_settings() {
                say(&format!("sandbox-runner: {}", doctor::setting_line(&setting)));
            }
            ExitCode::FAILURE
        }
    }
}

fn try_run(plan: &Plan) -> Result<bool, StageError> {
    let home = Home { state: plan.home.join("state"), run: plan.home.join("run") };
    let started = embedded::start_in(&home, &Wishes { pool: 2, ..Wishes::default() })?;
    // When the outer process is killed, this one is told to end as if by a service manager.
    if let Err(error) = nix::sys::prctl::set_pdeathsig(Signal::SIGTERM) {
        tracing::warn!(%error, "the end of the outer process will not be noticed");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(StageError::Runtime)?;
    let (result, process) = runtime.block_on(perform(plan, home, started));
    // A reader of standard input may hang; everything else has ended.
    runtime.shutdown_background();
    if let Some(mut process) = process {
        process.end();
    }
    result
}

async fn perform(
    plan: &Plan,
    home: Home,
    started: StartedLauncher,
) -> (Result<bool, StageError>, Option<LauncherProcess>) {
    match embedded::sandboxes(started) {
        Ok((sandboxes, process)) => (guarded(plan, home, sandboxes).await, Some(process)),
        Err(error) => (Err(error.into()), None),
    }
}

/// A signal ends the show at any point; at a prompt it belongs to the prompt.
async fn guarded(plan: &Plan, home: Home, sandboxes: HostSandboxes) -> Result<bool, StageError> {
    if plan.interactive {
        return show(plan, home, sandboxes).await;
    }
    let mut signals = Signals::listen().map_err(StageError::Signals)?;
    tokio::select! {
        shown = tokio::time::timeout(PATIENCE, show(plan, home, sandboxes)) => shown.map_err(|_| StageError::Patience)?,
        _ = signals.next() => Err(StageError::Interrupted),
    }
}

async fn show(plan: &Plan, home: Home, sandboxes: HostSandboxes) -> Result<bool, StageError> {
    let screen = Screen::new(plan.json);
    screen.line("sandbox-runner demo: an orchestrator, a runner and two sandboxes on this host");
    screen.line("");
    let uid = nix::unistd::geteuid().as_raw();
    let secret = std::fs::read_to_string(&plan.canary).map_err(|source| StageError::Canary { uid, source })?;
    let who = if sandboxes.host().rootless { "an ordinary user throughout" } else { "root was given up" };
    screen.line(&format!("runner      uid {uid} ({who})"));
    let measured = measure(&sandboxes).await?;
    let held = measured.attempts.iter().filter(|attempt| attempt.held).count();
    screen.line(&format!(
        "isolation   tier {}: {held} of {} attacks from inside a throw-away sandbox failed",
        measured.receipt.tier,
        measured.attempts.len()
    ));
    let orchestrator = Orchestrator::start(LinkSettings::default()).await?;
    let begin = Instant::now();
    let daemon = daemon(home, sandboxes, &orchestrator, &measured.receipt)?;
    orchestrator.runner().await?;
    let took = milliseconds(begin);
    screen.line(&format!("link        {} over TLS 1.3 with client certificate, {took}", orchestrator.address()));
    screen.line(&format!("canary      {} (mode 644), and the runner itself can read it", plan.canary.display()));
    let shown = if plan.interactive {
        prompt(&orchestrator, &screen).await.map(|()| Vec::new())
    } else {
        acts(&orchestrator, &screen, plan, secret.trim()).await
    };
    daemon.end(Duration::from_secs(5)).await;
    let complaints = orchestrator.complaints();
    let latencies = shown?;
    let results = screen.results();
    let ok = results.iter().all(|result| result.ok) && complaints.is_empty();
    if !plan.interactive {
        closing(&screen, &measured, &latencies);
        for complaint in &complaints {
            screen.line(&format!("FAIL  protocol: {complaint}"));
        }
        let failed = results.iter().filter(|result| !result.ok).count();
        let skipped = results.iter().filter(|result| result.skipped).count();
        let passed = results.len() - failed - skipped;
        screen.line(&format!("\n{passed} steps did what they should, {failed} did not, {skipped} left out"));
    }
    if plan.json {
        let receipt = outcome::receipt_to_json(&measured.receipt);
        print(&json!({ "ok": ok, "steps": results, "receipt": receipt, "latencies": latencies }).to_string());
    }
    Ok(ok)
}

fn daemon(
    home: Home,
    sandboxes: HostSandboxes,
    orchestrator: &Orchestrator,
    receipt: &Receipt,
) -> Result<Daemon, StageError> {
    let identity = home.state.join("identity");
    let files = orchestrator.write_client_files(&identity, RUNNER_ID)?;
    let loopback = Loopback {
        runner_id: RUNNER_ID,
        dialled: orchestrator.address(),
        files,
        state_directory: home.state,
        run_directory: home.run,
        size: embedded::host_size(),
        receipt: receipt.clone(),
        max_sessions: None,
        durable: false,
    };
    Ok(loopback.start(Arc::new(sandboxes))?)
}

/// Opens both sessions, plays them beside each other, then measures.
async fn acts(
    orchestrator: &Orchestrator,
    screen: &Screen,
    plan: &Plan,
    secret: &str,
) -> Result<Vec<Latency>, StageError> {
    let begin = Instant::now();
    let (a, b) = tokio::try_join!(open(orchestrator, "A", 0), open(orchestrator, "B", steps::MEMORY_B))?;
    screen.line(&format!("sandboxes   A and B made beside each other, {}", milliseconds(begin)));
    screen.line("");
    let actor = |name, session| Actor { name, orchestrator, session, screen };
    let (first, second) = (actor("A", &a), actor("B", &b));
    tokio::try_join!(steps::files(&first), steps::limits(&second, &plan.canary, secret))?;
    let latencies = latency::measure(&a, steps::FILE).await?;
    tokio::try_join!(a.close(Duration::from_secs(1)), b.close(Duration::from_secs(1)))?;
    Ok(latencies)
}

async fn prompt(orchestrator: &Orchestrator, screen: &Screen) -> Result<(), StageError> {
    let session = open(orchestrator, "A", 0).await?;
    interactive::serve(&Actor { name: "A", orchestrator, session: &session, screen }).await?;
    session.close(Duration::from_secs(1)).await?;
    Ok(())
}

async fn open(orchestrator: &Orchestrator, name: &str, memory_bytes: u64) -> Result<Session, DevError> {
    let limits = pb::ResourceLimits { memory_bytes, ..Default::default() };
    let request = pb::OpenSession { session_id: format!("demo-{name}"), limits: Some(limits), ..Default::default() };
    orchestrator.open_session(request).await
}

/// Receipt and latencies.
fn closing(screen: &Screen, measured: &Measurement, latencies: &[Latency]) {
    let layers = &measured.receipt.layers;
    let names = |enforced: bool| -> Vec<&str> {
        layers.iter().filter(|layer| layer.enforced.is_empty() != enforced).map(|layer| layer.name.as_str()).collect()
    };
    screen.line("");
    let in_force = names(true);
    screen.line(&format!(
        "receipt     tier {}, {} of {} layers in force:",
        measured.receipt.tier,
        in_force.len(),
        LAYERS.len()
    ));
    for line in wrapped(&in_force) {
        screen.line(&format!("            {line}"));
    }
    for line in wrapped(&names(false)) {
        screen.line(&format!("  missing   {line}"));
    }
    screen.line("latency     from request to result, over the whole way");
    for latency in latencies {
        screen.line(&format!(
            "            {:<20} {:>3} calls   p50 {:7.2} ms   p99 {:7.2} ms",
            latency.what, latency.calls, latency.p50_ms, latency.p99_ms
        ));
    }
}

fn wrapped(names: &[&str]) -> Vec<String> {
    names.chunks(6).map(|names| names.join(", ")).collect()
}

fn milliseconds(begin: Instant) -> String {
    format!("{:.1} ms", begin.elapsed().as_secs_f64() * 1000.0)
}
