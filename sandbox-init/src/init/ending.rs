//! How a call is ended, step by step. Pure: it says what to send and when to look again.
//!
//! A command in the shell is interrupted so that the shell survives and nothing that follows in its list begins: SIGINT to bash
//! first and then to the others, because bash decides by its own SIGINT whether the rest of a list still runs. Where a child
//! ends otherwise than by SIGINT, bash would go on; so it gets [`super::shell::LIST_SIGNAL`] as well, whose trap breaks off the
//! list as soon as that child is gone. Bash is killed last and only if nothing else helped.
//! A process of its own gets SIGTERM, and SIGKILL after the grace time.

use nix::sys::signal::Signal;
use proto::init::v1::CancelMode;

use super::cause::Ender;
use super::clock::{MILLISECOND, Moment};

/// Time between two rounds.
const ROUND_MS: u64 = 20;
/// Rounds of an interrupted command: SIGTERM from here.
const TERM_ROUND: u64 = 5;
/// Rounds of an interrupted command: SIGKILL from here.
const KILL_ROUND: u64 = 9;
/// Rounds that the shell is given after everything else was killed: two seconds, because on a busy machine it may not have run
/// at all in a fifth of one, and with it goes the state that an interrupt is meant to keep.
const SHELL_ROUNDS: u64 = 100;

/// A call that is being ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    /// Why.
    pub(crate) ender: Ender,
    /// How hard.
    pub(crate) mode: CancelMode,
    /// Since when, at this hardness.
    began: Moment,
    /// The next step is due then.
    pub(crate) next: Moment,
    /// The last signal sent to the first process.
    sent: Option<Signal>,
    /// SIGKILL was sent.
    pub(crate) killed: bool,
    /// SIGTERM or SIGKILL was sent to a command in the shell.
    pub(crate) escalated: bool,
    /// The shell was told to break off its list.
    pub(crate) breaks_list: bool,
}

/// The first process of a call, and how it takes an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leader {
    /// A program of its own.
    Program,
    /// The shell.
    Shell,
    /// A program that has taken the place of the shell (`exec`), or a shell that is not ready.
    Successor,
}

/// Signals of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// To the first process: the shell, or the program. Sent first, except SIGKILL.
    pub(crate) leader: Option<Signal>,
    /// To the shell right after that: break off the list.
    pub(crate) breaks_list: bool,
    /// To every other process of the slot.
    pub(crate) others: Option<Signal>,
}

impl Ending {
    /// Begins to end a call now.
    pub(crate) fn new(ender: Ender, mode: CancelMode, now: Moment) -> Self {
        Self { ender, mode, began: now, next: now, sent: None, killed: false, escalated: false, breaks_list: false }
    }

    /// Makes it harder, never softer; the first reason stays unless it is a cancel of a higher degree.
    pub(crate) fn harden(&mut self, ender: Ender, mode: CancelMode, now: Moment) {
        if mode as i32 <= self.mode as i32 {
            return;
        }
        if matches!(self.ender, Ender::Cancel(_)) || matches!(ender, Ender::Shutdown) {
            self.ender = ender;
        }
        self.mode = mode;
        self.began = now;
        self.next = now;
    }

    /// The step that is due, and moves on to the next one.
    pub(crate) fn step(&mut self, leader: Leader, grace_ms: u64, now: Moment) -> Step {
        let elapsed_ms = now.saturating_sub(self.began) / MILLISECOND;
        let step = match leader {
            Leader::Program => {
                let signal = process_signal(self.mode, elapsed_ms, grace_ms);
                // Once is enough, except for SIGKILL: the program may have started another process meanwhile.
                if self.sent == Some(signal) && signal != Signal::SIGKILL { nothing() } else { all(signal) }
            }
            Leader::Shell => {
                let step = shell_step(self.mode, elapsed_ms, grace_ms);
                Step { breaks_list: step.leader == Some(Signal::SIGINT), ..step }
            }
            Leader::Successor => shell_step(self.mode, elapsed_ms, grace_ms),
        };
        self.sent = step.leader.or(self.sent);
        self.killed |= step.leader == Some(Signal::SIGKILL) || step.others == Some(Signal::SIGKILL);
        self.escalated |= leader != Leader::Program && step.others != Some(Signal::SIGINT);
        self.breaks_list |= step.breaks_list;
        self.next = now.saturating_add(ROUND_MS.saturating_mul(MILLISECOND));
        step
    }
}

fn shell_step(mode: CancelMode, elapsed_ms: u64, grace_ms: u64) -> Step {
    let (term_at, kill_at) = match mode {
        CancelMode::Kill => return all(Signal::SIGKILL),
        CancelMode::Terminate => (0, grace_ms),
        CancelMode::Unspecified | CancelMode::Interrupt => (TERM_ROUND * ROUND_MS, KILL_ROUND * ROUND_MS),
    };
    if elapsed_ms >= kill_at.saturating_add(SHELL_ROUNDS * ROUND_MS) {
        return all(Signal::SIGKILL);
    }
    let others = if elapsed_ms >= kill_at {
        Signal::SIGKILL
    } else if elapsed_ms >= term_at {
        Signal::SIGTERM
    } else {
        Signal::SIGINT
    };
    Step { leader: Some(Signal::SIGINT), breaks_list: false, others: Some(others) }
}

/// The signal that a process of its own should have received by now.
fn process_signal(mode: CancelMode, elapsed_ms: u64, grace_ms: u64) -> Signal {
    match mode {
        CancelMode::Kill => Signal::SIGKILL,
        CancelMode::Terminate if elapsed_ms >= grace_ms => Signal::SIGKILL,
        CancelMode::Terminate => Signal::SIGTERM,
        CancelMode::Unspecified | CancelMode::Interrupt if elapsed_ms < grace_ms => Signal::SIGINT,
        CancelMode::Unspecified | CancelMode::Interrupt => {
            process_signal(CancelMode::Terminate, elapsed_ms.saturating_sub(grace_ms), grace_ms)
        }
    }
}

fn nothing() -> Step {
    Step { leader: None, breaks_list: false, others: None }
}

fn all(signal: Signal) -> Step {
    Step { leader: Some(signal), breaks_list: false, others: Some(signal) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Signal::{SIGINT, SIGKILL, SIGTERM};

    fn steps(leader: Leader, mode: CancelMode, grace_ms: u64, at_ms: &[u64]) -> Vec<(Option<Signal>, Option<Signal>)> {
        let mut ending = Ending::new(Ender::Shutdown, mode, 0);
        let step = |at: &u64| ending.step(leader, grace_ms, at * MILLISECOND);
        at_ms.iter().map(step).map(|step| (step.leader, step.others)).collect()
    }

    #[test]
    fn an_interrupted_command_is_asked_told_and_killed_and_the_shell_comes_last() {
        assert_eq!(
            steps(Leader::Shell, CancelMode::Interrupt, 5000, &[0, 80, 100, 160, 180, 2160, 2180]),
            [
                (Some(SIGINT), Some(SIGINT)),
                (Some(SIGINT), Some(SIGINT)),
                (Some(SIGINT), Some(SIGTERM)),
                (Some(SIGINT), Some(SIGTERM)),
                (Some(SIGINT), Some(SIGKILL)),
                (Some(SIGINT), Some(SIGKILL)),
                (Some(SIGKILL), Some(SIGKILL)),
            ]
        );
    }

    #[test]
    fn a_shell_is_told_to_break_off_its_list_with_every_interrupt_and_nobody_else_is() {
        for (leader, breaks_list) in [(Leader::Shell, true), (Leader::Successor, false), (Leader::Program, false)] {
            for mode in [CancelMode::Interrupt, CancelMode::Terminate] {
                let mut ending = Ending::new(Ender::Shutdown, mode, 0);
                assert_eq!(ending.step(leader, 5000, 0).breaks_list, breaks_list, "{leader:?} {mode:?}");
                assert_eq!(ending.breaks_list, breaks_list);
            }
        }
        assert!(!Ending::new(Ender::Shutdown, CancelMode::Kill, 0).step(Leader::Shell, 0, 0).breaks_list);
    }

    #[test]
    fn a_terminated_program_has_its_grace_time() {
        assert_eq!(
            steps(Leader::Program, CancelMode::Terminate, 100, &[0, 20, 99, 100]),
            [(Some(SIGTERM), Some(SIGTERM)), (None, None), (None, None), (Some(SIGKILL), Some(SIGKILL))]
        );
    }

    #[test]
    fn a_program_that_ignores_an_interrupt_is_terminated_and_then_killed() {
        assert_eq!(
            steps(Leader::Program, CancelMode::Interrupt, 100, &[0, 50, 100, 150, 200]),
            [
                (Some(SIGINT), Some(SIGINT)),
                (None, None),
                (Some(SIGTERM), Some(SIGTERM)),
                (None, None),
                (Some(SIGKILL), Some(SIGKILL)),
            ]
        );
    }

    #[test]
    fn a_later_cancel_may_only_be_harder() {
        let mut ending = Ending::new(Ender::Timeout { after_ms: 1 }, CancelMode::Terminate, 0);
        ending.harden(Ender::Cancel(CancelMode::Interrupt), CancelMode::Interrupt, 5);
        assert_eq!(ending.mode, CancelMode::Terminate);
        ending.harden(Ender::Cancel(CancelMode::Kill), CancelMode::Kill, 5);
        assert_eq!((ending.mode, ending.ender), (CancelMode::Kill, Ender::Timeout { after_ms: 1 }));
    }
}
