//! What the reference orchestrator never says: bytes that are no frame are answered with the field, terms and events that cannot be end
//! the link, and nothing is lost by any of it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prost::Message as _;
use prost::bytes::BufMut as _;
use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::runner_frame::Body as Said;
use runner::connector::tls::TlsFiles;
use runner::dev::pki::{Authority, Validity};
use runner::dev::{Connection, accept_one, listen};
use runner::journal::{Journal, JournalError, Record, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use runner::work::{CallId, CallLimits, EnvironmentRef, Network, OutputMode, RequestDigest, SessionId, SessionOpen};
use tokio::sync::{Mutex, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Context, Poll, Service, http};
use tonic::{Request, Response, Status, Streaming};

use crate::world::{Options, Runner, within};

/// Of the first orchestrator.
const TERM: u64 = 3;

/// Makes the bytes of a frame from its number.
type Frame = Box<dyn FnOnce(u64) -> Vec<u8> + Send>;

/// Sends bytes as they are, and decodes what a runner says.
#[derive(Default)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = pb::RunnerFrame;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = pb::RunnerFrame;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<pb::RunnerFrame>, Status> {
        pb::RunnerFrame::decode(buffer).map(Some).map_err(|error| Status::internal(error.to_string()))
    }
}

/// One link after the other: greets, then sends what it is given.
#[derive(Clone)]
struct Link {
    frames: Arc<Mutex<mpsc::Receiver<Frame>>>,
    said: mpsc::Sender<Said>,
    /// What becomes of a session that is held, and how long that takes to decide.
    action: pb::ResumeAction,
    pause: Duration,
    /// Of the next Welcome.
    term: Arc<AtomicU64>,
    acknowledged: Arc<AtomicU64>,
}

impl tonic::server::NamedService for Link {
    const NAME: &'static str = "sandbox_runner.runner.v1.RunnerLinkService";
}

impl Service<http::Request<tonic::body::Body>> for Link {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let link = self.clone();
        Box::pin(async move { Ok(tonic::server::Grpc::new(Bytes).streaming(link, request).await) })
    }
}

impl tonic::server::StreamingService<pb::RunnerFrame> for Link {
    type Response = Vec<u8>;
    type ResponseStream = ReceiverStream<Result<Vec<u8>, Status>>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<Streaming<pb::RunnerFrame>>) -> Self::Future {
        let Self { frames, said, action, pause, term, acknowledged } = self.clone();
        Box::pin(async move {
            let (sender, receiver) = mpsc::channel(16);
            let mut incoming = request.into_inner();
            tokio::spawn(async move {
                let welcome = pb::Welcome {
                    link_id: "raw".into(),
                    term: term.load(Ordering::SeqCst),
                    event_ack_through: acknowledged.load(Ordering::SeqCst),
                    lease_ttl: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
                    heartbeat_every: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
                    limits: Some(pb::LinkLimits { link_credit_bytes: 1 << 20, ..Default::default() }),
                    decision_pages: 1,
                    ..Default::default()
                };
                let Ok(Some(pb::RunnerFrame { body: Some(Said::Hello(hello)), .. })) = incoming.message().await else {
                    return;
                };
                let decision =
                    pb::ResumeDecision { session_id: "s".into(), epoch: 1, action: action.into(), calls: Vec::new() };
                let held = hello.resume_pages > 0;
                let decisions =
                    pb::ResumeDecisionPage { index: 0, decisions: held.then_some(decision).into_iter().collect() };
                said.try_send(Said::Hello(hello)).unwrap();
                for (number, kind, body) in [(1, 10, Body::Welcome(welcome)), (2, 11, Body::ResumeDecisions(decisions))]
                {
                    if sender.send(Ok(frame(number, kind, body))).await.is_err() {
                        return;
                    }
                    if number == 1 {
                        tokio::time::sleep(pause).await;
                    }
                }
                let mut number = 2;
                // The link before this one may not have noticed its end yet.
                let mut frames = frames.lock().await;
                loop {
                    tokio::select! {
                        Some(make) = frames.recv() => {
                            number += 1;
                            if sender.send(Ok(make(number))).await.is_err() {
                                return;
                            }
                        }
                        frame = incoming.message() => match frame {
                            Ok(Some(frame)) => {
                                frame.body.map(|body| said.try_send(body));
                            }
                            _ => return,
                        },
                    }
                }
            });
            Ok(Response::new(ReceiverStream::new(receiver)))
        })
    }
}

fn frame(frame_no: u64, kind: u32, body: Body) -> Vec<u8> {
    pb::OrchestratorFrame { frame_no, kind, must_understand: true, body: Some(body) }.encode_to_vec()
}

/// An orchestrator that sends bytes, and a runner that has dialled it.
struct World {
    frames: mpsc::Sender<Frame>,
    said: mpsc::Receiver<Said>,
    runner: Runner,
    term: Arc<AtomicU64>,
    acknowledged: Arc<AtomicU64>,
    authority: Authority,
    files: TlsFiles,
    _directory: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        Self::with(Options::default(), pb::ResumeAction::Keep, Duration::ZERO).await
    }

    async fn with(options: Options, action: pb::ResumeAction, pause: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new("raw").unwrap();
        let server = authority.server_config(&authority.server("localhost", Validity::Now).unwrap()).unwrap();
        let files = authority
            .write_client_files(directory.path(), &authority.client("runner-1", Validity::Now).unwrap())
            .unwrap();
        let (listener, address) = listen().await.unwrap();
        let (sender, connections) = mpsc::channel::<std::io::Result<Connection>>(4);
        let acceptor = TlsAcceptor::from(Arc::new(server));
        tokio::spawn(async move {
            while let Ok(connection) = accept_one(&listener, acceptor.clone()).await {
                if sender.send(Ok(connection)).await.is_err() {
                    return;
                }
            }
        });
        let (frames, to_send) = mpsc::channel(16);
        // Much more than a runner says in one of these tests.
        let (speaks, said) = mpsc::channel(1024);
        let term = Arc::new(AtomicU64::new(TERM));
        let frames_of_link = Arc::new(Mutex::new(to_send));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let (told, known) = (Arc::clone(&term), Arc::clone(&acknowledged));
        let link = Link { frames: frames_of_link, said: speaks, action, pause, term: told, acknowledged: known };
        let serving = tonic::transport::Server::builder().serve_with_incoming_shutdown(
            link,
            ReceiverStream::new(connections),
            std::future::pending(),
        );
        tokio::spawn(serving);
        let runner = Runner::dial(address.port(), files.clone(), options);
        let mut world = Self { frames, said, runner, term, acknowledged, authority, files, _directory: directory };
        world.hears("a greeting", |said| matches!(said, Said::Hello(_)).then_some(())).await;
        world
    }

    fn send(&self, make: impl FnOnce(u64) -> Vec<u8> + Send + 'static) {
        self.frames.try_send(Box::new(make)).ok().unwrap();
    }

    async fn hears<T>(&mut self, what: &str, mut wanted: impl FnMut(Said) -> Option<T>) -> T {
        within(what, async {
            loop {
                if let Some(found) = wanted(self.said.recv().await.unwrap()) {
                    return found;
                }
            }
        })
        .await
    }

    async fn open(&mut self) {
        let open = pb::OpenSession { session_id: "s".into(), epoch: 1, ..Default::default() };
        self.send(|number| frame(number, 13, Body::OpenSession(open)));
        self.hears("the session", |said| matches!(said, Said::SessionOpened(_)).then_some(())).await;
    }

    async fn refusal(&mut self) -> pb::RequestRefused {
        self.hears("a refusal", |said| if let Said::RequestRefused(refused) = said { Some(refused) } else { None })
            .await
    }

    /// A call that is well formed still runs, once.
    async fn assert_works(&mut self, call_id: &str) {
        let call = bash(call_id, "exit 0");
        self.send(|number| frame(number, 15, Body::Call(call)));
        let finished = self
            .hears("the end of a call", |said| if let Said::CallFinished(end) = said { Some(end) } else { None })
            .await;
        assert_eq!(finished.call_id, call_id);
        assert_eq!(self.runner.fakes.executions_of(call_id), 1);
    }
}

fn bash(call_id: &str, command: &str) -> pb::Call {
    let input = pb::BashInput { command: Some(command.into()), ..Default::default() };
    pb::Call {
        call_id: call_id.into(),
        session_id: "s".into(),
        epoch: 1,
        input: Some(pb::call::Input::Bash(input)),
        ..Default::default()
    }
}

/// The frame of a call with one place of it replaced.
fn spoiled(number: u64, call_id: &str, place: &[u8], with: &[u8]) -> Vec<u8> {
    let mut bytes = frame(number, 15, Body::Call(bash(call_id, "echo PLACE")));
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
    let open = SessionOpen {
        session_id: SessionId::new("s").unwrap(),
        epoch: 1,
        digest: RequestDigest([0; 32]),
        environment: EnvironmentRef::default(),
        limits: crate::world::DEFAULTS,
        network: Network::None,
        variables: Vec::new(),
        min_tier: String::new(),
        orphan_timeout: None,
        idle_timeout: None,
        max_concurrent_calls: 0,
        tenant: String::new(),
    };
    let call = runner::work::ToolCall {
        call_id: CallId::new("left").unwrap(),
        session_id: SessionId::new("s").unwrap(),
        epoch: 1,
        digest: RequestDigest([0; 32]),
        input: runner::work::ToolInput::Bash(runner::work::BashInput {
            command: Some("exit 0".into()),
            restart: false,
        }),
        limits: CallLimits::default(),
        output_mode: OutputMode::Merged,
        quiet: false,
    };
    let recovered = Recovered {
        sessions: vec![RecoveredSession { open, sandbox: None, acknowledged: Vec::new() }],
        calls: vec![RecoveredCall { call, cancel: None, phase: RecoveredPhase::Accepted, starts: 0, resumes: Some(0) }],
        ..Recovered::default()
    };
    let options = Options { recovered, ..Options::default() };
    let mut world = World::with(options, pb::ResumeAction::Suspend, Duration::from_millis(500)).await;

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
    let mut world = World::with(options, pb::ResumeAction::Keep, Duration::ZERO).await;
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
        let mut world = World::with(Options::default(), pb::ResumeAction::Keep, pause).await;
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

    world.acknowledged.store(0, Ordering::SeqCst);
    within("a link", status.wait_for(|status| status.connected)).await.unwrap();
    world.assert_works("c2").await;
}
