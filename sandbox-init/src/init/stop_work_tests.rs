//! The work of a sandbox is ended, and goes on with the next call.

use std::time::{Duration, Instant};

use proto::init::v1::{NoteKind, Snapshot, StartCall, StopWork, Tool, frame, request, start_call};

use super::testing::{Client, TestResult, TestSandbox, bash, exec, patience};

fn stop(client: &mut Client) {
    client.done(request::Body::StopWork(StopWork {}));
}

fn is_stopped(client: &mut Client) -> bool {
    match client.ask(request::Body::Snapshot(Snapshot {})) {
        frame::Body::Snapshot(snapshot) => snapshot.stopped && snapshot.slots.iter().all(|slot| slot.pids.is_empty()),
        other => panic!("{other:?}"),
    }
}

/// What is dead and not reaped is no process that could do anything.
fn lives(pid: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// What the call was told to be gone; `None` when nothing is.
fn told(result: &TestResult) -> Option<&str> {
    let note = result.finished.notes.iter().find(|note| note.kind() == NoteKind::ProcessesEnded)?;
    Some(&note.text)
}

#[test]
fn every_process_is_gone_and_the_next_command_finds_files_and_directory_and_is_told_what_is_not_there() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let begun = client.bash("x=5; mkdir sub; cd sub; echo kept > file; sleep 600 & echo $$ $!");
    let text = begun.text();
    let pids: Vec<&str> = text.split_whitespace().collect();
    assert!(pids.len() == 2 && pids.iter().all(|pid| lives(pid)), "{text:?}");

    stop(&mut client);

    assert!(is_stopped(&mut client) && !pids.iter().any(|pid| lives(pid)), "something of {pids:?} lives");
    let next = client.bash("echo ${x-unset} $(cat file) ${PWD##*/}");
    assert_eq!(next.text(), "unset kept sub\n");
    let told = told(&next).expect("a note");
    assert!(told.contains("the shell with its variables") && told.contains("a process that an earlier"), "{told}");
    assert!(next.has_note(NoteKind::ShellRenewed) && !is_stopped(&mut client));
    let after = client.bash("echo on");
    assert!(!after.has_note(NoteKind::ProcessesEnded) && !after.has_note(NoteKind::ShellRenewed), "told twice");
}

#[test]
fn nothing_is_started_until_the_next_call_also_when_another_runner_comes() {
    let sandbox = TestSandbox::start();
    let mut first = sandbox.connect(1);
    let shells = first.bash("true").finished.shell_generation;
    stop(&mut first);
    drop(first);

    let mut second = sandbox.connect(2);
    // Ten times as long as a shell that nobody has asked for waits after the arrival of a runner.
    std::thread::sleep(Duration::from_millis(200));
    assert!(is_stopped(&mut second));
    let frame::Body::Snapshot(snapshot) = second.ask(request::Body::Snapshot(Snapshot {})) else { panic!("none") };
    assert_eq!(snapshot.shell_generation, shells, "a shell was started for nobody");

    let call = second.call(exec(&["true"]));
    let program = second.run(call);
    assert!(told(&program).is_some(), "a call of any kind is told: {program:?}");
    assert!(!is_stopped(&mut second));
}

#[test]
fn a_file_tool_is_told_and_has_a_new_worker() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let read = |client: &mut Client| {
        let call = client.call(start_call::Work::Tool(Tool { name: "read".to_owned(), input_json: b"{}".to_vec() }));
        client.run(call)
    };
    read(&mut client);
    stop(&mut client);
    assert!(told(&read(&mut client)).is_some());
    assert!(told(&read(&mut client)).is_none());
}

#[test]
fn it_is_refused_while_a_call_is_prepared_or_running_and_ends_nothing_then() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let running = client.call(bash("sleep 600 & read -r line < fifo; echo $line; kill $!"));
    client.exec(&["mkfifo", "fifo"]);
    let running = client.start(running);
    assert_eq!(client.refused(request::Body::StopWork(StopWork {})).code, "CALL_BUSY");
    std::fs::write(sandbox.work().join("fifo"), "it lives\n").expect("written");
    assert_eq!(client.finish(&running).text(), "it lives\n");

    let call = client.call(exec(&["true"]));
    client.ask(request::Body::StartCall(StartCall { start_immediately: false, ..call }));
    assert_eq!(client.refused(request::Body::StopWork(StopWork {})).code, "CALL_BUSY");
}

#[test]
fn results_that_are_not_acknowledged_and_their_output_stay() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["sh", "-c", "head -c 200000 /dev/zero | tr '\\0' x"]));
    let call_id = client.start(call);
    client.finish_unacknowledged(&call_id);
    stop(&mut client);
    let data = client.read_output(&call_id, proto::init::v1::Stream::Stdout, 199_999, 10);
    assert_eq!((data.data, data.end), (b"x".to_vec(), true));
}

/// Also where there are no cgroups, so that who belongs to the sandbox is read from /proc.
#[test]
fn without_cgroups_every_process_that_is_known_is_gone() {
    let sandbox = TestSandbox::start_with(|context| context.slots = super::slot::Slots::scan());
    let mut client = sandbox.connect(1);
    let begun = client.bash("sleep 600 & echo $!");
    let pid = begun.text();
    assert!(lives(&pid));
    stop(&mut client);
    let until = Instant::now() + patience();
    while lives(&pid) {
        assert!(Instant::now() < until, "it lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(client.bash("echo on").text(), "on\n");
}

#[test]
fn it_may_be_asked_for_again_and_the_call_is_told_what_was_there_the_first_time() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("sleep 600 & sleep 600 & true");
    stop(&mut client);
    stop(&mut client);
    let next = client.bash("true");
    let told = told(&next).expect("a note");
    assert!(told.contains("the shell") && told.contains("2 processes"), "{told}");
}
