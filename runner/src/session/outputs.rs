//! Where sandboxes are found: by session while the session lives, by call until the result is acknowledged.
//!
//! The second outlives the first, so that output of an ended session can still be read, even when a later placement of
//! the session has a sandbox of its own.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::work::{
    BoxFuture, CallId, Code, OutputChunk, OutputSource, Receipt, Sandbox, SandboxId, SessionId, Stream, StreamLengths,
    ToolFailure,
};

#[derive(Default)]
struct Maps {
    sessions: HashMap<SessionId, Arc<dyn Sandbox>>,
    calls: HashMap<CallId, (Arc<dyn Sandbox>, StreamLengths)>,
}

/// Shared by the session loop, which adds and removes, and by connectors, which read.
#[derive(Clone, Default)]
pub struct Outputs(Arc<RwLock<Maps>>);

impl Outputs {
    fn read(&self) -> RwLockReadGuard<'_, Maps> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert_session(&self, session_id: SessionId, sandbox: Arc<dyn Sandbox>) {
        self.write().sessions.insert(session_id, sandbox);
    }

    pub(super) fn remove_session(&self, session_id: &SessionId) {
        self.write().sessions.remove(session_id);
    }

    pub(super) fn session(&self, session_id: &SessionId) -> Option<Arc<dyn Sandbox>> {
        self.read().sessions.get(session_id).cloned()
    }

    pub(super) fn insert_call(&self, call_id: CallId, sandbox: Arc<dyn Sandbox>) {
        self.write().calls.insert(call_id, (sandbox, StreamLengths::default()));
    }

    pub(super) fn remove_call(&self, call_id: &CallId) -> Option<Arc<dyn Sandbox>> {
        self.write().calls.remove(call_id).map(|(sandbox, _)| sandbox)
    }

    pub(super) fn call(&self, call_id: &CallId) -> Option<Arc<dyn Sandbox>> {
        self.read().calls.get(call_id).map(|(sandbox, _)| Arc::clone(sandbox))
    }

    pub(super) fn advanced(&self, call_id: &CallId, lengths: &StreamLengths) {
        if let Some((_, known)) = self.write().calls.get_mut(call_id) {
            known.merge(lengths);
        }
    }

    /// What a call has printed so far, as its sandbox has said; nothing of one that is not known.
    #[must_use]
    pub fn lengths(&self, call_id: &CallId) -> StreamLengths {
        self.read().calls.get(call_id).map(|(_, lengths)| *lengths).unwrap_or_default()
    }

    /// The sandbox of a session, if it has one.
    #[must_use]
    pub fn sandbox_id(&self, session_id: &SessionId) -> Option<SandboxId> {
        self.session(session_id).map(|sandbox| sandbox.sandbox_id())
    }

    /// What protects a session, if it has a sandbox.
    #[must_use]
    pub fn receipt(&self, session_id: &SessionId) -> Option<Receipt> {
        self.session(session_id).map(|sandbox| sandbox.receipt())
    }
}

impl std::fmt::Debug for Outputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outputs").finish_non_exhaustive()
    }
}

impl OutputSource for Outputs {
    fn read_output(
        &self,
        call_id: &CallId,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<OutputChunk, ToolFailure>> {
        match self.call(call_id) {
            Some(sandbox) => sandbox.read_output(call_id, stream, offset, max_bytes),
            None => {
                let failure = ToolFailure::new(
                    Code::OutputGone,
                    format!("output of call {call_id} is not kept"),
                    "read output while the call runs, or before its result is acknowledged",
                );
                Box::pin(std::future::ready(Err(failure)))
            }
        }
    }
}
