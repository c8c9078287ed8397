//! The gRPC link to an orchestrator: dialled, kept, resumed.
//!
//! One task lives as long as the runner and owns what must survive a link: unacknowledged events, the position of every
//! output stream, the lease. A link is a guest of that task: it may die at any byte, and the next one continues where
//! the orchestrator's acknowledgements end. This module never listens and never decides what runs.

mod book;
mod certificates;
mod codec;
mod decode;
mod encode;
mod inbound;
mod lease;
mod link;
mod outbox;
mod outgoing;
pub(crate) mod refusal;
mod resume;
mod rotation;
mod task;

#[cfg(test)]
pub(crate) use link::simulated;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Ports;
use super::backoff::Backoff;
use super::dial::{DialError, Target};
use super::enrollment::{RENEWAL_GRACE, Renewal};
use super::expiry::Expiry;
use super::tls::{TlsError, TlsFiles, TlsSource};
use super::transport::{TransportError, chain};
use crate::work::{Receipt, RunnerId, limits};
use codec::{FrameCodec, Incoming};
use proto::runner::v1 as pb;
pub use refusal::Refusal;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;

/// Largest message the transport takes. Above our own limit, so that a frame between the two is refused with its name
/// and does not end the link.
const TRANSPORT_BYTES: usize = 4 * limits::FRAME_BYTES;

/// Label under which a greeting names the SHA-256 of the file with the authorities.
const AUTHORITIES_LABEL: &str = "sandbox-runner.authorities-sha256";

/// What the link needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where to dial.
    pub target: Target,
    /// Certificates.
    pub tls: TlsFiles,
    /// How they are renewed, when that is up to us.
    pub renewal: Option<Renewal>,
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
    /// Why the orchestrator will not have this runner, until somebody does something about it.
    pub refusal: Option<Refusal>,
    /// Links made so far.
    pub links: u64,
    /// The certificate in use.
    pub certificate: CertificateStatus,
}

impl LinkStatus {
    /// What an operator must hear of, one text each.
    #[must_use]
    pub fn alarms(&self) -> Vec<String> {
        self.refusal.iter().map(ToString::to_string).chain(self.certificate.alarms()).collect()
    }
}

/// State of the certificate in use, for people.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CertificateStatus {
    /// Seconds since 1970 at which it ends.
    pub not_after: i64,
    /// How near that is.
    pub expiry: Expiry,
    /// Why newer files are not in use; empty when there are none, or they are.
    pub refused: String,
    /// Why it was not renewed; empty when it was, or is not due.
    pub renewal: String,
}

impl CertificateStatus {
    /// What an operator must hear of, one text each.
    #[must_use]
    pub fn alarms(&self) -> Vec<String> {
        let mut alarms = Vec::new();
        if self.expiry.is_alarm() {
            let end = prost_types::Timestamp { seconds: self.not_after, nanos: 0 };
            alarms.push(format!("the certificate of the link is good until {end}: {}", self.expiry));
        }
        if !self.refused.is_empty() {
            alarms.push(format!("new certificate files are refused: {}", self.refused));
        }
        if !self.renewal.is_empty() {
            alarms.push(format!("the certificate is not renewed: {}", self.renewal));
        }
        alarms
    }

    /// Whether the runner works with less than it should: its link is about to end, or nothing would replace the certificate.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        self.expiry.is_degraded() || !self.refused.is_empty() || !self.renewal.is_empty()
    }
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
    Refused { host: String, code: tonic::Code, refusal: Option<Refusal>, message: String },
    #[error("link ended: {0}")]
    Ended(String),
    #[error("link given up: {0} frames wait, and the orchestrator does not read")]
    Unread(usize),
    #[error("orchestrator broke the protocol: {0}")]
    Violation(String),
}

impl LinkError {
    /// What kind of an end this is, for whoever counts them.
    fn reason(&self) -> &'static str {
        match self {
            Self::Dial(_) | Self::Transport { .. } => "unreachable",
            Self::Refused { .. } => "refused",
            Self::Ended(_) => "ended",
            Self::Unread(_) => "unread",
            Self::Violation(_) => "violation",
        }
    }

    /// The orchestrator refuses the link, or ends it as if it had.
    fn refused(host: &str, status: &tonic::Status) -> Self {
        let (code, refusal, message) = (status.code(), Refusal::of(status), with_source(status));
        Self::Refused { host: host.to_owned(), code, refusal, message }
    }

    /// A link that was there has ended with this status.
    fn ended(host: &str, status: &tonic::Status) -> Self {
        let denied = matches!(status.code(), tonic::Code::Unauthenticated | tonic::Code::PermissionDenied);
        if denied || Refusal::of(status).is_some() {
            return Self::refused(host, status);
        }
        Self::Ended(with_source(status))
    }

    /// Why the orchestrator will not have this runner, when that is what it says.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Refused { refusal, .. } => *refusal,
            _ => None,
        }
    }
}

impl From<TransportError> for LinkError {
    fn from(error: TransportError) -> Self {
        match error {
            TransportError::Dial(error) => Self::Dial(error),
            TransportError::Http { host, problem } => Self::Transport { host, problem },
        }
    }
}

/// Reads the certificates and starts dialling.
///
/// # Errors
/// When the certificates are not usable, or are those of another runner; then nothing was started.
pub fn start(settings: Settings, ports: Ports, stop: watch::Receiver<Stop>) -> Result<Handle, TlsError> {
    let grace = settings.renewal.as_ref().map_or(Duration::ZERO, |_| RENEWAL_GRACE);
    let source = TlsSource::load_with_grace(settings.tls.clone(), SystemTime::now(), grace)?;
    source.check_runner(settings.identity.runner_id.as_str())?;
    let reload = Arc::new(Notify::new());
    let (status_sender, status) = watch::channel(LinkStatus::default());
    let credentials = certificates::watch(source, settings.renewal.clone(), Arc::clone(&reload), status_sender.clone());
    let task = task::Task::new(settings, ports, stop, credentials, status_sender);
    Ok(Handle { status, reload, task: tokio::spawn(task.run()) })
}

/// Opens the stream on a connection. `outgoing` may already hold the first frames.
async fn open_link(
    host: String,
    channel: Channel,
    outgoing: outgoing::Outgoing,
) -> Result<tonic::Streaming<Incoming>, LinkError> {
    let mut grpc = tonic::client::Grpc::new(channel)
        .max_decoding_message_size(TRANSPORT_BYTES)
        .max_encoding_message_size(limits::FRAME_BYTES);
    let transport = |e: tonic::transport::Error| LinkError::Transport { host: host.clone(), problem: chain(&e) };
    grpc.ready().await.map_err(transport)?;
    let path = PathAndQuery::from_static("/sandbox_runner.runner.v1.RunnerLinkService/Connect");
    let opened = grpc.streaming(tonic::Request::new(outgoing), path, FrameCodec).await;
    opened.map(tonic::Response::into_inner).map_err(|status| LinkError::refused(&host, &status))
}

fn with_source(status: &tonic::Status) -> String {
    let source = std::error::Error::source(status).map(chain);
    source.map_or_else(|| status.message().to_owned(), |source| format!("{}: {source}", status.message()))
}

impl Settings {
    /// What the operator set, and which authorities are trusted here: while those are replaced, the operator sees who
    /// still has the old ones.
    fn labels_with(&self, authorities_sha256: &[u8; 32]) -> HashMap<String, String> {
        let digits: String = authorities_sha256.iter().map(|byte| format!("{byte:02x}")).collect();
        let own = self.labels.iter().map(|(name, value)| (name.clone(), value.clone()));
        own.chain([(AUTHORITIES_LABEL.to_owned(), digits)]).collect()
    }

    fn hello(
        &self,
        reason: pb::HelloReason,
        previous_link_id: String,
        pages: usize,
        authorities_sha256: &[u8; 32],
    ) -> pb::Hello {
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
            labels: self.labels_with(authorities_sha256),
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
