//! The service behind the socket.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use proto::admin::v1 as pb;
use proto::admin::v1::admin_service_server::{AdminService, AdminServiceServer};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::present;
use super::socket::{SocketError, accept, bind};
use crate::connector::claude::Board;
use crate::connector::orchestrator::LinkStatus;
use crate::journal::Journal;
use crate::session::core::CallStage;
use crate::session::{SessionHandle, View, ViewCall, ViewSession};
use crate::work::{
    CallId, CancelMode, Code, IdError, OutputSource, Pressure, Receipt, Sandboxes, SessionClose, SessionId, Stream,
    ToolFailure, WorkItem, limits,
};

/// Connections that were let in and are not served yet.
const QUEUED_PEERS: usize = 16;
/// Pieces of output that whoever reads a call's output has not taken.
const QUEUED_PIECES: usize = 4;
/// How often new output is looked for while somebody follows a call.
const FOLLOW_EVERY: Duration = Duration::from_millis(100);

/// What the service needs.
#[derive(Debug, Clone)]
pub struct Parts {
    /// Where the socket is put.
    pub path: PathBuf,
    /// Its user; root may come in as well.
    pub own_uid: u32,
    /// The sessions.
    pub sessions: SessionHandle,
    /// The link, when there is one.
    pub link: Option<watch::Receiver<LinkStatus>>,
    /// How the work queues stand.
    pub queues: Vec<Board>,
    /// The clock of their leases, in nanoseconds.
    pub clock: fn() -> u64,
    /// What protects a new sandbox.
    pub receipt: Receipt,
    /// How the host stands.
    pub pressure: watch::Receiver<Arc<Pressure>>,
    /// Who counts what happens beside the sessions.
    pub counted: Counted,
}

/// Who counts what happens beside the sessions.
#[derive(Clone)]
pub struct Counted {
    /// Where calls are written down.
    pub journal: Arc<dyn Journal>,
    /// Where sandboxes come from.
    pub sandboxes: Arc<dyn Sandboxes>,
}

impl std::fmt::Debug for Counted {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Counted").finish_non_exhaustive()
    }
}

/// Binds the socket and serves beside the caller until the returned task is aborted.
///
/// # Errors
/// `SocketError`; nothing is served then.
pub fn serve(parts: Parts) -> Result<tokio::task::JoinHandle<()>, SocketError> {
    let listener = bind(&parts.path)?;
    let (sender, peers) = mpsc::channel(QUEUED_PEERS);
    let (own_uid, counters) = (parts.own_uid, parts.sessions.counters.clone());
    let service = AdminServiceServer::new(Admin(parts));
    Ok(tokio::spawn(async move {
        let serving = tonic::transport::Server::builder().serve_with_incoming(service, ReceiverStream::new(peers));
        tokio::select! {
            () = accept(listener, own_uid, sender, counters) => {}
            served = serving => {
                if let Err(error) = served {
                    tracing::warn!(error = &error as &dyn std::error::Error, "administration service ended");
                }
            }
        }
    }))
}

struct Admin(Parts);

impl Admin {
    async fn view(&self) -> Result<View, Status> {
        self.0.sessions.view().await.ok_or_else(|| Status::unavailable("the runner is ending"))
    }

    fn sandbox_id(&self, session: &ViewSession) -> Option<String> {
        self.0.sessions.outputs.sandbox_id(&session.request.session_id).map(|id| id.to_string())
    }

    fn work_items(&self) -> Vec<pb::WorkItem> {
        present::work_items(&self.0.queues, (self.0.clock)())
    }

    async fn put(&self, item: WorkItem) -> Result<(), Status> {
        self.0.sessions.work.send(item).await.map_err(|_| Status::unavailable("the runner is ending"))
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn list_sessions(
        &self,
        _request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let view = self.view().await?;
        let sessions = view.sessions.iter().map(|one| present::session(one, self.sandbox_id(one))).collect();
        Ok(Response::new(pb::ListSessionsResponse { sessions, work_items: self.work_items() }))
    }

    async fn inspect(&self, request: Request<pb::InspectRequest>) -> Result<Response<pb::InspectResponse>, Status> {
        use pb::inspect_request::Target;
        let view = self.view().await?;
        let mut work_items = self.work_items();
        let session = match request.into_inner().target {
            Some(Target::SessionId(id)) => Some(find_session(&view, &id)?.clone()),
            Some(Target::CallId(id)) => {
                let (session, call) = find_call(&view, &id)?;
                let session = session.ok_or_else(|| not_found("session of call", &id))?;
                Some(ViewSession { calls: vec![call.clone()], ..session.clone() })
            }
            Some(Target::WorkId(id)) => {
                work_items.retain(|item| item.work_id == id);
                let item = work_items.first().ok_or_else(|| not_found("work item", &id))?;
                find_session(&view, &item.session_id).ok().cloned()
            }
            None => return Err(Status::invalid_argument("target: is missing; name a session, a call or a work item")),
        };
        if let Some(session) = &session {
            work_items.retain(|item| item.session_id == session.request.session_id.as_str());
        }
        let receipt = session.as_ref().map(|session| present::receipt(&session.receipt));
        let session = session.map(|session| present::session(&session, self.sandbox_id(&session)));
        Ok(Response::new(pb::InspectResponse { session, receipt, work_items }))
    }

    async fn kill(&self, request: Request<pb::KillRequest>) -> Result<Response<pb::KillResponse>, Status> {
        use pb::kill_request::Target;
        let view = self.view().await?;
        match request.into_inner().target {
            Some(Target::SessionId(id)) => {
                let session = find_session(&view, &id)?;
                let (session_id, epoch) = (session.request.session_id.clone(), session.epoch);
                let close = SessionClose { session_id, epoch, grace: Duration::ZERO, fenced: false };
                self.put(WorkItem::Close(close)).await?;
            }
            Some(Target::CallId(id)) => {
                let (session, call) = find_call(&view, &id)?;
                if matches!(call.stage, CallStage::Finished(_)) {
                    let problem = format!("call_id: call {id} has ended already; `logs` shows what it has printed");
                    return Err(Status::failed_precondition(problem));
                }
                let session = session.ok_or_else(|| not_found("session of call", &id))?;
                self.put(WorkItem::Cancel {
                    session_id: session.request.session_id.clone(),
                    epoch: session.epoch,
                    call_id: call.request.call_id.clone(),
                    mode: CancelMode::Kill,
                })
                .await?;
            }
            None => return Err(Status::invalid_argument("target: is missing; name a session or a call")),
        }
        Ok(Response::new(pb::KillResponse {}))
    }

    type LogsStream = ReceiverStream<Result<pb::LogsResponse, Status>>;

    async fn logs(&self, request: Request<pb::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let request = request.into_inner();
        let stream = stream_named(&request.stream)?;
        let call_id = CallId::new(&request.call_id).map_err(|error| no_id(&error))?;
        find_call(&self.view().await?, call_id.as_str())?;
        let (sender, receiver) = mpsc::channel(QUEUED_PIECES);
        let sessions = self.0.sessions.clone();
        tokio::spawn(async move {
            if let Err(status) = follow(&sessions, &call_id, stream, &request, &sender).await {
                // Whoever asked has gone.
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn status(&self, _request: Request<pb::StatusRequest>) -> Result<Response<pb::StatusResponse>, Status> {
        let view = self.view().await?;
        let (link, status) = match &self.0.link {
            None => ("none", LinkStatus::default()),
            Some(status) => {
                let status = status.borrow().clone();
                (if status.connected { "connected" } else { "connecting" }, status)
            }
        };
        let alarms = status.alarms();
        let pressure = Arc::clone(&self.0.pressure.borrow());
        let number = |(name, value): (String, u64)| pb::Number { name, value };
        let mut counters = self.0.sessions.counters.all();
        counters.extend(self.0.counted.journal.counters());
        counters.extend(self.0.counted.sandboxes.counters().await);
        let counters = counters.into_iter().map(number);
        let queues = &self.0.queues;
        let of_queues = queues.iter().flat_map(|queue| queue.numbers((self.0.clock)())).map(number);
        let gauges = pressure.gauges.iter().map(|gauge| number((gauge.name.clone(), gauge.value)));
        // The only one that a collector can draw a line through before it is an alarm.
        let ends = u64::try_from(status.certificate.not_after).ok().filter(|ends| *ends > 0);
        let certificate = ends.map(|ends| number(("certificate_not_after_seconds".to_owned(), ends)));
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let calls = view.sessions.iter().flat_map(|session| &session.calls).chain(&view.leftover);
        let unacknowledged = calls.filter(|call| matches!(call.stage, CallStage::Finished(_))).count();
        let of_calls = [
            ("calls_queued", view.queued_calls),
            ("calls_running", view.running_calls),
            ("results_unacknowledged", unacknowledged),
        ];
        let of_calls = of_calls.map(|(name, value)| number((name.to_owned(), value as u64)));
        Ok(Response::new(pb::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            link: link.to_owned(),
            link_problem: status.problem,
            sessions: count(view.sessions.len()),
            running_calls: count(view.running_calls),
            queued_calls: count(view.queued_calls),
            draining: view.draining,
            receipt: Some(present::receipt(&self.0.receipt)),
            short_of: pressure.shortages.iter().map(|shortage| shortage.measured.clone()).collect(),
            numbers: gauges.chain(certificate).chain(of_calls).chain(counters).chain(of_queues).collect(),
            certificate_not_after: status.certificate.not_after,
            certificate_alarms: alarms,
            queues: queues.iter().map(present::queue).collect(),
        }))
    }
}

/// Sends output until its end, or until what is there now when nobody wants to wait.
async fn follow(
    sessions: &SessionHandle,
    call_id: &CallId,
    stream: Stream,
    request: &pb::LogsRequest,
    sender: &mpsc::Sender<Result<pb::LogsResponse, Status>>,
) -> Result<(), Status> {
    let mut offset = request.offset;
    // Who does not follow gets what was there a moment ago: a call may print faster than anybody reads.
    let mut until = request.follow.then_some(u64::MAX);
    loop {
        let view = sessions.view().await.ok_or_else(|| Status::unavailable("the runner is ending"))?;
        let Ok((_, call)) = find_call(&view, call_id.as_str()) else {
            // Acknowledged while we looked: nothing more can be read.
            return Ok(());
        };
        let total = match &call.stage {
            CallStage::Finished(result) => {
                let summary = result.end.streams.iter().find(|summary| summary.stream == stream);
                if let Some(inline) = summary.and_then(|summary| summary.inline.as_ref()) {
                    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(inline.len());
                    let data = inline[from..].to_vec();
                    // Whoever asked may have gone.
                    let _ = sender.send(Ok(pb::LogsResponse { offset, data })).await;
                    return Ok(());
                }
                Some(summary.map_or(0, |summary| summary.total_bytes))
            }
            CallStage::Queued | CallStage::Starting | CallStage::Running => None,
        };
        let queued = matches!(call.stage, CallStage::Queued);
        let read = async {
            if queued {
                None
            } else {
                Some(sessions.outputs.read_output(call_id, stream, offset, limits::CHUNK_BYTES).await)
            }
        };
        match read.await {
            Some(Ok(chunk)) if !chunk.bytes.is_empty() => {
                let response = pb::LogsResponse { offset: chunk.offset, data: chunk.bytes };
                offset = response.offset + response.data.len() as u64;
                let until = *until.get_or_insert_with(|| sessions.outputs.lengths(call_id).get(stream));
                if sender.send(Ok(response)).await.is_err() || (total.is_none() && offset >= until) {
                    return Ok(());
                }
                continue;
            }
            Some(Err(failure)) if total.is_some() || failure.code != Code::CallUnknown => {
                return Err(refused(&failure));
            }
            _ => {}
        }
        if total.is_some_and(|total| offset >= total) || !request.follow || sender.is_closed() {
            return Ok(());
        }
        tokio::time::sleep(FOLLOW_EVERY).await;
    }
}

fn refused(failure: &ToolFailure) -> Status {
    Status::failed_precondition(format!("{failure}; {}", failure.remediation))
}

fn not_found(what: &str, id: &str) -> Status {
    Status::not_found(format!("{what} {id} is not known here; `ps` lists what is"))
}

fn no_id(error: &IdError) -> Status {
    Status::invalid_argument(format!("{error}; `ps` lists what there is"))
}

fn find_session<'v>(view: &'v View, id: &str) -> Result<&'v ViewSession, Status> {
    let session_id = SessionId::new(id).map_err(|error| no_id(&error))?;
    let found = view.sessions.iter().find(|session| session.request.session_id == session_id);
    found.ok_or_else(|| not_found("session", id))
}

fn find_call<'v>(view: &'v View, id: &str) -> Result<(Option<&'v ViewSession>, &'v ViewCall), Status> {
    let call_id = CallId::new(id).map_err(|error| no_id(&error))?;
    let of_sessions =
        view.sessions.iter().flat_map(|session| session.calls.iter().map(move |call| (Some(session), call)));
    let leftover = view.leftover.iter().map(|call| (None, call));
    of_sessions.chain(leftover).find(|(_, call)| call.request.call_id == call_id).ok_or_else(|| not_found("call", id))
}

fn stream_named(name: &str) -> Result<Stream, Status> {
    match name {
        "" | "stdout" => Ok(Stream::Stdout),
        "stderr" => Ok(Stream::Stderr),
        "terminal" => Ok(Stream::Terminal),
        "result" => Ok(Stream::Result),
        _ => Err(Status::invalid_argument(format!("stream: {name:?} is not stdout, stderr, terminal or result"))),
    }
}
