//! A hostile workload in a sandbox that lives for many calls: what it does to later calls, to the tools and to process 1. It
//! may spoil its own results; it may not keep the sandbox from working, and process 1 has to go on.
#![forbid(unsafe_code)]

use proto::launch::v1::{CreateSandbox, KillSandbox, Limits, reply, request};
use sandbox_runner_tests::keeper::Keeper;
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::Rootfs;
use serde_json::json;

/// One sandbox with the host's programs, and the connection of its runner.
struct Session {
    keeper: Keeper,
    connection: Connection,
    launcher: Launcher,
    _rootfs: Rootfs,
}

impl Session {
    fn start() -> Self {
        Self::start_with(plain_sandbox("workload"))
    }

    fn start_with(sandbox: CreateSandbox) -> Self {
        let rootfs = Rootfs::with_prober();
        let launcher = Setup::new(2, rootfs.path()).start().expect("the launcher starts");
        let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
        let created = match connection.ask(request::Body::CreateSandbox(sandbox)).expect("an answer").body {
            Some(reply::Body::SandboxCreated(created)) => created,
            other => panic!("not created: {other:?}"),
        };
        let [_, run] = launcher.setup().directories();
        let keeper = Keeper::connect(&run.join("sandboxes").join(created.socket_name)).expect("process 1 answers");
        Self { keeper, connection, launcher, _rootfs: rootfs }
    }

    /// Everything still works, and the sandbox ends when it is told to.
    fn assert_works(mut self) {
        let written = self.keeper.tool("write", &json!({"file_path": "/workspace/alive", "content": "yes"}));
        assert!(matches!(written.answer(), Some((_, false))), "{written:?}");
        let read = self.keeper.tool("read", &json!({"file_path": "/workspace/alive"}));
        assert_eq!(read.answer(), Some(("yes".to_owned(), false)), "{read:?}");
        let shell = self.keeper.bash("echo $((6 * 7))");
        assert_eq!((shell.code(), shell.text().trim()), (Some(0), "42"), "{shell:?}");
        let kill = request::Body::KillSandbox(KillSandbox { sandbox_id: "workload".to_owned() });
        let answer = self.connection.ask(kill).expect("an answer");
        assert!(matches!(answer.body, Some(reply::Body::Done(_))), "{answer:?}");
        assert!(self.launcher.is_alive());
    }
}

fn with_limits(limits: Limits) -> CreateSandbox {
    CreateSandbox { limits: Some(limits), ..plain_sandbox("workload") }
}

#[test]
fn processes_left_by_many_commands_do_not_keep_the_next_from_starting() {
    needs_root!();
    let mut session = Session::start_with(with_limits(Limits { pids: 128, ..Limits::default() }));
    for number in 0..80 {
        let left = session.keeper.bash("sleep 600 </dev/null >/dev/null 2>&1 &");
        assert_eq!(left.code(), Some(0), "command {number}: {left:?}");
    }
    session.assert_works();
}

/// Files in memory cannot be killed: if they could take all of the sandbox's memory, its processes would go one by one.
#[test]
fn filled_filesystems_are_errors_of_the_command_that_fills_them() {
    needs_root!();
    let limits = Limits { memory_bytes: 256 << 20, disk_bytes: 128 << 20, ..Limits::default() };
    let mut session = Session::start_with(with_limits(limits));
    for directory in ["/workspace", "/tmp", "/dev/shm"] {
        let filled = session.keeper.bash(&format!("head -c 4G /dev/zero > {directory}/fill"));
        assert_eq!(filled.code(), Some(1), "{directory}: {filled:?}");
        assert!(filled.text().contains("No space left on device"), "{directory}: {}", filled.text());
    }
    // Segments outlive whoever made them, so they count like files.
    let segments = session.keeper.bash("for i in $(seq 1000); do ipcmk -M 4194304 >/dev/null 2>&1 || exit 7; done");
    assert_eq!(segments.code(), Some(7), "System V segments without end: {segments:?}");
    let removed = session.keeper.bash("rm /workspace/fill");
    assert_eq!(removed.code(), Some(0), "{removed:?}");
    session.assert_works();
}

#[test]
fn stopped_processes_of_the_workload_do_not_hold_the_next_call() {
    needs_root!();
    let mut session = Session::start();
    // A first tool call leaves a process waiting for the next.
    let first = session.keeper.tool("write", &json!({"file_path": "/workspace/first", "content": "x"}));
    assert!(matches!(first.answer(), Some((_, false))), "{first:?}");

    let stopped = session.keeper.bash("kill -STOP -1");

    assert_eq!(stopped.code(), Some(0), "{stopped:?}");
    session.assert_works();
}
