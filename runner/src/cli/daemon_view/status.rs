//! How the daemon stands, for people and as JSON.

use proto::admin::v1 as wire;
use serde_json::{Value, json};

use super::work;
use crate::cli::outcome::printable;

/// The lines of `status`.
pub(super) fn text(status: &wire::StatusResponse) -> String {
    let tier = status.receipt.as_ref().map(|receipt| receipt.tier.as_str()).filter(|tier| !tier.is_empty());
    let mut text = format!(
        "version      {}\nprocess      {}\nlink         {}\n",
        printable(&status.version),
        status.pid,
        printable(&status.link)
    );
    if !status.link_problem.is_empty() {
        text += &format!("problem      {}\n", printable(&status.link_problem));
    }
    if status.certificate_not_after != 0 {
        text += &format!("certificate  good until {}\n", utc(status.certificate_not_after));
    }
    for alarm in &status.certificate_alarms {
        text += &format!("ALARM        {}\n", printable(alarm));
    }
    for queue in &status.queues {
        text += &work::queue(queue);
    }
    text += &format!(
        "sessions     {}\ncalls        {} running, {} waiting\n",
        status.sessions, status.running_calls, status.queued_calls
    );
    if status.draining {
        text += "draining     takes no new work\n";
    }
    text += &format!("tier         {}\n", tier.unwrap_or("not measured"));
    for shortage in &status.short_of {
        text += &format!("short        {}\n", printable(shortage));
    }
    for number in &status.numbers {
        text += &format!("{} {}\n", number.name, number.value);
    }
    text
}

/// A moment in seconds since 1970 as RFC 3339 has it, or the number where that has no name for it.
fn utc(seconds: i64) -> String {
    let stamp = prost_types::Timestamp { seconds, nanos: 0 };
    if (0..=253_402_300_799).contains(&seconds) { stamp.to_string() } else { seconds.to_string() }
}

/// The same as JSON.
pub(super) fn json(status: &wire::StatusResponse) -> Value {
    let numbers = status.numbers.iter().map(|number| (number.name.clone(), json!(number.value)));
    json!({
        "version": status.version,
        "pid": status.pid,
        "link": status.link,
        "link_problem": status.link_problem,
        "certificate_not_after": status.certificate_not_after,
        "certificate_alarms": status.certificate_alarms,
        "sessions": status.sessions,
        "running_calls": status.running_calls,
        "queued_calls": status.queued_calls,
        "draining": status.draining,
        "queues": status.queues.iter().map(work::queue_json).collect::<Vec<_>>(),
        "short_of": status.short_of,
        "numbers": numbers.collect::<serde_json::Map<_, _>>(),
        "receipt": status.receipt.as_ref().map(super::receipt_json),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_shows_what_the_host_is_short_of_and_every_number() {
        let number = wire::Number { name: "descriptors_open".into(), value: 7 };
        let status = wire::StatusResponse {
            link: "connected".into(),
            short_of: vec!["1 MiB of the state disk are free, 2 MiB are kept free".into()],
            numbers: vec![number],
            ..Default::default()
        };

        let shown = super::text(&status);
        assert!(
            shown.contains("short        1 MiB of the state disk") && shown.contains("descriptors_open 7\n"),
            "{shown}"
        );
        assert_eq!(super::json(&status)["numbers"]["descriptors_open"], 7);
    }

    #[test]
    fn status_shows_the_end_of_the_certificate_and_every_alarm_of_it() {
        let status = wire::StatusResponse {
            link: "connected".into(),
            certificate_not_after: 1_000_000_000,
            certificate_alarms: vec!["it ends soon".into(), "new files are refused".into()],
            ..Default::default()
        };
        let shown = super::text(&status);
        assert!(shown.contains("certificate  good until 2001-09-09T01:46:40Z\n"), "{shown}");
        assert!(shown.contains("ALARM        it ends soon\nALARM        new files are refused\n"), "{shown}");
        assert!(!super::text(&wire::StatusResponse::default()).contains("certificate"), "{shown}");
    }
}
