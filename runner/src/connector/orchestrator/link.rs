//! One link, from greeting to end.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use proto::runner::v1 as pb;
use proto::runner::v1::runner_frame::Body;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::Instant;
use tonic::Streaming;
use tracing::{debug, info, warn};

use super::book::{Next, Piece};
use super::codec::Incoming;
use super::encode::stream_to_wire;
use super::outgoing::{CONTROL, Lanes};
use super::rotation::{Successor, Turn, connected};
use super::task::{Ended, Event, PENDING, Task};
use super::{LinkError, Stop, encode};
use crate::crash_point::{self, Kind, Point};
use crate::work::{BoxFuture, OutputChunk, SessionId, ToolFailure, Trouble};

#[cfg(test)]
pub(crate) mod simulated;

/// Pieces of output that are read at the same time.
const PARALLEL_READS: usize = 4;
/// Sandboxes that are asked at once on one link.
const PARALLEL_QUESTIONS: usize = 4;
/// Time for Welcome and decisions.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(10);
/// Time for the orchestrator to close its half after Goodbye.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);
/// How long a service manager may take to start the next runner.
const REPLACED_WITHIN: Duration = Duration::from_secs(30);
/// Without progress for this long no heartbeat is sent.
const STANDSTILL: Duration = Duration::from_secs(5);

type Read = (Piece, Result<OutputChunk, ToolFailure>);

/// What belongs to one link.
pub(super) struct Link {
    pub(super) lanes: Lanes,
    pub(super) heartbeat: tokio::time::Interval,
    pub(super) last_frame_no: u64,
    pub(super) welcomed: bool,
    pub(super) decision_pages_left: u32,
    /// Sessions the orchestrator has decided about.
    pub(super) decided: BTreeSet<SessionId>,
    pub(super) live: bool,
    pub(super) ended: Option<Ended>,
    pub(super) opened_at: Instant,
    pub(super) oldest_at: Option<Instant>,
    pub(super) greeted_ns: u64,
    /// Sessions that the greeting named.
    pub(super) told: BTreeSet<SessionId>,
    /// Digest of the certificates it was made with.
    pub(super) certificate: [u8; 32],
    /// The connection for the next link, while it is being made beside this one.
    pub(super) successor: Option<Successor>,
    /// When to try again to make one.
    pub(super) next_try: Option<Instant>,
    /// The Welcome of a newer orchestrator, which changes nothing before its term is on the disk.
    pub(super) obeying: Option<Obeying>,
    pub(super) reads: FuturesUnordered<Pin<Box<dyn Future<Output = Read> + Send>>>,
    /// Sandboxes that were asked about their slots.
    pub(super) asked: FuturesUnordered<BoxFuture<'static, pb::QueryReply>>,
    output_wait: Option<Instant>,
    output_full: bool,
    /// What waited when it was last looked at: orders, events, output.
    waits: [bool; 3],
    progress: (u64, Instant),
}

/// A Welcome of a term that is being written down.
pub(super) struct Obeying {
    pub(super) welcome: pb::Welcome,
    /// Resolves when no older orchestrator will be obeyed any more; until then this one is not either.
    pub(super) written: BoxFuture<'static, bool>,
}

/// What a greeting said.
pub(super) struct Greeting {
    /// When, on our clock.
    pub(super) at_ns: u64,
    /// The sessions it named.
    pub(super) told: BTreeSet<SessionId>,
}

impl Link {
    pub(super) fn new(lanes: Lanes, greeting: Greeting, certificate: [u8; 32], progress: u64) -> Self {
        let now = Instant::now();
        Self {
            lanes,
            heartbeat: tokio::time::interval(Duration::from_secs(10)),
            last_frame_no: 0,
            welcomed: false,
            decision_pages_left: 0,
            decided: BTreeSet::new(),
            live: false,
            ended: None,
            opened_at: now,
            oldest_at: None,
            greeted_ns: greeting.at_ns,
            told: greeting.told,
            certificate,
            successor: None,
            next_try: None,
            obeying: None,
            reads: FuturesUnordered::new(),
            asked: FuturesUnordered::new(),
            output_wait: None,
            output_full: false,
            waits: [false; 3],
            progress: (progress, now),
        }
    }
}

impl Task {
    /// Puts Hello and what is held into the lanes.
    pub(super) fn greet(&mut self, lanes: &Lanes, reason: pb::HelloReason) -> Result<Greeting, LinkError> {
        let pages = self.book.resume_pages();
        let authorities_sha256 = self.credentials.borrow().authorities_sha256;
        let mut hello = self.settings.hello(reason, self.link_id.clone(), pages.len(), &authorities_sha256);
        hello.highest_term = self.highest_term;
        hello.first_unacked_event_seq = self.outbox.first_unacked();
        hello.next_event_seq = self.outbox.next_seq();
        let at_ns = hello.boottime_ns;
        control(lanes, Body::Hello(hello))?;
        for page in pages {
            control(lanes, Body::ResumePage(page))?;
        }
        Ok(Greeting { at_ns, told: self.book.session_epochs().into_iter().map(|(session_id, _)| session_id).collect() })
    }

    /// Serves until something ends the link and those that take its place.
    pub(super) async fn serve(
        &mut self,
        mut link: Link,
        mut incoming: Streaming<Incoming>,
    ) -> Result<Ended, LinkError> {
        loop {
            match self.serve_until_turn(&mut link, &mut incoming).await? {
                Turn::Over(ended) => return self.farewell(link, incoming, ended).await,
                Turn::Successor(connected) => {
                    if let Some((next, next_incoming)) =
                        self.try_to_take_over(connected, &mut link, &mut incoming).await
                    {
                        self.leave_behind(std::mem::replace(&mut link, next), incoming);
                        incoming = next_incoming;
                    }
                }
            }
        }
    }

    /// Serves one link until it is over, or the connection of the next one is there.
    async fn serve_until_turn(
        &mut self,
        link: &mut Link,
        incoming: &mut Streaming<Incoming>,
    ) -> Result<Turn, LinkError> {
        let now = Instant::now();
        loop {
            self.fill(link)?;
            self.end_if_asked(link);
            if let Some(ended) = link.ended.take() {
                return Ok(Turn::Over(ended));
            }
            self.connect_successor_if_due(link);
            let (live, reading) = (link.live, self.pending.len() < PENDING);
            let (wait, output_full, next_try) = (link.output_wait, link.output_full, link.next_try);
            let events_full = live && self.outbox.has_unsent();
            self.count_waits(link, [!reading, events_full, output_full]);
            tokio::select! {
                _ = link.heartbeat.tick(), if live => self.beat(link)?,
                event = self.next_event() => self.take_on_link(event, link),
                frame = incoming.message(), if reading => match frame {
                    Ok(Some(frame)) => self.incoming_obeyed(frame, link).await?,
                    Ok(None) => return Err(LinkError::Ended("the orchestrator closed it".to_owned())),
                    Err(status) => return Err(LinkError::ended(&self.settings.target.host, &status)),
                },
                Some((piece, chunk)) = link.reads.next(), if !link.reads.is_empty() => {
                    self.piece(link, &piece, chunk)?;
                }
                Some(reply) = link.asked.next(), if !link.asked.is_empty() => self.reply(Body::QueryReply(reply)),
                connected = connected(&mut link.successor), if link.successor.is_some() => {
                    link.successor = None;
                    match connected {
                        Ok(connected) => return Ok(Turn::Successor(connected)),
                        Err(error) => self.put_off_successor(link, &error.into()),
                    }
                }
                () = tokio::time::sleep_until(next_try.unwrap_or(now)), if next_try.is_some() => link.next_try = None,
                () = room(&link.lanes.events), if events_full => {}
                () = room(&link.lanes.output), if output_full => {}
                () = tokio::time::sleep_until(wait.unwrap_or(now)), if wait.is_some() => {}
                () = tokio::time::sleep_until(link.opened_at + HANDSHAKE), if !live => {
                    return Err(LinkError::Ended("the orchestrator did not finish the handshake in time".to_owned()));
                }
            }
        }
    }

    /// Counts how often one of the bounded ways has begun to wait: orders for the sessions, so that nothing is read; events
    /// and output for the transport.
    fn count_waits(&self, link: &mut Link, waits: [bool; 3]) {
        for ((what, waits), waited) in ["orders", "events", "output"].into_iter().zip(waits).zip(&mut link.waits) {
            if waits && !*waited {
                self.ports.counters.add("link_waits_total", &[("what", what)]);
            }
            *waited = waits;
        }
    }

    /// Takes a frame, and with a new term waits until no older orchestrator will be obeyed any more.
    pub(super) async fn incoming_obeyed(&mut self, frame: Incoming, link: &mut Link) -> Result<(), LinkError> {
        self.incoming(frame, link)?;
        match link.obeying.take() {
            Some(Obeying { welcome, written }) => {
                let is_written = written.await;
                self.obey(&welcome, is_written, link)
            }
            None => Ok(()),
        }
    }

    fn take_on_link(&mut self, event: Event, link: &mut Link) {
        match event {
            // A new link is tried at once, whatever became of the last attempt.
            Event::Certificate => link.next_try = None,
            Event::Tick if link.oldest_at.is_some_and(|at| Instant::now() >= at) => {
                info!("leaving the link, it has reached its age");
                link.ended = Some(Ended::Sent(Duration::ZERO));
            }
            event => self.take(event),
        }
    }

    /// Whether it is time to say goodbye. An acknowledgement may be what was missing, so this is asked after every frame.
    fn end_if_asked(&mut self, link: &mut Link) {
        let delivered = self.is_delivered();
        match *self.stop.borrow() {
            Stop::Now => link.ended = Some(Ended::Said),
            Stop::Leave => link.ended = Some(Ended::Left),
            Stop::WhenDelivered if link.live && delivered => link.ended = Some(Ended::Said),
            Stop::WhenDelivered | Stop::Run => {}
        }
        if self.work_is_closed() {
            link.ended = Some(Ended::Said);
        }
    }

    /// Moves what can be moved without waiting: replies, then events, then output.
    fn fill(&mut self, link: &mut Link) -> Result<(), LinkError> {
        (link.output_wait, link.output_full) = (None, false);
        // Replies may be older than the link; what came on it is not asked for before it is welcome.
        if !link.welcomed {
            return Ok(());
        }
        while let Some(body) = self.replies.pop_front() {
            control(&link.lanes, body)?;
        }
        if !link.live {
            return Ok(());
        }
        while link.asked.len() < PARALLEL_QUESTIONS
            && let Some((query_id, session_id)) = self.questions.pop_front()
        {
            let slots = self.ports.outputs.slots(&session_id);
            link.asked.push(Box::pin(async move { encode::slots_to_wire(query_id, slots.await) }));
        }
        while let Ok(permit) = link.lanes.events.try_reserve() {
            let Some(body) = self.outbox.next_to_send() else { break };
            let told = crash_point::ARE_THERE.then(|| told(&body)).flatten();
            permit.send(body);
            if let Some((kind, call_id)) = told {
                crash_point::pass(Point::Told(kind), &call_id);
            }
        }
        // Output of a call must not overtake its start.
        if self.outbox.has_unsent() {
            return Ok(());
        }
        while link.reads.len() < PARALLEL_READS {
            if link.lanes.output.capacity() <= link.reads.len() {
                link.output_full = link.reads.is_empty();
                break;
            }
            let now = link.opened_at.elapsed();
            match self.book.next_piece(now) {
                Next::Read(piece) => {
                    let Piece { call_id, stream, offset, max_bytes } = &piece;
                    let read = self.ports.outputs.read_output(call_id, *stream, *offset, *max_bytes);
                    link.reads.push(Box::pin(async move { (piece, read.await) }));
                }
                Next::Wait(until) => {
                    link.output_wait = Some(link.opened_at + until);
                    break;
                }
                Next::Idle => break,
            }
        }
        Ok(())
    }

    fn piece(
        &mut self,
        link: &mut Link,
        piece: &Piece,
        chunk: Result<OutputChunk, ToolFailure>,
    ) -> Result<(), LinkError> {
        let now = link.opened_at.elapsed();
        let (sent, data) = match chunk {
            Ok(mut chunk) => {
                chunk.bytes.truncate(piece.max_bytes);
                (self.book.piece_read(piece, chunk.offset, chunk.bytes.len(), now), chunk.bytes)
            }
            Err(failure) => {
                warn!(tool_call_id = %piece.call_id, error = %failure, "output cannot be read any more");
                (self.book.piece_gone(piece), Vec::new())
            }
        };
        let Some((offset, skipped_before, end)) = sent else { return Ok(()) };
        let chunk = pb::OutputChunk {
            call_id: piece.call_id.to_string(),
            stream: stream_to_wire(piece.stream).into(),
            offset,
            data,
            skipped_before,
            end,
        };
        // Room was counted before the piece was read.
        link.lanes.output.try_send(Body::Output(chunk)).map_err(|_| LinkError::Ended("its output lane is full".into()))
    }

    fn beat(&mut self, link: &mut Link) -> Result<(), LinkError> {
        let count = self.ports.progress.count();
        if count != link.progress.0 {
            link.progress = (count, Instant::now());
        } else if link.progress.1.elapsed() > STANDSTILL {
            warn!("the session loop makes no progress, the lease is not renewed");
            return Ok(());
        }
        let (trouble, busy) = self.ports.memory.trouble();
        if busy > STANDSTILL {
            warn!(
                busy_ms = u64::try_from(busy.as_millis()).unwrap_or(u64::MAX),
                "the journal hangs, the lease is not renewed"
            );
            return Ok(());
        }
        let now_ns = (self.settings.clock)();
        let (sessions, running_calls, queued_calls) = self.book.counts();
        let mut reasons = Vec::new();
        let mut short_of: Vec<_> =
            self.ports.pressure.borrow().shortages.iter().map(|shortage| shortage.measured.clone()).collect();
        if trouble == Some(Trouble::NoSpace) && short_of.is_empty() {
            // Nobody has looked at the host since.
            short_of.push(Trouble::NO_SPACE.to_owned());
        }
        let health = if let Some(Trouble::Broken(reason)) = &trouble {
            reasons.push(format!("the journal refuses writes: {reason}"));
            pb::HealthState::ReadOnly
        } else if self.drain_status.is_some() {
            pb::HealthState::Draining
        } else if self.outbox.is_full() || !short_of.is_empty() {
            if self.outbox.is_full() {
                reasons.push("too many events without acknowledgement".to_owned());
            }
            reasons.extend(short_of);
            pb::HealthState::Saturated
        } else {
            pb::HealthState::Ready
        };
        let (alarms, is_degraded) = {
            let status = self.status.borrow();
            (status.certificate.alarms(), status.certificate.is_degraded())
        };
        let health = if health == pb::HealthState::Ready && is_degraded { pb::HealthState::Degraded } else { health };
        reasons.extend(alarms);
        let not_after = self.credentials.borrow().not_after;
        let heartbeat = pb::Heartbeat {
            lease_seq: self.lease.beat(now_ns),
            sent_boottime_ns: now_ns,
            health: health.into(),
            reasons,
            sessions,
            running_calls,
            queued_calls,
            unacked_events: self.outbox.len() as u64,
            unacked_output_bytes: self.book.unacknowledged_bytes(),
            cert_not_after: Some(prost_types::Timestamp { seconds: not_after, nanos: 0 }),
        };
        control(&link.lanes, Body::Heartbeat(heartbeat))
    }

    /// Says goodbye where that is polite, and lets what is in the lanes leave.
    async fn farewell(
        &mut self,
        link: Link,
        mut incoming: Streaming<Incoming>,
        ended: Ended,
    ) -> Result<Ended, LinkError> {
        let (reason, back_within) = match &ended {
            Ended::Said => ("the runner stops", None),
            Ended::Left => ("the runner is replaced", Some(super::encode::time(REPLACED_WITHIN))),
            Ended::Sent(after) => ("sent away", Some(super::encode::time(*after + Duration::from_secs(5)))),
        };
        let goodbye = pb::Goodbye {
            reason: reason.to_owned(),
            sandboxes_kept: !matches!(ended, Ended::Said),
            back_within,
            last_event_seq: self.outbox.next_seq() - 1,
        };
        control(&link.lanes, Body::Goodbye(goodbye))?;
        drop(link);
        let closed = async { while let Ok(Some(_)) = incoming.message().await {} };
        if tokio::time::timeout(FAREWELL, closed).await.is_err() {
            debug!("the orchestrator did not close its half");
        }
        Ok(ended)
    }
}

/// What an event says about a call.
fn told(body: &Body) -> Option<(Kind, String)> {
    match body {
        Body::CallAccepted(event) => Some((Kind::Accepted, event.call_id.clone())),
        Body::CallStarted(event) => Some((Kind::Started, event.call_id.clone())),
        Body::CallFinished(event) => Some((Kind::Finished, event.call_id.clone())),
        _ => None,
    }
}

/// Puts a control frame into its lane. A full lane means that the peer has stopped reading.
pub(super) fn control(lanes: &Lanes, body: Body) -> Result<(), LinkError> {
    lanes.control.try_send(body).map_err(|error| match error {
        TrySendError::Full(_) => LinkError::Unread(CONTROL),
        // Whoever reads for the transport has gone with it.
        TrySendError::Closed(_) => LinkError::Ended("the transport has ended".to_owned()),
    })
}

/// Waits until a lane has room, or nobody empties it any more.
async fn room(lane: &mpsc::Sender<Body>) {
    // Only the moment matters; the place itself is taken later.
    let _ = lane.reserve().await;
}
