//! The greeting of a runner: who may be served, what became of what it held, and what it has to hear again.

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use super::loss;
use super::orchestrator::{Link, LinkSettings};
use super::revocation::{self, Holder};
use super::state::{LinkOut, Shared, State};
use crate::connector::orchestrator::Refusal;

pub(super) type Sender = mpsc::Sender<Result<pb::OrchestratorFrame, Status>>;

/// What this side can do of what a runner may name.
const FEATURES: [&str; 5] = ["output-credit", "stdin", "exec", "terminal", "receipt"];
/// What this side waits beyond a lease: the runner counts from an earlier moment, and clocks differ.
const LEASE_MARGIN: std::time::Duration = std::time::Duration::from_secs(5);

/// The process that greets.
pub(super) fn instance(hello: &pb::Hello) -> String {
    hello.runner.as_ref().map(|runner| runner.instance_id.clone()).unwrap_or_default()
}

/// The state directory that it has.
fn state_id(hello: &pb::Hello) -> Option<&str> {
    hello.runner.as_ref().map(|runner| runner.state_id.as_str())
}

/// Whether a greeting was written before another of the same boot of its machine.
fn is_older(hello: &pb::Hello, other: &pb::Hello) -> bool {
    let boot = |hello: &pb::Hello| hello.runner.as_ref().map(|runner| runner.boot_id.clone());
    boot(hello) == boot(other) && hello.boottime_ns < other.boottime_ns
}

/// The lease was renewed, as far as this side can know.
pub(super) fn renew_lease(state: &mut State, settings: &LinkSettings) {
    state.lease_until = Instant::now().checked_add(settings.lease_ttl.saturating_add(LEASE_MARGIN));
}

/// Answers a greeting, decides about everything that is held, and sends again what may have been lost. The number of the
/// link, which is 0 when there is none: then the sender has heard why.
pub(super) fn welcome(
    shared: &Shared,
    hello: &pb::Hello,
    pages: &[pb::ResumePage],
    sender: Sender,
    holder: Option<Holder>,
) -> u64 {
    let settings = shared.settings();
    let mut guard = shared.state();
    let state = &mut *guard;
    // Another process without a journal counts from the beginning, and knows nothing of what the one before it held.
    // So may the first one that comes here: the process before it may have died before it found us.
    let another = state.hello.as_ref().is_none_or(|before| instance(before) != instance(hello));
    if state.hello.as_ref().is_some_and(|before| is_older(hello, before)) {
        // What was said last has overtaken it: its process has died, or has given it up and greeted again. Nobody reads what
        // would be answered, and what it says has changed since. No link has this number.
        state.late_runners += u64::from(another);
        return 0;
    }
    let held: Vec<_> = pages.iter().flat_map(|page| &page.sessions).collect();
    let anew = begins_anew(state, hello);
    let lost = loss::shows(state, hello, &held, another);
    if let Err((refusal, problem)) = may_be_served(state, hello, &held, holder.as_ref(), (another, anew, lost)) {
        state.refused_links.push(format!("{}: {problem}", refusal.name()));
        // Whoever has hung up needs no reason.
        let _ = sender.try_send(Err(refusal.status(problem)));
        return 0;
    }
    if another {
        let before = state.hello.as_ref().map(instance);
        state.replaced.extend(before);
    }
    if lost {
        loss::adopt(state, hello, &held);
    }
    if anew && another {
        state.event_through = hello.first_unacked_event_seq.saturating_sub(1);
        settle_lost(shared, state);
    } else {
        // What the process before it had told, and was not acknowledged, is told again under numbers of its own.
        state.event_through = state.event_through.max(hello.first_unacked_event_seq.saturating_sub(1));
    }
    state.links += 1;
    // What counts is what this link says.
    state.drain = None;
    state.overlaps += u64::from(state.link.is_some());
    let number = state.links;
    state.link = Some(LinkOut { number, sender, frame_no: 0, live: false, holder });
    (state.output_received, state.credited) = (0, settings.window);
    state.hello = Some(hello.clone());
    renew_lease(state, &settings);
    let known = |feature: &&String| FEATURES.contains(&feature.as_str());
    state.send_now(Body::Welcome(pb::Welcome {
        minor: 0,
        features: hello.features.iter().filter(known).cloned().collect(),
        link_id: format!("link-{number}"),
        term: state.term(),
        lease_ttl: settings.lease_ttl.try_into().ok(),
        heartbeat_every: settings.heartbeat_every.try_into().ok(),
        limits: Some(pb::LinkLimits { link_credit_bytes: settings.window, ..Default::default() }),
        event_ack_through: if settings.acknowledge { state.event_through } else { 0 },
        decision_pages: 1,
        ..Default::default()
    }));
    if another && !anew {
        settle_missing(state, &held);
    }
    if lost {
        loss::give_up(shared, state, &held);
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

/// Whether it has nothing of what an earlier process of it had: it keeps nothing, or its state directory is another one.
fn begins_anew(state: &State, hello: &pb::Hello) -> bool {
    let other_state = |before: &pb::Hello| !before.ephemeral && state_id(before) != state_id(hello);
    hello.ephemeral || state.hello.as_ref().is_some_and(other_state)
}

fn may_be_served(
    state: &State,
    hello: &pb::Hello,
    held: &[&pb::SessionState],
    holder: Option<&Holder>,
    (another, anew, lost): (bool, bool, bool),
) -> Result<(), (Refusal, String)> {
    if let Some(denied) = holder.and_then(|holder| revocation::denial(state, holder)) {
        return Err((Refusal::CertificateRevoked, denied));
    }
    let runner_id = hello.runner.as_ref().map_or("", |runner| runner.runner_id.as_str());
    if let Some(problem) = holder.and_then(|holder| revocation::mismatch(holder, runner_id)) {
        return Err((Refusal::IdentityMismatch, problem));
    }
    if hello.major != 1 || hello.minor_min > 0 {
        let (major, from, to) = (hello.major, hello.minor_min, hello.minor_max);
        let problem = format!("version 1.0 is spoken here, {major}.{from} to {major}.{to} were offered");
        return Err((Refusal::VersionUnsupported, problem));
    }
    if another && state.replaced.contains(&instance(hello)) {
        let problem = "a process that another one has taken the place of is back, so two use one identity";
        return Err((Refusal::RunnerIdConflict, problem.to_owned()));
    }
    // Without a state of its own it could not be told from its successor.
    let held_by_other = anew && another && !hello.ephemeral;
    if held_by_other && state.lease_until.is_some_and(|until| Instant::now() < until) {
        let problem = "a runner with another state directory has this identity, and its lease is not over";
        return Err((Refusal::RunnerIdConflict, problem.to_owned()));
    }
    if anew && another || lost {
        return Ok(());
    }
    let (next, known) = (hello.next_event_seq, state.event_through);
    if next <= known {
        let problem = format!("the next event is {next}, and {known} came already: this state was set back");
        return Err((Refusal::StateRolledBack, problem));
    }
    match another.then(|| went_back(state, held)).flatten() {
        Some(problem) => Err((Refusal::StateRolledBack, problem)),
        None => Ok(()),
    }
}

/// What another process must have found on its disk, and does not know of: acceptance and start of a call are there before
/// they are told, and stay until its end and all of its output are acknowledged. Of a call that has not begun an end is told only
/// when it is there as well.
fn went_back(state: &State, held: &[&pb::SessionState]) -> Option<String> {
    // Also of calls that nobody has to list any more it must know how many there were.
    let behind = held.iter().find_map(|session| {
        let is_of_it = |request: &pb::Call| request.session_id == session.session_id && request.epoch == session.epoch;
        let told = state.calls.values().filter(|record| record.accepted && is_of_it(&record.request)).count() as u64;
        (session.calls_accepted < told).then_some((session, told))
    });
    if let Some((pb::SessionState { session_id, calls_accepted, .. }, told)) = behind {
        return Some(format!(
            "session {session_id} is said to have taken {calls_accepted} calls, and has told of {told}: this state was set back"
        ));
    }
    // What is not all here cannot have been acknowledged, so nobody was allowed to forget it.
    let is_owed = |record: &super::state::CallRecord| !record.complete && record.refused.is_none();
    let has_begun =
        |record: &super::state::CallRecord| record.started.is_some() || record.end.as_ref().is_some_and(is_told);
    state.calls.iter().filter(|(_, record)| record.accepted).find_map(|(call_id, record)| {
        let found = held.iter().flat_map(|session| &session.calls).find(|call| call.call_id == *call_id);
        match found {
            None if is_owed(record) => {
                Some(format!("call {call_id} was accepted, and is not known any more: this state was set back"))
            }
            Some(found) if has_begun(record) && found.phase() == pb::CallPhase::Accepted => {
                Some(format!("call {call_id} had started or ended, and is said to wait: this state was set back"))
            }
            None | Some(_) => None,
        }
    })
}

/// An end has a number when the runner has told it, and none when somebody here has made it up.
fn is_told(end: &pb::CallFinished) -> bool {
    end.event_seq > 0
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
        Some(record) if record.elsewhere => pb::ResumeAction::Fence,
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
    for record in state.sessions.values().filter(|record| !record.elsewhere) {
        if record.opened.is_none() && record.refused.is_none() && record.ended.is_none() {
            frames.push(Body::OpenSession(record.request.clone()));
        }
    }
    for (call_id, record) in state.calls.iter().filter(|(_, call)| !state.is_elsewhere(&call.request.session_id)) {
        let is_held = held.iter().flat_map(|session| &session.calls).any(|call| call.call_id == *call_id);
        let open = record.end.is_none() && record.refused.is_none();
        if open && !is_held {
            frames.push(Body::Call(record.request.clone()));
        }
        if let (true, false, Some(cancel)) = (open, record.cancel_noted, &record.cancel) {
            frames.push(Body::CancelCall(cancel.clone()));
        }
    }
    for record in state.sessions.values().filter(|record| !record.elsewhere) {
        if let (Some(close), None) = (&record.close, &record.ended) {
            frames.push(Body::CloseSession(close.clone()));
        }
    }
    frames.into_iter().for_each(|body| state.send(body));
}

#[cfg(test)]
mod tests {
    use super::super::state::CallRecord;
    use super::*;

    #[test]
    fn state_that_does_not_know_a_call_whose_output_is_not_all_here_was_set_back() {
        let request = pb::Call { call_id: "c".into(), session_id: "s".into(), epoch: 1, ..Default::default() };
        let end = Some(pb::CallFinished { event_seq: 7, call_id: "c".into(), ..Default::default() });
        let record = CallRecord { request, sent: true, accepted: true, end, ..CallRecord::default() };
        let mut state = State::default();
        state.calls.insert("c".into(), CallRecord { complete: true, ..record.clone() });
        assert_eq!(went_back(&state, &[]), None, "its end and output may have been acknowledged and forgotten");

        state.calls.insert("c".into(), record);

        let problem = went_back(&state, &[]).unwrap();
        assert!(problem.contains("call c was accepted, and is not known any more"), "{problem}");
    }
}
