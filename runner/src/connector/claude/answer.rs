//! An answer as the content blocks that are posted. What was too large to travel with the end of its call is read from its sandbox.

use prost::Message;
use proto::runner::v1 as pb;
use tracing::error;

use super::content::{self, Blocks};
use super::machine::Answer;
use crate::work::{CallId, CallResult, Content, OutputSource, Stream, ToolResult};

/// Largest result that is read back from a sandbox.
const MOST_RESULT_BYTES: usize = 64 * 1024 * 1024;

pub(super) async fn blocks(answer: Answer, outputs: &dyn OutputSource) -> Blocks {
    match answer {
        Answer::Text(text) => content::text(true, &text),
        Answer::Result { call_id, result, interrupted, is_new } => {
            let told = content::Told { interrupted, is_new };
            if !result.presented.content.is_empty() {
                return content::blocks(&result.end, &result.presented, told);
            }
            match read_result(&call_id, &result, outputs).await {
                Some(presented) => content::blocks(&result.end, &presented, told),
                None => {
                    error!(tool_call_id = %call_id, "a result that was kept in its sandbox cannot be read");
                    content::text(true, "the call has ended, and its result is not kept any more; ask for less at once")
                }
            }
        }
    }
}

/// A result that was too large to travel with the end of its call.
async fn read_result(call_id: &CallId, result: &CallResult, outputs: &dyn OutputSource) -> Option<ToolResult> {
    let summary = result.end.streams.iter().find(|stream| stream.stream == Stream::Result)?;
    let total = usize::try_from(summary.total_bytes).ok().filter(|total| *total <= MOST_RESULT_BYTES)?;
    let mut bytes = summary.inline.clone().unwrap_or_default();
    while bytes.len() < total {
        let offset = bytes.len() as u64;
        let chunk =
            outputs.read_output(call_id, Stream::Result, offset, crate::work::limits::CHUNK_BYTES).await.ok()?;
        if chunk.offset != offset || chunk.bytes.is_empty() {
            return None;
        }
        bytes.extend(chunk.bytes);
    }
    let decoded = pb::ToolResult::decode(bytes.as_slice()).ok()?;
    let content = decoded.content.into_iter().map(|block| match block.kind? {
        pb::content_block::Kind::Text(text) => Some(Content::Text(text)),
        pb::content_block::Kind::Image(media) => {
            Some(Content::Image { media_type: media.media_type, data: media.data })
        }
        pb::content_block::Kind::Document(media) => {
            Some(Content::Document { media_type: media.media_type, data: media.data })
        }
    });
    Some(ToolResult { is_error: decoded.is_error, content: content.collect::<Option<_>>()? })
}
