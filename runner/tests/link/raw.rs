//! What the reference orchestrator never says: bytes that are no frame are answered with the field, terms and events that cannot be end
//! the link, and nothing is lost by any of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::runner_frame::Body as Said;
use runner::dev::pki::Validity;
use runner::journal::{Journal, JournalError, Record, RecoveredPhase};

use crate::scripted::{Script, TERM, World, bash, frame};
use crate::world::{Options, left, within};

/// The frame of a call with one place of it replaced.
fn spoiled(number: u64, call_id: &str, place: &[u8], with: &[u8]) -> Vec<u8> {
    spoiled_call(number, bash(call_id, "echo PLACE"), place, with)
}

fn spoiled_call(number: u64, call: pb::Call, place: &[u8], with: &[u8]) -> Vec<u8> {
    let mut bytes = frame(number, 15, Body::Call(call));
    let at = bytes.windows(place.len()).position(|window| window == place).unwrap();
    bytes[at..at + with.len()].copy_from_slice(with);
    bytes
}

#[tokio::test]
async fn text_that_is_not_utf8_is_refused_with_its_field_and_its_call() {
    let mut world = World::new().await;
    world.open().await;

    world.send(|number| spoiled(number, "c1", b"PLACE", &[0xff]));

    let refused = world.refusal().await;
    let failure = refused.failure.unwrap();
    assert_eq!((refused.call_id.as_str(), failure.code.as_str()), ("c1", "INVALID_FIELD"));
    assert!(failure.message.contains("BashInput.command"), "{}", failure.message);
    assert_eq!(world.runner.fakes.executions_of("c1"), 0);
    world.assert_works("c2").await;
}

/// Every text of every tool with PLACE in it, and what it is called in the schema and by its caller.
fn every_text() -> Vec<(pb::call::Input, &'static str, &'static str)> {
    use pb::call::Input;
    let place = || "PLACE".to_owned();
    let write = || pb::WriteInput { file_path: "f".into(), content: "x".into() };
    let edit =
        || pb::EditInput { file_path: "f".into(), old_string: "x".into(), new_string: "y".into(), replace_all: false };
    let bash = pb::BashInput { command: Some(place()), ..Default::default() };
    let (glob, grep) = (pb::GlobInput::default, pb::GrepInput::default);
    vec![
        (Input::Bash(bash), "BashInput.command", "bash.command"),
        (
            Input::Read(pb::ReadInput { file_path: place(), view_range: Vec::new() }),
            "ReadInput.file_path",
            "read.file_path",
        ),
        (Input::Write(pb::WriteInput { file_path: place(), ..write() }), "WriteInput.file_path", "write.file_path"),
        (Input::Write(pb::WriteInput { content: place(), ..write() }), "WriteInput.content", "write.content"),
        (Input::Edit(pb::EditInput { file_path: place(), ..edit() }), "EditInput.file_path", "edit.file_path"),
        (Input::Edit(pb::EditInput { old_string: place(), ..edit() }), "EditInput.old_string", "edit.old_string"),
        (Input::Edit(pb::EditInput { new_string: place(), ..edit() }), "EditInput.new_string", "edit.new_string"),
        (Input::Glob(pb::GlobInput { pattern: place(), ..glob() }), "GlobInput.pattern", "glob.pattern"),
        (Input::Glob(pb::GlobInput { path: Some(place()), ..glob() }), "GlobInput.path", "glob.path"),
        (Input::Grep(pb::GrepInput { pattern: place(), ..grep() }), "GrepInput.pattern", "grep.pattern"),
        (Input::Grep(pb::GrepInput { path: Some(place()), ..grep() }), "GrepInput.path", "grep.path"),
    ]
}

#[tokio::test]
async fn no_text_of_any_tool_is_taken_that_is_not_utf8_or_has_a_nul() {
    let mut world = World::new().await;
    world.open().await;

    for (input, of_schema, of_caller) in every_text() {
        let call = pb::Call { input: Some(input), ..bash("c1", "") };
        for (with, expected) in [(0xff, of_schema.to_owned()), (0, format!("{of_caller}: contains a NUL byte"))] {
            let call = call.clone();
            world.send(move |number| spoiled_call(number, call, b"PLACE", &[with]));

            let failure = world.refusal().await.failure.unwrap();
            assert_eq!(failure.code, "INVALID_FIELD", "{of_caller}: {failure:?}");
            assert!(failure.message.contains(&expected), "{of_caller}: {}", failure.message);
        }
    }
    assert_eq!(world.runner.fakes.executions_of("c1"), 0);
    world.assert_works("c2").await;
}

#[tokio::test]
async fn field_of_another_wire_type_is_refused_by_its_frame() {
    let mut world = World::new().await;
    world.open().await;

    // Field 1 of the call, a text, comes as a varint: key 0x08 instead of 0x0a.
    world.send(|number| spoiled(number, "c1", b"\x0a\x02c1", &[0x08]));

    let refused = world.refusal().await;
    assert_eq!((refused.kind, refused.failure.unwrap().code.as_str()), (15, "INVALID_FIELD"));
    world.assert_works("c2").await;
}

#[tokio::test]
async fn length_of_two_gigabytes_is_refused_and_allocates_nothing() {
    let mut world = World::new().await;
    world.open().await;

    // frame_no, kind 15, then field 15 with a length of 2^31 and one byte of it.
    world.send(|number| {
        let number = u8::try_from(number).unwrap();
        vec![0x08, number, 0x10, 15, 0x7a, 0x80, 0x80, 0x80, 0x80, 0x08, b'x']
    });

    let refused = world.refusal().await;
    assert_eq!((refused.kind, refused.failure.unwrap().code.as_str()), (15, "INVALID_FIELD"));
    world.assert_works("c2").await;
}

#[tokio::test]
async fn bytes_without_any_sense_end_at_most_the_link() {
    let mut world = World::new().await;
    world.open().await;

    world.send(|_| vec![0xff; 64]);

    world.hears("the next greeting", |said| matches!(said, Said::Hello(_)).then_some(())).await;
    world.assert_works("c2").await;
}

#[tokio::test]
async fn message_beyond_what_the_transport_takes_ends_the_link_and_no_session() {
    let mut world = World::new().await;
    world.open().await;

    world.send(|number| frame(number, 15, Body::Call(bash("c1", &"x".repeat(8 << 20)))));

    world.hears("the next greeting", |said| matches!(said, Said::Hello(_)).then_some(())).await;
    assert_eq!(world.runner.fakes.executions_of("c1"), 0);
    world.assert_works("c2").await;
}

#[tokio::test]
async fn nothing_that_was_left_begins_before_it_is_decided_about() {
    let recovered = left("left", RecoveredPhase::Accepted, None);
    let options = Options { recovered, ..Options::default() };
    let pause = Duration::from_millis(500);
    let mut world =
        World::with(options, Script { action: pb::ResumeAction::Suspend, pause, ..Script::default() }).await;

    world.hears("a heartbeat", |said| matches!(said, Said::Heartbeat(_)).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(200)).await;

    assert_eq!(world.runner.fakes.executions_of("left"), 0);
}

/// Takes every record but the term of another orchestrator.
#[derive(Default)]
struct KeepsItsTerm {
    refused: AtomicU64,
}

impl Journal for KeepsItsTerm {
    fn is_durable(&self) -> bool {
        true
    }

    fn append(&self, record: Record) -> runner::work::BoxFuture<'static, Result<(), JournalError>> {
        let is_refused = matches!(record, Record::Term { term } if term > TERM);
        self.refused.fetch_add(u64::from(is_refused), Ordering::SeqCst);
        let refusal = || JournalError { record: "term", reason: "disk full".into(), is_final: false };
        Box::pin(std::future::ready(if is_refused { Err(refusal()) } else { Ok(()) }))
    }
}

/// The number of an event.
fn event_seq(said: &Said) -> Option<u64> {
    match said {
        Said::SessionOpened(event) => Some(event.event_seq),
        Said::CallAccepted(event) => Some(event.event_seq),
        Said::CallStarted(event) => Some(event.event_seq),
        Said::CallFinished(event) => Some(event.event_seq),
        _ => None,
    }
}

/// F-55, F-33: the new link of a new certificate leads to an orchestrator of a newer term, which the journal does not take. So
/// that one is not obeyed, and the old link goes on from where it is: nothing that was sent on it is sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn welcome_whose_term_cannot_be_written_down_leaves_the_old_link_where_it_is() {
    let journal = Arc::new(KeepsItsTerm::default());
    let options = Options { journal: Arc::clone(&journal) as Arc<dyn Journal>, ..Options::default() };
    let mut world = World::with(options, Script::default()).await;
    world.open().await;
    let call = bash("c1", "print 200000; hang");
    world.send(|number| frame(number, 15, Body::Call(call)));
    // Nothing of it is acknowledged.
    let whole = |said: &Said| matches!(said, Said::Output(chunk) if chunk.offset + chunk.data.len() as u64 == 200_000);
    let mut told = 0;
    world
        .hears("all output of a call", |said| {
            told = told.max(event_seq(&said).unwrap_or_default());
            whole(&said).then_some(())
        })
        .await;

    world.term.store(TERM + 1, Ordering::SeqCst);
    let issued = world.authority.client("runner-1", Validity::Now).unwrap();
    std::fs::write(&world.files.certificate, &issued.certificate_pem).unwrap();
    std::fs::write(&world.files.key, &issued.key_pem).unwrap();
    world.runner.connector.reload.notify_one();
    let mut said = Vec::new();
    within("a refused term", async {
        while journal.refused.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    // Another call of another session, so that it need not wait for the first.
    let open = pb::OpenSession { session_id: "t".into(), epoch: 2, ..Default::default() };
    world.send(|number| frame(number, 13, Body::OpenSession(open)));
    let call = pb::Call { session_id: "t".into(), epoch: 2, ..bash("c2", "print 10; exit 0") };
    world.send(|number| frame(number, 15, Body::Call(call)));
    world
        .hears("the end of a call", |body| {
            let is_end = matches!(&body, Said::CallFinished(end) if end.call_id == "c2");
            said.push(body);
            is_end.then_some(())
        })
        .await;

    let left = |body: &Said| matches!(body, Said::Hello(hello) if hello.reason() != pb::HelloReason::CertRotation);
    assert!(!said.iter().any(left), "the old link was left");
    let again = |body: &Said| matches!(body, Said::Output(chunk) if chunk.call_id == "c1");
    assert!(!said.iter().any(again), "output was sent a second time");
    let events: Vec<_> = said.iter().filter_map(event_seq).collect();
    assert!(told >= 2 && events.first().is_some_and(|first| *first > told), "{events:?} after {told}");
    assert!(events.is_sorted_by(|one, other| one < other), "{events:?}");
}

/// F-28: an answer of a replica that is not the one of this link renews nothing.
#[tokio::test]
async fn lease_answer_of_another_term_ends_the_link() {
    for term in [TERM - 1, 0, TERM + 1] {
        // Each link takes its time, so that what ended the last one can be seen.
        let pause = Duration::from_millis(500);
        let mut world = World::with(Options::default(), Script { pause, ..Script::default() }).await;
        world.open().await;
        let lease_ttl = Some(prost_types::Duration { seconds: 3600, nanos: 0 });

        let answer = pb::HeartbeatAck { lease_seq: 1, lease_ttl, term };
        world.send(move |number| frame(number, 12, Body::HeartbeatAck(answer)));
        let refused = format!("answered in term {term} on a link of term {TERM}");
        let mut status = world.runner.connector.status.clone();
        within("an end", status.wait_for(|status| status.problem.contains(&refused))).await.unwrap();

        world.hears("the next greeting", |said| matches!(said, Said::Hello(_)).then_some(())).await;
        world.assert_works("c2").await;
    }
}

/// F-28: an older replica is not obeyed, on any link that it makes.
#[tokio::test]
async fn welcome_of_an_older_term_is_refused_with_both_terms_until_a_newer_one_comes() {
    let mut world = World::new().await;
    world.open().await;

    world.term.store(TERM - 1, Ordering::SeqCst);
    world.send(|_| vec![0xff; 64]);
    let mut status = world.runner.connector.status.clone();
    let refused = format!("term {} is older than {TERM}", TERM - 1);
    within("a refusal", status.wait_for(|status| status.problem.contains(&refused))).await.unwrap();

    world.term.store(TERM + 1, Ordering::SeqCst);
    within("a link", status.wait_for(|status| status.connected)).await.unwrap();
    world.assert_works("c2").await;
}

/// F-66: a state directory that was restored from a copy. Its runner has told less than the orchestrator knows, and nothing is begun on
/// the word of either.
#[tokio::test]
async fn orchestrator_that_knows_later_events_than_the_runner_is_told_that_the_state_was_set_back() {
    let mut world = World::new().await;
    world.open().await;

    world.acknowledged.store(1_000_000, Ordering::SeqCst);
    world.send(|_| vec![0xff; 64]);
    let mut status = world.runner.connector.status.clone();
    let refused = "event 1000000 is acknowledged";
    within("a refusal", status.wait_for(|status| status.problem.contains(refused))).await.unwrap();
    assert!(status.borrow().problem.contains("this state was set back"), "{}", status.borrow().problem);

    // It is in no hurry to ask again, but for another certificate.
    world.acknowledged.store(0, Ordering::SeqCst);
    let issued = world.authority.client("runner-1", Validity::Now).unwrap();
    std::fs::write(&world.files.certificate, &issued.certificate_pem).unwrap();
    std::fs::write(&world.files.key, &issued.key_pem).unwrap();
    world.runner.connector.reload.notify_one();
    within("a link", status.wait_for(|status| status.connected)).await.unwrap();
    world.assert_works("c2").await;
}
