//! Client of the launcher: requests out, answers and endings in; frames become our own types here and nowhere else.
//!
//! One task reads; requests are sent by whoever makes them. The launcher is trusted more than a sandbox, but its frames
//! are checked all the same: a launcher that answers nonsense is treated as gone. It never sees a path from us.
//!
//! A launcher that is a service of its own may be restarted or replaced while sandboxes live. Then the connection is made
//! again, what the launcher still holds lives on, what it no longer holds has ended, and what it holds without anybody here
//! knowing it is killed. An embedded launcher takes its sandboxes along, so without its connection everything is over.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use proto::launch::v1 as wire;
use tokio::sync::{oneshot, watch};
use tracing::{debug, info, warn};

use super::packet::{Descriptors, PacketError, PacketSocket};
use super::spec::{Limits, Rootfs, Spec};

/// Largest packet of the protocol.
pub const LARGEST_PACKET: usize = 64 * 1024;
const PROTOCOL_MAJOR: u32 = 1;
/// Creation may unpack and mount; everything else answers at once. A launcher this late is not coming back.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request waits for a launcher that is being restarted.
const AWAY_PATIENCE: Duration = Duration::from_secs(10);
/// Time between attempts to find a launcher again.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// Requests without an answer yet. More than this means the launcher is stuck, and more requests would not help.
const MOST_OUTSTANDING: usize = 1024;

/// Why a request has no good answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LaunchError {
    /// The launcher said no.
    #[error("the launcher refused: {message} ({code}{})", errno_suffix(*errno))]
    Refused {
        /// From the protocol's closed list.
        code: String,
        /// What failed; names the field.
        message: String,
        /// errno, 0 if none.
        errno: i32,
        /// What to do.
        remediation: String,
    },
    /// The connection is gone, and with an embedded launcher every sandbox.
    #[error("the launcher is gone: {reason}")]
    Gone {
        /// Why.
        reason: String,
    },
    /// The connection broke before the answer came; the launcher may be back already.
    #[error("the launcher was restarted before it answered")]
    Interrupted,
    /// No answer in time.
    #[error("the launcher has not answered {request} within {} seconds", ANSWER_TIMEOUT.as_secs())]
    Silent {
        /// Kind of request.
        request: &'static str,
    },
    /// Too many requests wait for it.
    #[error("{MOST_OUTSTANDING} requests already wait for the launcher")]
    Busy,
    /// An answer of another kind.
    #[error("the launcher answered {request} with something else")]
    WrongAnswer {
        /// Kind of request.
        request: &'static str,
    },
}

/// A first answer that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// Not a message of the protocol.
    #[error("the answer cannot be decoded")]
    Decode(#[source] prost::DecodeError),
    /// Refused.
    #[error("{message} ({code}); {remediation}")]
    Refused {
        /// From the protocol's closed list.
        code: String,
        /// What failed.
        message: String,
        /// What to do.
        remediation: String,
    },
    /// Another protocol.
    #[error("the launcher speaks version {major} of the protocol, this runner speaks {PROTOCOL_MAJOR}")]
    Version {
        /// What it speaks.
        major: u32,
    },
    /// Another message.
    #[error("the answer is not a welcome")]
    Unexpected,
}

/// What the host allows, as the launcher found out.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct HostReport {
    /// Version of the launcher.
    pub launcher_version: String,
    /// `unified`, `hybrid`, `legacy` or `none`.
    pub cgroup_mode: String,
    /// Controllers that limits can be set with.
    pub cgroup_controllers: Vec<String>,
    /// Highest landlock ABI; 0 when there is none.
    pub landlock_abi: u32,
    /// Ids each sandbox gets.
    pub ids_per_sandbox: u32,
    /// Sandboxes that can exist at once.
    pub slots: u32,
    /// The launcher works inside an unprivileged user namespace.
    pub rootless: bool,
    /// `memfd` or `file`.
    pub image_source: String,
    /// Lowers are idmapped into each range.
    pub idmapped_lowers: bool,
    /// One entry per layer that is missing.
    pub missing: Vec<MissingLayer>,
    /// Layers switched off in the policy.
    pub switched_off: Vec<String>,
    /// How sandboxes are made: `privileged`, `unprivileged`, or `nested` where no namespace can be made.
    pub shape: String,
}

/// A layer the host refuses.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MissingLayer {
    /// Name as in the receipt.
    pub layer: String,
    /// What was tried.
    pub attempt: String,
    /// errno of the attempt.
    pub errno: i32,
    /// The setting that would change it.
    pub remedy: String,
}

/// One layer, as the launcher reports it for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportedLayer {
    /// Name as in the receipt.
    pub name: String,
    /// What was asked.
    pub requested: String,
    /// What is enforced; `None` when missing.
    pub enforced: Option<String>,
    /// errno where it is missing.
    pub errno: i32,
}

/// A sandbox that exists.
#[derive(Debug)]
pub struct Created {
    /// File name of the control socket below the sandboxes directory.
    pub socket_name: String,
    /// Host pid of process 1.
    pub pid: u32,
    /// First host id of the range.
    pub id_base: u32,
    /// Number of ids.
    pub id_count: u32,
    /// Layer by layer.
    pub layers: Vec<ReportedLayer>,
    /// From request to ready.
    pub took: Duration,
    /// Where the workload sees the output of its calls; empty is the usual place.
    pub output_directory: String,
    /// pidfd of process 1, when the launcher sent one.
    pub pidfd: Option<OwnedFd>,
    /// Becomes `Some` when the sandbox has ended.
    pub ended: watch::Receiver<Option<Ended>>,
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Wait status of process 1; `None` when it cannot be known.
    pub wait_status: Option<i32>,
    /// Kills for memory since creation.
    pub oom_kills: u64,
    /// In words, for logs.
    pub reason: String,
}

/// The kernel's account of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Inspection {
    /// Bytes in use.
    pub memory_bytes: u64,
    /// Highest use.
    pub memory_peak_bytes: u64,
    /// Kills for memory since creation.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Forks refused since creation.
    pub pids_refused: u64,
    /// Processor time in microseconds.
    pub cpu_usec: u64,
    /// Limits in force.
    pub limits: InspectedLimits,
    /// Host pids of every process.
    pub host_pids: Vec<u32>,
}

/// Limits as the kernel reports them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct InspectedLimits {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

/// One living sandbox in the launcher's list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedSandbox {
    /// Its id.
    pub sandbox_id: String,
    /// File name of its control socket.
    pub socket_name: String,
    /// Host pid of process 1.
    pub pid: u32,
    /// Taken over from an earlier launcher.
    pub adopted: bool,
}

/// Connection to a launcher. Cheap to clone; closed when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Launcher {
    connection: Arc<Connection>,
}

#[derive(Debug)]
struct Connection {
    shared: Arc<Shared>,
    reader: tokio::task::AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The reader holds the socket too, and an embedded launcher ends only when it is closed.
        self.reader.abort();
    }
}

#[derive(Debug)]
struct Shared {
    next_id: AtomicU64,
    table: Mutex<Table>,
    /// Ticks when the link changes.
    changed: watch::Sender<()>,
}

type Answer = (wire::reply::Body, Vec<OwnedFd>);

/// The way to the launcher at this moment.
#[derive(Debug)]
enum Link {
    Up(Arc<PacketSocket>),
    /// It is being looked for; why it went.
    Away(String),
    /// It will not come back.
    Gone(String),
}

#[derive(Debug)]
struct Table {
    link: Link,
    outstanding: HashMap<u64, oneshot::Sender<Answer>>,
    /// Sandboxes that somebody here counts on.
    endings: HashMap<String, watch::Sender<Option<Ended>>>,
    /// Those of them that are not made yet.
    creating: HashSet<String>,
}

/// A request that has its place in the table.
struct Entered {
    request_id: u64,
    socket: Arc<PacketSocket>,
    answer: oneshot::Receiver<Answer>,
}

impl Launcher {
    /// Takes over a connection on which the greeting is done. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`LaunchError::Gone`] when the descriptor cannot be polled.
    pub fn from_connection(connection: OwnedFd) -> Result<Self, LaunchError> {
        let socket = PacketSocket::new(connection, LARGEST_PACKET, Descriptors::Accepted).map_err(gone)?;
        Ok(Self::with_socket(socket, None))
    }

    /// Connects to a launcher that listens at `path` and greets it. Its successors are found at the same path.
    ///
    /// # Errors
    /// [`LaunchError::Gone`] when nobody listens, [`LaunchError::Refused`] when it does not serve this uid.
    pub async fn connect(path: &Path) -> Result<(Self, HostReport), LaunchError> {
        let socket = PacketSocket::connect(path, LARGEST_PACKET, Descriptors::Accepted).map_err(gone)?;
        let launcher = Self::with_socket(socket, Some(path.to_path_buf()));
        let hello = wire::request::Body::Hello(wire::Hello { major: PROTOCOL_MAJOR });
        match launcher.request("Hello", hello).await? {
            (wire::reply::Body::Welcome(welcome), _) if welcome.major == PROTOCOL_MAJOR => {
                Ok((launcher, HostReport::from_wire(welcome)))
            }
            _ => Err(LaunchError::WrongAnswer { request: "Hello" }),
        }
    }

    fn with_socket(socket: PacketSocket, path: Option<PathBuf>) -> Self {
        let socket = Arc::new(socket);
        let table = Table {
            link: Link::Up(Arc::clone(&socket)),
            outstanding: HashMap::new(),
            endings: HashMap::new(),
            creating: HashSet::new(),
        };
        // 1 is the greeting that an embedded launcher has already answered.
        let shared =
            Arc::new(Shared { next_id: AtomicU64::new(2), table: Mutex::new(table), changed: watch::channel(()).0 });
        let reader = tokio::spawn(keep(Arc::clone(&shared), socket, path)).abort_handle();
        Self { connection: Arc::new(Connection { shared, reader }) }
    }

    /// Makes a sandbox.
    ///
    /// # Errors
    /// [`LaunchError::Refused`] names the field or the layer; the others mean the launcher is of no use any more.
    pub async fn create(&self, spec: &Spec) -> Result<Created, LaunchError> {
        const KIND: &str = "CreateSandbox";
        // Registered first: the ending may arrive right behind the answer.
        let (sender, ended) = watch::channel(None);
        {
            let mut table = self.table();
            table.endings.insert(spec.sandbox_id.clone(), sender);
            table.creating.insert(spec.sandbox_id.clone());
        }
        let answer = self.request(KIND, wire::request::Body::CreateSandbox(create_to_wire(spec))).await;
        match answer {
            Ok((wire::reply::Body::SandboxCreated(created), mut descriptors))
                if created.sandbox_id == spec.sandbox_id && is_file_name(&created.socket_name) =>
            {
                Ok(Created {
                    socket_name: created.socket_name,
                    pid: created.pid,
                    id_base: created.id_base,
                    id_count: created.id_count,
                    layers: created.layers.into_iter().map(layer_from_wire).collect(),
                    took: Duration::from_micros(created.took_us),
                    output_directory: created.output_directory,
                    pidfd: descriptors.pop(),
                    ended,
                })
            }
            other => {
                let mut table = self.table();
                table.endings.remove(&spec.sandbox_id);
                table.creating.remove(&spec.sandbox_id);
                drop(table);
                Err(other.err().unwrap_or(LaunchError::WrongAnswer { request: KIND }))
            }
        }
    }

    /// Kills every process of a sandbox and removes what it held. A sandbox that is already gone is no error.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn kill(&self, sandbox_id: &str) -> Result<(), LaunchError> {
        let killed = loop {
            let request = wire::KillSandbox { sandbox_id: sandbox_id.to_owned() };
            match self.request_done("KillSandbox", wire::request::Body::KillSandbox(request)).await {
                Err(LaunchError::Refused { code, .. }) if code == "SANDBOX_UNKNOWN" => break Ok(()),
                // It went before it answered; its successor is asked again.
                Err(LaunchError::Interrupted) => tokio::task::yield_now().await,
                other => break other,
            }
        };
        if killed.is_err() {
            // Nobody counts on it any more, so the next launcher is told to kill it.
            self.table().endings.remove(sandbox_id);
        }
        killed
    }

    /// Stops (`true`) or continues the work of a sandbox.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn freeze(&self, sandbox_id: &str, frozen: bool) -> Result<(), LaunchError> {
        let request = wire::FreezeSandbox { sandbox_id: sandbox_id.to_owned(), frozen };
        self.request_done("FreezeSandbox", wire::request::Body::FreezeSandbox(request)).await
    }

    /// Everything the launcher holds.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn list(&self) -> Result<Vec<ListedSandbox>, LaunchError> {
        const KIND: &str = "ListSandboxes";
        match self.request(KIND, wire::request::Body::ListSandboxes(wire::ListSandboxes {})).await? {
            (wire::reply::Body::SandboxList(list), _) => Ok(list
                .sandboxes
                .into_iter()
                .filter(|entry| is_file_name(&entry.socket_name))
                .map(|entry| ListedSandbox {
                    sandbox_id: entry.sandbox_id,
                    socket_name: entry.socket_name,
                    pid: entry.pid,
                    adopted: entry.adopted,
                })
                .collect()),
            _ => Err(LaunchError::WrongAnswer { request: KIND }),
        }
    }

    /// The kernel's account of a sandbox.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn inspect(&self, sandbox_id: &str) -> Result<Inspection, LaunchError> {
        const KIND: &str = "InspectSandbox";
        let request = wire::InspectSandbox { sandbox_id: sandbox_id.to_owned() };
        match self.request(KIND, wire::request::Body::InspectSandbox(request)).await? {
            (wire::reply::Body::Inspection(inspection), _) => Ok(inspection_from_wire(inspection)),
            _ => Err(LaunchError::WrongAnswer { request: KIND }),
        }
    }

    /// Waits for the ending of a sandbox that another runner made and this one takes over.
    pub fn watch_ending(&self, sandbox_id: &str) -> watch::Receiver<Option<Ended>> {
        let mut table = self.table();
        if let Link::Gone(reason) = &table.link {
            let reason = reason.clone();
            return watch::channel(Some(Ended { wait_status: None, oom_kills: 0, reason })).1;
        }
        table.endings.entry(sandbox_id.to_owned()).or_insert_with(|| watch::channel(None).0).subscribe()
    }

    async fn request_done(&self, kind: &'static str, body: wire::request::Body) -> Result<(), LaunchError> {
        match self.request(kind, body).await? {
            (wire::reply::Body::Done(_), _) => Ok(()),
            _ => Err(LaunchError::WrongAnswer { request: kind }),
        }
    }

    async fn request(&self, kind: &'static str, body: wire::request::Body) -> Result<Answer, LaunchError> {
        let Entered { request_id, socket, answer } = self.enter().await?;
        let packet = wire::Request { request_id, body: Some(body) }.encode_to_vec();
        let exchange = async {
            socket.send(&packet).await.map_err(|error| self.lost_on_the_way(&error))?;
            answer.await.map_err(|error| self.lost_on_the_way(&error))
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, exchange).await {
            Err(_) => Err(LaunchError::Silent { request: kind }),
            Ok(Err(error)) => Err(error),
            Ok(Ok((wire::reply::Body::Failure(failure), _))) => Err(LaunchError::Refused {
                code: failure.code,
                message: failure.message,
                errno: failure.errno,
                remediation: failure.remediation,
            }),
            Ok(Ok(answer)) => Ok(answer),
        }
    }

    /// Takes a place for a request as soon as there is a launcher to send it to.
    async fn enter(&self) -> Result<Entered, LaunchError> {
        let shared = &self.connection.shared;
        let mut changed = shared.changed.subscribe();
        let entered = async {
            loop {
                if let Some(entered) = shared.try_enter()? {
                    return Ok(entered);
                }
                // The sender lives in `shared`, so waiting cannot fail.
                let _ = changed.changed().await;
            }
        };
        match tokio::time::timeout(AWAY_PATIENCE, entered).await {
            Ok(entered) => entered,
            Err(_) => Err(LaunchError::Gone { reason: self.table().link.problem() }),
        }
    }

    /// The connection broke under a request.
    fn lost_on_the_way(&self, error: &dyn std::fmt::Display) -> LaunchError {
        match &self.table().link {
            Link::Gone(reason) => LaunchError::Gone { reason: reason.clone() },
            Link::Up(_) | Link::Away(_) => {
                debug!(%error, "a request was lost with its connection");
                LaunchError::Interrupted
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.connection.shared.table()
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change under the lock is a single insert or remove, so a panic elsewhere leaves it usable.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while the launcher is away.
    fn try_enter(&self) -> Result<Option<Entered>, LaunchError> {
        let mut table = self.table();
        let socket = match &table.link {
            Link::Up(socket) => Arc::clone(socket),
            Link::Away(_) => return Ok(None),
            Link::Gone(reason) => return Err(LaunchError::Gone { reason: reason.clone() }),
        };
        table.outstanding.retain(|_, waiting| !waiting.is_closed());
        if table.outstanding.len() >= MOST_OUTSTANDING {
            return Err(LaunchError::Busy);
        }
        let request_id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        table.outstanding.insert(request_id, sender);
        Ok(Some(Entered { request_id, socket, answer }))
    }

    /// Gives an answer to whoever waits for it. Returns the sandbox that was made for somebody who has given up.
    fn deliver(&self, reply: wire::Reply, descriptors: Vec<OwnedFd>) -> Result<Option<String>, String> {
        let body = reply.body.ok_or("a reply without a body arrived")?;
        if let wire::reply::Body::SandboxEnded(ended) = body {
            self.end_sandbox(ended);
            return Ok(None);
        }
        let mut table = self.table();
        let made = match &body {
            wire::reply::Body::SandboxCreated(created) => Some(created.sandbox_id.clone()),
            _ => None,
        };
        let Some(waiting) = table.outstanding.remove(&reply.request_id) else {
            if reply.request_id >= self.next_id.load(Ordering::Relaxed) {
                return Err(format!("a reply to request {} arrived, which nobody made", reply.request_id));
            }
            return Ok(made);
        };
        if let Some(sandbox_id) = &made {
            table.creating.remove(sandbox_id);
        }
        // The asker may have given up meanwhile; the descriptors are closed with the answer then.
        let unwanted = waiting.send((body, descriptors)).err().and(made);
        if let Some(sandbox_id) = &unwanted {
            table.endings.remove(sandbox_id);
        }
        Ok(unwanted)
    }

    fn end_sandbox(&self, ended: wire::SandboxEnded) {
        let Some(watching) = self.table().endings.remove(&ended.sandbox_id) else {
            debug!(sandbox_id = ended.sandbox_id, "ending of a sandbox nobody watches was ignored");
            return;
        };
        let wait_status = (ended.wait_status != -1).then_some(ended.wait_status);
        let reason = match wait_status {
            Some(status) => format!("process 1 ended with wait status {status:#x}"),
            None => "process 1 ended".to_owned(),
        };
        watching.send_replace(Some(Ended { wait_status, oom_kills: ended.oom_kills, reason }));
    }

    /// Everybody who waits learns that nothing will come any more.
    fn close(&self, reason: &str) {
        let mut table = self.table();
        table.link = Link::Gone(reason.to_owned());
        table.outstanding.clear();
        for (_, watching) in table.endings.drain() {
            let reason = format!("the launcher is gone: {reason}");
            watching.send_replace(Some(Ended { wait_status: None, oom_kills: 0, reason }));
        }
        drop(table);
        self.changed.send_replace(());
    }

    /// Requests that are under way are lost, sandboxes are not.
    fn away(&self, reason: &str) {
        let mut table = self.table();
        table.link = Link::Away(reason.to_owned());
        table.outstanding.clear();
        for sandbox_id in std::mem::take(&mut table.creating) {
            table.endings.remove(&sandbox_id);
        }
    }

    /// The launcher is back with these sandboxes. Returns those that nobody here knows.
    fn back(&self, socket: &Arc<PacketSocket>, held: HashSet<String>) -> Vec<String> {
        let mut table = self.table();
        table.endings.retain(|sandbox_id, watching| {
            let lives = held.contains(sandbox_id);
            if !lives {
                let reason = "it was gone when the launcher came back".to_owned();
                watching.send_replace(Some(Ended { wait_status: None, oom_kills: 0, reason }));
            }
            lives
        });
        let unknown = held.into_iter().filter(|sandbox_id| !table.endings.contains_key(sandbox_id)).collect();
        table.link = Link::Up(Arc::clone(socket));
        drop(table);
        self.changed.send_replace(());
        unknown
    }

    /// Has a sandbox killed that nobody counts on. The answer is of no interest.
    async fn discard(&self, socket: &PacketSocket, sandbox_id: String) {
        warn!(sandbox_id, "ending a sandbox that nobody waits for");
        let request_id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let body = wire::request::Body::KillSandbox(wire::KillSandbox { sandbox_id });
        let packet = wire::Request { request_id, body: Some(body) }.encode_to_vec();
        if let Err(error) = socket.send(&packet).await {
            debug!(%error, "a sandbox could not be discarded, its launcher is gone");
        }
    }
}

impl Link {
    fn problem(&self) -> String {
        match self {
            Self::Up(_) => "the connection was closed".to_owned(),
            Self::Away(reason) | Self::Gone(reason) => reason.clone(),
        }
    }
}

/// Reads as long as there is a launcher, and looks for its successor when it has a path.
async fn keep(shared: Arc<Shared>, mut socket: Arc<PacketSocket>, path: Option<PathBuf>) {
    loop {
        let reason = read_loop(&shared, &socket).await;
        let Some(path) = &path else { return shared.close(&reason) };
        warn!(reason, "the launcher is away, its sandboxes live on");
        shared.away(&reason);
        socket = loop {
            tokio::time::sleep(RETRY_AFTER).await;
            match tokio::time::timeout(AWAY_PATIENCE, rejoin(&shared, path)).await {
                Ok(Ok(socket)) => break socket,
                Ok(Err(problem)) => debug!(problem, "the launcher is not back yet"),
                Err(_) => debug!("the launcher does not answer yet"),
            }
        };
        info!("the launcher is back");
    }
}

/// Greets a new launcher and compares what it holds with what we count on.
async fn rejoin(shared: &Shared, path: &Path) -> Result<Arc<PacketSocket>, String> {
    let socket = PacketSocket::connect(path, LARGEST_PACKET, Descriptors::Accepted).map_err(|e| e.to_string())?;
    let hello = wire::request::Body::Hello(wire::Hello { major: PROTOCOL_MAJOR });
    match ask(shared, &socket, hello).await? {
        wire::reply::Body::Welcome(welcome) if welcome.major == PROTOCOL_MAJOR => {}
        _ => return Err("its first answer is not a welcome".to_owned()),
    }
    let list = wire::request::Body::ListSandboxes(wire::ListSandboxes {});
    let wire::reply::Body::SandboxList(list) = ask(shared, &socket, list).await? else {
        return Err("it does not say which sandboxes it holds".to_owned());
    };
    let socket = Arc::new(socket);
    let held = list.sandboxes.into_iter().map(|entry| entry.sandbox_id).collect();
    for sandbox_id in shared.back(&socket, held) {
        shared.discard(&socket, sandbox_id).await;
    }
    Ok(socket)
}

/// One exchange on a connection that nobody else uses yet.
async fn ask(shared: &Shared, socket: &PacketSocket, body: wire::request::Body) -> Result<wire::reply::Body, String> {
    let request_id = shared.next_id.fetch_add(1, Ordering::Relaxed);
    let packet = wire::Request { request_id, body: Some(body) }.encode_to_vec();
    socket.send(&packet).await.map_err(|error| error.to_string())?;
    let mut buffer = socket.buffer();
    loop {
        let packet = socket.receive(&mut buffer).await.map_err(|error| error.to_string())?;
        let reply = wire::Reply::decode(packet.bytes).map_err(|error| error.to_string())?;
        match reply.body {
            Some(wire::reply::Body::SandboxEnded(ended)) => shared.end_sandbox(ended),
            Some(body) if reply.request_id == request_id => return Ok(body),
            _ => return Err("it answered something else".to_owned()),
        }
    }
}

async fn read_loop(shared: &Shared, socket: &PacketSocket) -> String {
    let mut buffer = socket.buffer();
    loop {
        let packet = match socket.receive(&mut buffer).await {
            Ok(packet) => packet,
            Err(error) => return error.to_string(),
        };
        let delivered = wire::Reply::decode(packet.bytes)
            .map_err(|error| format!("a reply could not be decoded: {error}"))
            .and_then(|reply| shared.deliver(reply, packet.descriptors));
        match delivered {
            Ok(None) => {}
            Ok(Some(sandbox_id)) => shared.discard(socket, sandbox_id).await,
            Err(reason) => {
                warn!(reason, "connection to the launcher was given up");
                return reason;
            }
        }
    }
}

/// The greeting as a packet, for the one exchange that happens before the async runtime exists.
pub fn encoded_hello() -> Vec<u8> {
    let hello = wire::Hello { major: PROTOCOL_MAJOR };
    wire::Request { request_id: 1, body: Some(wire::request::Body::Hello(hello)) }.encode_to_vec()
}

/// Reads the answer to [`encoded_hello`].
///
/// # Errors
/// [`ReplyError`].
pub fn decode_welcome(bytes: &[u8]) -> Result<HostReport, ReplyError> {
    let reply = wire::Reply::decode(bytes).map_err(ReplyError::Decode)?;
    match reply.body {
        Some(wire::reply::Body::Welcome(welcome)) if welcome.major == PROTOCOL_MAJOR => {
            Ok(HostReport::from_wire(welcome))
        }
        Some(wire::reply::Body::Welcome(welcome)) => Err(ReplyError::Version { major: welcome.major }),
        Some(wire::reply::Body::Failure(failure)) => {
            Err(ReplyError::Refused { code: failure.code, message: failure.message, remediation: failure.remediation })
        }
        _ => Err(ReplyError::Unexpected),
    }
}

impl HostReport {
    fn from_wire(welcome: wire::Welcome) -> Self {
        let host = welcome.host.unwrap_or_default();
        let missing = host.missing.into_iter().map(|entry| MissingLayer {
            layer: entry.layer,
            attempt: entry.attempt,
            errno: entry.errno,
            remedy: entry.remedy,
        });
        Self {
            launcher_version: welcome.version,
            cgroup_mode: host.cgroup_mode,
            cgroup_controllers: host.cgroup_controllers,
            landlock_abi: host.landlock_abi,
            ids_per_sandbox: host.ids_per_sandbox,
            slots: host.slots,
            rootless: host.rootless,
            image_source: host.image_source,
            idmapped_lowers: host.idmapped_lowers,
            missing: missing.collect(),
            switched_off: host.switched_off,
            shape: host.shape,
        }
    }
}

fn create_to_wire(spec: &Spec) -> wire::CreateSandbox {
    let rootfs = match &spec.rootfs {
        Rootfs::Host => wire::create_sandbox::Rootfs::Host(wire::HostRootfs {}),
        Rootfs::Directory(name) => wire::create_sandbox::Rootfs::Directory(name.clone()),
        Rootfs::Layers(digests) => wire::create_sandbox::Rootfs::Layers(wire::LayerList { digest: digests.clone() }),
    };
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let variable = |name: &str, value: &[u8]| [name.as_bytes(), b"=", value].concat();
    wire::CreateSandbox {
        sandbox_id: spec.sandbox_id.clone(),
        profile: spec.profile.clone(),
        rootfs: Some(rootfs),
        limits: Some(limits_to_wire(spec.limits)),
        network: wire::Network::None.into(),
        volumes: spec
            .volumes
            .iter()
            .map(|volume| wire::Volume { name: volume.name.clone(), read_only: volume.read_only })
            .collect(),
        ephemeral: spec.ephemeral,
        orphan_timeout_ms: spec.orphan_timeout.map_or(0, milliseconds),
        environment: spec.environment.iter().map(|entry| variable(&entry.name, &entry.value)).collect(),
        working_directory: spec.working_directory.clone(),
        hostname: spec.hostname.clone(),
    }
}

fn limits_to_wire(limits: Limits) -> wire::Limits {
    wire::Limits {
        memory_bytes: limits.memory_bytes,
        cpu_millis: limits.cpu_millis,
        pids: limits.pids,
        disk_bytes: limits.disk_bytes,
    }
}

fn layer_from_wire(layer: wire::Layer) -> ReportedLayer {
    ReportedLayer {
        name: layer.name,
        requested: layer.requested,
        enforced: Some(layer.enforced).filter(|text| !text.is_empty()),
        errno: layer.errno,
    }
}

fn inspection_from_wire(inspection: wire::SandboxInspection) -> Inspection {
    let limits = inspection.limits.unwrap_or_default();
    Inspection {
        memory_bytes: inspection.memory_bytes,
        memory_peak_bytes: inspection.memory_peak_bytes,
        oom_kills: inspection.oom_kills,
        pids: inspection.pids,
        pids_refused: inspection.pids_refused,
        cpu_usec: inspection.cpu_usec,
        limits: InspectedLimits {
            memory_bytes: limits.memory_bytes,
            cpu_millis: limits.cpu_millis,
            pids: limits.pids,
            disk_bytes: limits.disk_bytes,
        },
        host_pids: inspection.host_pids,
    }
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

fn gone(error: PacketError) -> LaunchError {
    LaunchError::Gone { reason: error.to_string() }
}

fn errno_suffix(errno: i32) -> String {
    if errno == 0 { String::new() } else { format!(", {}", nix::Error::from_raw(errno)) }
}

#[cfg(test)]
#[path = "launch_tests.rs"]
pub(crate) mod tests;
