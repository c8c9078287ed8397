//! File tools through a worker: its life, its death and its lies.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proto::init::v1::{
    CancelMode, InputChunk, Note, NoteKind, StartCall, Stream, Tool, frame, outcome::Kind, request, start_call,
};

use super::testing::{Client, TestResult, TestSandbox};
use super::tool_worker::{Arrived, Look, ToolRequest, ToolWorker, memory_file, serve};

/// Not a test: the process that [`super::local_spawner`] starts as the worker of the tests below. Answers with its pid, the
/// tool and the input, or does what the input says.
#[test]
#[ignore = "started by other tests, and waits for requests on its standard input"]
fn worker() {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let raw = socket.try_clone().unwrap();
    let _ = serve(&socket, |request, answer| match request.input_json.as_slice() {
        b"die" => std::process::abort(),
        b"begin and die" if request.intent.is_empty() => {
            File::options().write(true).open("/proc/self/fd/3").unwrap().write_all(b"\x06\0intent").unwrap();
            std::process::abort();
        }
        // What became of it, and the result of the tool. Nothing is asked of this worker but that.
        b"begin and die" if request.tool == "write" => answer.extend_from_slice(b"\x01done"),
        b"begin and die" => answer.extend_from_slice(b"\x02"),
        b"begin, die and forget" if request.intent.is_empty() => {
            File::options().write(true).open("/proc/self/fd/3").unwrap().write_all(b"\x06\0intent").unwrap();
            std::process::abort();
        }
        b"begin, die and forget" if request.tool == "write" => std::process::abort(),
        b"begin, die and forget" => answer.extend_from_slice(b"\x00"),
        b"hang" => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        b"note" => File::options().write(true).open("/proc/self/fd/3").unwrap().write_all(b"\x06\0intent").unwrap(),
        b"too much" => {
            // The length of an answer of one byte, and two.
            let mut lie = vec![1, 0, 0, 0, 0, 0, 0, 0];
            lie.extend_from_slice(b"ab");
            File::from(raw.try_clone().unwrap()).write_all(&lie).unwrap();
        }
        b"afterwards" => {
            let raw = raw.try_clone().unwrap();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20));
                let _ = File::from(raw).write_all(b"nobody asked");
            });
        }
        input => write!(answer, "{} {} {}", std::process::id(), request.tool, String::from_utf8_lossy(input)).unwrap(),
    });
}

fn tool(client: &mut Client, name: &str, input: &[u8]) -> StartCall {
    client.call(start_call::Work::Tool(Tool { name: name.to_owned(), input_json: input.to_vec() }))
}

fn run(client: &mut Client, name: &str, input: &str) -> TestResult {
    let call = tool(client, name, input.as_bytes());
    client.run(call)
}

/// Runs a well-behaved call and returns the pid of the worker that answered.
fn pid_of_worker(client: &mut Client) -> String {
    let result = run(client, "read", "x");
    let text = String::from_utf8(result.bytes(Stream::Result)).unwrap();
    assert_eq!((result.code(), text.split_once(' ').unwrap().1), (0, "read x"));
    text.split_once(' ').unwrap().0.to_owned()
}

#[test]
fn one_worker_answers_call_after_call() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let first = pid_of_worker(&mut client);
    assert_eq!(pid_of_worker(&mut client), first);
    assert_eq!(client.bash("echo beside").text(), "beside\n");
    assert_eq!(pid_of_worker(&mut client), first);
}

#[test]
fn a_second_call_at_the_same_time_has_a_process_of_its_own() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = tool(&mut client, "read", b"hang");
    let hanging = client.start(call);
    assert_eq!(run(&mut client, "glob", "y").bytes(Stream::Result), b"glob y");
    assert_eq!(run(&mut client, "read", "y").bytes(Stream::Result), b"read y");
    client.cancel(&hanging, CancelMode::Terminate);
    assert!(matches!(client.finish(&hanging).kind(), Kind::Cancelled(_)));
}

#[test]
fn a_call_that_is_ended_ends_its_worker_and_the_next_one_has_another() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let first = pid_of_worker(&mut client);
    let call = StartCall { timeout_ms: 50, ..tool(&mut client, "edit", b"hang") };
    let result = client.run(call);
    assert!(matches!(result.kind(), Kind::TimedOut(_)), "{:?}", result.kind());
    let second = pid_of_worker(&mut client);
    assert_ne!(second, first);
    for mode in [CancelMode::Interrupt, CancelMode::Kill] {
        let call = tool(&mut client, "edit", b"hang");
        let call_id = client.start(call);
        client.cancel(&call_id, mode);
        assert!(matches!(client.finish(&call_id).kind(), Kind::Cancelled(_)));
    }
    assert_ne!(pid_of_worker(&mut client), second);
}

#[test]
fn a_worker_that_dies_is_the_end_of_its_call_only() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let first = pid_of_worker(&mut client);
    let result = run(&mut client, "read", "die");
    assert!(matches!(result.kind(), Kind::Signaled(signaled) if signaled.signal == libc::SIGABRT), "{result:?}");
    assert_ne!(pid_of_worker(&mut client), first);
}

fn kinds(result: &TestResult) -> Vec<NoteKind> {
    result.finished.notes.iter().map(Note::kind).collect()
}

#[test]
fn a_second_write_at_the_same_time_has_a_worker_of_its_own_because_it_may_have_to_be_settled() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = tool(&mut client, "edit", b"hang");
    let hanging = client.start(call);
    let text = String::from_utf8(run(&mut client, "write", "y").bytes(Stream::Result)).unwrap();
    assert_eq!(text.split_once(' ').unwrap().1, "write y", "the worker says its pid first");
    let result = run(&mut client, "write", "begin and die");
    assert_eq!(kinds(&result), [NoteKind::FileReplaced]);
    client.cancel(&hanging, CancelMode::Kill);
    let ended = client.finish(&hanging);
    assert!(matches!(ended.kind(), Kind::Cancelled(_)));
    assert_eq!(kinds(&ended), [NoteKind::FileUnchanged], "it had written down nothing");
}

#[test]
fn a_worker_that_dies_when_the_file_is_replaced_is_the_success_of_its_call() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = run(&mut client, "write", "begin and die");
    assert_eq!((result.code(), result.bytes(Stream::Result)), (0, b"done".to_vec()));
    assert_eq!(kinds(&result), [NoteKind::FileReplaced]);
    pid_of_worker(&mut client);
}

#[test]
fn a_worker_that_dies_before_the_file_is_replaced_is_told_with_what_ended_it_and_that_nothing_changed() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for input in ["begin and die", "die"] {
        let result = run(&mut client, "edit", input);
        assert!(matches!(result.kind(), Kind::Signaled(signaled) if signaled.signal == libc::SIGABRT), "{result:?}");
        assert_eq!(kinds(&result), [NoteKind::FileUnchanged], "{input}");
    }
    let result = run(&mut client, "read", "die");
    assert_eq!(kinds(&result), [], "a tool that changes nothing leaves nothing to compare");
}

#[test]
fn a_file_that_is_neither_old_nor_new_or_that_nobody_could_compare_is_not_guessed_at() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for name in ["edit", "write"] {
        let result = run(&mut client, name, "begin, die and forget");
        assert!(matches!(result.kind(), Kind::StatusUnknown(_)), "{name}: {result:?}");
        assert_eq!(kinds(&result), [NoteKind::FileUncertain], "{name}");
    }
    pid_of_worker(&mut client);
}

#[test]
fn what_a_call_wrote_down_is_not_taken_for_the_intent_of_the_next_one() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = run(&mut client, "write", "note");
    assert_eq!(result.code(), 0, "{result:?}");
    let result = run(&mut client, "write", "die");
    assert_eq!(kinds(&result), [NoteKind::FileUnchanged]);
}

#[test]
fn a_worker_that_is_killed_while_idle_is_replaced() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let first = pid_of_worker(&mut client);
    assert_eq!(client.bash(&format!("kill -9 {first}; while kill -0 {first} 2>/dev/null; do :; done")).code(), 0);
    assert_ne!(pid_of_worker(&mut client), first);
}

#[test]
fn a_worker_that_says_more_than_it_announced_is_killed() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = run(&mut client, "read", "too much");
    assert!(matches!(result.kind(), Kind::Signaled(signaled) if signaled.signal == libc::SIGKILL), "{result:?}");
    pid_of_worker(&mut client);
}

#[test]
fn a_worker_that_speaks_unasked_is_replaced_and_its_words_reach_no_call() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let first = pid_of_worker(&mut client);
    assert_eq!(run(&mut client, "read", "afterwards").bytes(Stream::Result), b"");
    std::thread::sleep(Duration::from_millis(100));
    assert_ne!(pid_of_worker(&mut client), first);
}

#[test]
fn a_long_input_and_a_long_result_arrive_whole_and_the_result_is_sent_ahead() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let input = "0123456789abcdef".repeat(13 * 1024);
    let call_id = client.new_call_id();
    for (index, piece) in input.as_bytes().chunks(90_000).enumerate() {
        let offset = (index * 90_000) as u64;
        client.done(request::Body::InputChunk(InputChunk { call_id: call_id.clone(), offset, data: piece.to_vec() }));
    }
    let call = StartCall { call_id, ..tool(&mut client, "write", b"") };
    let call_id = client.start(call);
    let result = client.finish_unacknowledged(&call_id);
    let mut sent = Vec::new();
    for event in &client.events {
        let frame::Body::OutputData(data) = event else { continue };
        assert_eq!((data.call_id.as_str(), data.offset), (call_id.as_str(), sent.len() as u64));
        sent.extend_from_slice(&data.data);
    }
    let text = String::from_utf8(sent).unwrap();
    assert!(text.ends_with(&format!(" write {input}")), "{} bytes", text.len());
    let summary = &result.finished.streams[0];
    assert_eq!((summary.total_bytes, summary.inline_complete), (text.len() as u64, false));
    // A runner that comes later can ask for it all the same.
    let end = client.read_output(&call_id, Stream::Result, text.len() as u64 - 10, 65536);
    assert_eq!((end.data.as_slice(), end.end), (&input.as_bytes()[input.len() - 10..], true));
}

#[test]
fn an_answer_is_complete_with_its_last_byte_and_nonsense_with_one_more() {
    let look = |packets: &[&[u8]]| {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK).unwrap();
        for packet in packets {
            nix::unistd::write(&theirs, packet).unwrap();
        }
        let pidfd = OwnedFd::from(File::open("/dev/null").unwrap());
        let slot = super::slot::Slots::scan().take().unwrap();
        let intents = File::from(memory_file(&[]).unwrap());
        let worker = ToolWorker { key: 1, pid: nix::unistd::Pid::this(), pidfd, slot, socket: ours, intents };
        let (mut arrived, mut bytes) = (Arrived::default(), Vec::new());
        let look = worker.look(&mut arrived, &mut [0; 1000], |piece| bytes.extend_from_slice(piece));
        drop(theirs);
        (look, bytes)
    };
    let header = |length: u64| length.to_le_bytes().to_vec();
    assert_eq!(look(&[&header(0)]), (Look::Complete, vec![]));
    assert_eq!(look(&[&[header(3), b"ab".to_vec()].concat(), b"c"]), (Look::Complete, b"abc".to_vec()));
    assert_eq!(look(&[&header(3), b"ab"]), (Look::More, b"ab".to_vec()));
    assert_eq!(look(&[&header(3), b"abcd"]).0, Look::Nonsense);
    assert_eq!(look(&[b"short"]).0, Look::Nonsense);
    assert_eq!(look(&[&header(u64::MAX), b"ab"]), (Look::More, b"ab".to_vec()));
}

#[test]
fn a_request_of_any_length_arrives() {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).unwrap();
    let answers = std::thread::spawn(move || {
        serve(&theirs, |request, answer| answer.extend_from_slice(&request.input_json)).unwrap();
    });
    let slot = super::slot::Slots::scan().take().unwrap();
    let pidfd = OwnedFd::from(File::open("/dev/null").unwrap());
    let intents = File::from(memory_file(&[]).unwrap());
    let worker = ToolWorker { key: 1, pid: nix::unistd::Pid::this(), pidfd, slot, socket: ours, intents };
    for length in [0, 1, 65_000, 65_536, 70_000, 500_000] {
        let input_json: Vec<u8> = b"0123456789".iter().copied().cycle().take(length).collect();
        worker
            .ask(&ToolRequest { tool: "read".to_owned(), input_json: input_json.clone(), intent: Vec::new() })
            .unwrap();
        let (mut arrived, mut bytes) = (Arrived::default(), Vec::new());
        while worker.look(&mut arrived, &mut [0; 100_000], |piece| bytes.extend_from_slice(piece)) == Look::More {}
        assert_eq!(bytes, input_json);
    }
    drop(worker);
    answers.join().unwrap();
}
