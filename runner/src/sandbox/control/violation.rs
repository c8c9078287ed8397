//! What process 1 of a sandbox must never send. After any of these the sandbox is killed: process 1 is ours, so a frame
//! like that means that somebody else speaks for it.

use std::time::Duration;

/// A frame that process 1 cannot have sent in good faith, or the absence of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Not a message of the protocol.
    #[error("a frame could not be decoded: {0}")]
    Undecodable(String),
    /// Larger than the protocol allows.
    #[error("a frame of more than {0} bytes")]
    Oversize(usize),
    /// Descriptors never travel out of a sandbox.
    #[error("a frame carried descriptors")]
    Descriptors,
    /// A frame without content, or for a later generation than ours.
    #[error("a frame {0}")]
    Malformed(&'static str),
    /// An answer to nothing.
    #[error("an answer to request {0}, which was never made or is already answered")]
    UnknownRequest(u64),
    /// An answer of another kind than the request.
    #[error("an answer to {request} of another kind")]
    WrongAnswer {
        /// The request.
        request: &'static str,
    },
    /// An event about nothing.
    #[error("{event} for a call that is not running")]
    UnknownCall {
        /// The event.
        event: &'static str,
    },
    /// An event that came a second time or too late.
    #[error("{event} for a call in the wrong phase")]
    WrongPhase {
        /// The event.
        event: &'static str,
    },
    /// A call has run, or so it is said, and nobody wrote down that its gate may be opened. Either somebody else speaks for
    /// process 1, or what was written down is lost; whether the call ran cannot be known.
    #[error("{event} for call {call_id}, whose start was never written down")]
    Unrecorded {
        /// The event.
        event: &'static str,
        /// The call, one that was expected.
        call_id: String,
    },
    /// A number or text that cannot be.
    #[error("{field} cannot be {value}")]
    Impossible {
        /// Which field.
        field: &'static str,
        /// The value, shortened.
        value: String,
    },
    /// No answer.
    #[error("no answer to {request} within {} ms", after.as_millis())]
    Silence {
        /// The request.
        request: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// A call outlived its limit by so much that nobody enforces it.
    #[error("a call ran past its time limit without being ended")]
    Overdue,
}

impl Violation {
    /// Its kind, for those who count.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Undecodable(_) => "undecodable",
            Self::Oversize(_) => "oversize",
            Self::Descriptors => "descriptors",
            Self::Malformed(_) => "malformed",
            Self::UnknownRequest(_) => "unknown_request",
            Self::WrongAnswer { .. } => "wrong_answer",
            Self::UnknownCall { .. } => "unknown_call",
            Self::WrongPhase { .. } => "wrong_phase",
            Self::Unrecorded { .. } => "unrecorded",
            Self::Impossible { .. } => "impossible",
            Self::Silence { .. } => "silence",
            Self::Overdue => "overdue",
        }
    }

    /// A value that cannot be; control characters and length are harmless for a log afterwards.
    pub fn impossible(field: &'static str, value: impl std::fmt::Display) -> Self {
        let value: String = value.to_string().chars().take(80).flat_map(char::escape_default).collect();
        Self::Impossible { field, value }
    }
}
