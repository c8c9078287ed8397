//! The history of a session in pages.

use std::collections::BTreeSet;

use prost_types::Timestamp;
use serde_json::Value;

use super::error::ApiError;
use super::plane::ControlPlane;
use super::request::Incoming;
use super::work::page_of;

/// Parameters that bound `processed_at`.
const BOUNDS: [(&str, Holds); 4] = [
    ("created_at[gt]", |event, bound| event > bound),
    ("created_at[gte]", |event, bound| event >= bound),
    ("created_at[lt]", |event, bound| event < bound),
    ("created_at[lte]", |event, bound| event <= bound),
];

/// Seconds and nanoseconds.
type Instant = (i64, i32);
/// Whether the time of an event is within a bound.
type Holds = fn(&Instant, &Instant) -> bool;

impl ControlPlane {
    /// A page of the events of a session, or of one thread of it.
    ///
    /// # Errors
    /// 400 for a parameter that is wrong, 404.
    pub fn history(&self, session_id: &str, thread: Option<&str>, incoming: &Incoming) -> Result<Value, ApiError> {
        let limit = incoming.number("limit", 1, 1000)?;
        let descending = match incoming.parameter("order") {
            None | Some("asc") => false,
            Some("desc") => true,
            Some(other) => return Err(ApiError::invalid(format!("order: must be asc or desc, not {other:?}"))),
        };
        let mut bounds = Vec::new();
        for (name, holds) in BOUNDS {
            if let Some(text) = incoming.parameter(name) {
                let bound =
                    instant(text).ok_or_else(|| ApiError::invalid(format!("{name}: {text:?} is not RFC 3339")))?;
                bounds.push((bound, holds));
            }
        }
        let kinds = incoming.parameters("types[]");
        let mut events: Vec<Value> = self
            .events_of(session_id, thread)?
            .into_iter()
            .filter(|event| kinds.is_empty() || event["type"].as_str().is_some_and(|kind| kinds.contains(&kind)))
            .filter(|event| {
                let at = event["processed_at"].as_str().and_then(instant);
                bounds.iter().all(|(bound, holds)| at.is_some_and(|at| holds(&at, bound)))
            })
            .collect();
        if descending {
            events.reverse();
        }
        page_of(&events, limit, self.settings.page_limit, incoming.parameter("page"))
    }

    /// Each event once, as it was last told.
    fn events_of(&self, session_id: &str, thread: Option<&str>) -> Result<Vec<Value>, ApiError> {
        let session = self.find_session(session_id)?;
        let of_primary = thread == Some(session.threads[0].id.as_str());
        let mut seen = BTreeSet::new();
        let mut events: Vec<Value> = Vec::new();
        for logged in session.log.iter().rev().filter(|logged| logged.in_history) {
            let belongs = match thread {
                None => true,
                Some(_) if of_primary => logged.thread.is_none(),
                Some(thread) => logged.thread.as_deref() == Some(thread),
            };
            let Some(event) = logged.event.as_ref().filter(|_| belongs) else { continue };
            if seen.insert(event["id"].to_string()) {
                events.push(own(event, thread.is_some()));
            }
        }
        events.reverse();
        Ok(events)
    }
}

/// An event as its own thread shows it: a call does not name the thread there.
pub(super) fn own(event: &Value, on_its_thread: bool) -> Value {
    let mut event = event.clone();
    let call = event["type"] == "agent.tool_use" || event["type"] == "agent.custom_tool_use";
    if let Some(fields) = event.as_object_mut().filter(|_| on_its_thread && call) {
        fields.remove("session_thread_id");
    }
    event
}

fn instant(text: &str) -> Option<Instant> {
    text.parse::<Timestamp>().ok().map(|time| (time.seconds, time.nanos))
}
