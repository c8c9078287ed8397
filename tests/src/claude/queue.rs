//! The queue of an environment: poll, acknowledge, heartbeat, stop; and leases that lapse.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use super::error::ApiError;
use super::plane::{Breach, ControlPlane};
use super::request::{Credential, Fate, Recorded};
use super::route::Endpoint;
use super::work::{NO_HEARTBEAT, Secret, Token, Work, WorkState, page_of};

/// How long a worker counts as polling after a poll.
const POLLING: Duration = Duration::from_secs(30);
/// Largest page of work items.
const PAGE: usize = 100;

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
            again: false,
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

    /// How many workers wait for an item at this moment.
    #[must_use]
    pub fn asking(&self) -> usize {
        let waits = |request: &&Recorded| request.endpoint == Some(Endpoint::Poll) && request.fate == Fate::Pending;
        let workers = self.record.iter().filter(waits).map(|poll| poll.incoming.header("anthropic-worker-id"));
        workers.collect::<BTreeSet<_>>().len()
    }

    /// Whether a poll would get an item.
    #[must_use]
    pub fn is_due(&self, environment_id: &str, reclaim: Duration) -> bool {
        self.work.iter().any(|work| work.is_due(environment_id, reclaim, self.now()))
    }

    /// Hands out the oldest item that waits, or that was delivered and not acknowledged for `reclaim`. Null for none.
    ///
    /// # Errors
    /// 404 for an unknown environment.
    pub fn poll(&mut self, environment_id: &str, reclaim: Duration) -> Result<Value, ApiError> {
        let now = self.now();
        self.environment(environment_id)?;
        let due = self.work.iter_mut().find(|work| work.is_due(environment_id, reclaim, now));
        let Some(work) = due else { return Ok(Value::Null) };
        work.again = self.duplicate_deliveries > 0;
        work.delivered = (!work.again).then_some(now);
        self.duplicate_deliveries = self.duplicate_deliveries.saturating_sub(1);
        work.deliveries += 1;
        let id = work.id.clone();
        let secret = self.secret_of(&id);
        let mut item = self.item(&id).json();
        item["secret"] = secret;
        if let Some(other) = &self.settings.delivered_as {
            item["environment_id"] = json!(other);
        }
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
        (work.delivered, work.again) = (None, false);
        self.new_token(id);
    }

    /// Gives the lease of an item to another worker, which keeps it.
    ///
    /// # Panics
    /// When there is no such item.
    pub fn take_lease_away(&mut self, id: &str) {
        let stamp = self.stamp();
        let work = self.work.iter_mut().find(|work| work.id == id).expect("a work item of this control plane");
        work.generation += 1;
        work.state = WorkState::Active;
        work.last_heartbeat = Some(stamp);
        work.lease_until = None;
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
