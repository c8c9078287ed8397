//! The turns of a session: what events that are posted do, and what the model does when nothing waits any more.

use serde_json::{Value, json};

use super::error::ApiError;
use super::event::{Confirmation, Posted, PostedResult, ToolUse, Verdict};
use super::plane::{Breach, ControlPlane, Interrupt, SecondResult};
use super::request::Credential;
use super::session::{CallState, Status};

/// What a scripted model does.
#[derive(Debug, Clone)]
pub enum Step {
    /// It says something.
    Say(String),
    /// It makes calls and waits for all their results.
    Call(Vec<ToolUse>),
    /// It ends its turn for this reason, for example `end_turn`. The next message of the user begins the next one.
    EndTurn(String),
    /// The session ends.
    Terminate,
}

impl ControlPlane {
    /// Applies posted events, all or none of them, and returns them as the API echoes them.
    ///
    /// # Errors
    /// 400 for what the session does not take.
    pub fn post_events(&mut self, session_id: &str, events: Vec<Posted>, by: &Credential) -> Result<Value, ApiError> {
        let session = self.find_session(session_id)?;
        if session.status == Status::Terminated {
            return Err(ApiError::invalid(format!("session {session_id} is terminated and takes no events")));
        }
        for (number, event) in events.iter().enumerate() {
            match event {
                Posted::Result(result) => self.check_result(session_id, result, number, by)?,
                Posted::Interrupt { thread: Some(thread) } => {
                    if !self.session(session_id).threads.iter().any(|known| known.id == *thread) {
                        return Err(ApiError::invalid(format!(
                            "events.{number}.session_thread_id: no thread {thread}"
                        )));
                    }
                }
                Posted::Message { .. } | Posted::Interrupt { thread: None } | Posted::Confirmation(_) => {}
            }
        }
        let echoes: Vec<Value> = events.into_iter().map(|event| self.apply(session_id, event)).collect();
        Ok(json!({"data": echoes}))
    }

    fn check_result(
        &mut self,
        session_id: &str,
        result: &PostedResult,
        number: usize,
        by: &Credential,
    ) -> Result<(), ApiError> {
        let id = result.tool_use_id.clone();
        let stale = match by {
            Credential::SessionsToken { work_id, generation } => self.item(work_id).generation > *generation,
            _ => false,
        };
        if stale {
            self.breaches.push(Breach::ResultAfterLeaseLost { tool_use_id: id.clone() });
        }
        let place = format!("events.{number}.{}tool_use_id", if result.custom { "custom_" } else { "" });
        let call = self.session(session_id).calls.iter().find(|call| call.id == id && call.custom == result.custom);
        let Some(call) = call else {
            return Err(ApiError::invalid(format!("{place}: no such tool use: {id}")));
        };
        match call.state {
            CallState::Open => Ok(()),
            CallState::Answered => {
                self.breaches.push(Breach::SecondResult { tool_use_id: id.clone() });
                match self.settings.second_result {
                    SecondResult::Refused => Err(ApiError::invalid(format!("{place}: {id} already has a result"))),
                    SecondResult::Ignored => Ok(()),
                }
            }
            CallState::Gated | CallState::Denied => {
                self.breaches.push(Breach::ResultOfGatedCall { tool_use_id: id.clone() });
                Err(ApiError::invalid(format!("{place}: {id} is not allowed to run")))
            }
            CallState::Closed => Err(ApiError::invalid(format!("{place}: {id} takes no result any more"))),
        }
    }

    fn apply(&mut self, session_id: &str, event: Posted) -> Value {
        match event {
            Posted::Result(result) => self.apply_result(session_id, result),
            Posted::Message { content } => self.apply_message(session_id, &content),
            Posted::Interrupt { thread } => self.apply_interrupt(session_id, thread.as_deref()),
            Posted::Confirmation(confirmation) => self.apply_confirmation(session_id, &confirmation),
        }
    }

    fn apply_result(&mut self, session_id: &str, result: PostedResult) -> Value {
        let call = self.session(session_id).call(&result.tool_use_id).clone();
        let (kind, key) = if result.custom {
            ("user.custom_tool_result", "custom_tool_use_id")
        } else {
            ("user.tool_result", "tool_use_id")
        };
        if call.state == CallState::Answered {
            let events = self.session(session_id).events(kind);
            let first = events.into_iter().find(|event| event[key] == result.tool_use_id.as_str());
            return first.cloned().unwrap_or(Value::Null);
        }
        let mut event =
            json!({"type": kind, key: result.tool_use_id, "is_error": result.is_error, "content": result.content});
        if let Some(thread) = &call.thread {
            event["session_thread_id"] = json!(thread);
        }
        self.emit(session_id, event);
        let session = self.session_mut(session_id);
        if let Some(mismatch) = call.expect.as_ref().and_then(|expect| expect.mismatch(&result)) {
            session.mismatches.push(format!("{} {}: {mismatch}", call.name, call.id));
        }
        let stored = session.calls.iter_mut().find(|known| known.id == call.id).expect("the call just found");
        stored.state = CallState::Answered;
        stored.result = Some(result);
        let echo = session.log.last().and_then(|logged| logged.event.clone()).unwrap_or(Value::Null);
        self.settle(session_id);
        echo
    }

    fn apply_message(&mut self, session_id: &str, content: &[Value]) -> Value {
        let session = self.session(session_id);
        let busy = session.status == Status::Running || !session.waiting().is_empty();
        let mut event = json!({"type": "user.message", "content": content});
        if busy {
            event["processed_at"] = Value::Null;
        }
        self.emit(session_id, event);
        let echo = self.session(session_id).log.last().and_then(|logged| logged.event.clone()).unwrap_or(Value::Null);
        if busy {
            self.session_mut(session_id).queued.push_back(echo.clone());
        }
        self.wake(session_id);
        if !busy {
            self.begin_turn(session_id);
        }
        echo
    }

    fn apply_confirmation(&mut self, session_id: &str, confirmation: &Confirmation) -> Value {
        let id = confirmation.tool_use_id.clone();
        let result = if confirmation.result == Verdict::Allow { "allow" } else { "deny" };
        let mut event = json!({"type": "user.tool_confirmation", "tool_use_id": id, "result": result});
        if let Some(message) = &confirmation.deny_message {
            event["deny_message"] = json!(message);
        }
        self.emit(session_id, event);
        let session = self.session_mut(session_id);
        let echo = session.log.last().and_then(|logged| logged.event.clone()).unwrap_or(Value::Null);
        // A verdict may come before its call, or for a call that needs none.
        let gated = session.calls.iter_mut().find(|call| call.id == id && call.state == CallState::Gated);
        if let Some(call) = gated {
            if confirmation.result == Verdict::Allow {
                call.state = CallState::Open;
            } else {
                call.state = CallState::Denied;
                self.emit_server_result(session_id, &id, "The user denied this tool use.");
                self.settle(session_id);
            }
        }
        self.wake(session_id);
        echo
    }

    fn apply_interrupt(&mut self, session_id: &str, thread: Option<&str>) -> Value {
        let at_once = self.settings.interrupt == Interrupt::AtOnce;
        let session = self.session_mut(session_id);
        let primary = session.threads[0].id.clone();
        let within = |of: Option<&str>| thread.is_none_or(|thread| of.unwrap_or(&primary) == thread);
        let mut closed = Vec::new();
        let mut runs = false;
        for call in session.calls.iter_mut().filter(|call| within(call.thread.as_deref())) {
            match call.state {
                CallState::Open if !at_once => runs = true,
                // Nobody answers what waits for a confirmation.
                CallState::Open | CallState::Gated => {
                    call.state = CallState::Closed;
                    closed.push(call.id.clone());
                }
                CallState::Answered | CallState::Denied | CallState::Closed => {}
            }
        }
        for id in closed {
            self.emit_server_result(session_id, &id, "The tool use was interrupted.");
        }
        let mut event = json!({"type": "user.interrupt"});
        if let Some(thread) = thread {
            event["session_thread_id"] = json!(thread);
        }
        if runs {
            event["processed_at"] = Value::Null;
        }
        self.emit(session_id, event);
        let echo = self.session(session_id).log.last().and_then(|logged| logged.event.clone()).unwrap_or(Value::Null);
        self.wake(session_id);
        if runs {
            self.session_mut(session_id).interrupt = Some(echo.clone());
        } else {
            self.settle_after_interrupt(session_id);
        }
        echo
    }

    fn settle_after_interrupt(&mut self, session_id: &str) {
        if self.session(session_id).waiting().is_empty() {
            self.end_turn(session_id, json!({"type": "end_turn"}));
        } else {
            self.settle(session_id);
        }
    }

    /// Says what the session waits for, or goes on when it waits for nothing.
    pub(super) fn settle(&mut self, session_id: &str) {
        let session = self.session(session_id);
        if session.status == Status::Terminated {
            return;
        }
        let waiting = session.waiting();
        if !waiting.is_empty() {
            self.idle(session_id, json!({"type": "requires_action", "event_ids": waiting}));
            return;
        }
        if let Some(mut interrupt) = self.session_mut(session_id).interrupt.take() {
            // The same event again, now with the time at which it was processed.
            interrupt["processed_at"] = json!(self.stamp());
            self.emit(session_id, interrupt);
            self.end_turn(session_id, json!({"type": "end_turn"}));
            return;
        }
        self.begin_turn(session_id);
    }

    /// The model goes on.
    fn begin_turn(&mut self, session_id: &str) {
        self.session_mut(session_id).status = Status::Running;
        let primary = &self.session(session_id).threads[0];
        let thread = json!({"type": "session.thread_status_running", "session_thread_id": primary.id,
            "agent_name": primary.agent_name});
        self.emit(session_id, json!({"type": "session.status_running"}));
        self.emit(session_id, thread);
        if self.session(session_id).made_of.script.is_some() {
            self.follow_script(session_id);
        }
    }

    fn follow_script(&mut self, session_id: &str) {
        loop {
            match self.session_mut(session_id).script.pop_front() {
                Some(Step::Say(text)) => {
                    let content = json!([{"type": "text", "text": text}]);
                    self.emit(session_id, json!({"type": "agent.message", "content": content}));
                }
                Some(Step::Call(uses)) => {
                    self.emit_calls(session_id, uses);
                    // Calls that were all denied are answered already, and the model goes on.
                    let waiting = self.session(session_id).waiting();
                    if !waiting.is_empty() {
                        self.idle(session_id, json!({"type": "requires_action", "event_ids": waiting}));
                        return;
                    }
                }
                Some(Step::EndTurn(reason)) => return self.end_turn(session_id, json!({"type": reason})),
                Some(Step::Terminate) => return self.terminate_session(session_id),
                None => return self.end_turn(session_id, json!({"type": "end_turn"})),
            }
        }
    }

    /// The turn is over. A message that came meanwhile begins the next one.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn end_turn(&mut self, session_id: &str, stop_reason: Value) {
        self.idle(session_id, stop_reason);
        if let Some(mut message) = self.session_mut(session_id).queued.pop_front() {
            message["processed_at"] = json!(self.stamp());
            self.emit(session_id, message);
            self.begin_turn(session_id);
        }
    }

    fn idle(&mut self, session_id: &str, stop_reason: Value) {
        self.session_mut(session_id).status = Status::Idle;
        let event = json!({"type": "session.status_idle", "stop_reason": stop_reason, "stop_details": null});
        self.emit(session_id, event);
    }
}
