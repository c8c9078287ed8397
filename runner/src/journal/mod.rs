//! What must be on disk before something may happen, as a trait.
//!
//! A call is written down three times: accepted before its caller hears so, started before its gate opens, finished
//! before its result is sent. `Volatile` is the explicit opt-out: it keeps nothing, so calls need no gate.

use std::sync::Arc;

use crate::work::{BoxFuture, CallId, CallResult, ToolCall};

/// Why a record could not be written. The journal is poisoned afterwards: a failed sync is never repeated.
#[derive(Debug, Clone, thiserror::Error)]
#[error("journal refused record {record} of call {call_id}: {reason}")]
pub struct JournalError {
    /// Kind of record.
    pub record: &'static str,
    /// The call.
    pub call_id: CallId,
    /// What the file system said.
    pub reason: String,
}

/// Durable memory of calls. Each future resolves when the record would survive a power cut.
pub trait Journal: Send + Sync {
    /// Whether records outlive the process; if so, calls are held at a gate until their start is written.
    fn is_durable(&self) -> bool;

    /// The call will get exactly one outcome.
    fn accepted(&self, call: &ToolCall) -> BoxFuture<'static, Result<(), JournalError>>;

    /// The call may have effects from here.
    fn started(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), JournalError>>;

    /// The call is over.
    fn finished(&self, call_id: &CallId, result: &Arc<CallResult>) -> BoxFuture<'static, Result<(), JournalError>>;

    /// The result is stored elsewhere; the record may go. Losing this only causes a repeat, so nobody waits for it.
    fn trimmed(&self, call_id: &CallId);
}

/// Keeps nothing beyond the process.
#[derive(Debug, Default)]
pub struct Volatile;

impl Journal for Volatile {
    fn is_durable(&self) -> bool {
        false
    }

    fn accepted(&self, _call: &ToolCall) -> BoxFuture<'static, Result<(), JournalError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn started(&self, _call_id: &CallId) -> BoxFuture<'static, Result<(), JournalError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn finished(&self, _call_id: &CallId, _result: &Arc<CallResult>) -> BoxFuture<'static, Result<(), JournalError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn trimmed(&self, _call_id: &CallId) {}
}
