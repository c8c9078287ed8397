//! The work of a sandbox is ended and its files stay.
//!
//! For a session that has had no call for long. Every process of the workload is killed, also one that stands still: what earlier
//! calls have left, the shell, the worker and the spare. Process 1 and the spawner stay, and with them everything that is
//! held by the sandbox alone: its root filesystem, which may be in memory, its id range, the output of its calls. The next call
//! begins like one after the death of a shell, and is told what is gone.

use proto::init::v1::{Done, Failure, Note, NoteKind, frame};

use super::call::Phase;
use super::cause::note;
use super::clock::{MILLISECOND, Moment, now};
use super::event::Key;
use super::prepare::Refusal;
use super::requests::SHELL_DELAY;
use super::serve::Engine;

/// How long processes may take to be gone. Only one that waits in the kernel for a disk takes longer than moments.
const PATIENCE: u64 = 5_000 * MILLISECOND;
/// How often is looked whether they are.
const LOOK_INTERVAL: u64 = 5 * MILLISECOND;

/// The work was ended, or is about to be. It lasts until the next call.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stop {
    step: Step,
    /// Processes of earlier calls that were there.
    left: usize,
    /// There was a shell that could have had a state.
    had_shell: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// They are killed, and not all of them are gone.
    Killed {
        /// Who waits for it; nobody after a reconnect.
        request: Option<u64>,
        /// When it is looked again.
        look_at: Moment,
        give_up_at: Moment,
    },
    /// Nothing of the workload is there.
    Over,
    /// Some of it does not end.
    Stuck,
}

impl Stop {
    /// When it is looked again whether everything is gone.
    pub(super) fn due(&self) -> Option<Moment> {
        match self.step {
            Step::Killed { look_at, .. } => Some(look_at),
            Step::Over | Step::Stuck => None,
        }
    }

    /// Whether processes are being ended.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.step, Step::Killed { .. })
    }

    /// Whether nothing of the workload is there.
    pub(super) fn is_over(&self) -> bool {
        self.step == Step::Over
    }

    fn note(&self) -> Note {
        let mut gone = Vec::new();
        if self.had_shell {
            gone.push("the shell with its variables, functions, options and jobs".to_owned());
        }
        match self.left {
            0 => {}
            1 => gone.push("a process that an earlier call had left".to_owned()),
            left => gone.push(format!("{left} processes that earlier calls had left")),
        }
        let gone = if gone.is_empty() { String::new() } else { format!(": {}", gone.join(", ")) };
        let text = format!(
            "there was no call for long, so every process of this session was ended{gone}; files and the working directory are as \
             they were"
        );
        note(NoteKind::ProcessesEnded, text)
    }
}

impl Engine {
    /// Kills everything of the workload. It is answered when that is gone.
    pub(super) fn stop_work(&mut self, request_id: u64) -> Result<(), Refusal> {
        if self.shutdown.is_some() {
            return Err(Refusal::Busy("the sandbox is shutting down".to_owned()));
        }
        if self.calls.values().any(|call| !matches!(call.phase, Phase::Finished(_))) {
            return Err(Refusal::Busy("a call is prepared or running".to_owned()));
        }
        let before = self.stop.take();
        let left: usize = self.slots.left().map(|(_, pids)| pids.len()).sum();
        let had_shell = self.shells.current.as_ref().is_some_and(|shell| shell.is_ready);
        self.shells.lost_idle |= had_shell;
        // Nothing is made ahead of a call that may never come.
        self.shells.wanted = false;
        self.shells.just_left = None;
        self.spare_at = None;
        self.end_shell();
        self.end_idle_worker();
        self.spawner.unpark();
        self.slots.drop_spare();
        self.slots.kill_all();
        let now = now();
        let step = Step::Killed { request: Some(request_id), look_at: now, give_up_at: now.saturating_add(PATIENCE) };
        // Asked again, it is told of both what was there then and what was there now.
        self.stop = Some(match before {
            None => Stop { step, left, had_shell },
            Some(before) => Stop { step, left: before.left.max(left), had_shell: before.had_shell || had_shell },
        });
        Ok(())
    }

    /// Looks whether everything that was killed is gone.
    pub(super) fn look_at_stop(&mut self, now: Moment) {
        let Some(stop) = self.stop else { return };
        let Step::Killed { request, look_at, give_up_at } = stop.step else { return };
        if look_at > now {
            return;
        }
        self.slots.sweep();
        let (step, answer) = if !self.slots.has_processes() {
            (Step::Over, Some(frame::Body::Done(Done {})))
        } else if give_up_at <= now {
            let message = "a process of the sandbox does not end".to_owned();
            (Step::Stuck, Some(frame::Body::Failure(Failure { code: "INTERNAL".to_owned(), message })))
        } else {
            // Where slots are read from /proc, one may have been made behind the reading.
            self.slots.kill_all();
            (Step::Killed { request, look_at: now.saturating_add(LOOK_INTERVAL), give_up_at }, None)
        };
        self.stop = Some(Stop { step, ..stop });
        if let (Some(request_id), Some(body)) = (request, answer) {
            self.send_answer(request_id, body);
        }
    }

    /// Another runner has come: whoever waited for the end of the processes is gone.
    pub(super) fn forget_who_stopped(&mut self) {
        if let Some(Stop { step: Step::Killed { request, .. }, .. }) = &mut self.stop {
            *request = None;
        }
    }

    /// The first call after it: the sandbox works as ever, and the call says what is gone.
    pub(super) fn begin_after_stop(&mut self, key: Key) -> Result<(), Refusal> {
        let stop = self.stop.take();
        if stop.is_some() {
            self.shells.wanted = true;
            self.shells.not_before = now().saturating_add(SHELL_DELAY);
        }
        let begun = self.begin(key);
        match (&begun, stop) {
            (Ok(()), Some(stop)) => match self.calls.get_mut(&key).map(|call| &mut call.phase) {
                Some(Phase::Running(running)) => running.notes.push(stop.note()),
                Some(Phase::Finished(finished)) => finished.message.notes.push(stop.note()),
                Some(Phase::Prepared) | None => {}
            },
            (Err(_), stop) => self.stop = stop,
            (Ok(()), None) => {}
        }
        begun
    }
}
