//! A connector without a transport: frames are bytes that go in and come out, and the simulation decides which of all that
//! can happen next does. It replaces the two `select!` of `task` and `link`, and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use prost::Message;
use tokio::sync::{mpsc, watch};

use super::super::codec;
use super::super::outgoing::{Outgoing, lanes};
use super::super::task::{Event, PENDING, Task};
use super::super::{Capacity, Identity, LinkError, LinkStatus, Settings, Stop};
use super::{Greeting, HANDSHAKE, Lanes, Link, Obeying};
use crate::connector::Ports;
use crate::connector::backoff::Backoff;
use crate::connector::dial::Target;
use crate::connector::tls::{Credentials, TlsFiles};
use crate::telemetry::Counters;
use crate::work::{Memory, OutputSource, Pressure, Progress, RunnerId, Update, WorkItem};

/// More than any step of the simulation tells.
const UPDATES: usize = 1 << 14;

/// Why a link is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Over {
    /// The other side has not kept to the protocol, as far as this one can tell.
    Violation(String),
    /// Anything else.
    Ended(String),
}

impl From<LinkError> for Over {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Violation(problem) => Self::Violation(problem),
            refused @ LinkError::Refused { .. } => Self::Violation(refused.to_string()),
            other => Self::Ended(other.to_string()),
        }
    }
}

enum Phase {
    Idle,
    /// Greeted, and nobody is there yet.
    Dialling(Lanes, Outgoing, Greeting),
    Linked(Box<Linked>),
}

struct Linked {
    link: Link,
    outgoing: Outgoing,
    obeying: Option<Obeying>,
}

/// The connector.
pub(crate) struct Connector {
    task: Task,
    phase: Phase,
    updates: mpsc::Sender<Update>,
    progress: Progress,
    // Closed channels would be events of their own.
    _stop: watch::Sender<Stop>,
    _credentials: watch::Sender<Credentials>,
    _status: watch::Receiver<LinkStatus>,
    _work: mpsc::Receiver<WorkItem>,
    _pressure: watch::Sender<Arc<Pressure>>,
}

impl Connector {
    pub(crate) fn new(
        outputs: Arc<dyn OutputSource>,
        memory: Arc<dyn Memory>,
        instance: String,
        credentials: Credentials,
        clock: fn() -> u64,
    ) -> Self {
        let (work_sender, work) = mpsc::channel(1);
        let (updates, updates_end) = mpsc::channel(UPDATES);
        let (stop, stopped) = watch::channel(Stop::Run);
        let (credentials_sender, credentials) = watch::channel(credentials);
        let (status_sender, status) = watch::channel(LinkStatus::default());
        let progress = Progress::default();
        let (pressure_sender, pressure) = watch::channel(Arc::default());
        let progress_of_sessions = progress.clone();
        let ports = Ports {
            work: work_sender,
            updates: updates_end,
            outputs,
            progress: progress_of_sessions,
            memory,
            pressure,
            counters: Counters::default(),
        };
        let mut task = Task::new(settings(instance, clock), ports, stopped, credentials, status_sender);
        task.reserve_events();
        Self {
            task,
            phase: Phase::Idle,
            updates,
            progress,
            _stop: stop,
            _credentials: credentials_sender,
            _status: status,
            _work: work,
            _pressure: pressure_sender,
        }
    }

    /// The sessions say something.
    pub(crate) fn tell(&self, update: Update) {
        self.progress.tick();
        self.updates.try_send(update).expect("the simulation lets the connector hear in time");
    }

    /// What was said and not heard.
    pub(crate) fn unheard(&self) -> usize {
        self.task.ports.updates.len()
    }

    /// Hears one thing of the sessions.
    pub(crate) fn hear(&mut self) -> Result<(), Over> {
        if self.is_blocked() {
            return Ok(());
        }
        let Ok(update) = self.task.ports.updates.try_recv() else { return Ok(()) };
        self.take(Event::Update(Some(update)));
        self.fill()
    }

    /// Numbers that were reserved, and the clock.
    pub(crate) fn look_around(&mut self) -> Result<(), Over> {
        self.progress.tick();
        if self.is_blocked() {
            return Ok(());
        }
        let reserved = self.task.reserving.as_mut().and_then(|reserving| reserving.now_or_never());
        if let Some(reserved) = reserved {
            self.take(Event::Reserved(reserved));
        }
        if self.task.tick.tick().now_or_never().is_some() {
            self.take(Event::Tick);
        }
        self.fill()
    }

    /// The next thing that the sessions are to do.
    pub(crate) fn work(&mut self) -> Option<WorkItem> {
        if self.is_blocked() { None } else { self.task.pending.pop_front() }
    }

    /// Whether everything that an earlier process left is known and there is no link.
    pub(crate) fn may_dial(&self) -> bool {
        self.task.restored && matches!(self.phase, Phase::Idle)
    }

    /// Greets, and waits for somebody to greet.
    pub(crate) fn dial(&mut self) -> Result<(), Over> {
        let (lanes, outgoing) = lanes();
        self.task.replies.clear();
        let greeting = self.task.greet(&lanes, self.task.reason)?;
        self.phase = Phase::Dialling(lanes, outgoing, greeting);
        Ok(())
    }

    pub(crate) fn is_dialling(&self) -> bool {
        matches!(self.phase, Phase::Dialling(..))
    }

    /// Somebody is there.
    pub(crate) fn connect(&mut self) {
        if let Phase::Dialling(lanes, outgoing, greeting) = std::mem::replace(&mut self.phase, Phase::Idle) {
            let link = Link::new(lanes, greeting, [0; 32], self.progress.count());
            self.phase = Phase::Linked(Box::new(Linked { link, outgoing, obeying: None }));
        }
    }

    /// Whether it would take a frame now.
    pub(crate) fn reads(&self) -> bool {
        match &self.phase {
            Phase::Linked(linked) => linked.obeying.is_none() && self.task.pending.len() < PENDING,
            Phase::Idle | Phase::Dialling(..) => false,
        }
    }

    /// Takes a frame.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> Result<(), Over> {
        let Phase::Linked(linked) = &mut self.phase else { return Ok(()) };
        self.task.incoming(codec::take(bytes), &mut linked.link)?;
        linked.obeying = linked.link.obeying.take();
        self.fill()
    }

    /// Whatever a link waits for beside frames: the term on the disk, the time of a heartbeat, output that was read.
    pub(crate) fn turn(&mut self) -> Result<(), Over> {
        let Phase::Linked(linked) = &mut self.phase else { return Ok(()) };
        if let Some(Obeying { welcome, written }) = &mut linked.obeying {
            let Some(is_written) = written.now_or_never() else { return Ok(()) };
            self.task.obey(welcome, is_written, &mut linked.link)?;
            linked.obeying = None;
        }
        if !linked.link.live && linked.link.opened_at.elapsed() >= HANDSHAKE {
            return Err(Over::Ended("no handshake in time".into()));
        }
        if linked.link.live && linked.link.heartbeat.tick().now_or_never().is_some() {
            self.task.beat(&mut linked.link)?;
        }
        if let Some(Some((piece, chunk))) = linked.link.reads.next().now_or_never() {
            self.task.piece(&mut linked.link, &piece, chunk)?;
        }
        self.fill()
    }

    /// The next frame that leaves.
    pub(crate) fn send(&mut self) -> Option<Vec<u8>> {
        let Phase::Linked(linked) = &mut self.phase else { return None };
        linked.outgoing.next().now_or_never().flatten().map(|frame| frame.encode_to_vec())
    }

    /// The link is gone.
    pub(crate) fn hang_up(&mut self) {
        self.phase = Phase::Idle;
    }

    /// Everything that may happen on it happens, because the orchestrator has said so.
    pub(crate) fn is_live(&self) -> bool {
        matches!(&self.phase, Phase::Linked(linked) if linked.link.live && linked.obeying.is_none())
    }

    pub(crate) fn highest_term(&self) -> u64 {
        self.task.highest_term
    }

    /// Nothing is owed to the orchestrator.
    pub(crate) fn is_delivered(&self) -> bool {
        self.task.is_delivered()
    }

    /// What is owed, for people.
    pub(crate) fn owed(&self) -> String {
        let (events, orders) = (self.task.outbox.len(), self.task.pending.len());
        format!("{events} events, {orders} orders, {:?}", self.task.book)
    }

    /// While the term is on its way to the disk nothing else happens on a link.
    fn is_blocked(&self) -> bool {
        matches!(&self.phase, Phase::Linked(linked) if linked.obeying.is_some())
    }

    fn take(&mut self, event: Event) {
        match &mut self.phase {
            Phase::Linked(linked) => self.task.take_on_link(event, &mut linked.link),
            Phase::Idle | Phase::Dialling(..) => self.task.take(event),
        }
    }

    fn fill(&mut self) -> Result<(), Over> {
        match &mut self.phase {
            Phase::Linked(linked) if linked.obeying.is_none() => Ok(self.task.fill(&mut linked.link)?),
            _ => Ok(()),
        }
    }
}

fn settings(instance_id: String, clock: fn() -> u64) -> Settings {
    Settings {
        target: Target { host: "simulated".into(), port: 1, server_name: None, proxy: None },
        tls: TlsFiles { authorities: "".into(), certificate: "".into(), key: "".into() },
        identity: Identity {
            runner_id: RunnerId::new("simulated").expect("an id"),
            state_id: "simulated".into(),
            instance_id,
            boot_id: "boot".into(),
            kernel: "simulated".into(),
        },
        labels: BTreeMap::new(),
        capacity: Capacity::default(),
        receipt: Default::default(),
        ephemeral: false,
        renewal: None,
        backoff: Backoff::new(Duration::from_millis(1), Duration::from_millis(20)),
        clock,
    }
}
