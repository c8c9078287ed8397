//! Threads of a session: they begin, end, and are shown.

use serde_json::{Value, json};

use super::error::ApiError;
use super::plane::ControlPlane;
use super::session::{Call, CallState, Session};

/// A thread.
#[derive(Debug, Clone)]
pub struct Thread {
    /// `sthr_…`.
    pub id: String,
    /// Its agent.
    pub agent_name: String,
    /// Whether it takes nothing any more.
    pub terminated: bool,
    /// When it was archived.
    pub archived_at: Option<String>,
    pub(super) created_at: String,
}

impl ControlPlane {
    /// Starts a thread of another agent.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn spawn_thread(&mut self, session_id: &str, agent_name: &str) -> String {
        let id = self.next_id("sthr_");
        let created_at = self.stamp();
        let thread = Thread {
            id: id.clone(),
            agent_name: agent_name.to_owned(),
            terminated: false,
            archived_at: None,
            created_at,
        };
        self.session_mut(session_id).threads.push(thread);
        let created = json!({"type": "session.thread_created", "session_thread_id": id, "agent_name": agent_name,
            "workflow_run_id": null});
        self.emit(session_id, created);
        let running =
            json!({"type": "session.thread_status_running", "session_thread_id": id, "agent_name": agent_name});
        self.emit(session_id, running);
        id
    }

    /// Ends a thread; its calls get no result any more.
    ///
    /// # Panics
    /// When there is no such session or thread.
    pub fn terminate_thread(&mut self, session_id: &str, thread_id: &str) {
        let session = self.session_mut(session_id);
        let thread = session.threads.iter_mut().find(|thread| thread.id == thread_id).expect("a thread of the session");
        thread.terminated = true;
        let agent_name = thread.agent_name.clone();
        for call in session.calls.iter_mut().filter(|call| call.thread.as_deref() == Some(thread_id)) {
            if matches!(call.state, CallState::Open | CallState::Gated) {
                call.state = CallState::Closed;
            }
        }
        let event = json!({"type": "session.thread_status_terminated", "session_thread_id": thread_id,
            "agent_name": agent_name});
        self.emit(session_id, event);
        self.settle(session_id);
    }
}

impl Session {
    /// A thread as the API shows it.
    ///
    /// # Errors
    /// 404.
    pub fn thread_json(&self, thread_id: &str) -> Result<Value, ApiError> {
        let position = self.threads.iter().position(|thread| thread.id == thread_id);
        let position = position.ok_or_else(|| ApiError::not_found(format!("thread {thread_id} not found")))?;
        let thread = &self.threads[position];
        let calls = |call: &Call| call.thread.as_deref() == (position > 0).then_some(thread_id);
        let waits = self.calls.iter().any(|call| calls(call) && call.state == CallState::Open);
        let status = match (thread.terminated, waits || position > 0) {
            (true, _) => "terminated",
            (false, true) => "running",
            (false, false) => self.status.name(),
        };
        Ok(json!({
            "type": "session_thread",
            "id": thread.id,
            "session_id": self.id,
            "parent_thread_id": (position > 0).then(|| self.threads[0].id.clone()),
            "agent": {"type": "agent", "id": "agent_1", "name": thread.agent_name},
            "status": status,
            "created_at": thread.created_at,
            "updated_at": thread.created_at,
            "archived_at": thread.archived_at,
            "stats": null,
            "usage": null,
            "workflow_run_id": null,
        }))
    }
}
