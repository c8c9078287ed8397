//! Sessions of this runner that serve sessions of the environment: opened with the first call, kept over work items, closed
//! when nobody has wanted them for long enough.

use std::collections::BTreeMap;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tracing::{info, warn};

use super::calls::{KEEP_RESULTS, NOT_KEPT};
use super::item::Item;
use super::{Machine, SECOND, nanoseconds};
use crate::connector::claude::conversation::turns::MOST_RUNNING;
use crate::work::{
    CallId, Code, EnvironmentRef, Network, RequestDigest, RequestKind, ResourceLimits, SessionClose, SessionId,
    SessionOpen, ToolCall, ToolFailure, WorkItem,
};

/// Placement of every session: it is opened by one process at a time, so there is no newer one.
pub(super) const EPOCH: u64 = 1;
/// How long sandboxes live beyond the lease; as the launcher's policy has it.
const ORPHAN_TIME: Duration = Duration::from_secs(8100);
/// A session without a work item is told that this runner lives.
const KEEP_EVERY: u64 = 30 * SECOND;
const KEEP_FOR: u64 = 120 * SECOND;
/// How long a call waits for room before its caller hears that there is none.
const ROOM_PATIENCE: u64 = 60 * SECOND;
/// Time for processes to end by themselves.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Opening,
    Open,
    /// It could not be opened, and will be tried again.
    Refused,
    Closing,
}

/// A session of this runner.
#[derive(Debug)]
pub(super) struct Kept {
    phase: Phase,
    /// When a work item was last served by it.
    used_at: u64,
    keep_at: u64,
    /// Served by a work item at this moment.
    is_used: bool,
    /// Calls that are not known to be taken.
    sent: BTreeMap<CallId, ToolCall>,
    /// In the order in which they came.
    order: Vec<CallId>,
    retry_at: Option<u64>,
    refused_since: Option<u64>,
    /// It has nothing of what the session has done before, and no result has said so.
    is_new: bool,
    /// The session of the environment is over: nothing that comes of this one goes anywhere.
    is_over: bool,
}

impl Kept {
    fn new(phase: Phase, now: u64) -> Self {
        Self {
            phase,
            used_at: now,
            keep_at: now,
            is_used: false,
            sent: BTreeMap::new(),
            order: Vec::new(),
            retry_at: None,
            refused_since: None,
            is_new: false,
            is_over: false,
        }
    }

    /// When to look again.
    pub(super) fn wake(&self) -> u64 {
        let idle = (!self.is_used && self.phase == Phase::Open).then_some(self.keep_at);
        idle.into_iter().chain(self.retry_at).min().unwrap_or(u64::MAX)
    }
}

impl Machine {
    /// Hands a call to its session, which is opened when there is none.
    pub(super) fn send(&mut self, call: ToolCall) {
        let session_id = call.session_id.clone();
        if !self.sessions.contains_key(&session_id) {
            self.open(&session_id);
        }
        let Some(kept) = self.sessions.get_mut(&session_id) else { return };
        kept.order.push(call.call_id.clone());
        kept.sent.insert(call.call_id.clone(), call.clone());
        // One that is closing, or was refused, is opened again first.
        if matches!(kept.phase, Phase::Opening | Phase::Open) {
            self.work(WorkItem::Call(call));
        }
    }

    fn open(&mut self, session_id: &SessionId) {
        let now = self.now;
        let kept = self.sessions.entry(session_id.clone()).or_insert_with(|| Kept::new(Phase::Opening, now));
        (kept.phase, kept.retry_at, kept.is_new) = (Phase::Opening, None, true);
        self.work(WorkItem::Open(SessionOpen {
            session_id: session_id.clone(),
            epoch: EPOCH,
            digest: RequestDigest(Sha256::digest(session_id.as_str()).into()),
            environment: EnvironmentRef::default(),
            limits: ResourceLimits::default(),
            network: Network::None,
            variables: Vec::new(),
            min_tier: String::new(),
            orphan_timeout: None,
            idle_timeout: None,
            // Whose turn it is, the conversation decides.
            max_concurrent_calls: u32::from(MOST_RUNNING),
            tenant: String::new(),
        }));
        self.grant(session_id);
    }

    /// What may begin in a session, and how long its sandbox lives.
    pub(super) fn grant(&mut self, session_id: &SessionId) {
        let (now, keep) = (self.now, nanoseconds(self.rules.keep));
        let Some(kept) = self.sessions.get_mut(session_id) else { return };
        let item = self.items.values().find(|item| item.core.as_ref() == Some(session_id) && item.is_serving());
        kept.is_used = item.is_some();
        let may_begin = item.is_some_and(|item| item.is_reconciled());
        let close_at = kept.used_at.saturating_add(keep).max(now.saturating_add(SECOND));
        kept.keep_at = now.saturating_add(KEEP_EVERY).min(close_at);
        let until_ns = match item {
            Some(item) => {
                kept.used_at = now;
                item.lease_until()
            }
            None => now.saturating_add(KEEP_FOR),
        };
        let (is_used, session_id) = (kept.is_used, session_id.clone());
        let decided = Some(session_id.clone());
        // What must not begin is told so before it could.
        if !is_used {
            self.work(WorkItem::Suspend { session_id: decided.clone() });
        }
        self.work(WorkItem::Lease { session_id: Some(session_id), until_ns, orphan_time: ORPHAN_TIME });
        if may_begin {
            self.work(WorkItem::Resume { session_id: decided });
        }
    }

    /// Whether a result is the first one of a sandbox whose session has done something elsewhere. Only one is.
    pub(super) fn take_is_new(&mut self, session_id: &SessionId) -> bool {
        let has_run = |item: &Item| item.core.as_ref() == Some(session_id) && item.conversation.has_run();
        let is_known = self.items.values().any(has_run);
        let Some(kept) = self.sessions.get_mut(session_id) else { return false };
        std::mem::take(&mut kept.is_new) && is_known
    }

    /// The lease of an item was renewed, or begins.
    pub(super) fn lease_renewed(&mut self, work_id: &str, is_first: bool) {
        let Some(item) = self.items.get(work_id) else { return };
        let Some(session_id) = item.core.clone() else { return };
        let until_ns = item.lease_until();
        if is_first {
            return self.grant(&session_id);
        }
        if self.sessions.contains_key(&session_id) {
            self.work(WorkItem::Lease { session_id: Some(session_id), until_ns, orphan_time: ORPHAN_TIME });
        }
    }

    /// An item does not serve the session any more.
    pub(super) fn let_go(&mut self, session_id: &SessionId) {
        let now = self.now;
        if let Some(kept) = self.sessions.get_mut(session_id) {
            kept.used_at = now;
            // Calls that the session has not taken are not sent again: whoever serves it next reads what is open.
            let untaken = std::mem::take(&mut kept.sent);
            kept.order.clear();
            (kept.retry_at, kept.refused_since) = (None, None);
            let phase = kept.phase;
            if matches!(phase, Phase::Refused | Phase::Closing) {
                for call_id in untaken.keys() {
                    self.calls.remove(call_id);
                }
            }
            match phase {
                Phase::Refused => drop(self.sessions.remove(session_id)),
                Phase::Closing => {}
                Phase::Opening | Phase::Open => self.grant(session_id),
            }
        }
    }

    /// The session of the environment is over for good.
    pub(super) fn session_over(&mut self, session_id: &SessionId) {
        if let Some(kept) = self.sessions.get_mut(session_id) {
            kept.is_over = true;
            let untaken = std::mem::take(&mut kept.sent);
            kept.order.clear();
            for call_id in untaken.keys() {
                self.calls.remove(call_id);
            }
            self.close(session_id);
        }
        self.drop_results(session_id);
    }

    pub(super) fn is_over(&self, session_id: &SessionId) -> bool {
        self.sessions.get(session_id).is_some_and(|kept| kept.is_over)
    }

    fn close(&mut self, session_id: &SessionId) {
        let Some(kept) = self.sessions.get_mut(session_id) else { return };
        match kept.phase {
            Phase::Closing => {}
            Phase::Refused => {
                self.sessions.remove(session_id);
            }
            Phase::Opening | Phase::Open => {
                kept.phase = Phase::Closing;
                let session_id = session_id.clone();
                self.work(WorkItem::Close(SessionClose {
                    session_id,
                    epoch: EPOCH,
                    grace: CLOSE_GRACE,
                    fenced: false,
                }));
            }
        }
    }

    pub(super) fn session_restored(&mut self, session_id: SessionId, ready: bool) {
        let phase = if ready { Phase::Open } else { Phase::Opening };
        // One that is made anew has nothing of what was in the one before.
        self.sessions.insert(session_id.clone(), Kept { is_new: !ready, ..Kept::new(phase, self.now) });
        self.grant(&session_id);
    }

    pub(super) fn session_opened(&mut self, session_id: &SessionId) {
        if let Some(kept) = self.sessions.get_mut(session_id)
            && kept.phase == Phase::Opening
        {
            (kept.phase, kept.refused_since) = (Phase::Open, None);
            info!(session_id = %session_id, "session of the work queue opened");
        }
    }

    /// Calls that had not reached it go to the next one of its name.
    pub(super) fn session_ended(&mut self, session_id: &SessionId) {
        let Some(before) = self.sessions.remove(session_id) else { return };
        if before.sent.is_empty() || before.is_over {
            return;
        }
        self.open(session_id);
        if let Some(kept) = self.sessions.get_mut(session_id) {
            (kept.sent, kept.order) = (before.sent, before.order);
        }
        self.send_again(session_id);
    }

    fn send_again(&mut self, session_id: &SessionId) {
        let Some(kept) = self.sessions.get(session_id) else { return };
        let calls: Vec<_> = kept.order.iter().filter_map(|call_id| kept.sent.get(call_id)).cloned().collect();
        for call in calls {
            self.work(WorkItem::Call(call));
        }
    }

    pub(super) fn accepted(&mut self, session_id: &SessionId, call_id: &CallId) {
        if let Some(kept) = self.sessions.get_mut(session_id)
            && kept.sent.remove(call_id).is_some()
        {
            kept.order.retain(|id| id != call_id);
        }
    }

    pub(super) fn refused(
        &mut self,
        request: RequestKind,
        session_id: Option<SessionId>,
        call_id: Option<CallId>,
        failure: ToolFailure,
    ) {
        match (request, session_id, call_id) {
            (RequestKind::Open, Some(session_id), _) => self.open_refused(&session_id, &failure),
            (RequestKind::Call, Some(session_id), Some(call_id)) => self.call_refused(&session_id, call_id, &failure),
            // It was gone already.
            (RequestKind::Close, Some(session_id), _) => self.session_ended(&session_id),
            // A cancel that was not taken down: the call ends all the same, or has ended.
            _ => {}
        }
    }

    fn open_refused(&mut self, session_id: &SessionId, failure: &ToolFailure) {
        let again_at = self.within(1.0, 3.0);
        let now = self.now;
        let Some(kept) = self.sessions.get_mut(session_id) else { return };
        // An earlier one of its name is still ending, and says so when it has.
        if failure.code == Code::SessionClosed {
            kept.phase = Phase::Closing;
            return;
        }
        warn!(session_id = %session_id, error = %failure, "a session of the work queue could not be opened");
        kept.phase = Phase::Refused;
        let since = *kept.refused_since.get_or_insert(now);
        if failure.retryable && failure.code != Code::Draining && now.saturating_sub(since) < ROOM_PATIENCE {
            kept.retry_at = Some(again_at);
            if failure.code == Code::Capacity {
                self.is_room_wanted = !self.make_room();
            }
            return;
        }
        let Some(kept) = self.sessions.remove(session_id) else { return };
        for call_id in kept.order {
            self.give_up_call(session_id, &call_id, not_run(failure));
        }
    }

    fn call_refused(&mut self, session_id: &SessionId, call_id: CallId, failure: &ToolFailure) {
        let again_at = self.within(0.5, 1.5);
        let now = self.now;
        let kept = self.sessions.get_mut(session_id).filter(|kept| kept.sent.contains_key(&call_id));
        let Some(kept) = kept else {
            // Nobody waits for it any more, and the sessions do not know it.
            return self.forget_unless_finished(&call_id);
        };
        match failure.code {
            // It waits for the answer to the next opening.
            Code::SessionUnknown | Code::SessionClosed if matches!(kept.phase, Phase::Refused | Phase::Closing) => {}
            Code::SessionClosed => kept.phase = Phase::Closing,
            Code::SessionUnknown => {
                kept.phase = Phase::Refused;
                kept.retry_at = Some(now);
            }
            Code::CallForgotten => {
                self.accepted(session_id, &call_id);
                self.give_up_call(session_id, &call_id, NOT_KEPT.to_owned());
            }
            code => {
                let since = *kept.refused_since.get_or_insert(now);
                if failure.retryable && code != Code::Draining && now.saturating_sub(since) < ROOM_PATIENCE {
                    kept.retry_at = Some(again_at);
                    return;
                }
                self.accepted(session_id, &call_id);
                self.give_up_call(session_id, &call_id, not_run(failure));
            }
        }
    }

    /// Ends the session that nobody has wanted for longest, so that another one has its place. False when there is none.
    pub(in crate::connector::claude) fn make_room(&mut self) -> bool {
        let may = |(id, kept): &(&SessionId, &Kept)| !kept.is_used && kept.phase == Phase::Open && !self.owes(id);
        let oldest = self.sessions.iter().filter(may).min_by_key(|(_, kept)| kept.used_at).map(|(id, _)| id.clone());
        if let Some(session_id) = oldest {
            info!(session_id = %session_id, "a session that nobody wants now is ended to make room");
            self.close(&session_id);
            return true;
        }
        false
    }

    /// Does for the sessions what is due.
    pub(super) fn tend_sessions(&mut self) {
        let (now, keep) = (self.now, self.rules.keep);
        let ids: Vec<_> =
            self.sessions.iter().filter(|(_, kept)| now >= kept.wake()).map(|(id, _)| id.clone()).collect();
        for session_id in ids {
            let owes = self.owes(&session_id);
            let Some(kept) = self.sessions.get_mut(&session_id) else { continue };
            if kept.retry_at.is_some_and(|at| now >= at) {
                kept.retry_at = None;
                match kept.phase {
                    Phase::Refused => self.open(&session_id),
                    Phase::Opening | Phase::Open => {}
                    Phase::Closing => continue,
                }
                self.send_again(&session_id);
                continue;
            }
            if kept.is_used || kept.phase != Phase::Open {
                continue;
            }
            // One that owes a result is still wanted, though not for ever.
            let unused = now.saturating_sub(kept.used_at);
            if unused >= nanoseconds(keep) && (!owes || unused >= nanoseconds(keep.saturating_add(KEEP_RESULTS))) {
                info!(session_id = %session_id, "nobody has wanted a session for as long as it is kept");
                self.close(&session_id);
            } else {
                self.grant(&session_id);
            }
        }
    }
}

fn not_run(failure: &ToolFailure) -> String {
    format!("the call did not run: {}", failure.message)
}
