//! Output by stream and offset. A slow reader costs disk where the spool is, never memory here.

use serde::{Deserialize, Serialize};

use super::{BoxFuture, CallId, Code, Receipt, SessionId, Slot, ToolFailure};

/// Which pipe a byte went through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Stream {
    /// Standard output; in merged mode standard error too.
    Stdout,
    /// Standard error, in separate mode only.
    Stderr,
    /// Everything a terminal printed.
    Terminal,
    /// The encoded result of a file tool.
    Result,
}

impl Stream {
    /// Every stream.
    pub const ALL: [Self; 4] = [Self::Stdout, Self::Stderr, Self::Terminal, Self::Result];

    /// Position in arrays with one item per stream.
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Self::Stdout => 0,
            Self::Stderr => 1,
            Self::Terminal => 2,
            Self::Result => 3,
        }
    }
}

/// Present length of each stream; lengths only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamLengths([u64; 4]);

impl StreamLengths {
    /// Bytes seen of `stream`.
    #[must_use]
    pub fn get(&self, stream: Stream) -> u64 {
        self.0[stream.index()]
    }

    /// Notes that `stream` has at least `total` bytes. A smaller number is ignored: reports may arrive late.
    pub fn advance(&mut self, stream: Stream, total: u64) {
        let slot = &mut self.0[stream.index()];
        *slot = (*slot).max(total);
    }

    /// Takes the larger of both, stream by stream.
    pub fn merge(&mut self, other: &Self) {
        for stream in Stream::ALL {
            self.advance(stream, other.get(stream));
        }
    }
}

/// A piece of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputChunk {
    /// Which stream.
    pub stream: Stream,
    /// Offset of the first byte in the original stream; larger than asked for when bytes were dropped.
    pub offset: u64,
    /// The bytes; empty at the present end.
    pub bytes: Vec<u8>,
    /// The stream has ended and this piece reaches its end.
    pub end: bool,
}

/// One stream of a finished call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamSummary {
    /// Which stream.
    pub stream: Stream,
    /// Bytes the workload wrote.
    pub total_bytes: u64,
    /// Bytes kept from the beginning.
    pub head_bytes: u64,
    /// Bytes kept from the end, not counting the head.
    pub tail_bytes: u64,
    /// SHA-256 of the whole original stream.
    #[serde(with = "serde_bytes")]
    pub sha256: [u8; 32],
    /// The whole stream, when it was short enough to travel with the end of the call.
    #[serde(with = "serde_bytes")]
    pub inline: Option<Vec<u8>>,
    /// Path inside the sandbox of the file that keeps the stream; empty when it was never spooled.
    pub spool_path: String,
}

impl StreamSummary {
    /// Bytes that are kept nowhere, because there were more than may be kept or room for.
    #[must_use]
    pub fn dropped_bytes(&self) -> u64 {
        match &self.inline {
            Some(_) => 0,
            None => self.total_bytes.saturating_sub(self.head_bytes).saturating_sub(self.tail_bytes),
        }
    }
}

/// Retained output of calls, by offset, and what else sandboxes are asked for.
pub trait OutputSource: Send + Sync {
    /// Reads at most `max_bytes` (and at most 64 KiB) of `stream` from `offset`.
    ///
    /// Works while the call runs and until it is acknowledged.
    ///
    /// # Errors
    /// `CALL_UNKNOWN`, `OUTPUT_GONE` or `SANDBOX_LOST`.
    fn read_output(
        &self,
        call_id: &CallId,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<OutputChunk, ToolFailure>>;

    /// What protects a session.
    ///
    /// # Errors
    /// `SESSION_UNKNOWN` when it has no sandbox here.
    fn receipt_of(&self, session_id: &SessionId) -> Result<Receipt, ToolFailure> {
        Err(no_sandbox(session_id))
    }

    /// Processes that calls of a session have left behind, by call.
    ///
    /// # Errors
    /// `SESSION_UNKNOWN` when it has no sandbox here, `SANDBOX_LOST`.
    fn slots(&self, session_id: &SessionId) -> BoxFuture<'static, Result<Vec<Slot>, ToolFailure>> {
        Box::pin(std::future::ready(Err(no_sandbox(session_id))))
    }
}

/// That nothing can be asked about a session here.
#[must_use]
pub fn no_sandbox(session_id: &SessionId) -> ToolFailure {
    let what = format!("session {session_id} has no sandbox here");
    ToolFailure::new(Code::SessionUnknown, what, "ask about a session that is open")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_never_shrink() {
        let mut lengths = StreamLengths::default();
        lengths.advance(Stream::Stdout, 10);
        lengths.advance(Stream::Stdout, 4);
        let mut other = StreamLengths::default();
        other.advance(Stream::Stderr, 3);
        lengths.merge(&other);
        assert_eq!((lengths.get(Stream::Stdout), lengths.get(Stream::Stderr)), (10, 3));
    }
}
