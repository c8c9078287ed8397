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
use super::wire::{self, Beat, Delivery, Page};

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
    worker_id: HeaderValue,
}

impl Api {
    /// `None` when version or worker have characters that no header takes.
    pub(super) fn new(
        client: Client,
        environment_id: String,
        key: Secret,
        version: &str,
        worker_id: &str,
    ) -> Option<Self> {
        let mut headers = HeaderMap::new();
        headers.insert("anthropic-version", HeaderValue::from_str(version).ok()?);
        headers.insert("anthropic-beta", HeaderValue::from_static(BETA));
        let worker_id = HeaderValue::from_str(worker_id).ok()?;
        Some(Self { client, environment_id, key: ArcSwap::from_pointee(key), headers, worker_id })
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
        headers.insert(HeaderName::from_static("anthropic-worker-id"), self.worker_id.clone());
        let path = format!("/v1/environments/{}/work/poll?block_ms={BLOCK_MS}", self.environment_id);
        let key = self.key();
        let request =
            Request { method: Method::GET, path, secret: &key, headers: &headers, body: None, within: POLL_WITHIN };
        let body = self.client.send(request).await?;
        wire::delivery(&body, &self.environment_id).map_err(|error| match error {
            wire::BadDelivery::Foreign => Failure::Foreign,
            wire::BadDelivery::Malformed => Failure::Malformed,
        })
    }

    /// What the queue says of itself, and the time that the server believes it to be, where it says that.
    pub(super) async fn stats(&self) -> (Option<String>, Result<zeroize::Zeroizing<Vec<u8>>, Failure>) {
        let (key, path) = (self.key(), format!("/v1/environments/{}/work/stats", self.environment_id));
        let request =
            Request { method: Method::GET, path, secret: &key, headers: &self.headers, body: None, within: ASK_WITHIN };
        self.client.send_dated(request).await
    }

    pub(super) async fn ack(&self, work_id: &str) -> Result<(), Failure> {
        let key = self.key();
        self.post(&key, self.work(work_id, "ack"), None, ACK_WITHIN).await.map(drop)
    }

    pub(super) async fn beat(
        &self,
        secret: &Secret,
        work_id: &str,
        expected: &str,
        within: Duration,
    ) -> Result<Beat, Failure> {
        let path = format!("{}?expected_last_heartbeat={}", self.work(work_id, "heartbeat"), encoded(expected));
        let body = self.post(secret, path, None, within).await?;
        wire::beat(&body).ok_or(Failure::Malformed)
    }

    pub(super) async fn stop(&self, secret: &Secret, work_id: &str) -> Result<(), Failure> {
        self.post(secret, self.work(work_id, "stop"), Some(&json!({"force": true})), STOP_WITHIN).await.map(drop)
    }

    /// Whether a session is over.
    pub(super) async fn is_over(&self, secret: &Secret, session_id: &str) -> Result<bool, Failure> {
        let body = self.get(secret, format!("/v1/sessions/{session_id}"), ASK_WITHIN).await?;
        wire::is_over(&body).ok_or(Failure::Malformed)
    }

    pub(super) async fn stream(&self, secret: &Secret, session_id: &str) -> Result<Pieces, Failure> {
        let mut headers = self.headers.clone();
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let path = format!("/v1/sessions/{session_id}/events/stream");
        let request = Request { method: Method::GET, path, secret, headers: &headers, body: None, within: ASK_WITHIN };
        self.client.stream(request).await
    }

    pub(super) async fn list(&self, secret: &Secret, session_id: &str, page: Option<&str>) -> Result<Page, Failure> {
        let mut path = format!("/v1/sessions/{session_id}/events?limit={PAGE_EVENTS}&order=asc");
        if let Some(page) = page {
            path.push_str("&page=");
            path.push_str(&encoded(page));
        }
        let body = self.get(secret, path, LIST_WITHIN).await?;
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
        let path = format!("/v1/sessions/{session_id}/events");
        self.post(secret, path, Some(&json!({"events": [event]})), POST_WITHIN).await.map(drop)
    }

    fn work(&self, work_id: &str, verb: &str) -> String {
        format!("/v1/environments/{}/work/{work_id}/{verb}", self.environment_id)
    }

    async fn get(
        &self,
        secret: &Secret,
        path: String,
        within: Duration,
    ) -> Result<zeroize::Zeroizing<Vec<u8>>, Failure> {
        let request = Request { method: Method::GET, path, secret, headers: &self.headers, body: None, within };
        self.client.send(request).await
    }

    async fn post(
        &self,
        secret: &Secret,
        path: String,
        body: Option<&Value>,
        within: Duration,
    ) -> Result<zeroize::Zeroizing<Vec<u8>>, Failure> {
        let body = body.map(|value| value.to_string().into_bytes());
        let request = Request { method: Method::POST, path, secret, headers: &self.headers, body, within };
        self.client.send(request).await
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
