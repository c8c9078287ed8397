//! A session: its log of events, its threads, its calls, and what the model does next.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Value, json};

use super::error::ApiError;
use super::event::{Expect, PostedResult, ToolUse, Wire};
use super::plane::ControlPlane;
use super::script::Step;
use super::thread::Thread;
use super::work::Secret;

/// Status of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It waits for input: of the user, or for results.
    Idle,
    /// The model works.
    Running,
    /// It is over.
    Terminated,
}

impl Status {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Running => "running",
            Self::Terminated => "terminated",
        }
    }
}

/// What a session is made of.
#[derive(Debug, Clone)]
pub struct NewSession {
    /// Labels.
    pub metadata: BTreeMap<String, String>,
    /// Resources as the API shows them; self-hosted environments take memory stores only.
    pub resources: Vec<Value>,
    /// Skills of the agent: id and version, which may be `latest`.
    pub skills: Vec<(String, String)>,
    /// What the model does. Without it the test is the model.
    pub script: Option<Vec<Step>>,
    /// Form of the secrets of its work items.
    pub secret: Secret,
}

impl Default for NewSession {
    fn default() -> Self {
        Self {
            metadata: BTreeMap::new(),
            resources: Vec::new(),
            skills: Vec::new(),
            script: None,
            secret: Secret::Token,
        }
    }
}

/// A session.
#[derive(Debug, Clone)]
pub struct Session {
    /// `sesn_…`.
    pub id: String,
    /// Its environment.
    pub environment_id: String,
    /// Its status.
    pub status: Status,
    /// What it was made of; the rest of the script is here.
    pub made_of: NewSession,
    /// Steps of the model that are left.
    pub script: VecDeque<Step>,
    /// Every event, and what else went over its streams.
    pub log: Vec<Logged>,
    /// The primary thread first.
    pub threads: Vec<Thread>,
    /// Calls in the order in which the model made them.
    pub calls: Vec<Call>,
    /// Where results were not what the script expects.
    pub mismatches: Vec<String>,
    /// Messages that came while a turn was going on.
    pub(super) queued: VecDeque<Value>,
    /// An interrupt that waits for calls.
    pub(super) interrupt: Option<Value>,
    /// Whether something came that wants a worker.
    pub(super) wants_work: bool,
    created_at: String,
}

/// An entry of the log.
#[derive(Debug, Clone)]
pub struct Logged {
    /// The event, if it is one.
    pub event: Option<Value>,
    /// Its thread, unless it is the primary one.
    pub thread: Option<String>,
    /// Whether it is in the history.
    pub in_history: bool,
    /// What open streams do.
    pub frame: Frame,
}

/// What open streams do at an entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// They send its event.
    Event(Wire),
    /// They send these bytes.
    Raw(Vec<u8>),
    /// They end.
    End,
    /// Their connections break.
    Break,
}

/// A call of the model.
#[derive(Debug, Clone)]
pub struct Call {
    /// Id of its event.
    pub id: String,
    /// Name of the tool.
    pub name: String,
    /// Whether it is of a custom tool.
    pub custom: bool,
    /// Its thread, unless it is the primary one.
    pub thread: Option<String>,
    /// What became of it.
    pub state: CallState,
    /// The first result that was taken.
    pub result: Option<PostedResult>,
    pub(super) expect: Option<Expect>,
}

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallState {
    /// It waits for its result.
    Open,
    /// It waits for a confirmation.
    Gated,
    /// It has its result.
    Answered,
    /// It was denied; the server answered it.
    Denied,
    /// The server closed it: an interrupt, or the end of its thread.
    Closed,
}

impl ControlPlane {
    /// Makes a session, and queues the work item that serves it.
    ///
    /// # Errors
    /// 404 for an unknown environment, 400 for resources that it does not take.
    pub fn create_session(&mut self, environment_id: &str, new: NewSession) -> Result<String, ApiError> {
        self.environment(environment_id)?;
        if new.resources.iter().any(|resource| resource["type"] != "memory_store") {
            let reason = "is a self-hosted environment. `resources` are not supported with self-hosted environments.";
            return Err(ApiError::invalid(format!("Environment {environment_id} {reason}")));
        }
        let id = self.next_id("sesn_");
        let created_at = self.stamp();
        let primary = Thread {
            id: self.next_id("sthr_"),
            agent_name: "main".to_owned(),
            terminated: false,
            archived_at: None,
            created_at: created_at.clone(),
        };
        let secret = new.secret;
        let script = new.script.clone().unwrap_or_default().into();
        self.sessions.push(Session {
            id: id.clone(),
            environment_id: environment_id.to_owned(),
            status: Status::Idle,
            made_of: new,
            script,
            log: Vec::new(),
            threads: vec![primary],
            calls: Vec::new(),
            mismatches: Vec::new(),
            queued: VecDeque::new(),
            interrupt: None,
            wants_work: false,
            created_at,
        });
        self.enqueue(environment_id, "session", &id, secret);
        Ok(id)
    }

    /// A session.
    ///
    /// # Errors
    /// 404.
    pub fn find_session(&self, id: &str) -> Result<&Session, ApiError> {
        let found = self.sessions.iter().find(|session| session.id == id);
        found.ok_or_else(|| ApiError::not_found(format!("session {id} not found")))
    }

    /// A session that a test knows.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn session(&self, id: &str) -> &Session {
        self.find_session(id).expect("a session of this control plane")
    }

    /// A session that a test knows, to change it.
    ///
    /// # Panics
    /// When there is none.
    pub fn session_mut(&mut self, id: &str) -> &mut Session {
        self.sessions.iter_mut().find(|session| session.id == id).expect("a session of this control plane")
    }

    /// Adds an event to the log; `id` and `processed_at` are added where they are missing. Returns its id.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn emit(&mut self, session_id: &str, event: Value) -> String {
        self.emit_over(session_id, event, Wire::Whole, true)
    }

    /// The same by another way over the streams, and perhaps not in the history.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn emit_over(&mut self, session_id: &str, mut event: Value, wire: Wire, in_history: bool) -> String {
        if event.get("id").is_none() {
            event["id"] = json!(self.next_id("sevt_"));
        }
        if event.get("processed_at").is_none() {
            event["processed_at"] = json!(self.stamp());
        }
        let id = event["id"].as_str().unwrap_or_default().to_owned();
        let thread = event["session_thread_id"].as_str().map(ToOwned::to_owned);
        let session = self.session_mut(session_id);
        let thread = thread.filter(|thread| *thread != session.threads[0].id);
        session.log.push(Logged { event: Some(event), thread, in_history, frame: Frame::Event(wire) });
        id
    }

    /// Lets the open streams of a session do something that is not an event.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn frame(&mut self, session_id: &str, frame: Frame) {
        let logged = Logged { event: None, thread: None, in_history: false, frame };
        self.session_mut(session_id).log.push(logged);
    }

    /// The model makes calls, all in one turn, and the session waits for their results. Returns their ids.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn call_tools(&mut self, session_id: &str, uses: Vec<ToolUse>) -> Vec<String> {
        let ids = self.emit_calls(session_id, uses);
        self.settle(session_id);
        ids
    }

    /// The events of calls without the `session.status_idle` that follows them.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn emit_calls(&mut self, session_id: &str, uses: Vec<ToolUse>) -> Vec<String> {
        let mut ids = Vec::new();
        for one in uses {
            let id = self.emit_over(session_id, one.event(), one.wire.clone(), true);
            let state = match one.permission.as_deref() {
                None | Some("allow") => CallState::Open,
                Some("deny") => CallState::Denied,
                Some(_) => CallState::Gated,
            };
            let call = Call {
                id: id.clone(),
                name: one.name,
                custom: one.custom,
                thread: one.thread,
                state,
                result: None,
                expect: one.expect,
            };
            self.session_mut(session_id).calls.push(call);
            if state == CallState::Denied {
                self.emit_server_result(session_id, &id, "Permission to use this tool was denied.");
            }
            ids.push(id);
        }
        ids
    }

    /// The answer that the server itself gives to a call.
    pub(super) fn emit_server_result(&mut self, session_id: &str, tool_use_id: &str, text: &str) {
        let content = json!([{"type": "text", "text": text}]);
        let event =
            json!({"type": "agent.tool_result", "tool_use_id": tool_use_id, "is_error": true, "content": content});
        self.emit(session_id, event);
    }

    /// Ends a session.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn terminate_session(&mut self, session_id: &str) {
        self.session_mut(session_id).status = Status::Terminated;
        self.emit(session_id, json!({"type": "session.status_terminated"}));
    }

    /// Deletes a session: its streams tell it, then they end.
    ///
    /// # Panics
    /// When there is no such session.
    pub fn delete_session(&mut self, session_id: &str) {
        self.session_mut(session_id).status = Status::Terminated;
        self.emit(session_id, json!({"type": "session.deleted"}));
        self.frame(session_id, Frame::End);
    }

    /// A work item of this session has stopped; what came too late for its worker wants another.
    pub(super) fn work_is_over(&mut self, session_id: &str) {
        if self.sessions.iter().any(|session| session.id == session_id && session.wants_work) {
            self.wake(session_id);
        }
    }

    /// Queues a work item unless there is one, or remembers to when the last one has stopped.
    pub(super) fn wake(&mut self, session_id: &str) {
        let stopping = match self.live_item(session_id) {
            Some(work) => work.state == super::work::WorkState::Stopping,
            None => {
                let session = self.session_mut(session_id);
                session.wants_work = false;
                let (environment_id, secret) = (session.environment_id.clone(), session.made_of.secret);
                self.enqueue(&environment_id, "session", session_id, secret);
                return;
            }
        };
        self.session_mut(session_id).wants_work = stopping;
    }
}

impl Session {
    /// Whether this store is one of its resources.
    #[must_use]
    pub fn has_store(&self, id: &str) -> bool {
        self.made_of.resources.iter().any(|resource| resource["memory_store_id"] == id)
    }

    /// A call.
    ///
    /// # Panics
    /// When there is none of this id.
    #[must_use]
    pub fn call(&self, id: &str) -> &Call {
        self.calls.iter().find(|call| call.id == id).expect("a call of this session")
    }

    /// Ids of the calls that wait: for a result or for a confirmation.
    #[must_use]
    pub fn waiting(&self) -> Vec<String> {
        let waits = |call: &&Call| matches!(call.state, CallState::Open | CallState::Gated);
        self.calls.iter().filter(waits).map(|call| call.id.clone()).collect()
    }

    /// Events of a type, in their order.
    #[must_use]
    pub fn events(&self, kind: &str) -> Vec<&Value> {
        self.log.iter().filter_map(|logged| logged.event.as_ref()).filter(|event| event["type"] == kind).collect()
    }

    /// The session as the API shows it.
    #[must_use]
    pub fn json(&self) -> Value {
        let skill = |(id, version): &(String, String)| json!({"type": "custom", "skill_id": id, "version": version});
        let tools = ["bash", "read", "write", "edit", "glob", "grep"].map(
            |name| json!({"type": name, "name": name, "enabled": true, "permission_policy": {"type": "always_allow"}}),
        );
        json!({
            "type": "session",
            "id": self.id,
            "environment_id": self.environment_id,
            "status": self.status.name(),
            "title": null,
            "metadata": self.made_of.metadata,
            "resources": self.made_of.resources,
            "vault_ids": [],
            "deployment_id": null,
            "outcome_evaluations": [],
            "stats": {"active_seconds": 0.0, "duration_seconds": 0.0},
            "usage": {"input_tokens": 0, "output_tokens": 0},
            "created_at": self.created_at,
            "updated_at": self.created_at,
            "archived_at": null,
            "agent": {
                "type": "agent",
                "id": "agent_1",
                "version": 1,
                "name": "main",
                "system": null,
                "description": null,
                "model": {"id": "model", "speed": "standard"},
                "skills": self.made_of.skills.iter().map(skill).collect::<Vec<_>>(),
                "tools": [{
                    "type": "agent_toolset_20260401",
                    "default_config": {"enabled": true, "permission_policy": {"type": "always_allow"}},
                    "configs": tools,
                }],
                "mcp_servers": [],
                "execution_identity": {"type": "service_account"},
            },
        })
    }
}
