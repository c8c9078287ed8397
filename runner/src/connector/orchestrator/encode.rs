//! Our own types to frames of the orchestrator protocol.

use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::runner_frame::Body;

use crate::work::{
    Blame, CallPhase, CallResult, CancelMode, Content, Note, NoteKind, Outcome, Receipt, RequestKind, SessionEnd, Slot,
    Stream, StreamSummary, ToolFailure, ToolResult, Usage,
};

/// A refusal of a request that could be read.
pub(super) fn refused(
    request: RequestKind,
    session_id: String,
    call_id: String,
    epoch: u64,
    failure: &ToolFailure,
) -> Body {
    let kind = kind_of_request(request);
    refused_frame(0, kind, session_id, call_id, epoch, failure)
}

/// Field number of a request in its frame.
const fn kind_of_request(request: RequestKind) -> u32 {
    match request {
        RequestKind::Open => 13,
        RequestKind::Close => 14,
        RequestKind::Call => 15,
        RequestKind::Cancel => 16,
        RequestKind::Stdin => 23,
        RequestKind::Resize => 24,
    }
}

/// Name of a request by its field number, for whoever counts; one name for all that sessions never see.
pub(super) fn request_name(kind: u32) -> &'static str {
    use RequestKind::{Call, Cancel, Close, Open, Resize, Stdin};
    let known = [Open, Close, Call, Cancel, Stdin, Resize];
    known.into_iter().find(|request| kind_of_request(*request) == kind).map_or("other", RequestKind::as_str)
}

/// A refusal of a frame.
pub(super) fn refused_frame(
    frame_no: u64,
    kind: u32,
    session_id: String,
    call_id: String,
    epoch: u64,
    failure: &ToolFailure,
) -> Body {
    let failure = Some(failure_to_wire(failure));
    Body::RequestRefused(pb::RequestRefused { frame_no, kind, call_id, session_id, epoch, failure })
}

/// A failure.
pub(super) fn failure_to_wire(failure: &ToolFailure) -> pb::ToolFailure {
    let blame = match failure.blame {
        Blame::Caller => pb::Blame::Caller,
        Blame::Sandbox => pb::Blame::Sandbox,
        Blame::Host => pb::Blame::Host,
    };
    pb::ToolFailure {
        code: failure.code.as_str().to_owned(),
        blame: blame.into(),
        retryable: failure.retryable,
        message: failure.message.clone(),
        remediation: failure.remediation.clone(),
        retry_after: failure.retry_after.map(time),
    }
}

/// The answer to a question about slots.
pub(super) fn slots_to_wire(query_id: u64, slots: Result<Vec<Slot>, ToolFailure>) -> pb::QueryReply {
    use pb::query_reply::Answer;
    let answer = match slots {
        Ok(slots) => {
            let slot = |slot: Slot| pb::Slot { call_id: slot.call_id.to_string(), pids: slot.pids };
            Answer::Slots(pb::SlotList { slots: slots.into_iter().map(slot).collect() })
        }
        Err(failure) => Answer::Failure(failure_to_wire(&failure)),
    };
    pb::QueryReply { query_id, answer: Some(answer) }
}

/// A receipt.
pub(super) fn receipt_to_wire(receipt: &Receipt) -> pb::Receipt {
    let layer = |layer: &crate::work::Layer| pb::IsolationLayer {
        name: layer.name.clone(),
        requested: layer.requested.clone(),
        enforced: layer.enforced.clone(),
        errno: layer.errno,
    };
    pb::Receipt {
        tier: receipt.tier.clone(),
        layers: receipt.layers.iter().map(layer).collect(),
        switched_off: receipt.switched_off.clone(),
    }
}

/// The end of a session.
pub(super) fn session_end(event_seq: u64, session_id: String, epoch: u64, end: &SessionEnd) -> Body {
    let (reason, failure) = match end {
        SessionEnd::Closed => (pb::SessionEndReason::Closed, None),
        SessionEnd::OpenFailed(failure) => (pb::SessionEndReason::OpenFailed, Some(failure)),
        SessionEnd::SandboxLost(failure) => (pb::SessionEndReason::SandboxLost, Some(failure)),
        SessionEnd::HostRebooted => (pb::SessionEndReason::HostRebooted, None),
        SessionEnd::Fenced => (pb::SessionEndReason::Fenced, None),
        SessionEnd::Drained => (pb::SessionEndReason::Drained, None),
        SessionEnd::Idle => (pb::SessionEndReason::Idle, None),
    };
    let failure = failure.map(failure_to_wire);
    Body::SessionEnded(pb::SessionEnded { event_seq, session_id, epoch, reason: reason.into(), failure })
}

/// The end of a call.
pub(super) fn finished(event_seq: u64, call_id: String, session_id: String, epoch: u64, result: &CallResult) -> Body {
    let end = &result.end;
    let presented = (!result.presented.content.is_empty()).then(|| tool_result(&result.presented));
    Body::CallFinished(pb::CallFinished {
        event_seq,
        call_id,
        session_id,
        epoch,
        outcome: Some(outcome(&end.outcome)),
        // A stream that was decoded into the result is not announced as a stream to be fetched.
        streams: end
            .streams
            .iter()
            .filter(|summary| presented.is_none() || summary.stream != Stream::Result)
            .map(summary)
            .collect(),
        result: presented,
        ran_for: Some(time(end.duration)),
        usage: end.usage.map(usage),
        processes_left: end.processes_left,
        notes: end.notes.iter().map(note).collect(),
        working_directory: end.working_directory.clone(),
        shell_generation: end.shell_generation,
        recovered: result.recovered,
    })
}

fn outcome(outcome: &Outcome) -> pb::Outcome {
    use pb::outcome::Kind;
    let kind = match outcome {
        Outcome::Exited { code } => Kind::Exited(pb::Exited { code: *code }),
        Outcome::Signaled { signal, core_dumped } => {
            Kind::Signaled(pb::Signaled { signal: *signal, core_dumped: *core_dumped })
        }
        Outcome::TimedOut { after, killed, code } => Kind::TimedOut(pb::TimedOut {
            after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
            killed: *killed,
            code: *code,
        }),
        Outcome::Cancelled { mode, before_start, killed, code } => Kind::Cancelled(pb::Cancelled {
            mode: cancel_mode(*mode).into(),
            before_start: *before_start,
            killed: *killed,
            code: *code,
        }),
        Outcome::OutOfMemory { limit_bytes, process, used_bytes, kills, code } => Kind::OutOfMemory(pb::OutOfMemory {
            limit_bytes: *limit_bytes,
            process: process.clone(),
            used_bytes: *used_bytes,
            kills: *kills,
            code: *code,
        }),
        Outcome::ForbiddenSystemCall { code } => Kind::ForbiddenSystemCall(pb::ForbiddenSystemCall { code: *code }),
        Outcome::NeverStarted { failure, code } => {
            Kind::NeverStarted(pb::NeverStarted { failure: Some(failure_to_wire(failure)), code: *code })
        }
        Outcome::Indeterminate { failure } => {
            Kind::Indeterminate(pb::Indeterminate { failure: Some(failure_to_wire(failure)) })
        }
    };
    pb::Outcome { kind: Some(kind) }
}

fn cancel_mode(mode: CancelMode) -> pb::CancelMode {
    match mode {
        CancelMode::Interrupt => pb::CancelMode::Interrupt,
        CancelMode::Terminate => pb::CancelMode::Terminate,
        CancelMode::Kill => pb::CancelMode::Kill,
    }
}

fn tool_result(result: &ToolResult) -> pb::ToolResult {
    use pb::content_block::Kind;
    let block = |content: &Content| {
        let kind = match content {
            Content::Text(text) => Kind::Text(text.clone()),
            Content::Image { media_type, data } => {
                Kind::Image(pb::Media { media_type: media_type.clone(), data: data.clone() })
            }
            Content::Document { media_type, data } => {
                Kind::Document(pb::Media { media_type: media_type.clone(), data: data.clone() })
            }
        };
        pb::ContentBlock { kind: Some(kind) }
    };
    pb::ToolResult { is_error: result.is_error, content: result.content.iter().map(block).collect() }
}

fn summary(summary: &StreamSummary) -> pb::StreamSummary {
    pb::StreamSummary {
        stream: stream_to_wire(summary.stream).into(),
        total_bytes: summary.total_bytes,
        head_bytes: summary.head_bytes,
        tail_bytes: summary.tail_bytes,
        sha256: summary.sha256.to_vec(),
        inline: summary.inline.clone().unwrap_or_default(),
        inline_complete: summary.inline.is_some(),
        spool_path: summary.spool_path.clone(),
    }
}

fn usage(usage: Usage) -> pb::Usage {
    pb::Usage {
        cpu_usec: u64::try_from(usage.cpu.as_micros()).unwrap_or(u64::MAX),
        peak_memory_bytes: usage.peak_memory_bytes,
        shared: usage.shared,
    }
}

fn note(note: &Note) -> pb::Note {
    let kind = match note.kind {
        NoteKind::DiskLimit => pb::NoteKind::DiskLimit,
        NoteKind::PidsLimit => pb::NoteKind::PidsLimit,
        NoteKind::ProcessesLeft => pb::NoteKind::ProcessesLeft,
        NoteKind::EgressDenied => pb::NoteKind::EgressDenied,
        NoteKind::ShellRestarted => pb::NoteKind::ShellRestarted,
        NoteKind::RestKilled => pb::NoteKind::RestKilled,
        NoteKind::MemoryKills => pb::NoteKind::MemoryKills,
        NoteKind::FileReplaced => pb::NoteKind::FileReplaced,
        NoteKind::FileUnchanged => pb::NoteKind::FileUnchanged,
        NoteKind::FileUncertain => pb::NoteKind::FileUncertain,
        NoteKind::ProcessesEnded => pb::NoteKind::ProcessesEnded,
        NoteKind::ShellRenewed => pb::NoteKind::ShellRenewed,
    };
    pb::Note { kind: kind.into(), text: note.text.clone() }
}

/// A stream.
pub(super) fn stream_to_wire(stream: Stream) -> pb::OutputStream {
    match stream {
        Stream::Stdout => pb::OutputStream::Stdout,
        Stream::Stderr => pb::OutputStream::Stderr,
        Stream::Terminal => pb::OutputStream::Terminal,
        Stream::Result => pb::OutputStream::Result,
    }
}

/// A phase.
pub(super) fn phase_to_wire(phase: CallPhase) -> pb::CallPhase {
    match phase {
        CallPhase::Accepted => pb::CallPhase::Accepted,
        CallPhase::Started => pb::CallPhase::Started,
        CallPhase::Finished => pb::CallPhase::Finished,
    }
}

/// A time.
pub(super) fn time(time: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(time.subsec_nanos()).unwrap_or(0),
    }
}
