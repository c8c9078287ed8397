//! Who waits for what: requests without an answer, sandboxes that somebody counts on, and the way to the launcher.
//!
//! The one state that askers and the reading task share. Nothing is awaited under its lock.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use proto::launch::v1 as wire;
use tokio::sync::{oneshot, watch};
use tracing::{debug, warn};

use super::{Ended, LaunchError, frames};
use crate::sandbox::packet::PacketSocket;
use crate::telemetry::Counters;

/// Requests without an answer yet. More than this means the launcher is stuck, and more requests would not help.
pub(super) const MOST_OUTSTANDING: usize = 1024;

#[derive(Debug)]
pub(super) struct Shared {
    next_id: AtomicU64,
    table: Mutex<Table>,
    /// What is counted on this side.
    pub(super) counted: Counters,
    /// Ticks when the link changes.
    pub(super) changed: watch::Sender<()>,
}

pub(super) type Answer = (wire::reply::Body, Vec<OwnedFd>);

/// The way to the launcher at this moment.
#[derive(Debug)]
pub(super) enum Link {
    Up(Arc<PacketSocket>),
    /// It is being looked for; why it went.
    Away(String),
    /// It will not come back.
    Gone(String),
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) link: Link,
    outstanding: HashMap<u64, oneshot::Sender<Answer>>,
    /// Sandboxes that somebody here counts on.
    pub(super) endings: HashMap<String, watch::Sender<Option<Ended>>>,
    /// Those of them that are not made yet.
    pub(super) creating: HashSet<String>,
    /// What an earlier runner left is among `endings` as far as it is wanted. Before that a stranger may be wanted as well.
    pub(super) all_are_known: bool,
}

/// A request that has its place in the table.
pub(super) struct Entered {
    pub(super) request_id: u64,
    pub(super) socket: Arc<PacketSocket>,
    pub(super) answer: oneshot::Receiver<Answer>,
}

impl Shared {
    /// Nobody waits yet.
    pub(super) fn new(socket: Arc<PacketSocket>) -> Self {
        let table = Table {
            link: Link::Up(socket),
            outstanding: HashMap::new(),
            endings: HashMap::new(),
            creating: HashSet::new(),
            all_are_known: false,
        };
        // 1 is the greeting that an embedded launcher has already answered.
        Self {
            next_id: AtomicU64::new(2),
            table: Mutex::new(table),
            counted: Counters::default(),
            changed: watch::channel(()).0,
        }
    }

    /// An id that no request has had.
    pub(super) fn request_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        // Every change under the lock is a single insert or remove, so a panic elsewhere leaves it usable.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` while the launcher is away.
    pub(super) fn try_enter(&self) -> Result<Option<Entered>, LaunchError> {
        let mut table = self.table();
        let socket = match &table.link {
            Link::Up(socket) => Arc::clone(socket),
            Link::Away(_) => return Ok(None),
            Link::Gone(reason) => return Err(LaunchError::Gone { reason: reason.clone() }),
        };
        table.outstanding.retain(|_, waiting| !waiting.is_closed());
        if table.outstanding.len() >= MOST_OUTSTANDING {
            self.counted.add("launcher_requests_refused_total", &[]);
            return Err(LaunchError::Busy);
        }
        let request_id = self.request_id();
        let (sender, answer) = oneshot::channel();
        table.outstanding.insert(request_id, sender);
        Ok(Some(Entered { request_id, socket, answer }))
    }

    /// Gives an answer to whoever waits for it. Returns the sandbox that was made for somebody who has given up.
    pub(super) fn deliver(&self, reply: wire::Reply, descriptors: Vec<OwnedFd>) -> Result<Option<String>, String> {
        let body = reply.body.ok_or("a reply without a body arrived")?;
        if let wire::reply::Body::SandboxEnded(ended) = body {
            self.end_sandbox(&ended);
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

    pub(super) fn end_sandbox(&self, ended: &wire::SandboxEnded) {
        let Some(watching) = self.table().endings.remove(&ended.sandbox_id) else {
            debug!(sandbox_id = ended.sandbox_id, "ending of a sandbox nobody watches was ignored");
            return;
        };
        watching.send_replace(Some(frames::ended(ended)));
    }

    /// Everybody who waits learns that nothing will come any more.
    pub(super) fn close(&self, reason: &str) {
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
    pub(super) fn away(&self, reason: &str) {
        let mut table = self.table();
        table.link = Link::Away(reason.to_owned());
        table.outstanding.clear();
        for sandbox_id in std::mem::take(&mut table.creating) {
            table.endings.remove(&sandbox_id);
        }
    }

    /// The launcher is back with these sandboxes. Returns those that nobody here knows, as soon as that can be told.
    pub(super) fn back(&self, socket: &Arc<PacketSocket>, held: HashSet<String>) -> Vec<String> {
        let mut table = self.table();
        table.endings.retain(|sandbox_id, watching| {
            let lives = held.contains(sandbox_id);
            if !lives {
                let reason = "it was gone when the launcher came back".to_owned();
                watching.send_replace(Some(Ended { wait_status: None, oom_kills: 0, reason }));
            }
            lives
        });
        let is_stranger = |sandbox_id: &String| table.all_are_known && !table.endings.contains_key(sandbox_id);
        let unknown = held.into_iter().filter(is_stranger).collect();
        table.link = Link::Up(Arc::clone(socket));
        drop(table);
        self.changed.send_replace(());
        unknown
    }

    /// Has a sandbox killed that nobody counts on. The answer is of no interest.
    pub(super) async fn discard(&self, socket: &PacketSocket, sandbox_id: String) {
        warn!(sandbox_id, "ending a sandbox that nobody waits for");
        let request_id = self.request_id();
        let body = wire::request::Body::KillSandbox(wire::KillSandbox { sandbox_id });
        let packet = wire::Request { request_id, body: Some(body) }.encode_to_vec();
        if let Err(error) = socket.send(&packet).await {
            debug!(%error, "a sandbox could not be discarded, its launcher is gone");
        }
    }
}

impl Link {
    pub(super) fn problem(&self) -> String {
        match self {
            Self::Up(_) => "the connection was closed".to_owned(),
            Self::Away(reason) | Self::Gone(reason) => reason.clone(),
        }
    }
}
