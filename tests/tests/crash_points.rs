//! The runner is ended, held up or failed at each step that is numbered in the life of a call, in a copy of the journal, and
//! in recovery itself: the built daemon, real sandboxes, and an orchestrator that checks every frame.
//!
//! The steps are those of `runner/src/crash_point.rs`, which only a build with debug assertions has. Each row of the tables
//! names its fault. What a call does is seen in a file that the test holds open.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{DevError, Session};
use sandbox_runner_tests::daemon::{Daemon, MARKER, Options, Workspace, bash, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;

/// What must become of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// It runs once, and its outcome and output arrive.
    Once,
    /// The same, and it is said that another runner has seen its beginning.
    Recovered,
}

/// How the runner fares at a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    End,
    Delay,
    Error,
}

/// One fault, one row: number, rules with `ID` for the call, how, whether another call runs before it, and what comes of it.
type Row = (&'static str, &'static str, How, bool, Expected);

use Expected::{Once, Recovered};
use How::{Delay, End, Error};

const ALONE: bool = false;
const BEHIND_ANOTHER: bool = true;

const ROWS: &[Row] = &[
    ("F-03", "arrived/ID=end", End, ALONE, Once),
    ("F-03", "arrived/ID=delay:300", Delay, ALONE, Once),
    ("F-03", "accepted-write/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-03", "accepted-write/ID=delay:300", Delay, BEHIND_ANOTHER, Once),
    // What could not be written may be on the disk all the same, so nobody is told that it did not run.
    ("F-03", "accepted-write/ID=error", Error, BEHIND_ANOTHER, Once),
    ("F-03", "accepted-sync/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-03", "accepted-sync/ID=delay:300", Delay, BEHIND_ANOTHER, Once),
    ("F-03", "accepted-sync/ID=error", Error, BEHIND_ANOTHER, Once),
    ("F-04", "accepted-synced/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-04", "accepted-synced/ID=end", End, ALONE, Once),
    ("F-04", "accepted-synced/ID=delay:300", Delay, BEHIND_ANOTHER, Once),
    ("F-04", "accepted-synced/ID=error", Error, BEHIND_ANOTHER, Once),
    ("F-04", "accepted-told/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-04", "accepted-told/ID=delay:300", Delay, BEHIND_ANOTHER, Once),
    ("F-05", "started-write/ID=delay:1000,gated/ID=end", End, ALONE, Once),
    ("F-05", "started-write/ID=delay:1000,gated/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-05", "gated/ID=delay:300", Delay, ALONE, Once),
    ("F-05", "started-write/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-05", "started-write/ID=delay:300", Delay, BEHIND_ANOTHER, Once),
    ("F-05", "started-write/ID=error", Error, BEHIND_ANOTHER, Once),
    ("F-05", "started-sync/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-05", "started-sync/ID=delay:300", Delay, BEHIND_ANOTHER, Once),
    ("F-05", "started-sync/ID=error", Error, BEHIND_ANOTHER, Once),
    ("F-06", "started-synced/ID=end", End, BEHIND_ANOTHER, Once),
    ("F-06", "started-synced/ID=delay:300", Delay, ALONE, Once),
    ("F-06", "started-synced/ID=error", Error, ALONE, Once),
    ("F-06", "go/ID=end", End, ALONE, Once),
    ("F-06", "go/ID=delay:300", Delay, ALONE, Once),
    ("F-07", "gone/ID=end", End, ALONE, Recovered),
    ("F-07", "gone/ID=delay:300", Delay, ALONE, Once),
    ("F-07", "started-told/ID=end", End, ALONE, Recovered),
    ("F-07", "started-told/ID=delay:300", Delay, ALONE, Once),
    ("F-08", "ended/ID=end", End, ALONE, Recovered),
    ("F-08", "ended/ID=delay:300", Delay, ALONE, Once),
    ("F-08", "finished-write/ID=end", End, ALONE, Recovered),
    ("F-08", "finished-write/ID=delay:300", Delay, ALONE, Once),
    ("F-08", "finished-write/ID=error", Error, ALONE, Once),
    ("F-08", "finished-sync/ID=end", End, ALONE, Once),
    ("F-08", "finished-sync/ID=delay:300", Delay, ALONE, Once),
    ("F-08", "finished-sync/ID=error", Error, ALONE, Once),
    ("F-09", "finished-synced/ID=end", End, ALONE, Once),
    ("F-09", "finished-synced/ID=delay:300", Delay, ALONE, Once),
    ("F-09", "finished-synced/ID=error", Error, ALONE, Once),
    ("F-10", "finished-told/ID=end", End, ALONE, Once),
    ("F-10", "finished-told/ID=delay:300", Delay, ALONE, Once),
    ("F-10", "acknowledged/ID=end", End, ALONE, Once),
    ("F-10", "acknowledged/ID=delay:300", Delay, ALONE, Once),
    ("F-10", "acknowledged-write/ID=end", End, ALONE, Once),
    ("F-10", "acknowledged-write/ID=delay:300", Delay, ALONE, Once),
    ("F-10", "acknowledged-write/ID=error", Error, ALONE, Once),
    ("F-10", "acknowledged-sync/ID=end", End, ALONE, Once),
    ("F-10", "acknowledged-sync/ID=delay:300", Delay, ALONE, Once),
    ("F-10", "acknowledged-sync/ID=error", Error, ALONE, Once),
    ("F-10", "acknowledged-synced/ID=end", End, ALONE, Once),
    ("F-10", "acknowledged-synced/ID=delay:300", Delay, ALONE, Once),
    ("F-10", "acknowledged-synced/ID=error", Error, ALONE, Once),
];

/// Steps in the life of a call, in their order.
const STEPS: [&str; 21] = [
    "arrived",
    "accepted-write",
    "accepted-sync",
    "accepted-synced",
    "accepted-told",
    "gated",
    "started-write",
    "started-sync",
    "started-synced",
    "go",
    "gone",
    "started-told",
    "ended",
    "finished-write",
    "finished-sync",
    "finished-synced",
    "finished-told",
    "acknowledged",
    "acknowledged-write",
    "acknowledged-sync",
    "acknowledged-synced",
];

/// A daemon with one session, and the file in which its calls leave a line each.
struct Site {
    daemon: Daemon,
    session: Session,
    workspace: Workspace,
    ledger: File,
}

impl Site {
    async fn new() -> Self {
        let daemon = Daemon::start(Options::default()).await;
        let session = daemon.session("s").await;
        // Others may run on this machine, of this program or of another.
        static SITES: AtomicU64 = AtomicU64::new(0);
        let marker = format!("{}-{}", std::process::id(), SITES.fetch_add(1, Ordering::SeqCst));
        let prepare = format!(": > ledger; echo {marker} > {MARKER}");
        within("prepare", session.bash("prepare", &prepare)).await.expect("an end");
        let workspace = Workspace::find(&marker).expect("its sandbox");
        let ledger = workspace.open("ledger").expect("a ledger");
        Self { daemon, session, workspace, ledger }
    }

    /// How often a call has begun.
    fn begun(&self, id: &str) -> usize {
        let length = self.ledger.metadata().expect("an open file").len();
        let mut bytes = vec![0; usize::try_from(length).expect("a small file")];
        self.ledger.read_exact_at(&mut bytes, 0).expect("what was written stays");
        String::from_utf8_lossy(&bytes).lines().filter(|line| *line == id).count()
    }

    /// The next runner, with these crash points.
    async fn replace_runner(&mut self, crash_points: &str) {
        self.daemon.kill_runner();
        crash_points.clone_into(&mut self.daemon.crash_points);
        self.daemon.start_runner().await;
    }

    /// A runner without crash points.
    async fn start_runner(&mut self) {
        self.daemon.crash_points.clear();
        self.daemon.start_runner().await;
    }

    /// How often a crash point has acted for this call, or in this installation when none is named.
    fn reached(&self, id: &str) -> usize {
        let log = self.daemon.log();
        log.lines().filter(|line| line.contains("crash point reached") && line.contains(id)).count()
    }

    async fn finish(mut self) {
        within("close", self.session.close(Duration::ZERO)).await.expect("the session ends");
        assert_eq!(self.daemon.orchestrator.complaints(), Vec::<String>::new());
        assert!(!self.daemon.log().contains("a crash point makes no sense"));
        self.daemon.end_with_nothing_left();
    }
}

/// Leaves a line, says its name and ends with a code that nobody makes up.
fn command(id: &str) -> String {
    format!("echo {id} >> ledger; sleep 0.1; echo said by {id}; (exit 3)")
}

fn assert_ran(what: &str, id: &str, outcome: Result<runner::dev::CallOutcome, DevError>, recovered: bool) {
    let finished = outcome.unwrap_or_else(|error| panic!("{what}: {error}"));
    let kind = finished.message.outcome.and_then(|outcome| outcome.kind);
    assert_eq!(kind, Some(Kind::Exited(pb::Exited { code: 3 })), "{what}");
    assert_eq!(finished.streams[&1].bytes, format!("said by {id}\n").into_bytes(), "{what}");
    assert_eq!(finished.streams[&1].holes, [], "{what}");
    assert!(finished.message.recovered || !recovered, "{what}: nobody is told that another runner saw its beginning");
}

#[test]
fn table_has_every_step_with_everything_that_can_happen_at_it() {
    let is_there = |step: &str, how: How| {
        let mut of_step = ROWS.iter().filter(|row| row.2 == how);
        of_step.any(|row| row.1.rsplit(',').next().is_some_and(|rule| rule.starts_with(&format!("{step}/ID="))))
    };
    for step in STEPS {
        assert!(is_there(step, End), "{step}: nobody ends there");
        assert!(is_there(step, Delay), "{step}: nobody is held up there");
        let can_fail = ["-write", "-sync", "-synced"].iter().any(|end| step.ends_with(end));
        assert_eq!(is_there(step, Error), can_fail, "{step}");
    }
}

/// F-03 to F-10: a runner that ends at one step of each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_runs_once_whichever_step_of_its_life_ends_the_runner() {
    needs_root!();
    let mut faults = std::collections::BTreeSet::new();
    let first = ROWS.iter().filter(|row| row.2 == End && faults.insert(row.0));
    live_through(&first.copied().collect::<Vec<_>>()).await;
}

/// F-03 to F-10: the table above.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes, because each runner measures its isolation"]
async fn call_runs_once_and_is_answered_whatever_happens_at_any_step_of_its_life() {
    needs_root!();
    live_through(ROWS).await;
}

async fn live_through(rows: &[Row]) {
    let _host = host::shared();
    let mut site = Site::new().await;
    for (number, (fault, rules, how, waits, expected)) in rows.iter().enumerate() {
        let what = format!("{fault} {rules}");
        let id = format!("c{number}-");
        site.replace_runner(&rules.replace("ID", &id)).await;
        if *waits {
            site.session.send(&format!("before-{id}"), bash("sleep 0.4"));
            within(&what, site.session.started(&format!("before-{id}"))).await.expect("started");
        }
        site.session.send(&id, bash(command(&id)));
        match how {
            End => {
                let status = site.daemon.runner_to_its_end().await;
                assert_eq!(status.signal(), Some(9), "{what}: {}", site.daemon.end_of_log());
                site.start_runner().await;
            }
            // The journal is broken from here on, so the next runner has to do the rest.
            Error => {
                within(&what, async {
                    while site.reached(&id) == 0 {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                })
                .await;
                site.replace_runner("").await;
            }
            Delay => {}
        }
        let outcome = within(&what, site.session.outcome(&id)).await;
        assert_ran(&what, &id, outcome, *expected == Recovered);
        // Whatever it was, the shell takes the next call, and by then nothing of this one can still begin.
        let next = within(&what, site.session.bash(&format!("next-{id}"), "echo next")).await.expect("an end");
        assert_eq!(next.streams[&1].bytes, b"next\n", "{what}");
        assert_eq!(site.begun(&id), 1, "{what}");
        assert_ne!(site.reached(&id), 0, "{what} was never reached");
    }
    site.finish().await;
}

/// A call that runs until it is told to end, one that waits behind it, and one whose result was not acknowledged: what a
/// recovery has to find.
async fn fill(site: &Site) {
    site.session.send(
        "runs",
        bash("echo runs >> ledger; while [ ! -e stop ]; do sleep 0.05; done; echo said by runs; (exit 3)"),
    );
    site.session.send("waits", bash(command("waits")));
    within("runs", site.session.started("runs")).await.expect("started");
    within("waits", async {
        while site.daemon.orchestrator.waiting().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

async fn assert_all_there(site: &Site) {
    assert_eq!((site.begun("runs"), site.begun("waits")), (1, 0));
    fs::write(format!("/proc/{}/root/workspace/stop", site.workspace.process_1), "").expect("its workspace");
    for id in ["runs", "waits"] {
        let outcome = within(id, site.session.outcome(id)).await;
        assert_ran(id, id, outcome, id == "runs");
    }
    assert_eq!((site.begun("runs"), site.begun("waits")), (1, 1));
}

/// Steps of a copy of what is live; each start of a runner makes one. Twice where there are several segments.
const COPY: [&str; 8] = ["copy", "unnamed", "named", "unnamed@2", "named@2", "copied", "counts", "removed"];

/// F-11: at the start, which copies what is live into segments of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes, because each runner measures its isolation"]
async fn journal_is_whole_after_a_runner_that_ended_or_failed_at_any_step_of_its_copy() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::new().await;
    fill(&site).await;
    for point in COPY {
        for action in ["end", "delay:50", "error"] {
            let reached = site.reached("");
            let what = format!("F-11 {point}={action}");
            site.daemon.kill_runner();
            site.daemon.crash_points = format!("{point}={action}");
            let can_fail = !matches!(point, "copied" | "counts" | "removed");
            match action {
                "end" => {
                    let status = site.daemon.start_runner_to_its_end().await;
                    assert_eq!(status.signal(), Some(9), "{what}: {}", site.daemon.end_of_log());
                    site.start_runner().await;
                }
                "error" if can_fail => {
                    let status = site.daemon.start_runner_to_its_end().await;
                    assert!(status.code().is_some_and(|code| code != 0), "{what}: {status:?}");
                    site.start_runner().await;
                }
                // No error can happen there.
                "error" => site.start_runner().await,
                _ => site.daemon.start_runner().await,
            }
            let acted = site.reached("") > reached;
            assert_eq!(acted, can_fail || action != "error", "{what}");
            assert_eq!((site.begun("runs"), site.begun("waits")), (1, 0), "{what}");
        }
    }
    assert_all_there(&site).await;
    site.finish().await;
}

/// F-11: while calls come, when enough segments are full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes, because 80 MB are written for each step"]
async fn journal_is_whole_after_a_runner_that_ended_in_the_copy_of_a_full_journal() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::new().await;
    // As long as an input may be.
    let content = "x".repeat(250_000);
    let mut number = 0;
    for point in ["copy", "copied", "counts"] {
        // The first copy is the one of the start.
        site.replace_runner(&format!("{point}@2=end")).await;
        let mut last = String::new();
        // Five segments of 16 MiB; far more than fits says that there was no copy.
        for _ in 0..60 {
            if !site.daemon.runner_is_alive() {
                break;
            }
            for _ in 0..16 {
                last = format!("write-{number}-");
                number += 1;
                let input = pb::WriteInput { file_path: "large".into(), content: format!("{last} {content}") };
                site.session.send(&last, pb::call::Input::Write(input));
            }
            // Those that the runner has left come when the next one is there.
            let over = async {
                tokio::select! {
                    _ = site.session.ended(&last) => {}
                    () = until_ended(&mut site.daemon) => {}
                }
            };
            within("sixteen calls", over).await;
        }
        let status = site.daemon.runner_to_its_end().await;
        assert_eq!(status.signal(), Some(9), "F-11 {point}: {}", site.daemon.end_of_log());
        site.start_runner().await;
        within("the last one", site.session.ended(&last)).await.expect("an end");
        let look = within("look", site.session.bash(&format!("look-{point}"), "cut -d' ' -f1 large")).await;
        assert_eq!(look.expect("an end").streams[&1].bytes, format!("{last}\n").into_bytes(), "F-11 {point}");
    }
    site.finish().await;
}

async fn until_ended(daemon: &mut Daemon) {
    while daemon.runner_is_alive() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// F-65: a running call that no runner can bear. Runners that are killed blame nobody; the third that panics is the last that
/// meets it, and what the next one tells is what is known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_call_that_three_runners_panicked_of_is_answered_as_poison_and_costs_its_session() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::new().await;
    site.session.send("runs", bash("echo runs >> ledger; sleep 600"));
    within("runs", site.session.started("runs")).await.expect("started");
    site.daemon.kill_runner();
    for panics in 1..=3 {
        site.daemon.crash_points = "attached=panic".to_owned();
        let status = site.daemon.start_runner_to_its_end().await;
        assert_eq!(status.signal(), Some(6), "F-65 {panics}: {}", site.daemon.end_of_log());
        assert_eq!(site.begun("runs"), 1);
    }

    site.start_runner().await;

    let finished = within("runs", site.session.outcome("runs")).await.expect("an end");
    match finished.message.outcome.and_then(|outcome| outcome.kind) {
        Some(Kind::Indeterminate(pb::Indeterminate { failure: Some(failure) })) => assert_eq!(failure.code, "POISON"),
        other => panic!("F-65: {other:?}: {}", site.daemon.end_of_log()),
    }
    let after = site.daemon.session("after").await;
    let next = within("next", after.bash("next", "echo next")).await.expect("an end");
    assert_eq!(next.streams[&1].bytes, b"next\n");
    within("close", after.close(Duration::ZERO)).await.expect("the session ends");
    assert_eq!(site.daemon.orchestrator.complaints(), Vec::<String>::new());
    site.daemon.end_with_nothing_left();
}

/// F-12: a runner that is killed in its recovery, and so is the next, twenty times in a row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recovery_that_is_killed_twenty_times_in_a_row_is_the_same_recovery() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::new().await;
    fill(&site).await;
    site.daemon.kill_runner();
    let points = ["scanned", "restored", "attached"].into_iter().chain(COPY);
    for (time, point) in points.cycle().take(20).enumerate() {
        site.daemon.crash_points = format!("{point}=end");
        let status = site.daemon.start_runner_to_its_end().await;
        assert_eq!(status.signal(), Some(9), "F-12 {time} {point}: {}", site.daemon.end_of_log());
    }
    assert_eq!(site.reached(""), 20);
    site.start_runner().await;
    assert_all_there(&site).await;
    site.finish().await;
}
