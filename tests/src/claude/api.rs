//! What each endpoint does: a request that was let in, its parameters checked, and its effect on the state.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::event::Posted;
use super::plane::ControlPlane;
use super::request::{Credential, Incoming};
use super::route::{Endpoint as E, Route};
use super::work::page_of;

/// The answer to a request that was not refused.
#[derive(Debug)]
pub(super) enum Reply {
    /// 200 with a value.
    Json(Value),
    /// 204 without a body and without a content type.
    Empty,
    /// 200 with these bytes.
    Bytes(Vec<u8>),
    /// An event stream that begins behind this entry of the log.
    Stream {
        /// The session.
        session_id: String,
        /// One thread of it, or all.
        thread: Option<String>,
        /// Entries that it does not tell.
        cursor: usize,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StopBody {
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpdateBody {
    #[serde(default)]
    metadata: BTreeMap<String, Option<String>>,
}

#[derive(Deserialize)]
struct EnvironmentBody {
    name: String,
    config: Value,
}

impl ControlPlane {
    /// Serves every endpoint but the poll, which waits.
    ///
    /// # Errors
    /// As the API refuses.
    pub(super) fn serve(
        &mut self,
        route: &Route,
        incoming: &Incoming,
        credential: &Credential,
    ) -> Result<Reply, ApiError> {
        let id = |number: usize| route.ids.get(number).map_or("", String::as_str);
        let value = match route.endpoint {
            E::Poll => Value::Null,
            E::Stats => self.stats(id(0))?,
            E::ListWork => self.list_work(id(0), incoming.number("limit", 1, 1000)?, incoming.parameter("page"))?,
            E::GetWork => self.work_of(id(0), id(1))?.json(),
            E::UpdateWork => self.update_work(id(0), id(1), incoming.typed::<UpdateBody>()?.metadata)?,
            E::Ack => self.acknowledge(id(0), id(1))?,
            E::Heartbeat => {
                let desired = incoming.number("desired_ttl_seconds", 1, u64::from(u32::MAX))?;
                self.heartbeat(id(0), id(1), incoming.parameter("expected_last_heartbeat"), desired)?
            }
            E::Stop => {
                let body: StopBody = incoming.typed()?;
                self.stop(id(0), id(1), body.force, credential)?;
                return Ok(Reply::Empty);
            }
            E::GetSession => self.find_session(id(0))?.json(),
            E::ListEvents => self.history(id(0), None, incoming)?,
            E::SendEvents => {
                let events = Posted::parse_all(incoming.object()?, self.settings.max_event_bytes)?;
                self.post_events(id(0), events, credential)?
            }
            E::StreamEvents => return self.open_stream(id(0), None),
            E::ListThreads => {
                let session = self.find_session(id(0))?;
                let threads: Result<Vec<Value>, ApiError> =
                    session.threads.iter().map(|thread| session.thread_json(&thread.id)).collect();
                page_of(&threads?, incoming.number("limit", 1, 1000)?, 1000, incoming.parameter("page"))?
            }
            E::GetThread => self.find_session(id(0))?.thread_json(id(1))?,
            E::ListThreadEvents => {
                self.find_session(id(0))?.thread_json(id(1))?;
                self.history(id(0), Some(id(1)), incoming)?
            }
            E::StreamThreadEvents => {
                self.find_session(id(0))?.thread_json(id(1))?;
                return self.open_stream(id(0), Some(id(1)));
            }
            E::ArchiveThread => self.archive_thread(id(0), id(1))?,
            E::GetSkillVersion => self.skill(id(0), id(1))?.json(),
            E::SkillContent => return Ok(Reply::Bytes(self.skill(id(0), id(1))?.archive.clone())),
            E::ListMemories => self.list_memories(id(0), incoming)?,
            E::GetMemory => self.get_memory(id(0), id(1), incoming)?,
            E::CreateMemory => self.post_memory(id(0), incoming)?,
            E::UpdateMemory => self.update_memory(id(0), id(1), incoming)?,
            E::DeleteMemory => self.delete_memory(id(0), id(1), incoming)?,
            E::CreateEnvironment => {
                let body: EnvironmentBody = incoming.typed()?;
                if body.config["type"] != "self_hosted" {
                    return Err(ApiError::invalid("config.type: this control plane has self_hosted environments only"));
                }
                let id = self.create_environment(&body.name)?.id;
                self.environment_json(&id)?
            }
            E::GetEnvironment => self.environment_json(id(0))?,
            E::ArchiveEnvironment => {
                let shown = self.environment_json(id(0))?;
                let stamp = self.stamp();
                self.environment(id(0))?.archived_at = Some(stamp.clone());
                let mut shown = shown;
                shown["archived_at"] = json!(stamp);
                shown
            }
        };
        Ok(Reply::Json(value))
    }

    fn open_stream(&self, session_id: &str, thread: Option<&str>) -> Result<Reply, ApiError> {
        let session = self.find_session(session_id)?;
        let thread = thread.map(ToOwned::to_owned);
        Ok(Reply::Stream { session_id: session_id.to_owned(), thread, cursor: session.log.len() })
    }

    fn archive_thread(&mut self, session_id: &str, thread_id: &str) -> Result<Value, ApiError> {
        let session = self.find_session(session_id)?;
        session.thread_json(thread_id)?;
        let thread = session.threads.iter().find(|thread| thread.id == thread_id);
        let terminated = thread.is_some_and(|thread| thread.terminated);
        let stamp = self.stamp();
        for thread in self.session_mut(session_id).threads.iter_mut().filter(|thread| thread.id == thread_id) {
            thread.archived_at.get_or_insert(stamp.clone());
        }
        if !terminated {
            self.terminate_thread(session_id, thread_id);
        }
        self.session(session_id).thread_json(thread_id)
    }

    fn environment_json(&mut self, id: &str) -> Result<Value, ApiError> {
        let environment = self.environment(id)?;
        Ok(json!({
            "type": "environment",
            "id": environment.id,
            "name": environment.name,
            "description": null,
            "metadata": {},
            "config": {"type": "self_hosted"},
            "created_at": environment.created_at,
            "updated_at": environment.created_at,
            "archived_at": environment.archived_at,
        }))
    }
}
