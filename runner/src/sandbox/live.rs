//! One living sandbox: Ready -> Stopping -> Removed, and the seam that sessions use.
//!
//! Joins what the launcher says about the sandbox with what process 1 says about its calls, and kills the sandbox when the
//! latter cannot be true. Dropping the last reference removes the sandbox.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tracing::{info, warn};

use super::control::{Control, ControlEnd, ControlError};
use super::launch::{Ended, Inspection, LaunchError, Launcher};
use super::victim;
use crate::work::{
    BoxFuture, CallEnd, CallId, CallObserver, CancelMode, Code, OutputChunk, PreparedCall, Receipt, Sandbox, SandboxId,
    Slot, Stream, ToolFailure,
};

/// How long an ending of process 1 may take to be reported by the launcher after its socket has closed.
const REPORT_TIME: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    Ready,
    Stopping,
    Removed,
    Lost(String),
}

/// A sandbox of this host.
pub struct LiveSandbox {
    parts: Arc<Parts>,
    phase: watch::Receiver<Phase>,
}

struct Parts {
    sandbox_id: SandboxId,
    launcher: Launcher,
    control: Control,
    receipt: Receipt,
    pid: u32,
    id_count: u32,
    phase: watch::Sender<Phase>,
    ended: watch::Receiver<Option<Ended>>,
    /// Whether its processes may stand still. Held while the launcher is asked, so that the last word is the last request.
    frozen: Mutex<bool>,
}

/// What the launcher says of a living sandbox.
#[derive(Debug, Clone)]
pub struct Known {
    /// Its id.
    pub sandbox_id: SandboxId,
    /// Host pid of process 1.
    pub pid: u32,
    /// Number of host ids.
    pub id_count: u32,
    /// Becomes `Some` when it has ended.
    pub ended: watch::Receiver<Option<Ended>>,
    /// Its processes stand still.
    pub frozen: bool,
}

impl LiveSandbox {
    /// Takes charge of a sandbox, one that was just made or one that an earlier runner made. Must be called inside a tokio
    /// runtime.
    pub fn new(launcher: Launcher, known: Known, control: Control, receipt: Receipt) -> Self {
        let (sender, phase) = watch::channel(Phase::Ready);
        let Known { sandbox_id, pid, id_count, ended, frozen } = known;
        let (phase_sender, frozen) = (sender, Mutex::new(frozen));
        let parts = Arc::new(Parts {
            sandbox_id,
            launcher,
            control,
            receipt,
            pid,
            id_count,
            phase: phase_sender,
            ended,
            frozen,
        });
        tokio::spawn(guard(Arc::clone(&parts)));
        Self { parts, phase }
    }

    /// Host pid of process 1.
    pub fn pid(&self) -> u32 {
        self.parts.pid
    }

    /// Number of host ids it has.
    pub fn id_count(&self) -> u32 {
        self.parts.id_count
    }

    /// The connection to process 1, for what sessions do not need.
    pub fn control(&self) -> &Control {
        &self.parts.control
    }

    /// The kernel's account.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn inspect(&self) -> Result<Inspection, LaunchError> {
        self.parts.launcher.inspect(self.parts.sandbox_id.as_str()).await
    }
}

impl Drop for LiveSandbox {
    fn drop(&mut self) {
        if *self.phase.borrow() != Phase::Ready {
            return;
        }
        let parts = Arc::clone(&self.parts);
        // Outside a runtime everything is ending anyway, and the launcher cleans up when its connection closes.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { parts.close(Duration::ZERO).await });
        }
    }
}

/// Waits for whatever ends the sandbox without being asked to, and makes sure that it is gone then.
async fn guard(parts: Arc<Parts>) {
    let reason = tokio::select! {
        () = parts.left_ready() => return,
        reason = parts.ended_reason() => reason,
        end = parts.control.ended() => parts.control_ended(end).await,
    };
    let became_lost = parts.phase.send_if_modified(|phase| {
        let ready = *phase == Phase::Ready;
        if ready {
            *phase = Phase::Lost(reason.clone());
        }
        ready
    });
    if became_lost {
        warn!(sandbox_id = %parts.sandbox_id, reason, "sandbox was lost");
        parts.kill().await;
    }
}

impl Parts {
    /// A broken protocol is answered by killing at once; a closed connection by asking the launcher why.
    async fn control_ended(&self, end: ControlEnd) -> String {
        if let ControlEnd::Violated(violation) = &end {
            self.launcher.counted().add("sandbox_violations_total", &[("kind", violation.kind())]);
        }
        if !matches!(end, ControlEnd::Closed) {
            return end.to_string();
        }
        tokio::time::timeout(REPORT_TIME, self.ended_reason()).await.unwrap_or_else(|_| end.to_string())
    }

    /// What a caller is told; what is too much for one sandbox is counted.
    fn failure(&self, error: ControlError) -> ToolFailure {
        if let ControlError::Busy { what } = &error {
            self.launcher.counted().add("sandbox_requests_refused_total", &[("what", what)]);
        }
        failure(error)
    }

    /// Resolves when the launcher has reported the end.
    async fn ended_reason(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.as_ref().map_or_else(String::new, |ended| ended.reason.clone()),
            Err(_) => "the launcher is gone".to_owned(),
        }
    }

    async fn left_ready(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.phase.subscribe().wait_for(|phase| *phase != Phase::Ready).await;
    }

    async fn kill(&self) {
        if let Err(error) = self.launcher.kill(self.sandbox_id.as_str()).await {
            warn!(sandbox_id = %self.sandbox_id, %error, "sandbox could not be killed, the launcher will at its end");
        }
    }

    /// Stops or continues the workload; a sandbox that is being ended is not stopped any more.
    async fn freeze(&self, frozen: bool) -> Result<(), ToolFailure> {
        let mut known = self.frozen.lock().await;
        if frozen && *self.phase.borrow() != Phase::Ready {
            return Err(failure(ControlError::Ended(ControlEnd::Closed)));
        }
        if !frozen && !*known {
            return Ok(());
        }
        let before = std::mem::replace(&mut *known, true);
        let error = match self.launcher.freeze(self.sandbox_id.as_str(), frozen).await {
            Ok(()) => {
                *known = frozen;
                return Ok(());
            }
            Err(error) => error,
        };
        // A refusal changes nothing; an answer that does not come leaves open what has been done.
        if matches!(error, LaunchError::Refused { .. }) {
            *known = before;
        }
        warn!(sandbox_id = %self.sandbox_id, frozen, error = &error as &dyn std::error::Error, "launcher did not do it");
        let what =
            if frozen { "the sandbox could not be stopped" } else { "the sandbox stands still and could not be woken" };
        let remediation = "send the call again under a new id; if it fails again, look at the launcher of this host";
        Err(ToolFailure::new(Code::SandboxCreateFailed, what, remediation))
    }

    /// Ends the workload, unless the sandbox itself is being ended.
    async fn stop(&self) -> Result<(), ToolFailure> {
        if *self.phase.borrow() != Phase::Ready {
            return Err(failure(ControlError::Ended(ControlEnd::Closed)));
        }
        self.control.stop_work().await.map_err(failure)
    }

    async fn close(&self, grace: Duration) {
        let first = self.phase.send_if_modified(|phase| {
            let ready = *phase == Phase::Ready;
            if ready {
                *phase = Phase::Stopping;
            }
            ready
        });
        // What stands still cannot end by itself, and is not let go on for that; a kill reaches it all the same.
        if first && !grace.is_zero() && !*self.frozen.lock().await && self.control.shutdown(grace).await.is_ok() {
            // Process 1 escalates by itself; the kill below covers a process 1 that does not.
            let patience = grace.saturating_add(Duration::from_secs(2));
            let _ = tokio::time::timeout(patience, self.ended_reason()).await;
        }
        self.kill().await;
        if first {
            info!(sandbox_id = %self.sandbox_id, "sandbox removed");
            self.phase.send_replace(Phase::Removed);
        } else {
            let mut phase = self.phase.subscribe();
            let _ = phase.wait_for(|phase| matches!(phase, Phase::Removed | Phase::Lost(_))).await;
        }
    }
}

impl Sandbox for LiveSandbox {
    fn sandbox_id(&self) -> SandboxId {
        self.parts.sandbox_id.clone()
    }

    fn receipt(&self) -> Receipt {
        self.parts.receipt.clone()
    }

    fn end_unknown_calls(&self) -> BoxFuture<'static, ()> {
        let parts = Arc::clone(&self.parts);
        Box::pin(async move {
            // When the connection is over, so is the sandbox, and its end is told elsewhere.
            if let Err(error) = parts.control.end_strangers().await {
                warn!(sandbox_id = %parts.sandbox_id, error = &error as &dyn std::error::Error, "calls that nobody knows were not ended");
            }
        })
    }

    fn start_call(
        &self,
        call: PreparedCall,
        observer: Arc<dyn CallObserver>,
    ) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let parts = Arc::clone(&self.parts);
        Box::pin(async move {
            let started = async {
                parts.control.end_strangers().await?;
                parts.control.start_call(&call, observer).await
            };
            started.await.map_err(|error| parts.failure(error))
        })
    }

    fn explain(&self, end: CallEnd) -> BoxFuture<'static, CallEnd> {
        Box::pin(victim::explained(self.parts.launcher.clone(), self.parts.sandbox_id.clone(), end))
    }

    fn go(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let (parts, call_id) = (Arc::clone(&self.parts), call_id.clone());
        Box::pin(async move { parts.control.go(call_id.as_str()).await.map_err(|error| parts.failure(error)) })
    }

    fn abort(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let (parts, call_id) = (Arc::clone(&self.parts), call_id.clone());
        Box::pin(async move { parts.control.abort(call_id.as_str()).await.map_err(|error| parts.failure(error)) })
    }

    fn cancel(&self, call_id: &CallId, mode: CancelMode) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let (parts, call_id) = (Arc::clone(&self.parts), call_id.clone());
        Box::pin(
            async move { parts.control.cancel(call_id.as_str(), mode).await.map_err(|error| parts.failure(error)) },
        )
    }

    fn acknowledge(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let (parts, call_id) = (Arc::clone(&self.parts), call_id.clone());
        Box::pin(async move { parts.control.acknowledge(call_id.as_str()).await.map_err(|error| parts.failure(error)) })
    }

    fn read_output(
        &self,
        call_id: &CallId,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<OutputChunk, ToolFailure>> {
        let (parts, call_id) = (Arc::clone(&self.parts), call_id.clone());
        Box::pin(async move {
            parts
                .control
                .read_output(call_id.as_str(), stream, offset, max_bytes)
                .await
                .map_err(|error| parts.failure(error))
        })
    }

    fn stdin(
        &self,
        call_id: &CallId,
        offset: u64,
        data: Vec<u8>,
        eof: bool,
    ) -> BoxFuture<'static, Result<u64, ToolFailure>> {
        let (parts, call_id) = (Arc::clone(&self.parts), call_id.clone());
        Box::pin(async move {
            parts.control.stdin(call_id.as_str(), offset, data, eof).await.map_err(|error| parts.failure(error))
        })
    }

    fn resize(&self, call_id: &CallId, columns: u16, rows: u16) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let (parts, call_id) = (Arc::clone(&self.parts), call_id.clone());
        Box::pin(async move {
            parts.control.resize(call_id.as_str(), columns, rows).await.map_err(|error| parts.failure(error))
        })
    }

    fn deadline(&self, boottime_ns: u64) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let parts = Arc::clone(&self.parts);
        Box::pin(async move { parts.control.deadline(boottime_ns).await.map_err(|error| parts.failure(error)) })
    }

    fn freeze(&self, frozen: bool) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let parts = Arc::clone(&self.parts);
        Box::pin(async move { parts.freeze(frozen).await })
    }

    fn stop(&self) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let parts = Arc::clone(&self.parts);
        Box::pin(async move { parts.stop().await })
    }

    fn slots(&self) -> BoxFuture<'static, Result<Vec<Slot>, ToolFailure>> {
        let parts = Arc::clone(&self.parts);
        Box::pin(async move { parts.control.slots().await.map_err(failure) })
    }

    fn close(&self, grace: Duration) -> BoxFuture<'static, ()> {
        let parts = Arc::clone(&self.parts);
        Box::pin(async move { parts.close(grace).await })
    }

    fn lost(&self) -> BoxFuture<'static, String> {
        let mut phase = self.parts.phase.subscribe();
        Box::pin(async move {
            match lost_reason(&mut phase).await {
                Some(reason) => reason,
                // Closed in good order, so this sandbox can no longer be lost.
                None => std::future::pending().await,
            }
        })
    }
}

async fn lost_reason(phase: &mut watch::Receiver<Phase>) -> Option<String> {
    match phase.wait_for(|phase| matches!(phase, Phase::Lost(_))).await.as_deref() {
        Ok(Phase::Lost(reason)) => Some(reason.clone()),
        _ => None,
    }
}

/// What a caller is told; the rest is in the log.
fn failure(error: ControlError) -> ToolFailure {
    let (code, remediation) = match &error {
        ControlError::Ended(_) => (Code::SandboxLost, "open a new session; what was changed in this one is gone"),
        ControlError::Refused { code, .. } => match code.as_str() {
            "CALL_UNKNOWN" => (Code::CallUnknown, "check the call id; an acknowledged call is forgotten"),
            "CALL_ID_REUSED" => (Code::CallIdReused, "choose a new id for every call"),
            "INVALID_FIELD" | "NOT_SUPPORTED" => (Code::InvalidField, "correct the named field"),
            "TOO_LARGE" => (Code::TooLarge, "split the input into several calls"),
            "CALL_BUSY" => (Code::QueueFull, "wait for the running call to end"),
            _ => (Code::Internal, "try again in a new session, and report the message"),
        },
        ControlError::TooLarge { .. } => (Code::TooLarge, "split the input into several calls"),
        ControlError::Busy { .. } => (Code::QueueFull, "acknowledge finished calls, or wait for running ones"),
        ControlError::Duplicate => (Code::CallIdReused, "choose a new id for every call"),
    };
    let message = match error {
        ControlError::Ended(_) => "the sandbox has ended".to_owned(),
        ControlError::Refused { message, .. } => message,
        other => other.to_string(),
    };
    ToolFailure::new(code, message, remediation)
}

#[cfg(test)]
#[path = "live_tests.rs"]
mod tests;
