//! Work queues and their work items, for people and as JSON.

use proto::admin::v1 as wire;
use serde_json::{Value, json};

use crate::cli::outcome::printable;

/// Work items, one a line.
pub(super) fn table(items: &[wire::WorkItem]) -> String {
    let mut text =
        format!("{:<36} {:<36} {:<24} {:<13} LEASE\n", "WORK ITEM", "SESSION OF THE SERVER", "ENVIRONMENT", "STATE");
    for item in items {
        text += &format!(
            "{:<36} {:<36} {:<24} {:<13} {}\n",
            printable(&item.work_id),
            printable(&item.server_session_id),
            printable(&item.environment_id),
            item.state,
            lease(item),
        );
    }
    text
}

/// One work item in full.
pub(super) fn lines(item: &wire::WorkItem) -> String {
    format!(
        "work item    {}\n  environment {}\n  session     {} of the server, {} here\n  state       {}\n  lease       {}\n",
        printable(&item.work_id),
        printable(&item.environment_id),
        printable(&item.server_session_id),
        printable(&item.session_id),
        item.state,
        lease(item),
    )
}

/// One work item.
pub(super) fn json(item: &wire::WorkItem) -> Value {
    json!({
        "work_id": item.work_id,
        "environment_id": item.environment_id,
        "server_session_id": item.server_session_id,
        "session_id": item.session_id,
        "state": item.state,
        "lease_left_seconds": seconds(item),
    })
}

/// How a queue stands, in one line or two.
pub(super) fn queue(queue: &wire::Queue) -> String {
    let mut text = format!("queue        {}, {} work items here\n", printable(&queue.environment_id), queue.work_items);
    if !queue.problem.is_empty() {
        text += &format!("ALARM        {}: {}\n", printable(&queue.environment_id), printable(&queue.problem));
    }
    text
}

/// The same.
pub(super) fn queue_json(queue: &wire::Queue) -> Value {
    json!({
        "environment_id": queue.environment_id,
        "work_items": queue.work_items,
        "problem": queue.problem,
    })
}

fn lease(item: &wire::WorkItem) -> String {
    format!("{:.1} s left", seconds(item))
}

#[allow(clippy::cast_precision_loss, reason = "a lease lasts minutes")]
fn seconds(item: &wire::WorkItem) -> f64 {
    item.lease_left_ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item() -> wire::WorkItem {
        wire::WorkItem {
            work_id: "work_1".into(),
            environment_id: "env_1".into(),
            server_session_id: "sesn_1".into(),
            session_id: "claude:env_1:sesn_1".into(),
            state: "serving".into(),
            lease_left_ms: 59_940,
        }
    }

    #[test]
    fn items_are_shown_with_state_and_lease() {
        let text = table(&[item()]);
        assert!(text.contains("work_1") && text.contains("serving") && text.contains("59.9 s left"), "{text}");
        assert!(lines(&item()).contains("claude:env_1:sesn_1 here"));
        assert_eq!(json(&item())["lease_left_seconds"], 59.94);
    }

    #[test]
    fn queue_that_is_refused_is_an_alarm() {
        let mut shown = wire::Queue { environment_id: "env_1".into(), work_items: 2, problem: String::new() };
        assert_eq!(queue(&shown), "queue        env_1, 2 work items here\n");
        shown.problem = "the server answered 401\u{1b}".into();
        assert!(queue(&shown).ends_with("ALARM        env_1: the server answered 401?\n"));
    }
}
