//! Whom the kernel kills for memory is named, in the end of a call and in that of a session, where the kernel shows its log.
//!
//! What the log has is read here as well, so that a host that hides it, or a record that it leaves out, has to give the answer
//! without a name, and nothing else.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use sandbox_runner_tests::daemon::{Daemon, Options, Workspace, bash, text_of, within};
use sandbox_runner_tests::rootfs::shared_directory;
use sandbox_runner_tests::runner::binary;
use sandbox_runner_tests::{host, needs_root};

/// Memory limit of the sandboxes of these tests.
const LIMIT: u64 = 128 << 20;

/// The kernel's log, from where it was opened.
struct Log(Option<File>);

impl Log {
    fn open() -> Self {
        let opened = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/kmsg");
        Self(opened.ok().filter(|mut file| file.seek(SeekFrom::End(0)).is_ok()))
    }

    /// Whether it says that a process of this name was killed in one of our sandboxes.
    fn names(&mut self, process: &str) -> bool {
        self.names_one_of(&[process])
    }

    fn names_one_of(&mut self, processes: &[&str]) -> bool {
        let Some(file) = &mut self.0 else { return false };
        let (mut buffer, mut found) = (vec![0; 16 << 10], false);
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return found,
                Ok(length) => {
                    let record = String::from_utf8_lossy(&buffer[..length]);
                    let is_ours = record.contains(";oom-kill:") && record.contains("/sandbox-runner-");
                    let is_meant = |process| record.contains(&format!(",task={process},pid="));
                    found |= is_ours && processes.iter().any(is_meant);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return found,
                Err(error) => assert_eq!(error.kind(), ErrorKind::BrokenPipe, "{error}"),
            }
        }
    }
}

async fn end(mut daemon: Daemon) {
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

/// The victim is a child of the shell. Its name is whatever the workload likes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_of_the_shell_that_the_kernel_kills_is_named_with_what_it_used() {
    needs_root!();
    let _host = host::exclusive();
    let daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("child").await;
    let copied = "for name in 'x,pid=1,uid=0' ',task=y,uid=2'; do cp \"$(command -v tail)\" \"/workspace/$name\"; done";
    within("copies", session.bash("copy", copied)).await.expect("an end");

    for (number, (command, name)) in [
        ("tail", "tail"),
        ("'/workspace/x,pid=1,uid=0'", "x,pid=1,uid=0"),
        ("'/workspace/,task=y,uid=2'", ",task=y,uid=2"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut log = Log::open();
        let id = format!("child-{number}");
        session.send(&id, bash(format!("{command} /dev/zero")));
        let ended = within(&id, session.ended(&id)).await.expect("an end");
        let text = text_of(&ended);
        let cause = match ended.outcome.and_then(|outcome| outcome.kind) {
            Some(Kind::OutOfMemory(cause)) => cause,
            other => panic!("{name}: {other:?}"),
        };

        assert_eq!((cause.limit_bytes, cause.kills, cause.code), (LIMIT, 1, 137), "{name}: {cause:?}");
        if log.names(name) {
            assert_eq!(cause.process, name);
            assert!((LIMIT / 2..=LIMIT).contains(&cause.used_bytes), "{name}: {cause:?}");
            let mebibytes = cause.used_bytes >> 20;
            let told = format!("{name} was killed with {mebibytes} MiB at the memory limit of 128 MiB; exit code: 137");
            assert!(text.contains(&told), "{text}");
        } else {
            println!("the kernel's log has no record of {name}");
            assert_eq!((cause.process.as_str(), cause.used_bytes), ("", 0), "{name}");
            assert!(text.contains("a process was killed at the memory limit of 128 MiB; exit code: 137"), "{text}");
        }
    }

    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    end(daemon).await;
}

/// The program of the launcher is replaced in place, and the kernel's log is handed over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn launcher_that_was_replaced_in_place_goes_on_to_name_victims() {
    needs_root!();
    let _host = host::exclusive();
    let installed = shared_directory("installed");
    let program = installed.path().join("sandbox-runner");
    fs::copy(binary(), &program).expect("installed");
    let mut daemon = Daemon::start(Options { program: Some(program), ..Options::default() }).await;
    let session = daemon.session("replaced").await;
    daemon.reload_launcher().await;
    let mut log = Log::open();

    session.send("starved", bash("tail /dev/zero"));
    let ended = within("starved", session.ended("starved")).await.expect("an end");

    let expected = if log.names("tail") { "tail" } else { "" };
    match ended.outcome.and_then(|outcome| outcome.kind) {
        Some(Kind::OutOfMemory(cause)) => assert_eq!(cause.process, expected, "{cause:?}"),
        other => panic!("{other:?}"),
    }
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    end(daemon).await;
}

/// The commands go on, and notes tell of the kills.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_that_a_command_survives_is_told_with_its_name_and_never_with_that_of_another_sandbox() {
    needs_root!();
    let _host = host::exclusive();
    let daemon = Daemon::start(Options::default()).await;
    let sessions = [("first", daemon.session("first").await), ("second", daemon.session("second").await)];
    for (name, session) in &sessions {
        let copied = format!("cp \"$(command -v tail)\" /workspace/{name}");
        within("copy", session.bash(&format!("copy-{name}"), &copied)).await.expect("an end");
    }
    let mut logs = [Log::open(), Log::open()];

    for (name, session) in &sessions {
        session.send(&format!("starved-{name}"), bash(format!("/workspace/{name} /dev/zero; true")));
    }

    for ((name, session), log) in sessions.iter().zip(&mut logs) {
        let ended = within(name, session.ended(&format!("starved-{name}"))).await.expect("an end");
        let notes: Vec<_> = ended.notes.iter().filter(|note| note.kind() == pb::NoteKind::MemoryKills).collect();
        let [note] = notes[..] else { panic!("{ended:?}") };
        let expected = format!("; the last was {name}, which used ");
        assert_eq!(note.text.contains(&expected), log.names(name), "{}", note.text);
        assert_eq!(note.text.contains("; the last was "), note.text.contains(&expected), "{}", note.text);
    }
    for (_, session) in sessions {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    end(daemon).await;
}

/// With controllers of version 1 process 1 is in the same group as the workload, and may be the victim. With version 2 it has a
/// group and a limit of its own, and what the workload lacks is not its.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_whose_process_1_is_killed_for_memory_ends_with_the_limit_and_the_name() {
    needs_root!();
    let _host = host::exclusive();
    let daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("lost").await;
    within("marker", session.bash("marker", "echo lost > /workspace/.whose")).await.expect("an end");
    let process_1 = Workspace::find("lost").expect("its sandbox lives").process_1;
    fs::write(format!("/proc/{process_1}/oom_score_adj"), "1000").expect("root may");
    let mut log = Log::open();
    if !Path::new("/sys/fs/cgroup/memory").is_dir() {
        session.send("starved", bash("tail /dev/zero"));
        let ended = within("starved", session.ended("starved")).await.expect("an end");
        let outcome = ended.outcome.and_then(|outcome| outcome.kind);
        assert!(matches!(outcome, Some(Kind::OutOfMemory(_))), "{outcome:?}");
        within("after it", session.bash("after", "echo on")).await.expect("the session goes on");
        assert_eq!(Workspace::find("lost").map(|workspace| workspace.process_1), Some(process_1));
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
        return end(daemon).await;
    }

    // Many that have little each: none of them is worse than process 1 now.
    let command = "for i in $(seq 12); do head -c 16M /dev/zero | tail -n 1 | sleep 600 & done; wait";
    session.send("many", bash(command));
    let ended = within("the end", session.over()).await.expect("an end");

    assert_eq!(ended.reason(), pb::SessionEndReason::SandboxLost, "{ended:?}");
    let message = ended.failure.map(|failure| failure.message).unwrap_or_default();
    assert!(message.contains("its process 1 was killed by SIGKILL; "), "{message}");
    assert!(message.contains(" had been killed for want of memory at the limit of 128 MiB"), "{message}");
    let is_named = message.contains("128 MiB: sandbox-init, which used ") || message.contains(", the last of them ");
    // As the kernel calls a program that was started from a file, and one that was started from memory.
    assert_eq!(is_named, log.names_one_of(&["sandbox-init", "memfd:sandbox-i"]), "{message}");
    end(daemon).await;
}
