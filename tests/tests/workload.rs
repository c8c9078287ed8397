//! A hostile workload in a sandbox that lives for many calls: what it does to later calls, to the tools and to process 1. It
//! may spoil its own results; it may not keep the sandbox from working, and process 1 has to go on.
#![forbid(unsafe_code)]

use std::time::Duration;

use proto::init::v1::{
    Bash, Cancel, CancelMode, Note, NoteKind, ReadOutput, StopWork, Stream, Tool, frame, outcome::Kind,
    request as init_request, start_call,
};
use proto::launch::v1::{CreateSandbox, FreezeSandbox, InspectSandbox, KillSandbox, Limits, reply, request};
use sandbox_runner_tests::keeper::{Finished, Keeper};
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

/// A file of 200,000 bytes, and an edit that makes `times` as many of them.
fn multiply(keeper: &mut Keeper, times: usize) -> serde_json::Value {
    let made = keeper.bash("cd /workspace && head -c 200000 /dev/zero | tr '\\0' x > old && cp old file");
    assert_eq!(made.code(), Some(0), "{made:?}");
    json!({"file_path": "/workspace/file", "old_string": "x", "new_string": "y".repeat(times), "replace_all": true})
}

/// What the call says of the file, in its notes.
fn told(finished: &Finished) -> Vec<NoteKind> {
    let of_files = [NoteKind::FileReplaced, NoteKind::FileUnchanged, NoteKind::FileUncertain];
    finished.0.notes.iter().map(Note::kind).filter(|kind| of_files.contains(kind)).collect()
}

/// What is in the directory: the size of the file, whether all of it is the old or the new letter, and drafts.
fn found(keeper: &mut Keeper) -> (bool, u64, String) {
    let looked = keeper.bash("cd /workspace && cmp -s old file && echo same; stat -c %s file; ls -a | grep tmp- || :");
    let text = looked.text();
    let (same, rest) = text.strip_prefix("same\n").map_or((false, text.as_str()), |rest| (true, rest));
    let (size, drafts) = rest.split_once('\n').unwrap_or((rest, ""));
    (same, size.trim().parse().unwrap_or_else(|_| panic!("no size in {looked:?}")), drafts.trim().to_owned())
}

#[test]
fn edit_that_the_kernel_kills_for_memory_says_that_the_file_is_what_it_was_and_it_is() {
    needs_root!();
    let mut session = Session::start_with(with_limits(Limits { memory_bytes: 40 << 20, ..Limits::default() }));
    let input = multiply(&mut session.keeper, 300);

    let killed = session.keeper.tool("edit", &input);

    let outcome = killed.0.outcome.as_ref().and_then(|outcome| outcome.kind.as_ref());
    assert!(matches!(outcome, Some(Kind::OutOfMemory(_))), "{killed:?}");
    assert_eq!(told(&killed), [NoteKind::FileUnchanged], "{killed:?}");
    assert_eq!(found(&mut session.keeper), (true, 200_000, String::new()));
    session.assert_works();
}

/// Whenever it is killed, the file is the old one or the new one, what is told is what is there, and no draft is left.
#[test]
fn edit_that_is_killed_at_any_moment_says_what_became_of_the_file() {
    needs_root!();
    const TIMES: u64 = 40;
    let mut session = Session::start();
    let mut killed = 0;
    for round in 0..40_u64 {
        let input = multiply(&mut session.keeper, 40);
        let tool = Tool { name: "edit".to_owned(), input_json: input.to_string().into_bytes() };
        let call_id = session.keeper.start(start_call::Work::Tool(tool), 60_000).expect("the call is taken");
        std::thread::sleep(Duration::from_micros(round * 700));
        let cancel = Cancel { call_id: call_id.clone(), mode: CancelMode::Kill.into() };
        // It may be over by then.
        session.keeper.ask(proto::init::v1::request::Body::Cancel(cancel)).expect("an answer");

        let finished = session.keeper.finish(&call_id).expect("the call ends");

        let (same, size, drafts) = found(&mut session.keeper);
        let expected = match (finished.code(), &told(&finished)[..]) {
            (Some(0), []) | (None, [NoteKind::FileReplaced]) => (false, 200_000 * TIMES),
            (None, [NoteKind::FileUnchanged]) => (true, 200_000),
            other => panic!("round {round}: {other:?} of {finished:?}"),
        };
        killed += u32::from(finished.code().is_none());
        assert_eq!(((same, size), drafts.as_str()), (expected, ""), "round {round}: {finished:?}");
    }
    assert!(killed > 0, "no edit took long enough to be killed");
    session.assert_works();
}

#[test]
fn work_that_multiplies_and_does_not_listen_is_ended_running_or_not_and_the_sandbox_goes_on() {
    needs_root!();
    let mut session = Session::start_with(with_limits(Limits { pids: 64, ..Limits::default() }));
    for frozen in [false, true] {
        let command = "grow() { trap '' HUP INT TERM; while :; do (grow) & sleep 0.02; done; }; grow </dev/null >/dev/null 2>&1 &";
        let begun = session.keeper.bash(command);
        assert_eq!(begun.code(), Some(0), "{begun:?}");
        let freeze = |frozen| request::Body::FreezeSandbox(FreezeSandbox { sandbox_id: "workload".to_owned(), frozen });
        let answer = session.connection.ask(freeze(frozen)).expect("an answer");
        assert!(matches!(answer.body, Some(reply::Body::Done(_))), "{answer:?}");

        let stopped = session.keeper.ask(init_request::Body::StopWork(StopWork {})).expect("an answer");

        assert!(matches!(stopped, frame::Body::Done(_)), "{stopped:?}");
        let inspect = request::Body::InspectSandbox(InspectSandbox { sandbox_id: "workload".to_owned() });
        match session.connection.ask(inspect).expect("an answer").body {
            Some(reply::Body::Inspection(seen)) => {
                assert_eq!(seen.host_pids.len(), 2, "more than process 1 and the spawner: {seen:?}");
            }
            other => panic!("no inspection: {other:?}"),
        }
        session.connection.ask(freeze(false)).expect("an answer");
        // The very next process: one in a slot that was killed would be killed as well.
        let next = session.keeper.bash("echo on");
        assert_eq!((next.code(), next.text().trim()), (Some(0), "on"), "{next:?}");
    }
    session.assert_works();
}

/// Runs a command, waits until it has said `ready`, and interrupts it.
fn interrupted(keeper: &mut Keeper, command: &str) -> Finished {
    let work = Bash { command: format!("echo ready\n{command}"), restart: false };
    let call_id = keeper.start(start_call::Work::Bash(work), 60_000).expect("the call is taken");
    let read = ReadOutput { call_id: call_id.clone(), stream: Stream::Stdout.into(), offset: 0, max_bytes: 100 };
    while !matches!(
        keeper.ask(init_request::Body::ReadOutput(read.clone())).expect("an answer"),
        frame::Body::OutputData(data) if data.data.starts_with(b"ready")
    ) {
        std::thread::sleep(Duration::from_millis(2));
    }
    // Until what it is about to start has started.
    std::thread::sleep(Duration::from_millis(60) * patience());
    let cancel = Cancel { call_id: call_id.clone(), mode: CancelMode::Interrupt.into() };
    keeper.ask(init_request::Body::Cancel(cancel)).expect("an answer");
    keeper.finish(&call_id).expect("the call ends")
}

/// How many times slower than a real one this machine is.
fn patience() -> u32 {
    std::env::var("SANDBOX_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

#[test]
fn interrupted_command_lets_nothing_begin_and_only_a_shell_that_ignores_interrupts_is_lost() {
    needs_root!();
    let mut session = Session::start();
    for (command, is_kept) in [
        ("sleep 30; touch f", true),
        ("f() { sleep 30; touch f; }; g() { f; touch f; }; g; touch f", true),
        ("while :; do :; done; touch f", true),
        ("y=$(sleep 30); touch f", true),
        ("sleep 30 | cat; touch f", true),
        ("sleep 30 & wait; touch f", true),
        ("(sleep 30; touch f); touch f", true),
        ("sh -c 'trap \"\" INT; sleep 30'; touch f", true),
        ("sh -c 'trap \"\" INT; sleep 30'; sleep 30; touch f", true),
        ("sh -c 'trap \"\" INT TERM; while :; do sleep 30; done' || touch f; touch f", true),
        ("(trap '' INT; sleep 30; touch f); touch f", true),
        ("trap '' INT; sleep 30; touch f", false),
        ("trap '' INT; f() { sleep 30 | cat; touch f; }; f; touch f", false),
        ("trap '' INT; while :; do :; done; touch f", false),
    ] {
        session.keeper.bash("x=kept; cd /tmp; cd /workspace");

        let ended = interrupted(&mut session.keeper, command);

        let after = session.keeper.bash("echo ${x-lost} $PWD; ls; unset x");
        let expected = if is_kept { "kept /workspace\n" } else { "lost /workspace\n" };
        assert_eq!(after.text(), expected, "{command}: {ended:?}");
        let is_told = ended.0.notes.iter().any(|note| note.kind() == NoteKind::ShellRestarted);
        assert_eq!(is_told, !is_kept, "{command}: {ended:?}");
        let Some(Kind::Cancelled(cancelled)) = ended.0.outcome.as_ref().and_then(|outcome| outcome.kind.as_ref())
        else {
            panic!("{command}: {ended:?}");
        };
        assert!(!is_kept || matches!(cancelled.code, 130 | 143), "{command}: {ended:?}");
    }
    session.assert_works();
}

#[test]
fn children_of_the_shell_see_three_descriptors() {
    needs_root!();
    let mut session = Session::start();
    // The fourth is the directory that ls itself reads.
    for command in ["ls /proc/self/fd", "ls /proc/self/fd | cat", "(ls /proc/self/fd)", "exec ls /proc/self/fd"] {
        assert_eq!(session.keeper.bash(command).text(), "0\n1\n2\n3\n", "{command}");
    }
    session.assert_works();
}

#[test]
fn no_game_with_the_shell_makes_a_command_run_twice() {
    needs_root!();
    let mut session = Session::start();
    for game in [
        "readonly REPLY IFS PWD PS1 PS2 PROMPT_COMMAND BASH_SOURCE",
        "readonly $(compgen -v) 2>/dev/null",
        "unalias -a; unset -f read eval",
        "alias read=false eval=false printf=false exit=false builtin=false .=false",
        "exec 201>&-",
        "exec 0<&- 1>&- 2>&-",
        "for n in {3..255}; do eval \"exec $n>&-\"; done",
        "ulimit -n 5",
        "for n in {20..60}; do eval \"exec $n</dev/null\"; done; ulimit -S -n 20",
        "trap '' STKFLT",
        "trap - STKFLT",
        "kill -9 $$",
        "exit 125",
    ] {
        session.keeper.bash(&format!("echo x >>/workspace/count\n{game}"));
        session.keeper.bash("echo y >&2");
        let restart = Bash { command: "cat /workspace/count; rm /workspace/count".to_owned(), restart: true };
        let call_id = session.keeper.start(start_call::Work::Bash(restart), 60_000).expect("the call is taken");
        assert_eq!(session.keeper.finish(&call_id).expect("it ends").text(), "x\n", "{game}");
    }
    session.assert_works();
}
