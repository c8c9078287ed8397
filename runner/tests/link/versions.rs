//! Two versions of the protocol, one at each end: what is not known is left out where it may be, and refused by name where it
//! may not.

use std::sync::Arc;
use std::time::SystemTime;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::runner_frame::Body as Said;
use proto::runner::v1::runner_link_service_client::RunnerLinkServiceClient;
use runner::connector::dial::{Target, dial};
use runner::connector::orchestrator::Refusal;
use runner::connector::tls::TlsSource;
use runner::dev::{LinkSettings, Orchestrator};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;
use tonic::{Status, Streaming};

use crate::scripted::{Script, World, bash, frame, welcome};
use crate::world::{Options, within};

/// Field 999 of a message, a text that nobody here knows.
const UNKNOWN: [u8; 7] = [0xba, 0x3e, 4, b'n', b'e', b'w', b'!'];

/// The frame with a field of a newer version at the end of its body.
fn with_unknown_field(bytes: Vec<u8>, body: &[u8]) -> Vec<u8> {
    let at = bytes.windows(body.len()).position(|window| window == body).unwrap();
    let (before, after) = (&bytes[..at], &bytes[at + body.len()..]);
    // One byte of length before the body, because these bodies are short.
    let (length, before) = before.split_last().unwrap();
    assert_eq!(usize::from(*length), body.len());
    let longer = length + u8::try_from(UNKNOWN.len()).unwrap();
    [before, &[longer], body, &UNKNOWN, after].concat()
}

/// F-62: a newer orchestrator adds fields to frames and to what is in them.
#[tokio::test]
async fn fields_of_a_newer_version_are_left_out_and_the_rest_counts() {
    use prost::Message as _;
    let mut world = World::with(Options::default(), Script { unknown: UNKNOWN.to_vec(), ..Script::default() }).await;
    world.open().await;

    let call = bash("c1", "exit 3");
    world.send(move |number| with_unknown_field(frame(number, 15, Body::Call(call.clone())), &call.encode_to_vec()));

    let end = world.hears("its end", |said| if let Said::CallFinished(end) = said { Some(end) } else { None }).await;
    let exited = Some(pb::outcome::Kind::Exited(pb::Exited { code: 3 }));
    assert_eq!((end.call_id.as_str(), end.outcome.unwrap().kind), ("c1", exited));
    world.assert_works("c2").await;
}

/// F-62: a newer orchestrator sends a frame that this version does not have.
#[tokio::test]
async fn frame_of_a_newer_version_is_passed_over_or_answered_as_its_sender_wishes() {
    use prost::Message as _;
    let mut world = World::new().await;
    world.open().await;
    let unknown = |frame_no, must_understand| {
        let envelope = pb::OrchestratorFrame { frame_no, kind: 999, must_understand, body: None };
        [envelope.encode_to_vec(), UNKNOWN.to_vec()].concat()
    };

    world.send(move |number| unknown(number, false));
    world.send(move |number| unknown(number, true));

    let answer = world.hears("an answer", |said| if let Said::Unsupported(it) = said { Some(it) } else { None }).await;
    // Welcome, decisions, the session, what may be passed over, and this one.
    assert_eq!((answer.kind, answer.frame_no), (999, 5));
    world.assert_works("c").await;
}

/// F-62: an orchestrator that answers with a version that was not offered is not obeyed.
#[tokio::test]
async fn version_that_was_not_offered_is_not_spoken() {
    let newer = pb::Welcome { minor: 1, ..welcome(1) };
    let open = pb::OpenSession { session_id: "other".into(), epoch: 1, ..Default::default() };
    let script = Script::answering([(newer, vec![(13, Body::OpenSession(open))])]);
    let mut world = World::with(Options::default(), script).await;

    for _ in 0..3 {
        world.hears("a greeting", |said| matches!(said, Said::Hello(_)).then_some(())).await;
    }

    let mut status = world.runner.connector.status.clone();
    let told = status.wait_for(|status| status.problem.contains("minor version 1 was not offered"));
    assert_eq!(within("problem", told).await.unwrap().links, 0);
    assert_eq!(world.runner.fakes.created.load(std::sync::atomic::Ordering::SeqCst), 0);
}

/// F-62: features that were not offered change nothing.
#[tokio::test]
async fn features_that_were_not_offered_change_nothing() {
    let more = pb::Welcome { features: vec!["stdin".into(), "time-travel".into()], ..welcome(1) };
    let mut world = World::with(Options::default(), Script::answering([(more, Vec::new())])).await;

    world.open().await;

    world.assert_works("c").await;
}

/// A runner that says what it is told to say.
pub async fn greet(
    hello: pb::Hello,
) -> (Orchestrator, mpsc::Sender<pb::RunnerFrame>, Streaming<pb::OrchestratorFrame>) {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let files = orchestrator.write_client_files(directory.path(), "runner-1").unwrap();
    let source = TlsSource::load(files, SystemTime::now()).unwrap();
    let port = orchestrator.address().port();
    let target = Target { host: "127.0.0.1".into(), port, server_name: Some("localhost".into()), proxy: None };
    let stream = dial(&target, Arc::clone(&source.current().config)).await.unwrap();
    let mut once = Some(hyper_util::rt::TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        std::future::ready(once.take().ok_or_else(|| std::io::Error::other("one connection, one use")))
    });
    let endpoint = Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap();
    let (sender, frames) = mpsc::channel(16);
    let first = pb::RunnerFrame { frame_no: 1, kind: 10, must_understand: true, body: Some(Said::Hello(hello)) };
    sender.send(first).await.unwrap();
    let mut client = RunnerLinkServiceClient::new(endpoint);
    let incoming = client.connect(ReceiverStream::new(frames)).await.unwrap().into_inner();
    (orchestrator, sender, incoming)
}

pub fn hello(minors: [u32; 2]) -> pb::Hello {
    let identity = pb::RunnerIdentity { runner_id: "runner-1".into(), version: "9.9.9".into(), ..Default::default() };
    pb::Hello {
        major: 1,
        minor_min: minors[0],
        minor_max: minors[1],
        features: ["stdin", "time-travel"].map(str::to_owned).to_vec(),
        runner: Some(identity),
        next_event_seq: 1,
        first_unacked_event_seq: 1,
        ..Default::default()
    }
}

/// F-62: a newer runner that also speaks this version.
#[tokio::test]
async fn newer_runner_is_answered_in_the_version_and_with_the_features_that_both_know() {
    let (orchestrator, sender, mut incoming) = within("greeting", greet(hello([0, 2]))).await;

    let first = within("welcome", incoming.message()).await.unwrap().unwrap();

    let Some(Body::Welcome(welcome)) = first.body else { panic!("{first:?}") };
    assert_eq!((welcome.minor, welcome.features), (0, vec!["stdin".to_owned()]));
    // A frame that this version does not have, which may be passed over, and one that is known.
    let news = pb::RunnerFrame { frame_no: 2, kind: 999, must_understand: false, body: None };
    let heartbeat = Said::Heartbeat(pb::Heartbeat { lease_seq: 1, ..Default::default() });
    let known = pb::RunnerFrame { frame_no: 3, kind: 12, must_understand: true, body: Some(heartbeat) };
    sender.send(news).await.unwrap();
    sender.send(known).await.unwrap();
    within("its answer", async {
        while !matches!(incoming.message().await.unwrap().unwrap().body, Some(Body::HeartbeatAck(_))) {}
    })
    .await;
    assert_eq!(orchestrator.complaints(), Vec::<String>::new());
}

/// F-62: a runner of another age hears what is spoken here.
#[tokio::test]
async fn runner_that_speaks_no_common_version_is_refused_by_name() {
    for hello in [hello([1, 2]), pb::Hello { major: 2, ..hello([0, 0]) }] {
        let (orchestrator, _sender, mut incoming) = within("greeting", greet(hello)).await;

        let status: Status = within("refusal", incoming.message()).await.unwrap_err();

        let refusal = status.metadata().get("refusal").and_then(|name| name.to_str().ok());
        assert_eq!(refusal, Some(Refusal::VersionUnsupported.name()));
        assert!(status.message().contains("version 1.0 is spoken here"), "{}", status.message());
        assert_eq!(orchestrator.links(), 0);
    }
}
