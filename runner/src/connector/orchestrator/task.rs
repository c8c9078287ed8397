//! The task that outlives links: it dials, waits, serves, and at all times takes what the sessions report.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::runner_frame::Body;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::book::Book;
use super::lease::Lease;
use super::link::Link;
use super::outbox::{Bound, Outbox};
use super::{LinkError, LinkStatus, Settings, Stop, encode};
use crate::connector::Ports;
use crate::connector::backoff::{Backoff, draw};
use crate::connector::tls::Credentials;
use crate::connector::transport::connect;
use crate::work::{BoxFuture, Code, DrainMode, DrainedBy, RequestKind, SessionId, Update, WorkItem};

/// Work that waits for the sessions. When it is full, no more frames are read from the link.
pub(super) const PENDING: usize = 256;
/// Questions for sandboxes that wait for a place on the link.
pub(super) const MOST_QUESTIONS: usize = 64;
/// After a refusal for good reasons there is no hurry, but an operator may repair it at any time.
const REFUSED_DELAY: Duration = Duration::from_secs(60);

/// How long sandboxes live beyond a lease when neither session nor orchestrator say; as the launcher's policy has it.
const ORPHAN_TIME: Duration = Duration::from_secs(8100);

/// What survives a link.
pub(super) struct Task {
    pub(super) settings: Settings,
    pub(super) ports: Ports,
    pub(super) stop: watch::Receiver<Stop>,
    pub(super) credentials: watch::Receiver<Credentials>,
    pub(super) status: watch::Sender<LinkStatus>,
    pub(super) outbox: Outbox,
    pub(super) book: Book,
    pub(super) lease: Lease,
    pub(super) pending: VecDeque<WorkItem>,
    /// Replies that are not events: of use on the link that asked, and on the one that was greeted before they were known.
    pub(super) replies: VecDeque<Body>,
    /// What sandboxes are to be asked about slots, on the link that asked.
    pub(super) questions: VecDeque<(u64, SessionId)>,
    pub(super) highest_term: u64,
    pub(super) link_id: String,
    /// How long sandboxes live beyond the lease when nobody says more.
    pub(super) orphan_time: Duration,
    pub(super) reason: pb::HelloReason,
    /// How far emptying this runner has come, while it is being emptied.
    pub(super) drain_status: Option<pb::DrainStatus>,
    /// When the orchestrator's patience with a drain ends, by the clock of the lease.
    pub(super) drain_deadline_ns: Option<u64>,
    suspended: bool,
    /// What an earlier process left is known, so that the first greeting can name all of it.
    pub(super) restored: bool,
    /// Numbers of events that are being reserved.
    pub(super) reserving: Option<BoxFuture<'static, Reserved>>,
    updates_open: bool,
    pub(super) tick: tokio::time::Interval,
}

/// What can happen whether or not there is a link.
pub(super) enum Event {
    Update(Option<Update>),
    /// Numbers of events are reserved.
    Reserved(Reserved),
    WorkTaken,
    Tick,
    Stop,
    Certificate,
}

impl Task {
    pub(super) fn new(
        settings: Settings,
        ports: Ports,
        stop: watch::Receiver<Stop>,
        credentials: watch::Receiver<Credentials>,
        status: watch::Sender<LinkStatus>,
    ) -> Self {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let highest_term = ports.memory.term();
        let outbox = Outbox::new(Bound::default(), ports.memory.events_through());
        Self {
            settings,
            ports,
            stop,
            credentials,
            status,
            outbox,
            book: Book::default(),
            lease: Lease::new(),
            pending: VecDeque::new(),
            replies: VecDeque::new(),
            questions: VecDeque::new(),
            highest_term,
            link_id: String::new(),
            orphan_time: ORPHAN_TIME,
            reason: pb::HelloReason::FirstStart,
            drain_status: None,
            drain_deadline_ns: None,
            // Until the first lease nothing that an earlier process took goes on.
            suspended: true,
            restored: false,
            reserving: None,
            updates_open: true,
            tick,
        }
    }

    pub(super) async fn run(mut self) {
        let mut backoff = self.settings.backoff.clone();
        let mut delay = Duration::ZERO;
        self.reserve_events();
        while !self.restored && self.updates_open && !self.must_stop() {
            let event = self.next_event().await;
            self.take(event);
        }
        if self.ports.memory.is_after_reboot() {
            self.reason = pb::HelloReason::HostReboot;
        } else if self.ports.memory.events_through() > 0 {
            self.reason = pb::HelloReason::DaemonRestart;
        }
        while !self.must_stop() {
            let started = Instant::now();
            let ended = self.one_link(delay).await;
            self.status.send_modify(|status| status.connected = false);
            backoff.link_lived(started.elapsed().saturating_sub(delay));
            delay = match ended {
                Ok(Ended::Said | Ended::Left) => return,
                Ok(Ended::Sent(after)) => {
                    self.dial_because(pb::HelloReason::GoAway);
                    after
                }
                Err(error) => {
                    self.dial_because(pb::HelloReason::Reconnect);
                    let delay = delay_after(&error, &mut backoff);
                    self.tell_of(&error, delay);
                    delay
                }
            };
        }
    }

    /// What has become of a link, for the log and for people.
    fn tell_of(&self, error: &LinkError, delay: Duration) {
        let (problem, refusal) = (error.to_string(), error.refusal());
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.ports.counters.add("links_lost_total", &[("reason", error.reason())]);
        match refusal {
            Some(refusal) => error!(
                refusal = refusal.name(),
                error = %problem,
                remediation = refusal.remediation(),
                delay_ms,
                "the orchestrator refuses this runner, will ask again"
            ),
            None => warn!(error = %problem, delay_ms, "no link to the orchestrator, will dial again"),
        }
        self.status.send_modify(|status| (status.problem, status.refusal) = (problem, refusal));
    }

    /// Why this process has begun is said until an orchestrator has heard it.
    fn dial_because(&mut self, reason: pb::HelloReason) {
        if self.status.borrow().links > 0 {
            self.reason = reason;
        }
    }

    /// Waits, dials and serves one link.
    async fn one_link(&mut self, delay: Duration) -> Result<Ended, LinkError> {
        let (lanes, outgoing) = super::outgoing::lanes();
        let target = self.settings.target.clone();
        let mut receiver = self.credentials.clone();
        let connecting = async move {
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                // Whatever it is that was refused, another certificate may not be.
                Ok(()) = receiver.changed() => {}
            }
            let credentials = receiver.borrow_and_update().clone();
            let channel = connect(&target, Arc::clone(&credentials.config)).await?;
            let incoming = super::open_link(target.host, channel, outgoing).await?;
            Ok::<_, LinkError>((incoming, credentials.digest()))
        };
        tokio::pin!(connecting);
        // Whoever asked on an earlier link asks again, unless what he asked for is named in the greeting: then he waits for the
        // answer, which may come before there is a link.
        self.replies.clear();
        self.questions.clear();
        // The greeting waits in the lanes: it leaves as soon as there is somebody to greet.
        let greeting = self.greet(&lanes, self.reason)?;
        let (incoming, certificate) = loop {
            tokio::select! {
                opened = &mut connecting => break opened?,
                event = self.next_event() => {
                    self.take(event);
                    let delivered = *self.stop.borrow() == Stop::WhenDelivered && self.is_delivered();
                    if delivered || self.must_stop() {
                        return Ok(Ended::Said);
                    }
                }
            }
        };
        info!(host = %self.settings.target.host, "link opened");
        let link = Link::new(lanes, greeting, certificate, self.ports.progress.count());
        self.serve(link, incoming).await
    }

    /// Waits for the next thing that concerns everybody. Safe to drop at any point.
    pub(super) async fn next_event(&mut self) -> Event {
        tokio::select! {
            update = self.ports.updates.recv(), if self.updates_open => Event::Update(update),
            reserved = maybe(&mut self.reserving), if self.reserving.is_some() => Event::Reserved(reserved),
            permit = self.ports.work.reserve(), if !self.pending.is_empty() => {
                if let (Ok(permit), Some(item)) = (permit, self.pending.pop_front()) {
                    permit.send(item);
                }
                Event::WorkTaken
            }
            _ = self.tick.tick() => Event::Tick,
            Ok(()) = self.stop.changed() => Event::Stop,
            Ok(()) = self.credentials.changed() => Event::Certificate,
        }
    }

    /// Takes what happened. Never waits.
    pub(super) fn take(&mut self, event: Event) {
        match event {
            Event::Update(Some(update)) => {
                self.update(update);
                self.reserve_events();
            }
            Event::Reserved(Reserved { through, done }) => {
                self.reserving = None;
                if done {
                    self.outbox.reserve(through);
                } else {
                    warn!(
                        "the journal refuses to reserve numbers of events; when the present ones are used up, nothing more is told"
                    );
                }
            }
            Event::Update(None) => self.updates_open = false,
            Event::Tick => self.tick(),
            Event::WorkTaken | Event::Stop | Event::Certificate => {}
        }
    }

    fn tick(&mut self) {
        if !self.suspended && self.lease.has_lapsed((self.settings.clock)()) {
            warn!("lease lapsed, nothing new is started");
            self.suspended = true;
            self.pending.push_back(WorkItem::Suspend { session_id: None });
        }
        if self.drain_deadline_ns.is_some_and(|deadline_ns| (self.settings.clock)() >= deadline_ns) {
            info!("the time for emptying this runner is over, what is left is ended");
            self.drain_deadline_ns = None;
            self.pending.push_back(WorkItem::Drain { mode: DrainMode::Now, by: DrainedBy::Orchestrator });
        }
    }

    /// The lease was renewed.
    pub(super) fn renewed(&mut self) {
        if let Some(until_ns) = self.lease.until_ns() {
            self.pending.push_back(WorkItem::Lease { session_id: None, until_ns, orphan_time: self.orphan_time });
        }
        if self.suspended && !self.lease.has_lapsed((self.settings.clock)()) {
            info!("lease renewed, work goes on");
            self.suspended = false;
            self.pending.push_back(WorkItem::Resume { session_id: None });
        }
    }

    pub(super) fn reserve_events(&mut self) {
        if self.reserving.is_none()
            && let Some(through) = self.outbox.to_reserve()
        {
            let reserved = self.ports.memory.reserve_events(through);
            self.reserving = Some(Box::pin(async move { Reserved { through, done: reserved.await } }));
        }
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::SessionRestored { session_id, epoch, ready, acknowledged } => {
                self.book.session_restored(session_id, epoch, ready, acknowledged);
            }
            Update::CallRestored { call_id, session_id, digest, quiet, phase } => {
                self.book.call_restored(call_id, session_id, (digest, quiet), phase);
            }
            Update::Restored => self.restored = true,
            Update::SessionOpened { session_id, epoch, receipt, replay } => {
                self.book.session_opened(session_id.clone(), epoch);
                let receipt = Some(encode::receipt_to_wire(&receipt));
                self.outbox.push(None, |event_seq| {
                    Body::SessionOpened(pb::SessionOpened {
                        event_seq,
                        session_id: session_id.to_string(),
                        epoch,
                        environment_digest: String::new(),
                        receipt,
                        duplicate: replay == crate::work::Replay::Duplicate,
                    })
                });
            }
            Update::SessionEnded { session_id, epoch, end } => {
                self.book.session_ended(&session_id, epoch);
                self.outbox.push(None, |seq| encode::session_end(seq, session_id.to_string(), epoch, &end));
            }
            Update::CallAccepted { call_id, epoch, replay, phase, .. } => {
                self.book.call_accepted(&call_id);
                self.outbox.push(None, |event_seq| {
                    Body::CallAccepted(pb::CallAccepted {
                        event_seq,
                        call_id: call_id.to_string(),
                        epoch,
                        duplicate: replay == crate::work::Replay::Duplicate,
                        phase: encode::phase_to_wire(phase).into(),
                    })
                });
            }
            Update::CallStarted { call_id, epoch, boottime_ns, shell_generation, .. } => {
                self.book.call_started(&call_id);
                self.outbox.push(None, |event_seq| {
                    Body::CallStarted(pb::CallStarted {
                        event_seq,
                        call_id: call_id.to_string(),
                        epoch,
                        started_boottime_ns: boottime_ns,
                        shell_generation,
                    })
                });
            }
            Update::OutputAdvanced { call_id, lengths, .. } => self.book.advanced(&call_id, &lengths),
            Update::CallFinished { call_id, session_id, epoch, result } => {
                self.book.finished(&call_id, &result.end.streams, result.presented.content.is_empty());
                self.outbox.push(Some(call_id.clone()), |seq| {
                    encode::finished(seq, call_id.to_string(), session_id.to_string(), epoch, &result)
                });
            }
            Update::CancelNoted { call_id, epoch, phase } => {
                let phase = phase.map_or(pb::CallPhase::Unspecified, encode::phase_to_wire).into();
                self.outbox.push(None, |event_seq| {
                    Body::CancelNoted(pb::CancelNoted { event_seq, call_id: call_id.to_string(), epoch, phase })
                });
            }
            Update::Refused { request, session_id, call_id, epoch, failure } => {
                match (request, &session_id, &call_id) {
                    (RequestKind::Open, Some(session_id), _) => self.book.open_refused(session_id, epoch),
                    // The same id under another request is known by its first request, which goes on.
                    (RequestKind::Call, _, Some(call_id)) if failure.code != Code::CallIdReused => {
                        self.book.call_refused(call_id);
                    }
                    _ => {}
                }
                let text = |id: Option<String>| id.unwrap_or_default();
                let (session_id, call_id) = (session_id.map(|id| id.to_string()), call_id.map(|id| id.to_string()));
                self.reply(encode::refused(request, text(session_id), text(call_id), epoch, &failure));
            }
            Update::StdinAccepted { call_id, accepted } => {
                self.reply(Body::StdinAccepted(pb::StdinAccepted { call_id: call_id.to_string(), accepted }));
            }
            Update::Drained { draining, sessions_left, calls_left } => {
                let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
                self.drain_status = draining.then(|| pb::DrainStatus {
                    sessions_left: count(sessions_left),
                    calls_left: count(calls_left),
                    complete: sessions_left == 0,
                });
                self.tell_drain_status();
            }
        }
    }

    /// Says how far a drain has come: when that changes, and on each new link, because the last word may be lost with a link.
    pub(super) fn tell_drain_status(&mut self) {
        if let Some(status) = self.drain_status {
            self.reply(Body::DrainStatus(status));
        }
    }

    /// Keeps a reply for the link that was greeted last.
    pub(super) fn reply(&mut self, body: Body) {
        if self.replies.len() < super::outgoing::CONTROL {
            self.replies.push_back(body);
        }
    }

    fn must_stop(&self) -> bool {
        matches!(*self.stop.borrow(), Stop::Now | Stop::Leave)
    }

    /// The link is to end, now or soon.
    pub(super) fn is_stopping(&self) -> bool {
        *self.stop.borrow() != Stop::Run
    }

    /// Nothing is owed to the orchestrator.
    pub(super) fn is_delivered(&self) -> bool {
        let untold = !self.ports.updates.is_empty();
        !untold && self.outbox.len() == 0 && self.book.is_empty() && self.pending.is_empty()
    }

    /// The sessions have ended: no work can be done any more.
    pub(super) fn work_is_closed(&self) -> bool {
        mpsc::Sender::is_closed(&self.ports.work)
    }
}

/// What came of a wish for numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reserved {
    through: u64,
    done: bool,
}

async fn maybe(reserving: &mut Option<BoxFuture<'static, Reserved>>) -> Reserved {
    match reserving {
        Some(reserving) => reserving.await,
        None => std::future::pending().await,
    }
}

/// How a link ended on purpose.
#[derive(Debug)]
pub(super) enum Ended {
    /// We said goodbye.
    Said,
    /// We said that another runner goes on with what there is.
    Left,
    /// The orchestrator sent us away for this long.
    Sent(Duration),
}

fn delay_after(error: &LinkError, backoff: &mut Backoff) -> Duration {
    let delay = backoff.next_delay(draw());
    match error {
        LinkError::Refused { code: tonic::Code::Unauthenticated | tonic::Code::PermissionDenied, .. }
        | LinkError::Refused { refusal: Some(_), .. } => REFUSED_DELAY.mul_f64(1.0 + draw()),
        _ => delay,
    }
}
