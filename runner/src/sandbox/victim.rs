//! Names whom the kernel has killed for memory, at the end of a call in which it has.
//!
//! Process 1 counts kills and does not see whom they hit; the launcher does, where the kernel shows it its log. The end of such a call
//! waits for the launcher's word, briefly: a name is information, and without it the end is told as it is.

use std::time::Duration;

use tracing::debug;

use super::launch::{Inspection, Launcher, MemoryKill};
use crate::config::units::display_size;
use crate::work::{CallEnd, NoteKind, Outcome, SandboxId};

/// How long the end of a call waits for the name.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of the name that the kernel keeps of a process (`TASK_COMM_LEN` without its end).
const NAME_BYTES: usize = 15;

/// The end of a call, with the name where there is one to be had.
pub(super) async fn explained(launcher: Launcher, sandbox_id: SandboxId, mut end: CallEnd) -> CallEnd {
    if !was_starved(&end) {
        return end;
    }
    match tokio::time::timeout(PATIENCE, launcher.inspect(sandbox_id.as_str())).await {
        Ok(Ok(seen)) => name_victim(&mut end, &seen),
        Ok(Err(error)) => debug!(%sandbox_id, %error, "the launcher does not say who was killed"),
        Err(_) => debug!(%sandbox_id, "the launcher has not said in time who was killed"),
    }
    end
}

/// The kernel has killed processes of this call for memory.
fn was_starved(end: &CallEnd) -> bool {
    matches!(end.outcome, Outcome::OutOfMemory { .. })
        || end.notes.iter().any(|note| note.kind == NoteKind::MemoryKills)
}

/// Writes down the newest victim of the sandbox: the call has just ended, so it was of this call, or of what runs beside it in the
/// same sandbox. Unless the log does not name that very kill.
fn name_victim(end: &mut CallEnd, seen: &Inspection) {
    let Some(MemoryKill { process: victim, used_bytes: used, .. }) =
        seen.memory_kills.last().filter(|kill| kill.number > 0 && kill.number >= seen.oom_kills)
    else {
        return;
    };
    if let Outcome::OutOfMemory { process, used_bytes, kills, .. } = &mut end.outcome {
        if process.is_empty() {
            process.clone_from(victim);
            *used_bytes = *used;
        } else if *kills == 1 && kept_name(process) == victim.as_bytes() {
            *used_bytes = *used;
        }
    } else if let Some(note) = end.notes.iter_mut().find(|note| note.kind == NoteKind::MemoryKills) {
        note.text.push_str(&format!("; the last was {}", described(victim, *used)));
    }
}

/// A program as the kernel calls its process.
fn kept_name(program: &str) -> &[u8] {
    let name = program.rsplit('/').next().unwrap_or_default().as_bytes();
    &name[..name.len().min(NAME_BYTES)]
}

/// A victim and what it used, as far as that is known.
pub(super) fn described(process: &str, used_bytes: u64) -> String {
    match used_bytes {
        0 => process.to_owned(),
        bytes => format!("{process}, which used {}", display_size(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use proto::launch::v1 as wire;

    use super::*;
    use crate::sandbox::launch::tests::{launcher, reply};
    use crate::work::Note;

    fn starved(process: &str, kills: u64) -> CallEnd {
        let outcome =
            Outcome::OutOfMemory { limit_bytes: 1 << 30, process: process.into(), used_bytes: 0, kills, code: 137 };
        CallEnd::without_output(outcome)
    }

    fn seen(kills: &[(u64, &str, u64)], oom_kills: u64) -> Inspection {
        let kill = |(number, process, used_bytes): &(u64, &str, u64)| MemoryKill {
            number: *number,
            process: (*process).to_owned(),
            used_bytes: *used_bytes,
        };
        Inspection { oom_kills, memory_kills: kills.iter().map(kill).collect(), ..Inspection::default() }
    }

    fn named(mut end: CallEnd, seen: &Inspection) -> (String, u64) {
        name_victim(&mut end, seen);
        match end.outcome {
            Outcome::OutOfMemory { process, used_bytes, .. } => (process, used_bytes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn newest_victim_is_named_only_when_its_record_is_that_of_the_newest_kill() {
        let both = [(1, "old", 1), (2, "tail", 96 << 20)];
        assert_eq!(named(starved("", 1), &seen(&both, 2)), ("tail".into(), 96 << 20));
        assert_eq!(named(starved("", 1), &seen(&both, 3)), (String::new(), 0), "the record of the third is lost");
        assert_eq!(named(starved("", 1), &seen(&[], 1)), (String::new(), 0));
        assert_eq!(named(starved("", 1), &seen(&[(0, "unknown", 1)], 0)), (String::new(), 0));
    }

    #[test]
    fn program_that_process_1_has_named_keeps_its_name() {
        assert_eq!(named(starved("python3", 1), &seen(&[(1, "python3", 5)], 1)), ("python3".into(), 5));
        let long = "a-name-that-is-longer-than-it-is-kept";
        assert_eq!(named(starved(long, 1), &seen(&[(1, "a-name-that-is-", 5)], 1)), (long.into(), 5));
        assert_eq!(named(starved("python3", 1), &seen(&[(1, "of-another-call", 5)], 1)), ("python3".into(), 0));
        assert_eq!(named(starved("python3", 2), &seen(&[(2, "child", 5)], 2)), ("python3".into(), 0));
    }

    #[test]
    fn note_about_kills_that_the_command_survived_names_the_last_one() {
        let mut end = CallEnd::without_output(Outcome::Exited { code: 0 });
        end.notes.push(Note { kind: NoteKind::MemoryKills, text: "2 processes were killed".into() });
        name_victim(&mut end, &seen(&[(2, "cc1plus", 498 << 20)], 2));
        assert_eq!(end.notes[0].text, "2 processes were killed; the last was cc1plus, which used 498 MiB");
    }

    #[tokio::test]
    async fn end_of_a_call_is_told_with_the_name_or_without() {
        for (answers, expected) in [(true, "tail"), (false, "")] {
            let launcher = launcher(move |request| {
                let mut inspection = wire::SandboxInspection { oom_kills: 1, ..Default::default() };
                let process = "tail".to_owned();
                inspection.memory_kills.push(wire::MemoryKill { number: 1, process, used_bytes: 1 });
                let failure = wire::Failure { code: "SANDBOX_UNKNOWN".to_owned(), ..Default::default() };
                let body = match answers {
                    true => wire::reply::Body::Inspection(inspection),
                    false => wire::reply::Body::Failure(failure),
                };
                vec![reply(request.request_id, body)]
            });
            let sandbox_id = SandboxId::new("a").expect("valid");
            let end = explained(launcher, sandbox_id, starved("", 1)).await;
            assert!(matches!(&end.outcome, Outcome::OutOfMemory { process, .. } if process == expected), "{end:?}");
        }
    }
}
