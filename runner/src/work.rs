//! The vocabulary that connectors, sessions and sandboxes share: ids, calls, output, outcomes, failures, and the two
//! seams (`Sandboxes` and `OutputSource`) at which the parts are joined.
//!
//! Plain values and traits over `std` only. Nothing here performs I/O, reads a clock or knows a wire format, so every
//! rule about these types can be tested without a runtime. What the journal keeps can be serialized: names of fields and
//! variants are part of its format.

mod bytes;
mod call;
mod failure;
mod flow;
mod id;
mod outcome;
mod output;
mod pressure;
mod progress;
mod sandbox;

pub use call::{
    BashInput, CallLimits, CancelMode, EditInput, ExecInput, GlobInput, GrepInput, OutputMode, ReadInput,
    RequestDigest, Terminal, ToolCall, ToolInput, WriteInput,
};
pub use failure::{Blame, Code, ToolFailure};
pub use flow::{
    CallPhase, DrainMode, DrainedBy, Memory, Replay, RequestKind, SessionClose, SessionEnd, SessionOpen, Trouble,
    Update, WorkItem,
};
pub use id::{CallId, IdError, RESERVED_PREFIX, RunnerId, SandboxId, SessionId};
pub use outcome::{CallEnd, CallResult, Content, Note, NoteKind, Outcome, ToolResult, Usage};
pub use output::{OutputChunk, OutputSource, Stream, StreamLengths, StreamSummary, no_sandbox};
pub use pressure::{Closed, Gauge, Pressure, Resource, Shortage};
pub use progress::Progress;
pub use sandbox::{
    Attached, CallEvent, CallObserver, EnvironmentRef, ExpectedCall, FoundCall, Gate, Layer, Network, PreparedCall,
    Processes, Receipt, ResourceLimits, RootfsChoice, Sandbox, SandboxRequest, Sandboxes, Slot,
};

/// A future that can be stored behind a trait object.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn std::future::Future<Output = T> + Send + 'a>>;

/// Bounds that more than one part must agree on. Each has an owner and an overflow action in ARCHITECTURE.md.
pub mod limits {
    use std::time::Duration;

    /// Largest gRPC frame in either direction.
    pub const FRAME_BYTES: usize = 1024 * 1024;
    /// Largest input of one tool call inside a frame.
    pub const INLINE_INPUT_BYTES: usize = 256 * 1024;
    /// Largest content of one tool result inside a frame; a larger one travels as the result stream.
    pub const INLINE_RESULT_BYTES: usize = 256 * 1024;
    /// Output per stream that travels with the end of a call.
    pub const INLINE_OUTPUT_BYTES: usize = 64 * 1024;
    /// Largest piece of output that is read or sent at once.
    pub const CHUNK_BYTES: usize = 64 * 1024;
    /// Kept from the beginning of a stream that exceeds head and tail.
    pub const SPOOL_HEAD_BYTES: u64 = 8 * 1024 * 1024;
    /// Kept from the end of a stream that exceeds head and tail.
    pub const SPOOL_TAIL_BYTES: u64 = 8 * 1024 * 1024;
    /// Calls waiting in one session.
    pub const QUEUED_PER_SESSION: usize = 32;
    /// Calls waiting in all sessions.
    pub const QUEUED_PER_RUNNER: usize = 512;
    /// Default wall time of a bash call.
    pub const BASH_TIMEOUT: Duration = Duration::from_secs(120);
    /// Wall time of a file tool.
    pub const FILE_TOOL_TIMEOUT: Duration = Duration::from_secs(120);
    /// Default time between SIGTERM and SIGKILL.
    pub const KILL_GRACE: Duration = Duration::from_secs(10);
}
