//! The endpoints of the work queue and of sessions: paths, queries and bodies. What comes back is read by `wire`.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::Method;
use hyper::header::{ACCEPT, HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

use super::content::Blocks;
use super::http::{Client, Failure, Pieces, Request};
use super::secret::Secret;
use super::wire::{self, Beat, Delivery, Page, Session};

/// What these endpoints are called until they are final.
const BETA: &str = "managed-agents-2026-04-01";
/// How long a poll waits at the server; 999 is the most it takes.
const BLOCK_MS: u64 = 999;
const POLL_WITHIN: Duration = Duration::from_secs(15);
/// Below the time after which a delivery is repeated.
const ACK_WITHIN: Duration = Duration::from_secs(4);
const ASK_WITHIN: Duration = Duration::from_secs(30);
const LIST_WITHIN: Duration = Duration::from_secs(120);
const POST_WITHIN: Duration = Duration::from_secs(60);
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// Largest answer that is not a page of a history: some hundred bytes, and a secret.
const MOST_ANSWER_BYTES: usize = 1024 * 1024;
/// Largest page of a history, with results in it.
const MOST_PAGE_BYTES: usize = 64 * 1024 * 1024;
/// Events on a page: with results in them, a page is still a few megabytes.
const PAGE_EVENTS: u32 = 200;

/// One environment at one server.
#[derive(Debug)]
pub(super) struct Api {
    client: Client,
    environment_id: String,
    /// For what concerns no work item; replaced when its file is.
    key: ArcSwap<Secret>,
    headers: HeaderMap,
    worker: (HeaderName, HeaderValue),
}

/// How this runner presents itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct Presented<'p> {
    /// Value of `anthropic-version`.
    pub(super) version: &'p str,
    /// Value of `anthropic-workspace-id`, for credentials that are good for several workspaces.
    pub(super) workspace_id: Option<&'p str>,
    /// Name of the header that carries the next one.
    pub(super) worker_id_header: &'p str,
    pub(super) worker_id: &'p str,
}

impl Api {
    /// `None` when something has characters that no header takes.
    pub(super) fn new(client: Client, environment_id: String, key: Secret, presented: Presented<'_>) -> Option<Self> {
        let mut headers = HeaderMap::new();
        headers.insert("anthropic-version", HeaderValue::from_str(presented.version).ok()?);
        headers.insert("anthropic-beta", HeaderValue::from_static(BETA));
        if let Some(id) = presented.workspace_id {
            headers.insert("anthropic-workspace-id", HeaderValue::from_str(id).ok()?);
        }
        let name = HeaderName::from_bytes(presented.worker_id_header.as_bytes()).ok()?;
        let worker = (name, HeaderValue::from_str(presented.worker_id).ok()?);
        Some(Self { client, environment_id, key: ArcSwap::from_pointee(key), headers, worker })
    }

    /// The key of the environment.
    pub(super) fn key(&self) -> Secret {
        Secret::clone(&self.key.load())
    }

    pub(super) fn set_key(&self, key: Secret) {
        self.key.store(Arc::new(key));
    }

    pub(super) async fn poll(&self) -> Result<Option<Delivery>, Failure> {
        let mut headers = self.headers.clone();
        headers.insert(self.worker.0.clone(), self.worker.1.clone());
        let path = format!("/environments/{}/work/poll?block_ms={BLOCK_MS}", self.environment_id);
        let key = self.key();
        let request = Request {
            method: Method::GET,
            path,
            secret: &key,
            headers: &headers,
            body: None,
            within: POLL_WITHIN,
            most: MOST_ANSWER_BYTES,
        };
        let body = self.client.send(request).await?;
        wire::delivery(&body, &self.environment_id).map_err(|error| match error {
            wire::BadDelivery::Foreign => Failure::Foreign,
            wire::BadDelivery::BadId => Failure::BadId,
            wire::BadDelivery::Malformed => Failure::Malformed,
        })
    }

    /// What the queue says of itself, and the time that the server believes it to be, where it says that.
    pub(super) async fn stats(&self) -> (Option<String>, Result<zeroize::Zeroizing<Vec<u8>>, Failure>) {
        let (key, path) = (self.key(), format!("/environments/{}/work/stats", self.environment_id));
        self.client.send_dated(self.get(&key, path, ASK_WITHIN, MOST_ANSWER_BYTES)).await
    }

    pub(super) async fn ack(&self, work_id: &str) -> Result<(), Failure> {
        let key = self.key();
        self.client.tell(self.post(&key, self.work(work_id, "ack"), None, ACK_WITHIN)).await
    }

    pub(super) async fn beat(
        &self,
        secret: &Secret,
        work_id: &str,
        expected: &str,
        within: Duration,
    ) -> Result<Beat, Failure> {
        let path = format!("{}?expected_last_heartbeat={}", self.work(work_id, "heartbeat"), encoded(expected));
        let body = self.client.send(self.post(secret, path, None, within)).await?;
        wire::beat(&body).ok_or(Failure::Malformed)
    }

    pub(super) async fn stop(&self, secret: &Secret, work_id: &str) -> Result<(), Failure> {
        let body = json!({"force": true});
        self.client.tell(self.post(secret, self.work(work_id, "stop"), Some(&body), STOP_WITHIN)).await
    }

    /// Whether a session is over.
    pub(super) async fn is_over(&self, secret: &Secret, session_id: &str) -> Result<bool, Failure> {
        let path = format!("/sessions/{session_id}");
        let body = self.client.send(self.get(secret, path, ASK_WITHIN, MOST_ANSWER_BYTES)).await?;
        let Session { is_over, skills, memory_stores } = wire::session(&body).ok_or(Failure::Malformed)?;
        if skills + memory_stores > 0 {
            tracing::warn!(
                session_id,
                skills,
                memory_stores,
                "a session is served without what this runner does not build"
            );
        }
        Ok(is_over)
    }

    pub(super) async fn stream(&self, secret: &Secret, session_id: &str) -> Result<Pieces, Failure> {
        let mut headers = self.headers.clone();
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let path = format!("/sessions/{session_id}/events/stream");
        let request = self.get(secret, path, ASK_WITHIN, MOST_ANSWER_BYTES);
        self.client.stream(Request { headers: &headers, ..request }).await
    }

    pub(super) async fn list(&self, secret: &Secret, session_id: &str, page: Option<&str>) -> Result<Page, Failure> {
        let mut path = format!("/sessions/{session_id}/events?limit={PAGE_EVENTS}&order=asc");
        if let Some(page) = page {
            path.push_str("&page=");
            path.push_str(&encoded(page));
        }
        let body = self.client.send(self.get(secret, path, LIST_WITHIN, MOST_PAGE_BYTES)).await?;
        wire::page(&body).ok_or(Failure::Malformed)
    }

    pub(super) async fn answer(
        &self,
        secret: &Secret,
        session_id: &str,
        tool_use_id: &str,
        blocks: Blocks,
    ) -> Result<(), Failure> {
        let Blocks { is_error, content } = blocks;
        let event =
            json!({"type": "user.tool_result", "tool_use_id": tool_use_id, "is_error": is_error, "content": content});
        let path = format!("/sessions/{session_id}/events");
        let body = json!({"events": [event]});
        self.client.tell(self.post(secret, path, Some(&body), POST_WITHIN)).await
    }

    fn work(&self, work_id: &str, verb: &str) -> String {
        format!("/environments/{}/work/{work_id}/{verb}", self.environment_id)
    }

    fn get<'r>(&'r self, secret: &'r Secret, path: String, within: Duration, most: usize) -> Request<'r> {
        Request { method: Method::GET, path, secret, headers: &self.headers, body: None, within, most }
    }

    fn post<'r>(&'r self, secret: &'r Secret, path: String, body: Option<&Value>, within: Duration) -> Request<'r> {
        let body = body.map(|value| value.to_string().into_bytes());
        let most = MOST_ANSWER_BYTES;
        Request { method: Method::POST, path, secret, headers: &self.headers, body, within, most }
    }
}

/// A text as a value of a query.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_server_pass_through_a_query_unchanged() {
        assert_eq!(encoded("2026-01-01T00:00:01.1+00:00"), "2026-01-01T00%3A00%3A01.1%2B00%3A00");
        assert_eq!(encoded("a&b=c d/é%"), "a%26b%3Dc%20d%2F%C3%A9%25");
    }
}
