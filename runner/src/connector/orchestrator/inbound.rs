//! What the orchestrator says on a link. A mistake in one request is answered; only a broken link is given up.

use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body as Request;
use proto::runner::v1::runner_frame::Body;
use tracing::{debug, info, warn};

use super::codec::{BadFrame, Incoming};
use super::link::{Link, Obeying};
use super::task::{Ended, MOST_QUESTIONS, Task};
use super::{LinkError, Refusal, decode, encode};
use crate::connector::backoff::draw;
use crate::work::{Code, DrainMode, DrainedBy, Receipt, ToolFailure, WorkItem, limits};

/// The times of a Welcome.
struct Times {
    lease_ttl: Option<Duration>,
    orphan_time: Option<Duration>,
    heartbeat_every: Option<Duration>,
    max_link_age: Option<Duration>,
}

impl Times {
    fn of(welcome: &pb::Welcome) -> Result<Self, LinkError> {
        let time =
            |field, value| decode::duration(field, value).map_err(|failure| LinkError::Violation(failure.message));
        Ok(Self {
            lease_ttl: time("lease_ttl", welcome.lease_ttl.as_ref())?,
            orphan_time: time("default_orphan_ttl", welcome.default_orphan_ttl.as_ref())?,
            heartbeat_every: time("heartbeat_every", welcome.heartbeat_every.as_ref())?,
            max_link_age: time("max_link_age", welcome.max_link_age.as_ref())?,
        })
    }
}

/// What names the sender's request in a refusal.
struct Subject {
    frame_no: u64,
    kind: u32,
    session_id: String,
    call_id: String,
    epoch: u64,
}

impl Task {
    pub(super) fn incoming(&mut self, incoming: Incoming, link: &mut Link) -> Result<(), LinkError> {
        let frame = match incoming {
            Incoming::Frame(frame) => *frame,
            Incoming::Bad(bad) => {
                expect_number(link, bad.frame_no)?;
                self.bad_frame(bad);
                return Ok(());
            }
        };
        expect_number(link, frame.frame_no)?;
        let Some(request) = frame.body else {
            if frame.must_understand || frame.kind == 0 {
                let unsupported = pb::Unsupported { kind: frame.kind, frame_no: frame.frame_no };
                self.reply(Body::Unsupported(unsupported));
            }
            return Ok(());
        };
        if !link.welcomed && !matches!(request, Request::Welcome(_) | Request::GoAway(_)) {
            return Err(LinkError::Violation("a frame came before Welcome".to_owned()));
        }
        let subject = subject_of(&request, frame.frame_no, frame.kind);
        if let Err(failure) = self.request(request, link)? {
            debug!(kind = subject.kind, error = %failure, "request refused");
            self.refuse(subject, &failure);
        }
        Ok(())
    }

    /// Refuses what has not come as far as the sessions, which count what they refuse.
    fn refuse(&mut self, subject: Subject, failure: &ToolFailure) {
        let Subject { frame_no, kind, session_id, call_id, epoch } = subject;
        let labels = [("request", encode::request_name(kind)), ("code", failure.code.as_str())];
        self.ports.counters.add("refused_total", &labels);
        self.reply(encode::refused_frame(frame_no, kind, session_id, call_id, epoch, failure));
    }

    fn bad_frame(&mut self, bad: BadFrame) {
        let failure = match bad.too_large {
            Some(length) => ToolFailure::new(
                Code::TooLarge,
                format!("the frame has {length} bytes; at most {} are allowed", limits::FRAME_BYTES),
                "send less in one frame",
            ),
            None => {
                ToolFailure::invalid("frame", bad.problem, "send the field in the type of the schema; texts are UTF-8")
            }
        };
        warn!(kind = bad.kind, error = %failure, "frame refused");
        // Calls and cancels begin with call_id, sessions with session_id.
        let [first, second] = bad.ids;
        let (call_id, session_id) = if matches!(bad.kind, 13 | 14) { (String::new(), first) } else { (first, second) };
        let subject = Subject { frame_no: bad.frame_no, kind: bad.kind, session_id, call_id, epoch: 0 };
        self.refuse(subject, &failure);
    }

    /// The outer result ends the link, the inner one refuses the request.
    fn request(&mut self, request: Request, link: &mut Link) -> Result<Result<(), ToolFailure>, LinkError> {
        match request {
            Request::Welcome(welcome) => self.welcome(&welcome, link)?,
            Request::ResumeDecisions(page) => return self.decisions(page, link).map(Ok),
            Request::GoAway(go_away) => {
                let time = |field, value| decode::duration(field, value).map(Option::unwrap_or_default);
                let after = time("reconnect_after", go_away.reconnect_after.as_ref());
                let jitter = time("jitter", go_away.jitter.as_ref());
                let after = after.unwrap_or_default() + jitter.unwrap_or_default().mul_f64(draw());
                info!(reason = %go_away.reason, "the orchestrator asks for another link");
                link.ended = Some(Ended::Sent(after));
            }
            Request::HeartbeatAck(ack) if ack.term != self.highest_term => {
                let (told, known) = (ack.term, self.highest_term);
                let problem = format!("a heartbeat was answered in term {told} on a link of term {known}");
                return Err(LinkError::Violation(problem));
            }
            other => return Ok(self.order(other)),
        }
        Ok(Ok(()))
    }

    fn order(&mut self, request: Request) -> Result<(), ToolFailure> {
        match request {
            Request::HeartbeatAck(ack) => {
                self.lease.acknowledged(ack.lease_seq, decode::duration("lease_ttl", ack.lease_ttl.as_ref())?);
                self.renewed();
            }
            Request::OpenSession(message) => {
                let open = decode::open(&message)?;
                self.refuse_if_full()?;
                self.book.session_requested(open.session_id.clone(), open.epoch);
                self.pending.push_back(WorkItem::Open(open));
            }
            Request::CloseSession(message) => self.pending.push_back(WorkItem::Close(decode::close(&message)?)),
            Request::Call(message) => {
                let call = decode::call(&message)?;
                self.refuse_if_full()?;
                self.book.call_requested(call.call_id.clone(), call.session_id.clone(), call.digest, call.quiet);
                self.pending.push_back(WorkItem::Call(call));
            }
            Request::CancelCall(message) => {
                let (call_id, session_id, epoch, mode) = decode::cancel(&message)?;
                self.pending.push_back(WorkItem::Cancel { session_id, epoch, call_id, mode });
            }
            Request::EventAck(ack) => {
                for call_id in self.outbox.acknowledge(ack.through_event_seq) {
                    if self.book.result_acknowledged(&call_id) {
                        self.pending.push_back(WorkItem::Acknowledge { call_id });
                    }
                }
            }
            Request::OutputAck(ack) => {
                let call_id = decode::call_id(&ack.call_id)?;
                for (stream, through) in decode::stream_acks(&ack.streams)? {
                    if self.book.output_acknowledged(&call_id, stream, through) {
                        self.pending.push_back(WorkItem::Acknowledge { call_id: call_id.clone() });
                    }
                }
            }
            Request::Credit(credit) => {
                let calls: Result<Vec<_>, ToolFailure> =
                    credit.calls.iter().map(|one| Ok((decode::call_id(&one.call_id)?, one.max_bytes))).collect();
                self.book.credit(credit.link_max_bytes, &calls?);
            }
            Request::Drain(message) => {
                let (mode, deadline) = decode::drain(&message)?;
                info!(reason = %message.reason, ?mode, "the orchestrator empties this runner");
                // The last word counts, and taking work again has no deadline.
                self.drain_deadline_ns = deadline.filter(|_| mode != DrainMode::Undo).map(|time| {
                    let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
                    (self.settings.clock)().saturating_add(nanoseconds)
                });
                self.pending.push_back(WorkItem::Drain { mode, by: DrainedBy::Orchestrator });
            }
            Request::WriteStdin(message) => {
                let (call_id, offset, data, eof) = decode::stdin(message)?;
                self.pending.push_back(WorkItem::Stdin { call_id, offset, data, eof });
            }
            Request::ResizeTerminal(message) => {
                let (call_id, size) = decode::resize(message)?;
                self.pending.push_back(WorkItem::Resize { call_id, columns: size.columns, rows: size.rows });
            }
            Request::Query(query) => self.query(&query),
            Request::UpdateNetworkPolicy(_) => return Err(ToolFailure::unimplemented("update_network_policy")),
            Request::ForwardData(_) => return Err(ToolFailure::unimplemented("forward_data")),
            Request::SandboxOperation(_) => return Err(ToolFailure::unimplemented("sandbox_operation")),
            Request::Unsupported(unsupported) => {
                warn!(kind = unsupported.kind, "the orchestrator did not understand a frame");
            }
            Request::Welcome(_) | Request::ResumeDecisions(_) | Request::GoAway(_) => {}
        }
        Ok(())
    }

    fn query(&mut self, query: &pb::Query) {
        use pb::query::What;
        use pb::query_reply::Answer;
        let unimplemented = |what| Answer::Failure(encode::failure_to_wire(&ToolFailure::unimplemented(what)));
        let answer = match &query.what {
            Some(What::Receipt(receipt)) if receipt.session_id.is_empty() => {
                Answer::Receipt(encode::receipt_to_wire(&self.settings.receipt))
            }
            Some(What::Receipt(receipt)) => match self.receipt_of(&receipt.session_id) {
                Ok(receipt) => Answer::Receipt(encode::receipt_to_wire(&receipt)),
                Err(failure) => Answer::Failure(encode::failure_to_wire(&failure)),
            },
            Some(What::Slots(slots)) => match self.ask_for_slots(query.query_id, &slots.session_id) {
                Ok(()) => return,
                Err(failure) => {
                    let labels = [("request", "query"), ("code", failure.code.as_str())];
                    self.ports.counters.add("refused_total", &labels);
                    Answer::Failure(encode::failure_to_wire(&failure))
                }
            },
            Some(What::Usage(_)) => unimplemented("query.usage"),
            Some(What::Ledger(_)) => unimplemented("query.ledger"),
            None => {
                let failure = ToolFailure::invalid("query.what", "is missing or not known", "set one of its fields");
                Answer::Failure(encode::failure_to_wire(&failure))
            }
        };
        self.reply(Body::QueryReply(pb::QueryReply { query_id: query.query_id, answer: Some(answer) }));
    }

    fn receipt_of(&self, session_id: &str) -> Result<Receipt, ToolFailure> {
        self.ports.outputs.receipt_of(&decode::session_id(session_id)?)
    }

    /// A sandbox is asked as soon as the link has a place for the question, and answers for itself.
    fn ask_for_slots(&mut self, query_id: u64, session_id: &str) -> Result<(), ToolFailure> {
        let session_id = decode::session_id(session_id)?;
        if self.questions.len() >= MOST_QUESTIONS {
            let what = format!("{MOST_QUESTIONS} questions wait for their answer");
            return Err(ToolFailure::new(Code::QueueFull, what, "wait for the answers, then ask again"));
        }
        self.questions.push_back((query_id, session_id));
        Ok(())
    }

    /// Nothing new is taken while too much of the old is not acknowledged.
    fn refuse_if_full(&self) -> Result<(), ToolFailure> {
        if !self.outbox.is_full() {
            return Ok(());
        }
        Err(ToolFailure::new(
            Code::QueueFull,
            format!("{} events are not acknowledged, which is as much as this runner keeps", self.outbox.len()),
            "acknowledge events, then send the request again",
        ))
    }

    fn welcome(&mut self, welcome: &pb::Welcome, link: &mut Link) -> Result<(), LinkError> {
        if link.welcomed {
            return Err(LinkError::Violation("a second Welcome".to_owned()));
        }
        if welcome.minor != 0 {
            return Err(LinkError::Violation(format!("minor version {} was not offered", welcome.minor)));
        }
        if welcome.term < self.highest_term {
            let known = self.highest_term;
            return Err(LinkError::Violation(format!("term {} is older than {known}", welcome.term)));
        }
        let times = Times::of(welcome)?;
        if welcome.event_ack_through >= self.outbox.next_seq() {
            let (acknowledged, next) = (welcome.event_ack_through, self.outbox.next_seq());
            return Err(LinkError::Refused {
                host: self.settings.target.host.clone(),
                code: tonic::Code::FailedPrecondition,
                refusal: Some(Refusal::StateRolledBack),
                message: format!(
                    "event {acknowledged} is acknowledged, and {next} is the next: this state was set back"
                ),
            });
        }
        if welcome.term > self.highest_term {
            let written = self.ports.memory.obey(welcome.term);
            link.obeying = Some(Obeying { welcome: welcome.clone(), written });
            return Ok(());
        }
        self.welcomed(welcome, &times, link);
        Ok(())
    }

    /// The journal has said whether the term of a newer orchestrator is written down. If it is not, nothing has changed: a link
    /// that is left for this one goes on from where it is.
    pub(super) fn obey(&mut self, welcome: &pb::Welcome, is_written: bool, link: &mut Link) -> Result<(), LinkError> {
        if !is_written {
            return Err(LinkError::Ended("the journal refuses to write down the term".to_owned()));
        }
        self.highest_term = welcome.term;
        let times = Times::of(welcome)?;
        self.welcomed(welcome, &times, link);
        Ok(())
    }

    /// From here this link counts: what was sent on another one begins anew.
    fn welcomed(&mut self, welcome: &pb::Welcome, times: &Times, link: &mut Link) {
        self.lease.welcomed(link.greeted_ns, times.lease_ttl);
        if let Some(orphan_time) = times.orphan_time {
            self.orphan_time = orphan_time;
        }
        let every = times.heartbeat_every.unwrap_or(Duration::from_secs(10));
        link.heartbeat = tokio::time::interval(every.max(Duration::from_millis(50)));
        link.heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        link.oldest_at = times.max_link_age.and_then(|age| link.opened_at.checked_add(age));
        self.link_id.clone_from(&welcome.link_id);
        for call_id in self.outbox.acknowledge(welcome.event_ack_through) {
            if self.book.result_acknowledged(&call_id) {
                self.pending.push_back(WorkItem::Acknowledge { call_id });
            }
        }
        self.outbox.rewind();
        let bounds = welcome.limits.unwrap_or_default();
        let call_credit = (bounds.call_credit_bytes > 0).then_some(bounds.call_credit_bytes);
        self.book.link_opened(bounds.link_credit_bytes, call_credit);
        self.book.max_chunk(bounds.max_chunk_bytes);
        link.welcomed = true;
        link.decision_pages_left = welcome.decision_pages;
        self.live_if_decided(link);
    }

    pub(super) fn live_if_decided(&mut self, link: &mut Link) {
        if link.decision_pages_left == 0 {
            link.live = true;
            // Behind the decisions: what must not go on is told so before anything goes on.
            self.renewed();
            self.tell_drain_status();
            self.status.send_modify(|status| {
                status.connected = true;
                status.problem.clear();
                status.refusal = None;
                status.links += 1;
            });
            info!(link_id = %self.link_id, "link resumed");
        }
    }
}

fn expect_number(link: &mut Link, frame_no: u64) -> Result<(), LinkError> {
    link.last_frame_no += 1;
    if frame_no == link.last_frame_no {
        return Ok(());
    }
    Err(LinkError::Violation(format!("frame_no {frame_no} came, {} was expected", link.last_frame_no)))
}

fn subject_of(request: &Request, frame_no: u64, kind: u32) -> Subject {
    let (session_id, call_id, epoch) = match request {
        Request::OpenSession(m) => (m.session_id.clone(), String::new(), m.epoch),
        Request::CloseSession(m) => (m.session_id.clone(), String::new(), m.epoch),
        Request::Call(m) => (m.session_id.clone(), m.call_id.clone(), m.epoch),
        Request::CancelCall(m) => (m.session_id.clone(), m.call_id.clone(), m.epoch),
        Request::OutputAck(m) => (String::new(), m.call_id.clone(), 0),
        Request::WriteStdin(m) => (String::new(), m.call_id.clone(), 0),
        Request::ResizeTerminal(m) => (String::new(), m.call_id.clone(), 0),
        Request::UpdateNetworkPolicy(m) => (m.session_id.clone(), String::new(), m.epoch),
        Request::SandboxOperation(m) => (m.session_id.clone(), String::new(), m.epoch),
        _ => Default::default(),
    };
    Subject { frame_no, kind, session_id, call_id, epoch }
}
