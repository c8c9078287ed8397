//! More than one runner for one name or one session: a copied state, a state set back, a session placed elsewhere by force, a
//! certificate that was revoked. What must not serve does not, and says so; nothing runs twice.
//!
//! Built daemons beside launchers of their own, real sandboxes, and the orchestrator that checks every frame.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{Denied, LinkSettings, Session};
use sandbox_runner_tests::daemon::{Daemon, Options, bash, copy_directory, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;

async fn printed(session: &Session, call_id: &str, command: &str) -> String {
    let finished = within(call_id, session.bash(call_id, command)).await.expect("an end");
    String::from_utf8_lossy(finished.streams.get(&1).map_or(&[][..], |stream| &stream.bytes)).trim().to_owned()
}

fn short_lease() -> LinkSettings {
    let lease_ttl = scaled(Duration::from_secs(2));
    LinkSettings { lease_ttl, heartbeat_every: Duration::from_millis(300), ..LinkSettings::default() }
}

/// Waits until the launcher holds no sandbox.
async fn no_sandbox_is_left(daemon: &Daemon) {
    within("the end of its sandboxes", async {
        while !daemon.sandboxes().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unknown {
    /// The call that the copy does not know runs while it greets.
    Runs,
    /// It has ended, and its end is acknowledged.
    Ended,
}

/// A command with a standard input.
fn reading(script: &str) -> pb::call::Input {
    let argv = vec![b"/bin/sh".to_vec(), b"-c".to_vec(), script.into()];
    pb::call::Input::Exec(pb::ExecInput { argv, cwd: Some("/workspace".into()), stdin: true, ..Default::default() })
}

/// A second machine with a copy of the disk of the first one, made before a call.
async fn assert_copy_is_refused(unknown: Unknown) {
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("original").await;
    assert_eq!(printed(&session, "before", "echo begun >> /workspace/count").await, "");
    let mut copy = daemon.copy(Options::default()).await;
    session.send("runs", reading("echo runs >> /workspace/count; read line; echo end"));
    within("start", session.started("runs")).await.expect("started");
    let end = || async {
        within("stdin", session.stdin("runs", 0, b"go on\n", true)).await.expect("taken");
        let runs = within("runs", session.outcome("runs")).await.expect("an end");
        assert_eq!(runs.streams[&1].bytes, b"end\n");
    };
    if unknown == Unknown::Ended {
        end().await;
    }

    copy.start_launcher().await;
    copy.spawn_runner();
    copy.said("the orchestrator refuses this runner").await;

    assert!(copy.log().contains("STATE_ROLLED_BACK") && copy.log().contains("put the newest state directory back"));
    assert!(copy.runner_is_alive(), "a runner that ends would be started again and again");
    if unknown == Unknown::Runs {
        end().await;
    }
    assert_eq!(printed(&session, "count", "cat /workspace/count").await, "begun\nruns");
    assert_eq!((daemon.orchestrator.links(), daemon.orchestrator.refused_links().len()), (1, 1));
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    // It would wait for somebody to whom it can tell that its sandbox is not there.
    copy.kill_runner();
    copy.end_with_nothing_left();
    daemon.end_with_nothing_left();
}

/// F-44: it would run the call a second time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_with_a_copied_state_directory_is_refused_and_the_first_one_does_not_notice() {
    needs_root!();
    let _host = host::shared();
    assert_copy_is_refused(Unknown::Runs).await;
}

/// F-44: nothing would run twice, but the session of the first one would be told as lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_with_a_copied_state_directory_is_refused_by_the_number_of_calls_that_have_ended_since() {
    needs_root!();
    let _host = host::shared();
    assert_copy_is_refused(Unknown::Ended).await;
}

/// Three sessions, and a copy of the journal from which much is missing: a call that runs, in a session that is in it; the
/// start of another, which waited; a whole session. `seconds` tell the commands of a test from those of others.
struct SetBack {
    daemon: Daemon,
    sessions: [Session; 3],
    journal: PathBuf,
    copies: [PathBuf; 2],
    seconds: &'static str,
}

/// In which session each command runs.
const RUNNING: [&str; 3] = ["unknown", "waited", "elsewhere"];

impl SetBack {
    /// `then` looks at the orchestrator when the copy is made.
    async fn prepare<T>(seconds: &'static str, then: impl FnOnce(&Daemon) -> T) -> (Self, T) {
        let daemon = Daemon::start(Options { slots: 6, ..Options::default() }).await;
        let [state, _] = daemon.directories();
        let copies = [state.join("journal-old"), state.join("journal-new")];
        for directory in &copies {
            fs::create_dir(directory).expect("a directory of our own");
        }
        let journal = state.join("journal");
        let runs = |call_id: &str| bash(format!("echo {call_id} >> /workspace/count; sleep {seconds}; echo end"));
        let (first, second) = (daemon.session("first").await, daemon.session("second").await);
        let argv = vec![b"cat".to_vec()];
        second.send("before", pb::call::Input::Exec(pb::ExecInput { argv, stdin: true, ..Default::default() }));
        within("start", second.started("before")).await.expect("started");
        second.send(RUNNING[1], runs(RUNNING[1]));
        within("acceptance", async {
            while daemon.orchestrator.waiting().get("second") != Some(&1) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        copy_directory(&journal, &copies[0]);
        let then = then(&daemon);
        within("end of the input", second.stdin("before", 0, b"", true)).await.expect("taken");
        first.send(RUNNING[0], runs(RUNNING[0]));
        let third = daemon.session("third").await;
        third.send(RUNNING[2], runs(RUNNING[2]));
        let sessions = [first, second, third];
        for (session, call_id) in sessions.iter().zip(RUNNING) {
            within("start", session.started(call_id)).await.expect("started");
        }
        let mut this = Self { daemon, sessions, journal, copies, seconds };
        this.daemon.kill_runner();
        copy_directory(&this.journal, &this.copies[1]);
        (this, then)
    }

    fn put_in_place(&self, which: usize) {
        for path in host::files_below(&self.journal).into_iter().filter(|path| path.is_file()) {
            fs::remove_file(path).expect("a file of our own");
        }
        copy_directory(&self.copies[which], &self.journal);
    }

    fn end(mut self) {
        for directory in &self.copies {
            fs::remove_dir_all(directory).expect("a directory of our own");
        }
        self.daemon.end_with_nothing_left();
    }
}

/// F-66: the disk is set back to what it was an hour ago, and later the right one is put back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_was_set_back_is_refused_ends_nothing_and_what_had_begun_goes_on_when_the_right_one_is_put_back() {
    needs_root!();
    let _host = host::shared();
    let (mut set_back, ()) = SetBack::prepare("8.0661", |_| ()).await;
    let (links, held) = (set_back.daemon.orchestrator.links(), set_back.daemon.sandboxes());

    set_back.put_in_place(0);
    set_back.daemon.spawn_runner();
    set_back.daemon.said("the orchestrator refuses this runner").await;

    let refused = set_back.daemon.orchestrator.refused_links();
    assert!(refused[0].contains("STATE_ROLLED_BACK"), "{refused:?}");
    assert!(set_back.daemon.runner_is_alive(), "a runner that ends would be started again and again");
    assert_eq!(set_back.daemon.orchestrator.links(), links);
    // Sandboxes were taken over, or not, before anybody was asked.
    assert_eq!(set_back.daemon.sandboxes(), held, "a sandbox was ended, and nobody had confirmed that it may be");

    set_back.daemon.kill_runner();
    set_back.put_in_place(1);
    set_back.daemon.start_runner().await;
    for (session, call_id) in set_back.sessions.iter().zip(RUNNING) {
        let ended = within(call_id, session.outcome(call_id)).await.expect("an end");
        assert_eq!(ended.streams[&1].bytes, b"end\n", "{call_id}: {:?}", ended.message.outcome);
        assert_eq!(printed(session, &format!("count-{call_id}"), "cat /workspace/count").await, call_id);
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    assert_eq!(set_back.daemon.orchestrator.complaints(), Vec::<String>::new());
    set_back.end();
}

/// F-66, F-29: the orchestrator has lost the same data, so nobody is left who knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_neither_journal_nor_orchestrator_know_is_ended_once_the_runner_is_welcome() {
    needs_root!();
    let _host = host::shared();
    let (mut set_back, backup) = SetBack::prepare("600.0662", |daemon| daemon.orchestrator.backup()).await;

    set_back.daemon.orchestrator.restore(backup);
    set_back.put_in_place(0);
    set_back.daemon.start_runner().await;

    within("the end of what nobody knows", async {
        while !host::processes_with(set_back.seconds).is_empty() || set_back.daemon.sandboxes().len() > 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let [first, second, _] = &set_back.sessions;
    assert_eq!(printed(first, "count", "cat /workspace/count").await, RUNNING[0], "its sandbox is kept");
    let waited = within(RUNNING[1], second.outcome(RUNNING[1])).await.expect("an end");
    let kind = waited.message.outcome.and_then(|outcome| outcome.kind);
    assert!(matches!(kind, Some(Kind::Indeterminate(_))), "it was not known to have begun: {kind:?}");
    within("close", first.close(Duration::ZERO)).await.expect("the session ends");
    set_back.end();
}

/// F-45: the first runner is cut off, and nobody waits for the end of its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_was_placed_elsewhere_by_force_is_ended_where_it_was_and_its_late_results_do_not_count() {
    needs_root!();
    let _host = host::shared();
    let mut first = Daemon::start(Options::default()).await;
    let mut second = Daemon::start(Options::default()).await;
    let before = first.session("moved").await;
    before.send("runs", bash("echo runs >> /workspace/count; sleep 600.45"));
    before.send("waits", bash("echo waits >> /workspace/count"));
    within("start", before.started("runs")).await.expect("started");
    first.wire.hold_what_goes_to_the_runner();
    first.wire.keep_what_comes_from_the_runner();

    first.orchestrator.place_elsewhere("moved");
    let after = second.session("moved").await;
    assert_eq!(printed(&after, "runs", "echo elsewhere").await, "elsewhere");
    assert_eq!(first.sandboxes().len(), 1, "nobody could tell it yet");
    first.wire.release();

    no_sandbox_is_left(&first).await;
    // Those that were killed with it are reaped a moment later.
    within("its processes end", async {
        while !host::processes_with("600.45").is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(within("its end", before.over()).await.expect("an end").reason(), pb::SessionEndReason::Fenced);
    within("late results", async {
        while first.orchestrator.superseded().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let late = within("late", before.outcome("runs")).await.expect_err("it does not count").to_string();
    assert!(late.contains("was placed elsewhere"), "{late}");
    assert_eq!(printed(&after, "next", "echo still here").await, "still here");
    within("close", after.close(Duration::ZERO)).await.expect("the session ends");
    for daemon in [&mut first, &mut second] {
        assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
        daemon.end_with_nothing_left();
    }
}

/// F-58: revoked while a command runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_runner_says_so_stays_and_its_sandboxes_end_with_their_orphan_time() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options { link: short_lease(), ..Options::default() }).await;
    let orphan_ttl = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let request = pb::OpenSession { session_id: "revoked".into(), orphan_ttl, ..Default::default() };
    let session = within("session", daemon.orchestrator.open_session(request)).await.expect("opened");
    session.send("runs", bash("sleep 600.58"));
    within("start", session.started("runs")).await.expect("started");

    daemon.orchestrator.deny(Denied::Name("runner-1".into()));
    daemon.said("the orchestrator refuses this runner").await;

    assert!(
        daemon.log().contains("CERT_REVOKED") && daemon.log().contains("every certificate of runner-1 was revoked")
    );
    assert_eq!(daemon.sandboxes().len(), 1, "what runs is not ended at once");
    no_sandbox_is_left(&daemon).await;
    assert_eq!(host::processes_with("600.58"), Vec::<u32>::new());
    assert!(daemon.runner_is_alive(), "a runner that ends would be started again and again");
    assert_eq!((daemon.orchestrator.links(), daemon.orchestrator.refused_links().len()), (1, 0), "it asks too often");
    // It would wait for somebody to whom it can tell how its call has ended.
    daemon.kill_runner();
    daemon.end_with_nothing_left();
}
