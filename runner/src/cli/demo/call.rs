//! One call of the demo: sent, watched while it runs, and its end in a form that can be checked.

use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::call::Input;
use proto::runner::v1::outcome::Kind;
use tokio::sync::broadcast;

use super::screen::Screen;
use crate::dev::{DevError, Link, Orchestrator, Session};

/// Output lines of one call that are shown.
const MOST_LINES: usize = 12;

/// A finished call.
#[derive(Debug)]
pub(super) struct Seen {
    /// How it ended.
    pub(super) outcome: Option<Kind>,
    /// What the model would get.
    pub(super) text: String,
    /// The tool reports an error.
    pub(super) is_error: bool,
    /// Everything it printed.
    pub(super) output: String,
    /// Pieces of output that came while it was still running.
    pub(super) pieces_before_end: usize,
    /// From request to result.
    pub(super) took: Duration,
}

impl Seen {
    /// Exit code, if it exited.
    pub(super) fn code(&self) -> Option<i32> {
        match self.outcome {
            Some(Kind::Exited(exited)) => Some(exited.code),
            _ => None,
        }
    }

    /// Output and answer together, for what must not be in either.
    pub(super) fn everything(&self) -> String {
        format!("{}\n{}", self.output, self.text)
    }

    /// The end in words.
    pub(super) fn ending(&self) -> String {
        match &self.outcome {
            Some(Kind::Exited(exited)) => format!("exit code {}", exited.code),
            Some(Kind::Signaled(signaled)) => format!("ended by signal {}", signaled.signal),
            Some(Kind::TimedOut(timed_out)) => format!("timed out after {} ms", timed_out.after_ms),
            Some(Kind::Cancelled(_)) => "cancelled".to_owned(),
            Some(Kind::OutOfMemory(oom)) => format!("out of memory at {} MiB", oom.limit_bytes >> 20),
            Some(Kind::ForbiddenSystemCall(_)) => "forbidden system call".to_owned(),
            Some(Kind::NeverStarted(never)) => {
                format!("not started: {}", never.failure.as_ref().map_or("", |failure| failure.message.as_str()))
            }
            Some(Kind::Indeterminate(_)) => "outcome unknown".to_owned(),
            None => "no outcome".to_owned(),
        }
    }
}

/// One session, and where it is shown.
pub(super) struct Actor<'a> {
    pub(super) name: &'static str,
    pub(super) orchestrator: &'a Orchestrator,
    pub(super) session: &'a Session,
    pub(super) screen: &'a Screen,
}

impl Actor<'_> {
    /// Sends a call and shows its output line by line as it arrives.
    pub(super) async fn call(&self, call_id: &str, input: Input) -> Result<Seen, DevError> {
        let watch = self.orchestrator.watch();
        let begin = Instant::now();
        self.session.send(call_id, input);
        self.follow(call_id, watch, begin).await
    }

    /// Runs a command and shows it.
    pub(super) async fn bash(&self, call_id: &str, command: &str) -> Result<Seen, DevError> {
        self.screen.event(self.name, "$", command);
        self.call(call_id, bash(command)).await
    }

    /// Watches a call that was sent at `begin`, after `watch` was begun.
    pub(super) async fn follow(
        &self,
        call_id: &str,
        mut watch: broadcast::Receiver<Link>,
        begin: Instant,
    ) -> Result<Seen, DevError> {
        let mut lines = Lines::new(self);
        let mut pieces_before_end = 0;
        let outcome = self.session.outcome(call_id);
        tokio::pin!(outcome);
        let finished = loop {
            tokio::select! {
                biased;
                event = watch.recv() => match event {
                    Ok(Link::Output(chunk)) if chunk.call_id == call_id && is_printed(chunk.stream) => {
                        pieces_before_end += usize::from(!chunk.data.is_empty());
                        lines.take(chunk.offset, &chunk.data);
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Err(DevError::Stopped),
                },
                finished = &mut outcome => break finished?,
            }
        };
        let took = begin.elapsed();
        let mut output = Vec::new();
        for (stream, text) in &finished.streams {
            if is_printed(*stream) {
                lines.take(0, &text.bytes);
                output.extend_from_slice(&text.bytes);
            }
        }
        lines.finish();
        let result = finished.message.result.unwrap_or_default();
        Ok(Seen {
            outcome: finished.message.outcome.and_then(|outcome| outcome.kind),
            text: result.content.iter().filter_map(text_of).collect::<Vec<_>>().join("\n"),
            is_error: result.is_error,
            output: String::from_utf8_lossy(&output).into_owned(),
            pieces_before_end,
            took,
        })
    }
}

/// What a shell command is on the wire.
pub(super) fn bash(command: &str) -> Input {
    Input::Bash(pb::BashInput { command: Some(command.to_owned()), ..Default::default() })
}

fn is_printed(stream: i32) -> bool {
    stream == pb::OutputStream::Stdout as i32 || stream == pb::OutputStream::Stderr as i32
}

fn text_of(block: &pb::ContentBlock) -> Option<&str> {
    match &block.kind {
        Some(pb::content_block::Kind::Text(text)) => Some(text),
        _ => None,
    }
}

/// Cuts pieces into lines; a bounded number of them is shown.
struct Lines<'a> {
    actor: &'a Actor<'a>,
    through: u64,
    rest: Vec<u8>,
    shown: usize,
    hidden: usize,
}

impl<'a> Lines<'a> {
    fn new(actor: &'a Actor<'a>) -> Self {
        Self { actor, through: 0, rest: Vec::new(), shown: 0, hidden: 0 }
    }

    /// Takes a piece; what was shown already is not shown again.
    fn take(&mut self, offset: u64, bytes: &[u8]) {
        let known = usize::try_from(self.through.saturating_sub(offset)).unwrap_or(usize::MAX);
        let Some(new) = bytes.get(known..) else { return };
        self.through = offset.max(self.through) + new.len() as u64;
        self.rest.extend_from_slice(new);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.show(&line[..end]);
        }
    }

    fn show(&mut self, line: &[u8]) {
        if self.shown >= MOST_LINES {
            self.hidden += 1;
            return;
        }
        self.shown += 1;
        self.actor.screen.event(self.actor.name, "|", &String::from_utf8_lossy(line));
    }

    fn finish(&mut self) {
        if !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            self.show(&rest);
        }
        if self.hidden > 0 {
            self.actor.screen.event(self.actor.name, "|", &format!("… and {} more lines", self.hidden));
        }
    }
}
