//! The receiving side of a link: handshake, then every frame checked, stored and acknowledged.

use std::sync::Arc;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::runner_frame::Body as Said;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::orchestrator::Link;
use super::state::{LinkOut, Shared, State};

type Sender = mpsc::Sender<Result<pb::OrchestratorFrame, Status>>;

/// Serves one link until it ends.
pub(super) async fn serve_link(shared: Arc<Shared>, mut incoming: Streaming<pb::RunnerFrame>, sender: Sender) {
    let Ok(Some(first)) = incoming.message().await else { return };
    let Some(Said::Hello(hello)) = first.body else {
        return shared.complain("a link did not begin with Hello".to_owned());
    };
    let mut pages = Vec::new();
    for _ in 0..hello.resume_pages {
        match incoming.message().await {
            Ok(Some(pb::RunnerFrame { body: Some(Said::ResumePage(page)), .. })) => pages.push(page),
            Ok(_) => return shared.complain("fewer resume pages than announced".to_owned()),
            Err(_) => return,
        }
    }
    let number = welcome(&shared, &hello, &pages, sender);
    let speaker = instance(&hello);
    shared.changed();
    let mut frame_no = 1 + u64::from(hello.resume_pages);
    // Only the seen matters here; nobody has to watch.
    let _ = shared.seen.send(Link::Resumed(Box::new(hello)));
    while let Ok(Some(frame)) = incoming.message().await {
        frame_no += 1;
        let mut state = shared.state();
        if state.link.as_ref().is_none_or(|link| link.number != number) {
            // Whoever has come since tells all of this again.
            let successor = state.hello.as_ref().map(instance);
            state.late_runners += u64::from(successor.is_some_and(|successor| successor != speaker));
            break;
        }
        if frame.frame_no != frame_no {
            state.complain(format!("frame {} came, {frame_no} was expected", frame.frame_no));
        }
        if let Some(body) = frame.body {
            take(&shared, &mut state, body);
        }
        drop(state);
        shared.changed();
    }
    let mut state = shared.state();
    if state.link.as_ref().is_some_and(|link| link.number == number) {
        (state.link, state.resumed) = (None, false);
    }
    drop(state);
    shared.changed();
}

/// The process that greets.
fn instance(hello: &pb::Hello) -> String {
    hello.runner.as_ref().map(|runner| runner.instance_id.clone()).unwrap_or_default()
}

/// Whether a greeting was written before another of the same boot of its machine.
fn is_older(hello: &pb::Hello, other: &pb::Hello) -> bool {
    let boot = |hello: &pb::Hello| hello.runner.as_ref().map(|runner| runner.boot_id.clone());
    boot(hello) == boot(other) && hello.boottime_ns < other.boottime_ns
}

/// Answers a greeting, decides about everything that is held, and sends again what may have been lost.
pub(super) fn welcome(shared: &Shared, hello: &pb::Hello, pages: &[pb::ResumePage], sender: Sender) -> u64 {
    let settings = shared.settings();
    let mut guard = shared.state();
    let state = &mut *guard;
    // Another process without a journal counts from the beginning, and knows nothing of what the one before it held.
    // So may the first one that comes here: the process before it may have died before it found us.
    let another = state.hello.as_ref().is_none_or(|before| instance(before) != instance(hello));
    if another && state.hello.as_ref().is_some_and(|before| is_older(hello, before)) {
        // It is dead, and what it said last has taken longer than its successor. No link has this number.
        state.late_runners += 1;
        return 0;
    }
    if hello.ephemeral && another {
        state.event_through = 0;
        settle_lost(shared, state);
    } else if hello.next_event_seq <= state.event_through {
        let (next, known) = (hello.next_event_seq, state.event_through);
        state.complain(format!(
            "the next event is {next}, and {known} came already: the state of the runner was set back"
        ));
    } else if another {
        // What the process before it had told, and was not acknowledged, is told again under numbers of its own.
        state.event_through = state.event_through.max(hello.first_unacked_event_seq.saturating_sub(1));
    }
    state.links += 1;
    // What counts is what this link says.
    state.drain = None;
    state.overlaps += u64::from(state.link.is_some());
    let number = state.links;
    state.link = Some(LinkOut { number, sender, frame_no: 0, live: false });
    (state.output_received, state.credited) = (0, settings.window);
    state.hello = Some(hello.clone());
    state.send_now(Body::Welcome(pb::Welcome {
        minor: 0,
        features: hello.features.clone(),
        link_id: format!("link-{number}"),
        term: state.term(),
        lease_ttl: settings.lease_ttl.try_into().ok(),
        heartbeat_every: settings.heartbeat_every.try_into().ok(),
        limits: Some(pb::LinkLimits { link_credit_bytes: settings.window, ..Default::default() }),
        event_ack_through: if settings.acknowledge { state.event_through } else { 0 },
        decision_pages: 1,
        ..Default::default()
    }));
    let held: Vec<_> = pages.iter().flat_map(|page| &page.sessions).collect();
    if another && !hello.ephemeral {
        settle_missing(state, &held);
    }
    let decisions = held.iter().map(|session| decide(state, session)).collect();
    state.send_now(Body::ResumeDecisions(pb::ResumeDecisionPage { index: 0, decisions }));
    if let Some(link) = &mut state.link {
        link.live = true;
    }
    state.resumed = true;
    repeat(state, &held);
    number
}

/// A session that another process of the runner does not list, or only as the owner of calls that are not acknowledged, has
/// ended: whoever was to say so is gone.
fn settle_missing(state: &mut State, held: &[&pb::SessionState]) {
    for (session_id, record) in &mut state.sessions {
        let lives = |session: &pb::SessionState| session.phase() != pb::SessionPhase::Lost;
        let is_held = held.iter().any(|session| session.session_id == *session_id && lives(session));
        if !is_held && record.opened.is_some() && record.ended.is_none() {
            record.ended = Some(pb::SessionEnded {
                event_seq: 0,
                session_id: session_id.clone(),
                epoch: record.request.epoch,
                reason: pb::SessionEndReason::SandboxLost.into(),
                failure: None,
            });
        }
    }
}

/// Gives everything that an earlier process of the runner held its last word, because nobody else can. What may have
/// reached that process may have run; what never left this side did not.
fn settle_lost(shared: &Shared, state: &mut State) {
    let failure = |code: &str, message: String, remediation: &str| pb::ToolFailure {
        code: code.to_owned(),
        blame: pb::Blame::Host.into(),
        retryable: false,
        message,
        remediation: remediation.to_owned(),
        retry_after: None,
    };
    for (session_id, record) in &mut state.sessions {
        if record.opened.is_some() && record.ended.is_none() {
            let message = format!("session {session_id} was lost: its runner was restarted and keeps nothing on disk");
            record.ended = Some(pb::SessionEnded {
                event_seq: 0,
                session_id: session_id.clone(),
                epoch: record.request.epoch,
                reason: pb::SessionEndReason::SandboxLost.into(),
                failure: Some(failure("SANDBOX_LOST", message, "open the session again with a higher epoch")),
            });
        }
    }
    let mut over = Vec::new();
    for (call_id, call) in state.calls.iter_mut().filter(|(_, call)| !call.complete && call.refused.is_none()) {
        let session_id = &call.request.session_id;
        if state.sessions.get(session_id).is_none_or(|record| record.ended.is_none()) {
            continue;
        }
        let end = call.end.get_or_insert_with(|| {
            let kind = if call.sent {
                let message = "the call may have run, but its runner was restarted before it told how it ended";
                let fix = "look at what the call was meant to change before running it again";
                let failure = Some(failure("OUTCOME_UNKNOWN", message.to_owned(), fix));
                pb::outcome::Kind::Indeterminate(pb::Indeterminate { failure })
            } else {
                let message = "the call did not run: it was not sent before its session was lost";
                let fix = "send the call again, under a new id, to an open session";
                let failure = Some(failure("SESSION_LOST", message.to_owned(), fix));
                pb::outcome::Kind::NeverStarted(pb::NeverStarted { failure, code: 125 })
            };
            pb::CallFinished {
                call_id: call_id.clone(),
                session_id: session_id.clone(),
                epoch: call.request.epoch,
                outcome: Some(pb::Outcome { kind: Some(kind) }),
                ..Default::default()
            }
        });
        call.transcript.give_up(end);
        call.complete = true;
        over.push(call_id.clone());
    }
    for call_id in over {
        let _ = shared.seen.send(Link::Finished(call_id));
    }
}

fn decide(state: &State, session: &pb::SessionState) -> pb::ResumeDecision {
    let action = match state.sessions.get(&session.session_id) {
        Some(record) if record.ended.is_none() && record.refused.is_none() => pb::ResumeAction::Keep,
        // It was said to be over, or never to have been, by a process that could not write that down.
        Some(_) if session.phase() != pb::SessionPhase::Lost => pb::ResumeAction::Close,
        _ => pb::ResumeAction::Suspend,
    };
    let calls = session
        .calls
        .iter()
        .filter_map(|call| {
            let record = state.calls.get(&call.call_id)?;
            Some(pb::CallDecision {
                call_id: call.call_id.clone(),
                action: pb::CallAction::Continue.into(),
                stored_through: record.transcript.acks(),
            })
        })
        .collect();
    pb::ResumeDecision { session_id: session.session_id.clone(), epoch: session.epoch, action: action.into(), calls }
}

/// Sends what the runner does not hold and has not answered. It may do so any number of times.
fn repeat(state: &mut State, held: &[&pb::SessionState]) {
    let mut frames = Vec::new();
    for record in state.sessions.values() {
        if record.opened.is_none() && record.refused.is_none() && record.ended.is_none() {
            frames.push(Body::OpenSession(record.request.clone()));
        }
    }
    for (call_id, record) in &state.calls {
        let is_held = held.iter().flat_map(|session| &session.calls).any(|call| call.call_id == *call_id);
        let open = record.end.is_none() && record.refused.is_none();
        if open && !is_held {
            frames.push(Body::Call(record.request.clone()));
        }
        if let (true, false, Some(cancel)) = (open, record.cancel_noted, &record.cancel) {
            frames.push(Body::CancelCall(cancel.clone()));
        }
    }
    for record in state.sessions.values() {
        if let (Some(close), None) = (&record.close, &record.ended) {
            frames.push(Body::CloseSession(close.clone()));
        }
    }
    frames.into_iter().for_each(|body| state.send(body));
}

pub(super) fn take(shared: &Shared, state: &mut State, body: Said) {
    let settings = shared.settings();
    if let Some(seq) = event_seq(&body) {
        if seq > state.event_through + 1 {
            let expected = state.event_through + 1;
            state.complain(format!("event {seq} came, {expected} was expected"));
        }
        state.event_through = state.event_through.max(seq);
    }
    let is_event = event_seq(&body).is_some();
    match body {
        Said::SessionOpened(opened) => {
            if let Some(record) = state.sessions.get_mut(&opened.session_id) {
                record.opened = Some(opened);
            }
        }
        Said::SessionEnded(ended) => {
            if let Some(record) = state.sessions.get_mut(&ended.session_id) {
                record.ended = Some(ended);
            }
        }
        Said::CallAccepted(accepted) => {
            if let Some(call) = state.calls.get_mut(&accepted.call_id) {
                call.accepted = true;
            }
        }
        Said::CallStarted(started) => {
            let at = started.started_boottime_ns;
            let before = state.calls.get_mut(&started.call_id).and_then(|call| call.started.replace(at));
            if before.is_some_and(|before| before != at) {
                state.complain(format!("call {} started twice", started.call_id));
            }
            let _ = shared.seen.send(Link::Started(started.call_id));
        }
        Said::Output(chunk) => output(shared, state, chunk, settings.acknowledge, settings.window),
        Said::CallFinished(finished) => end(shared, state, finished),
        Said::CancelNoted(noted) => {
            if let Some(call) = state.calls.get_mut(&noted.call_id) {
                call.cancel_noted = true;
            }
        }
        Said::StdinAccepted(accepted) => {
            if let Some(call) = state.calls.get_mut(&accepted.call_id) {
                call.stdin_accepted = call.stdin_accepted.max(accepted.accepted);
            }
        }
        Said::Heartbeat(heartbeat) => {
            state.heartbeats += 1;
            let ack = pb::HeartbeatAck {
                lease_seq: heartbeat.lease_seq,
                lease_ttl: settings.lease_ttl.try_into().ok(),
                term: state.term(),
            };
            state.last_heartbeat = Some(heartbeat.clone());
            state.send(Body::HeartbeatAck(ack));
            let _ = shared.seen.send(Link::Heartbeat(heartbeat));
        }
        Said::RequestRefused(refused) => refuse(state, refused),
        Said::QueryReply(reply) => drop(state.replies.insert(reply.query_id, reply)),
        Said::DrainStatus(status) => state.drain = Some(status),
        Said::Goodbye(goodbye) => {
            state.goodbye = Some(goodbye);
            // Closing our half lets the runner go at once.
            (state.link, state.resumed) = (None, false);
        }
        Said::Unsupported(unsupported) => {
            state.complain(format!("the runner did not understand a frame of kind {}", unsupported.kind));
        }
        Said::Hello(_) | Said::ResumePage(_) => state.complain("a second greeting on one link".to_owned()),
        Said::EgressDecision(_) | Said::ForwardData(_) => {}
    }
    if is_event && settings.acknowledge {
        let through_event_seq = state.event_through;
        state.send(Body::EventAck(pb::EventAck { through_event_seq }));
    }
}

fn output(shared: &Shared, state: &mut State, chunk: pb::OutputChunk, acknowledge: bool, window: u64) {
    state.output_received += chunk.data.len() as u64;
    if state.output_received > state.credited {
        let (received, credited) = (state.output_received, state.credited);
        state.complain(format!("{received} bytes of output came, {credited} were allowed"));
    }
    let Some(call) = state.calls.get_mut(&chunk.call_id) else {
        return state.complain(format!("output of unknown call {}", chunk.call_id));
    };
    let taken = call.transcript.take(&chunk);
    let streams = call.transcript.acks();
    if let Err(problem) = taken {
        state.complain(problem);
    }
    if acknowledge {
        state.send(Body::OutputAck(pb::OutputAck { call_id: chunk.call_id.clone(), streams }));
    }
    let link_max_bytes = state.output_received + window;
    if window > 0 && link_max_bytes >= state.credited + window / 2 {
        state.credited = link_max_bytes;
        state.send(Body::Credit(pb::Credit { link_max_bytes, calls: Vec::new() }));
    }
    let call_id = chunk.call_id.clone();
    let _ = shared.seen.send(Link::Output(chunk));
    complete(shared, state, &call_id);
}

fn end(shared: &Shared, state: &mut State, finished: pb::CallFinished) {
    let call_id = finished.call_id.clone();
    let Some(call) = state.calls.get_mut(&call_id) else {
        return state.complain(format!("end of unknown call {call_id}"));
    };
    if call.shed {
        let same = call.end.as_ref().is_some_and(|before| before.outcome == finished.outcome);
        if !same {
            state.complain(format!("call {call_id} ended twice, in two ways"));
        }
        return;
    }
    // A repeat may carry another number, never another outcome.
    let before = call.end.replace(finished.clone());
    if before.is_some_and(|before| before.outcome != finished.outcome || before.streams != finished.streams) {
        state.complain(format!("call {call_id} ended twice, in two ways"));
    }
    complete(shared, state, &call_id);
}

fn complete(shared: &Shared, state: &mut State, call_id: &str) {
    // What was shed was checked before.
    let Some(call) = state.calls.get_mut(call_id).filter(|call| !call.shed) else { return };
    let Some(end) = &call.end else { return };
    match call.transcript.check(end) {
        Ok(complete) if complete && !call.complete => {
            call.complete = true;
            let _ = shared.seen.send(Link::Finished(call_id.to_owned()));
        }
        Ok(_) => {}
        Err(problem) => state.complain(problem),
    }
}

fn refuse(state: &mut State, refused: pb::RequestRefused) {
    let known_call = state.calls.get_mut(&refused.call_id).filter(|call| call.end.is_none() && !call.accepted);
    match (refused.kind, known_call) {
        (15, Some(call)) => call.refused.clone_from(&refused.failure),
        (13, _) => {
            if let Some(record) = state.sessions.get_mut(&refused.session_id)
                && record.opened.is_none()
            {
                record.refused.clone_from(&refused.failure);
            }
        }
        _ => {}
    }
    if state.refusals.len() >= 1024 {
        state.refusals.pop_front();
    }
    state.refusals.push_back(refused);
}

fn event_seq(body: &Said) -> Option<u64> {
    match body {
        Said::SessionOpened(m) => Some(m.event_seq),
        Said::SessionEnded(m) => Some(m.event_seq),
        Said::CallAccepted(m) => Some(m.event_seq),
        Said::CallStarted(m) => Some(m.event_seq),
        Said::CallFinished(m) => Some(m.event_seq),
        Said::CancelNoted(m) => Some(m.event_seq),
        Said::EgressDecision(m) => Some(m.event_seq),
        _ => None,
    }
}
