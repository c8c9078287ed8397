//! Client of the launcher: requests out, answers and endings in; frames become our own types here and nowhere else.
//!
//! One task reads; requests are sent by whoever makes them. The launcher is trusted more than a sandbox, but its frames
//! are checked all the same: a launcher that answers nonsense is treated as gone. It never sees a path from us.
//!
//! A launcher that is a service of its own may be restarted or replaced while sandboxes live. Then the connection is made
//! again, what the launcher still holds lives on, what it no longer holds has ended, and what it holds without anybody here
//! knowing it is killed, once it is known what an earlier runner left. An embedded launcher takes its sandboxes along, so without its connection everything is over.
//!
//! This file has what can be asked of the launcher. [`greeting`] is the first exchange, [`table`] who waits for what, [`reader`]
//! the task that reads and looks for a launcher that went, [`frames`] the translation.

mod frames;
mod greeting;
mod reader;
mod report;
mod table;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use prost::Message;
use proto::launch::v1 as wire;
use tokio::sync::watch;
use tracing::debug;

pub use self::greeting::{ReplyError, decode_welcome, encoded_hello};
pub use self::report::{
    Created, Ended, HostReport, InspectedLimits, Inspection, ListedSandbox, MemoryKill, MissingLayer, ReportedLayer,
};
use self::table::{Answer, Entered, Link, MOST_OUTSTANDING, Shared, Table};
use super::packet::{Descriptors, PacketError, PacketSocket};
use super::spec::Spec;
use crate::telemetry::Counters;

/// Largest packet of the protocol.
pub const LARGEST_PACKET: usize = 64 * 1024;
/// Creation may unpack and mount; everything else answers at once. A launcher this late is not coming back.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request waits for a launcher that is being restarted.
const AWAY_PATIENCE: Duration = Duration::from_secs(10);

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
        match launcher.request("Hello", greeting::hello()).await? {
            (wire::reply::Body::Welcome(welcome), _) if greeting::is_ours(&welcome) => {
                Ok((launcher, frames::host_report(welcome)))
            }
            _ => Err(LaunchError::WrongAnswer { request: "Hello" }),
        }
    }

    fn with_socket(socket: PacketSocket, path: Option<PathBuf>) -> Self {
        let socket = Arc::new(socket);
        let shared = Arc::new(Shared::new(Arc::clone(&socket)));
        let reader = tokio::spawn(reader::keep(Arc::clone(&shared), socket, path)).abort_handle();
        Self { connection: Arc::new(Connection { shared, reader }) }
    }

    /// Resolves with the reason when the launcher is gone for good and every sandbox with it. One that is a service of its
    /// own comes back.
    pub async fn gone(&self) -> String {
        let mut changed = self.connection.shared.changed.subscribe();
        loop {
            if let Link::Gone(reason) = &self.table().link {
                return reason.clone();
            }
            if changed.changed().await.is_err() {
                return "nobody reads its connection any more".to_owned();
            }
        }
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
        let answer = self.request(KIND, wire::request::Body::CreateSandbox(frames::create(spec))).await;
        match answer {
            Ok((wire::reply::Body::SandboxCreated(created), mut descriptors))
                if created.sandbox_id == spec.sandbox_id && is_file_name(&created.socket_name) =>
            {
                Ok(Created {
                    socket_name: created.socket_name,
                    pid: created.pid,
                    id_base: created.id_base,
                    id_count: created.id_count,
                    layers: created.layers.into_iter().map(frames::layer).collect(),
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

    /// Stops (`true`) or continues the work of a sandbox. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn freeze(&self, sandbox_id: &str, frozen: bool) -> Result<(), LaunchError> {
        loop {
            let request = wire::FreezeSandbox { sandbox_id: sandbox_id.to_owned(), frozen };
            match self.request_done("FreezeSandbox", wire::request::Body::FreezeSandbox(request)).await {
                // It went before it answered; its successor is asked again.
                Err(LaunchError::Interrupted) => tokio::task::yield_now().await,
                other => return other,
            }
        }
    }

    /// Everything the launcher holds.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn list(&self) -> Result<Vec<ListedSandbox>, LaunchError> {
        self.listed("").await
    }

    /// One sandbox, if the launcher holds it.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn find(&self, sandbox_id: &str) -> Result<Option<ListedSandbox>, LaunchError> {
        // A launcher of an earlier version lists all of them.
        Ok(self.listed(sandbox_id).await?.into_iter().find(|entry| entry.sandbox_id == sandbox_id))
    }

    async fn listed(&self, sandbox_id: &str) -> Result<Vec<ListedSandbox>, LaunchError> {
        const KIND: &str = "ListSandboxes";
        let request = wire::ListSandboxes { sandbox_id: sandbox_id.to_owned() };
        match self.request(KIND, wire::request::Body::ListSandboxes(request)).await? {
            (wire::reply::Body::SandboxList(list), _) => {
                let usable = list.sandboxes.into_iter().filter(|entry| is_file_name(&entry.socket_name));
                Ok(usable.map(frames::listed).collect())
            }
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
            (wire::reply::Body::Inspection(inspection), _) => Ok(frames::inspection(inspection)),
            _ => Err(LaunchError::WrongAnswer { request: KIND }),
        }
    }

    /// What is counted on this side of the connection, of the launcher and of its sandboxes.
    #[must_use]
    pub fn counted(&self) -> &Counters {
        &self.connection.shared.counted
    }

    /// How often the launcher has reached each of its bounds since it was started. One of an earlier version does not say.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn counters(&self) -> Result<BTreeMap<String, u64>, LaunchError> {
        const KIND: &str = "ReadCounters";
        match self.request(KIND, wire::request::Body::ReadCounters(wire::ReadCounters {})).await {
            Ok((wire::reply::Body::Counters(counters), _)) => Ok(frames::counters(counters)),
            Ok(_) => Err(LaunchError::WrongAnswer { request: KIND }),
            Err(LaunchError::Refused { code, .. }) if code == "NOT_SUPPORTED" => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        }
    }

    /// Waits for the ending of a sandbox that another runner made and this one takes over: the launcher tells every runner of
    /// every ending. From here the sandbox is counted on, so that a launcher that comes back keeps it. Called before the
    /// sandbox is looked for in the list, no ending is missed.
    pub fn watch_ending(&self, sandbox_id: &str) -> watch::Receiver<Option<Ended>> {
        let mut table = self.table();
        if let Link::Gone(reason) = &table.link {
            let reason = reason.clone();
            return watch::channel(Some(Ended { wait_status: None, oom_kills: 0, reason })).1;
        }
        table.endings.entry(sandbox_id.to_owned()).or_insert_with(|| watch::channel(None).0).subscribe()
    }

    /// Every sandbox of an earlier runner that is wanted is watched now. From here a launcher that comes back with others is
    /// told to kill them; before, it might be told to kill what the journal is about to name.
    pub fn all_are_known(&self) {
        self.table().all_are_known = true;
    }

    /// Nobody counts on a sandbox that turned out not to exist.
    pub fn stop_watching(&self, sandbox_id: &str) {
        self.table().endings.remove(sandbox_id);
    }

    /// Whether somebody here counts on a sandbox.
    pub fn counts_on(&self, sandbox_id: &str) -> bool {
        self.table().endings.contains_key(sandbox_id)
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
