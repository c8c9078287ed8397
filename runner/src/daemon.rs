//! The composition root: the only place that builds the parts and joins them with channels.
//!
//! It also owns the order of the end: no new work, calls end, results are delivered and acknowledged, goodbye.

pub mod loopback;
mod route;
pub mod settings;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::admin;
use crate::connector::Ports;
use crate::connector::claude::{self, QueueError};
use crate::connector::orchestrator::{self, Handle, LinkStatus, Settings, Stop};
use crate::connector::tls::TlsError;
use crate::journal::{Journal, JournalMemory, Recovered};
use crate::pressure::{self, watch::Watch};
use crate::session::core::{Config as CoreConfig, IdlePolicy};
use crate::session::registry::{Registry, Reserve};
use crate::session::{SessionHandle, Sessions};
use crate::shutdown::{Signal, Signals};
use crate::systemd::{Notifier, Watchdog};
use crate::work::{DrainMode, DrainedBy, Memory, ResourceLimits, Sandboxes, Trouble, WorkItem};
use route::Routes;

/// Time to end sandboxes after patience with calls has ended.
const CLOSE_TIME: Duration = Duration::from_secs(10);
/// Time to deliver results after the last sandbox has gone.
const DELIVERY_TIME: Duration = Duration::from_secs(5);

/// How often a daemon asks itself whether it serves anybody.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

/// What a daemon is made of.
pub struct Parts {
    /// Where sandboxes come from.
    pub sandboxes: Arc<dyn Sandboxes>,
    /// Where calls are written down.
    pub journal: Arc<dyn Journal>,
    /// What an earlier runner left there.
    pub recovered: Recovered,
    /// What is set aside for sandboxes.
    pub reserve: Reserve,
    /// Limits of a session that names none.
    pub defaults: ResourceLimits,
    /// What becomes of sessions without calls.
    pub idle: IdlePolicy,
    /// What of the host is looked at, and when it is short of it.
    pub pressure: pressure::watch::Settings,
    /// The link; a runner without one serves its administration socket only.
    pub link: Option<Settings>,
    /// Work queues that are served.
    pub queues: Vec<claude::Settings>,
    /// Where the administration socket is put.
    pub admin: Option<AdminSocket>,
    /// How long accepted calls may go on after a signal to end.
    pub drain_time: Duration,
}

/// Where the administration socket is put, and for whom.
#[derive(Debug, Clone)]
pub struct AdminSocket {
    /// Its path.
    pub path: PathBuf,
    /// Its user; root may come in as well.
    pub own_uid: u32,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").field("reserve", &self.reserve).field("admin", &self.admin).finish_non_exhaustive()
    }
}

/// Why a daemon could not begin.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The certificates are not usable.
    #[error("the certificates of the link cannot be used")]
    Certificates(#[from] TlsError),
    /// A work queue cannot be served.
    #[error("work queue of {environment_id}: {source}")]
    Queue {
        /// The environment.
        environment_id: String,
        /// Why.
        source: QueueError,
    },
    /// The administration socket cannot be made.
    #[error(transparent)]
    Admin(#[from] admin::SocketError),
}

/// Why a daemon ended without having been asked to.
#[derive(Debug, thiserror::Error)]
pub enum Unasked {
    /// There is nothing left to serve with.
    #[error("the launcher is gone ({0}), and with it every sandbox; start the runner again")]
    LauncherGone(String),
    /// Nothing is left to be finished, and nothing new can be taken.
    #[error("the journal is broken ({0}), and no session is left; look at the disk, and start the runner again")]
    JournalBroken(String),
}

/// How a daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// In order: nothing of it is left.
    Done,
    /// Its sandboxes and calls are there for the next runner. Whoever holds them here must not drop them, because that
    /// would end them.
    Left,
}

/// A daemon whose parts are joined.
pub struct Daemon {
    sessions: SessionHandle,
    link: Option<Handle>,
    queues: Vec<claude::Handle>,
    stop: watch::Sender<Stop>,
    admin: Option<(tokio::task::JoinHandle<()>, PathBuf)>,
    drain_time: Duration,
    sandboxes: Arc<dyn Sandboxes>,
    memory: Arc<dyn Memory>,
    _pressure: Watch,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("link", &self.link).finish_non_exhaustive()
    }
}

impl Daemon {
    /// Builds and joins everything, and begins to dial.
    ///
    /// # Errors
    /// `DaemonError`; what was begun ends with the runtime.
    pub fn start(parts: Parts) -> Result<Self, DaemonError> {
        let (sandboxes, receipt) = (Arc::clone(&parts.sandboxes), parts.sandboxes.receipt());
        let counted = admin::Counted { journal: Arc::clone(&parts.journal), sandboxes: Arc::clone(&sandboxes) };
        let memory: Arc<dyn Memory> = Arc::new(JournalMemory::new(Arc::clone(&parts.journal), &parts.recovered));
        let sessions = Sessions {
            config: CoreConfig { idle: parts.idle, ..CoreConfig::default() },
            registry: Registry::new(parts.reserve, parts.defaults),
            sandboxes: parts.sandboxes,
            journal: parts.journal,
            recovered: parts.recovered,
            clock: settings::boottime_ns,
        };
        let (handle, updates) = sessions.start();
        let pressure = pressure::watch::start(parts.pressure, Arc::clone(&memory), handle.work.clone());
        let (stop, stopped) = watch::channel(Stop::Run);
        let ports = |updates| Ports {
            work: handle.work.clone(),
            updates,
            outputs: Arc::new(handle.outputs.clone()),
            progress: handle.progress.clone(),
            memory: Arc::clone(&memory),
            pressure: pressure.pressure.clone(),
            counters: handle.counters.clone(),
        };
        let (mut routes, sessions) = Routes::new();
        let neighbours = claude::Neighbours { sessions, claims: Arc::default() };
        let mut queues = Vec::new();
        for settings in parts.queues {
            let environment_id = settings.environment_id.clone();
            let updates = routes.queue(claude::scope(&environment_id));
            let started = claude::start(settings, ports(updates), neighbours.clone(), stopped.clone());
            queues.push(started.map_err(|source| DaemonError::Queue { environment_id, source })?);
        }
        let link = match parts.link {
            // Nobody else listens, so nobody stands between.
            Some(settings) if queues.is_empty() => Some(orchestrator::start(settings, ports(updates), stopped)?),
            Some(settings) => {
                let own = routes.orchestrator();
                tokio::spawn(routes.run(updates));
                Some(orchestrator::start(settings, ports(own), stopped)?)
            }
            None => {
                tokio::spawn(routes.run(updates));
                // Nobody else will say so.
                let work = handle.work.clone();
                tokio::spawn(async move { work.send(WorkItem::Resume { session_id: None }).await });
                None
            }
        };
        let status = link.as_ref().map(|link| link.status.clone());
        let admin = parts
            .admin
            .map(|AdminSocket { path, own_uid }| {
                let (sessions, pressure) = (handle.clone(), pressure.pressure.clone());
                let own = path.clone();
                let queues = queues.iter().map(|queue| queue.board.clone()).collect();
                let link = status;
                let clock = settings::boottime_ns;
                let parts = admin::Parts { path, own_uid, sessions, link, queues, clock, receipt, pressure, counted };
                Ok::<_, admin::SocketError>((admin::serve(parts)?, own))
            })
            .transpose()?;
        let drain_time = parts.drain_time;
        Ok(Self { sessions: handle, link, queues, stop, admin, drain_time, sandboxes, memory, _pressure: pressure })
    }

    /// The sessions, for those who run a daemon inside another program.
    #[must_use]
    pub fn sessions(&self) -> &SessionHandle {
        &self.sessions
    }

    /// State of the link, if there is one.
    #[must_use]
    pub fn link(&self) -> Option<watch::Receiver<LinkStatus>> {
        self.link.as_ref().map(|link| link.status.clone())
    }

    /// Serves until a signal asks for the end, then ends in order.
    ///
    /// # Errors
    /// [`Unasked`]: whoever supervises this process should start another. What is finished was delivered as at any other end.
    pub async fn run(self, mut signals: Signals, notifier: &Notifier) -> Result<End, Unasked> {
        notifier.ready();
        info!("runner started");
        let mut watchdog = Watchdog::new(self.sessions.progress.clone());
        let mut gone = self.sandboxes.gone();
        let every = notifier.watchdog_every();
        let mut health = tokio::time::interval(HEALTH_INTERVAL);
        let mut feed = tokio::time::interval(every.unwrap_or(Duration::from_secs(3600)));
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Reload => {
                        if let Some(link) = &self.link {
                            link.reload.notify_one();
                        }
                        self.queues.iter().for_each(|queue| queue.reload.notify_one());
                    }
                    Signal::Drain => break,
                    Signal::Leave if self.sandboxes.outlive_us() => {
                        notifier.stopping();
                        self.leave().await;
                        return Ok(End::Left);
                    }
                    Signal::Leave => {
                        warn!("nothing here outlives this process, so it ends in order");
                        break;
                    }
                    Signal::Now => {
                        let sandboxes = Arc::clone(&self.sandboxes);
                        tokio::join!(sandboxes.end_unknown(), self.end(Duration::ZERO));
                        return Ok(End::Done);
                    }
                },
                reason = &mut gone => {
                    notifier.stopping();
                    self.end(Duration::ZERO).await;
                    return Err(Unasked::LauncherGone(reason));
                }
                _ = health.tick() => if let Some(reason) = self.is_spent().await {
                    notifier.stopping();
                    self.end(Duration::ZERO).await;
                    return Err(Unasked::JournalBroken(reason));
                },
                () = over(&self.queues) => break,
                _ = feed.tick(), if every.is_some() => {
                    if watchdog.has_moved() {
                        notifier.alive();
                    } else {
                        warn!("the session loop makes no progress, the watchdog is not fed");
                    }
                }
            }
        }
        notifier.stopping();
        info!("emptying the runner");
        let patience = self.drain_time;
        let hurry = Notify::new();
        let mut hurried = false;
        let sandboxes = Arc::clone(&self.sandboxes);
        // Nobody shall have to look for what an earlier runner has left either.
        let mut ending = std::pin::pin!(async {
            tokio::join!(sandboxes.end_unknown(), self.end_within(patience, &hurry));
        });
        loop {
            tokio::select! {
                () = &mut ending => return Ok(End::Done),
                signal = signals.next() => if matches!(signal, Signal::Drain | Signal::Now) {
                    if std::mem::replace(&mut hurried, true) {
                        warn!("third signal, ending without delivering what is left");
                        return Ok(End::Done);
                    }
                    hurry.notify_one();
                },
                _ = feed.tick(), if every.is_some() => if watchdog.has_moved() { notifier.alive() },
            }
        }
    }

    /// Ends in order: accepted calls within `patience`, then sandboxes, then delivery, then the link.
    pub async fn end(self, patience: Duration) {
        self.end_within(patience, &Notify::new()).await;
    }

    /// The same, and what still runs is ended when `hurry` says so. Its results are delivered all the same.
    async fn end_within(self, patience: Duration, hurry: &Notify) {
        self.queues.iter().for_each(|queue| queue.ending.notify_one());
        if !patience.is_zero() {
            tokio::select! {
                () = self.drain(DrainMode::FinishCalls, patience) => {}
                () = hurry.notified() => warn!("second signal, what still runs is ended"),
            }
        }
        self.drain(DrainMode::Now, CLOSE_TIME).await;
        self.stop.send_replace(Stop::WhenDelivered);
        let mut tasks: Vec<_> = self.queues.into_iter().map(|queue| queue.task).collect();
        tasks.extend(self.link.map(|link| link.task));
        if !all_end_within(DELIVERY_TIME, &mut tasks).await {
            warn!("results could not be delivered in time");
            self.stop.send_replace(Stop::Now);
            if !all_end_within(DELIVERY_TIME, &mut tasks).await {
                tasks.iter().for_each(tokio::task::JoinHandle::abort);
            }
        }
        end_admin(self.admin);
        info!("runner ended");
    }

    /// Why this process serves nobody any more: a journal that is broken stays so until another process reads it again.
    async fn is_spent(&self) -> Option<String> {
        let (Some(Trouble::Broken(reason)), _) = self.memory.trouble() else { return None };
        self.sessions.view().await.is_some_and(|view| view.spent).then_some(reason)
    }

    /// Ends the link and nothing else.
    async fn leave(self) {
        self.stop.send_replace(Stop::Leave);
        let mut tasks: Vec<_> = self.queues.into_iter().map(|queue| queue.task).collect();
        tasks.extend(self.link.map(|link| link.task));
        if !all_end_within(DELIVERY_TIME, &mut tasks).await {
            tasks.iter().for_each(tokio::task::JoinHandle::abort);
        }
        end_admin(self.admin);
        info!("runner left, its sandboxes wait for the next one");
    }

    /// Asks for a drain and waits until no session is left, or time is over.
    async fn drain(&self, mode: DrainMode, time: Duration) {
        let by = DrainedBy::Operator;
        if self.sessions.work.send(WorkItem::Drain { mode, by }).await.is_err() {
            return;
        }
        let until = Instant::now() + time;
        while Instant::now() < until {
            match self.sessions.view().await {
                Some(view) if !view.sessions.is_empty() => tokio::time::sleep(Duration::from_millis(50)).await,
                _ => return,
            }
        }
    }
}

/// Waits until the one work item that was to be served is over. Queues are never over.
async fn over(queues: &[claude::Handle]) {
    match queues.iter().find_map(|queue| queue.over.as_ref()) {
        Some(over) => over.notified().await,
        None => std::future::pending().await,
    }
}

fn end_admin(admin: Option<(tokio::task::JoinHandle<()>, PathBuf)>) {
    let Some((task, path)) = admin else { return };
    task.abort();
    if let Err(error) = std::fs::remove_file(&path) {
        warn!(%error, "administration socket could not be removed");
    }
}

/// Waits for connectors to end; those that have are taken out.
async fn all_end_within(time: Duration, tasks: &mut Vec<tokio::task::JoinHandle<()>>) -> bool {
    let until = Instant::now() + time;
    while let Some(task) = tasks.last_mut() {
        if tokio::time::timeout_at(until, task).await.is_err() {
            return false;
        }
        tasks.pop();
    }
    true
}
