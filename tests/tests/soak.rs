//! Under load for a long time: memory, descriptors, cgroups, mounts and files stay as many as they were.
//!
//! Sessions come and go, calls of every kind run in them, output flows, links are cut now and then. After a while that
//! fills caches and allocators, whatever is held is measured; at the end it must be the same but for a margin that does
//! not depend on how long the load went on. `SOAK_MINUTES` sets the length of the long run.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use runner::dev::{LinkSettings, Orchestrator};
use sandbox_runner_tests::daemon::{
    Daemon, MARKER, Options, Random, Workspace, bash, exec, number, seed, small_sandboxes, within,
};
use sandbox_runner_tests::faultproxy::Cut;
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;

/// Sessions side by side. One of them stays from the beginning to the end.
const DRIVERS: u64 = 4;
/// What allocators may keep beyond what they kept after the warm-up.
const MARGIN_BYTES: u64 = 24 << 20;
/// Files with the output of acknowledged calls that a sandbox keeps.
const KEPT_OUTPUTS: u64 = 256;
/// Descriptors that are open for a moment while something is going on.
const MARGIN_DESCRIPTORS: u64 = 24;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_minute_of_load_holds_nothing_more_than_its_beginning() {
    needs_root!();
    soak(scaled(Duration::from_secs(20))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes an hour, or SOAK_MINUTES"]
async fn an_hour_of_load_holds_nothing_more_than_its_beginning() {
    needs_root!();
    soak(Duration::from_secs(60 * number("SOAK_MINUTES", 60))).await;
}

/// What is held at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Held {
    runner_bytes: u64,
    launcher_bytes: u64,
    /// Process 1 and spawner of the session that stays.
    keeper_bytes: u64,
    runner_descriptors: u64,
    launcher_descriptors: u64,
    keeper_descriptors: u64,
    /// Cgroups, mounts seen by the launcher, and files of sandboxes on the disk.
    groups: u64,
    mounts: u64,
    files: u64,
}

impl Held {
    fn now(daemon: &Daemon, keeper: &Workspace) -> Self {
        let runner = daemon.runner_pid().expect("a runner");
        let launcher = daemon.launcher_pid().expect("a launcher");
        let background = host::children_of(launcher).into_iter().filter(|pid| host::is_outside(*pid));
        let launchers: Vec<u32> = background.chain([launcher]).collect();
        let keepers: Vec<u32> = keeper.spawner().into_iter().chain([keeper.process_1]).collect();
        let bytes = |pids: &[u32]| pids.iter().map(|pid| host::resident_bytes(*pid)).sum();
        let descriptors = |pids: &[u32]| pids.iter().map(|pid| host::descriptors(*pid)).sum();
        let [state, run] = daemon.directories();
        let files = [state, run].iter().map(|top| host::files_below(&top.join("sandboxes")).len() as u64).sum();
        let mounts = std::fs::read_to_string(format!("/proc/{launcher}/mountinfo")).unwrap_or_default();
        Self {
            runner_bytes: host::resident_bytes(runner),
            launcher_bytes: bytes(&launchers),
            keeper_bytes: bytes(&keepers),
            runner_descriptors: host::descriptors(runner),
            launcher_descriptors: descriptors(&launchers),
            keeper_descriptors: descriptors(&keepers),
            groups: own_groups(keeper),
            mounts: mounts.lines().count() as u64,
            files,
        }
    }

    /// The larger of each.
    fn or_more(self, other: Self) -> Self {
        Self {
            runner_bytes: self.runner_bytes.max(other.runner_bytes),
            launcher_bytes: self.launcher_bytes.max(other.launcher_bytes),
            keeper_bytes: self.keeper_bytes.max(other.keeper_bytes),
            runner_descriptors: self.runner_descriptors.max(other.runner_descriptors),
            launcher_descriptors: self.launcher_descriptors.max(other.launcher_descriptors),
            keeper_descriptors: self.keeper_descriptors.max(other.keeper_descriptors),
            groups: self.groups.max(other.groups),
            mounts: self.mounts.max(other.mounts),
            files: self.files.max(other.files),
        }
    }

    fn assert_no_growth(&self, early: &Self) {
        let rows = [
            ("bytes of the runner", self.runner_bytes, early.runner_bytes, MARGIN_BYTES),
            ("bytes of the launcher", self.launcher_bytes, early.launcher_bytes, MARGIN_BYTES / 4),
            ("bytes of process 1 and spawner", self.keeper_bytes, early.keeper_bytes, MARGIN_BYTES / 4),
            ("descriptors of the runner", self.runner_descriptors, early.runner_descriptors, MARGIN_DESCRIPTORS),
            ("descriptors of the launcher", self.launcher_descriptors, early.launcher_descriptors, MARGIN_DESCRIPTORS),
            ("descriptors of process 1", self.keeper_descriptors, early.keeper_descriptors, MARGIN_DESCRIPTORS),
        ];
        for (what, late, early, margin) in rows {
            assert!(late <= early + margin, "{what}: {late} at the end, {early} after the warm-up");
        }
    }
}

/// Cgroups of the launcher that made this sandbox; others of this machine come and go meanwhile.
fn own_groups(keeper: &Workspace) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", keeper.process_1)).unwrap_or_default();
    let own = text.split(['/', '\n']).find(|name| name.starts_with("sandbox-runner-")).expect("the launcher's group");
    host::cgroups().iter().filter(|path| path.iter().any(|name| name == own)).count() as u64
}

async fn soak(time: Duration) {
    let _host = host::exclusive();
    let seed = seed();
    println!("seed {seed}, {} s", time.as_secs());
    let link = LinkSettings { heartbeat_every: Duration::from_millis(500), ..LinkSettings::default() };
    let slots = u32::try_from(2 * DRIVERS + 2).expect("few sessions");
    let daemon = Daemon::start(Options { slots, link, limits: small_sandboxes(), ..Options::default() }).await;
    // Before the load: what a launcher and one sandbox have, and nothing else.
    let keeper_session = daemon.session("keeper").await;
    let marked = keeper_session.run("keeper-mark", bash(format!("echo keeper > {MARKER}")));
    within("first call", marked).await.expect("an end");
    let keeper = Workspace::find("keeper").expect("the sandbox of the session that stays");
    let before = settled(&daemon, None).await;
    let idle_before = Held::now(&daemon, &keeper);

    let (over, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut drivers = Vec::new();
    for driver in 0..DRIVERS {
        let (orchestrator, over, calls) = (Arc::clone(&daemon.orchestrator), Arc::clone(&over), Arc::clone(&calls));
        drivers.push(tokio::spawn(drive(orchestrator, over, calls, driver, seed)));
    }
    let (early, late) = watch(&daemon, &keeper, &keeper_session, time).await;
    over.store(true, Ordering::SeqCst);
    for driver in drivers {
        driver.await.expect("no panic");
    }
    settled(&daemon, Some(before)).await;
    let idle_after = Held::now(&daemon, &keeper);
    println!("{} calls, {} links", calls.load(Ordering::SeqCst), daemon.orchestrator.links());
    println!("idle before {idle_before:?}\nearly {early:?}\nlate {late:?}\nidle after {idle_after:?}");
    assert!(calls.load(Ordering::SeqCst) > 0 && daemon.orchestrator.links() > 1);
    late.assert_no_growth(&early);
    // When everything but the one session is over, what was made for the others is gone, to the last piece.
    assert_eq!((idle_after.groups, idle_after.mounts), (idle_before.groups, idle_before.mounts));
    // Output of the last calls of the session that stays is kept for it to read.
    assert!(idle_after.files <= idle_before.files + KEPT_OUTPUTS, "{idle_after:?}");
    assert!(idle_after.runner_descriptors <= idle_before.runner_descriptors + 2, "{idle_after:?}");
    // Each slot keeps the layers that it has once shown.
    assert!(idle_after.launcher_descriptors <= idle_before.launcher_descriptors + MARGIN_DESCRIPTORS, "{idle_after:?}");
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
}

/// Directories and sockets of sandboxes: of the one that stays, and of those that the launcher prepares ahead.
fn places(daemon: &Daemon) -> usize {
    let count = |top: &std::path::Path| std::fs::read_dir(top.join("sandboxes")).map_or(0, Iterator::count);
    daemon.directories().iter().map(|top| count(top)).sum()
}

/// Waits until only the session that stays has a sandbox, and its places are as many as they were.
async fn settled(daemon: &Daemon, before: Option<usize>) -> usize {
    within("rest", async {
        while daemon.sandboxes().len() != 1 || before.is_some_and(|before| places(daemon) != before) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    // What the launcher prepares ahead is there by now, and the kernel has dropped the last groups.
    tokio::time::sleep(Duration::from_secs(1)).await;
    places(daemon)
}

/// Measures all the time, cuts the link now and then, and uses the session that stays. Returns the most of the second
/// quarter, when everything is warm, and the most of the last.
async fn watch(daemon: &Daemon, keeper: &Workspace, session: &runner::dev::Session, time: Duration) -> (Held, Held) {
    let (mut early, mut late) = (Held::default(), Held::default());
    let begin = Instant::now();
    let mut number = 0_u64;
    while begin.elapsed() < time {
        let held = Held::now(daemon, keeper);
        if begin.elapsed() > time / 4 && begin.elapsed() <= time / 2 {
            early = early.or_more(held);
        } else if begin.elapsed() > time * 3 / 4 {
            late = late.or_more(held);
        }
        let id = format!("keeper-{number}");
        let input = bash(format!("head -c {} /dev/zero", 1000 + number % 7 * 30_000));
        within(&id, session.run(&id, input)).await.expect("an end");
        number += 1;
        if number.is_multiple_of(20) {
            daemon.wire.cut(Cut::Close).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    (early, late)
}

/// One session after the other, each with a few calls of different kinds.
async fn drive(orchestrator: Arc<Orchestrator>, over: Arc<AtomicBool>, calls: Arc<AtomicU64>, driver: u64, seed: u64) {
    use pb::call::Input;
    let mut random = Random::new(seed.wrapping_mul(driver + 3));
    let mut round = 0;
    while !over.load(Ordering::SeqCst) {
        round += 1;
        let name = format!("d{driver}-{round}");
        let request = pb::OpenSession { session_id: name.clone(), ..Default::default() };
        let session = within(&name, orchestrator.open_session(request)).await.expect("a session");
        for number in 0..8 + random.below(8) {
            let id = format!("{name}-{number}");
            let input = match random.below(8) {
                0 => Input::Write(pb::WriteInput { file_path: "w".into(), content: "line\n".repeat(1000) }),
                1 => Input::Glob(pb::GlobInput { pattern: "*".into(), path: Some("/usr/bin".into()) }),
                2 => Input::Grep(pb::GrepInput { pattern: "root".into(), path: Some("/etc".into()) }),
                3 => exec(format!("head -c {} /dev/urandom", random.below(1_000_000))),
                4 => bash("sleep 5 & echo left behind"),
                5 => bash("exit 3"),
                _ => bash(format!("head -c {} /dev/zero", random.below(300_000))),
            };
            within(&id, session.run(&id, input)).await.expect("an end");
            session.shed(&id);
            calls.fetch_add(1, Ordering::SeqCst);
        }
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
}
