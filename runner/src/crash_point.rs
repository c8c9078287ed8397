//! Steps at which a test ends, holds up or fails the runner.
//!
//! Only a build with debug assertions has them: a release contains neither the variable nor the code, which `.ci/static` checks.
//! `SANDBOX_RUNNER_CRASH_POINTS` is read once and holds rules, separated by commas:
//!
//! ```text
//! POINT[/ID][@COUNT]=end | panic | delay:MILLISECONDS | error
//! ```
//!
//! A rule acts once, when its point is passed the COUNT-th time (1 without) for the call, session, tool use, work item or nothing named by ID.
//! `end` is SIGKILL to ourselves, so nothing is flushed and no destructor runs; `panic` is a panic; `error` is an input/output error where one is
//! possible. What acted is a line in the log, so that a rule that never did is noticed.

use std::io;

/// Whether this build has them.
pub(crate) const ARE_THERE: bool = cfg!(debug_assertions);

/// A step. In rules it is written in small letters with hyphens: `Synced(Kind::Started)` is `started-synced`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    /// A call has come and nothing of it is written down.
    Arrived,
    /// A record is about to be written.
    Write(Kind),
    /// It is written and not synced.
    Sync(Kind),
    /// It is synced, and nobody has heard so.
    Synced(Kind),
    /// An event is handed to the transport.
    Told(Kind),
    /// Process 1 holds the call at its gate.
    Gated,
    /// The gate is about to be opened.
    Go,
    /// Process 1 has opened the gate.
    Gone,
    /// The end of a call is known, and its record not begun.
    Ended,
    /// The acknowledgement of a result has come, and its record is not begun.
    Acknowledged,
    /// What is live is about to be copied.
    Copy,
    /// A segment is complete and has no name yet.
    Unnamed,
    /// A segment has its name, which is not durable yet.
    Named,
    /// A copy is complete and does not count yet.
    Copied,
    /// The copy counts, and what it replaces is still there.
    Counts,
    /// One of the replaced segments is removed.
    Removed,
    /// What an earlier runner left is read, and nothing is changed.
    Scanned,
    /// The sessions know what was left.
    Restored,
    /// A sandbox of an earlier runner is taken over.
    Attached,
    /// A work queue has delivered an item, which is not acknowledged.
    Delivered,
    /// The item is acknowledged, and no heartbeat is sent.
    Claimed,
    /// A heartbeat of the item was answered.
    Leased,
    /// The answer to a tool use is about to be posted.
    Post,
    /// It is at the server, and nobody here has heard so.
    Posted,
    /// The item is about to be given back.
    GiveBack,
    /// It is given back, and nobody here has heard so.
    GivenBack,
}

/// A step in the life of a call that is written down.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Accepted,
    Started,
    Finished,
    Acknowledged,
}

/// The runner passes `point` with the call or session `id`, or with nothing in particular.
pub(crate) fn pass(point: Point, id: &str) {
    // A rule that asks for an error where none is possible does nothing, and the log does not say that it did.
    let _ = armed::act(point, id, false);
}

/// The same where an error can happen.
///
/// # Errors
/// What a rule asks for.
pub(crate) fn attempt(point: Point, id: &str) -> io::Result<()> {
    armed::act(point, id, true)
}

#[cfg(not(debug_assertions))]
mod armed {
    use super::{Point, io};

    #[inline(always)]
    #[expect(clippy::unnecessary_wraps, reason = "the other build has errors")]
    pub(super) fn act(_: Point, _: &str, _: bool) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::{Kind, Point, io};

    static RULES: LazyLock<Vec<Rule>> =
        LazyLock::new(|| parse(&std::env::var("SANDBOX_RUNNER_CRASH_POINTS").unwrap_or_default()));

    #[derive(Debug)]
    pub(super) struct Rule {
        pub(super) point: String,
        pub(super) id: Option<String>,
        pub(super) count: u64,
        pub(super) action: Action,
        passed: AtomicU64,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) enum Action {
        End,
        Panic,
        Delay(Duration),
        Error,
    }

    pub(super) fn act(point: Point, id: &str, can_fail: bool) -> io::Result<()> {
        if RULES.is_empty() {
            return Ok(());
        }
        let name = name(point);
        for rule in RULES.iter().filter(|rule| rule.point == name && rule.id.as_ref().is_none_or(|wanted| wanted == id))
        {
            let fits = can_fail || rule.action != Action::Error;
            if !fits || rule.passed.fetch_add(1, Ordering::SeqCst) + 1 != rule.count {
                continue;
            }
            tracing::warn!(point = name, id, action = ?rule.action, "crash point reached");
            match rule.action {
                Action::End => {
                    let _ = kill(Pid::this(), Signal::SIGKILL);
                }
                Action::Panic => panic!("a crash point at {name}"),
                Action::Delay(time) => std::thread::sleep(time),
                Action::Error => return Err(rustix::io::Errno::IO.into()),
            }
        }
        Ok(())
    }

    /// A rule that makes no sense is said to do so, and left out.
    pub(super) fn parse(text: &str) -> Vec<Rule> {
        let rules = text.split(',').filter(|text| !text.is_empty());
        rules
            .filter_map(|text| {
                let rule = parse_one(text);
                if rule.is_none() {
                    tracing::error!(rule = text, "a crash point makes no sense");
                }
                rule
            })
            .collect()
    }

    fn parse_one(text: &str) -> Option<Rule> {
        let (place, action) = text.split_once('=')?;
        let (place, count) = match place.split_once('@') {
            Some((place, count)) => (place, count.parse().ok()?),
            None => (place, 1),
        };
        let (point, id) = match place.split_once('/') {
            Some((point, id)) => (point, Some(id.to_owned())),
            None => (place, None),
        };
        let action = match action {
            "end" => Action::End,
            "panic" => Action::Panic,
            "error" => Action::Error,
            other => Action::Delay(Duration::from_millis(other.strip_prefix("delay:")?.parse().ok()?)),
        };
        Some(Rule { point: point.to_owned(), id, count, action, passed: AtomicU64::new(0) })
    }

    pub(super) fn name(point: Point) -> String {
        let of = |kind, stage| {
            let kind = match kind {
                Kind::Accepted => "accepted",
                Kind::Started => "started",
                Kind::Finished => "finished",
                Kind::Acknowledged => "acknowledged",
            };
            format!("{kind}-{stage}")
        };
        match point {
            Point::Write(kind) => of(kind, "write"),
            Point::Sync(kind) => of(kind, "sync"),
            Point::Synced(kind) => of(kind, "synced"),
            Point::Told(kind) => of(kind, "told"),
            Point::Arrived => "arrived".into(),
            Point::Gated => "gated".into(),
            Point::Go => "go".into(),
            Point::Gone => "gone".into(),
            Point::Ended => "ended".into(),
            Point::Acknowledged => "acknowledged".into(),
            Point::Copy => "copy".into(),
            Point::Unnamed => "unnamed".into(),
            Point::Named => "named".into(),
            Point::Copied => "copied".into(),
            Point::Counts => "counts".into(),
            Point::Removed => "removed".into(),
            Point::Scanned => "scanned".into(),
            Point::Restored => "restored".into(),
            Point::Attached => "attached".into(),
            Point::Delivered => "delivered".into(),
            Point::Claimed => "claimed".into(),
            Point::Leased => "leased".into(),
            Point::Post => "post".into(),
            Point::Posted => "posted".into(),
            Point::GiveBack => "give-back".into(),
            Point::GivenBack => "given-back".into(),
        }
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    use super::armed::{Action, name, parse};
    use super::{Kind, Point};

    #[test]
    fn rules_are_read_and_what_makes_no_sense_is_left_out() {
        let rules =
            parse("started-synced/c1@2=end,copy=error,,go=delay:20,gone=panic,go,go=delay:x,go@x=end,go=sometimes");
        let seen: Vec<_> =
            rules.iter().map(|rule| (rule.point.as_str(), rule.id.as_deref(), rule.count, rule.action)).collect();
        let delay = Action::Delay(std::time::Duration::from_millis(20));
        assert_eq!(
            seen,
            [
                ("started-synced", Some("c1"), 2, Action::End),
                ("copy", None, 1, Action::Error),
                ("go", None, 1, delay),
                ("gone", None, 1, Action::Panic)
            ]
        );
        assert_eq!(name(Point::Synced(Kind::Started)), "started-synced");
    }
}
