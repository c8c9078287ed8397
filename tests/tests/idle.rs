//! Sessions without calls: what runs in them stands still until the next call, is there for the next runner and launcher, and
//! ends like any other. After longer only their files are there, and the next call is told so.
//!
//! The built daemon beside a launcher of its own, real sandboxes, and an orchestrator that checks every frame.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use runner::dev::{LinkSettings, Session};
use sandbox_runner_tests::daemon::{
    Daemon, MARKER, Options, PATIENCE, Workspace, bash, small_sandboxes, text_of, within,
};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;

fn options(idle: &str) -> Options {
    Options { limits: format!("{}[idle]\n{idle}\n", small_sandboxes()), ..Options::default() }
}

async fn printed(session: &Session, call_id: &str, command: &str) -> String {
    let finished = within(call_id, session.bash(call_id, command)).await.expect("an end");
    String::from_utf8_lossy(finished.streams.get(&1).map_or(&[][..], |stream| &stream.bytes)).trim().to_owned()
}

/// A session whose shell has a variable and left a process that counts, and one that can be found from outside by `token`.
async fn counting(daemon: &Daemon, name: &str, token: &str, request: pb::OpenSession) -> (Session, Workspace) {
    let request = pb::OpenSession { session_id: name.into(), ..request };
    let session = within(name, daemon.orchestrator.open_session(request)).await.expect("it opens");
    let command = format!(
        "export KEPT=yes; echo {name} > /workspace/{MARKER}; sleep {token} & \
         (while :; do echo >> /workspace/count; sleep 0.02; done) & cd /tmp"
    );
    printed(&session, &format!("{name}-begins"), &command).await;
    let workspace = Workspace::find(name).expect("its sandbox");
    (session, workspace)
}

/// A daemon with a lease of three seconds, and a session that lives for one beyond it.
async fn soon_orphaned(idle: &str, name: &str, token: &str) -> (Daemon, Session, Workspace) {
    let link = LinkSettings {
        lease_ttl: Duration::from_secs(3),
        heartbeat_every: Duration::from_millis(300),
        ..LinkSettings::default()
    };
    let daemon = Daemon::start(Options { link, ..options(idle) }).await;
    let orphan_ttl = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let request = pb::OpenSession { orphan_ttl, ..Default::default() };
    let (session, workspace) = counting(&daemon, name, token, request).await;
    (daemon, session, workspace)
}

/// What the kernel says of the group of the process with this token in its arguments.
fn is_frozen(token: &str) -> Option<bool> {
    let pid = *host::processes_with(token).first()?;
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let group = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new).into_iter().find(|path| path.exists())?;
    let events = fs::read_to_string(root.join(group).join("cgroup.events")).ok()?;
    Some(events.lines().any(|line| line == "frozen 1"))
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + scaled(PATIENCE);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn until_frozen(token: &str) {
    until("it stands still", || is_frozen(token) == Some(true)).await;
}

/// That nothing moves, and that the next call finds everything as it was and lets it go on.
async fn assert_rests_and_wakes(session: &Session, workspace: &Workspace, token: &str, call_id: &str) {
    let count = || workspace.read("count").len();
    let before = count();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((count(), is_frozen(token)), (before, Some(true)), "something moves in a session that was stopped");

    assert_eq!(printed(session, call_id, "echo $KEPT in $PWD").await, "yes in /tmp");

    until("it counts on", || count() > before).await;
}

async fn end(mut daemon: Daemon, sessions: Vec<Session>) {
    for session in sessions {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    assert_eq!(daemon.sandboxes(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_of_an_idle_session_stands_still_and_goes_on_with_the_next_call() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(options("freeze_after_seconds = 1")).await;
    let (session, workspace) = counting(&daemon, "rests", "600.211", pb::OpenSession::default()).await;

    for round in 0..3 {
        until_frozen("600.211").await;
        assert_rests_and_wakes(&session, &workspace, "600.211", &format!("round-{round}")).await;
    }

    // File tools wake it as well.
    until_frozen("600.211").await;
    let read = pb::ReadInput { file_path: format!("/workspace/{MARKER}"), ..Default::default() };
    let finished = within("read", session.run("read", pb::call::Input::Read(read))).await.expect("an end");
    assert_eq!(text_of(&finished.message).trim(), "rests");
    for woken in daemon.log().lines().filter(|line| line.contains("session is woken")) {
        println!("{woken}");
    }
    end(daemon, vec![session]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_asks_for_another_time_gets_it_and_a_running_call_is_never_stopped() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(options("freeze_after_seconds = 1")).await;
    let never = pb::OpenSession { idle_timeout: Some(prost_types::Duration::default()), ..Default::default() };
    let (awake, workspace) = counting(&daemon, "awake", "600.221", never).await;
    let (rests, _) = counting(&daemon, "rests", "600.222", pb::OpenSession::default()).await;
    let (busy, busy_workspace) = counting(&daemon, "busy", "600.223", pb::OpenSession::default()).await;
    busy.send("works", bash("while :; do sleep 0.05; done"));
    within("start", busy.started("works")).await.expect("started");

    until_frozen("600.222").await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let counts = [&workspace, &busy_workspace].map(|workspace| workspace.read("count").len());
    until("both count on", || {
        workspace.read("count").len() > counts[0] && busy_workspace.read("count").len() > counts[1]
    })
    .await;
    assert_eq!([is_frozen("600.221"), is_frozen("600.223")], [Some(false); 2]);

    busy.cancel("works", pb::CancelMode::Kill);
    within("works", busy.outcome("works")).await.expect("an end");
    end(daemon, vec![awake, rests, busy]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_stands_still_is_closed_politely_killed_and_drained_like_any_other() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(options("freeze_after_seconds = 1")).await;
    let (polite, _) = counting(&daemon, "polite", "600.231", pb::OpenSession::default()).await;
    let (killed, _) = counting(&daemon, "killed", "600.232", pb::OpenSession::default()).await;
    let (_drained, _) = counting(&daemon, "drained", "600.233", pb::OpenSession::default()).await;
    for token in ["600.231", "600.232", "600.233"] {
        until_frozen(token).await;
    }

    within("close", polite.close(Duration::from_secs(5))).await.expect("the session ends");
    within("close", killed.close(Duration::ZERO)).await.expect("the session ends");
    for token in ["600.231", "600.232"] {
        assert_eq!(host::processes_with(token), Vec::<u32>::new());
    }
    assert_eq!(daemon.sandboxes().len(), 1);

    daemon.end_with_nothing_left();
    assert_eq!(host::processes_with("600.233"), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_stands_still_is_taken_over_so_by_the_next_runner_and_the_next_launcher_and_wakes() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(options("freeze_after_seconds = 1")).await;
    let (session, workspace) = counting(&daemon, "kept", "600.241", pb::OpenSession::default()).await;

    until_frozen("600.241").await;
    daemon.kill_runner();
    daemon.start_runner().await;
    assert_rests_and_wakes(&session, &workspace, "600.241", "after-runner").await;

    until_frozen("600.241").await;
    daemon.replace_launcher_by_force().await;
    assert_rests_and_wakes(&session, &workspace, "600.241", "after-launcher").await;

    until_frozen("600.241").await;
    daemon.kill_runner();
    daemon.replace_launcher_by_force().await;
    daemon.start_runner().await;
    assert_rests_and_wakes(&session, &workspace, "600.241", "after-both").await;
    end(daemon, vec![session]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_stands_still_ends_when_lease_and_orphan_time_are_over() {
    needs_root!();
    let _host = host::shared();
    let (daemon, _session, _) = soon_orphaned("freeze_after_seconds = 1", "orphan", "600.251").await;
    until_frozen("600.251").await;

    daemon.wire.hold_what_goes_to_the_runner();
    until("it ends by itself", || daemon.sandboxes().is_empty()).await;
    assert_eq!(host::processes_with("600.251"), Vec::<u32>::new());
    daemon.wire.release();
    end(daemon, Vec::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_nobody_wants_any_more_is_removed_and_its_end_says_why() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(options("freeze_after_seconds = 1\nend_after_seconds = 3")).await;
    let (session, _) = counting(&daemon, "unwanted", "600.261", pb::OpenSession::default()).await;

    until_frozen("600.261").await;
    let ended = within("the end", session.over()).await.expect("an end");

    assert_eq!(ended.reason(), pb::SessionEndReason::Idle);
    assert_eq!(host::processes_with("600.261"), Vec::<u32>::new());
    end(daemon, Vec::new()).await;
}

fn note_of(finished: &pb::CallFinished) -> Option<&str> {
    let note = finished.notes.iter().find(|note| note.kind() == pb::NoteKind::ProcessesEnded)?;
    Some(&note.text)
}

/// The processes of the session are gone, and its sandbox is not.
async fn until_stopped(daemon: &Daemon, workspace: &Workspace, token: &str) {
    until("its processes are ended", || host::processes_with(token).is_empty()).await;
    // Process 1 and the spawner are all there is.
    until("nothing else is there", || host::children_of(workspace.process_1).len() == 1).await;
    assert!(workspace.lives() && daemon.sandboxes().len() == 1);
}

/// That the next call finds files and directory, no process and no variable, and is told.
async fn assert_begins_anew(session: &Session, workspace: &Workspace, name: &str, call_id: &str) {
    let before = workspace.read("count");
    let command = format!("echo ${{KEPT-gone}} in $PWD, $(cat /workspace/{MARKER}); jobs -p");
    let finished = within(call_id, session.bash(call_id, &command)).await.expect("an end");
    let printed = finished.streams.get(&1).map_or(&[][..], |stream| &stream.bytes);
    assert_eq!(String::from_utf8_lossy(printed).trim(), format!("gone in /tmp, {name}"));
    let note = note_of(&finished.message).expect("it is told");
    assert!(note.contains("variables") && note.contains("processes that earlier calls had left"), "{note}");
    assert!(text_of(&finished.message).contains(note), "the model is told: {}", text_of(&finished.message));
    assert_eq!(workspace.read("count"), before, "what counted lives");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_of_a_session_that_stands_still_for_long_are_ended_and_its_files_stay() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(options("freeze_after_seconds = 1\nstop_after_seconds = 2")).await;
    let (session, workspace) = counting(&daemon, "files", "600.271", pb::OpenSession::default()).await;
    printed(&session, "fills", "head -c 8M /dev/urandom > /workspace/data; sha256sum < /workspace/data").await;

    until_stopped(&daemon, &workspace, "600.271").await;
    assert_begins_anew(&session, &workspace, "files", "first").await;

    // It has one process again, and the limit of its disk holds for what was kept: 64 MiB in all.
    until("its shell is ended as well", || host::children_of(workspace.process_1).len() == 1).await;
    let full = printed(&session, "full", "head -c 60M /dev/zero > /workspace/more; echo $?; rm /workspace/more").await;
    assert!(full.ends_with('1'), "the limit does not count what was kept: {full}");

    // A file tool is told as well, and only once.
    until("its processes are ended", || host::children_of(workspace.process_1).len() == 1).await;
    for (call_id, is_told) in [("read-first", true), ("read-again", false)] {
        let read = pb::ReadInput { file_path: format!("/workspace/{MARKER}"), ..Default::default() };
        let finished = within(call_id, session.run(call_id, pb::call::Input::Read(read))).await.expect("an end");
        assert_eq!(text_of(&finished.message).trim(), "files");
        assert_eq!(note_of(&finished.message).is_some(), is_told, "{call_id}");
    }
    end(daemon, vec![session]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_without_processes_is_taken_over_by_the_next_runner_and_the_next_launcher_with_its_files() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(options("freeze_after_seconds = 1\nstop_after_seconds = 2")).await;
    let (session, workspace) = counting(&daemon, "emptied", "600.281", pb::OpenSession::default()).await;
    let count = "(while :; do echo >> /workspace/count; sleep 0.02; done) & sleep 600.281 & export KEPT=yes; cd /tmp";

    until_stopped(&daemon, &workspace, "600.281").await;
    daemon.kill_runner();
    daemon.start_runner().await;
    until_stopped(&daemon, &workspace, "600.281").await;
    assert_begins_anew(&session, &workspace, "emptied", "after-runner").await;

    printed(&session, "again", count).await;
    until_stopped(&daemon, &workspace, "600.281").await;
    daemon.replace_launcher_by_force().await;
    assert_begins_anew(&session, &workspace, "emptied", "after-launcher").await;

    printed(&session, "once-more", count).await;
    until_stopped(&daemon, &workspace, "600.281").await;
    daemon.kill_runner();
    daemon.replace_launcher_by_force().await;
    daemon.start_runner().await;
    assert_begins_anew(&session, &workspace, "emptied", "after-both").await;
    end(daemon, vec![session]).await;
}

/// F-01: the runner and the launcher die at moments that are drawn, while processes are being made to stand still and ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_while_processes_are_being_ended_the_session_goes_on_with_its_files() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(options("freeze_after_seconds = 1\nstop_after_seconds = 2")).await;
    let (session, workspace) = counting(&daemon, "torn", "600.291", pb::OpenSession::default()).await;
    for round in 0..4_u64 {
        printed(&session, &format!("left-{round}"), "sleep 600.291 & cd /tmp").await;
        // Around the second at which they are ended, counted from the last call.
        tokio::time::sleep(Duration::from_millis(1900 + 60 * round)).await;
        daemon.kill_runner();
        if round % 2 == 1 {
            daemon.replace_launcher_by_force().await;
        }
        daemon.start_runner().await;
        let found = printed(&session, &format!("found-{round}"), &format!("cat /workspace/{MARKER}; pwd")).await;
        assert_eq!(found, "torn\n/tmp", "round {round}");
        assert!(workspace.lives());
    }
    until_stopped(&daemon, &workspace, "600.291").await;
    end(daemon, vec![session]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_without_processes_keeps_its_place_ends_in_time_and_leaves_nothing() {
    needs_root!();
    let _host = host::shared();
    let limits =
        format!("{}max_sessions = 1\n[idle]\nstop_after_seconds = 1\nend_after_seconds = 4\n", small_sandboxes());
    let daemon = Daemon::start(Options { limits, ..Options::default() }).await;
    let (session, workspace) = counting(&daemon, "retained", "600.301", pb::OpenSession::default()).await;
    until_stopped(&daemon, &workspace, "600.301").await;

    let other = pb::OpenSession { session_id: "other".into(), ..Default::default() };
    let refused = within("other", daemon.orchestrator.open_session(other.clone())).await.expect_err("no place");
    assert!(refused.to_string().contains("sessions: 1 asked, 1 of 1"), "{refused}");
    let ended = within("the end", session.over()).await.expect("an end");

    assert_eq!(ended.reason(), pb::SessionEndReason::Idle);
    assert!(!workspace.lives() && daemon.sandboxes().is_empty());
    let other = pb::OpenSession { session_id: "next".into(), ..other };
    let next = within("next", daemon.orchestrator.open_session(other)).await.expect("its place is free");
    end(daemon, vec![next]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_without_processes_ends_when_lease_and_orphan_time_are_over() {
    needs_root!();
    let _host = host::shared();
    let (daemon, _session, workspace) = soon_orphaned("stop_after_seconds = 1", "alone", "600.311").await;
    until_stopped(&daemon, &workspace, "600.311").await;

    daemon.wire.hold_what_goes_to_the_runner();
    until("it ends by itself", || daemon.sandboxes().is_empty()).await;
    assert!(!workspace.lives());
    daemon.wire.release();
    end(daemon, Vec::new()).await;
}
