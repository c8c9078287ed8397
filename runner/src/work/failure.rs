//! The one shape in which every failure reaches a caller.
//!
//! A failure without a remediation cannot be built by accident: the constructor demands one.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Who can do something about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Blame {
    /// The request was wrong.
    Caller,
    /// The sandbox or what ran in it.
    Sandbox,
    /// This machine or this runner.
    Host,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)?) => {
        /// What failed: a closed list, UPPER_SNAKE on the wire.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Code { $($(#[$doc])* #[serde(rename = $text)] $variant),+ }

        impl Code {
            /// Every code, for tests and documentation.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The code as it is written on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

codes! {
    /// A field of the request is missing, malformed or out of range; the message names it.
    InvalidField = "INVALID_FIELD",
    /// The request is larger than allowed.
    TooLarge = "TOO_LARGE",
    /// The call names a session that is not open here.
    SessionUnknown = "SESSION_UNKNOWN",
    /// The session existed, but its sandbox is gone.
    SessionLost = "SESSION_LOST",
    /// The session is closing or closed.
    SessionClosed = "SESSION_CLOSED",
    /// The session is open with another environment or other limits.
    SessionConflict = "SESSION_CONFLICT",
    /// A newer placement of the session is known.
    StaleEpoch = "STALE_EPOCH",
    /// The same call id was used for another request.
    CallIdReused = "CALL_ID_REUSED",
    /// The call is not known.
    CallUnknown = "CALL_UNKNOWN",
    /// The call was run and acknowledged earlier; nothing but its id is kept.
    CallForgotten = "CALL_FORGOTTEN",
    /// The call was cancelled before it started.
    CancelledBeforeStart = "CANCELLED_BEFORE_START",
    /// The call waited longer than its caller allowed.
    StartDeadlinePassed = "START_DEADLINE_PASSED",
    /// A bounded queue is full.
    QueueFull = "QUEUE_FULL",
    /// Admitting this would exceed what was set aside for sandboxes; the message names the limit.
    Capacity = "CAPACITY",
    /// The runner is shutting down.
    Draining = "DRAINING",
    /// The lease of the runner has lapsed.
    LeaseExpired = "LEASE_EXPIRED",
    /// The journal refuses writes.
    JournalReadOnly = "JOURNAL_READ_ONLY",
    /// The environment cannot be built as described.
    EnvironmentInvalid = "ENVIRONMENT_INVALID",
    /// The host offers less isolation than was asked for.
    TierUnavailable = "TIER_UNAVAILABLE",
    /// Known to the schema, not built yet.
    Unimplemented = "UNIMPLEMENTED",
    /// The sandbox could not be created, or not be woken.
    SandboxCreateFailed = "SANDBOX_CREATE_FAILED",
    /// The sandbox ended while it was needed.
    SandboxLost = "SANDBOX_LOST",
    /// Whether and how the call ended cannot be known.
    OutcomeUnknown = "OUTCOME_UNKNOWN",
    /// Bytes that were asked for are no longer kept.
    OutputGone = "OUTPUT_GONE",
    /// A bug of ours.
    Internal = "INTERNAL",
    /// The runner has died again and again when it was about to start the call, so it is not tried any more.
    Poison = "POISON",
    /// The machine was started again while the session was open, and its sandbox is gone.
    HostRebooted = "HOST_REBOOTED",
    /// A disk of the runner is nearly full; the message says how full.
    DiskLow = "DISK_LOW",
    /// Processes of the host wait for memory.
    MemoryPressure = "MEMORY_PRESSURE",
    /// The runner has few descriptors left.
    FdLow = "FD_LOW",
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A failure as a caller sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[error("{message} ({code})")]
pub struct ToolFailure {
    /// What failed.
    pub code: Code,
    /// Who can do something about it.
    pub blame: Blame,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// What happened, for a model or a person; never host paths, errno or secrets.
    pub message: String,
    /// What to do about it.
    pub remediation: String,
    /// When a retry makes sense, if it is known.
    pub retry_after: Option<Duration>,
}

impl ToolFailure {
    /// A failure with a fixed place in the taxonomy: blame and retryability follow from the code.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>, remediation: impl Into<String>) -> Self {
        let (blame, retryable) = classify(code);
        Self {
            code,
            blame,
            retryable,
            message: message.into(),
            remediation: remediation.into(),
            retry_after: retryable.then(|| Duration::from_secs(1)),
        }
    }

    /// `field` of the request is wrong.
    #[must_use]
    pub fn invalid(field: &str, problem: impl fmt::Display, remediation: impl Into<String>) -> Self {
        Self::new(Code::InvalidField, format!("{field}: {problem}"), remediation)
    }

    /// Something of the schema that is not built yet.
    #[must_use]
    pub fn unimplemented(what: &str) -> Self {
        Self::new(
            Code::Unimplemented,
            format!("{what} is not implemented by this runner"),
            "leave it out; the features of Hello list what this runner can do",
        )
    }
}

impl From<super::IdError> for ToolFailure {
    fn from(error: super::IdError) -> Self {
        Self::new(Code::InvalidField, error.to_string(), "send a valid identifier")
    }
}

fn classify(code: Code) -> (Blame, bool) {
    match code {
        Code::InvalidField
        | Code::TooLarge
        | Code::SessionUnknown
        | Code::SessionClosed
        | Code::SessionConflict
        | Code::StaleEpoch
        | Code::CallIdReused
        | Code::CallUnknown
        | Code::CallForgotten
        | Code::CancelledBeforeStart
        | Code::StartDeadlinePassed
        | Code::EnvironmentInvalid
        | Code::Unimplemented => (Blame::Caller, false),
        Code::SessionLost | Code::SandboxLost | Code::OutcomeUnknown | Code::OutputGone => (Blame::Sandbox, false),
        Code::QueueFull
        | Code::Capacity
        | Code::Draining
        | Code::LeaseExpired
        | Code::JournalReadOnly
        | Code::DiskLow
        | Code::MemoryPressure
        | Code::FdLow
        | Code::SandboxCreateFailed => (Blame::Host, true),
        Code::TierUnavailable | Code::Internal | Code::Poison | Code::HostRebooted => (Blame::Host, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_upper_snake_and_unique() {
        let mut seen = std::collections::HashSet::new();
        for code in Code::ALL {
            let text = code.as_str();
            assert!(text.chars().all(|c| c.is_ascii_uppercase() || c == '_'), "{text}");
            assert!(seen.insert(text), "{text} twice");
        }
    }

    #[test]
    fn only_retryable_failures_carry_a_retry_hint() {
        for code in Code::ALL {
            let failure = ToolFailure::new(*code, "m", "r");
            assert_eq!(failure.retry_after.is_some(), failure.retryable, "{code}");
        }
    }

    #[test]
    fn text_names_the_field_and_the_code() {
        let failure = ToolFailure::invalid("bash.timeout_ms", "must not be negative", "send 0 or more");
        assert_eq!(failure.to_string(), "bash.timeout_ms: must not be negative (INVALID_FIELD)");
    }
}
