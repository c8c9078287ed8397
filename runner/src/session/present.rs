//! Turns the end of a call into the text a model reads. Pure: output in, text out.
//!
//! The shapes are those of `agent_toolset_20260401`, with the exit code always shown, partial output kept on a timeout,
//! and every restart of the shell said aloud.

use std::time::Duration;

use crate::work::{CallEnd, Code, Note, NoteKind, Outcome, ToolFailure, ToolInput, ToolResult};

/// Output shown to the model: this many bytes from the end.
pub const TAIL_BYTES: usize = 102_400;

const TRUNCATED: &str = "[output truncated]\n";
const NO_OUTPUT: &str = "(no output)";

/// The end of a call's output.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tail<'a> {
    /// At most `TAIL_BYTES` from the end; what is more is cut here.
    pub bytes: &'a [u8],
    /// Something before `bytes` is missing.
    pub cut: bool,
}

/// What can be answered without a sandbox: the input asks for nothing.
#[must_use]
pub fn refusal(input: &ToolInput) -> Option<ToolFailure> {
    match input {
        ToolInput::Bash(bash) if !bash.restart && bash.command.as_ref().is_none_or(String::is_empty) => {
            Some(ToolFailure::new(Code::InvalidField, "bash: command is required", "give a command, or set restart"))
        }
        _ => None,
    }
}

/// Text of a finished `bash` or `exec` call.
#[must_use]
pub fn command_text(input: &ToolInput, end: &CallEnd, output: Tail<'_>) -> ToolResult {
    let tool = input.name();
    let has_note = |kind| end.notes.iter().any(|note| note.kind == kind);
    // Only the first is the doing of this command.
    let (lost, renewed) = (has_note(NoteKind::ShellRestarted), has_note(NoteKind::ShellRenewed));
    let only_restart =
        matches!(input, ToolInput::Bash(bash) if bash.restart && bash.command.as_ref().is_none_or(String::is_empty));
    if only_restart && end.outcome == (Outcome::Exited { code: 0 }) {
        return ToolResult::text(false, "bash session restarted");
    }
    let mut lines = Vec::new();
    let printed = printable(output);
    if !printed.is_empty() {
        lines.push(printed);
    }
    let verdict = verdict(tool, &end.outcome, (lost || renewed) && !only_restart && !restart_was_asked(input));
    let is_success = end.outcome == (Outcome::Exited { code: 0 }) && !lost;
    let is_error = verdict.is_some() && !is_success;
    lines.extend(verdict);
    lines.extend(end.notes.iter().filter(|note| is_for_the_model(note)).map(|note| format!("[{}]", note.text)));
    if lines.is_empty() {
        lines.push(NO_OUTPUT.to_owned());
    }
    ToolResult::text(is_error, lines.join("\n"))
}

/// Text of a file tool that gave no result of its own.
#[must_use]
pub fn tool_text(input: &ToolInput, end: &CallEnd) -> ToolResult {
    let tool = input.name();
    let mut lines =
        vec![verdict(tool, &end.outcome, false).unwrap_or_else(|| format!("{tool}: ended without a result"))];
    lines.extend(end.notes.iter().filter(|note| is_for_the_model(note)).map(|note| format!("[{}]", note.text)));
    ToolResult::text(true, lines.join("\n"))
}

/// Text of a call that has no output: it never ran, or what became of it is not known.
#[must_use]
pub fn failure_text(outcome: &Outcome) -> ToolResult {
    let text = match outcome {
        Outcome::NeverStarted { failure, .. } | Outcome::Indeterminate { failure } => failure.message.clone(),
        Outcome::Cancelled { before_start: true, .. } => "cancelled before it started; nothing was run".to_owned(),
        other => verdict("call", other, false).unwrap_or_default(),
    };
    ToolResult::text(true, text)
}

fn restart_was_asked(input: &ToolInput) -> bool {
    matches!(input, ToolInput::Bash(bash) if bash.restart)
}

fn is_for_the_model(note: &Note) -> bool {
    match note.kind {
        NoteKind::DiskLimit
        | NoteKind::PidsLimit
        | NoteKind::EgressDenied
        | NoteKind::RestKilled
        | NoteKind::MemoryKills
        | NoteKind::FileReplaced
        | NoteKind::FileUnchanged
        | NoteKind::FileUncertain
        | NoteKind::ProcessesEnded => true,
        // The first two are told in the verdict. The third is normal: agents start servers on purpose.
        NoteKind::ShellRestarted | NoteKind::ShellRenewed | NoteKind::ProcessesLeft => false,
    }
}

/// One line about an end that is not plain success.
fn verdict(tool: &str, outcome: &Outcome, restarted: bool) -> Option<String> {
    let again = if restarted { "; shell restarted" } else { "" };
    match outcome {
        Outcome::Exited { code: 0 } if restarted => Some(format!("exit code: 0{}", in_brackets(again))),
        Outcome::Exited { code: 0 } => None,
        Outcome::Exited { code } => Some(format!("exit code: {code}{}", in_brackets(again))),
        Outcome::Signaled { signal, .. } => Some(format!("{tool}: killed by signal {}{again}", signal_name(*signal))),
        Outcome::TimedOut { after, .. } => {
            Some(format!("{tool}: command timed out after {}{again}", milliseconds(*after)))
        }
        Outcome::Cancelled { before_start: true, .. } => {
            Some(format!("{tool}: cancelled before it started; nothing was run"))
        }
        Outcome::Cancelled { .. } => Some(format!("{tool}: command cancelled{again}")),
        Outcome::OutOfMemory { limit_bytes, process, used_bytes, code, .. } => {
            let who = if process.is_empty() { "a process" } else { process };
            let used = if *used_bytes == 0 { String::new() } else { format!(" with {}", size(*used_bytes)) };
            // Without a number it is not known to have been that of the sandbox; a note says more where more is known.
            let limit = match limit_bytes {
                0 => String::new(),
                bytes => format!(" at the memory limit of {}", size(*bytes)),
            };
            let status = if *code >= 0 { format!("; exit code: {code}") } else { String::new() };
            Some(format!("{tool}: out of memory: {who} was killed{used}{limit}{status}{again}"))
        }
        Outcome::ForbiddenSystemCall { code } => Some(format!(
            "{tool}: a process was killed for a system call that is not allowed in this sandbox; exit code: {code}{again}"
        )),
        Outcome::NeverStarted { failure, .. } | Outcome::Indeterminate { failure } => Some(failure.message.clone()),
    }
}

fn in_brackets(again: &str) -> String {
    again.strip_prefix("; ").map(|text| format!(" ({text})")).unwrap_or_default()
}

fn milliseconds(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

fn size(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{bytes} bytes") } else { format!("{} MiB", bytes >> 20) }
}

fn signal_name(signal: i32) -> String {
    let name = match signal {
        1 => "HUP",
        2 => "INT",
        3 => "QUIT",
        4 => "ILL",
        6 => "ABRT",
        7 => "BUS",
        8 => "FPE",
        9 => "KILL",
        11 => "SEGV",
        13 => "PIPE",
        15 => "TERM",
        24 => "XCPU",
        25 => "XFSZ",
        31 => "SYS",
        _ => return signal.to_string(),
    };
    format!("{signal} (SIG{name})")
}

fn printable(output: Tail<'_>) -> String {
    let cut = output.cut || output.bytes.len() > TAIL_BYTES;
    let mut bytes = &output.bytes[output.bytes.len().saturating_sub(TAIL_BYTES)..];
    if cut {
        // A character that was cut in two would show as rubbish at the start.
        let partial = bytes.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count();
        bytes = &bytes[partial..];
    }
    let text = String::from_utf8_lossy(bytes);
    let text = strip_control_sequences(&text);
    let text = text.trim_end_matches('\n');
    if cut { format!("{TRUNCATED}{text}") } else { text.to_owned() }
}

/// Removes what matches `ESC [ [0-9;?]* [ -/]* [@-~]`; anything else stays.
fn strip_control_sequences(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("\x1b[") {
        let body = &rest.as_bytes()[start + 2..];
        let parameters = body.iter().take_while(|b| b.is_ascii_digit() || **b == b';' || **b == b'?').count();
        let intermediates = body[parameters..].iter().take_while(|b| (0x20..=0x2f).contains(*b)).count();
        let length = parameters + intermediates;
        kept.push_str(&rest[..start]);
        if body.get(length).is_some_and(|b| (0x40..=0x7e).contains(b)) {
            rest = &rest[start + 2 + length + 1..];
        } else {
            kept.push_str("\x1b[");
            rest = &rest[start + 2..];
        }
    }
    kept.push_str(rest);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{BashInput, CancelMode, Content};

    fn bash(command: &str) -> ToolInput {
        ToolInput::Bash(BashInput { command: Some(command.into()), restart: false })
    }

    fn restart(command: Option<&str>) -> ToolInput {
        ToolInput::Bash(BashInput { command: command.map(Into::into), restart: true })
    }

    fn shown(input: &ToolInput, output: &str, outcome: Outcome, notes: &[NoteKind]) -> (String, bool) {
        let mut end = CallEnd::without_output(outcome);
        end.notes = notes.iter().map(|kind| Note { kind: *kind, text: format!("{kind:?}") }).collect();
        let result = command_text(input, &end, Tail { bytes: output.as_bytes(), cut: false });
        match &result.content[..] {
            [Content::Text(text)] => (text.clone(), result.is_error),
            other => panic!("one text expected, got {other:?}"),
        }
    }

    #[test]
    fn bash_rows_of_the_toolset() {
        use NoteKind::{ProcessesLeft, ShellRenewed, ShellRestarted};
        let exited = |code| Outcome::Exited { code };
        let timed_out = Outcome::TimedOut { after: Duration::from_millis(500), killed: true, code: 130 };
        let rows = [
            (bash("echo hi; echo err >&2; false"), "hi\nerr\n", exited(1), &[][..], "hi\nerr\nexit code: 1", true),
            (bash("cd /tmp"), "", exited(0), &[], "(no output)", false),
            (bash("pwd; echo $A"), "/tmp\n5\n", exited(0), &[], "/tmp\n5", false),
            (bash("(exit 4)"), "", exited(4), &[], "exit code: 4", true),
            (
                bash("sleep 3"),
                "",
                timed_out.clone(),
                &[ShellRestarted],
                "bash: command timed out after 500ms; shell restarted",
                true,
            ),
            (
                bash("echo a; sleep 3"),
                "a\n",
                timed_out.clone(),
                &[ShellRestarted],
                "a\nbash: command timed out after 500ms; shell restarted",
                true,
            ),
            (bash("sleep 3"), "", timed_out, &[], "bash: command timed out after 500ms", true),
            (bash("exit 7"), "", exited(7), &[ShellRestarted], "exit code: 7 (shell restarted)", true),
            (bash("exit 0"), "", exited(0), &[ShellRestarted], "exit code: 0 (shell restarted)", true),
            (bash("echo x"), "x\n", exited(0), &[ShellRenewed], "x\nexit code: 0 (shell restarted)", false),
            (bash("(exit 4)"), "", exited(4), &[ShellRenewed], "exit code: 4 (shell restarted)", true),
            (bash("exit 0"), "", exited(0), &[ShellRenewed, ShellRestarted], "exit code: 0 (shell restarted)", true),
            (restart(Some("echo r")), "r\n", exited(0), &[ShellRenewed], "r", false),
            (restart(None), "", exited(0), &[ShellRestarted], "bash session restarted", false),
            (restart(Some("echo r")), "r\n", exited(0), &[ShellRestarted], "r", false),
            (bash("printf .."), "\x1b[31mred\x1b[0m", exited(0), &[], "red", false),
            (bash("sleep 100 &"), "", exited(0), &[ProcessesLeft], "(no output)", false),
        ];
        for (input, output, outcome, notes, text, is_error) in rows {
            assert_eq!(shown(&input, output, outcome, notes), (text.to_owned(), is_error));
        }
    }

    #[test]
    fn missing_command_is_answered_without_a_sandbox() {
        let empty = ToolInput::Bash(BashInput::default());
        let failure = refusal(&empty).unwrap();
        let result = failure_text(&Outcome::NeverStarted { failure, code: 125 });
        assert_eq!(result, ToolResult::text(true, "bash: command is required"));
        assert!(refusal(&restart(None)).is_none() && refusal(&bash("x")).is_none());
    }

    #[test]
    fn long_output_keeps_its_tail_and_says_so() {
        let (text, _) = shown(&bash("x"), &"a".repeat(150_000), Outcome::Exited { code: 0 }, &[]);
        let tail = text.strip_prefix("[output truncated]\n").unwrap();
        assert_eq!(tail.len(), TAIL_BYTES);
    }

    #[test]
    fn cut_in_the_middle_of_a_character_shows_no_rubbish() {
        let output = "é".repeat(60_000);
        let result = command_text(
            &bash("x"),
            &CallEnd::without_output(Outcome::Exited { code: 0 }),
            Tail { bytes: &output.as_bytes()[1..], cut: true },
        );
        let Content::Text(text) = &result.content[0] else { panic!("text expected") };
        assert!(!text.contains('\u{fffd}') && text.starts_with("[output truncated]\né"));
    }

    #[test]
    fn incomplete_control_sequences_stay() {
        for (given, expected) in [
            ("a\x1b[", "a\x1b["),
            ("\x1b[12", "\x1b[12"),
            ("\x1b[1 qb", "b"),
            ("\x1b[\x1b[mx", "\x1b[x"),
            ("\x1b(B", "\x1b(B"),
        ] {
            assert_eq!(strip_control_sequences(given), expected);
        }
    }

    #[test]
    fn every_bad_end_is_an_error_and_names_its_cause() {
        let memory = |limit_bytes, process: &str, used_bytes| Outcome::OutOfMemory {
            limit_bytes,
            process: process.into(),
            used_bytes,
            kills: 1,
            code: 137,
        };
        let rows = [
            (memory(0, "", 0), "bash: out of memory: a process was killed; exit code: 137"),
            (
                memory(1024, "node", 0),
                "bash: out of memory: node was killed at the memory limit of 1024 bytes; exit code: 137",
            ),
            (
                memory(512 << 20, "python3", 499 << 20),
                "bash: out of memory: python3 was killed with 499 MiB at the memory limit of 512 MiB; exit code: 137",
            ),
            (Outcome::Signaled { signal: 11, core_dumped: false }, "bash: killed by signal 11 (SIGSEGV)"),
            (
                Outcome::Cancelled { mode: CancelMode::Interrupt, before_start: false, killed: false, code: 130 },
                "bash: command cancelled",
            ),
            (
                Outcome::ForbiddenSystemCall { code: 159 },
                "bash: a process was killed for a system call that is not allowed in this sandbox; exit code: 159",
            ),
        ];
        for (outcome, expected) in rows {
            assert_eq!(shown(&bash("x"), "", outcome, &[]), (expected.to_owned(), true));
        }
    }

    #[test]
    fn limits_that_were_hit_are_shown_to_the_model() {
        let (text, is_error) = shown(&bash("x"), "y\n", Outcome::Exited { code: 0 }, &[NoteKind::DiskLimit]);
        assert_eq!((text.as_str(), is_error), ("y\n[DiskLimit]", false));
    }
}
