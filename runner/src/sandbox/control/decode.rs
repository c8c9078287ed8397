//! Frames of process 1 to our own types. Every value is checked here against what is possible at all; whether it fits the
//! call it speaks of is checked in `calls`. Pure: bytes in, value or violation out.

use std::time::Duration;

use prost::Message;
use proto::init::v1 as wire;

use super::violation::Violation;
use crate::work::{
    CallEnd, CancelMode, Code, Content, Note, NoteKind, Outcome, OutputChunk, Stream, StreamLengths, StreamSummary,
    ToolFailure, ToolResult, Usage, limits,
};

const LONGEST_TEXT: usize = 4096;
const MOST_NOTES: usize = 32;
/// Where a sandbox with a root filesystem of its own shows the output of its calls.
pub(super) const OUTPUT_ROOT: &str = "/run/sandbox-runner/output";

type Checked<T> = Result<T, Violation>;

/// One of the four streams.
pub(super) fn stream(number: i32) -> Checked<Stream> {
    match wire::Stream::try_from(number) {
        Ok(wire::Stream::Stdout) => Ok(Stream::Stdout),
        Ok(wire::Stream::Stderr) => Ok(Stream::Stderr),
        Ok(wire::Stream::Pty) => Ok(Stream::Terminal),
        Ok(wire::Stream::Result) => Ok(Stream::Result),
        Ok(wire::Stream::Unspecified) | Err(_) => Err(Violation::impossible("stream", number)),
    }
}

/// Lengths of streams, each at most once.
pub(super) fn lengths(streams: &[wire::StreamLength]) -> Checked<StreamLengths> {
    let mut seen = Vec::new();
    let mut lengths = StreamLengths::default();
    for length in streams {
        let stream = stream(length.stream)?;
        if seen.contains(&stream) {
            return Err(Violation::impossible("streams", "the same stream twice"));
        }
        seen.push(stream);
        lengths.advance(stream, length.total_bytes);
    }
    Ok(lengths)
}

/// A piece of output, checked against what was asked.
pub(super) fn output(data: wire::OutputData, asked: Stream, from: u64, at_most: usize) -> Checked<OutputChunk> {
    let stream = stream(data.stream)?;
    if stream != asked {
        return Err(Violation::impossible("output_data.stream", data.stream));
    }
    if data.offset < from || data.offset.checked_add(data.data.len() as u64).is_none() {
        return Err(Violation::impossible("output_data.offset", data.offset));
    }
    if data.data.len() > at_most {
        return Err(Violation::impossible("output_data.data", format!("{} bytes", data.data.len())));
    }
    Ok(OutputChunk { stream, offset: data.offset, bytes: data.data, end: data.end })
}

/// The end of a call of a sandbox that shows its output below `output_root`.
pub(super) fn call_end(finished: wire::CallFinished, output_root: &str) -> Checked<CallEnd> {
    let outcome =
        finished.outcome.and_then(|outcome| outcome.kind).ok_or(Violation::Malformed("without an outcome"))?;
    if finished.notes.len() > MOST_NOTES {
        return Err(Violation::impossible("notes", format!("{} notes", finished.notes.len())));
    }
    let streams = finished.streams.into_iter().map(|one| summary(one, output_root)).collect::<Checked<Vec<_>>>()?;
    if streams.iter().enumerate().any(|(index, one)| streams[..index].iter().any(|other| other.stream == one.stream)) {
        return Err(Violation::impossible("streams", "the same stream twice"));
    }
    Ok(CallEnd {
        outcome: self::outcome(outcome)?,
        streams,
        result: None,
        duration: Duration::from_nanos(finished.duration_ns),
        processes_left: finished.processes_left,
        usage: finished.usage.map(|usage| Usage {
            cpu: Duration::from_micros(usage.cpu_usec),
            peak_memory_bytes: usage.peak_memory_bytes,
            shared: usage.shared,
        }),
        notes: finished.notes.into_iter().map(note).collect::<Checked<Vec<_>>>()?,
        working_directory: text("working_directory", finished.working_directory)?,
        shell_generation: finished.shell_generation,
    })
}

/// The result of a built-in tool. `None` when it is not one: the workload runs the tool, so this is its claim.
pub(super) fn tool_result(bytes: &[u8]) -> Option<ToolResult> {
    // Nothing is a message without fields to the encoding, and no answer to anybody: its tool was killed.
    let decoded =
        Some(bytes).filter(|bytes| !bytes.is_empty()).and_then(|bytes| wire::ToolResult::decode(bytes).ok())?;
    let content = decoded.content.into_iter().map(|block| match block.kind? {
        wire::content_block::Kind::Text(text) => Some(Content::Text(text)),
        wire::content_block::Kind::Image(media) => is_media_type(&media.media_type)
            .then_some(Content::Image { media_type: media.media_type, data: media.data }),
        wire::content_block::Kind::Document(media) => is_media_type(&media.media_type)
            .then_some(Content::Document { media_type: media.media_type, data: media.data }),
    });
    Some(ToolResult { is_error: decoded.is_error, content: content.collect::<Option<Vec<_>>>()? })
}

fn is_media_type(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/+-.".contains(&byte);
    !text.is_empty() && text.len() <= 128 && text.bytes().all(allowed)
}

fn outcome(kind: wire::outcome::Kind) -> Checked<Outcome> {
    use wire::outcome::Kind;
    Ok(match kind {
        Kind::Exited(exited) => Outcome::Exited { code: status("exited.code", exited.code, 0)? },
        Kind::Signaled(signaled) => Outcome::Signaled {
            signal: match signaled.signal {
                1..=64 => signaled.signal,
                other => return Err(Violation::impossible("signaled.signal", other)),
            },
            core_dumped: signaled.core_dumped,
        },
        Kind::TimedOut(timed_out) => Outcome::TimedOut {
            after: Duration::from_millis(timed_out.after_ms),
            killed: timed_out.killed,
            code: status("timed_out.code", timed_out.code, -1)?,
        },
        Kind::Cancelled(cancelled) => Outcome::Cancelled {
            mode: match wire::CancelMode::try_from(cancelled.mode) {
                Ok(wire::CancelMode::Interrupt | wire::CancelMode::Unspecified) => CancelMode::Interrupt,
                Ok(wire::CancelMode::Terminate) => CancelMode::Terminate,
                Ok(wire::CancelMode::Kill) => CancelMode::Kill,
                Err(_) => return Err(Violation::impossible("cancelled.mode", cancelled.mode)),
            },
            before_start: cancelled.before_start,
            killed: cancelled.killed,
            code: status("cancelled.code", cancelled.code, -1)?,
        },
        Kind::OutOfMemory(memory) => Outcome::OutOfMemory {
            limit_bytes: memory.limit_bytes,
            process: text("out_of_memory.process", memory.process)?,
            // The launcher knows, see `sandbox::victim`.
            used_bytes: 0,
            kills: memory.kills,
            code: status("out_of_memory.code", memory.code, -1)?,
        },
        Kind::ForbiddenSystemCall(forbidden) => {
            Outcome::ForbiddenSystemCall { code: status("forbidden_system_call.code", forbidden.code, -1)? }
        }
        Kind::NeverStarted(never) => Outcome::NeverStarted {
            failure: never_started(text("never_started.reason", never.reason)?, never.code),
            code: match never.code {
                125..=127 => never.code,
                other => return Err(Violation::impossible("never_started.code", other)),
            },
        },
        Kind::StatusUnknown(unknown) => Outcome::Indeterminate {
            failure: ToolFailure::new(
                Code::OutcomeUnknown,
                text("status_unknown.reason", unknown.reason)?,
                "look at what the command was to change before running it again",
            ),
        },
        Kind::SandboxLost(lost) => Outcome::Indeterminate {
            failure: ToolFailure::new(
                Code::SandboxLost,
                text("sandbox_lost.reason", lost.reason)?,
                "open a new session; what the command changed in this one is gone",
            ),
        },
    })
}

fn never_started(reason: String, code: i32) -> ToolFailure {
    let remediation = match code {
        126 => "make the file executable, or name its interpreter",
        127 => "check the name, or install the program first",
        _ => "read the reason; the same call may be sent again, because nothing ran",
    };
    ToolFailure::new(Code::InvalidField, reason, remediation)
}

fn status(field: &'static str, code: i32, lowest: i32) -> Checked<i32> {
    if (lowest..=255).contains(&code) { Ok(code) } else { Err(Violation::impossible(field, code)) }
}

fn text(field: &'static str, text: String) -> Checked<String> {
    if text.len() > LONGEST_TEXT {
        Err(Violation::impossible(field, format!("{} bytes", text.len())))
    } else {
        Ok(text)
    }
}

fn note(note: wire::Note) -> Checked<Note> {
    let kind = match wire::NoteKind::try_from(note.kind) {
        Ok(wire::NoteKind::DiskLimit) => NoteKind::DiskLimit,
        Ok(wire::NoteKind::PidsLimit) => NoteKind::PidsLimit,
        Ok(wire::NoteKind::ProcessesLeft) => NoteKind::ProcessesLeft,
        Ok(wire::NoteKind::EgressDenied) => NoteKind::EgressDenied,
        Ok(wire::NoteKind::ShellRestarted) => NoteKind::ShellRestarted,
        Ok(wire::NoteKind::RestKilled) => NoteKind::RestKilled,
        Ok(wire::NoteKind::MemoryKills) => NoteKind::MemoryKills,
        Ok(wire::NoteKind::FileReplaced) => NoteKind::FileReplaced,
        Ok(wire::NoteKind::FileUnchanged) => NoteKind::FileUnchanged,
        Ok(wire::NoteKind::FileUncertain) => NoteKind::FileUncertain,
        Ok(wire::NoteKind::ProcessesEnded) => NoteKind::ProcessesEnded,
        Ok(wire::NoteKind::ShellRenewed) => NoteKind::ShellRenewed,
        Ok(wire::NoteKind::Unspecified) | Err(_) => return Err(Violation::impossible("note.kind", note.kind)),
    };
    Ok(Note { kind, text: text("note.text", note.text)? })
}

fn summary(summary: wire::StreamSummary, output_root: &str) -> Checked<StreamSummary> {
    let stream = stream(summary.stream)?;
    let kept = summary.head_bytes.checked_add(summary.tail_bytes);
    if kept.is_none_or(|kept| kept > summary.total_bytes) {
        return Err(Violation::impossible("head_bytes + tail_bytes", format!("more than {}", summary.total_bytes)));
    }
    let complete = summary.inline_complete;
    if summary.inline.len() > limits::INLINE_OUTPUT_BYTES
        || (complete && summary.inline.len() as u64 != summary.total_bytes)
        || (!complete && !summary.inline.is_empty())
    {
        return Err(Violation::impossible("inline", format!("{} bytes", summary.inline.len())));
    }
    let sha256 = summary
        .sha256
        .as_slice()
        .try_into()
        .map_err(|_| Violation::impossible("sha256", format!("{} bytes", summary.sha256.len())))?;
    let spool_path = text("spool_path", summary.spool_path)?;
    let below_root = |path: &str| {
        path.strip_prefix(output_root).and_then(|rest| rest.strip_prefix('/')).is_some_and(|rest| {
            !rest.is_empty() && rest.split('/').all(|part| !matches!(part, "" | "." | "..")) && !rest.contains('\0')
        })
    };
    if !spool_path.is_empty() && !below_root(&spool_path) {
        return Err(Violation::impossible("spool_path", spool_path));
    }
    Ok(StreamSummary {
        stream,
        total_bytes: summary.total_bytes,
        head_bytes: summary.head_bytes,
        tail_bytes: summary.tail_bytes,
        sha256,
        inline: complete.then_some(summary.inline),
        spool_path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call_end(finished: wire::CallFinished) -> Checked<CallEnd> {
        super::call_end(finished, OUTPUT_ROOT)
    }

    fn finished(kind: wire::outcome::Kind) -> wire::CallFinished {
        wire::CallFinished { outcome: Some(wire::Outcome { kind: Some(kind) }), ..Default::default() }
    }

    fn exited() -> wire::CallFinished {
        finished(wire::outcome::Kind::Exited(wire::Exited { code: 0 }))
    }

    fn stdout() -> wire::StreamSummary {
        wire::StreamSummary {
            stream: wire::Stream::Stdout.into(),
            total_bytes: 2,
            sha256: vec![0; 32],
            inline: b"ok".to_vec(),
            inline_complete: true,
            ..Default::default()
        }
    }

    #[test]
    fn good_end_is_taken_over_whole() {
        let end = call_end(wire::CallFinished { streams: vec![stdout()], ..exited() }).expect("good");

        assert_eq!(end.outcome, Outcome::Exited { code: 0 });
        assert_eq!(end.streams[0].inline.as_deref(), Some(&b"ok"[..]));
    }

    #[test]
    fn impossible_statuses_are_violations() {
        use wire::outcome::Kind;
        let cases = [
            Kind::Exited(wire::Exited { code: -1 }),
            Kind::Exited(wire::Exited { code: 256 }),
            Kind::Signaled(wire::Signaled { signal: 0, core_dumped: false }),
            Kind::Signaled(wire::Signaled { signal: 65, core_dumped: false }),
            Kind::TimedOut(wire::TimedOut { code: i32::MIN, ..Default::default() }),
            Kind::Cancelled(wire::Cancelled { mode: 77, ..Default::default() }),
            Kind::NeverStarted(wire::NeverStarted { code: 0, ..Default::default() }),
            Kind::OutOfMemory(wire::OutOfMemory { process: "x".repeat(5000), ..Default::default() }),
        ];
        for kind in cases {
            let shown = format!("{kind:?}");
            assert!(call_end(finished(kind)).is_err(), "{}", &shown[..shown.len().min(80)]);
        }
    }

    #[test]
    fn end_without_outcome_is_a_violation() {
        assert_eq!(call_end(wire::CallFinished::default()), Err(Violation::Malformed("without an outcome")));
    }

    #[test]
    fn impossible_stream_summaries_are_violations() {
        let cases = [
            wire::StreamSummary { stream: 99, ..stdout() },
            wire::StreamSummary { head_bytes: u64::MAX, tail_bytes: 2, ..stdout() },
            wire::StreamSummary { head_bytes: 3, ..stdout() },
            wire::StreamSummary { total_bytes: 3, ..stdout() },
            wire::StreamSummary { inline_complete: false, ..stdout() },
            wire::StreamSummary { sha256: vec![0; 31], ..stdout() },
            wire::StreamSummary { spool_path: "/etc/passwd".into(), ..stdout() },
            wire::StreamSummary { spool_path: format!("{OUTPUT_ROOT}/../../etc/passwd"), ..stdout() },
            wire::StreamSummary { inline: vec![0; 70_000], total_bytes: 70_000, ..stdout() },
        ];
        for case in cases {
            assert!(call_end(wire::CallFinished { streams: vec![case], ..exited() }).is_err());
        }
        assert!(call_end(wire::CallFinished { streams: vec![stdout(), stdout()], ..exited() }).is_err());
    }

    #[test]
    fn output_before_the_asked_offset_or_longer_than_asked_is_a_violation() {
        let data = |offset, length| wire::OutputData {
            stream: wire::Stream::Stdout.into(),
            offset,
            data: vec![0; length],
            ..Default::default()
        };
        assert!(output(data(10, 4), Stream::Stdout, 10, 4).is_ok());
        assert!(output(data(9, 4), Stream::Stdout, 10, 4).is_err());
        assert!(output(data(10, 5), Stream::Stdout, 10, 4).is_err());
        assert!(output(data(u64::MAX, 4), Stream::Stdout, 10, 4).is_err());
        assert!(output(data(10, 4), Stream::Stderr, 10, 4).is_err());
    }

    #[test]
    fn violation_text_cannot_forge_a_log_line() {
        let shown = Violation::impossible("note", "a\nERROR forged\u{1b}[2J").to_string();

        assert!(!shown.contains('\n') && !shown.contains('\u{1b}'), "{shown}");
    }

    #[test]
    fn tool_result_with_an_unknown_block_is_no_result() {
        let empty_block = wire::ToolResult { is_error: false, content: vec![wire::ContentBlock { kind: None }] };

        assert_eq!(tool_result(&empty_block.encode_to_vec()), None);
    }
}
