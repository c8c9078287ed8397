//! The result of a call as the content blocks that a session takes. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::work::{CallEnd, Content, Stream, ToolResult};

/// Shown to the model of a command's output; what is longer is in a file, if it was kept.
const SHOWN_BYTES: u64 = 102_400;
/// Largest picture, encoded, and largest document, as it is.
const MOST_IMAGE_BYTES: usize = 5 * 1024 * 1024;
const MOST_DOCUMENT_BYTES: usize = 20 * 1024 * 1024;
const NO_OUTPUT: &str = "(no output)";

/// What is told of a call that was ended because the user said so.
pub(super) const INTERRUPTED: &str = "interrupted by user";

/// What is told with the first result of a sandbox whose session has done something before.
const IS_NEW: &str =
    "[note: this call ran in a new sandbox: files, processes and variables of earlier calls are not here]";

/// What a result is told with, beyond what the call itself says.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Told {
    /// The user has ended it.
    pub(super) interrupted: bool,
    /// Its sandbox has nothing of what the session has done before.
    pub(super) is_new: bool,
}

/// The answer to one tool use.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Blocks {
    pub(super) is_error: bool,
    pub(super) content: Vec<Value>,
}

/// An answer that consists of a text.
pub(super) fn text(is_error: bool, text: &str) -> Blocks {
    Blocks { is_error, content: vec![text_block(text)] }
}

/// `result` of a call that ended as `end` says.
pub(super) fn blocks(end: &CallEnd, result: &ToolResult, told: Told) -> Blocks {
    let mut is_error = result.is_error;
    let mut content: Vec<Value> = Vec::new();
    for block in &result.content {
        match block {
            Content::Text(text) => content.push(text_block(text)),
            Content::Image { media_type, data } => {
                let encoded = STANDARD.encode(data);
                if encoded.len() > MOST_IMAGE_BYTES {
                    (is_error, content) = (true, vec![too_large("image", encoded.len(), MOST_IMAGE_BYTES)]);
                    break;
                }
                content.push(media("image", media_type, &encoded));
            }
            Content::Document { media_type, data } => {
                if data.len() > MOST_DOCUMENT_BYTES {
                    (is_error, content) = (true, vec![too_large("document", data.len(), MOST_DOCUMENT_BYTES)]);
                    break;
                }
                content.push(media("document", media_type, &STANDARD.encode(data)));
            }
        }
    }
    if let Some(line) = kept_elsewhere(end) {
        add_line(&mut content, &line);
    }
    if told.interrupted {
        is_error = true;
        add_line(&mut content, INTERRUPTED);
    }
    if told.is_new {
        add_line(&mut content, IS_NEW);
    }
    if content.is_empty() {
        content.push(text_block(""));
    }
    Blocks { is_error, content }
}

/// Where the whole output of a command is, when the model sees only its end.
fn kept_elsewhere(end: &CallEnd) -> Option<String> {
    let long = |stream: &&crate::work::StreamSummary| {
        stream.stream != Stream::Result && stream.total_bytes > SHOWN_BYTES && !stream.spool_path.is_empty()
    };
    let stream = end.streams.iter().find(long)?;
    let kept = stream.head_bytes.saturating_add(stream.tail_bytes);
    let (path, total) = (&stream.spool_path, stream.total_bytes);
    Some(if kept < total {
        format!(
            "[{total} bytes of output, of which the first {} and the last {} are in {path}]",
            stream.head_bytes, stream.tail_bytes
        )
    } else {
        format!("[all {total} bytes of output are in {path}]")
    })
}

/// Behind the last text, or as a text of its own.
fn add_line(content: &mut Vec<Value>, line: &str) {
    match content.last_mut().and_then(|block| block.get_mut("text")) {
        Some(Value::String(text)) if text != NO_OUTPUT => {
            text.push('\n');
            text.push_str(line);
        }
        Some(text) => *text = Value::String(line.to_owned()),
        None => content.push(text_block(line)),
    }
}

fn text_block(text: &str) -> Value {
    let text = if text.is_empty() { NO_OUTPUT } else { text };
    json!({"type": "text", "text": text})
}

fn media(kind: &str, media_type: &str, encoded: &str) -> Value {
    json!({"type": kind, "source": {"type": "base64", "media_type": media_type, "data": encoded}})
}

fn too_large(kind: &str, size: usize, most: usize) -> Value {
    text_block(&format!("the {kind} has {size} bytes, more than the {most} that can be shown; make it smaller"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{Outcome, StreamSummary};

    fn end(total_bytes: u64, tail_bytes: u64, spool_path: &str) -> CallEnd {
        let mut end = CallEnd::without_output(Outcome::Exited { code: 0 });
        end.streams.push(StreamSummary {
            stream: Stream::Stdout,
            total_bytes,
            head_bytes: 100_000,
            tail_bytes,
            sha256: [0; 32],
            inline: None,
            spool_path: spool_path.to_owned(),
        });
        end
    }

    fn nothing() -> CallEnd {
        CallEnd::without_output(Outcome::Exited { code: 0 })
    }

    fn shown(end: &CallEnd, result: &ToolResult, interrupted: bool) -> (String, bool) {
        let blocks = blocks(end, result, Told { interrupted, is_new: false });
        assert_eq!(blocks.content.len(), 1, "{blocks:?}");
        (blocks.content[0]["text"].as_str().expect("a text").to_owned(), blocks.is_error)
    }

    #[test]
    fn nothing_is_said_as_such() {
        let empty = ToolResult { is_error: false, content: Vec::new() };
        assert_eq!(shown(&nothing(), &empty, false), ("(no output)".to_owned(), false));
        assert_eq!(shown(&nothing(), &ToolResult::text(true, ""), false), ("(no output)".to_owned(), true));
    }

    #[test]
    fn file_with_the_whole_output_is_named_and_so_is_what_it_lacks() {
        let cut = ToolResult::text(false, "[output truncated]\nxx");
        let path = "/run/sandbox-runner/output/1";
        let (text, _) = shown(&end(150_000, 50_000, path), &cut, false);
        assert_eq!(text, "[output truncated]\nxx\n[all 150000 bytes of output are in /run/sandbox-runner/output/1]");
        let (text, _) = shown(&end(900_000, 50_000, path), &cut, false);
        assert!(text.ends_with(
            "[900000 bytes of output, of which the first 100000 and the last 50000 are in /run/sandbox-runner/output/1]"
        ));
        assert_eq!(shown(&end(150_000, 50_000, ""), &cut, false).0, "[output truncated]\nxx");
        assert_eq!(shown(&end(102_400, 0, path), &ToolResult::text(false, "x"), false).0, "x");
    }

    #[test]
    fn interrupted_call_is_an_error_that_shows_what_was_printed() {
        assert_eq!(
            shown(&nothing(), &ToolResult::text(false, "part"), true),
            ("part\ninterrupted by user".to_owned(), true)
        );
        assert_eq!(shown(&nothing(), &ToolResult::text(false, ""), true), ("interrupted by user".to_owned(), true));
    }

    #[test]
    fn pictures_and_documents_are_blocks_and_too_large_ones_are_named() {
        let media = |media_type: &str, size: usize| (media_type.to_owned(), vec![0_u8; size]);
        let image = |size| {
            let (media_type, data) = media("image/png", size);
            ToolResult { is_error: false, content: vec![Content::Image { media_type, data }] }
        };
        let document = |size| {
            let (media_type, data) = media("application/pdf", size);
            ToolResult { is_error: false, content: vec![Content::Document { media_type, data }] }
        };
        let picture = blocks(&nothing(), &image(3), Told::default());
        let expected =
            json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}});
        assert_eq!(picture, Blocks { is_error: false, content: vec![expected] });
        let paper = blocks(&nothing(), &document(3), Told::default());
        assert_eq!(paper.content[0]["type"], "document");
        let (text, is_error) = shown(&nothing(), &image(4 * 1024 * 1024), false);
        assert!(is_error && text.starts_with("the image has 5592408 bytes"), "{text}");
        assert!(shown(&nothing(), &document(21 * 1024 * 1024), false).1);
    }
}
