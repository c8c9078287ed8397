//! What the demo shows: one line at a time, from two sessions at once, in columns.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use super::super::outcome::printable;

/// Longest part of a line of output that is shown.
const WIDTH: usize = 96;

/// One step and whether it did what it should.
#[derive(Debug, Clone, Serialize)]
pub(super) struct StepResult {
    /// `A` or `B`.
    pub(super) session: String,
    /// What was done.
    pub(super) step: String,
    /// It did what it should.
    pub(super) ok: bool,
    /// It was left out, and the proof says why.
    pub(super) skipped: bool,
    /// What this proves, or what went wrong.
    pub(super) proof: String,
    /// From request to result.
    pub(super) milliseconds: f64,
}

/// Where lines go. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Screen {
    begin: Instant,
    to_stderr: bool,
    results: Arc<Mutex<Vec<StepResult>>>,
}

impl Screen {
    /// Standard output, unless that is needed for JSON.
    pub(super) fn new(to_stderr: bool) -> Self {
        Self { begin: Instant::now(), to_stderr, results: Arc::default() }
    }

    /// One line as it is.
    pub(super) fn line(&self, text: &str) {
        // A reader that has gone away has seen enough; the checks go on.
        let _ = if self.to_stderr {
            writeln!(std::io::stderr().lock(), "{text}")
        } else {
            let mut out = std::io::stdout().lock();
            writeln!(out, "{text}").and_then(|()| out.flush())
        };
    }

    /// One line of a session, with the time it happened.
    pub(super) fn event(&self, session: &str, mark: &str, text: &str) {
        let text = printable(text);
        let text =
            if text.chars().count() <= WIDTH { text } else { text.chars().take(WIDTH - 1).chain(['…']).collect() };
        self.line(&format!("{:8.3} s  {session}  {mark:<5} {text}", self.begin.elapsed().as_secs_f64()));
    }

    /// The verdict over a step.
    pub(super) fn result(&self, result: StepResult) {
        let word = match (result.skipped, result.ok) {
            (true, _) => "SKIP",
            (false, true) => "ok",
            (false, false) => "FAIL",
        };
        let time = format!("{:8.3} s", self.begin.elapsed().as_secs_f64());
        self.line(&format!("{time}  {}  {word:<5} {}: {}", result.session, result.step, result.proof));
        self.results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
    }

    /// Every verdict so far.
    pub(super) fn results(&self) -> Vec<StepResult> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
