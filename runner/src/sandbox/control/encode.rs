//! Our own types to requests of init/v1. Pure.

use std::time::Duration;

use proto::init::v1 as wire;
use serde_json::json;

use crate::work::{CancelMode, ExecInput, Gate, OutputMode, PreparedCall, Stream, ToolInput, limits};

/// Input above this travels in pieces before the call.
pub(super) const LARGEST_INLINE_INPUT: usize = 64 * 1024;
/// Largest piece.
pub(super) const LARGEST_INPUT_CHUNK: usize = 96 * 1024;

/// What is sent for one call: the pieces of a large input, then the call.
#[derive(Debug)]
pub(super) struct EncodedCall {
    /// Input that does not fit; empty when it does.
    pub(super) input: Vec<u8>,
    /// The call itself.
    pub(super) start: wire::StartCall,
}

/// Encodes `call`.
pub(super) fn call(call: &PreparedCall) -> EncodedCall {
    let mut input = Vec::new();
    let work = match &call.input {
        ToolInput::Bash(bash) => {
            let command = in_pieces(bash.command.clone().unwrap_or_default().into_bytes(), &mut input);
            // It was a string before, and is either whole or empty now.
            let command = String::from_utf8(command).unwrap_or_default();
            wire::start_call::Work::Bash(wire::Bash { command, restart: bash.restart })
        }
        ToolInput::Exec(exec) => wire::start_call::Work::Exec(exec_to_wire(exec)),
        tool => {
            let input_json = in_pieces(tool_json(tool).to_string().into_bytes(), &mut input);
            wire::start_call::Work::Tool(wire::Tool { name: tool.name().to_owned(), input_json })
        }
    };
    let output_mode = match call.output_mode {
        OutputMode::Merged => wire::OutputMode::Merged,
        OutputMode::Separate => wire::OutputMode::Separate,
    };
    let start = wire::StartCall {
        call_id: call.call_id.to_string(),
        start_immediately: call.gate == Gate::Open,
        timeout_ms: call.limits.timeout.map_or(0, |time| milliseconds(time).max(1)),
        grace_ms: milliseconds(call.limits.grace),
        output_mode: output_mode.into(),
        inline_limit_bytes: u32::try_from(limits::INLINE_OUTPUT_BYTES).unwrap_or(u32::MAX),
        spool_head_bytes: call.limits.spool_head_bytes,
        spool_tail_bytes: call.limits.spool_tail_bytes,
        staged_input_bytes: input.len() as u64,
        work: Some(work),
    };
    EncodedCall { input, start }
}

/// Number of a stream.
pub(super) fn stream(stream: Stream) -> i32 {
    match stream {
        Stream::Stdout => wire::Stream::Stdout,
        Stream::Stderr => wire::Stream::Stderr,
        Stream::Terminal => wire::Stream::Pty,
        Stream::Result => wire::Stream::Result,
    }
    .into()
}

/// Number of a mode.
pub(super) fn cancel_mode(mode: CancelMode) -> i32 {
    match mode {
        CancelMode::Interrupt => wire::CancelMode::Interrupt,
        CancelMode::Terminate => wire::CancelMode::Terminate,
        CancelMode::Kill => wire::CancelMode::Kill,
    }
    .into()
}

/// Whole milliseconds, saturating.
pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Returns what stays in the call; moves a large input to `pieces`.
fn in_pieces(bytes: Vec<u8>, pieces: &mut Vec<u8>) -> Vec<u8> {
    if bytes.len() <= LARGEST_INLINE_INPUT {
        return bytes;
    }
    *pieces = bytes;
    Vec::new()
}

fn exec_to_wire(exec: &ExecInput) -> wire::Exec {
    wire::Exec {
        argv: exec.argv.clone(),
        env: exec.env.clone(),
        cwd: exec.cwd.clone().unwrap_or_default(),
        stdin: exec.stdin,
        terminal: exec
            .terminal
            .map(|size| wire::Terminal { columns: u32::from(size.columns), rows: u32::from(size.rows) }),
    }
}

/// Field names are those of the toolset, so that one tool serves every connector.
fn tool_json(input: &ToolInput) -> serde_json::Value {
    let mut value = match input {
        ToolInput::Read(read) => json!({ "file_path": read.file_path, "view_range": read.view_range }),
        ToolInput::Write(write) => json!({ "file_path": write.file_path, "content": write.content }),
        ToolInput::Edit(edit) => json!({
            "file_path": edit.file_path,
            "old_string": edit.old_string,
            "new_string": edit.new_string,
            "replace_all": edit.replace_all,
        }),
        ToolInput::Glob(glob) => json!({ "pattern": glob.pattern, "path": glob.path }),
        ToolInput::Grep(grep) => json!({ "pattern": grep.pattern, "path": grep.path }),
        ToolInput::Bash(_) | ToolInput::Exec(_) => json!({}),
    };
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, field| !field.is_null());
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{BashInput, CallId, CallLimits, ReadInput};

    fn prepared(input: ToolInput) -> PreparedCall {
        PreparedCall {
            call_id: CallId::new("c1").expect("valid"),
            input,
            limits: CallLimits { timeout: Some(Duration::from_micros(10)), ..CallLimits::default() },
            output_mode: OutputMode::Separate,
            gate: Gate::Held,
        }
    }

    #[test]
    fn large_command_travels_in_pieces_and_leaves_the_call_empty() {
        let command = "x".repeat(LARGEST_INLINE_INPUT + 1);
        let encoded = call(&prepared(ToolInput::Bash(BashInput { command: Some(command.clone()), restart: false })));

        assert_eq!(encoded.input, command.as_bytes());
        assert_eq!(encoded.start.staged_input_bytes, command.len() as u64);
        assert!(matches!(encoded.start.work, Some(wire::start_call::Work::Bash(bash)) if bash.command.is_empty()));
    }

    #[test]
    fn absent_fields_are_left_out_of_tool_input() {
        let read = ToolInput::Read(ReadInput { file_path: "/a".into(), view_range: None });

        let Some(wire::start_call::Work::Tool(tool)) = call(&prepared(read)).start.work else { panic!("not a tool") };

        assert_eq!(tool.name, "read");
        assert_eq!(tool.input_json, br#"{"file_path":"/a"}"#);
    }

    #[test]
    fn shortest_timeout_does_not_become_no_timeout() {
        let encoded = call(&prepared(ToolInput::Exec(ExecInput::default())));

        assert_eq!(encoded.start.timeout_ms, 1);
        assert!(!encoded.start.start_immediately);
    }
}
