//! An orchestrator that does what a script says, byte by byte, and a runner that has dialled it: what no reference sends can
//! be sent by it.

use std::collections::VecDeque;
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
use tokio::sync::{Mutex, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{BoxFuture, Context, Poll, Service, http};
use tonic::{Request, Response, Status, Streaming};

use crate::world::{Options, Runner, within};

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

/// Of the first orchestrator, unless a script says otherwise.
pub const TERM: u64 = 3;

/// Frames by their kind.
pub type Orders = Vec<(u32, Body)>;

/// How the peer greets.
#[derive(Clone)]
pub struct Script {
    /// Its answers to greetings, with the orders that come right behind them, in turn; the last one stays.
    pub answers: Arc<Mutex<VecDeque<(pb::Welcome, Orders)>>>,
    /// What becomes of a session that is held, and how long that takes to decide.
    pub action: pb::ResumeAction,
    pub pause: Duration,
    /// What follows a field that this version does not know, in every frame.
    pub unknown: Vec<u8>,
}

impl Default for Script {
    fn default() -> Self {
        Self::answering([(welcome(TERM), Vec::new())])
    }
}

impl Script {
    /// With these answers to greetings.
    pub fn answering(answers: impl IntoIterator<Item = (pb::Welcome, Orders)>) -> Self {
        Self {
            answers: Arc::new(Mutex::new(answers.into_iter().collect())),
            action: pb::ResumeAction::Keep,
            pause: Duration::ZERO,
            unknown: Vec::new(),
        }
    }

    async fn answer(&self) -> (pb::Welcome, Orders) {
        let mut answers = self.answers.lock().await;
        let next = if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() };
        next.expect("an answer")
    }
}

/// The answer to a greeting by a replica of this term.
pub fn welcome(term: u64) -> pb::Welcome {
    pb::Welcome {
        link_id: "raw".into(),
        term,
        lease_ttl: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        heartbeat_every: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        limits: Some(pb::LinkLimits { link_credit_bytes: 1 << 20, ..Default::default() }),
        decision_pages: 1,
        ..Default::default()
    }
}

/// One link after the other: greets, then sends what it is given.
#[derive(Clone)]
struct Link {
    frames: Arc<Mutex<mpsc::Receiver<Frame>>>,
    said: mpsc::Sender<Said>,
    script: Script,
    /// Of the next answer, when they are not 0.
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
        let Self { frames, said, script, term, acknowledged } = self.clone();
        Box::pin(async move {
            let (sender, receiver) = mpsc::channel(16);
            let mut incoming = request.into_inner();
            tokio::spawn(async move {
                let Ok(Some(pb::RunnerFrame { body: Some(Said::Hello(hello)), .. })) = incoming.message().await else {
                    return;
                };
                let (mut welcome, orders) = script.answer().await;
                for (field, wanted) in [(&mut welcome.term, &term), (&mut welcome.event_ack_through, &acknowledged)] {
                    match wanted.load(Ordering::SeqCst) {
                        0 => {}
                        wanted => *field = wanted,
                    }
                }
                let action = script.action.into();
                let decision = pb::ResumeDecision { session_id: "s".into(), epoch: 1, action, calls: Vec::new() };
                let held = hello.resume_pages > 0;
                let decisions =
                    pb::ResumeDecisionPage { index: 0, decisions: held.then_some(decision).into_iter().collect() };
                said.try_send(Said::Hello(hello)).unwrap();
                let greeting = [(10, Body::Welcome(welcome)), (11, Body::ResumeDecisions(decisions))];
                let mut number = 0;
                for (kind, body) in greeting.into_iter().chain(orders) {
                    number += 1;
                    let frame = [frame(number, kind, body), script.unknown.clone()].concat();
                    // A runner that will not have the welcome does not stay for the rest.
                    if sender.send(Ok(frame)).await.is_err() {
                        return;
                    }
                    if number == 1 {
                        tokio::time::sleep(script.pause).await;
                    }
                }
                // The link before this one may not have noticed its end yet.
                let mut frames = frames.lock().await;
                loop {
                    tokio::select! {
                        Some(make) = frames.recv() => {
                            number += 1;
                            if sender.send(Ok([make(number), script.unknown.clone()].concat())).await.is_err() {
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

pub fn frame(frame_no: u64, kind: u32, body: Body) -> Vec<u8> {
    pb::OrchestratorFrame { frame_no, kind, must_understand: true, body: Some(body) }.encode_to_vec()
}

/// An orchestrator that sends bytes, and a runner that has dialled it.
pub struct World {
    frames: mpsc::Sender<Frame>,
    said: mpsc::Receiver<Said>,
    pub runner: Runner,
    /// Of the next answer, when they are not 0.
    pub term: Arc<AtomicU64>,
    pub acknowledged: Arc<AtomicU64>,
    pub authority: Authority,
    pub files: TlsFiles,
    _directory: tempfile::TempDir,
}

impl World {
    pub async fn new() -> Self {
        Self::with(Options::default(), Script::default()).await
    }

    pub async fn with(options: Options, script: Script) -> Self {
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
        let (term, acknowledged) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let link = Link {
            frames: Arc::new(Mutex::new(to_send)),
            said: speaks,
            script,
            term: Arc::clone(&term),
            acknowledged: Arc::clone(&acknowledged),
        };
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

    pub fn send(&self, make: impl FnOnce(u64) -> Vec<u8> + Send + 'static) {
        self.frames.try_send(Box::new(make)).ok().unwrap();
    }

    pub async fn hears<T>(&mut self, what: &str, mut wanted: impl FnMut(Said) -> Option<T>) -> T {
        within(what, async {
            loop {
                if let Some(found) = wanted(self.said.recv().await.unwrap()) {
                    return found;
                }
            }
        })
        .await
    }

    pub async fn open(&mut self) {
        let open = pb::OpenSession { session_id: "s".into(), epoch: 1, ..Default::default() };
        self.send(|number| frame(number, 13, Body::OpenSession(open)));
        self.hears("the session", |said| matches!(said, Said::SessionOpened(_)).then_some(())).await;
    }

    pub async fn refusal(&mut self) -> pb::RequestRefused {
        self.hears("a refusal", |said| if let Said::RequestRefused(refused) = said { Some(refused) } else { None })
            .await
    }

    /// A call that is well formed still runs, once.
    pub async fn assert_works(&mut self, call_id: &str) {
        let call = bash(call_id, "exit 0");
        self.send(|number| frame(number, 15, Body::Call(call)));
        let finished = self
            .hears("the end of a call", |said| if let Said::CallFinished(end) = said { Some(end) } else { None })
            .await;
        assert_eq!(finished.call_id, call_id);
        assert_eq!(self.runner.fakes.executions_of(call_id), 1);
    }
}

pub fn bash(call_id: &str, command: &str) -> pb::Call {
    let input = pb::BashInput { command: Some(command.into()), ..Default::default() };
    pb::Call {
        call_id: call_id.into(),
        session_id: "s".into(),
        epoch: 1,
        input: Some(pb::call::Input::Bash(input)),
        ..Default::default()
    }
}
