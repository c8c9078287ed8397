//! What the server says, read as open sets: an unknown word is never a mistake, and never a permission.

use serde_json::Value;
use zeroize::Zeroizing;

use super::secret::Secret;

/// Longest id that is taken.
pub(super) const LONGEST_ID: usize = 128;
/// Largest input of a tool use that is kept. No tool takes as much, however its text is escaped.
const MOST_INPUT_BYTES: usize = 2 * 1024 * 1024;

/// Whether `text` can be an id: it goes into paths of URLs and into file names.
pub(super) fn is_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    !text.is_empty() && text.len() <= LONGEST_ID && text.bytes().all(allowed)
}

/// What a poll has brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Delivery {
    /// Of the work item.
    pub(super) work_id: String,
    /// What it asks for.
    pub(super) order: Order,
    /// For everything that concerns this item; the environment's key when there is none.
    pub(super) token: Option<Secret>,
}

/// What a work item asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Order {
    /// Serve this session.
    Session(String),
    /// Nothing that this runner knows, or nothing that makes sense: it is given back.
    Nothing(String),
}

/// Why a delivery is not even given back.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadDelivery {
    #[error("the answer to a poll is no work item")]
    Malformed,
    #[error("the id of a work item does not belong into a path")]
    BadId,
    #[error("a work item of another environment was delivered")]
    Foreign,
}

/// Reads the answer to a poll; `None` when the queue is empty.
pub(super) fn delivery(body: &[u8], environment_id: &str) -> Result<Option<Delivery>, BadDelivery> {
    let mut item: Value = serde_json::from_slice(body).map_err(|_| BadDelivery::Malformed)?;
    // It is overwritten, whatever comes of the rest.
    let secret = match item.get_mut("secret").map(Value::take) {
        Some(Value::String(secret)) => Some(Zeroizing::new(secret)),
        _ => None,
    };
    let work_id = match &item {
        Value::Null => return Ok(None),
        Value::Object(fields) => match fields.get("id").and_then(Value::as_str) {
            None | Some("") => return Ok(None),
            Some(id) => id,
        },
        _ => return Err(BadDelivery::Malformed),
    };
    if !is_id(work_id) {
        return Err(BadDelivery::BadId);
    }
    if item.get("environment_id").and_then(Value::as_str) != Some(environment_id) {
        return Err(BadDelivery::Foreign);
    }
    let kind = text(&item["data"], "type").unwrap_or_default();
    let order = match (kind, text(&item["data"], "id")) {
        ("session", Some(id)) if is_id(id) => Order::Session(id.to_owned()),
        ("session", _) => Order::Nothing("session without a usable id".to_owned()),
        (other, _) => Order::Nothing(printable(other)),
    };
    let token = secret.as_ref().and_then(|secret| Secret::of_work_item(secret));
    if secret.is_some() && token.is_none() {
        tracing::warn!(work_id, "the secret of a work item holds no sessions token, the environment's key is used");
    }
    Ok(Some(Delivery { work_id: work_id.to_owned(), order, token }))
}

/// The answer to a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Beat {
    /// Sent with the next one, as it is.
    pub(super) last_heartbeat: String,
    /// How long the lease lasts; `None` when the server does not say.
    pub(super) ttl_seconds: Option<u64>,
    /// The lease is ours and is meant to go on.
    pub(super) goes_on: bool,
}

/// Reads the answer to a heartbeat. What it does not say is taken for the careful one.
pub(super) fn beat(body: &[u8]) -> Option<Beat> {
    let beat: Value = serde_json::from_slice(body).ok()?;
    let extended = beat.get("lease_extended").and_then(Value::as_bool).unwrap_or(false);
    let ending = matches!(text(&beat, "state"), Some("stopping" | "stopped"));
    Some(Beat {
        last_heartbeat: text(&beat, "last_heartbeat")?.to_owned(),
        ttl_seconds: beat.get("ttl_seconds").and_then(Value::as_u64).filter(|ttl| *ttl > 0),
        goes_on: extended && !ending,
    })
}

/// What counts of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Session {
    /// It is over for good.
    pub(super) is_over: bool,
    /// What it has that this runner does not put into a sandbox.
    pub(super) skills: usize,
    pub(super) memory_stores: usize,
}

/// Reads a session; `None` when the answer is none.
pub(super) fn session(body: &[u8]) -> Option<Session> {
    let session: Value = serde_json::from_slice(body).ok()?;
    let entries = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let is_store = |resource: &Value| text(resource, "type") == Some("memory_store");
    session.is_object().then(|| Session {
        is_over: text(&session, "status") == Some("terminated"),
        skills: entries(&session["agent"]["skills"]).len(),
        memory_stores: entries(&session["resources"]).iter().filter(|resource| is_store(resource)).count(),
    })
}

/// One page of a session's history.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) events: Vec<Event>,
    pub(super) next: Option<String>,
}

/// Reads a page.
pub(super) fn page(body: &[u8]) -> Option<Page> {
    let mut page: Value = serde_json::from_slice(body).ok()?;
    let Some(Value::Array(events)) = page.get_mut("data").map(Value::take) else { return None };
    let next = text(&page, "next_page").filter(|next| !next.is_empty()).map(str::to_owned);
    Some(Page { events: events.into_iter().map(event).collect(), next })
}

/// An event of a session, as far as it concerns whoever runs its tools.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Event {
    /// A tool is to run.
    Use(ToolUse),
    /// A tool has its result, whoever gave it.
    Answered { tool_use_id: String },
    /// Somebody has decided about a tool that waits for that.
    Verdict { tool_use_id: String, allow: bool },
    /// What runs is to be ended: in one thread, or in all of them.
    Interrupt { thread_id: Option<String> },
    /// The turn has ended, or waits for something.
    Idle { ends_turn: bool },
    /// A thread of another agent was begun.
    ThreadCreated { thread_id: String },
    /// A thread does something; the first one that is heard of is the session's own.
    ThreadSeen { thread_id: String },
    /// A thread has ended.
    ThreadEnded { thread_id: String },
    /// The session has ended.
    Ended,
    /// Anything else: a sign of life.
    Other,
}

/// A tool that is to run.
#[derive(Clone, PartialEq)]
pub(super) struct ToolUse {
    pub(super) id: String,
    pub(super) name: String,
    /// Null when it was too large to be kept.
    pub(super) input: Value,
    /// Bytes of the input as text, kept or not.
    pub(super) input_bytes: usize,
    pub(super) permission: Permission,
    pub(super) thread_id: Option<String>,
    /// Declared by the agent's owner, who answers it.
    pub(super) is_custom: bool,
}

impl ToolUse {
    /// Whether it is for the shell.
    pub(super) fn is_command(&self) -> bool {
        self.name == "bash"
    }

    /// Bytes of its input that are kept.
    pub(super) fn kept_bytes(&self) -> usize {
        if self.is_oversized() { 0 } else { self.input_bytes }
    }

    /// Whether its input was too large to be kept.
    pub(super) fn is_oversized(&self) -> bool {
        self.input_bytes > MOST_INPUT_BYTES
    }
}

/// Inputs are the customer's data, so they are never part of a rendering.
impl std::fmt::Debug for ToolUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ToolUse")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("permission", &self.permission)
            .field("thread_id", &self.thread_id)
            .finish_non_exhaustive()
    }
}

/// What the server says of a tool before anybody has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Permission {
    /// It may run.
    Allowed,
    /// It must not, whatever anybody says.
    Denied,
    /// It waits for a verdict. So does everything that is not understood.
    Asked,
}

/// Reads one event.
pub(super) fn event(mut event: Value) -> Event {
    let kind = text(&event, "type").unwrap_or_default().to_owned();
    let thread_id = id_in(&event, "session_thread_id");
    match kind.as_str() {
        "agent.tool_use" | "agent.custom_tool_use" => {
            let (Some(id), Some(name)) = (id_in(&event, "id"), text(&event, "name").map(str::to_owned)) else {
                tracing::warn!("a tool use without a usable id or name is passed over");
                return Event::Other;
            };
            let permission = match event.get("evaluated_permission") {
                None | Some(Value::Null) => Permission::Allowed,
                Some(Value::String(word)) if word == "allow" => Permission::Allowed,
                Some(Value::String(word)) if word == "deny" => Permission::Denied,
                Some(_) => Permission::Asked,
            };
            let input = event.get_mut("input").map(Value::take).unwrap_or_default();
            let input_bytes = input.to_string().len();
            let input = if input_bytes > MOST_INPUT_BYTES { Value::Null } else { input };
            let is_custom = kind == "agent.custom_tool_use";
            Event::Use(ToolUse { id, name, input, input_bytes, permission, thread_id, is_custom })
        }
        // The second is what the server itself answers: a denial, or what an interrupt has closed.
        "user.tool_result" | "agent.tool_result" => answered(&event, "tool_use_id"),
        "user.custom_tool_result" => answered(&event, "custom_tool_use_id"),
        "user.tool_confirmation" => match id_in(&event, "tool_use_id") {
            Some(tool_use_id) => Event::Verdict { tool_use_id, allow: text(&event, "result") == Some("allow") },
            None => Event::Other,
        },
        // Only one that names no thread concerns all of them.
        "user.interrupt" if thread_id.is_none() && event.get("session_thread_id").is_some_and(|id| !id.is_null()) => {
            Event::Other
        }
        "user.interrupt" => Event::Interrupt { thread_id },
        "session.status_idle" => {
            // A reason that is missing ends nothing.
            let reason = event.get("stop_reason").and_then(|reason| text(reason, "type"));
            Event::Idle { ends_turn: reason.is_some_and(|reason| reason != "requires_action") }
        }
        "session.thread_status_terminated" => {
            thread_id.map_or(Event::Other, |thread_id| Event::ThreadEnded { thread_id })
        }
        "session.thread_status_running" | "session.thread_status_idle" | "session.thread_status_rescheduled" => {
            thread_id.map_or(Event::Other, |thread_id| Event::ThreadSeen { thread_id })
        }
        "session.thread_created" => thread_id.map_or(Event::Other, |thread_id| Event::ThreadCreated { thread_id }),
        "session.status_terminated" | "session.deleted" => Event::Ended,
        _ => Event::Other,
    }
}

fn answered(event: &Value, field: &str) -> Event {
    id_in(event, field).map_or(Event::Other, |tool_use_id| Event::Answered { tool_use_id })
}

fn id_in(value: &Value, field: &str) -> Option<String> {
    text(value, field).filter(|id| is_id(id)).map(str::to_owned)
}

fn text<'v>(value: &'v Value, field: &str) -> Option<&'v str> {
    value.get(field).and_then(Value::as_str)
}

/// A word of the server's that may stand in a log.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || "_-.".contains(*c)).take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn delivered(item: Value) -> Result<Option<Delivery>, BadDelivery> {
        delivery(&serde_json::to_vec(&item).expect("JSON"), "env_1")
    }

    #[test]
    fn empty_queue_is_null_or_an_item_without_an_id() {
        assert_eq!(delivered(json!(null)), Ok(None));
        assert_eq!(delivered(json!({"id": ""})), Ok(None));
        assert_eq!(delivered(json!({})), Ok(None));
    }

    #[test]
    fn item_of_a_session_is_taken_and_every_other_kind_is_given_back() {
        let item = |data: Value| json!({"id": "work_1", "environment_id": "env_1", "data": data, "secret": null});
        let order = |data| delivered(item(data)).map(|found| found.map(|delivery| delivery.order));
        assert_eq!(order(json!({"type": "session", "id": "sesn_1"})), Ok(Some(Order::Session("sesn_1".into()))));
        assert_eq!(order(json!({"type": "healthcheck"})), Ok(Some(Order::Nothing("healthcheck".into()))));
        assert!(matches!(order(json!({"type": "session", "id": "../x"})), Ok(Some(Order::Nothing(_)))));
        assert!(matches!(order(json!(3)), Ok(Some(Order::Nothing(_)))));
    }

    #[test]
    fn ids_that_do_not_belong_into_a_path_and_other_environments_are_refused() {
        let item = |id: &str, environment: &str| json!({"id": id, "environment_id": environment, "data": {}});
        for id in ["a/b", "..", "a b", "a\u{0}", "é", &"x".repeat(129)] {
            assert_eq!(delivered(item(id, "env_1")), Err(BadDelivery::BadId), "{id}");
        }
        assert_eq!(delivered(item("work_1", "env_2")), Err(BadDelivery::Foreign));
        assert_eq!(delivery(b"[", "env_1"), Err(BadDelivery::Malformed));
    }

    #[test]
    fn heartbeat_that_does_not_say_that_the_lease_goes_on_says_that_it_does_not() {
        let goes_on = |value: Value| beat(&serde_json::to_vec(&value).expect("JSON")).map(|beat| beat.goes_on);
        let with = |state: &str, extended: Value| json!({"last_heartbeat": "t", "state": state, "lease_extended": extended, "ttl_seconds": 4});
        assert_eq!(goes_on(with("active", json!(true))), Some(true));
        assert_eq!(goes_on(with("novel", json!(true))), Some(true));
        assert_eq!(goes_on(with("stopping", json!(true))), Some(false));
        assert_eq!(goes_on(with("stopped", json!(true))), Some(false));
        assert_eq!(goes_on(with("active", json!(false))), Some(false));
        assert_eq!(goes_on(json!({"last_heartbeat": "t"})), Some(false));
        assert_eq!(goes_on(json!({"state": "active"})), None);
    }

    #[test]
    fn session_is_over_only_when_it_says_so_and_what_it_misses_here_is_counted() {
        let read = |value: Value| session(&serde_json::to_vec(&value).expect("JSON"));
        let plain = Session { is_over: false, skills: 0, memory_stores: 0 };
        for value in [json!({}), json!({"status": "idle"}), json!({"status": 3, "resources": 3, "agent": []})] {
            assert_eq!(read(value.clone()), Some(plain), "{value}");
        }
        assert_eq!(read(json!({"status": "terminated"})), Some(Session { is_over: true, ..plain }));
        let resources = json!([{"type": "memory_store"}, {"type": "novel"}, 3]);
        let rich = json!({"status": "running", "agent": {"skills": [{}, {}]}, "resources": resources});
        assert_eq!(read(rich), Some(Session { skills: 2, memory_stores: 1, ..plain }));
        assert_eq!(read(json!([])), None);
    }

    #[test]
    fn permission_that_is_not_understood_waits_for_a_verdict() {
        let of = |permission: Value| {
            let use_ = json!({"type": "agent.tool_use", "id": "t", "name": "bash", "input": {}, "evaluated_permission": permission});
            match event(use_) {
                Event::Use(tool_use) => tool_use.permission,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(of(json!(null)), Permission::Allowed);
        assert_eq!(of(json!("allow")), Permission::Allowed);
        assert_eq!(of(json!("deny")), Permission::Denied);
        for novel in [json!("ask"), json!("ALLOW"), json!("allow "), json!(true), json!({"type": "allow"}), json!("")] {
            assert_eq!(of(novel.clone()), Permission::Asked, "{novel}");
        }
    }

    #[test]
    fn verdict_that_is_not_understood_is_a_refusal() {
        let verdict =
            |result: Value| event(json!({"type": "user.tool_confirmation", "tool_use_id": "t", "result": result}));
        let expected = |allow| Event::Verdict { tool_use_id: "t".into(), allow };
        assert_eq!(verdict(json!("allow")), expected(true));
        assert_eq!(verdict(json!("deny")), expected(false));
        assert_eq!(verdict(json!("perhaps")), expected(false));
        assert_eq!(verdict(json!(null)), expected(false));
    }

    #[test]
    fn unknown_and_malformed_events_are_signs_of_life() {
        for value in
            [json!({"type": "novel.event"}), json!(3), json!({}), json!({"type": "agent.tool_use", "id": "a/b"})]
        {
            assert_eq!(event(value.clone()), Event::Other, "{value}");
        }
    }

    #[test]
    fn turn_ends_for_every_reason_but_an_action_that_is_required() {
        let idle = |reason: Value| event(json!({"type": "session.status_idle", "stop_reason": reason}));
        for reason in ["end_turn", "refusal", "budget_reached", "novel"] {
            assert_eq!(idle(json!({"type": reason})), Event::Idle { ends_turn: true });
        }
        assert_eq!(idle(json!({"type": "requires_action", "event_ids": []})), Event::Idle { ends_turn: false });
        assert_eq!(idle(json!(null)), Event::Idle { ends_turn: false });
    }
}
