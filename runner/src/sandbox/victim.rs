//! Names whom the kernel has killed for memory, at the end of a call in which it has.
//!
//! Process 1 counts kills and does not see whom they hit; the launcher does, where the kernel shows it its log. The end of such a call
//! waits for the launcher's word, briefly: a name is information, and without it the end is told as it is.

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;

use super::launch::{Inspection, Launcher, MemoryKill};
use crate::config::units::display_size;
use crate::work::{CallEnd, CallEvent, CallObserver, NoteKind, Outcome, SandboxId};

/// How long the end of a call waits for the name.
const PATIENCE: Duration = Duration::from_secs(1);

/// Hears of the end of a call before its observer does.
pub(super) struct Naming {
    observer: Arc<dyn CallObserver>,
    launcher: Launcher,
    sandbox_id: SandboxId,
}

impl Naming {
    /// Stands before `observer`, which hears of everything in the same order.
    pub(super) fn before(
        observer: Arc<dyn CallObserver>,
        launcher: &Launcher,
        sandbox_id: &SandboxId,
    ) -> Arc<dyn CallObserver> {
        Arc::new(Self { observer, launcher: launcher.clone(), sandbox_id: sandbox_id.clone() })
    }
}

impl CallObserver for Naming {
    fn observe(&self, event: CallEvent) {
        let mut end = match event {
            CallEvent::Finished(end) if was_starved(&end) => end,
            event => return self.observer.observe(event),
        };
        let (observer, launcher) = (Arc::clone(&self.observer), self.launcher.clone());
        let sandbox_id = self.sandbox_id.clone();
        // Nothing follows the end of a call, so nothing can overtake it.
        tokio::spawn(async move {
            match tokio::time::timeout(PATIENCE, launcher.inspect(sandbox_id.as_str())).await {
                Ok(Ok(seen)) => name_victim(&mut end, &seen),
                Ok(Err(error)) => debug!(%sandbox_id, %error, "the launcher does not say who was killed"),
                Err(_) => debug!(%sandbox_id, "the launcher has not said in time who was killed"),
            }
            observer.observe(CallEvent::Finished(end));
        });
    }
}

/// The kernel has killed processes of this call for memory.
fn was_starved(end: &CallEnd) -> bool {
    matches!(end.outcome, Outcome::OutOfMemory { .. })
        || end.notes.iter().any(|note| note.kind == NoteKind::MemoryKills)
}

/// Writes down the newest victim of the sandbox, which was one of this call: it has just ended. Unless the log has no record of
/// that very kill.
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
        } else if *kills == 1 {
            *used_bytes = *used;
        }
    } else if let Some(note) = end.notes.iter_mut().find(|note| note.kind == NoteKind::MemoryKills) {
        note.text.push_str(&format!("; the last was {}", described(victim, *used)));
    }
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
    use std::sync::Mutex;

    use proto::launch::v1 as wire;
    use tokio::sync::Notify;

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
        assert_eq!(named(starved("python3", 1), &seen(&[(1, "thread", 5)], 1)), ("python3".into(), 5));
        assert_eq!(named(starved("python3", 2), &seen(&[(2, "child", 5)], 2)), ("python3".into(), 0));
    }

    #[test]
    fn note_about_kills_that_the_command_survived_names_the_last_one() {
        let mut end = CallEnd::without_output(Outcome::Exited { code: 0 });
        end.notes.push(Note { kind: NoteKind::MemoryKills, text: "2 processes were killed".into() });
        name_victim(&mut end, &seen(&[(2, "cc1plus", 498 << 20)], 2));
        assert_eq!(end.notes[0].text, "2 processes were killed; the last was cc1plus, which used 498 MiB");
    }

    #[derive(Default)]
    struct Recorder {
        ends: Mutex<Vec<CallEnd>>,
        told: Notify,
    }

    impl CallObserver for Recorder {
        fn observe(&self, event: CallEvent) {
            if let CallEvent::Finished(end) = event {
                self.ends.lock().expect("no panic holds it").push(*end);
                self.told.notify_one();
            }
        }
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
            let recorder = Arc::new(Recorder::default());
            let sandbox_id = SandboxId::new("a").expect("valid");
            let naming = Naming::before(Arc::clone(&recorder) as Arc<dyn CallObserver>, &launcher, &sandbox_id);

            naming.observe(CallEvent::Finished(Box::new(starved("", 1))));
            recorder.told.notified().await;

            let ends = std::mem::take(&mut *recorder.ends.lock().expect("no panic holds it"));
            assert!(
                matches!(&ends[0].outcome, Outcome::OutOfMemory { process, .. } if process == expected),
                "{ends:?}"
            );
        }
    }
}
