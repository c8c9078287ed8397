//! How a call ended: exactly one outcome with a named cause, and notes beside it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{CancelMode, StreamSummary, ToolFailure};

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Outcome {
    /// Ended by itself.
    Exited {
        /// Exit status, 0 to 255.
        code: i32,
    },
    /// Ended by a signal that nobody here sent.
    Signaled {
        /// Signal number.
        signal: i32,
        /// Whether the kernel says a core was dumped.
        core_dumped: bool,
    },
    /// Ended because its time was over.
    TimedOut {
        /// The limit that was reached.
        after: Duration,
        /// SIGKILL was needed, so the shell is a new one.
        killed: bool,
        /// Status of the shell for the interrupted command.
        code: i32,
    },
    /// Ended because somebody cancelled it.
    Cancelled {
        /// The hardest mode used.
        mode: CancelMode,
        /// It never ran.
        before_start: bool,
        /// SIGKILL was needed.
        killed: bool,
        /// Status of the shell for the interrupted command.
        code: i32,
    },
    /// A process of it was killed by the kernel for memory.
    OutOfMemory {
        /// The limit of the sandbox that was reached; 0 when unknown or when the memory was short outside.
        limit_bytes: u64,
        /// Name of the process, when it could be seen.
        process: String,
        /// Bytes of memory that were the process's own; 0 when unknown.
        #[serde(default, skip_serializing_if = "is_zero")]
        used_bytes: u64,
        /// Kills counted during the call.
        kills: u64,
        /// Status reported afterwards; -1 when the reporter was the victim.
        code: i32,
    },
    /// A process of it made a forbidden system call and was killed.
    ForbiddenSystemCall {
        /// Status as the shell saw it.
        code: i32,
    },
    /// It provably never ran.
    NeverStarted {
        /// Why; its code tells a refusal of ours from a program that cannot be executed.
        failure: ToolFailure,
        /// 126 not executable, 127 not found, 125 anything else.
        code: i32,
    },
    /// It may have run; how it ended cannot be known. Never re-run silently.
    Indeterminate {
        /// Why.
        failure: ToolFailure,
    },
}

/// What was not written down by earlier versions is left out where it says nothing.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Kinds of note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum NoteKind {
    /// The disk limit was reached.
    DiskLimit,
    /// The process limit was reached.
    PidsLimit,
    /// Background processes of this call still run.
    ProcessesLeft,
    /// A destination was refused.
    EgressDenied,
    /// The command ended its shell; variables and functions are gone.
    ShellRestarted,
    /// The command ignored an interrupt and was killed; the text says whether anything that followed it in its list had begun.
    RestKilled,
    /// Processes were killed for memory although the command went on.
    MemoryKills,
    /// A tool that replaces a file was killed, and the file has the new content.
    FileReplaced,
    /// A tool that replaces a file was killed, and the file is what it was before.
    FileUnchanged,
    /// A tool that replaces a file was killed, and the file is neither.
    FileUncertain,
    /// Every process of the sandbox was ended before this call, because there was none for long.
    ProcessesEnded,
    /// The shell had ended before this command began, and another one ran it; variables and functions are gone.
    ShellRenewed,
}

/// Something the caller should know beside the outcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    /// Its kind.
    pub kind: NoteKind,
    /// For the model.
    pub text: String,
}

/// One piece of a tool result.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Content {
    /// Text for the model.
    Text(String),
    /// A picture.
    Image {
        /// IANA media type.
        media_type: String,
        /// The file as it is.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// A document.
    Document {
        /// IANA media type.
        media_type: String,
        /// The file as it is.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
}

impl Content {
    /// Bytes it takes, roughly, in a frame.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Image { media_type, data } | Self::Document { media_type, data } => media_type.len() + data.len(),
        }
    }
}

/// File contents and command output never reach a log.
impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self {
            Self::Text(_) => "Text",
            Self::Image { .. } => "Image",
            Self::Document { .. } => "Document",
        };
        write!(f, "{kind}({} bytes)", self.size())
    }
}

/// What a tool answers the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolResult {
    /// Whether the tool reports an error.
    pub is_error: bool,
    /// In order.
    pub content: Vec<Content>,
}

impl ToolResult {
    /// A single text.
    #[must_use]
    pub fn text(is_error: bool, text: impl Into<String>) -> Self {
        Self { is_error, content: vec![Content::Text(text.into())] }
    }

    /// Bytes it takes, roughly, in a frame.
    #[must_use]
    pub fn size(&self) -> usize {
        self.content.iter().map(Content::size).sum()
    }
}

/// What a call used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Processor time.
    pub cpu: Duration,
    /// Highest memory use; 0 when not measured.
    pub peak_memory_bytes: u64,
    /// The numbers include other slots that were alive.
    pub shared: bool,
}

/// The end of a call as the sandbox reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallEnd {
    /// How it ended.
    pub outcome: Outcome,
    /// What it printed; one summary per stream that exists.
    pub streams: Vec<StreamSummary>,
    /// Decoded result of a file tool. `None` for bash and exec, and for a result above 256 KiB, which stays in
    /// `Stream::Result` in the encoding of `sandbox_runner.runner.v1.ToolResult`.
    pub result: Option<ToolResult>,
    /// Wall time between start and end.
    pub duration: Duration,
    /// Processes still alive in the slot of this call.
    pub processes_left: u32,
    /// What it used, if it was measured.
    pub usage: Option<Usage>,
    /// In the order they came up.
    pub notes: Vec<Note>,
    /// Working directory of the shell afterwards; empty for anything but bash.
    pub working_directory: String,
    /// Counts shells started in this sandbox.
    pub shell_generation: u64,
}

impl CallEnd {
    /// The end of a call that left no trace in a sandbox.
    #[must_use]
    pub fn without_output(outcome: Outcome) -> Self {
        Self {
            outcome,
            streams: Vec::new(),
            result: None,
            duration: Duration::ZERO,
            processes_left: 0,
            usage: None,
            notes: Vec::new(),
            working_directory: String::new(),
            shell_generation: 0,
        }
    }
}

/// The end of a call with the text a model reads; what is journalled, sent and sent again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallResult {
    /// How it ended and what it printed.
    pub end: CallEnd,
    /// What the model reads. Empty only when the content stays in `Stream::Result`.
    pub presented: ToolResult,
    /// The end was found by a later process than the one that started the call.
    pub recovered: bool,
}
