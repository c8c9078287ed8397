//! The client against a scripted process 1, good and hostile.

use super::*;
use crate::work::{BashInput, CallEnd, CallEvent, CallId, CallLimits, Gate, Outcome, OutputMode, ToolInput};
use prost::Message;
use sha2::{Digest as _, Sha256};

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg, socketpair,
};
use wire::frame::Body;

pub(super) const IMPATIENT: Patience =
    Patience { answer: Duration::from_millis(300), overdue_margin: Duration::from_millis(50) };

/// Process 1 as a thread that answers each request by a script, and may say more.
pub(super) fn process_1(script: impl FnMut(wire::Request) -> Vec<Vec<u8>> + Send + 'static) -> OwnedFd {
    let (ours, theirs) = pair();
    std::thread::spawn(move || serve(&theirs, script));
    ours
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("socketpair")
}

fn serve(socket: &OwnedFd, mut script: impl FnMut(wire::Request) -> Vec<Vec<u8>>) {
    let mut buffer = vec![0; LARGEST_PACKET];
    while let Ok(length) = rustix::io::read(socket, &mut buffer) {
        if length == 0 {
            return;
        }
        for packet in script(wire::Request::decode(&buffer[..length]).expect("the runner speaks the protocol")) {
            if rustix::io::write(socket, &packet).is_err() {
                return;
            }
        }
    }
}

pub(super) fn frame(request_id: u64, body: Body) -> Vec<u8> {
    wire::Frame { request_id, generation: 7, body: Some(body) }.encode_to_vec()
}

fn welcome(request_id: u64) -> Vec<u8> {
    frame(request_id, Body::Welcome(wire::Welcome { major: 1, sandbox_id: "s".into(), shell_generation: 0 }))
}

fn prepared(request_id: u64) -> Vec<u8> {
    frame(request_id, Body::CallPrepared(wire::CallPrepared { call_id: "c".into() }))
}

fn started() -> Vec<u8> {
    frame(0, Body::CallStarted(wire::CallStarted { call_id: "c".into(), boottime_ns: 5 }))
}

fn advanced(total_bytes: u64) -> Vec<u8> {
    let streams = vec![wire::StreamLength { stream: wire::Stream::Stdout.into(), total_bytes }];
    frame(0, Body::OutputAdvanced(wire::OutputAdvanced { call_id: "c".into(), streams }))
}

fn finished(code: i32) -> Vec<u8> {
    let outcome = wire::Outcome { kind: Some(wire::outcome::Kind::Exited(wire::Exited { code })) };
    let body = wire::CallFinished { call_id: "c".into(), outcome: Some(outcome), ..Default::default() };
    frame(0, Body::CallFinished(body))
}

/// Greets and prepares well, and then sends `after` behind the answer to the call.
fn then(after: Vec<Vec<u8>>) -> OwnedFd {
    process_1(move |request| match request.body {
        Some(wire::request::Body::Hello(_)) => vec![welcome(request.request_id)],
        Some(wire::request::Body::StartCall(_)) => [vec![prepared(request.request_id)], after.clone()].concat(),
        _ => Vec::new(),
    })
}

#[derive(Default)]
pub(super) struct Recorder(pub(super) Mutex<Vec<CallEvent>>, pub(super) tokio::sync::Notify);

impl CallObserver for Recorder {
    fn observe(&self, event: CallEvent) {
        self.0.lock().expect("not poisoned").push(event);
        self.1.notify_one();
    }
}

impl Recorder {
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.0.lock().expect("not poisoned").iter().find_map(|event| match event {
            CallEvent::Finished(end) => Some(end.outcome.clone()),
            _ => None,
        })
    }
}

fn call() -> PreparedCall {
    PreparedCall {
        call_id: CallId::new("c").expect("valid"),
        input: ToolInput::Bash(BashInput { command: Some("true".into()), restart: false }),
        limits: CallLimits { timeout: Some(Duration::from_millis(50)), grace: Duration::ZERO, ..CallLimits::default() },
        output_mode: OutputMode::Merged,
        gate: Gate::Open,
    }
}

async fn connected(socket: OwnedFd) -> Control {
    let (control, greeting) = Control::from_connection(socket, 7, IMPATIENT).await.expect("greeted");
    assert_eq!(greeting.sandbox_id, "s");
    control
}

/// Starts a call with a process 1 that misbehaves afterwards, and returns what ended the connection.
async fn end_after(packets: Vec<Vec<u8>>) -> ControlEnd {
    let control = connected(then(packets)).await;
    let recorder = Arc::new(Recorder::default());
    // The violation may overtake the answer.
    let _ = control.start_call(&call(), recorder).await;
    tokio::time::timeout(Duration::from_secs(20), control.ended()).await.expect("the connection is given up")
}

async fn violation_after(packets: Vec<Vec<u8>>) -> Violation {
    match end_after(packets).await {
        ControlEnd::Violated(violation) => violation,
        other => panic!("not a violation: {other}"),
    }
}

/// The end of the call as the answer to its start.
fn answered_by_its_end(end: Vec<u8>) -> OwnedFd {
    process_1(move |request| match request.body {
        Some(wire::request::Body::Hello(_)) => vec![welcome(request.request_id)],
        Some(wire::request::Body::StartCall(_) | wire::request::Body::Cancel(_)) => {
            let end = wire::Frame::decode(end.as_slice()).expect("a frame");
            vec![wire::Frame { request_id: request.request_id, ..end }.encode_to_vec()]
        }
        _ => Vec::new(),
    })
}

#[tokio::test]
async fn call_that_is_over_at_once_is_answered_by_its_end() {
    let control = connected(answered_by_its_end(finished(3))).await;
    let recorder = Arc::new(Recorder::default());

    control.start_call(&call(), recorder.clone()).await.expect("prepared");

    assert_eq!(recorder.outcome(), Some(Outcome::Exited { code: 3 }));
    assert!(matches!(recorder.0.lock().expect("not poisoned")[0], CallEvent::Started { .. }));
    // A call ends once, and its end answers nothing but its start.
    let again = control.cancel("c", CancelMode::Kill).await;
    assert!(matches!(again, Err(ControlError::Ended(ControlEnd::Violated(Violation::WrongPhase { .. })))), "{again:?}");
}

#[tokio::test]
async fn result_that_was_sent_ahead_is_not_asked_for() {
    let text = wire::content_block::Kind::Text("x".repeat(200_000));
    let result = wire::ToolResult { is_error: false, content: vec![wire::ContentBlock { kind: Some(text) }] };
    let result = result.encode_to_vec();
    let mut packets = Vec::new();
    for (index, piece) in result.chunks(65_536).enumerate() {
        packets.push(frame(
            0,
            Body::OutputData(wire::OutputData {
                call_id: "c".into(),
                stream: wire::Stream::Result.into(),
                offset: index as u64 * 65_536,
                data: piece.to_vec(),
                end: false,
            }),
        ));
    }
    let summary = wire::StreamSummary {
        stream: wire::Stream::Result.into(),
        total_bytes: result.len() as u64,
        head_bytes: result.len() as u64,
        sha256: vec![0; 32],
        ..Default::default()
    };
    let outcome = wire::Outcome { kind: Some(wire::outcome::Kind::Exited(wire::Exited { code: 0 })) };
    let end = wire::CallFinished {
        call_id: "c".into(),
        outcome: Some(outcome),
        streams: vec![summary],
        ..Default::default()
    };
    packets.push(frame(0, Body::CallFinished(end)));
    let control = connected(then(packets)).await;
    let recorder = Arc::new(Recorder::default());

    control.start_call(&call(), recorder.clone()).await.expect("prepared");
    while recorder.outcome().is_none() {
        recorder.1.notified().await;
    }

    let events = recorder.0.lock().expect("not poisoned");
    let Some(CallEvent::Finished(end)) = events.last() else { panic!("not finished: {events:?}") };
    let content = &end.result.as_ref().expect("a result").content;
    assert!(matches!(&content[..], [crate::work::Content::Text(text)] if text.len() == 200_000));
}

#[tokio::test]
async fn pieces_of_anything_but_a_result_are_a_violation() {
    let data = wire::OutputData {
        call_id: "c".into(),
        stream: wire::Stream::Stdout.into(),
        offset: 0,
        data: vec![0; 4],
        end: false,
    };

    let violation = violation_after(vec![frame(0, Body::OutputData(data))]).await;

    assert_eq!(violation, Violation::Malformed("is an answer without a request"));
}

#[tokio::test]
async fn good_call_reports_start_output_and_end_in_order() {
    let control = connected(then(vec![started(), advanced(3), finished(4)])).await;
    let recorder = Arc::new(Recorder::default());

    control.start_call(&call(), recorder.clone()).await.expect("prepared");
    while recorder.outcome().is_none() {
        recorder.1.notified().await;
    }

    let events = recorder.0.lock().expect("not poisoned");
    assert!(matches!(events[0], CallEvent::Started { boottime_ns: 5, .. }));
    assert!(matches!(events[1], CallEvent::OutputAdvanced(lengths) if lengths.get(Stream::Stdout) == 3));
    assert!(matches!(&events[2], CallEvent::Finished(end) if end.outcome == Outcome::Exited { code: 4 }));
}

#[tokio::test]
async fn end_without_an_announced_start_reports_the_start_first() {
    let control = connected(then(vec![finished(0)])).await;
    let recorder = Arc::new(Recorder::default());

    control.start_call(&call(), recorder.clone()).await.expect("prepared");
    while recorder.outcome().is_none() {
        recorder.1.notified().await;
    }

    let events = recorder.0.lock().expect("not poisoned");
    assert!(matches!(events[0], CallEvent::Started { boottime_ns: 1.., .. }), "{events:?}");
    assert_eq!(events.len(), 2);
}

#[tokio::test]
async fn call_that_runs_before_its_gate_is_opened_ends_the_sandbox() {
    let control = connected(then(vec![started()])).await;
    let held = PreparedCall { gate: Gate::Held, ..call() };

    let _ = control.start_call(&held, Arc::new(Recorder::default())).await;

    let expected = Violation::WrongPhase { event: "call_started" };
    assert_eq!(control.ended().await, ControlEnd::Violated(expected));
}

#[tokio::test]
async fn finish_sent_twice_ends_the_sandbox() {
    let violation = violation_after(vec![started(), finished(0), finished(0)]).await;

    assert_eq!(violation, Violation::WrongPhase { event: "call_finished" });
}

#[tokio::test]
async fn answer_to_a_request_nobody_made_ends_the_sandbox() {
    assert_eq!(violation_after(vec![frame(4711, Body::Done(wire::Done {}))]).await, Violation::UnknownRequest(4711));
}

#[tokio::test]
async fn second_answer_to_the_same_request_ends_the_sandbox() {
    let first_request = welcome(1);

    assert_eq!(violation_after(vec![first_request]).await, Violation::UnknownRequest(1));
}

#[tokio::test]
async fn negative_exit_status_ends_the_sandbox() {
    let violation = violation_after(vec![started(), finished(-1)]).await;

    assert_eq!(violation, Violation::impossible("exited.code", -1));
}

#[tokio::test]
async fn shrinking_output_ends_the_sandbox() {
    let violation = violation_after(vec![started(), advanced(10), advanced(9)]).await;

    assert!(matches!(violation, Violation::Impossible { field: "output_advanced.total_bytes", .. }), "{violation}");
}

#[tokio::test]
async fn garbage_and_lengths_of_two_gibibytes_end_the_sandbox() {
    // Field 10 (welcome), length-delimited, 2 GiB announced.
    let two_gibibytes = vec![0x52, 0x80, 0x80, 0x80, 0x80, 0x08, 1, 2, 3];
    for packet in [vec![0xff; 64], two_gibibytes, b"GET / HTTP/1.1\r\n\r\n".to_vec()] {
        assert!(matches!(violation_after(vec![packet]).await, Violation::Undecodable(_)));
    }
}

#[tokio::test]
async fn message_nested_without_end_ends_the_sandbox() {
    // Groups inside groups of an unknown field are the only way to nest in a schema without recursion.
    let bomb = [0x9b, 0x06].repeat(60_000);

    assert!(matches!(violation_after(vec![bomb]).await, Violation::Undecodable(_)));
}

#[tokio::test]
async fn frame_over_the_limit_ends_the_sandbox() {
    assert_eq!(violation_after(vec![vec![0; LARGEST_PACKET + 1]]).await, Violation::Oversize(LARGEST_PACKET));
}

#[tokio::test]
async fn frame_for_a_later_runner_ends_the_sandbox_and_one_for_an_earlier_is_ignored() {
    let of_generation =
        |generation| wire::Frame { request_id: 0, generation, body: Some(Body::Done(wire::Done {})) }.encode_to_vec();

    assert_eq!(
        violation_after(vec![of_generation(6), of_generation(8)]).await,
        Violation::Malformed("for a later runner")
    );
}

#[tokio::test]
async fn descriptors_from_a_sandbox_end_it_and_are_not_kept() {
    let (ours, theirs) = pair();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        let length = rustix::io::read(&theirs, &mut buffer).expect("greeting");
        let request = wire::Request::decode(&buffer[..length]).expect("greeting");
        let rights = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
        sendmsg(&theirs, &[IoSlice::new(&welcome(request.request_id))], &mut control, SendFlags::empty())
            .expect("sent");
        // Stays open, so that only the descriptor can be the reason.
        let _ = rustix::io::read(&theirs, &mut buffer);
    });

    let end = Control::from_connection(ours, 7, IMPATIENT).await.err();

    assert_eq!(end, Some(ControlEnd::Violated(Violation::Descriptors)));
}

/// F-17: process 1 is stopped and does not answer.
#[tokio::test]
async fn silence_ends_the_sandbox_after_the_answer_time() {
    let end = Control::from_connection(process_1(|_| Vec::new()), 7, IMPATIENT).await.err();

    let expected = Violation::Silence { request: "hello", after: IMPATIENT.answer };
    assert_eq!(end, Some(ControlEnd::Violated(expected)));
}

#[tokio::test]
async fn process_1_that_reads_nothing_cannot_hold_a_request_for_ever() {
    let (ours, theirs) = pair();
    let greeter = theirs.try_clone().expect("duplicate");
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        let length = rustix::io::read(&greeter, &mut buffer).expect("greeting");
        let request = wire::Request::decode(&buffer[..length]).expect("greeting");
        rustix::io::write(&greeter, &welcome(request.request_id)).expect("sent");
    });
    let control = connected(ours).await;

    let mut last = Ok(0);
    for offset in 0..64 {
        last = control.stdin("c", offset, vec![0; 60_000], false).await;
        if last.is_err() {
            break;
        }
    }

    assert!(matches!(last, Err(ControlError::Ended(ControlEnd::Violated(Violation::Silence { .. })))), "{last:?}");
    drop(theirs);
}

/// Answers nothing before `enough` requests have come, then all of them, and from there on each at once.
fn late_process_1(enough: usize) -> (OwnedFd, Arc<Mutex<Vec<wire::request::Body>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (noted, mut waiting) = (Arc::clone(&seen), Vec::new());
    let socket = process_1(move |request| {
        let Some(body) = request.body else { return Vec::new() };
        let answer = match &body {
            wire::request::Body::Hello(_) => return vec![welcome(request.request_id)],
            wire::request::Body::Stdin(stdin) => {
                Body::StdinAccepted(wire::StdinAccepted { accepted: stdin.offset + 1 })
            }
            _ => Body::Done(wire::Done {}),
        };
        let mut seen = noted.lock().expect("no panic");
        seen.push(body);
        waiting.push(frame(request.request_id, answer));
        if seen.len() < enough { Vec::new() } else { std::mem::take(&mut waiting) }
    });
    (socket, seen)
}

/// More than are let go without an answer, and more than the socket holds.
#[tokio::test]
async fn requests_beyond_the_bound_wait_for_their_turn_and_arrive_in_order() {
    const COUNT: u64 = 3 * exchange::MOST_OUTSTANDING as u64;
    let (socket, seen) = late_process_1(exchange::MOST_OUTSTANDING);
    let patience = Patience { answer: Duration::from_secs(20), ..IMPATIENT };
    let (control, _) = Control::from_connection(socket, 7, patience).await.expect("greeted");

    let done = futures_util::future::join_all((0..COUNT).map(|moment| control.deadline(moment))).await;

    assert!(done.iter().all(Result::is_ok), "{:?}", done.iter().find(|done| done.is_err()));
    let moments: Vec<_> = seen
        .lock()
        .expect("no panic")
        .iter()
        .map(|body| match body {
            wire::request::Body::Deadline(deadline) => deadline.boottime_ns,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(moments, (0..COUNT).collect::<Vec<_>>());
}

#[tokio::test]
async fn input_without_end_is_refused_before_it_has_a_turn_and_keeps_no_call_from_being_ended() {
    let (socket, seen) = late_process_1(257);
    let patience = Patience { answer: Duration::from_secs(20), ..IMPATIENT };
    let (control, _) = Control::from_connection(socket, 7, patience).await.expect("greeted");
    let writes = (0..300).map(|offset| control.stdin("c", offset, vec![b'x'], false));

    let (accepted, cancelled) =
        tokio::join!(futures_util::future::join_all(writes), control.cancel("c", CancelMode::Kill));

    assert_eq!(cancelled, Ok(()));
    let (first, rest) = accepted.split_at(256);
    assert!(first.iter().zip(1..).all(|(answer, through)| *answer == Ok(through)), "{first:?}");
    assert!(rest.iter().all(|answer| *answer == Err(ControlError::Busy { what: "requests" })), "{rest:?}");
    let seen = seen.lock().expect("no panic");
    assert!(matches!(&seen[256], wire::request::Body::Cancel(_)), "{:?}", seen[256]);
    assert_eq!(seen.len(), 257, "what was refused has not been sent");
}

#[tokio::test]
async fn call_that_is_never_ended_counts_as_overdue() {
    assert_eq!(violation_after(vec![started()]).await, Violation::Overdue);
}

#[tokio::test]
async fn answers_that_arrive_one_by_one_just_in_time_do_not_outlive_the_call_limit() {
    // Each frame is legal; together they would hold the call for ever.
    let mut slow = vec![started()];
    slow.extend((1..200).map(advanced));

    assert_eq!(violation_after(slow).await, Violation::Overdue);
}

#[tokio::test]
async fn closed_connection_fails_requests_that_wait_and_those_that_come() {
    let (ours, theirs) = pair();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        let length = rustix::io::read(&theirs, &mut buffer).expect("greeting");
        let request = wire::Request::decode(&buffer[..length]).expect("greeting");
        rustix::io::write(&theirs, &welcome(request.request_id)).expect("sent");
        rustix::io::read(&theirs, &mut buffer).expect("a request");
    });
    let control = connected(ours).await;

    assert_eq!(control.go("c").await, Err(ControlError::Ended(ControlEnd::Closed)));
    assert_eq!(control.go("c").await, Err(ControlError::Ended(ControlEnd::Closed)));
}

#[tokio::test]
async fn stdin_accepted_beyond_what_was_sent_ends_the_sandbox() {
    let control = connected(process_1(|request| match request.body {
        Some(wire::request::Body::Hello(_)) => vec![welcome(request.request_id)],
        _ => vec![frame(request.request_id, Body::StdinAccepted(wire::StdinAccepted { accepted: u64::MAX }))],
    }))
    .await;

    let answer = control.stdin("c", 0, b"abc".to_vec(), false).await;

    assert!(
        matches!(answer, Err(ControlError::Ended(ControlEnd::Violated(Violation::Impossible { .. })))),
        "{answer:?}"
    );
}

#[tokio::test]
async fn refusal_does_not_end_the_connection_and_the_call_can_be_made_again() {
    let mut refused = false;
    let control = connected(process_1(move |request| match request.body {
        Some(wire::request::Body::Hello(_)) => vec![welcome(request.request_id)],
        Some(wire::request::Body::StartCall(_)) if !std::mem::replace(&mut refused, true) => {
            let failure = wire::Failure { code: "CALL_BUSY".into(), message: "busy\u{1b}[2J".into() };
            vec![frame(request.request_id, Body::Failure(failure))]
        }
        _ => vec![prepared(request.request_id)],
    }))
    .await;

    let first = control.start_call(&call(), Arc::new(Recorder::default())).await;
    let second = control.start_call(&call(), Arc::new(Recorder::default())).await;

    assert_eq!(first, Err(ControlError::Refused { code: "CALL_BUSY".into(), message: "busy[2J".into() }));
    assert_eq!(second, Ok(()));
}

#[tokio::test]
async fn large_input_arrives_in_pieces_without_gaps() {
    let received = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&received);
    let control = connected(process_1(move |request| match request.body {
        Some(wire::request::Body::Hello(_)) => vec![welcome(request.request_id)],
        Some(wire::request::Body::InputChunk(chunk)) => {
            let mut kept = kept.lock().expect("not poisoned");
            assert_eq!(chunk.offset, kept.len() as u64);
            kept.extend(chunk.data);
            vec![frame(request.request_id, Body::Done(wire::Done {}))]
        }
        _ => vec![prepared(request.request_id)],
    }))
    .await;
    let command = "é".repeat(125_000);
    let input = ToolInput::Bash(BashInput { command: Some(command.clone()), restart: false });

    control.start_call(&PreparedCall { input, ..call() }, Arc::new(Recorder::default())).await.expect("prepared");

    assert_eq!(*received.lock().expect("not poisoned"), command.as_bytes());
}

/// Runs a tool whose result is so long that it is read back from its spool, in which `spoil` has been at work.
async fn fetched(text: &str, spoil: impl FnOnce(&mut Vec<u8>)) -> Box<CallEnd> {
    let block = wire::ContentBlock { kind: Some(wire::content_block::Kind::Text(text.to_owned())) };
    let mut bytes = wire::ToolResult { is_error: false, content: vec![block] }.encode_to_vec();
    let (total_bytes, sha256) = (bytes.len() as u64, Sha256::digest(&bytes).to_vec());
    spoil(&mut bytes);
    let control = connected(process_1(move |request| match request.body {
        Some(wire::request::Body::Hello(_)) => vec![welcome(request.request_id)],
        Some(wire::request::Body::ReadOutput(read)) => {
            let from = usize::try_from(read.offset).expect("small").min(bytes.len());
            let data = bytes[from..bytes.len().min(from + read.max_bytes as usize)].to_vec();
            let answer =
                wire::OutputData { call_id: read.call_id, stream: read.stream, offset: read.offset, data, end: false };
            vec![frame(request.request_id, Body::OutputData(answer))]
        }
        _ => {
            let summary = wire::StreamSummary {
                stream: wire::Stream::Result.into(),
                total_bytes,
                head_bytes: total_bytes,
                sha256: sha256.clone(),
                ..Default::default()
            };
            let outcome = wire::Outcome { kind: Some(wire::outcome::Kind::Exited(wire::Exited { code: 0 })) };
            let end = wire::CallFinished {
                call_id: "c".into(),
                outcome: Some(outcome),
                streams: vec![summary],
                ..Default::default()
            };
            vec![prepared(request.request_id), started(), frame(0, Body::CallFinished(end))]
        }
    }))
    .await;
    let recorder = Arc::new(Recorder::default());
    control.start_call(&call(), recorder.clone()).await.expect("prepared");
    while recorder.outcome().is_none() {
        recorder.1.notified().await;
    }
    let events = recorder.0.lock().expect("not poisoned");
    let Some(CallEvent::Finished(end)) = events.last() else { panic!("not finished") };
    end.clone()
}

#[tokio::test]
async fn result_of_a_tool_that_is_too_long_to_travel_along_is_fetched() {
    let text = "x".repeat(100_000);
    let end = fetched(&text, |_| {}).await;
    assert_eq!(end.result.map(|result| result.content), Some(vec![crate::work::Content::Text(text)]));
}

/// The end of the call stands, and its output is there for whoever compares it with the hash in the summary.
#[tokio::test]
async fn result_whose_spool_does_not_match_its_hash_is_not_believed() {
    let text = "x".repeat(100_000);
    let changed = |bytes: &mut Vec<u8>| bytes[50_000] = b'y';
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(50_000);
    for end in [fetched(&text, changed).await, fetched(&text, cut).await] {
        assert_eq!((&end.outcome, &end.result), (&Outcome::Exited { code: 0 }, &None));
        assert_eq!(end.streams.len(), 1);
    }
}
