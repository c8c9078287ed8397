//! A tool call after validation: which tool, with which input, under which limits.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{CallId, SessionId, ToolFailure};

/// SHA-256 over everything that makes two requests the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RequestDigest(#[serde(with = "serde_bytes")] pub [u8; 32]);

impl fmt::Display for RequestDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RequestDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One call, validated and owned by nobody but its current holder.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolCall {
    /// Chosen by the caller; the key of deduplication.
    pub call_id: CallId,
    /// The session it belongs to.
    pub session_id: SessionId,
    /// Placement of the session the caller believes in.
    pub epoch: u64,
    /// Tells a repeat from another request under the same id.
    pub digest: RequestDigest,
    /// What runs.
    pub input: ToolInput,
    /// How long and how much.
    pub limits: CallLimits,
    /// How output is kept.
    pub output_mode: OutputMode,
    /// Output is not sent while the call runs. Not in the records of the first runners, whose calls are sent as they run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quiet: bool,
}

/// Inputs are the customer's data, so they are never part of a rendering.
impl fmt::Debug for ToolCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToolCall")
            .field("call_id", &self.call_id)
            .field("session_id", &self.session_id)
            .field("epoch", &self.epoch)
            .field("tool", &self.input.name())
            .finish_non_exhaustive()
    }
}

/// Limits of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CallLimits {
    /// Longest time in the queue; the call is refused afterwards.
    pub start_within: Option<Duration>,
    /// Wall time from start; `None` means no limit.
    pub timeout: Option<Duration>,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
    /// Kept from the beginning of each stream.
    pub spool_head_bytes: u64,
    /// Kept from the end of each stream.
    pub spool_tail_bytes: u64,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self {
            start_within: None,
            timeout: Some(super::limits::BASH_TIMEOUT),
            grace: super::limits::KILL_GRACE,
            spool_head_bytes: super::limits::SPOOL_HEAD_BYTES,
            spool_tail_bytes: super::limits::SPOOL_TAIL_BYTES,
        }
    }
}

/// How standard output and standard error are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum OutputMode {
    /// One pipe: exact order between both.
    #[default]
    Merged,
    /// Two pipes: exact order within each, approximate across.
    Separate,
}

/// How hard a call is ended; the order is the order of hardness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum CancelMode {
    /// SIGINT; the shell survives.
    Interrupt,
    /// SIGTERM, after the grace SIGKILL.
    Terminate,
    /// SIGKILL at once.
    Kill,
}

/// What runs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum ToolInput {
    /// The persistent shell.
    Bash(BashInput),
    /// Reads a file or lists part of it.
    Read(ReadInput),
    /// Writes a whole file.
    Write(WriteInput),
    /// Replaces text in a file.
    Edit(EditInput),
    /// Finds files by name.
    Glob(GlobInput),
    /// Finds text in files.
    Grep(GrepInput),
    /// A program of its own.
    Exec(ExecInput),
}

/// Input of `bash`.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BashInput {
    /// The text; may be missing only with `restart`.
    pub command: Option<String>,
    /// Start a new shell first.
    pub restart: bool,
}

/// Input of `read`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadInput {
    /// The file.
    pub file_path: String,
    /// First and last line, counted from 1; an end of 0 or less means the end of the file.
    pub view_range: Option<(i64, i64)>,
}

/// Input of `write`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriteInput {
    /// The file.
    pub file_path: String,
    /// Its new content.
    pub content: String,
}

/// Input of `edit`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EditInput {
    /// The file.
    pub file_path: String,
    /// What to replace.
    pub old_string: String,
    /// With what.
    pub new_string: String,
    /// Every occurrence instead of exactly one.
    pub replace_all: bool,
}

/// Input of `glob`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GlobInput {
    /// The pattern.
    pub pattern: String,
    /// Where to start; the working directory when missing.
    pub path: Option<String>,
}

/// Input of `grep`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrepInput {
    /// The regular expression.
    pub pattern: String,
    /// Where to start; the working directory when missing.
    pub path: Option<String>,
}

/// A program of its own.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecInput {
    /// Program and arguments; bytes without NUL.
    #[serde(with = "super::bytes")]
    pub argv: Vec<Vec<u8>>,
    /// NAME=value, replacing the default for the names given.
    #[serde(with = "super::bytes")]
    pub env: Vec<Vec<u8>>,
    /// Working directory; that of the environment when missing.
    #[serde(with = "serde_bytes")]
    pub cwd: Option<Vec<u8>>,
    /// Standard input is a pipe instead of /dev/null. A terminal can always be typed into.
    pub stdin: bool,
    /// Run in a terminal of the sandbox.
    pub terminal: Option<Terminal>,
}

/// Size of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terminal {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

impl ToolInput {
    /// The tool as callers know it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bash(_) => "bash",
            Self::Read(_) => "read",
            Self::Write(_) => "write",
            Self::Edit(_) => "edit",
            Self::Glob(_) => "glob",
            Self::Grep(_) => "grep",
            Self::Exec(_) => "exec",
        }
    }

    /// Whether it may leave something behind. What may not can be done again whatever became of it.
    #[must_use]
    pub fn may_write(&self) -> bool {
        match self {
            Self::Read(_) | Self::Glob(_) | Self::Grep(_) => false,
            Self::Bash(_) | Self::Write(_) | Self::Edit(_) | Self::Exec(_) => true,
        }
    }

    /// Checks what no tool could make sense of.
    ///
    /// What a tool itself reports to the model (a missing command, a missing path) passes: its text is part of the
    /// tool's contract.
    ///
    /// # Errors
    /// `INVALID_FIELD` naming the field, or `TOO_LARGE`.
    pub fn validate(&self) -> Result<(), ToolFailure> {
        for (field, bytes) in self.fields() {
            if bytes.contains(&0) {
                return Err(ToolFailure::invalid(field, "contains a NUL byte", "remove the NUL byte"));
            }
        }
        if let Self::Exec(exec) = self {
            if exec.argv.is_empty() || exec.argv[0].is_empty() {
                return Err(ToolFailure::invalid("exec.argv", "is empty", "name the program to run as the first item"));
            }
            if let Some(bad) = exec.env.iter().position(|e| !e.contains(&b'=') || e.starts_with(b"=")) {
                return Err(ToolFailure::invalid(&format!("exec.env[{bad}]"), "is not NAME=value", "write NAME=value"));
            }
        }
        let total: usize = self.fields().iter().map(|(_, bytes)| bytes.len()).sum();
        if total > super::limits::INLINE_INPUT_BYTES {
            return Err(ToolFailure::new(
                super::Code::TooLarge,
                format!(
                    "{} input has {total} bytes; at most {} are allowed",
                    self.name(),
                    super::limits::INLINE_INPUT_BYTES
                ),
                "split the input into several calls",
            ));
        }
        Ok(())
    }

    /// Every textual part with the name the caller gave it. `write.content` and the two strings of `edit` may contain
    /// NUL in principle, but the tools work on text and the toolset sends JSON strings, so NUL is refused there too.
    fn fields(&self) -> Vec<(&'static str, &[u8])> {
        fn optional<'a>(name: &'static str, value: Option<&'a String>) -> Vec<(&'static str, &'a [u8])> {
            value.map(|text| (name, text.as_bytes())).into_iter().collect()
        }
        match self {
            Self::Bash(input) => optional("bash.command", input.command.as_ref()),
            Self::Read(input) => vec![("read.file_path", input.file_path.as_bytes())],
            Self::Write(input) => {
                vec![("write.file_path", input.file_path.as_bytes()), ("write.content", input.content.as_bytes())]
            }
            Self::Edit(input) => vec![
                ("edit.file_path", input.file_path.as_bytes()),
                ("edit.old_string", input.old_string.as_bytes()),
                ("edit.new_string", input.new_string.as_bytes()),
            ],
            Self::Glob(input) => {
                let mut fields = optional("glob.path", input.path.as_ref());
                fields.push(("glob.pattern", input.pattern.as_bytes()));
                fields
            }
            Self::Grep(input) => {
                let mut fields = optional("grep.path", input.path.as_ref());
                fields.push(("grep.pattern", input.pattern.as_bytes()));
                fields
            }
            Self::Exec(input) => {
                let argv = input.argv.iter().map(|item| ("exec.argv", item.as_slice()));
                let env = input.env.iter().map(|item| ("exec.env", item.as_slice()));
                argv.chain(env).chain(input.cwd.iter().map(|cwd| ("exec.cwd", cwd.as_slice()))).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bash(command: &str) -> ToolInput {
        ToolInput::Bash(BashInput { command: Some(command.to_owned()), restart: false })
    }

    #[test]
    fn nul_in_any_text_is_refused_by_field_name() {
        let glob = ToolInput::Glob(GlobInput { pattern: "*".into(), path: Some("a\0b".into()) });
        assert_eq!(bash("a\0").validate().unwrap_err().message, "bash.command: contains a NUL byte");
        assert_eq!(glob.validate().unwrap_err().message, "glob.path: contains a NUL byte");
    }

    #[test]
    fn oversized_input_is_refused_with_both_numbers() {
        let failure = bash(&"x".repeat(262_145)).validate().unwrap_err();
        assert_eq!(failure.message, "bash input has 262145 bytes; at most 262144 are allowed");
    }

    #[test]
    fn exec_without_program_or_with_malformed_environment_is_refused() {
        let empty = ToolInput::Exec(ExecInput::default());
        assert_eq!(empty.validate().unwrap_err().message, "exec.argv: is empty");
        let input = ExecInput { argv: vec![b"ls".into()], env: vec![b"A=1".into(), b"B".into()], ..Default::default() };
        assert_eq!(ToolInput::Exec(input).validate().unwrap_err().message, "exec.env[1]: is not NAME=value");
    }

    #[test]
    fn rendering_of_a_call_does_not_contain_its_input() {
        let call = ToolCall {
            call_id: CallId::new("c").unwrap(),
            session_id: SessionId::new("s").unwrap(),
            epoch: 1,
            digest: RequestDigest([0; 32]),
            input: bash("echo hunter2"),
            limits: CallLimits::default(),
            output_mode: OutputMode::Merged,
            quiet: false,
        };
        assert!(!format!("{call:?}").contains("hunter2"));
    }
}
