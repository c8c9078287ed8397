//! What becomes of what the runner held when the link was made.

use std::collections::BTreeSet;
use std::time::Duration;

use proto::runner::v1 as pb;

use super::link::Link;
use super::task::Task;
use super::{LinkError, decode};
use crate::work::{CancelMode, SessionClose, SessionId, WorkItem};

impl Task {
    pub(super) fn decisions(&mut self, page: pb::ResumeDecisionPage, link: &mut Link) -> Result<(), LinkError> {
        if link.decision_pages_left == 0 {
            return Err(LinkError::Violation("more decision pages than announced".to_owned()));
        }
        for decision in page.decisions {
            self.decide(decision, link).map_err(|failure| LinkError::Violation(failure.message))?;
        }
        link.decision_pages_left -= 1;
        if link.decision_pages_left == 0 {
            self.suspend_the_undecided(link);
        }
        self.live_if_decided(link);
        Ok(())
    }

    /// An orchestrator that has lost its memory must not destroy anybody's work: what it does not mention waits.
    fn suspend_the_undecided(&mut self, link: &mut Link) {
        let decided: BTreeSet<SessionId> = std::mem::take(&mut link.decided);
        for (session_id, _) in self.book.session_epochs() {
            // What came after the greeting is not in it, so nobody could decide about it.
            if link.told.contains(&session_id) && !decided.contains(&session_id) {
                self.pending.push_back(WorkItem::Suspend { session_id: Some(session_id) });
            }
        }
    }

    fn decide(&mut self, decision: pb::ResumeDecision, link: &mut Link) -> Result<(), crate::work::ToolFailure> {
        let session_id = decode::session_id(&decision.session_id)?;
        let close = |grace, fenced| {
            WorkItem::Close(SessionClose { session_id: session_id.clone(), epoch: decision.epoch, grace, fenced })
        };
        // A value this runner does not know is treated as the careful one.
        let action = pb::ResumeAction::try_from(decision.action).unwrap_or(pb::ResumeAction::Suspend);
        self.pending.push_back(match action {
            pb::ResumeAction::Keep => WorkItem::Resume { session_id: Some(session_id.clone()) },
            pb::ResumeAction::Fence => close(Duration::ZERO, true),
            pb::ResumeAction::Close => close(Duration::from_secs(2), false),
            pb::ResumeAction::Unspecified | pb::ResumeAction::Suspend => {
                WorkItem::Suspend { session_id: Some(session_id.clone()) }
            }
        });
        link.decided.insert(session_id);
        for call in decision.calls {
            let call_id = decode::call_id(&call.call_id)?;
            for (stream, through) in decode::stream_acks(&call.stored_through)? {
                if self.book.stored_through(&call_id, stream, through) {
                    self.pending.push_back(WorkItem::Acknowledge { call_id: call_id.clone() });
                }
            }
            match pb::CallAction::try_from(call.action).unwrap_or(pb::CallAction::Continue) {
                pb::CallAction::Cancel => {
                    if let Some((session_id, epoch)) = self.book.session_of(&call_id) {
                        let mode = CancelMode::Terminate;
                        self.pending.push_back(WorkItem::Cancel { session_id, epoch, call_id, mode });
                    }
                }
                pb::CallAction::Forget => {
                    if self.book.forget(&call_id) {
                        self.pending.push_back(WorkItem::Acknowledge { call_id });
                    }
                }
                // A result without acknowledgement is sent on every link, asked for or not.
                pb::CallAction::Unspecified | pb::CallAction::Continue | pb::CallAction::ResendResult => {}
            }
        }
        Ok(())
    }
}
