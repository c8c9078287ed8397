//! A new runner takes over the connection to process 1 of a sandbox that an earlier one made.
//!
//! Process 1 announces again what runs and what is over right behind its greeting, so the expected calls are in the table
//! before anything is sent. What nobody expects goes on until [`Control::end_strangers`]: nobody would read its output, and
//! nobody acknowledge it, but a newer state than ours may know it. The stream is judged as ever; see [`super::snapshot`] for
//! what is compared with what.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use proto::init::v1 as wire;
use tracing::{debug, warn};

use super::calls::CallTable;
use super::exchange::{Shared, end_of};
use super::snapshot::{self, Disposal, Settled};
use super::{Control, ControlError, Descriptors, Greeting, LARGEST_PACKET, PacketSocket, Patience, Violation};
use crate::work::{CallEnd, CallEvent, CallId, CancelMode, Code, ExpectedCall, FoundCall, Outcome, ToolFailure};

/// How long is waited for the end of calls that nobody knows; what takes longer ends while other calls already run.
const STRANGER_TIME: Duration = Duration::from_millis(500);

/// A connection that was taken over.
pub struct Resumed {
    /// The connection.
    pub control: Control,
    /// What process 1 said of itself.
    pub greeting: Greeting,
    /// Every expected call that it knows.
    pub found: BTreeMap<CallId, FoundCall>,
    /// It says that every process of the workload was ended, and no call has begun since.
    pub stopped: bool,
}

impl fmt::Debug for Resumed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resumed").field("greeting", &self.greeting).field("found", &self.found).finish_non_exhaustive()
    }
}

impl Control {
    /// Connects to the socket at `path` like [`Control::connect`] and takes over the calls of an earlier runner. Observers
    /// may hear of their calls before this returns.
    ///
    /// A call that process 1 says has run, although its start was never written down, ends the connection like anything that
    /// cannot be. Its observer is told first that its outcome is unknown: the record may have been lost, so "never started"
    /// would be a guess.
    ///
    /// # Errors
    /// [`ControlError`]; `Duplicate` and `Busy` are about `expected`, and nothing was sent then.
    pub async fn attach(
        path: &Path,
        output_root: &str,
        generation: u64,
        patience: Patience,
        expected: Vec<ExpectedCall>,
    ) -> Result<Resumed, ControlError> {
        let socket = PacketSocket::connect(path, LARGEST_PACKET, Descriptors::Refused).map_err(end_of)?;
        Self::resume(socket, output_root, generation, patience, expected).await
    }

    /// The same over a connected socket.
    ///
    /// # Errors
    /// As [`Control::attach`].
    pub async fn attach_over(
        connection: OwnedFd,
        generation: u64,
        patience: Patience,
        expected: Vec<ExpectedCall>,
    ) -> Result<Resumed, ControlError> {
        let socket = PacketSocket::new(connection, LARGEST_PACKET, Descriptors::Refused).map_err(end_of)?;
        Self::resume(socket, "", generation, patience, expected).await
    }

    async fn resume(
        socket: PacketSocket,
        output_root: &str,
        generation: u64,
        patience: Patience,
        expected: Vec<ExpectedCall>,
    ) -> Result<Resumed, ControlError> {
        let call_ids: Vec<CallId> = expected.iter().map(|call| call.call_id.clone()).collect();
        let calls = CallTable::expecting(expected)?;
        let (control, greeting) = Self::greet(socket, output_root, generation, patience, calls).await?;
        let asked = control.request("snapshot", wire::request::Body::Snapshot(wire::Snapshot {})).await;
        let settled = control.shared().state().settled.take();
        let (mut settled, stopped) = match (asked, settled) {
            (Ok(wire::frame::Body::Snapshot(reply)), Some(settled)) => (settled, reply.stopped),
            (Err(ControlError::Ended(end)), _) => return Err(end.into()),
            _ => return Err(control.violated(Violation::WrongAnswer { request: "snapshot" }).into()),
        };
        let known = |call_id: CallId| Some((settled.found.remove(call_id.as_str())?, call_id));
        let found = call_ids.into_iter().filter_map(known).map(|(phase, call_id)| (call_id, phase)).collect();
        Ok(Resumed { control, greeting, found, stopped })
    }

    /// Ends the calls that nobody knows, once. Whoever asks meanwhile waits for it.
    ///
    /// # Errors
    /// [`ControlError`], when the connection is over.
    pub async fn end_strangers(&self) -> Result<(), ControlError> {
        if !self.shared().state().calls.has_strangers() {
            return Ok(());
        }
        let _one_after_the_other = self.shared().ending_strangers.lock().await;
        let strangers = self.shared().state().calls.dispose_of_strangers();
        if strangers.is_empty() {
            return Ok(());
        }
        warn!(calls = strangers.len(), "calls that nobody knows are dropped");
        for (call_id, disposal) in strangers {
            match disposal {
                Disposal::Abort => match self.abort(&call_id).await {
                    Err(ControlError::Refused { .. }) => {
                        return Err(self.violated(Violation::WrongAnswer { request: "abort" }).into());
                    }
                    outcome => outcome?,
                },
                Disposal::Kill => {
                    self.shared().watch_overdue(call_id.clone(), Duration::ZERO);
                    match self.cancel(&call_id, CancelMode::Kill).await {
                        // It ended meanwhile, and is acknowledged already.
                        Ok(()) | Err(ControlError::Refused { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                Disposal::Acknowledge => self.shared().discard(call_id),
            }
        }
        let gone = async {
            loop {
                let gone = self.shared().stranger_gone.notified();
                if !self.shared().state().calls.has_strangers() {
                    return;
                }
                gone.await;
            }
        };
        if tokio::time::timeout(STRANGER_TIME, gone).await.is_err() {
            debug!("calls that nobody knows have not ended yet");
        }
        Ok(())
    }
}

impl Shared {
    /// What process 1 holds has arrived, of a sandbox that is taken over.
    pub(super) fn settle(self: &Arc<Self>, reply: &wire::SnapshotReply) -> Result<(), Violation> {
        let seen = snapshot::decode(reply)?;
        let open = {
            let mut state = self.state();
            if !state.calls.is_unsettled {
                return Err(Violation::Malformed("is a snapshot that nobody asked for"));
            }
            if reply.shell_generation < state.shell_generation {
                return Err(Violation::impossible("snapshot.shell_generation", reply.shell_generation));
            }
            state.shell_generation = reply.shell_generation;
            let mut settled: Settled = state.calls.settle(seen)?;
            let open = std::mem::take(&mut settled.open);
            state.settled = Some(settled);
            open
        };
        for (call_id, limit) in open {
            self.watch_overdue(call_id, limit);
        }
        Ok(())
    }

    /// A call that nobody knows has ended. Process 1 must not forget it before it is to be ended.
    pub(super) fn discard_if_unwanted(self: &Arc<Self>, call_id: String) {
        if !self.state().calls.keeps_strangers {
            self.discard(call_id);
        }
    }

    /// Has process 1 forget a call that nobody knows and that is over.
    fn discard(self: &Arc<Self>, call_id: String) {
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            let acknowledge = wire::AcknowledgeExit { call_id: call_id.clone() };
            match shared.request("acknowledge_exit", wire::request::Body::AcknowledgeExit(acknowledge)).await {
                Ok(wire::frame::Body::Done(_)) => {}
                Ok(_) => {
                    shared.finish(Violation::WrongAnswer { request: "acknowledge_exit" }.into());
                }
                Err(error) => debug!(%error, "a call that nobody knows was not acknowledged"),
            }
            shared.state().calls.remove(&call_id);
            shared.stranger_gone.notify_waiters();
        });
    }

    /// Tells whoever expected a call that it has perhaps run. The connection ends with what is said about it.
    pub(super) fn tell_unrecorded(&self, violation: &Violation) {
        let Violation::Unrecorded { call_id, .. } = violation else { return };
        let Some(observer) = self.state().calls.observer(call_id) else { return };
        let failure = ToolFailure::new(
            Code::OutcomeUnknown,
            "its sandbox says that the call has run, but the runner has no record that it was started",
            "look at what the call was to change before sending it again",
        );
        let end = CallEnd::without_output(Outcome::Indeterminate { failure });
        observer.observe(CallEvent::Finished(Box::new(end)));
    }
}

#[cfg(test)]
#[path = "attach_tests.rs"]
mod tests;
