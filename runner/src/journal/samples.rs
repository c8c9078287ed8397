//! Records for tests: one of every kind and of every value that has a name in the files, and short ones about few ids.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::record::Record;
use crate::work::{
    BashInput, Blame, CallEnd, CallId, CallLimits, CallResult, CancelMode, Code, Content, EditInput, EnvironmentRef,
    ExecInput, GlobInput, GrepInput, Layer, Network, Note, NoteKind, Outcome, OutputMode, ReadInput, Receipt,
    RequestDigest, ResourceLimits, RootfsChoice, SandboxId, SessionId, SessionOpen, Stream, StreamSummary, Terminal,
    ToolCall, ToolFailure, ToolInput, ToolResult, Usage, WriteInput,
};

pub(super) fn call_id(number: u64) -> CallId {
    CallId::new(format!("call-{number}")).unwrap()
}

pub(super) fn session_id(number: u64) -> SessionId {
    SessionId::new(format!("session-{number}")).unwrap()
}

pub(super) fn opening(session: u64, epoch: u64) -> Record {
    Record::SessionOpening(Box::new(SessionOpen {
        session_id: session_id(session),
        epoch,
        digest: RequestDigest([7; 32]),
        environment: EnvironmentRef { name: "e".into(), digest: "d".into(), rootfs: Some(RootfsChoice::Host) },
        limits: ResourceLimits { cpu_millis: 1, memory_bytes: 2, disk_bytes: 3, pids: 4 },
        network: Network::None,
        variables: vec![("NAME".into(), "value".into())],
        min_tier: "full".into(),
        orphan_timeout: Some(Duration::from_millis(1500)),
        idle_timeout: None,
        max_concurrent_calls: 2,
        tenant: "t".into(),
    }))
}

pub(super) fn ready(session: u64, sandbox: u64) -> Record {
    let layer = Layer { name: "seccomp".into(), requested: "on".into(), enforced: String::new(), errno: 38 };
    Record::SessionReady {
        session_id: session_id(session),
        sandbox_id: SandboxId::new(format!("sandbox-{sandbox}")).unwrap(),
        receipt: Receipt { tier: "pod".into(), layers: vec![layer], switched_off: vec!["landlock".into()] },
    }
}

pub(super) fn ended(session: u64, epoch: u64) -> Record {
    Record::SessionEnded { session_id: session_id(session), epoch }
}

fn call_with(number: u64, session: u64, input: ToolInput) -> Record {
    Record::Accepted(Box::new(ToolCall {
        call_id: call_id(number),
        session_id: session_id(session),
        epoch: 1,
        digest: RequestDigest([u8::try_from(number % 256).unwrap(); 32]),
        input,
        limits: CallLimits { start_within: Some(Duration::from_secs(5)), ..CallLimits::default() },
        output_mode: if number.is_multiple_of(2) { OutputMode::Merged } else { OutputMode::Separate },
        quiet: false,
    }))
}

pub(super) fn accepted(number: u64, session: u64, size: usize) -> Record {
    call_with(number, session, ToolInput::Bash(BashInput { command: Some("x".repeat(size)), restart: false }))
}

pub(super) fn started(number: u64) -> Record {
    Record::Started { call_id: call_id(number) }
}

pub(super) fn cancelled(number: u64, mode: CancelMode) -> Record {
    Record::Cancelled { call_id: call_id(number), mode }
}

fn finished_with(number: u64, outcome: Outcome) -> Record {
    finished_as(number, CallEnd::without_output(outcome))
}

fn finished_as(number: u64, end: CallEnd) -> Record {
    let result = CallResult { end, presented: ToolResult::text(false, "ok"), recovered: false };
    Record::Finished { call_id: call_id(number), result: Arc::new(result) }
}

pub(super) fn finished(number: u64, code: i32) -> Record {
    finished_with(number, Outcome::Exited { code })
}

pub(super) fn acknowledged(number: u64) -> Record {
    Record::Acknowledged { call_id: call_id(number) }
}

fn inputs() -> Vec<ToolInput> {
    let bytes = |text: &str| text.as_bytes().to_vec();
    vec![
        ToolInput::Bash(BashInput { command: Some("true".into()), restart: true }),
        ToolInput::Read(ReadInput { file_path: "/f".into(), view_range: Some((1, -1)) }),
        ToolInput::Write(WriteInput { file_path: "/f".into(), content: "c".into() }),
        ToolInput::Edit(EditInput {
            file_path: "/f".into(),
            old_string: "a".into(),
            new_string: "b".into(),
            replace_all: true,
        }),
        ToolInput::Glob(GlobInput { pattern: "*".into(), path: Some("/".into()) }),
        ToolInput::Grep(GrepInput { pattern: "x".into(), path: None }),
        ToolInput::Exec(ExecInput {
            argv: vec![bytes("ls"), vec![0xff]],
            env: vec![bytes("A=1")],
            cwd: Some(bytes("/")),
            stdin: true,
            terminal: Some(Terminal { columns: 80, rows: 24 }),
        }),
    ]
}

/// Codes of the first version of the format. Of those behind them, some are only told in refusals, which are not written down.
const FIRST_CODES: usize = 25;

fn outcomes() -> Vec<Outcome> {
    let failure = |code| ToolFailure::new(code, "message", "remediation");
    let mut outcomes = vec![
        Outcome::Exited { code: 1 },
        Outcome::Signaled { signal: 11, core_dumped: true },
        Outcome::TimedOut { after: Duration::from_millis(1), killed: true, code: 130 },
        Outcome::Cancelled { mode: CancelMode::Terminate, before_start: false, killed: false, code: 143 },
        Outcome::OutOfMemory { limit_bytes: 1 << 40, process: "p".into(), used_bytes: 0, kills: 1, code: -1 },
        Outcome::ForbiddenSystemCall { code: 159 },
        Outcome::Indeterminate { failure: ToolFailure { blame: Blame::Sandbox, ..failure(Code::OutcomeUnknown) } },
    ];
    outcomes.extend(
        Code::ALL[..FIRST_CODES].iter().map(|code| Outcome::NeverStarted { failure: failure(*code), code: 125 }),
    );
    outcomes
}

fn full_end() -> CallEnd {
    let summary = |stream, inline: Option<Vec<u8>>| StreamSummary {
        stream,
        total_bytes: 1000,
        head_bytes: 600,
        tail_bytes: 400,
        sha256: [0xee; 32],
        inline,
        spool_path: "/spool".into(),
    };
    let kinds = [
        NoteKind::DiskLimit,
        NoteKind::PidsLimit,
        NoteKind::ProcessesLeft,
        NoteKind::EgressDenied,
        NoteKind::ShellRestarted,
        NoteKind::RestKilled,
        NoteKind::MemoryKills,
    ];
    CallEnd {
        outcome: Outcome::Exited { code: 0 },
        streams: Stream::ALL
            .iter()
            .map(|stream| summary(*stream, (*stream == Stream::Stdout).then(|| vec![0xff; 1000])))
            .collect(),
        result: Some(ToolResult {
            is_error: true,
            content: vec![
                Content::Text("t".into()),
                Content::Image { media_type: "image/png".into(), data: vec![1, 2] },
                Content::Document { media_type: "application/pdf".into(), data: vec![3] },
            ],
        }),
        duration: Duration::new(3, 5),
        processes_left: 2,
        usage: Some(Usage { cpu: Duration::from_micros(7), peak_memory_bytes: 9, shared: true }),
        notes: kinds.iter().map(|kind| Note { kind: *kind, text: "n".into() }).collect(),
        working_directory: "/w".into(),
        shell_generation: 4,
    }
}

/// Every kind of record of the first version with every value that had a name, in an order that makes sense.
pub(super) fn every_kind() -> Vec<Record> {
    let mut records = vec![
        Record::Events { through: 1000 },
        Record::Term { term: 3 },
        Record::Floor { epoch: 2 },
        opening(1, 5),
        ready(1, 1),
        Record::Remembered { session_id: session_id(1), call_ids: vec![call_id(900), call_id(901)] },
        opening(2, 6),
    ];
    if let Record::SessionOpening(mut open) = opening(3, 7) {
        open.environment.rootfs = Some(RootfsChoice::Directory("/srv".into()));
        open.orphan_timeout = None;
        records.push(Record::SessionOpening(open));
    }
    for (number, input) in inputs().into_iter().enumerate() {
        records.push(call_with(u64::try_from(number).unwrap(), 1, input));
    }
    records.push(started(0));
    let full = CallResult { end: full_end(), presented: ToolResult::text(true, "shown"), recovered: true };
    records.push(Record::Finished { call_id: call_id(0), result: Arc::new(full) });
    for (number, outcome) in (100..).zip(outcomes()) {
        records.extend([accepted(number, 2, 3), started(number), finished_with(number, outcome)]);
    }
    records.extend([
        cancelled(1, CancelMode::Interrupt),
        cancelled(2, CancelMode::Kill),
        cancelled(999, CancelMode::Terminate),
        acknowledged(0),
        acknowledged(100),
        ended(3, 7),
    ]);
    records
}

/// What has a name in the files since then, in an order that makes sense.
pub(super) fn added_kinds() -> Vec<Record> {
    let mut records = vec![opening(1, 5), ready(1, 1)];
    let Record::Accepted(mut quiet) = accepted(1, 1, 3) else { unreachable!("an accepted call") };
    quiet.quiet = true;
    records.push(Record::Accepted(quiet));
    records.extend([started(1), started(1), started(1), started(1)]);
    records.extend([2, 3].into_iter().flat_map(|call| [accepted(call, 1, 3), started(call)]));
    records.extend([Record::Resumed { call_id: call_id(2) }, Record::Resumed { call_id: call_id(2) }]);
    records.push(Record::Outlived { call_id: call_id(3) });
    for (number, code) in (10..).zip([Code::Poison, Code::HostRebooted]) {
        let failure = ToolFailure::new(code, "message", "remediation");
        records.extend([accepted(number, 1, 3), finished_with(number, Outcome::NeverStarted { failure, code: 125 })]);
    }
    let kinds = [NoteKind::FileReplaced, NoteKind::FileUnchanged, NoteKind::FileUncertain];
    let end = CallEnd {
        notes: kinds.iter().map(|kind| Note { kind: *kind, text: "n".into() }).collect(),
        ..CallEnd::without_output(Outcome::Exited { code: 0 })
    };
    let noted = CallResult { end, presented: ToolResult::text(false, "ok"), recovered: false };
    records.push(Record::Finished { call_id: call_id(1), result: Arc::new(noted) });
    let mut end = CallEnd::without_output(Outcome::Exited { code: 0 });
    end.notes.push(Note { kind: NoteKind::ProcessesEnded, text: "note".into() });
    records.extend([accepted(12, 1, 3), finished_as(12, end)]);
    let memory = Outcome::OutOfMemory { limit_bytes: 2, process: "p".into(), used_bytes: 1, kills: 1, code: 137 };
    records.extend([accepted(13, 1, 3), finished_with(13, memory)]);
    records
}

/// Any record about few sessions and calls, so that most say something about what others said.
pub(super) fn any_record() -> impl Strategy<Value = Record> {
    let mode = prop_oneof![Just(CancelMode::Interrupt), Just(CancelMode::Terminate), Just(CancelMode::Kill)];
    prop_oneof![
        1 => (0_u64..50).prop_map(|through| Record::Events { through }),
        1 => (0_u64..5).prop_map(|term| Record::Term { term }),
        1 => (0_u64..3, 0_u64..6).prop_map(|(session, epoch)| opening(session, epoch)),
        1 => (0_u64..3, 0_u64..9).prop_map(|(session, sandbox)| ready(session, sandbox)),
        1 => (0_u64..3, 0_u64..6).prop_map(|(session, epoch)| ended(session, epoch)),
        4 => (0_u64..12, 0_u64..3, 0_usize..90).prop_map(|(call, session, size)| accepted(call, session, size)),
        2 => (0_u64..12).prop_map(started),
        1 => (0_u64..12).prop_map(|call| Record::Resumed { call_id: call_id(call) }),
        1 => (0_u64..12).prop_map(|call| Record::Outlived { call_id: call_id(call) }),
        1 => (0_u64..12, mode).prop_map(|(call, mode)| cancelled(call, mode)),
        3 => (0_u64..12, 0..256).prop_map(|(call, code)| finished(call, code)),
        2 => (0_u64..12).prop_map(acknowledged),
    ]
}
