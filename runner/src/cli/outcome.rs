//! The end of a call for people and scripts: exit code, cause in words, JSON. Pure.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::code;
use crate::config::units::display_size;
use crate::work::{CallEnd, CancelMode, Outcome, Receipt};

const TIMED_OUT: u8 = 124;
/// 128 + SIGPIPE.
pub(super) const BROKEN_PIPE: u8 = 141;
const SIGNAL_BASE: i32 = 128;

/// Exit code of `exec` for this end.
pub(super) fn exit_code(outcome: &Outcome) -> u8 {
    let own = |code: i32| u8::try_from(code).unwrap_or(code::OURS);
    let by_signal = |signal: i32| own(SIGNAL_BASE + signal);
    match outcome {
        Outcome::Exited { code } => own(*code),
        Outcome::Signaled { signal, .. } => by_signal(*signal),
        Outcome::TimedOut { .. } => TIMED_OUT,
        Outcome::Cancelled { mode, killed, .. } => by_signal(match mode {
            _ if *killed => Signal::SIGKILL as i32,
            CancelMode::Interrupt => Signal::SIGINT as i32,
            CancelMode::Terminate => Signal::SIGTERM as i32,
            CancelMode::Kill => Signal::SIGKILL as i32,
        }),
        Outcome::OutOfMemory { code, .. } if *code > 0 => own(*code),
        Outcome::OutOfMemory { .. } => by_signal(Signal::SIGKILL as i32),
        Outcome::ForbiddenSystemCall { code } if *code > 0 => own(*code),
        Outcome::ForbiddenSystemCall { .. } => by_signal(Signal::SIGSYS as i32),
        Outcome::NeverStarted { code, .. } => own(*code),
        Outcome::Indeterminate { .. } => code::OURS,
    }
}

/// Why the command did not simply exit; `None` when it did.
pub(super) fn cause(outcome: &Outcome) -> Option<String> {
    Some(match outcome {
        Outcome::Exited { .. } => return None,
        Outcome::Signaled { signal, core_dumped } => {
            let name = Signal::try_from(*signal).map_or_else(|_| String::new(), |signal| format!(" ({signal})"));
            format!("ended by signal {signal}{name}{}", if *core_dumped { ", core dumped" } else { "" })
        }
        Outcome::TimedOut { after, killed, .. } => {
            format!("timed out: limit {} s reached{}", after.as_secs_f64(), killed_suffix(*killed))
        }
        Outcome::Cancelled { before_start: true, .. } => "cancelled before it started".to_owned(),
        Outcome::Cancelled { killed, .. } => format!("cancelled{}", killed_suffix(*killed)),
        Outcome::OutOfMemory { limit_bytes, process, used_bytes, .. } => {
            let victim = if process.is_empty() { "a process".to_owned() } else { printable(process) };
            let used =
                if *used_bytes == 0 { String::new() } else { format!(", which used {}", display_size(*used_bytes)) };
            // Without a number it is not known to have been that of the sandbox.
            let limit = match limit_bytes {
                0 => String::new(),
                bytes => format!("limit {} reached, ", display_size(*bytes)),
            };
            format!("out of memory: {limit}killed {victim}{used}")
        }
        Outcome::ForbiddenSystemCall { .. } => {
            "forbidden system call: the process was killed by its seccomp filter".to_owned()
        }
        Outcome::NeverStarted { failure, .. } => format!("not started: {}", printable(&failure.message)),
        Outcome::Indeterminate { failure } => format!("outcome unknown: {}", printable(&failure.message)),
    })
}

/// The end as JSON, without output.
pub(super) fn to_json(end: &CallEnd, receipt: &Receipt) -> Value {
    json!({
        "exit_code": exit_code(&end.outcome),
        "outcome": outcome_to_json(&end.outcome),
        "notes": end.notes.iter().map(|note| json!({
            "kind": format!("{:?}", note.kind),
            "text": note.text,
        })).collect::<Vec<_>>(),
        "duration_seconds": end.duration.as_secs_f64(),
        "processes_left": end.processes_left,
        "usage": end.usage.map(|usage| json!({
            "cpu_seconds": usage.cpu.as_secs_f64(),
            "peak_memory_bytes": usage.peak_memory_bytes,
            "shared": usage.shared,
        })),
        "receipt": receipt_to_json(receipt),
    })
}

/// The receipt as JSON: requested against enforced.
pub(super) fn receipt_to_json(receipt: &Receipt) -> Value {
    json!({
        "tier": receipt.tier,
        "switched_off": receipt.switched_off,
        "layers": receipt.layers.iter().map(|layer| json!({
            "name": layer.name,
            "requested": layer.requested,
            "enforced": layer.enforced,
            "errno": layer.errno,
        })).collect::<Vec<_>>(),
    })
}

fn outcome_to_json(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Exited { code } => json!({ "kind": "exited", "code": code }),
        Outcome::Signaled { signal, core_dumped } => {
            json!({ "kind": "signaled", "signal": signal, "core_dumped": core_dumped })
        }
        Outcome::TimedOut { after, killed, code } => {
            json!({ "kind": "timed_out", "after_seconds": after.as_secs_f64(), "killed": killed, "code": code })
        }
        Outcome::Cancelled { mode, before_start, killed, code } => json!({
            "kind": "cancelled",
            "mode": format!("{mode:?}").to_lowercase(),
            "before_start": before_start,
            "killed": killed,
            "code": code,
        }),
        Outcome::OutOfMemory { limit_bytes, process, used_bytes, kills, code } => json!({
            "kind": "out_of_memory",
            "limit_bytes": limit_bytes,
            "process": process,
            "used_bytes": used_bytes,
            "kills": kills,
            "code": code,
        }),
        Outcome::ForbiddenSystemCall { code } => json!({ "kind": "forbidden_system_call", "code": code }),
        Outcome::NeverStarted { failure, code } => {
            json!({ "kind": "never_started", "reason": failure.message, "code": code })
        }
        Outcome::Indeterminate { failure } => json!({ "kind": "indeterminate", "reason": failure.message }),
    }
}

fn killed_suffix(killed: bool) -> &'static str {
    if killed { ", killed because it did not end by itself" } else { "" }
}

/// Text as it is; anything else as `{"base64": …}`, because JSON has no bytes.
pub(super) fn text_or_base64(bytes: &[u8]) -> serde_json::Value {
    use base64::Engine;
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => serde_json::json!({ "base64": base64::engine::general_purpose::STANDARD.encode(bytes) }),
    }
}

/// Names and reasons come from the sandbox; a terminal must not obey them.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { '?' } else { character }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::work::{Code, ToolFailure};

    fn failure() -> ToolFailure {
        ToolFailure::new(Code::SandboxLost, "gone", "try again")
    }

    #[test]
    fn exit_codes_follow_the_documented_table() {
        let killed = |mode, killed| Outcome::Cancelled { mode, before_start: false, killed, code: -1 };
        let cases = [
            (Outcome::Exited { code: 3 }, 3),
            (Outcome::Signaled { signal: 11, core_dumped: true }, 139),
            (Outcome::TimedOut { after: Duration::from_secs(1), killed: true, code: -1 }, 124),
            (killed(CancelMode::Interrupt, false), 130),
            (killed(CancelMode::Terminate, false), 143),
            (killed(CancelMode::Interrupt, true), 137),
            (Outcome::OutOfMemory { limit_bytes: 1, process: "x".into(), used_bytes: 0, kills: 1, code: -1 }, 137),
            (Outcome::OutOfMemory { limit_bytes: 1, process: "x".into(), used_bytes: 0, kills: 1, code: 9 }, 9),
            (Outcome::ForbiddenSystemCall { code: -1 }, 159),
            (Outcome::NeverStarted { failure: failure(), code: 126 }, 126),
            (Outcome::NeverStarted { failure: failure(), code: 127 }, 127),
            (Outcome::Indeterminate { failure: failure() }, 125),
        ];
        for (outcome, expected) in cases {
            assert_eq!(exit_code(&outcome), expected, "{outcome:?}");
        }
    }

    #[test]
    fn cause_names_the_limit_and_the_victim() {
        let outcome = Outcome::OutOfMemory {
            limit_bytes: 64 << 20,
            process: "python3".into(),
            used_bytes: 0,
            kills: 1,
            code: -1,
        };

        assert_eq!(cause(&outcome).as_deref(), Some("out of memory: limit 64 MiB reached, killed python3"));
        let outcome =
            Outcome::OutOfMemory { limit_bytes: 0, process: "tail".into(), used_bytes: 94 << 20, kills: 1, code: 137 };
        assert_eq!(cause(&outcome).as_deref(), Some("out of memory: killed tail, which used 94 MiB"));
        assert_eq!(cause(&Outcome::Exited { code: 1 }), None);
    }

    #[test]
    fn bytes_that_are_no_text_are_encoded() {
        assert_eq!(text_or_base64("é".as_bytes()), json!("é"));
        assert_eq!(text_or_base64(&[0xff]), json!({ "base64": "/w==" }));
    }

    #[test]
    fn names_from_the_sandbox_cannot_steer_the_terminal() {
        let outcome =
            Outcome::OutOfMemory { limit_bytes: 0, process: "\u{1b}[2Jx\n".into(), used_bytes: 0, kills: 1, code: -1 };

        assert_eq!(cause(&outcome).as_deref(), Some("out of memory: killed ?[2Jx?"));
    }
}
