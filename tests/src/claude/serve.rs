//! The HTTP side: connections, faults, the record, and the poll that waits.

use std::io;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming as HyperBody};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::api::Reply;
use super::error::ApiError;
use super::fault::How;
use super::plane::ControlPlane;
use super::request::{Credential, Fate, Incoming, Recorded, parse_query};
use super::route::{Endpoint, Route};
use super::stream;

/// Largest body that is read.
const BODY_BYTES: usize = 64 << 20;
/// How often a poll that waits looks whether an item is due again.
const LOOK: Duration = Duration::from_millis(20);
/// Frames of a stream that wait for its reader; then the stream waits.
const FRAMES: usize = 16;
/// `reclaim_older_than_ms` of a poll that does not say it.
const RECLAIM: u64 = 5000;
/// Longest `block_ms`.
const BLOCK: u64 = 999;

/// A piece of a body.
pub(super) type Chunk = Result<Bytes, io::Error>;

/// What connections and the test have in common.
#[derive(Debug)]
pub(super) struct Shared {
    plane: Mutex<ControlPlane>,
    changed: watch::Sender<()>,
}

/// The locked state. Whoever changed it wakes those who wait for a change.
#[derive(Debug)]
pub struct Guard<'a> {
    plane: MutexGuard<'a, ControlPlane>,
    changed: &'a watch::Sender<()>,
    dirty: bool,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self { plane: Mutex::new(ControlPlane::new()), changed: watch::Sender::new(()) }
    }

    pub(super) fn lock(&self) -> Guard<'_> {
        // A test that failed with the lock held has said so already.
        let mut plane = self.plane.lock().unwrap_or_else(PoisonError::into_inner);
        let dirty = plane.tick();
        Guard { plane, changed: &self.changed, dirty }
    }

    pub(super) fn changed(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

impl Deref for Guard<'_> {
    type Target = ControlPlane;

    fn deref(&self) -> &ControlPlane {
        &self.plane
    }
}

impl DerefMut for Guard<'_> {
    fn deref_mut(&mut self) -> &mut ControlPlane {
        self.dirty = true;
        &mut self.plane
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.dirty {
            self.changed.send_replace(());
        }
    }
}

/// Why a connection breaks.
pub(super) fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "injected fault")
}

/// Accepts connections until it is dropped; then they all break.
pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { return };
                // A socket that is closed already shows when it is used.
                let _ = stream.set_nodelay(true);
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&shared), request));
                    let builder = hyper::server::conn::http1::Builder::new();
                    // A connection that breaks is what many tests are about.
                    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(shared: Arc<Shared>, request: Request<HyperBody>) -> Result<Response<Outgoing>, io::Error> {
    let incoming = read(request).await?;
    let (number, admitted, how) = admit(&shared, incoming.clone());
    let lost = |fate: Fate| {
        shared.lock().record[number].fate = fate;
        Err(broken())
    };
    match &how {
        Some(How::LoseRequest) => return lost(Fate::RequestLost),
        Some(How::Silence) => {
            shared.lock().record[number].fate = Fate::RequestLost;
            return std::future::pending().await;
        }
        Some(How::Delay(time)) => tokio::time::sleep(*time).await,
        _ => {}
    }
    let outcome = match (admitted, &how) {
        (Err(refusal), _) => Err(refusal),
        (Ok(_), Some(How::Status(status) | How::StatusRetryAfter(status, _))) => Err(ApiError::of_status(*status)),
        (Ok((route, _)), _) if route.endpoint == Endpoint::Poll => {
            poll(&shared, &route, &incoming).await.map(Reply::Json)
        }
        (Ok((route, credential)), how) => {
            let mut plane = shared.lock();
            let outcome = plane.serve(&route, &incoming, &credential);
            if how.is_none() {
                // In one step with its effect: who waits for the effect finds the request answered.
                plane.record[number].fate = Fate::Answered(status(&outcome));
            }
            outcome
        }
    };
    let outcome = match how {
        Some(How::LoseResponse) => return lost(Fate::ResponseLost),
        Some(How::SilenceAfterEffect) => {
            shared.lock().record[number].fate = Fate::ResponseLost;
            std::future::pending::<Result<Reply, ApiError>>().await
        }
        Some(How::StatusAfterEffect(status)) => Err(ApiError::of_status(status)),
        Some(How::DelayResponse(time)) => {
            tokio::time::sleep(time).await;
            outcome
        }
        _ => outcome,
    };
    let retry_after = match how {
        Some(How::StatusRetryAfter(_, seconds)) => Some(seconds),
        _ => None,
    };
    let cut = match how {
        Some(How::CutBody(bytes)) => Some(bytes),
        _ => None,
    };
    Ok(respond(&shared, number, outcome, retry_after, cut))
}

fn status(outcome: &Result<Reply, ApiError>) -> u16 {
    match outcome {
        Ok(Reply::Json(_) | Reply::Bytes(_) | Reply::Stream { .. }) => 200,
        Ok(Reply::Empty) => 204,
        Err(refusal) => refusal.status,
    }
}

async fn read(request: Request<HyperBody>) -> Result<Incoming, io::Error> {
    let (parts, body) = request.into_parts();
    let mut headers = std::collections::BTreeMap::new();
    for (name, value) in &parts.headers {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        headers
            .entry(name.as_str().to_owned())
            .and_modify(|known: &mut String| {
                known.push_str(", ");
                known.push_str(&value);
            })
            .or_insert(value);
    }
    let body = Limited::new(body, BODY_BYTES).collect().await.map_err(io::Error::other)?;
    Ok(Incoming {
        method: parts.method.as_str().to_owned(),
        path: parts.uri.path().to_owned(),
        query: parse_query(parts.uri.query().unwrap_or_default()),
        headers,
        body: body.to_bytes().to_vec(),
    })
}

type Admitted = Result<(Route, Credential), ApiError>;

/// Records a request, and says whether it is let in and what happens to it.
fn admit(shared: &Shared, incoming: Incoming) -> (usize, Admitted, Option<How>) {
    let mut plane = shared.lock();
    let credential = plane.credential(&incoming);
    let route = Route::find(&incoming.method, &incoming.path);
    let how = route.as_ref().ok().and_then(|route| plane.take_fault(route.endpoint));
    let (number, at) = (plane.record.len(), plane.now());
    plane.record.push(Recorded {
        number,
        at,
        endpoint: route.as_ref().ok().map(|route| route.endpoint),
        incoming: incoming.clone(),
        credential: credential.clone(),
        fate: Fate::Pending,
    });
    let admitted = route.and_then(|route| {
        plane.authorise(&route, &incoming, &credential)?;
        Ok((route, credential))
    });
    (number, admitted, how)
}

/// Waits for an item as long as the poll allows.
async fn poll(shared: &Shared, route: &Route, incoming: &Incoming) -> Result<Value, ApiError> {
    let block = incoming.number("block_ms", 1, BLOCK)?;
    let reclaim = incoming.number("reclaim_older_than_ms", 1, u64::from(u32::MAX))?.unwrap_or(RECLAIM);
    let reclaim = Duration::from_millis(reclaim);
    let environment_id = route.ids.first().map_or("", String::as_str);
    let worker_id = incoming.header("anthropic-worker-id");
    let deadline = Instant::now() + Duration::from_millis(block.unwrap_or(0));
    shared.lock().note_worker(environment_id, worker_id)?;
    let mut changed = shared.changed();
    loop {
        changed.mark_unchanged();
        {
            let mut plane = shared.lock();
            if plane.is_due(environment_id, reclaim) {
                return plane.poll(environment_id, reclaim);
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Value::Null);
        }
        tokio::select! {
            // The sender lives in `shared`.
            _ = changed.changed() => {}
            () = tokio::time::sleep(left.min(LOOK)) => {}
        }
    }
}

fn respond(
    shared: &Arc<Shared>,
    number: usize,
    outcome: Result<Reply, ApiError>,
    retry_after: Option<u32>,
    cut: Option<usize>,
) -> Response<Outgoing> {
    let status = status(&outcome);
    let (content_type, body) = match outcome {
        Ok(Reply::Json(value)) => (Some("application/json"), Outgoing::whole(value.to_string().into_bytes(), cut)),
        Ok(Reply::Empty) => (None, Outgoing::Whole(None)),
        Ok(Reply::Bytes(bytes)) => (Some("application/octet-stream"), Outgoing::whole(bytes, cut)),
        Ok(Reply::Stream { session_id, thread, cursor }) => {
            let (sender, receiver) = mpsc::channel(FRAMES);
            tokio::spawn(stream::feed(Arc::clone(shared), session_id, thread, cursor, sender));
            (Some("text/event-stream"), Outgoing::Stream(receiver))
        }
        Err(refusal) => {
            let body = refusal.body().to_string().into_bytes();
            (Some("application/json"), Outgoing::whole(body, cut))
        }
    };
    let mut plane = shared.lock();
    plane.record[number].fate = if cut.is_some() { Fate::ResponseLost } else { Fate::Answered(status) };
    let mut response = Response::builder().status(status).header("request-id", format!("req_{number}"));
    if let Some(date) = &plane.settings.date {
        response = response.header("date", date);
    }
    drop(plane);
    if let Some(content_type) = content_type {
        response = response.header("content-type", content_type);
    }
    if let Some(seconds) = retry_after {
        response = response.header("retry-after", seconds);
    }
    response.body(body).expect("a status and plain headers")
}

/// The body of an answer.
enum Outgoing {
    /// It is sent as it is.
    Whole(Option<Bytes>),
    /// These bytes, then the connection breaks.
    Cut(Option<Bytes>),
    /// What comes out of a channel.
    Stream(mpsc::Receiver<Chunk>),
}

impl Outgoing {
    fn whole(bytes: Vec<u8>, cut: Option<usize>) -> Self {
        let bytes = Bytes::from(bytes);
        match cut {
            Some(length) => Self::Cut(Some(bytes.slice(..length.min(bytes.len())))),
            None => Self::Whole(Some(bytes)),
        }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Cut(bytes) => {
                Poll::Ready(Some(bytes.take().map_or_else(|| Err(broken()), |bytes| Ok(Frame::data(bytes)))))
            }
            Self::Stream(chunks) => chunks.poll_recv(context).map(|chunk| chunk.map(|chunk| chunk.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => {
                hyper::body::SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Cut(_) | Self::Stream(_) => hyper::body::SizeHint::default(),
        }
    }
}
