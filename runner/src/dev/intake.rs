//! The receiving side of a link: handshake, then every frame checked, stored and acknowledged.

use std::sync::Arc;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::runner_frame::Body as Said;
use tonic::Streaming;

use super::greeting::{Sender, instance, renew_lease, welcome};
use super::orchestrator::Link;
use super::revocation::Holder;
use super::state::{Shared, State};

/// Serves one link until it ends.
pub(super) async fn serve_link(
    shared: Arc<Shared>,
    mut incoming: Streaming<pb::RunnerFrame>,
    sender: Sender,
    holder: Option<Holder>,
) {
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
    let number = welcome(&shared, &hello, &pages, sender, holder);
    let speaker = instance(&hello);
    shared.changed();
    if number == 0 {
        return;
    }
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
            state.strangers.remove(&ended.session_id);
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
            renew_lease(state, &settings);
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
    if state.is_elsewhere(&finished.session_id) {
        if !state.superseded.contains(&call_id) {
            state.superseded.push(call_id);
        }
        return;
    }
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
