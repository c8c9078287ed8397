//! The text that a model reads of a call, with the end of long output read back from the sandbox.

use crate::session::present;
use crate::work::{CallEnd, CallId, Sandbox, Stream, StreamSummary, ToolInput, ToolResult, limits};

/// What a model is told.
pub(super) async fn presented(input: &ToolInput, end: &CallEnd, call_id: &CallId, sandbox: &dyn Sandbox) -> ToolResult {
    if !matches!(input, ToolInput::Bash(_) | ToolInput::Exec(_)) {
        return match &end.result {
            Some(result) if result.size() <= limits::INLINE_RESULT_BYTES => result.clone(),
            None if !end.streams.iter().any(|stream| stream.stream == Stream::Result && stream.total_bytes > 0) => {
                present::tool_text(input, end)
            }
            // Too large for a frame: it is delivered as a stream.
            _ => ToolResult { is_error: false, content: Vec::new() },
        };
    }
    let mut bytes = Vec::new();
    let mut cut = false;
    for stream in end.streams.iter().filter(|stream| stream.stream != Stream::Result) {
        cut |= stream.total_bytes > present::TAIL_BYTES as u64;
        bytes.extend(tail_of(stream, call_id, sandbox).await);
    }
    present::command_text(input, end, present::Tail { bytes: &bytes, cut })
}

/// The last bytes of a stream, as far as they are kept.
async fn tail_of(stream: &StreamSummary, call_id: &CallId, sandbox: &dyn Sandbox) -> Vec<u8> {
    if let Some(inline) = &stream.inline {
        return inline.clone();
    }
    let mut offset = stream.total_bytes.saturating_sub(present::TAIL_BYTES as u64);
    let mut bytes = Vec::new();
    while offset < stream.total_bytes && bytes.len() < present::TAIL_BYTES {
        match sandbox.read_output(call_id, stream.stream, offset, limits::CHUNK_BYTES).await {
            Ok(chunk) if !chunk.bytes.is_empty() => {
                offset = chunk.offset.saturating_add(chunk.bytes.len() as u64);
                bytes.extend(chunk.bytes);
            }
            // What cannot be read any more is not shown; the summary still tells how much there was.
            Ok(_) | Err(_) => break,
        }
    }
    bytes
}
