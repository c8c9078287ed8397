//! The gRPC link to an orchestrator: dialled, kept, resumed.
//!
//! One task lives as long as the runner and owns what must survive a link: unacknowledged events, the position of every
//! output stream, the lease. A link is a guest of that task: it may die at any byte, and the next one continues where
//! the orchestrator's acknowledgements end. This module never listens and never decides what runs.

mod book;
mod codec;
mod decode;
mod encode;
mod inbound;
mod lease;
mod link;
mod outbox;
mod outgoing;
mod resume;
mod task;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use proto::runner::v1 as pb;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tracing::{info, warn};

use super::Ports;
use super::backoff::Backoff;
use super::dial::{DialError, Target, dial};
use super::tls::{Credentials, Reload, TlsError, TlsFiles, TlsSource};
use crate::work::{Receipt, RunnerId, limits};
use codec::{FrameCodec, Incoming};

/// Largest message the transport takes. Above our own limit, so that a frame between the two is refused with its name
/// and does not end the link.
const TRANSPORT_BYTES: usize = 4 * limits::FRAME_BYTES;
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the files of the certificate are looked at.
const CERTIFICATE_POLL: Duration = Duration::from_secs(60);

/// What the link needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to dial.
    pub target: Target,
    /// Certificates.
    pub tls: TlsFiles,
    /// Who we are.
    pub identity: Identity,
    /// Set by the operator.
    pub labels: BTreeMap<String, String>,
    /// What is set aside for sandboxes.
    pub capacity: Capacity,
    /// What protects a sandbox made here.
    pub receipt: Receipt,
    /// Nothing is kept on disk.
    pub ephemeral: bool,
    /// Delays between attempts to connect.
    pub backoff: Backoff,
    /// A clock that counts while the machine sleeps, in nanoseconds.
    pub clock: fn() -> u64,
}

/// Who a runner is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// As its certificate names it.
    pub runner_id: RunnerId,
    /// Of the state directory.
    pub state_id: String,
    /// Of this process.
    pub instance_id: String,
    /// Of the kernel.
    pub boot_id: String,
    /// Kernel release.
    pub kernel: String,
}

/// What is set aside for sandboxes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Capacity {
    /// Sessions at the same time.
    pub max_sessions: u32,
    /// Calls at the same time.
    pub max_running_calls: u32,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Memory.
    pub memory_bytes: u64,
    /// Disk space.
    pub disk_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// How the link is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stop {
    /// Not at all.
    #[default]
    Run,
    /// When everything is delivered and acknowledged.
    WhenDelivered,
    /// Now, with a goodbye if there is a link.
    Now,
    /// Say that another runner goes on with what there is, and end.
    Leave,
}

/// State of the link, for people.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkStatus {
    /// Up and resumed.
    pub connected: bool,
    /// Why it is not up; empty when it is.
    pub problem: String,
    /// Links made so far.
    pub links: u64,
}

/// The running connector.
#[derive(Debug)]
pub struct Handle {
    /// State of the link.
    pub status: watch::Receiver<LinkStatus>,
    /// Look at the certificate files now.
    pub reload: Arc<Notify>,
    /// Ends after a stop.
    pub task: JoinHandle<()>,
}

/// Why a link could not be made or ended.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("cannot speak HTTP/2 with {host}: {problem}")]
    Transport { host: String, problem: String },
    #[error("{host} refused the link: {code:?}: {message}")]
    Refused { host: String, code: tonic::Code, message: String },
    #[error("link ended: {0}")]
    Ended(String),
    #[error("orchestrator broke the protocol: {0}")]
    Violation(String),
}

/// Reads the certificates and starts dialling.
///
/// # Errors
/// When the certificates are not usable; then nothing was started.
pub fn start(settings: Settings, ports: Ports, stop: watch::Receiver<Stop>) -> Result<Handle, TlsError> {
    let source = TlsSource::load(settings.tls.clone(), SystemTime::now())?;
    let reload = Arc::new(Notify::new());
    let credentials = watch_certificates(source, Arc::clone(&reload));
    let (status_sender, status) = watch::channel(LinkStatus::default());
    let task = task::Task::new(settings, ports, stop, credentials, status_sender);
    Ok(Handle { status, reload, task: tokio::spawn(task.run()) })
}

/// Keeps an eye on the files; ends when nobody uses the certificates any more.
fn watch_certificates(mut source: TlsSource, reload: Arc<Notify>) -> watch::Receiver<Credentials> {
    let (sender, receiver) = watch::channel(source.current().clone());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = tokio::time::sleep(CERTIFICATE_POLL) => {}
                () = reload.notified() => {}
                () = sender.closed() => return,
            }
            // On a thread of its own: certificate files may be on a network file system that hangs.
            let looked = tokio::task::spawn_blocking(move || {
                let result = source.reload(SystemTime::now());
                (source, result)
            });
            let Ok((back, result)) = looked.await else { return };
            source = back;
            match result {
                Reload::Unchanged => {}
                Reload::Replaced => {
                    info!(not_after = source.current().not_after, "certificate replaced");
                    // Nobody listens any more only when the connector has ended.
                    let _ = sender.send(source.current().clone());
                }
                Reload::Kept(error) => {
                    warn!(error = &error as &dyn std::error::Error, "new certificate files refused, old ones stay");
                }
            }
        }
    });
    receiver
}

/// Dials and opens the stream. `outgoing` may already hold the first frames.
async fn open_link(
    target: Target,
    credentials: Credentials,
    outgoing: outgoing::Outgoing,
) -> Result<tonic::Streaming<Incoming>, LinkError> {
    let host = target.host.clone();
    let transport = |problem: String| LinkError::Transport { host: host.clone(), problem };
    let stream = dial(&target, credentials.config).await?;
    let authority = format!("{}:{}", target.host, target.port);
    // TLS is ours, so the transport is told plain HTTP; the scheme on the wire is what it is.
    let endpoint = Endpoint::from_shared(format!("http://{authority}")).map_err(|e| transport(e.to_string()))?;
    let origin = format!("https://{authority}").parse().map_err(|_| transport("malformed host".to_owned()))?;
    let endpoint = endpoint
        .origin(origin)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    // One connection, one link: the transport must not dial again behind our back.
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = once.take().ok_or_else(|| std::io::Error::other("the link is over"));
        std::future::ready(stream)
    });
    let channel = endpoint.connect_with_connector(connector).await.map_err(|e| transport(chain(&e)))?;
    let mut grpc = tonic::client::Grpc::new(channel)
        .max_decoding_message_size(TRANSPORT_BYTES)
        .max_encoding_message_size(limits::FRAME_BYTES);
    grpc.ready().await.map_err(|e| transport(chain(&e)))?;
    let path = PathAndQuery::from_static("/sandbox_runner.runner.v1.RunnerLinkService/Connect");
    let opened = grpc.streaming(tonic::Request::new(outgoing), path, FrameCodec).await;
    opened.map(tonic::Response::into_inner).map_err(|status| LinkError::Refused {
        host: host.clone(),
        code: status.code(),
        message: with_source(&status),
    })
}

/// An error with its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

fn with_source(status: &tonic::Status) -> String {
    let source = std::error::Error::source(status).map(chain);
    source.map_or_else(|| status.message().to_owned(), |source| format!("{}: {source}", status.message()))
}

impl Settings {
    fn hello(&self, reason: pb::HelloReason, previous_link_id: String, pages: usize) -> pb::Hello {
        let tool = |name: &str| pb::ToolSpec { name: name.to_owned(), version: 1 };
        pb::Hello {
            major: 1,
            minor_min: 0,
            minor_max: 0,
            features: ["output-credit", "stdin", "exec", "terminal", "receipt"].map(str::to_owned).to_vec(),
            runner: Some(pb::RunnerIdentity {
                runner_id: self.identity.runner_id.to_string(),
                state_id: self.identity.state_id.clone(),
                instance_id: self.identity.instance_id.clone(),
                boot_id: self.identity.boot_id.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                build: String::new(),
                os: std::env::consts::OS.to_owned(),
                kernel: self.identity.kernel.clone(),
                arch: std::env::consts::ARCH.to_owned(),
            }),
            labels: self.labels.clone().into_iter().collect(),
            capacity: Some(pb::Capacity {
                max_sessions: self.capacity.max_sessions,
                max_running_calls: self.capacity.max_running_calls,
                cpu_millis: self.capacity.cpu_millis,
                memory_bytes: self.capacity.memory_bytes,
                disk_bytes: self.capacity.disk_bytes,
                pids: self.capacity.pids,
            }),
            receipt: Some(encode::receipt_to_wire(&self.receipt)),
            tools: ["bash", "read", "write", "edit", "glob", "grep", "exec"].map(tool).to_vec(),
            resume_pages: u32::try_from(pages).unwrap_or(u32::MAX),
            reason: reason.into(),
            previous_link_id,
            wall_clock: Some(SystemTime::now().into()),
            boottime_ns: (self.clock)(),
            ephemeral: self.ephemeral,
            ..Default::default()
        }
    }
}
