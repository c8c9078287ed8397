//! Carries out what the core decides. What takes time runs beside the loop and reports back.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::board::Board;
use super::{Done, Loop};
use crate::crash_point::{self, Point};
use crate::journal::{JournalError, Record};
use crate::session::core::{Action, Input};
use crate::session::present;
use crate::work::{
    BoxFuture, CallId, Code, ExpectedCall, Gate, Receipt, RequestKind, SandboxId, SandboxRequest, SessionId,
    SessionOpen, StreamSummary, ToolFailure, Update,
};

impl Loop {
    /// Runs something beside the loop; what is ready at once is taken at once.
    fn beside<T: 'static>(
        &mut self,
        mut future: BoxFuture<'static, T>,
        report: impl FnOnce(T) -> Done + Send + 'static,
    ) {
        if let Some(value) = (&mut future).now_or_never() {
            if let Done::Input(input) = report(value) {
                self.inputs.push_back(input);
            }
            return;
        }
        let done = self.done.clone();
        tokio::spawn(async move {
            // A closed channel means that the loop has ended, and with it everybody who cares.
            let _ = done.send(report(future.await)).await;
        });
    }

    pub(super) async fn execute(&mut self, action: Action) {
        match action {
            Action::Tell(update) => self.tell(update).await,
            Action::CreateSandbox(open) => self.create(*open),
            Action::AttachSandbox { session_id, sandbox_id, receipt, calls } => {
                self.attach(session_id, sandbox_id, receipt, calls);
            }
            Action::EndUnknown { session_id: None } => {
                self.beside(self.sandboxes.end_unknown(), |()| Done::Nothing);
            }
            Action::EndUnknown { session_id: Some(session_id) } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                self.beside(sandbox.end_unknown_calls(), |()| Done::Nothing);
            }
            Action::CloseSandbox { session_id, grace } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                let (done, closed, sandbox_id) = (self.done.clone(), sandbox.close(grace), sandbox.sandbox_id());
                tokio::spawn(async move {
                    closed.await;
                    // A closed channel means that the loop has ended, and with it everybody who cares.
                    let _ = done.send(Done::Gone(session_id, sandbox_id, None)).await;
                });
            }
            Action::ReleaseSandbox { session_id } => {
                self.idle.remove(&session_id);
                self.outputs.remove_session(&session_id);
            }
            Action::ArmIdle { session_id, within } => {
                // A moment beyond what a clock can hold never comes.
                if let Some(at) = Instant::now().checked_add(within) {
                    self.idle.insert(session_id, at);
                }
            }
            Action::Note(record) => drop(self.journal.append(record)),
            Action::WriteReady { session_id, sandbox_id, receipt } => {
                let ready = Record::SessionReady { session_id: session_id.clone(), sandbox_id, receipt };
                let written = self.journal.append(ready);
                self.beside(written, |r| Done::Input(Input::ReadyWritten { session_id, durable: written_down(&r) }));
            }
            Action::WriteEnded { session_id, epoch } => {
                let written = self.journal.append(Record::SessionEnded { session_id: session_id.clone(), epoch });
                self.beside(written, |r| Done::Input(Input::EndedWritten { session_id, durable: written_down(&r) }));
            }
            Action::WriteCancelled { call_id, epoch, phase, mode } => {
                let written = self.journal.append(Record::Cancelled { call_id: call_id.clone(), mode });
                self.beside(written, move |written| match written {
                    Err(error) if !error.is_final => {
                        Done::Input(Input::CancelRefused { call_id, epoch, phase, reason: error.reason })
                    }
                    written => {
                        let durable = written_down(&written);
                        Done::Input(Input::CancelWritten { call_id, epoch, phase, durable })
                    }
                });
            }
            Action::WriteAccepted(call) => {
                let call_id = call.call_id.clone();
                crash_point::pass(Point::Arrived, call_id.as_str());
                let written = self.journal.append(Record::Accepted(Box::new(call)));
                self.beside(written, |written| match written {
                    Err(error) if !error.is_final => {
                        Done::Input(Input::AcceptRefused { call_id, reason: error.reason })
                    }
                    written => Done::Input(Input::Accepted { call_id, durable: written_down(&written) }),
                });
            }
            Action::WriteStarted { call_id } => {
                let written = self.journal.append(Record::Started { call_id: call_id.clone() });
                self.beside(written, |r| Done::Input(Input::StartWritten { call_id, durable: written_down(&r) }));
            }
            Action::WriteResumed { call_id } => {
                let written = self.journal.append(Record::Resumed { call_id: call_id.clone() });
                self.beside(written, |r| Done::Input(Input::ResumeWritten { call_id, durable: written_down(&r) }));
            }
            Action::DiscardSandbox { sandbox_id } => {
                self.beside(self.sandboxes.discard(sandbox_id), |()| Done::Nothing);
            }
            Action::WriteFinished { call_id, result } => {
                self.deadlines.remove(&call_id);
                crash_point::pass(Point::Ended, call_id.as_str());
                let dropped = result.end.streams.iter().map(StreamSummary::dropped_bytes).sum();
                if dropped > 0 {
                    self.counters.add_many("output_dropped_bytes_total", &[], dropped);
                }
                let written = self.journal.append(Record::Finished { call_id: call_id.clone(), result });
                self.beside(written, |r| Done::Input(Input::EndWritten { call_id, durable: written_down(&r) }));
            }
            // Losing this only causes a repeat, so nobody waits for it.
            Action::Trim { call_id } => {
                crash_point::pass(Point::Acknowledged, call_id.as_str());
                drop(self.journal.append(Record::Acknowledged { call_id }));
            }
            Action::ArmStartDeadline { call_id, within } => {
                // A deadline beyond what a clock can hold is none.
                if let Some(at) = Instant::now().checked_add(within) {
                    self.deadlines.insert(call_id, at);
                }
            }
            Action::Acknowledge { call_id } => {
                if let Some(sandbox) = self.outputs.remove_call(&call_id) {
                    let acknowledged = sandbox.acknowledge(&call_id);
                    self.beside(acknowledged, move |result| {
                        // The sandbox may be gone with everything in it, and then there is nothing to forget.
                        if let Err(failure) = result {
                            tracing::debug!(%call_id, error = %failure, "acknowledgement was not taken");
                        }
                        drop(sandbox);
                        Done::Nothing
                    });
                }
            }
            other => self.execute_in_sandbox(other),
        }
    }

    fn execute_in_sandbox(&mut self, action: Action) {
        match action {
            Action::Prepare { session_id, call } => {
                let call_id = call.call_id.clone();
                if call.gate == Gate::Open && self.lease_has_lapsed(&session_id) {
                    return self.keep_gate(call_id);
                }
                self.deadlines.remove(&call_id);
                if let Some(failure) = present::refusal(&call.input) {
                    return self.inputs.push_back(Input::PrepareFailed { call_id, failure });
                }
                let Some(sandbox) = self.outputs.session(&session_id) else {
                    let failure = gone(&session_id);
                    return self.inputs.push_back(Input::PrepareFailed { call_id, failure });
                };
                self.outputs.insert_call(call_id.clone(), Arc::clone(&sandbox));
                let observer = Board::observer(&self.board, session_id, call_id.clone());
                let has_gate = call.gate == Gate::Held;
                let prepared = sandbox.start_call(call, observer);
                self.beside(prepared, move |result| match result {
                    Ok(()) => {
                        crash_point::pass(Point::Gated, call_id.as_str());
                        Done::Input(Input::Prepared { call_id })
                    }
                    // Without a gate the call may have run before its sandbox was lost; what the loss brings settles it.
                    Err(failure) if failure.code == Code::SandboxLost && !has_gate => Done::Nothing,
                    Err(failure) => Done::Input(Input::PrepareFailed { call_id, failure }),
                });
            }
            Action::Go { session_id, call_id } if self.lease_has_lapsed(&session_id) => self.keep_gate(call_id),
            Action::Go { session_id, call_id } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                crash_point::pass(Point::Go, call_id.as_str());
                self.beside(sandbox.go(&call_id), move |_| {
                    crash_point::pass(Point::Gone, call_id.as_str());
                    Done::Nothing
                });
            }
            Action::Abort { session_id, call_id } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                // Its gate was never opened, so it never ran, whatever the sandbox says now.
                self.beside(sandbox.abort(&call_id), |_| Done::Input(Input::Aborted { call_id }));
            }
            Action::Deadline { session_id, boottime_ns } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                self.beside(sandbox.deadline(boottime_ns), move |result| {
                    // The earlier moment stands then, and the next renewal is soon.
                    if let Err(failure) = result {
                        tracing::debug!(%session_id, error = %failure, "deadline was not taken");
                    }
                    Done::Nothing
                });
            }
            Action::Freeze { session_id } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                let counters = self.counters.clone();
                self.beside(sandbox.freeze(true), move |result| {
                    counters
                        .add(if result.is_ok() { "sessions_frozen_total" } else { "sessions_not_frozen_total" }, &[]);
                    match &result {
                        Ok(()) => tracing::info!(%session_id, "session has nothing to do, its processes stand still"),
                        Err(failure) => {
                            tracing::warn!(%session_id, error = %failure, "processes of an idle session go on");
                        }
                    }
                    Done::Input(Input::Frozen { session_id, result })
                });
            }
            Action::Stop { session_id } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                let counters = self.counters.clone();
                self.beside(sandbox.stop(), move |result| {
                    counters
                        .add(if result.is_ok() { "sessions_stopped_total" } else { "sessions_not_stopped_total" }, &[]);
                    match &result {
                        Ok(()) => tracing::info!(%session_id, "session has nothing to do, its processes are ended"),
                        Err(failure) => {
                            tracing::warn!(%session_id, error = %failure, "processes of an idle session do not end");
                        }
                    }
                    Done::Input(Input::Stopped { session_id, result })
                });
            }
            Action::Thaw { session_id } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                let since = Instant::now();
                let counters = self.counters.clone();
                self.beside(sandbox.freeze(false), move |result| {
                    counters.add(if result.is_ok() { "sessions_woken_total" } else { "sessions_not_woken_total" }, &[]);
                    let took_us = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
                    match &result {
                        Ok(()) => tracing::info!(%session_id, took_us, "session is woken"),
                        Err(failure) => tracing::warn!(%session_id, error = %failure, "session could not be woken"),
                    }
                    Done::Input(Input::Thawed { session_id, result })
                });
            }
            Action::Cancel { session_id, call_id, mode } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                // Its outcome comes through the observer; a call that has ended meanwhile cannot be cancelled.
                self.beside(sandbox.cancel(&call_id, mode), |_| Done::Nothing);
            }
            Action::Stdin { session_id, call_id, offset, data, eof } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                let mut written = sandbox.stdin(&call_id, offset, data, eof);
                // Sent now: what follows is behind it, whichever task runs first.
                let at_once = (&mut written).now_or_never();
                let done = self.done.clone();
                tokio::spawn(async move {
                    let update = match settled(at_once, written).await {
                        Ok(accepted) => Update::StdinAccepted { call_id, accepted },
                        Err(failure) => refused(RequestKind::Stdin, session_id, call_id, failure),
                    };
                    // A closed channel means that the loop has ended, and with it everybody who cares.
                    let _ = done.send(Done::Update(update)).await;
                });
            }
            Action::Resize { session_id, call_id, columns, rows } => {
                let Some(sandbox) = self.outputs.session(&session_id) else { return };
                let mut resized = sandbox.resize(&call_id, columns, rows);
                // Sent now: the last size is the one that stays.
                let at_once = (&mut resized).now_or_never();
                let done = self.done.clone();
                tokio::spawn(async move {
                    if let Err(failure) = settled(at_once, resized).await {
                        let update = refused(RequestKind::Resize, session_id, call_id, failure);
                        // A closed channel means that the loop has ended, and with it everybody who cares.
                        let _ = done.send(Done::Update(update)).await;
                    }
                });
            }
            _ => {}
        }
    }

    /// Asked at the very gate: the machine may have slept since the core has decided.
    fn lease_has_lapsed(&self, session_id: &SessionId) -> bool {
        self.core.lease_until_ns(session_id).is_some_and(|until_ns| (self.clock)() >= until_ns)
    }

    fn keep_gate(&mut self, call_id: CallId) {
        tracing::warn!(tool_call_id = %call_id, "the lease lapsed before the gate was opened, the call waits");
        self.inputs.push_back(Input::GateKept { call_id });
    }

    fn attach(
        &mut self,
        session_id: SessionId,
        sandbox_id: SandboxId,
        receipt: Receipt,
        calls: Vec<(CallId, Gate, Option<Duration>)>,
    ) {
        self.attaching.insert(session_id.clone());
        let expect = |(call_id, gate, time_limit): (CallId, Gate, Option<Duration>)| {
            let observer = Board::observer(&self.board, session_id.clone(), call_id.clone());
            ExpectedCall { call_id, gate, time_limit, observer }
        };
        let expected = calls.into_iter().map(expect).collect();
        let attached = self.sandboxes.attach(sandbox_id, receipt, expected);
        let done = self.done.clone();
        tokio::spawn(async move {
            // A closed channel means that the loop has ended, and with it everybody who cares.
            let _ = done.send(Done::Attached(session_id, attached.await)).await;
        });
    }

    fn create(&mut self, open: SessionOpen) {
        let session_id = open.session_id.clone();
        let Ok(sandbox_id) = SandboxId::new(format!("sb-{}", uuid::Uuid::new_v4().simple())) else { return };
        let request = SandboxRequest {
            sandbox_id,
            environment: open.environment,
            limits: open.limits,
            network: open.network,
            variables: open.variables,
            min_tier: open.min_tier,
            orphan_timeout: open.orphan_timeout,
        };
        let (done, creates, sandboxes) = (self.done.clone(), Arc::clone(&self.creates), Arc::clone(&self.sandboxes));
        tokio::spawn(async move {
            let permit = creates.acquire_owned().await;
            let result = sandboxes.create(request).await;
            drop(permit);
            // A closed channel means that the loop has ended; dropping the sandbox ends it.
            let _ = done.send(Done::Created(session_id, result)).await;
        });
    }
}

fn written_down(result: &Result<(), JournalError>) -> bool {
    if let Err(error) = result {
        tracing::error!(error = error as &dyn std::error::Error, "a record is not in the journal");
    }
    result.is_ok()
}

/// What a future that was looked at once has said, or says later.
async fn settled<T>(at_once: Option<T>, later: BoxFuture<'static, T>) -> T {
    match at_once {
        Some(value) => value,
        None => later.await,
    }
}

fn refused(request: RequestKind, session_id: SessionId, call_id: CallId, failure: ToolFailure) -> Update {
    Update::Refused { request, session_id: Some(session_id), call_id: Some(call_id), epoch: 0, failure }
}

fn gone(session_id: &SessionId) -> ToolFailure {
    ToolFailure::new(
        Code::SessionLost,
        format!("session {session_id} has no sandbox any more"),
        "open the session again with a higher epoch",
    )
}
