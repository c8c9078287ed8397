//! What a worker changed: every acknowledgement, heartbeat, stop and posted event, without what differs between any two runs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use sandbox_runner_tests::claude::{ControlPlane, Credential, Endpoint, Fate, Recorded};
use serde_json::Value;

use crate::world::{Served, World};

/// How long a transcript waits for answers that are under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// What lines are about. Work items, sessions and calls are counted in the order in which the control plane made them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Subject {
    /// Acknowledgement, heartbeats and stop of a work item.
    Item(usize),
    /// Posts of the answer to a call.
    Call { session: usize, call: usize },
    /// The calls of a session in the order in which they were first answered.
    Order { session: usize },
    /// Other requests that change something.
    Other,
    /// What the commands have left.
    Effects,
}

/// Lines by subject, in order within each.
pub(crate) type Transcript = BTreeMap<Subject, Vec<String>>;

/// Reads it from the record of a world in which a scenario is over.
pub(crate) async fn transcript(world: &World<'_>, served: &Served) -> Transcript {
    let deadline = Instant::now() + PATIENCE;
    let is_under_way = |request: &Recorded| {
        let waits = !matches!(request.endpoint, Some(Endpoint::Poll | Endpoint::StreamEvents));
        waits && request.fate == Fate::Pending
    };
    while Instant::now() < deadline && world.mock.lock().record.iter().any(is_under_way) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut replacements = vec![(world.root().display().to_string(), "$W")];
    replacements.extend(served.home.iter().map(|home| (home.display().to_string(), "$H")));
    let plain = |mut text: String| {
        for (from, to) in &replacements {
            text = text.replace(from, to);
        }
        text
    };
    let mut lines = Transcript::new();
    let plane = world.mock.lock();
    for request in &plane.record {
        for (subject, line) in lines_of(&plane, request) {
            if let Subject::Call { session, call } = subject {
                let order = lines.entry(Subject::Order { session }).or_default();
                if !order.contains(&call.to_string()) {
                    order.push(call.to_string());
                }
            }
            lines.entry(subject).or_default().push(plain(line));
        }
    }
    if !served.effects.is_empty() {
        lines.insert(Subject::Effects, served.effects.lines().map(ToOwned::to_owned).collect());
    }
    lines
}

fn lines_of(plane: &ControlPlane, request: &Recorded) -> Vec<(Subject, String)> {
    let Some(endpoint) = request.endpoint else { return vec![(Subject::Other, request.line())] };
    let tail = format!("by {} -> {}", by(&request.credential), fate(&request.fate));
    match endpoint {
        Endpoint::Ack => vec![(item(plane, request), format!("ack {tail}"))],
        Endpoint::Stop => vec![(item(plane, request), format!("stop {} {tail}", request.json()))],
        Endpoint::Heartbeat => {
            let expected = request.incoming.parameter("expected_last_heartbeat").unwrap_or("nothing");
            // The control plane refuses a beat that does not expect its last answer.
            let expected = if expected.starts_with("2026-") { "the last" } else { expected };
            // How many of these there are is a matter of time.
            if expected == "the last" && matches!(request.fate, Fate::Answered(200) | Fate::Pending) {
                return Vec::new();
            }
            vec![(item(plane, request), format!("beat after {expected} {tail}"))]
        }
        Endpoint::SendEvents => {
            let body = request.json();
            let events = body["events"].as_array().cloned().unwrap_or_default();
            let alone = if events.len() == 1 { "" } else { "one of several: " };
            events.iter().map(|event| posted(plane, request, event, alone, &tail)).collect()
        }
        _ if request.incoming.method == "GET" => Vec::new(),
        _ => vec![(Subject::Other, format!("{endpoint:?} {tail}"))],
    }
}

/// A posted event, with every field that it has.
fn posted(plane: &ControlPlane, request: &Recorded, event: &Value, alone: &str, tail: &str) -> (Subject, String) {
    let session =
        plane.sessions.iter().position(|session| request.incoming.path.contains(&format!("/{}/", session.id)));
    let mut rest = event.clone();
    let fields = rest.as_object_mut().unwrap();
    let (kind, id) = (fields.remove("type"), fields.remove("tool_use_id"));
    let (is_error, content) = (fields.remove("is_error"), fields.remove("content"));
    let call = session.and_then(|session| {
        let call =
            plane.sessions[session].calls.iter().position(|call| id.as_ref() == Some(&Value::from(&*call.id)))?;
        Some(Subject::Call { session, call })
    });
    let (Some(subject), Some(kind), Some(is_error), Some(content)) = (call, kind, is_error, content) else {
        return (Subject::Other, format!("{event} {tail}"));
    };
    let more = if fields.is_empty() { String::new() } else { format!(" with {rest}") };
    let kind = kind.as_str().unwrap_or_default();
    let how = if is_error == true { "error" } else { "ok" };
    let content = match content.as_array().map(Vec::as_slice) {
        Some([block]) if block["type"] == "text" => block["text"].to_string(),
        _ => content.to_string(),
    };
    (subject, format!("{alone}{kind}{more} {how} {content} {tail}"))
}

fn item(plane: &ControlPlane, request: &Recorded) -> Subject {
    let is_it = |id: &str| request.incoming.path.contains(&format!("/{id}/"));
    plane.work.iter().position(|work| is_it(&work.id)).map_or(Subject::Other, Subject::Item)
}

fn by(credential: &Credential) -> String {
    match credential {
        Credential::EnvironmentKey(_) => "key".to_owned(),
        Credential::SessionsToken { generation, .. } => format!("token {generation}"),
        other => format!("{other:?}"),
    }
}

fn fate(fate: &Fate) -> String {
    match fate {
        Fate::Answered(status) => status.to_string(),
        Fate::ResponseLost => "answer lost".to_owned(),
        Fate::RequestLost => "request lost".to_owned(),
        Fate::Pending => "no answer".to_owned(),
    }
}
