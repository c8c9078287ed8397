//! What is open at one moment, for people.

use crate::session::core::{CallStage, Core, SessionStage};
use crate::work::{Receipt, SessionOpen, ToolCall};

/// Everything that is open.
#[derive(Debug, Clone)]
pub struct View {
    /// By session id.
    pub sessions: Vec<ViewSession>,
    /// Calls of sessions that are over, whose results are not acknowledged.
    pub leftover: Vec<ViewCall>,
    /// Calls between preparation and end.
    pub running_calls: usize,
    /// Calls that wait.
    pub queued_calls: usize,
    /// The runner is being emptied.
    pub draining: bool,
    /// The journal is broken, and nothing is left that needs this process.
    pub spent: bool,
}

/// One session.
#[derive(Debug, Clone)]
pub struct ViewSession {
    /// How it was opened, with the limits it got.
    pub request: SessionOpen,
    /// Its placement.
    pub epoch: u64,
    /// Where it is.
    pub stage: SessionStage,
    /// What protects it.
    pub receipt: Receipt,
    /// Its calls, by id.
    pub calls: Vec<ViewCall>,
}

/// One call.
#[derive(Debug, Clone)]
pub struct ViewCall {
    /// The request.
    pub request: ToolCall,
    /// Where it is.
    pub stage: CallStage,
}

impl View {
    pub(super) fn of(core: &Core) -> Self {
        let mut calls: Vec<_> =
            core.calls().map(|(request, stage)| ViewCall { request: request.clone(), stage }).collect();
        calls.sort_by(|a, b| a.request.call_id.cmp(&b.request.call_id));
        let mut sessions: Vec<_> = core
            .sessions()
            .map(|(request, epoch, stage, receipt)| {
                let (own, others) =
                    std::mem::take(&mut calls).into_iter().partition(|c| c.request.session_id == request.session_id);
                calls = others;
                ViewSession { request: request.clone(), epoch, stage, receipt: receipt.clone(), calls: own }
            })
            .collect();
        sessions.sort_by(|a, b| a.request.session_id.cmp(&b.request.session_id));
        Self {
            sessions,
            leftover: calls,
            running_calls: core.running_calls(),
            queued_calls: core.queued_calls(),
            draining: core.is_draining(),
            spent: core.is_spent(),
        }
    }
}
