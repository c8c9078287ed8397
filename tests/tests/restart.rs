//! A runner that is killed, replaced or upgraded loses nothing: sandboxes, shells, running commands and their output are
//! there for the next one, every call begins once, and its result arrives.
//!
//! The built daemon beside a launcher of its own, real sandboxes, and an orchestrator that checks every frame. `SESSIONS`
//! makes the crowd larger.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs;
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{LinkSettings, Session};
use sandbox_runner_tests::daemon::{
    Daemon, MARKER, Options, PATIENCE, Workspace, bash, exec, number, small_sandboxes, within,
};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sha2::{Digest, Sha256};

/// Prints numbered lines for a while, as fast as a tenth of a second at a time allows.
const TALKATIVE: &str = "for i in $(seq 30); do seq -f \"$i-%06.0f\" 2000; sleep 0.1; done";

fn talk() -> Vec<u8> {
    (1..=30).flat_map(|i| (1..=2000).map(move |line| format!("{i}-{line:06}\n"))).collect::<String>().into_bytes()
}

async fn printed(session: &Session, call_id: &str, command: &str) -> String {
    let finished = within(call_id, session.bash(call_id, command)).await.expect("an end");
    String::from_utf8_lossy(finished.streams.get(&1).map_or(&[][..], |stream| &stream.bytes)).trim().to_owned()
}

async fn end(mut daemon: Daemon, sessions: Vec<Session>) {
    for session in sessions {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    assert_eq!(daemon.sandboxes(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

#[derive(Debug, Clone, Copy)]
enum Going {
    Killed,
    Asked,
}

/// A command that talks all the time, one that waits behind it, and the state of the shell.
async fn assert_nothing_is_lost(going: Going) {
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("kept").await;
    assert_eq!(printed(&session, "first", "export KEPT=yes; cd /tmp; echo begun >> /workspace/count").await, "");
    session.send("talks", bash(format!("echo talks >> /workspace/count; {TALKATIVE}")));
    session.send("waits", bash("echo waits >> /workspace/count; echo $KEPT in $PWD"));
    within("start", session.started("talks")).await.expect("started");
    tokio::time::sleep(Duration::from_millis(700)).await;

    match going {
        Going::Killed => daemon.kill_runner(),
        Going::Asked => daemon.leave_runner(),
    }
    assert_eq!(daemon.sandboxes().len(), 1, "the sandbox went with its runner");
    tokio::time::sleep(Duration::from_millis(500)).await;
    daemon.start_runner().await;

    let talked = within("talks", session.outcome("talks")).await.expect("an end");
    let stream = &talked.streams[&1];
    assert_eq!((stream.bytes.len(), stream.holes.len()), (talk().len(), 0));
    assert_eq!(Sha256::digest(&stream.bytes), Sha256::digest(talk()));
    assert!(talked.message.recovered, "nobody is told that another runner saw its beginning");
    let waited = within("waits", session.outcome("waits")).await.expect("an end");
    assert_eq!(waited.streams[&1].bytes, b"yes in /tmp\n");
    assert_eq!(printed(&session, "last", "cat /workspace/count").await, "begun\ntalks\nwaits");
    end(daemon, vec![session]).await;
}

/// F-02: killed while a command prints.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_runner_loses_no_byte_no_call_and_no_shell() {
    needs_root!();
    let _host = host::shared();
    assert_nothing_is_lost(Going::Killed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_that_is_asked_to_leave_says_that_it_will_be_replaced_and_loses_nothing() {
    needs_root!();
    let _host = host::shared();
    assert_nothing_is_lost(Going::Asked).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_end_while_no_runner_is_there_are_told_by_the_next_one() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("alone").await;
    session.send("shell", bash("echo once >> /workspace/count; sleep 0.3; echo in the shell; exit 3"));
    session.send_call(pb::Call {
        call_id: "beside".into(),
        input: Some(exec("sleep 0.2; exit 7")),
        ..Default::default()
    });
    within("start", session.started("shell")).await.expect("started");

    daemon.kill_runner();
    tokio::time::sleep(Duration::from_secs(1)).await;
    daemon.start_runner().await;

    let shell = within("shell", session.outcome("shell")).await.expect("an end");
    assert_eq!(shell.message.outcome.and_then(|outcome| outcome.kind), Some(Kind::Exited(pb::Exited { code: 3 })));
    assert_eq!(shell.streams[&1].bytes, b"in the shell\n");
    let beside = within("beside", session.outcome("beside")).await.expect("an end");
    assert_eq!(beside.message.outcome.and_then(|outcome| outcome.kind), Some(Kind::Exited(pb::Exited { code: 7 })));
    assert_eq!(printed(&session, "count", "cat /workspace/count").await, "once");
    end(daemon, vec![session]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn result_without_acknowledgement_is_told_again_by_the_next_runner_and_the_call_does_not_run_again() {
    needs_root!();
    let _host = host::shared();
    let deaf = LinkSettings { acknowledge: false, ..LinkSettings::default() };
    let mut daemon = Daemon::start(Options { link: deaf, ..Options::default() }).await;
    let session = daemon.session("deaf").await;
    let command = "echo once >> /workspace/count; head -c 300000 /dev/zero | tr '\\0' x";
    let first = within("call", session.bash("call", command)).await.expect("an end");

    daemon.kill_runner();
    daemon.orchestrator.set(LinkSettings::default());
    daemon.start_runner().await;

    let again = within("again", session.outcome("call")).await.expect("an end");
    assert_eq!(first.message.outcome, again.message.outcome);
    assert_eq!(again.streams[&1].bytes.len(), 300_000);
    assert_eq!(printed(&session, "count", "cat /workspace/count").await, "once");
    within("every result is acknowledged", async {
        while inspect(&daemon)["recovery"]["calls"].as_array().is_none_or(|calls| !calls.is_empty()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    end(daemon, vec![session]).await;
}

/// What the journal would give to the next runner, as the command says.
fn inspect(daemon: &Daemon) -> serde_json::Value {
    let [state, _] = daemon.directories();
    let output = std::process::Command::new(sandbox_runner_tests::runner::binary())
        .args(["journal", "inspect", "--json"])
        .arg(state.join("journal"))
        .output()
        .expect("the command runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sandbox_that_ends_while_no_runner_is_there_leaves_an_honest_outcome() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("lost").await;
    printed(&session, "mark", &format!("echo lost > /workspace/{MARKER}")).await;
    session.send("runs", bash("sleep 60"));
    session.send("waits", bash("echo never"));
    within("start", session.started("runs")).await.expect("started");
    let workspace = Workspace::find("lost").expect("its sandbox");

    daemon.kill_runner();
    host::kill_now(workspace.process_1);
    daemon.start_runner().await;

    let runs = within("runs", session.outcome("runs")).await.expect("an end");
    assert!(matches!(runs.message.outcome.and_then(|o| o.kind), Some(Kind::Indeterminate(_))));
    let waits = within("waits", session.outcome("waits")).await.expect("an end");
    assert!(matches!(waits.message.outcome.and_then(|o| o.kind), Some(Kind::NeverStarted(_))));
    end(daemon, Vec::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_and_launcher_killed_together_lose_nothing_either() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("both").await;
    session.send("runs", bash("export KEPT=yes; sleep 1.5; echo done"));
    within("start", session.started("runs")).await.expect("started");

    daemon.kill_runner();
    daemon.replace_launcher_by_force().await;
    daemon.start_runner().await;

    let runs = within("runs", session.outcome("runs")).await.expect("an end");
    assert_eq!(runs.streams[&1].bytes, b"done\n");
    assert_eq!(printed(&session, "next", "echo $KEPT").await, "yes");
    end(daemon, vec![session]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_before_a_restart_reaches_the_running_call_and_stays_for_the_one_that_has_not_come() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("cancelled").await;
    session.send("runs", bash("trap '' INT; sleep 60; echo end"));
    within("start", session.started("runs")).await.expect("started");
    session.cancel("runs", pb::CancelMode::Interrupt);
    tokio::time::sleep(Duration::from_millis(300)).await;

    daemon.kill_runner();
    daemon.start_runner().await;
    session.cancel("runs", pb::CancelMode::Kill);

    let runs = within("runs", session.outcome("runs")).await.expect("an end");
    assert!(matches!(runs.message.outcome.and_then(|o| o.kind), Some(Kind::Cancelled(_))));
    assert_eq!(printed(&session, "next", "echo usable").await, "usable");
    end(daemon, vec![session]).await;
}

/// F-23, F-24: nothing reaches the runner for longer than lease and orphan time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sandbox_ends_by_itself_when_lease_and_orphan_time_are_over_though_its_runner_lives() {
    needs_root!();
    let _host = host::shared();
    let link = LinkSettings {
        lease_ttl: Duration::from_secs(2),
        heartbeat_every: Duration::from_millis(300),
        ..LinkSettings::default()
    };
    let daemon = Daemon::start(Options { link, ..Options::default() }).await;
    let open = |session_id: &str, seconds| pb::OpenSession {
        session_id: session_id.into(),
        orphan_ttl: Some(prost_types::Duration { seconds, nanos: 0 }),
        ..Default::default()
    };
    let short = within("session", daemon.orchestrator.open_session(open("short", 1))).await.expect("opened");
    let long = within("session", daemon.orchestrator.open_session(open("long", 50))).await.expect("opened");
    short.send("runs", bash("sleep 600.125"));
    within("start", short.started("runs")).await.expect("started");
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(daemon.sandboxes().len(), 2, "the lease is renewed, so nobody is an orphan");

    daemon.wire.hold_what_goes_to_the_runner();
    let frozen = Instant::now();
    while daemon.sandboxes().len() == 2 {
        assert!(frozen.elapsed() < PATIENCE, "the sandbox outlives its orphan time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(host::processes_with("600.125"), Vec::<u32>::new());
    daemon.wire.release();

    let runs = within("runs", short.outcome("runs")).await.expect("an end");
    assert!(matches!(runs.message.outcome.and_then(|o| o.kind), Some(Kind::Indeterminate(_))));
    assert_eq!(printed(&long, "still", "echo here").await, "here");
    end(daemon, vec![long]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_sessions_are_taken_over_at_once() {
    needs_root!();
    let _host = host::exclusive();
    let count = number("SESSIONS", 12);
    let slots = u32::try_from(count + 2).expect("few sessions");
    let mut daemon = Daemon::start(Options { slots, limits: small_sandboxes(), ..Options::default() }).await;
    let mut sessions = Vec::new();
    for number in 0..count {
        let session = daemon.session(&format!("many-{number}")).await;
        session.send(&format!("runs-{number}"), bash(format!("sleep 2; echo {number}")));
        sessions.push(session);
    }
    for (number, session) in sessions.iter().enumerate() {
        within("start", session.started(&format!("runs-{number}"))).await.expect("started");
    }

    daemon.kill_runner();
    let killed = Instant::now();
    daemon.start_runner().await;
    println!("{count} sessions: the next link was up {:?} after its start", killed.elapsed());

    for (number, session) in sessions.iter().enumerate() {
        let finished = within("runs", session.outcome(&format!("runs-{number}"))).await.expect("an end");
        assert_eq!(finished.streams[&1].bytes, format!("{number}\n").as_bytes());
    }
    end(daemon, sessions).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn journal_of_another_state_directory_is_refused_and_nothing_is_touched() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("copied").await;
    printed(&session, "one", "echo one").await;
    daemon.kill_runner();
    let [state, _] = daemon.directories();
    let identity = state.join("identity/state_id");
    let before = fs::read_to_string(&identity).expect("an identity");
    fs::write(&identity, "00000000-0000-4000-8000-000000000000\n").expect("written");
    let files = |state: &std::path::Path| host::files_below(&state.join("journal"));
    let kept = files(&state);

    let status = daemon.runner_command().status().expect("the command runs");

    assert_eq!(status.code(), Some(78), "{}", daemon.end_of_log());
    assert!(daemon.end_of_log().contains("journal"), "{}", daemon.end_of_log());
    assert_eq!(files(&state), kept);
    assert_eq!(daemon.sandboxes().len(), 1, "a sandbox was ended by a runner that refused to start");
    fs::write(&identity, before).expect("written");
    daemon.start_runner().await;
    assert_eq!(printed(&session, "two", "echo two").await, "two");
    end(daemon, vec![session]).await;
}

/// F-44: two runners with one identity, on one machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_runner_of_the_same_state_directory_is_refused() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("first").await;

    let status = daemon.runner_command().status().expect("the command runs");

    assert_eq!(status.code(), Some(1), "{}", daemon.end_of_log());
    assert_eq!(printed(&session, "one", "echo one").await, "one");
    end(daemon, vec![session]).await;
}

/// F-01: killed while nothing runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_that_was_full_begins_again() {
    needs_root!();
    let _host = host::exclusive();
    let mut daemon = Daemon::start(Options { slots: 3, limits: small_sandboxes(), ..Options::default() }).await;
    let mut sessions = Vec::new();
    for number in 0..2 {
        let session = daemon.session(&format!("full-{number}")).await;
        printed(&session, &format!("before-{number}"), "echo before").await;
        sessions.push(session);
    }
    let third = pb::OpenSession { session_id: "full-2".into(), ..Default::default() };
    let refused = within("refusal", daemon.orchestrator.open_session(third)).await;
    assert!(refused.is_err(), "no slot is left for the next runner");

    daemon.kill_runner();
    daemon.start_runner().await;

    for (number, session) in sessions.iter().enumerate() {
        assert_eq!(printed(session, &format!("after-{number}"), "echo after").await, "after");
    }
    end(daemon, sessions).await;
}
