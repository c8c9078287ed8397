//! An open session of the reference orchestrator: calls, their input, their ends.

use std::sync::Arc;
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;

use super::orchestrator::DevError;
use super::state::{CallRecord, Shared, State, too_large};
use super::transcript::Finished;

/// A finished call.
pub type CallOutcome = Finished;

/// An open session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its id.
    pub session_id: String,
    /// Its placement.
    pub epoch: u64,
    /// What protects it.
    pub receipt: pb::Receipt,
    pub(super) shared: Arc<Shared>,
}

impl Session {
    /// Sends a call without waiting for anything.
    pub fn send(&self, call_id: &str, input: pb::call::Input) {
        let request = pb::Call { call_id: call_id.to_owned(), input: Some(input), ..Default::default() };
        self.send_call(request);
    }

    /// Sends a call with everything set but session and epoch.
    pub fn send_call(&self, mut request: pb::Call) {
        request.session_id.clone_from(&self.session_id);
        request.epoch = self.epoch;
        let (call_id, body) = (request.call_id.clone(), Body::Call(request.clone()));
        let refused = too_large(&body);
        let is_sent = refused.is_none();
        let mut state = self.shared.state();
        state.calls.insert(call_id, CallRecord { request, refused, ..CallRecord::default() });
        if is_sent {
            state.send(body);
        }
    }

    /// Waits for the end of a call with all its output.
    ///
    /// # Errors
    /// `DevError::Refused`, or `DevError::Elsewhere` when the session was placed elsewhere before the end came.
    pub async fn outcome(&self, call_id: &str) -> Result<CallOutcome, DevError> {
        let found = |state: &State| {
            let call = state.calls.get(call_id)?;
            if let Some(failure) = &call.refused {
                let (what, failure) = (format!("call {call_id}"), Box::new(failure.clone()));
                return Some(Err(DevError::Refused { what, failure }));
            }
            if state.superseded.iter().any(|superseded| superseded == call_id) {
                return Some(Err(DevError::Elsewhere { session_id: self.session_id.clone() }));
            }
            let message = call.end.clone().filter(|_| call.complete)?;
            Some(Ok(Finished { message, streams: call.transcript.streams.clone() }))
        };
        self.shared.until(found).await
    }

    /// Drops what a call that is over has printed, and what was sent with it; its end stays known. For those who serve a
    /// runner for a long time.
    pub fn shed(&self, call_id: &str) {
        let mut state = self.shared.state();
        if let Some(call) = state.calls.get_mut(call_id).filter(|call| call.complete) {
            call.shed = true;
            call.request.input = None;
            call.transcript.shed();
            if let Some(end) = &mut call.end {
                end.result = None;
                end.streams.iter_mut().for_each(|stream| stream.inline = Vec::new());
            }
        }
    }

    /// Waits until a call has begun.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn started(&self, call_id: &str) -> Result<(), DevError> {
        let found = |state: &State| {
            let call = state.calls.get(call_id)?;
            (call.started.is_some() || call.end.is_some()).then_some(Ok(()))
        };
        self.shared.until(found).await
    }

    /// Waits for the end of a call, whether or not its output has come.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn ended(&self, call_id: &str) -> Result<pb::CallFinished, DevError> {
        self.shared.until(|state| state.calls.get(call_id)?.end.clone().map(Ok)).await
    }

    /// Runs a call and waits for it.
    ///
    /// # Errors
    /// `DevError::Refused`.
    pub async fn run(&self, call_id: &str, input: pb::call::Input) -> Result<CallOutcome, DevError> {
        self.send(call_id, input);
        self.outcome(call_id).await
    }

    /// Runs a command in the shell and waits for it.
    ///
    /// # Errors
    /// `DevError::Refused`.
    pub async fn bash(&self, call_id: &str, command: &str) -> Result<CallOutcome, DevError> {
        let input = pb::BashInput { command: Some(command.to_owned()), ..Default::default() };
        self.run(call_id, pb::call::Input::Bash(input)).await
    }

    /// Ends a call; its outcome comes as that of the call.
    pub fn cancel(&self, call_id: &str, mode: pb::CancelMode) {
        let cancel = pb::CancelCall {
            call_id: call_id.to_owned(),
            session_id: self.session_id.clone(),
            epoch: self.epoch,
            mode: mode.into(),
        };
        let mut state = self.shared.state();
        if let Some(call) = state.calls.get_mut(call_id) {
            (call.cancel, call.cancel_noted) = (Some(cancel.clone()), false);
        }
        state.send(Body::CancelCall(cancel));
    }

    /// Feeds standard input and waits until everything up to its end is taken.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn stdin(&self, call_id: &str, offset: u64, data: &[u8], eof: bool) -> Result<u64, DevError> {
        let message = pb::WriteStdin { call_id: call_id.to_owned(), offset, data: data.to_vec(), eof };
        self.shared.state().send(Body::WriteStdin(message));
        let wanted = offset + data.len() as u64;
        let taken = |state: &State| {
            let taken = state.calls.get(call_id)?.stdin_accepted;
            (taken >= wanted).then_some(Ok(taken))
        };
        self.shared.until(taken).await
    }

    /// Tells the terminal of a running call its new size; the answer to a size that is refused is a failed request.
    pub fn resize(&self, call_id: &str, columns: u32, rows: u32) {
        let size = Some(pb::TerminalSize { columns, rows });
        self.shared.state().send(Body::ResizeTerminal(pb::ResizeTerminal { call_id: call_id.to_owned(), size }));
    }

    /// Ends the session and waits until it is over.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn close(&self, grace: Duration) -> Result<pb::SessionEnded, DevError> {
        let close =
            pb::CloseSession { session_id: self.session_id.clone(), epoch: self.epoch, grace: grace.try_into().ok() };
        {
            let mut state = self.shared.state();
            if let Some(record) = state.sessions.get_mut(&self.session_id) {
                record.close = Some(close.clone());
            }
            state.send(Body::CloseSession(close));
        }
        self.over().await
    }

    /// Waits until the session is over, whoever ends it.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn over(&self) -> Result<pb::SessionEnded, DevError> {
        self.shared.until(|state| state.sessions.get(&self.session_id)?.ended.clone().map(Ok)).await
    }
}
