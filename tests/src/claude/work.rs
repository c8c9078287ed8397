//! A work item: its states, its tokens, and how the API shows it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::ApiError;

/// What a first heartbeat expects.
pub const NO_HEARTBEAT: &str = "NO_HEARTBEAT";
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
    pub(super) created_at: String,
    pub(super) acknowledged_at: Option<String>,
    pub(super) started_at: Option<String>,
    pub(super) stop_requested_at: Option<String>,
    pub(super) stopped_at: Option<String>,
    pub(super) delivered: Option<Duration>,
    /// It is to be delivered once more, whatever its worker has done with it by then.
    pub(super) again: bool,
    pub(super) lease_until: Option<Duration>,
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

    pub(super) fn is_due(&self, environment_id: &str, reclaim: Duration, now: Duration) -> bool {
        let waits = |delivered: Duration| now.saturating_sub(delivered) >= reclaim;
        let open = match self.state {
            WorkState::Queued => true,
            WorkState::Starting | WorkState::Active => self.again,
            _ => false,
        };
        self.environment_id == environment_id && open && self.delivered.is_none_or(waits)
    }

    pub(super) fn precondition_failed(&self, expected: &str) -> ApiError {
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
