//! `sandbox-runner run`: the daemon. Configuration, launcher, isolation measured and compared with the floor, then work.
//!
//! Started as root, it gives root up before the first thread exists and before anything is read from a network.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::fs::{FsWord, statfs};
use tracing::{info, warn};

use super::config::{self, DEFAULT_PATH};
use super::embedded::{self, Wishes};
use super::{code, complain, floor, say};
use crate::config::resolved::Config;
use crate::connector::claude;
use crate::connector::orchestrator;
use crate::daemon::settings::{self, SettingsError};
use crate::daemon::{AdminSocket, Daemon, DaemonError, End, Parts, Unasked};
use crate::journal::{FileJournal, Journal, OpenError, Recovered, Volatile};
use crate::last_words;
use crate::sandbox::HostSandboxes;
use crate::sandbox::home::{Home, Identity};
use crate::sandbox::identity::{IdentityError, become_identity};
use crate::sandbox::launch::{HostReport, LaunchError, Launcher};
use crate::sandbox::measure::{MeasureError, Measurement, measure};
use crate::sandbox::receipt::Tier;
use crate::sandbox::start::{LauncherProcess, StartError, StartedLauncher};
use crate::shutdown::{Signal, Signals};
use crate::systemd::{Environment, Notifier};
use crate::telemetry::{self, LogLevel};
use crate::work::{Receipt, SandboxId, Sandboxes};

/// How long accepted calls may go on after a signal; with what follows it stays below the unit's TimeoutStopSec.
const DRAIN_TIME: Duration = Duration::from_secs(90);
/// A launcher that starts at the same moment needs a little until it listens.
const LAUNCHER_PATIENCE: Duration = Duration::from_secs(10);
/// Kinds of file system, by statfs(2).
const TMPFS_MAGIC: FsWord = 0x0102_1994;
const RAMFS_MAGIC: FsWord = 0x8584_58f6;
const OVERLAYFS_MAGIC: FsWord = 0x794c_7630;
/// Sandboxes kept half-made by a launcher of our own.
const POOL: u32 = 4;

#[derive(Debug, Args)]
pub(super) struct RunArguments {
    /// Configuration file
    #[arg(long, value_name = "FILE", env = "RUNNER_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Directory for everything the runner keeps, in place of the configured ones
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Keep no journal: what runs when this process dies is lost, and the orchestrator is told so in advance
    #[arg(long)]
    ephemeral: bool,
}

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error("--state-dir {} cannot be made absolute", path.display())]
    StateDirectory { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot look at launcher socket {}", path.display())]
    Socket { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("the isolation of this host cannot be measured")]
    Measure(#[from] MeasureError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    Unasked(#[from] Unasked),
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
    #[error("the socket that systemd names cannot be used")]
    Notifier(#[source] std::io::Error),
    #[error(transparent)]
    Journal(#[from] OpenError),
    #[error(
        "state directory {} is on {kind}, which is empty after the next start of the machine, and the journal must not be; put \
         it on a disk (state_directory in [runner], or --state-dir), or give up the journal with --ephemeral",
        path.display()
    )]
    Forgetful { path: PathBuf, kind: &'static str },
    #[error("cannot look at the file system of {}", path.display())]
    FileSystem { path: PathBuf, source: rustix::io::Errno },
    #[error("isolation is below the floor")]
    BelowFloor,
}

/// Where sandboxes will come from.
enum Source {
    /// A launcher of our own, which ends with us.
    Own(Box<StartedLauncher>),
    /// A service of its own; sandboxes outlive this process.
    Service(PathBuf),
}

/// Runs the subcommand.
pub(super) fn run(arguments: &RunArguments, log_level: Option<LogLevel>) -> ExitCode {
    let mut config = match config::load(&arguments.config) {
        Ok(config) => config,
        Err(problems) => {
            for problem in &problems {
                say(&format!("sandbox-runner: {problem}"));
            }
            return ExitCode::from(code::CONFIGURATION);
        }
    };
    telemetry::start(config.log_format, log_level.unwrap_or(config.log_level));
    match try_run(arguments, &mut config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// Says why, and gives the code that tells a supervisor whether to try again.
pub(super) fn failed(error: &RunError) -> ExitCode {
    if matches!(error, RunError::BelowFloor) {
        // Each missing layer has been named.
        return ExitCode::from(code::BELOW_FLOOR);
    }
    complain(error);
    if needs_the_operator(error) { ExitCode::from(code::CONFIGURATION) } else { ExitCode::FAILURE }
}

/// Whether another attempt would end in the same way.
fn needs_the_operator(error: &RunError) -> bool {
    match error {
        // A renewal that is half written, or a clock that is not set yet, must not leave a runner dead.
        RunError::Settings(SettingsError::Certificates(problem))
        | RunError::Daemon(DaemonError::Certificates(problem)) => problem.is_final(),
        RunError::Settings(_) | RunError::Daemon(DaemonError::Queue { .. }) | RunError::Forgetful { .. } => true,
        // What is written there does not change by trying again.
        RunError::Journal(OpenError::Scan(_)) => true,
        _ => false,
    }
}

fn try_run(arguments: &RunArguments, config: &mut Config) -> Result<(), RunError> {
    let given =
        arguments.state_dir.as_ref().map(std::path::absolute).transpose().map_err(|source| {
            RunError::StateDirectory { path: arguments.state_dir.clone().unwrap_or_default(), source }
        })?;
    let source = match config.launcher_socket.clone().filter(|_| given.is_none()) {
        Some(path) => {
            give_up_root_for(&path)?;
            Source::Service(path)
        }
        None => {
            let home = own_home(config, given.as_deref());
            (config.state_directory, config.run_directory) = (home.state.clone(), home.run.clone());
            // One more, because the isolation is measured in a sandbox of its own.
            let sandboxes = u32::try_from(config.capacity.max_sessions).unwrap_or(u32::MAX).saturating_add(1);
            let wishes = Wishes { pool: POOL, sandboxes, allow_nested: true, ..Wishes::default() };
            Source::Own(Box::new(embedded::start_in(&home, &wishes)?))
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(RunError::Runtime)?;
    let (result, process) = runtime.block_on(serve(config, source, arguments.ephemeral));
    if matches!(result, Ok(End::Left)) {
        // What is in it would end every sandbox when it is dropped, and the next runner wants them alive.
        std::mem::forget(runtime);
        return Ok(());
    }
    // What is still open belongs to links and sockets that are over.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Some(mut process) = process {
        process.end();
    }
    result.map(|_| ())
}

/// An ordinary user who has configured no directories has none of the system's.
pub(super) fn own_home(config: &Config, given: Option<&Path>) -> Home {
    let configured = Home { state: config.state_directory.clone(), run: config.run_directory.clone() };
    let system = Home { state: "/var/lib/sandbox-runner".into(), run: "/run/sandbox-runner".into() };
    if given.is_some() || configured == system { embedded::home(given) } else { configured }
}

/// The launcher serves one user; its socket belongs to that user.
fn give_up_root_for(socket: &Path) -> Result<(), RunError> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let failed = |source| RunError::Socket { path: socket.to_path_buf(), source };
    let found = std::fs::symlink_metadata(socket).map_err(failed)?;
    Ok(become_identity(Identity { uid: found.uid(), gid: found.gid() })?)
}

async fn serve(config: &Config, source: Source, ephemeral: bool) -> (Result<End, RunError>, Option<LauncherProcess>) {
    match source {
        Source::Own(started) => match embedded::sandboxes(*started) {
            Ok((sandboxes, process)) => (serve_with(config, sandboxes, ephemeral, None).await, Some(process)),
            Err(error) => (Err(error.into()), None),
        },
        Source::Service(path) => match connect(config, &path, !ephemeral).await {
            Ok(sandboxes) => (serve_with(config, sandboxes, ephemeral, None).await, None),
            Err(error) => (Err(error.into()), None),
        },
    }
}

/// With `outlive`, sandboxes stay for the next runner when this one ends without ending them.
async fn connect(config: &Config, path: &Path, outlive: bool) -> Result<HostSandboxes, LaunchError> {
    let deadline = Instant::now() + LAUNCHER_PATIENCE;
    let (launcher, host) = loop {
        match Launcher::connect(path).await {
            Ok(connected) => break connected,
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    };
    let home = Home { state: config.state_directory.clone(), run: config.run_directory.clone() };
    let sandboxes = HostSandboxes::new(launcher, host, home.sandboxes(), generation());
    Ok(if outlive { sandboxes.outliving() } else { sandboxes })
}

/// Larger than that of every earlier runner since the boot, which is as long as a sandbox lives.
fn generation() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.ok().and_then(|time| u64::try_from(Duration::from(time).as_millis()).ok()).unwrap_or(1).max(1)
}

/// Sessions that leave one of the launcher's `slots` free, where it says how many there are: the next runner measures the
/// isolation in a sandbox of its own while the sessions of this one live on, and without a slot it would never begin.
fn sessions_within(asked: u64, slots: u32) -> u64 {
    if slots == 0 { asked } else { asked.min(u64::from(slots - 1).max(1)) }
}

/// Takes one session less than the launcher has slots, where sandboxes live on for the next runner.
fn leave_a_slot(config: &Config, sandboxes: &HostSandboxes) -> Config {
    let (mut config, slots) = (config.clone(), sandboxes.host().slots);
    let asked = config.capacity.max_sessions;
    if sandboxes.outlive_us() {
        config.capacity.max_sessions = sessions_within(asked, slots);
    }
    if config.capacity.max_sessions < asked {
        warn!(
            asked,
            slots, "fewer sessions are taken: one slot of the launcher is for the measurement after a restart"
        );
    }
    config
}

/// Attacks a throw-away sandbox; or says how to end, when a signal comes before that is over. `kept` are the sandboxes of
/// an earlier runner.
async fn measure_unless_ended(
    sandboxes: &HostSandboxes,
    signals: &mut Signals,
    kept: &[SandboxId],
) -> Result<Result<Measurement, End>, RunError> {
    let mut measuring = std::pin::pin!(measure(sandboxes));
    let mut makes_room = false;
    loop {
        tokio::select! {
            measured = &mut measuring => match measured {
                Err(MeasureError::Create(error)) if error.is_full() && !makes_room => {
                    warn!("sandboxes that no session has take the room that the measurement needs, they are ended");
                    makes_room = true;
                    sandboxes.end_others(kept).await?;
                    measuring.set(measure(sandboxes));
                }
                measured => return Ok(Ok(measured?)),
            },
            signal = signals.next() => match signal {
                Signal::Reload => {}
                Signal::Leave if sandboxes.outlive_us() => return Ok(Err(End::Left)),
                Signal::Leave | Signal::Drain | Signal::Now => {
                    // Whoever asks for the end before the beginning wants nothing to be left all the same.
                    sandboxes.end_all(kept).await?;
                    return Ok(Err(End::Done));
                }
            },
        }
    }
}

/// Serves what is configured until a signal comes; with `one`, that work item until it is over, and nothing else.
pub(super) async fn serve_with(
    config: &Config,
    sandboxes: HostSandboxes,
    ephemeral: bool,
    one: Option<claude::Settings>,
) -> Result<End, RunError> {
    let config = &leave_a_slot(config, &sandboxes);
    // From here a signal ends in order, also while the host is being measured.
    let mut signals = Signals::listen().map_err(RunError::Signals)?;
    let identity = settings::identity(&settings::runner_id(config)?, &config.state_directory)?;
    let (journal, mut recovered) = journal(config, &identity, ephemeral)?;
    if !ephemeral {
        let directory = settings::identity_directory(&config.state_directory);
        recovered.panicked = last_words::hear_in(&directory);
        last_words::leave_in(&directory);
    }
    let kept: Vec<_> =
        recovered.sessions.iter().filter_map(|session| session.sandbox.as_ref()).map(|(id, _)| id.clone()).collect();
    if sandboxes.outlive_us() {
        // A newer state than this one may know those that no session here has.
        sandboxes.count_on(&kept).await?;
    } else {
        sandboxes.end_others(&kept).await?;
    }
    let measured = match measure_unless_ended(&sandboxes, &mut signals, &kept).await? {
        Ok(measured) => measured,
        Err(end) => return Ok(end),
    };
    info!(tier = measured.receipt.tier, attacks = measured.attempts.len(), "isolation measured");
    check_floor(config, &measured.receipt, sandboxes.host())?;
    // The service manager of whoever serves one item for another process is not ours.
    let environment = if one.is_some() { Environment::default() } else { Environment::read() };
    let notifier = Notifier::new(&environment, std::process::id()).map_err(RunError::Notifier)?;
    let descriptors = all_descriptors();
    let mut queues = settings::queues(config, &identity.instance_id, ephemeral)?;
    let admin = AdminSocket { path: config.run_directory.join("admin.sock"), own_uid: nix::unistd::geteuid().as_raw() };
    // Whoever hands an item on waits for 30 seconds between asking for the end and forcing it.
    let (admin, drain_time) = if one.is_some() { (None, Duration::ZERO) } else { (Some(admin), DRAIN_TIME) };
    queues.extend(one);
    let link = settings::link(config, identity, measured.receipt, ephemeral)?;
    if link.is_none() && queues.is_empty() {
        warn!("neither [orchestrator] nor [[claude]] is configured, so no work will come");
    }
    let daemon = Daemon::start(Parts {
        sandboxes: Arc::new(sandboxes),
        journal,
        recovered,
        reserve: settings::reserve(config, descriptors),
        defaults: settings::defaults(config),
        idle: settings::idle(config),
        pressure: settings::pressure(config),
        link,
        queues,
        admin,
        drain_time,
    })?;
    Ok(daemon.run(signals, &notifier).await?)
}

/// Takes as many descriptors as this process may have, and says how many that are.
fn all_descriptors() -> u64 {
    let Ok((now, most)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, most, most) {
        Ok(()) => most,
        Err(_) => now,
    }
}

/// The journal of this runner, and what an earlier one left in it.
fn journal(
    config: &Config,
    identity: &orchestrator::Identity,
    ephemeral: bool,
) -> Result<(Arc<dyn Journal>, Recovered), RunError> {
    if ephemeral {
        warn!("no journal is kept: what runs when this process dies is lost");
        return Ok((Arc::new(Volatile), Recovered::default()));
    }
    let state = &config.state_directory;
    let file_system = statfs(state).map_err(|source| RunError::FileSystem { path: state.clone(), source })?;
    match file_system.f_type {
        TMPFS_MAGIC => return Err(RunError::Forgetful { path: state.clone(), kind: "tmpfs" }),
        RAMFS_MAGIC => return Err(RunError::Forgetful { path: state.clone(), kind: "ramfs" }),
        OVERLAYFS_MAGIC => {
            warn!(path = %state.display(), "the journal is in the file system of a container and lives no longer than that");
        }
        _ => {}
    }
    let directory = state.join("journal");
    let (journal, recovered) = FileJournal::open(&directory, &identity.state_id, &identity.boot_id)?;
    if !recovered.sessions.is_empty() || !recovered.calls.is_empty() {
        let (sessions, calls) = (recovered.sessions.len(), recovered.calls.len());
        info!(sessions, calls, same_boot = recovered.same_boot, "going on with what an earlier runner left");
    }
    Ok((Arc::new(journal), recovered))
}

/// One line for each missing layer, with what would add it.
fn check_floor(config: &Config, receipt: &Receipt, host: &HostReport) -> Result<(), RunError> {
    let wanted: Tier = config.min_tier.parse().unwrap_or(Tier::Full);
    let reached: Tier = receipt.tier.parse().unwrap_or(Tier::None);
    if reached >= wanted {
        return Ok(());
    }
    let accept = format!("write min_tier = \"{reached}\" into [runner]");
    for line in floor::lines(receipt, host, wanted, reached, ("runner.min_tier", &accept)) {
        say(&format!("sandbox-runner: {line}"));
    }
    Err(RunError::BelowFloor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connector::tls::TlsError;

    #[test]
    fn certificates_that_may_be_good_a_little_later_are_tried_again_and_those_of_another_runner_are_not() {
        let path = || PathBuf::from("/c");
        let problem = || "x".to_owned();
        let later = || {
            [
                TlsError::Read { what: "certificate", path: path(), source: std::io::ErrorKind::NotFound.into() },
                TlsError::Content { what: "certificate", path: path(), problem: problem() },
                TlsError::Mismatch { key: path(), certificate: path() },
                TlsError::Time { path: path(), problem: problem() },
            ]
        };
        let never = || {
            [
                TlsError::Runner { path: path(), problem: problem(), fix: problem() },
                TlsError::Identity { path: path(), now: problem(), before: problem() },
            ]
        };
        let [of_settings, of_daemon]: [fn(TlsError) -> RunError; 2] = [
            |problem| SettingsError::Certificates(problem).into(),
            |problem| DaemonError::Certificates(problem).into(),
        ];
        for of in [of_settings, of_daemon] {
            assert!(later().into_iter().all(|problem| !needs_the_operator(&of(problem))));
            assert!(never().into_iter().all(|problem| needs_the_operator(&of(problem))));
        }
    }

    #[test]
    fn a_slot_is_left_for_the_measurement_of_the_next_runner() {
        assert_eq!([64, 65, 3, 1, 0].map(|slots| sessions_within(64, slots)), [63, 64, 2, 1, 64]);
    }
}
