//! Two versions of the program, one after the other: what an earlier one has left is served by this one and, where it has
//! written nothing that the earlier one does not know, the other way round (F-61).
//!
//! The earlier program is built by `.ci/previous` from the history; it has an older launcher, an older process 1, and fewer
//! records in its journal.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{CallOutcome, Session};
use sandbox_runner_tests::daemon::{Daemon, Options, exec, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::rootfs::shared_directory;
use sandbox_runner_tests::runner::{binary, target_directory};
use sandbox_runner_tests::{needs_root, skip};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// The program of the earlier version, if it was built.
fn previous() -> Option<PathBuf> {
    let path = target_directory().ok()?.join("ci/previous/sandbox-runner");
    path.exists().then_some(path)
}

/// A directory in which a program is installed, and exchanged as a package manager does it.
struct Installed(TempDir);

impl Installed {
    fn new(program: &Path) -> Self {
        let installed = Self(shared_directory("installed"));
        installed.put(program);
        installed
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("sandbox-runner")
    }

    fn put(&self, program: &Path) {
        let unfinished = self.0.path().join("sandbox-runner.new");
        fs::copy(program, &unfinished).expect("installed");
        fs::rename(&unfinished, self.path()).expect("installed");
    }
}

async fn printed(session: &Session, call_id: &str, command: &str) -> String {
    let finished = within(call_id, session.run(call_id, exec(command))).await.expect("an end");
    String::from_utf8_lossy(finished.streams.get(&1).map_or(&[][..], |stream| &stream.bytes)).trim().to_owned()
}

async fn session(daemon: &Daemon, session_id: &str) -> Session {
    let limits = Some(pb::ResourceLimits { max_concurrent_calls: 4, ..Default::default() });
    let request = pb::OpenSession { session_id: session_id.into(), limits, ..Default::default() };
    within("session", daemon.orchestrator.open_session(request)).await.expect("opened")
}

/// A session in which a command runs, a terminal is open, and a job goes on in the background.
struct Busy {
    session: Session,
    typed: u64,
    looks: u32,
}

/// Prints until somebody wants it to end, and then how often.
const TALKS: &str = "i=0; echo talks >> /workspace/count; while [ ! -e /workspace/enough ]; do i=$((i + 1)); \
     seq -f \"$i-%06.0f\" 500; sleep 0.05; done; echo $i > /workspace/rounds";
const JOB: &str = "(while :; do echo tick >> /workspace/ticks; sleep 0.05; done) & echo $! > /workspace/job";

impl Busy {
    async fn begin(daemon: &Daemon) -> Self {
        let session = session(daemon, "busy").await;
        within("job", session.bash("job", JOB)).await.expect("an end");
        within("shell", session.bash("shell", "KEPT=yes; cd /tmp")).await.expect("an end");
        session.send("talks", exec(TALKS));
        let terminal = Some(pb::TerminalSize { columns: 80, rows: 24 });
        let argv = vec![b"/bin/sh".to_vec()];
        session.send(
            "terminal",
            pb::call::Input::Exec(pb::ExecInput { argv, stdin: true, terminal, ..Default::default() }),
        );
        for call_id in ["talks", "terminal"] {
            within("start", session.started(call_id)).await.expect("started");
        }
        let mut this = Self { session, typed: 0, looks: 0 };
        this.types("echo first-$((20 + 1))\n").await;
        this
    }

    async fn types(&mut self, keys: &str) {
        let taken = within("keys", self.session.stdin("terminal", self.typed, keys.as_bytes(), false)).await;
        self.typed = taken.expect("taken");
    }

    /// Whether everything goes on: the job ticks, the command talks, the terminal takes keys, the shell is the same.
    async fn goes_on(&mut self, daemon: &Daemon) {
        self.looks += 1;
        let look = self.looks;
        let ticks = "wc -l < /workspace/ticks";
        let before: u64 = printed(&self.session, &format!("ticks-{look}"), ticks).await.parse().expect("a number");
        let wait = format!(
            "kill -0 $(cat /workspace/job) || exit; until [ $({ticks}) -gt {} ]; do sleep 0.02; done; echo on",
            before + 2
        );
        assert_eq!(printed(&self.session, &format!("job-{look}"), &wait).await, "on", "{}", daemon.end_of_log());
        let shell = within("shell", self.session.bash(&format!("shell-{look}"), "echo $KEPT in $PWD")).await;
        assert_eq!(shell.expect("an end").streams[&1].bytes, b"yes in /tmp\n");
        self.types(&format!("echo look-$(({look} + 40))\n")).await;
    }

    async fn end(mut self, daemon: &Daemon) {
        printed(&self.session, "enough", "touch /workspace/enough").await;
        let talks = within("talks", self.session.outcome("talks")).await.expect("an end");
        let rounds: u64 = printed(&self.session, "rounds", "cat /workspace/rounds").await.parse().expect("a number");
        let wanted: String = (1..=rounds).flat_map(|i| (1..=500).map(move |line| format!("{i}-{line:06}\n"))).collect();
        assert_eq!(Sha256::digest(&talks.streams[&1].bytes), Sha256::digest(wanted.as_bytes()), "{rounds} rounds");
        assert!(matches!(kind(talks), Some(Kind::Exited(pb::Exited { code: 0 }))));
        assert_eq!(printed(&self.session, "count", "cat /workspace/count").await, "talks", "it began once");
        self.types("exit 7\n").await;
        let terminal = within("terminal", self.session.outcome("terminal")).await.expect("an end");
        let screen: Vec<u8> = terminal.streams.values().flat_map(|stream| stream.bytes.clone()).collect();
        let screen = String::from_utf8_lossy(&screen).into_owned();
        let shown = (1..=self.looks).map(|look| format!("look-{}", look + 40)).chain(["first-21".to_owned()]);
        for line in shown {
            assert_eq!(screen.matches(&line).count(), 1, "{line} in {screen:?}");
        }
        assert!(matches!(kind(terminal), Some(Kind::Exited(pb::Exited { code: 7 }))), "{screen:?}");
        within("close", self.session.close(Duration::ZERO)).await.expect("the session ends");
        assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    }
}

fn kind(outcome: CallOutcome) -> Option<Kind> {
    outcome.message.outcome.and_then(|outcome| outcome.kind)
}

async fn restart_runner(daemon: &mut Daemon) {
    daemon.leave_runner();
    daemon.start_runner().await;
}

/// F-61: upgrade in both orders of the services, and back again while nothing new was written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the program of an earlier version, which .ci/previous builds in minutes"]
async fn program_that_is_replaced_by_the_next_version_and_put_back_again_loses_nothing_that_runs() {
    needs_root!();
    let Some(previous) = previous() else {
        skip!("no earlier version is built; `.ci/previous` builds it where the history has it");
    };
    let _host = host::shared();
    for runner_first in [true, false] {
        let installed = Installed::new(&previous);
        let mut daemon = Daemon::start(Options { program: Some(installed.path()), ..Options::default() }).await;
        let mut busy = Busy::begin(&daemon).await;
        let launcher = daemon.launcher_pid();

        installed.put(binary());
        if runner_first {
            restart_runner(&mut daemon).await;
            busy.goes_on(&daemon).await;
            daemon.reload_launcher().await;
        } else {
            daemon.reload_launcher().await;
            busy.goes_on(&daemon).await;
            restart_runner(&mut daemon).await;
        }
        busy.goes_on(&daemon).await;
        let after = session(&daemon, "after").await;
        assert_eq!(printed(&after, "next", "echo next").await, "next");

        installed.put(&previous);
        restart_runner(&mut daemon).await;
        busy.goes_on(&daemon).await;
        assert_eq!(printed(&after, "back", "echo back").await, "back");

        assert_eq!(daemon.launcher_pid(), launcher, "it has replaced itself in place");
        within("close", after.close(Duration::ZERO)).await.expect("the session ends");
        busy.end(&daemon).await;
        daemon.end_with_nothing_left();
    }
}

/// F-61: this version has written a record that the earlier one does not know.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs the program of an earlier version, which .ci/previous builds in minutes"]
async fn earlier_version_refuses_a_journal_with_records_that_it_does_not_know_by_name_and_changes_nothing() {
    needs_root!();
    let Some(previous) = previous() else {
        skip!("no earlier version is built; `.ci/previous` builds it where the history has it");
    };
    let _host = host::shared();
    let installed = Installed::new(binary());
    let mut daemon = Daemon::start(Options { program: Some(installed.path()), ..Options::default() }).await;
    let session = session(&daemon, "kept").await;
    session.send("runs", exec("echo runs >> /workspace/count; while [ ! -e /workspace/enough ]; do sleep 0.05; done"));
    within("start", session.started("runs")).await.expect("started");
    daemon.kill_runner();
    // The next runner writes down that it goes on with a call of which this one may have died.
    daemon.crash_points = "attached=panic".to_owned();
    daemon.start_runner_to_its_end().await;
    daemon.crash_points.clear();
    daemon.start_runner().await;
    daemon.leave_runner();
    let [state, _] = daemon.directories();
    let files = || -> Vec<(PathBuf, Vec<u8>)> {
        let journal = host::files_below(&state.join("journal"));
        journal
            .into_iter()
            .filter(|path| path.is_file())
            .map(|path| (path.clone(), fs::read(path).expect("a file of our own")))
            .collect()
    };
    let (before, held) = (files(), daemon.sandboxes());

    installed.put(&previous);
    let status = daemon.start_runner_to_its_end().await;

    assert_eq!(status.code(), Some(78), "a service manager would try again: {}", daemon.end_of_log());
    assert!(daemon.log().contains("unknown variant `Resumed`"), "{}", daemon.end_of_log());
    assert!(files() == before, "the journal was changed");
    assert_eq!(daemon.sandboxes(), held);

    installed.put(binary());
    daemon.start_runner().await;
    assert_eq!(printed(&session, "enough", "touch /workspace/enough").await, "");
    let runs = within("runs", session.outcome("runs")).await.expect("an end");
    assert!(matches!(kind(runs), Some(Kind::Exited(pb::Exited { code: 0 }))));
    assert_eq!(printed(&session, "count", "cat /workspace/count").await, "runs");
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}
