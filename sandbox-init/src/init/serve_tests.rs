use proto::init::v1::{
    Abort, CancelMode, Exec, Go, Hello, InputChunk, NoteKind, OutputMode, Shutdown, Snapshot, StartCall, Stdin, Stream,
    StreamSummary, Tool, frame, outcome::Kind, request, start_call,
};
use sha2::{Digest as _, Sha256};

use super::ExitReason;
use super::testing::{Client, TestSandbox, bash, exec, patience};

fn snapshot(client: &mut Client) -> proto::init::v1::SnapshotReply {
    match client.ask(request::Body::Snapshot(Snapshot {})) {
        frame::Body::Snapshot(snapshot) => snapshot,
        other => panic!("no snapshot but {other:?}"),
    }
}

#[test]
fn a_program_is_run_with_its_output_and_status() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(result.code(), 3);
    assert_eq!(result.text(), "out\nerr\n");
    let summary: &StreamSummary = &result.finished.streams[0];
    assert_eq!(summary.sha256, Sha256::digest(b"out\nerr\n").to_vec());
    assert_eq!(summary.spool_path, "");
    assert_eq!(result.finished.processes_left, 0);
}

#[test]
fn separate_streams_are_kept_apart() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["sh", "-c", "echo out; echo err >&2"]));
    let result = client.run(StartCall { output_mode: OutputMode::Separate.into(), ..call });
    assert_eq!(result.bytes(Stream::Stdout), b"out\n");
    assert_eq!(result.bytes(Stream::Stderr), b"err\n");
}

#[test]
fn a_program_that_cannot_be_executed_never_started_with_the_status_of_a_shell() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    std::fs::write(sandbox.work().join("plain"), "text").unwrap();
    let plain = sandbox.work().join("plain");
    for (program, code, errno) in [("no-such-program", 127, libc::ENOENT), (plain.to_str().unwrap(), 126, libc::EACCES)]
    {
        let result = client.exec(&[program]);
        let Kind::NeverStarted(never) = result.kind() else { panic!("{result:?}") };
        assert_eq!((never.code, never.errno), (code, errno));
        assert!(never.reason.starts_with("cannot execute "), "{}", never.reason);
        assert!(!client.events.iter().any(|event| matches!(event, frame::Body::CallStarted(_))));
    }
}

#[test]
fn environment_and_directory_are_those_of_the_call() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let work = start_call::Work::Exec(Exec {
        argv: ["sh", "-c", "pwd; echo $HOME $MINE"].map(|word| word.as_bytes().to_vec()).to_vec(),
        env: vec![b"MINE=a b".to_vec(), b"HOME=/other".to_vec()],
        cwd: b"/usr".to_vec(),
        ..Exec::default()
    });
    let call = client.call(work);
    assert_eq!(client.run(call).text(), "/usr\n/other a b\n");
}

#[test]
fn a_directory_that_cannot_be_entered_is_not_blamed_on_the_program() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let work = start_call::Work::Exec(Exec {
        argv: vec![b"true".to_vec()],
        cwd: b"/no/such/place".to_vec(),
        ..Exec::default()
    });
    let call = client.call(work);
    let result = client.run(call);
    let Kind::NeverStarted(never) = result.kind() else { panic!("{result:?}") };
    assert_eq!((never.code, never.errno), (125, libc::ENOENT));
    assert_eq!(never.reason, "cannot enter the working directory: No such file or directory");
}

#[test]
fn standard_input_is_written_once_whatever_is_sent_twice() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let work = start_call::Work::Exec(Exec { argv: vec![b"cat".to_vec()], stdin: true, ..Exec::default() });
    let call = client.call(work);
    let call_id = client.start(call);
    let mut send = |offset, data: &[u8], eof| {
        let stdin = Stdin { call_id: call_id.clone(), offset, data: data.to_vec(), eof };
        match client.ask(request::Body::Stdin(stdin)) {
            frame::Body::StdinAccepted(accepted) => Ok(accepted.accepted),
            frame::Body::Failure(failure) => Err(failure.message),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(send(0, b"hello ", false), Ok(6));
    assert_eq!(send(0, b"hello ", false), Ok(6));
    assert_eq!(send(9, b"x", false), Err("stdin.offset is 9, beyond what was accepted".to_owned()));
    assert_eq!(send(3, b"lo world", true), Ok(11));
    assert_eq!(client.finish(&call_id).text(), "hello world");
}

#[test]
fn without_standard_input_a_program_reads_the_end_at_once() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.exec(&["cat"]);
    assert_eq!((result.code(), result.text().as_str()), (0, ""));
}

#[test]
fn a_prepared_call_waits_for_go_and_abort_drops_it() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let marker = sandbox.work().join("marker");
    let gated = |client: &mut Client| {
        let call = client.call(exec(&["touch", "marker"]));
        client.start(StartCall { start_immediately: false, ..call })
    };
    let dropped = gated(&mut client);
    client.done(request::Body::Abort(Abort { call_id: dropped.clone() }));
    let failure = client.refused(request::Body::Go(Go { call_id: dropped }));
    assert_eq!(failure.code, "CALL_UNKNOWN");
    assert!(!marker.exists());

    let started = gated(&mut client);
    client.done(request::Body::Go(Go { call_id: started.clone() }));
    client.done(request::Body::Go(Go { call_id: started.clone() }));
    assert_eq!(client.finish(&started).code(), 0);
    assert!(marker.exists());
}

#[test]
fn an_id_is_used_once() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["sh", "-c", "echo x >> count"]));
    let call_id = client.start(call.clone());
    // The same request again is the same call, running or finished.
    client.done(request::Body::StartCall(call.clone()));
    client.finish_unacknowledged(&call_id);
    client.done(request::Body::StartCall(call.clone()));
    let other = StartCall { work: Some(exec(&["true"])), ..call.clone() };
    assert_eq!(client.refused(request::Body::StartCall(other)).code, "CALL_ID_REUSED");
    client.done(request::Body::AcknowledgeExit(proto::init::v1::AcknowledgeExit { call_id: call_id.clone() }));
    client.done(request::Body::AcknowledgeExit(proto::init::v1::AcknowledgeExit { call_id }));
    assert_eq!(client.refused(request::Body::StartCall(call)).code, "CALL_ID_REUSED");
    assert_eq!(std::fs::read_to_string(sandbox.work().join("count")).unwrap(), "x\n");
}

#[test]
fn a_timeout_ends_a_program_and_everything_it_started() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["sh", "-c", "sleep 60 & sleep 60; echo never"]));
    let result = client.run(StartCall { timeout_ms: 100, ..call });
    let Kind::TimedOut(timed_out) = result.kind() else { panic!("{result:?}") };
    assert_eq!((timed_out.after_ms, timed_out.killed, timed_out.code), (100, false, 143));
    assert_eq!(result.finished.processes_left, 0);
    let slots = snapshot(&mut client).slots;
    assert!(slots.iter().all(|slot| slot.pids.is_empty()), "{slots:?}");
}

#[test]
fn a_program_that_ignores_the_request_to_end_is_killed_after_its_grace_time() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["sh", "-c", "trap '' TERM INT; echo ready; while :; do sleep 0.1; done"]));
    let call_id = client.start(StartCall { grace_ms: 60, ..call });
    client.wait_for_output(&call_id, "ready");
    client.cancel(&call_id, CancelMode::Interrupt);
    let result = client.finish(&call_id);
    let Kind::Cancelled(cancelled) = result.kind() else { panic!("{result:?}") };
    assert_eq!((cancelled.mode(), cancelled.killed, cancelled.before_start), (CancelMode::Interrupt, true, false));
}

#[test]
fn a_call_cancelled_before_it_began_says_so() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["touch", "marker"]));
    let call_id = client.start(StartCall { start_immediately: false, ..call });
    client.cancel(&call_id, CancelMode::Kill);
    let result = client.finish(&call_id);
    assert!(matches!(result.kind(), Kind::Cancelled(cancelled) if cancelled.before_start), "{result:?}");
    assert!(!sandbox.work().join("marker").exists());
}

#[test]
fn a_program_killed_by_a_signal_says_which() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.exec(&["bash", "-c", "kill -40 $$"]);
    assert!(matches!(result.kind(), Kind::Signaled(signaled) if signaled.signal == 40), "{result:?}");
    let result = client.exec(&["bash", "-c", "kill -SYS $$"]);
    assert!(matches!(result.kind(), Kind::ForbiddenSystemCall(forbidden) if forbidden.code == 159), "{result:?}");
}

#[test]
fn a_background_process_does_not_hold_the_call_and_is_counted() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.exec(&["sh", "-c", "echo now; sleep 60 & exit 0"]);
    assert_eq!((result.code(), result.text().as_str(), result.finished.processes_left), (0, "now\n", 1));
    assert!(result.has_note(NoteKind::ProcessesLeft));
    let slots = snapshot(&mut client).slots;
    assert_eq!((slots.len(), slots[0].pids.len()), (1, 1));
    assert_eq!(slots[0].call_id, result.finished.call_id);
}

#[test]
fn late_output_goes_to_a_file_of_its_own_call() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result =
        client.exec(&["sh", "-c", "(while [ ! -e go ]; do sleep 0.01; done; echo late; touch done) & echo early"]);
    assert_eq!(result.text(), "early\n");
    let text = &result.finished.notes.iter().find(|note| note.kind() == NoteKind::ProcessesLeft).unwrap().text;
    let path = text.rsplit(' ').next().unwrap();
    std::fs::write(sandbox.work().join("go"), "").unwrap();
    let until = std::time::Instant::now() + patience();
    while std::fs::read_to_string(path).unwrap_or_default() != "late\n" {
        assert!(std::time::Instant::now() < until, "nothing late in {path}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(client.exec(&["echo", "newer"]).text(), "newer\n");
}

#[test]
fn a_tool_gets_its_input_and_answers_on_a_stream_of_its_own() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let tool = Tool { name: "glob".to_owned(), input_json: br#"{"pattern":"x"}"#.to_vec() };
    let call = client.call(start_call::Work::Tool(tool));
    let result = client.run(call);
    assert_eq!(result.bytes(Stream::Result), br#"glob {"pattern":"x"}"#);
    assert_eq!(result.bytes(Stream::Stderr), b"diagnosis\n");
}

#[test]
fn input_too_large_for_one_packet_arrives_in_pieces() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let input = "0123456789abcdef".repeat(4 * 1024);
    let call_id = client.new_call_id();
    for (index, piece) in input.as_bytes().chunks(40_000).enumerate() {
        let offset = (index * 40_000) as u64;
        client.done(request::Body::InputChunk(InputChunk { call_id: call_id.clone(), offset, data: piece.to_vec() }));
    }
    let work = start_call::Work::Tool(Tool { name: "grep".to_owned(), input_json: Vec::new() });
    let call = StartCall { call_id, inline_limit_bytes: 1024, ..client.call(work) };
    let call_id = client.start(call);
    let result = client.finish_unacknowledged(&call_id);
    assert_eq!(result.finished.streams[0].total_bytes, 5 + input.len() as u64);
    let end = client.read_output(&call_id, Stream::Result, 5 + 65_000, 65536);
    assert_eq!((end.data, end.end), (input.as_bytes()[65_000..].to_vec(), true));
}

#[test]
fn a_result_is_sent_again_to_a_new_runner_until_it_is_acknowledged() {
    let sandbox = TestSandbox::start();
    let mut first = sandbox.connect(1);
    let call = first.call(exec(&["echo", "kept"]));
    let call_id = first.start(call);
    first.finish_unacknowledged(&call_id);

    let mut second = sandbox.connect(2);
    assert!(first.receive().is_none(), "the older connection stays open");
    assert_eq!(second.finish(&call_id).text(), "kept\n");

    let mut third = sandbox.connect(3);
    assert!(snapshot(&mut third).calls.is_empty());
}

#[test]
fn an_older_runner_is_not_heard_any_more() {
    let sandbox = TestSandbox::start();
    let mut new = sandbox.connect(5);
    drop(new);
    let mut old = sandbox.connect_silently(4);
    old.send(request::Body::Hello(Hello { major: 1 }));
    new = sandbox.connect(6);
    assert!(old.receive().is_none());
    assert_eq!(new.exec(&["true"]).code(), 0);
}

#[test]
fn calls_go_on_while_no_runner_is_connected() {
    let sandbox = TestSandbox::start();
    let mut first = sandbox.connect(1);
    let call = first.call(exec(&["sh", "-c", "while [ ! -e go ]; do sleep 0.01; done; echo done"]));
    let call_id = first.start(call);
    drop(first);
    std::fs::write(sandbox.work().join("go"), "").unwrap();
    let mut second = sandbox.connect(2);
    assert_eq!(second.finish(&call_id).text(), "done\n");
}

#[test]
fn hostile_packets_close_the_connection_and_nothing_else() {
    let sandbox = TestSandbox::start();
    for garbage in [vec![0xff; 100], vec![0x0a; 64], vec![1; 128 * 1024 + 1]] {
        let mut client = sandbox.connect(1);
        client.send_raw(&garbage).unwrap();
        assert!(client.receive().is_none(), "{} bytes of garbage were accepted", garbage.len());
    }
    assert_eq!(sandbox.connect(1).exec(&["true"]).code(), 0);
}

#[test]
fn requests_out_of_order_are_refused_by_name() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect_silently(1);
    assert_eq!(client.refused(request::Body::Snapshot(Snapshot {})).message, "body must be hello first");
    assert_eq!(client.refused(request::Body::Hello(Hello { major: 2 })).code, "NOT_SUPPORTED");
    client.greet();
    assert_eq!(client.refused(request::Body::Go(Go { call_id: "x".repeat(4000) })).code, "CALL_UNKNOWN");
    let call = client.call(exec(&["true"]));
    let call_id = client.start(call);
    client.finish_unacknowledged(&call_id);
    let failure = client.refused(request::Body::Stdin(Stdin { call_id, offset: 0, data: vec![1], eof: false }));
    assert_eq!(failure.code, "CALL_UNKNOWN");
}

#[test]
fn the_number_of_calls_is_bounded() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for _ in 0..128 {
        let call = client.call(exec(&["true"]));
        client.start(StartCall { start_immediately: false, ..call });
    }
    let call = client.call(exec(&["true"]));
    assert_eq!(client.refused(request::Body::StartCall(call)).code, "CALL_BUSY");
    assert_eq!(snapshot(&mut client).calls.len(), 128);
}

#[test]
fn a_flood_costs_no_memory_and_keeps_head_tail_and_hash() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let before = resident_kib();
    let call = client.call(exec(&["sh", "-c", "head -c 200000000 /dev/zero; printf the-end"]));
    let call_id = client.start(StartCall { spool_head_bytes: 1 << 20, spool_tail_bytes: 4096, ..call });
    let result = client.finish_unacknowledged(&call_id);
    let summary = &result.finished.streams[0];
    assert_eq!((summary.total_bytes, summary.head_bytes, summary.tail_bytes), (200_000_007, 1 << 20, 4096));
    let tail = client.read_output(&call_id, Stream::Stdout, 50_000_000, 65536);
    assert_eq!((tail.offset, tail.end), (200_000_007 - 4096, true));
    assert!(tail.data.ends_with(b"\0the-end"));
    let mut hash = Sha256::new();
    let zeroes = vec![0; 1_000_000];
    for _ in 0..200 {
        hash.update(&zeroes);
    }
    hash.update(b"the-end");
    assert_eq!(summary.sha256, hash.finalize().to_vec());
    assert_eq!(std::fs::metadata(&summary.spool_path).unwrap().len(), (1 << 20) + 4096);
    let grown = resident_kib().saturating_sub(before);
    assert!(grown < 64 * 1024, "memory grew by {grown} KiB for 200 MB of output");
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn output_beyond_the_budget_is_a_hole_and_a_note_and_the_command_lives() {
    let sandbox = TestSandbox::start_with(|context| context.spool_budget_bytes = 300_000);
    let mut client = sandbox.connect(1);
    let result = client.exec(&["sh", "-c", "head -c 3000000 /dev/zero; echo alive"]);
    assert_eq!(result.code(), 0);
    let summary = &result.finished.streams[0];
    assert_eq!(summary.total_bytes, 3_000_006);
    assert!(summary.head_bytes <= 300_000 && summary.tail_bytes == 1 << 20, "{summary:?}");
    assert!(result.has_note(NoteKind::DiskLimit));
}

#[test]
fn a_long_call_has_a_file_that_can_be_read_along() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["sh", "-c", "echo early; while [ ! -e go ]; do sleep 0.01; done"]));
    let call_id = client.start(call);
    let until = std::time::Instant::now() + patience();
    let path = loop {
        let calls = snapshot(&mut client).calls;
        if let Some(path) =
            calls[0].streams.first().map(|stream| stream.spool_path.clone()).filter(|path| !path.is_empty())
        {
            break path;
        }
        assert!(std::time::Instant::now() < until, "no file was made");
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    // The file is made after a time, whether or not there is anything to put into it yet.
    while std::fs::read_to_string(&path).unwrap() != "early\n" {
        assert!(std::time::Instant::now() < until, "the output does not reach the file");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    std::fs::write(sandbox.work().join("go"), "").unwrap();
    let result = client.finish(&call_id);
    assert_eq!((result.text().as_str(), result.finished.streams[0].spool_path.as_str()), ("early\n", path.as_str()));
}

#[test]
fn the_dead_man_deadline_ends_the_sandbox_and_every_process() {
    let mut sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(exec(&["sh", "-c", "echo $$; exec sleep 60"]));
    let call_id = client.start(call);
    client.wait_for_output(&call_id, "\n");
    let pid = String::from_utf8(client.read_output(&call_id, Stream::Stdout, 0, 100).data).unwrap();
    let boottime_ns = super::clock::now() + 30_000_000;
    client.done(request::Body::Deadline(proto::init::v1::Deadline { boottime_ns }));
    assert_eq!(sandbox.join(), ExitReason::DeadlinePassed);
    let until = std::time::Instant::now() + patience();
    loop {
        // A killed process is seen for a moment longer, and as a zombie until this test process ends.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") || stat.contains(") X ") {
            break;
        }
        assert!(std::time::Instant::now() < until, "still alive: {stat}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn a_sandbox_without_a_runner_ends_itself() {
    let mut sandbox =
        TestSandbox::start_with(|context| context.orphan_timeout = Some(std::time::Duration::from_millis(50)));
    assert_eq!(sandbox.join(), ExitReason::Orphaned);
}

#[test]
fn shutdown_asks_first_and_reports_running_calls_as_lost() {
    let mut sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call =
        client.call(exec(&["sh", "-c", "trap 'touch asked; exit 0' TERM; echo ready; while :; do sleep 0.01; done"]));
    let call_id = client.start(call);
    client.wait_for_output(&call_id, "ready");
    client.done(request::Body::Shutdown(Shutdown { grace_ms: 20_000 }));
    let finished = client.wait_for(|event| match event {
        frame::Body::CallFinished(finished) => Some(finished.clone()),
        _ => None,
    });
    assert!(matches!(finished.outcome.unwrap().kind.unwrap(), Kind::SandboxLost(_)));
    assert_eq!(sandbox.join(), ExitReason::Shutdown);
    assert!(sandbox.work().join("asked").exists());
}

#[test]
fn many_calls_run_beside_each_other() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let ids: Vec<String> = (0..12)
        .map(|number| {
            let call = client.call(exec(&["sh", "-c", &format!("sleep 0.0{number}; echo {number}")]));
            client.start(call)
        })
        .collect();
    for (number, call_id) in ids.iter().enumerate() {
        assert_eq!(client.finish(call_id).text(), format!("{number}\n"));
    }
    assert_eq!(client.run_bash_beside(), "beside\n");
}

impl Client {
    fn run_bash_beside(&mut self) -> String {
        let call = self.call(bash("echo beside"));
        self.run(call).text()
    }
}
