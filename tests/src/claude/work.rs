//! The queue of an environment: poll, acknowledge, heartbeat, stop.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::error::ApiError;
use super::plane::{Breach, ControlPlane};
use super::request::Credential;

/// What a first heartbeat expects.
pub const NO_HEARTBEAT: &str = "NO_HEARTBEAT";
/// How long a worker counts as polling after a poll.
const POLLING: Duration = Duration::from_secs(30);
/// Largest page of work items.
const PAGE: usize = 100;

/// State of a work item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkState {
    /// In the queue; it may have been delivered, not acknowledged.
    Queued,
    /// Acknowledged, no heartbeat yet.
    Starting,
    /// Under a lease that heartbeats extend.
    Active,
    /// Its worker is asked to stop.
    Stopping,
    /// Over.
    Stopped,
}

impl WorkState {
    /// Its name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Active => "active",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

/// What the secret of a delivered work item looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Secret {
    /// URL-safe base64 with padding; a token, and members that a worker does not know.
    Token,
    /// The same without padding.
    Unpadded,
    /// Null.
    Missing,
    /// Not base64.
    NotBase64,
    /// Base64, not JSON.
    NotJson,
    /// JSON without a token.
    NoToken,
}

/// A work item.
#[derive(Debug, Clone)]
pub struct Work {
    /// `work_…`.
    pub id: String,
    /// Its environment.
    pub environment_id: String,
    /// `session`, or another kind that a worker need not know.
    pub data_type: String,
    /// What it is about.
    pub data_id: String,
    /// Its state.
    pub state: WorkState,
    /// Form of its secret.
    pub secret: Secret,
    /// Times it was handed out by a poll.
    pub deliveries: u32,
    /// How often its lease was given away: lapsed, or taken by another worker.
    pub generation: u32,
    /// What the last heartbeat was answered with.
    pub last_heartbeat: Option<String>,
    /// Labels.
    pub metadata: BTreeMap<String, String>,
    /// Lease of the last heartbeat, in seconds.
    pub ttl_seconds: u64,
    created_at: String,
    acknowledged_at: Option<String>,
    started_at: Option<String>,
    stop_requested_at: Option<String>,
    stopped_at: Option<String>,
    delivered: Option<Duration>,
    lease_until: Option<Duration>,
}

/// A token of a work item.
#[derive(Debug, Clone)]
pub struct Token {
    /// What is sent.
    pub value: String,
    /// The work item.
    pub work_id: String,
    /// Generation of its lease when it was made.
    pub generation: u32,
    /// Whether it is accepted.
    pub valid: bool,
}

impl ControlPlane {
    /// Queues a work item.
    pub fn enqueue(&mut self, environment_id: &str, data_type: &str, data_id: &str, secret: Secret) -> String {
        let id = self.next_id("work_");
        let work = Work {
            id: id.clone(),
            environment_id: environment_id.to_owned(),
            data_type: data_type.to_owned(),
            data_id: data_id.to_owned(),
            state: WorkState::Queued,
            secret,
            deliveries: 0,
            generation: 0,
            last_heartbeat: None,
            metadata: BTreeMap::new(),
            ttl_seconds: self.settings.ttl_seconds,
            created_at: self.stamp(),
            acknowledged_at: None,
            started_at: None,
            stop_requested_at: None,
            stopped_at: None,
            delivered: None,
            lease_until: None,
        };
        self.work.push(work);
        self.new_token(&id);
        id
    }

    /// The work item with this id in this environment.
    ///
    /// # Errors
    /// 404.
    pub fn work_of(&mut self, environment_id: &str, id: &str) -> Result<&mut Work, ApiError> {
        let found = self.work.iter_mut().find(|work| work.id == id && work.environment_id == environment_id);
        found.ok_or_else(|| ApiError::not_found(format!("work item {id} not found")))
    }

    /// A work item by its id.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn item(&self, id: &str) -> &Work {
        self.work.iter().find(|work| work.id == id).expect("a work item of this control plane")
    }

    /// The newest work item of a session that is not stopped.
    #[must_use]
    pub fn live_item(&self, session_id: &str) -> Option<&Work> {
        self.work.iter().rev().find(|work| work.data_id == session_id && work.state != WorkState::Stopped)
    }

    /// Notes that a worker polls.
    ///
    /// # Errors
    /// 404 for an unknown environment.
    pub fn note_worker(&mut self, environment_id: &str, worker_id: Option<&str>) -> Result<(), ApiError> {
        let now = self.now();
        let environment = self.environment(environment_id)?;
        if let Some(worker_id) = worker_id {
            environment.workers.insert(worker_id.to_owned(), now);
        }
        Ok(())
    }

    /// Whether a poll would get an item.
    #[must_use]
    pub fn is_due(&self, environment_id: &str, reclaim: Duration) -> bool {
        self.work.iter().any(|work| work.is_due(environment_id, reclaim, self.now()))
    }

    /// Hands out the oldest item that waits, or that was delivered and not acknowledged for `reclaim`. Null for none.
    /// `keep` leaves it in the queue as if it had not been delivered, so that the next poll gets it too.
    ///
    /// # Errors
    /// 404 for an unknown environment.
    pub fn poll(&mut self, environment_id: &str, reclaim: Duration, keep: bool) -> Result<Value, ApiError> {
        let now = self.now();
        self.environment(environment_id)?;
        let due = self.work.iter_mut().find(|work| work.is_due(environment_id, reclaim, now));
        let Some(work) = due else { return Ok(Value::Null) };
        work.delivered = (!keep).then_some(now);
        work.deliveries += 1;
        let id = work.id.clone();
        let secret = self.secret_of(&id);
        let mut item = self.item(&id).json();
        item["secret"] = secret;
        Ok(item)
    }

    /// Takes a delivered item out of the queue. A repetition, as after a lost answer, is answered again.
    ///
    /// # Errors
    /// 404; 409 for an item that is not to be acknowledged.
    pub fn acknowledge(&mut self, environment_id: &str, id: &str) -> Result<Value, ApiError> {
        let stamp = self.stamp();
        let now = self.now();
        let work = self.work_of(environment_id, id)?;
        match work.state {
            WorkState::Queued if work.deliveries > 0 => {
                work.state = WorkState::Starting;
                work.acknowledged_at = Some(stamp);
                work.lease_until = Some(now + Duration::from_secs(work.ttl_seconds));
            }
            WorkState::Starting => {}
            state => {
                let state = state.name();
                return Err(ApiError::conflict(format!("work item {id} is {state} and cannot be acknowledged")));
            }
        }
        Ok(work.json())
    }

    /// Extends the lease when `expected` is what the last heartbeat was answered with.
    ///
    /// # Errors
    /// 404; 409 for an item that was not acknowledged; 412 when somebody else has the lease.
    pub fn heartbeat(
        &mut self,
        environment_id: &str,
        id: &str,
        expected: Option<&str>,
        desired_ttl: Option<u64>,
    ) -> Result<Value, ApiError> {
        let stamp = self.stamp();
        let now = self.now();
        let (least, most) = self.settings.ttl_bounds;
        let default_ttl = self.settings.ttl_seconds;
        if expected.is_none() {
            self.breaches.push(Breach::HeartbeatWithoutComparison { work_id: id.to_owned() });
        }
        let work = self.work_of(environment_id, id)?;
        let over = matches!(work.state, WorkState::Stopping | WorkState::Stopped);
        if !over {
            let actual = work.last_heartbeat.as_deref();
            let matches = expected.is_none_or(|expected| expected == actual.unwrap_or(NO_HEARTBEAT));
            if !matches {
                return Err(work.precondition_failed(expected.unwrap_or_default()));
            }
            if work.state == WorkState::Queued {
                return Err(ApiError::conflict(format!("work item {id} is queued; acknowledge it first")));
            }
        }
        let extended = work.state != WorkState::Stopped;
        if extended {
            work.ttl_seconds = desired_ttl.map_or(default_ttl, |desired| desired.clamp(least, most));
            work.lease_until = Some(now + Duration::from_secs(work.ttl_seconds));
            work.last_heartbeat = Some(stamp.clone());
            work.started_at.get_or_insert(stamp);
            if work.state == WorkState::Starting {
                work.state = WorkState::Active;
            }
        }
        Ok(json!({
            "type": "work_heartbeat",
            "last_heartbeat": work.last_heartbeat.clone().unwrap_or_default(),
            "lease_extended": extended,
            "state": work.state.name(),
            "ttl_seconds": work.ttl_seconds,
        }))
    }

    /// Asks the worker of an item to stop, or stops it at once.
    ///
    /// # Errors
    /// 404; 409 when it is over.
    pub fn stop(&mut self, environment_id: &str, id: &str, force: bool, by: &Credential) -> Result<(), ApiError> {
        let stamp = self.stamp();
        let work = self.work_of(environment_id, id)?;
        if work.state == WorkState::Stopped {
            return Err(ApiError::conflict(format!("work item {id} is already stopped")));
        }
        let stale = matches!(by, Credential::SessionsToken { generation, .. } if *generation < work.generation);
        work.stop_requested_at.get_or_insert(stamp.clone());
        if force || work.state == WorkState::Queued {
            work.state = WorkState::Stopped;
            work.stopped_at = Some(stamp);
            work.lease_until = None;
        } else {
            work.state = WorkState::Stopping;
        }
        let (stopped, session_id) = (work.state == WorkState::Stopped, work.data_id.clone());
        if stale {
            self.breaches.push(Breach::StopAfterLeaseLost { work_id: id.to_owned() });
        }
        if stopped {
            self.work_is_over(&session_id);
        }
        Ok(())
    }

    /// Figures of the queue.
    ///
    /// # Errors
    /// 404.
    pub fn stats(&mut self, environment_id: &str) -> Result<Value, ApiError> {
        let now = self.now();
        let environment = self.environment(environment_id)?;
        let polling = environment.workers.values().filter(|last| now.saturating_sub(**last) < POLLING).count();
        let queued = |work: &&Work| work.environment_id == environment_id && work.state == WorkState::Queued;
        let pending = self.work.iter().filter(queued).filter(|work| work.delivered.is_some()).count();
        Ok(json!({
            "type": "work_queue_stats",
            "depth": self.work.iter().filter(queued).count() - pending,
            "pending": pending,
            "oldest_queued_at": self.work.iter().find(queued).map(|work| work.created_at.clone()),
            "workers_polling": polling,
        }))
    }

    /// A page of items, without secrets.
    ///
    /// # Errors
    /// 400 for a cursor that is none; 404.
    pub fn list_work(
        &mut self,
        environment_id: &str,
        limit: Option<u64>,
        page: Option<&str>,
    ) -> Result<Value, ApiError> {
        self.environment(environment_id)?;
        let all: Vec<Value> =
            self.work.iter().filter(|work| work.environment_id == environment_id).map(Work::json).collect();
        page_of(&all, limit, PAGE, page)
    }

    /// Changes labels: null removes one.
    ///
    /// # Errors
    /// 404.
    pub fn update_work(
        &mut self,
        environment_id: &str,
        id: &str,
        patch: BTreeMap<String, Option<String>>,
    ) -> Result<Value, ApiError> {
        let work = self.work_of(environment_id, id)?;
        for (name, value) in patch {
            match value {
                Some(value) => _ = work.metadata.insert(name, value),
                None => _ = work.metadata.remove(&name),
            }
        }
        Ok(work.json())
    }

    /// Gives every lease that has run out back to the queue, with another token.
    pub(super) fn lapse_leases(&mut self) -> bool {
        let now = self.now();
        let lapsed: Vec<String> = self
            .work
            .iter()
            .filter(|work| work.lease_until.is_some_and(|until| until <= now))
            .map(|work| work.id.clone())
            .collect();
        for id in &lapsed {
            self.lapse(id);
        }
        !lapsed.is_empty()
    }

    /// Lets the lease of an item run out now.
    ///
    /// # Panics
    /// When there is no such item.
    pub fn lapse(&mut self, id: &str) {
        let stamp = self.stamp();
        let work = self.work.iter_mut().find(|work| work.id == id).expect("a work item of this control plane");
        work.lease_until = None;
        work.generation += 1;
        if work.state == WorkState::Stopping {
            work.state = WorkState::Stopped;
            work.stopped_at = Some(stamp);
            let session_id = work.data_id.clone();
            self.work_is_over(&session_id);
            return;
        }
        work.state = WorkState::Queued;
        work.last_heartbeat = None;
        work.acknowledged_at = None;
        work.delivered = None;
        self.new_token(id);
    }

    /// Gives the lease of an item to another worker, whose heartbeats nobody sends.
    ///
    /// # Panics
    /// When there is no such item.
    pub fn take_lease_away(&mut self, id: &str) {
        let stamp = self.stamp();
        let work = self.work.iter_mut().find(|work| work.id == id).expect("a work item of this control plane");
        work.generation += 1;
        work.state = WorkState::Active;
        work.last_heartbeat = Some(stamp);
        self.new_token(id);
    }

    /// Makes every token of an item invalid, as one that has expired is.
    pub fn revoke_tokens(&mut self, work_id: &str) {
        for token in self.tokens.iter_mut().filter(|token| token.work_id == work_id) {
            token.valid = false;
        }
    }

    fn new_token(&mut self, work_id: &str) {
        let value = self.next_id("sk-ant-req-mock-");
        let generation = self.item(work_id).generation;
        self.tokens.push(Token { value, work_id: work_id.to_owned(), generation, valid: true });
    }

    fn secret_of(&self, work_id: &str) -> Value {
        let token = self.tokens.iter().rev().find(|token| token.work_id == work_id).expect("each item has a token");
        let whole = json!({
            "sessions_token": token.value,
            "api_base_url": "https://api.invalid",
            "ingress_token": "not-for-workers",
        })
        .to_string();
        match self.item(work_id).secret {
            Secret::Token => json!(URL_SAFE.encode(whole)),
            Secret::Unpadded => json!(URL_SAFE_NO_PAD.encode(whole)),
            Secret::Missing => Value::Null,
            Secret::NotBase64 => json!("%%% not base64 %%%"),
            Secret::NotJson => json!(URL_SAFE.encode("not json")),
            Secret::NoToken => json!(URL_SAFE.encode(r#"{"sessions_token":""}"#)),
        }
    }
}

impl Work {
    /// The item as the API shows it, without its secret.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "type": "work",
            "id": self.id,
            "environment_id": self.environment_id,
            "state": self.state.name(),
            "data": {"type": self.data_type, "id": self.data_id},
            "secret": null,
            "created_at": self.created_at,
            "acknowledged_at": self.acknowledged_at,
            "started_at": self.started_at,
            "latest_heartbeat_at": self.last_heartbeat,
            "stop_requested_at": self.stop_requested_at,
            "stopped_at": self.stopped_at,
            "metadata": self.metadata,
        })
    }

    fn is_due(&self, environment_id: &str, reclaim: Duration, now: Duration) -> bool {
        let waits = |delivered: Duration| now.saturating_sub(delivered) >= reclaim;
        self.environment_id == environment_id && self.state == WorkState::Queued && self.delivered.is_none_or(waits)
    }

    fn precondition_failed(&self, expected: &str) -> ApiError {
        let actual = self.last_heartbeat.as_deref().unwrap_or("NULL");
        let message = format!("Heartbeat precondition failed: expected {expected}, actual was {actual}");
        let details = json!({
            "error_code": "heartbeat_precondition_failed",
            "error_visibility": "user_facing",
            "current_state": {
                "state": self.state.name(),
                "last_heartbeat": self.last_heartbeat,
                "lease_updated_at": self.last_heartbeat,
                "lease_extended": false,
                "ttl_seconds": self.ttl_seconds,
            },
        });
        ApiError::new(412, "invalid_request_error", message).with("details", details)
    }
}

/// A page of `all`, with a cursor for the next one.
///
/// # Errors
/// 400 for a cursor that is none.
pub(super) fn page_of(all: &[Value], limit: Option<u64>, most: usize, page: Option<&str>) -> Result<Value, ApiError> {
    let begin = match page {
        None | Some("") => 0,
        Some(cursor) => cursor
            .strip_prefix("page_")
            .and_then(|number| number.parse::<usize>().ok())
            .filter(|begin| *begin <= all.len())
            .ok_or_else(|| ApiError::invalid(format!("page: {cursor:?} is not a cursor of this list")))?,
    };
    let length = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(most).min(most);
    let end = (begin + length).min(all.len());
    let next = (end < all.len()).then(|| format!("page_{end}"));
    Ok(json!({"data": all[begin..end], "next_page": next}))
}
