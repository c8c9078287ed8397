//! Runner, launcher, its background process, process 1, spawner and workload are killed at random moments under load.
//!
//! Whatever was killed: every call gets exactly one outcome, what is said about it agrees with what it left in its sandbox,
//! the next session works, and at the end nothing is on the host that was not there before. `SEED` and `KILLS` repeat a
//! run or make it larger.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{DevError, LinkSettings, Orchestrator, Session};
use sandbox_runner_tests::daemon::{
    Daemon, MARKER, Options, PATIENCE, Random, Workspace, bash, exec, number, seed, small_sandboxes, within,
};
use sandbox_runner_tests::host::{self, Snapshot};
use sandbox_runner_tests::needs_root;

/// Sessions side by side.
const DRIVERS: u64 = 4;
/// Calls that a session sends before it looks at the first of them.
const BURST: u64 = 4;
/// Bursts of a session that nobody kills.
const BURSTS: u64 = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_repeats_a_call_or_leaves_anything() {
    needs_root!();
    storm(24).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn two_hundred_kills_repeat_no_call_and_leave_nothing() {
    needs_root!();
    storm(number("KILLS", 204)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_sessions_go_on_when_the_launcher_is_killed() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("goes-on").await;
    session.send("running", bash("export KEPT=yes; echo before; sleep 1; echo after"));
    within("start", session.started("running")).await.expect("started");

    daemon.replace_launcher_by_force().await;

    let finished = within("running", session.outcome("running")).await.expect("an end");
    assert_eq!(finished.streams[&1].bytes, b"before\nafter\n");
    let next = within("next", session.bash("next", "echo $KEPT")).await.expect("an end");
    assert_eq!(next.streams[&1].bytes, b"yes\n");
    let other = daemon.session("new").await;
    assert_eq!(daemon.sandboxes().len(), 2);
    for session in [session, other] {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    assert_eq!(daemon.sandboxes(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Runner,
    Launcher,
    /// The launcher's helper; without it the launcher ends with everything it holds.
    Background,
    Process1,
    Spawner,
    Workload,
}

impl Victim {
    /// One after the other. The runner and the helper take every sandbox along, so they have fewer turns.
    const TURNS: [Self; 8] = [
        Self::Process1,
        Self::Launcher,
        Self::Spawner,
        Self::Workload,
        Self::Runner,
        Self::Process1,
        Self::Workload,
        Self::Background,
    ];
}

/// What was said about a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Completed,
    /// It ran and something ended it; the cause is named.
    Ended,
    NeverStarted,
    Refused,
    Indeterminate,
}

/// What everybody in a run shares.
#[derive(Default)]
struct Shared {
    over: AtomicBool,
    /// Sandboxes that may be attacked.
    workspaces: Mutex<Vec<Arc<Workspace>>>,
    verdicts: Mutex<BTreeMap<Verdict, u64>>,
    /// Calls whose traces in the sandbox were counted.
    counted: Mutex<u64>,
    lost_sessions: Mutex<u64>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn storm(kills: u64) {
    let _host = host::exclusive();
    let foreign = host::launcher_groups();
    let before = Snapshot::take_beside(&[], foreign.clone());
    let namespaces = host::namespaces(&foreign);
    let seed = seed();
    println!("seed {seed}: {kills} kills");
    let link = LinkSettings { heartbeat_every: Duration::from_millis(500), ..LinkSettings::default() };
    let slots = u32::try_from(2 * DRIVERS + 2).expect("few sessions");
    let mut daemon = Daemon::start(Options { slots, link, limits: small_sandboxes(), ..Options::default() }).await;
    let shared = Arc::new(Shared::default());
    let drivers: Vec<_> = (0..DRIVERS)
        .map(|driver| tokio::spawn(drive(Arc::clone(&daemon.orchestrator), Arc::clone(&shared), driver, seed)))
        .collect();

    let killed = kill(&mut daemon, &shared, kills, seed).await;
    shared.over.store(true, Ordering::SeqCst);
    for driver in drivers {
        while !driver.is_finished() {
            daemon.tend().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        driver.await.expect("no panic");
    }
    let (verdicts, counted) = (locked(&shared.verdicts).clone(), *locked(&shared.counted));
    let (lost, restarts) = (*locked(&shared.lost_sessions), daemon.restarts);
    println!(
        "killed {killed:?}, started again {restarts}; calls {verdicts:?}, counted {counted}; sessions lost {lost}"
    );
    assert_works(&mut daemon).await;
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    assert_eq!(killed.len(), 6, "somebody was never killed: {killed:?}");
    assert!(verdicts.get(&Verdict::Completed).is_some_and(|count| *count > kills), "{verdicts:?}");
    assert!(counted > kills, "traces of only {counted} calls were counted");

    drop(shared);
    daemon.end_with_nothing_left();
    drop(daemon);
    host::assert_restored(&before, &[], PATIENCE);
    // A namespace is gone when its last process has been reaped, which may be a moment later.
    let begin = std::time::Instant::now();
    loop {
        let left: Vec<_> = host::namespaces(&foreign).difference(&namespaces).cloned().collect();
        if left.is_empty() {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "namespaces are left: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// After all of it a new session works, and nothing of the others is left in the launcher.
async fn assert_works(daemon: &mut Daemon) {
    let mut attempts = 0;
    let session = loop {
        // Who was killed last may still be about to end, and is started again then; a session may begin before that.
        daemon.tend().await;
        attempts += 1;
        let request = pb::OpenSession { session_id: format!("afterwards-{attempts}"), ..Default::default() };
        let error = match within("session", daemon.orchestrator.open_session(request)).await {
            Ok(session) => match within("last call", session.bash(&format!("last-{attempts}"), "echo alive")).await {
                Ok(finished) if finished.streams.get(&1).is_some_and(|stream| stream.bytes == b"alive\n") => {
                    break session;
                }
                Ok(finished) => format!("{:?}", finished.message.outcome),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        assert!(attempts < 5, "{error}: {}", daemon.end_of_log());
    };
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    within("empty launcher", async {
        while !daemon.sandboxes().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Kills everybody in turn, each at a random moment, and does what a service manager does.
async fn kill(daemon: &mut Daemon, shared: &Shared, kills: u64, seed: u64) -> BTreeMap<Victim, u64> {
    let mut random = Random::new(seed ^ 0x5851_f42d);
    let mut killed = BTreeMap::new();
    let mut turn = 0_usize;
    while killed.values().sum::<u64>() < kills {
        daemon.tend().await;
        // Most kills hit a service that works; the others hit one that is just starting.
        if random.below(4) != 0 {
            let works = async {
                daemon.orchestrator.runner().await.expect("an orchestrator");
                while locked(&shared.workspaces).is_empty() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            // While the runner cannot connect, tending it is more useful than waiting.
            if tokio::time::timeout(Duration::from_secs(2), works).await.is_err() {
                continue;
            }
        }
        tokio::time::sleep(Duration::from_millis(random.below(400))).await;
        let victim = Victim::TURNS[turn % Victim::TURNS.len()];
        // What does not exist at this moment has its turn when it does.
        if let Some(pid) = pid_of(victim, daemon, shared, &mut random) {
            host::kill_now(pid);
            *killed.entry(victim).or_default() += 1;
            turn += 1;
        }
    }
    killed
}

/// The process to kill, if it exists at this moment.
fn pid_of(victim: Victim, daemon: &Daemon, shared: &Shared, random: &mut Random) -> Option<u32> {
    let mut workspace = || {
        let workspaces = locked(&shared.workspaces);
        let index = random.below(workspaces.len().max(1) as u64);
        workspaces.get(usize::try_from(index).ok()?).filter(|workspace| workspace.lives()).cloned()
    };
    match victim {
        Victim::Runner => daemon.runner_pid(),
        Victim::Launcher => daemon.launcher_pid(),
        Victim::Background => {
            host::children_of(daemon.launcher_pid()?).into_iter().find(|pid| host::inner_pid(*pid).is_none())
        }
        Victim::Process1 => workspace().map(|found| found.process_1),
        Victim::Spawner => workspace()?.spawner(),
        Victim::Workload => {
            let (process_1, spawner) = workspace().map(|found| (found.process_1, found.spawner()))?;
            host::children_of(process_1).into_iter().find(|pid| Some(*pid) != spawner)
        }
    }
}

/// Opens one session after the other and gives it work, until the storm is over.
async fn drive(orchestrator: Arc<Orchestrator>, shared: Arc<Shared>, driver: u64, seed: u64) {
    let mut random = Random::new(seed.wrapping_mul(driver + 7));
    let mut round = 0;
    while !shared.over.load(Ordering::SeqCst) {
        round += 1;
        let name = format!("d{driver}-{round}");
        let request = pb::OpenSession { session_id: name.clone(), ..Default::default() };
        match within(&name, orchestrator.open_session(request)).await {
            Ok(session) => live(&session, &shared, &mut random).await,
            // What a launcher that is away or full answers is honest, and tried again.
            Err(DevError::Refused { .. } | DevError::SessionEnded { .. }) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(other) => panic!("{name}: {other}"),
        }
    }
}

/// One session: calls until it is lost or has had enough, and then a look at what they left.
async fn live(session: &Session, shared: &Shared, random: &mut Random) {
    let name = session.session_id.clone();
    let first = session.run(&format!("{name}-first"), bash(format!("mkdir n; echo {name} > {MARKER}"))).await;
    let verdict = verdict_of(&name, first);
    if verdict != Verdict::Completed {
        *locked(&shared.lost_sessions) += 1;
        return;
    }
    let marker = name.clone();
    let found = tokio::task::spawn_blocking(move || Workspace::find(&marker)).await.expect("no panic").map(Arc::new);
    locked(&shared.workspaces).extend(found.clone());
    let mut calls = Vec::new();
    let mut lost = false;
    for burst in 0..BURSTS {
        let ids: Vec<_> = (0..BURST).map(|number| format!("{name}-{}", burst * BURST + number)).collect();
        for id in &ids {
            session.send(id, command(id, random));
        }
        for id in ids {
            let verdict = verdict_of(&id, within(&id, session.outcome(&id)).await);
            *locked(&shared.verdicts).entry(verdict).or_default() += 1;
            lost |= matches!(verdict, Verdict::Refused | Verdict::Indeterminate | Verdict::NeverStarted);
            calls.push((id, verdict));
        }
        if lost || shared.over.load(Ordering::SeqCst) {
            break;
        }
    }
    if let Some(workspace) = found {
        for (id, verdict) in &calls {
            let times = workspace.read(&format!("n/{id}")).iter().filter(|byte| **byte == b'\n').count();
            let agrees = match verdict {
                Verdict::Completed => times == 1,
                Verdict::NeverStarted | Verdict::Refused => times == 0,
                Verdict::Ended | Verdict::Indeterminate => times <= 1,
            };
            assert!(agrees, "{id} was answered as {verdict:?} and ran {times} times");
            *locked(&shared.counted) += 1;
        }
        locked(&shared.workspaces).retain(|other| !Arc::ptr_eq(other, &workspace));
    }
    *locked(&shared.lost_sessions) += u64::from(lost);
    if !lost {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
}

/// Leaves a line in a file of its own before anything else; then output and time.
fn command(id: &str, random: &mut Random) -> pb::call::Input {
    let size = [0, 100, 100_000, 300_000][usize::try_from(random.below(4)).expect("small")];
    let script = format!("echo x >> n/{id}; head -c {size} /dev/zero; sleep 0.{:03}", random.below(200));
    if random.below(2) == 0 { bash(script) } else { exec(script) }
}

fn verdict_of(id: &str, outcome: Result<runner::dev::CallOutcome, DevError>) -> Verdict {
    let message = match outcome {
        Ok(finished) => finished.message,
        Err(DevError::Refused { failure, .. }) => {
            let known = ["SESSION_UNKNOWN", "SESSION_CLOSED", "STALE_EPOCH", "SESSION_LOST"];
            assert!(known.contains(&failure.code.as_str()), "{id}: {} {}", failure.code, failure.message);
            return Verdict::Refused;
        }
        Err(other) => panic!("{id}: {other}"),
    };
    match message.outcome.and_then(|outcome| outcome.kind) {
        Some(Kind::Exited(pb::Exited { code: 0 })) => Verdict::Completed,
        Some(Kind::Exited(_) | Kind::Signaled(_) | Kind::Cancelled(_)) => Verdict::Ended,
        Some(Kind::NeverStarted(never)) => {
            assert!(never.failure.is_some_and(|failure| !failure.message.is_empty()), "{id}: no reason");
            Verdict::NeverStarted
        }
        Some(Kind::Indeterminate(lost)) => {
            assert!(lost.failure.is_some_and(|failure| !failure.message.is_empty()), "{id}: no reason");
            Verdict::Indeterminate
        }
        other => panic!("{id}: {other:?}"),
    }
}
