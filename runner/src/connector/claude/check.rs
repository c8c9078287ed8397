//! Looks at a queue without serving it: whether it is reached, whether it takes the key, what it says of itself, and whether
//! the clocks agree.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::api::{Api, Presented};
use super::http::{Base, Client, Failure};
use super::remedy;
use super::secret::Secret;
use super::wire::is_id;

/// What is to be looked at.
#[derive(Debug)]
pub struct Question {
    /// Where the server is.
    pub base: Base,
    /// The environment.
    pub environment_id: String,
    /// Value of the header `anthropic-version`.
    pub api_version: String,
    /// Value of the header `anthropic-workspace-id`; `None`: not sent.
    pub workspace_id: Option<String>,
    /// Its key.
    key: Secret,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Checked {
    /// Something has answered; then this is how long the answer took.
    pub answered: Option<Duration>,
    /// Why the queue cannot be served with this key, with what to do; empty when it can.
    pub problem: String,
    /// How far the clock of this machine is before that of the server, in seconds; `None` where it does not say.
    pub ahead_seconds: Option<i64>,
    /// Work items that wait.
    pub depth: Option<u64>,
    /// Work items that were delivered and not acknowledged.
    pub pending: Option<u64>,
    /// Since when the oldest of both waits.
    pub oldest_queued_at: Option<String>,
    /// Workers that have polled of late.
    pub workers_polling: Option<u64>,
}

impl Question {
    /// Reads the key from its file, which is the only thing that needs rights.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub fn with_key_file(
        base: Base,
        environment_id: String,
        api_version: String,
        key_file: &Path,
    ) -> Result<Self, super::SecretError> {
        Ok(Self { base, environment_id, api_version, workspace_id: None, key: Secret::read(key_file)? })
    }

    /// With a key that was given in another way; `None` when that is none, or the environment has no id.
    #[must_use]
    pub fn with_key(base: Base, environment_id: String, api_version: String, key: &str) -> Option<Self> {
        let key = Secret::new(key).filter(|_| is_id(&environment_id))?;
        Some(Self { base, environment_id, api_version, workspace_id: None, key })
    }

    /// The same for one workspace of several.
    #[must_use]
    pub fn in_workspace(self, workspace_id: Option<String>) -> Self {
        Self { workspace_id, ..self }
    }
}

/// Asks for the figures of the queue. Nothing is claimed and nothing changes.
pub async fn check(question: Question) -> Checked {
    let Question { base, environment_id, api_version, workspace_id, key } = question;
    let client = Client::new(base);
    // It asks for no work, so its name is sent to nobody.
    let presented = Presented {
        version: &api_version,
        workspace_id: workspace_id.as_deref(),
        worker_id_header: "worker-id",
        worker_id: "doctor",
    };
    let Some(api) = Api::new(client, environment_id, key, presented) else {
        let problem = "claude.api_version or claude.workspace_id cannot stand in a header".to_owned();
        return Checked { problem, ..Checked::default() };
    };
    let began = Instant::now();
    let (date, result) = api.stats().await;
    let answered = (date.is_some()
        || !matches!(&result, Err(Failure::Dial(_) | Failure::Transport(_) | Failure::Timeout(_))))
    .then(|| began.elapsed());
    let ahead_seconds = date.as_deref().and_then(seconds_of).map(|theirs| now().saturating_sub(theirs));
    let mut checked = Checked { answered, ahead_seconds, ..Checked::default() };
    match result.and_then(|body| serde_json::from_slice::<Value>(&body).map_err(|_| Failure::Malformed)) {
        Ok(stats) if stats.is_object() => {
            let number = |name: &str| stats[name].as_u64();
            (checked.depth, checked.pending) = (number("depth"), number("pending"));
            checked.workers_polling = number("workers_polling");
            checked.oldest_queued_at = stats["oldest_queued_at"].as_str().map(time);
        }
        Ok(_) => checked.problem = told(&Failure::Malformed),
        Err(failure) => checked.problem = told(&failure),
    }
    checked
}

fn told(failure: &Failure) -> String {
    format!("{failure}; {}", remedy::of_queue(failure))
}

/// A time of the server's that may stand in a terminal.
fn time(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || "-:.+".contains(*c)).take(40).collect()
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX))
}

/// Seconds since 1970 of `Date: Fri, 27 Nov 2026 06:19:51 GMT` (RFC 9110, the only form that is sent).
fn seconds_of(date: &str) -> Option<i64> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let mut parts = date.split_once(", ")?.1.split(' ');
    let (day, month, year) = (parts.next()?, parts.next()?, parts.next()?);
    let (clock, zone) = (parts.next()?, parts.next()?);
    let month = MONTHS.find(month).filter(|at| month.len() == 3 && at % 3 == 0)? / 3 + 1;
    if zone != "GMT" || year.len() != 4 || day.len() != 2 || clock.len() != 8 {
        return None;
    }
    // The same moment as the types of protobuf write and read it.
    let text = format!("{year}-{month:02}-{day}T{clock}Z");
    text.parse::<prost_types::Timestamp>().ok().map(|stamp| stamp.seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_http_are_read_and_anything_else_is_no_date() {
        assert_eq!(seconds_of("Thu, 01 Jan 1970 00:00:07 GMT"), Some(7));
        assert_eq!(seconds_of("Fri, 27 Nov 2026 06:19:51 GMT"), Some(1_795_760_391));
        for no_date in [
            "",
            "Fri",
            "Fri, 27 Foo 2026 06:19:51 GMT",
            "Fri, 27 Nov 2026 06:19:51 CET",
            "Fri, 27 anF 2026 06:19:51 GMT",
        ] {
            assert_eq!(seconds_of(no_date), None, "{no_date}");
        }
    }
}
