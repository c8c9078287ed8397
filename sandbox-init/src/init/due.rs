//! What process 1 does by the clock, and what it puts off until nobody waits.

use nix::sys::epoll::EpollTimeout;

use super::ExitReason;
use super::call::{Body, Phase};
use super::clock::{MILLISECOND, Moment, now};
use super::event::Key;
use super::serve::Engine;

/// How long after a call has taken the spare slot the next one is made.
const SPARE_DELAY: u64 = 2 * MILLISECOND;
/// How often slots of finished calls are looked at again.
const SWEEP_INTERVAL: u64 = 500 * MILLISECOND;

impl Engine {
    /// How long to wait for events. What is due within a second is a timeout, which costs nothing; only for the rest the
    /// alarm is set, which also counts the time while the machine sleeps.
    pub(super) fn sleep_until(&mut self, due: Option<Moment>) -> EpollTimeout {
        let Some(due) = due else { return EpollTimeout::NONE };
        let milliseconds = due.saturating_sub(now()).div_ceil(MILLISECOND);
        match u16::try_from(milliseconds) {
            Ok(milliseconds @ 0..=1000) => EpollTimeout::from(milliseconds),
            _ => {
                self.alarm.wake_at(Some(due));
                EpollTimeout::NONE
            }
        }
    }

    /// Earliest moment at which something is due.
    pub(super) fn next_due(&self) -> Option<Moment> {
        let mut due = [
            self.deadline,
            self.orphan_at(),
            self.next_sweep,
            self.shutdown.map(|shutdown| shutdown.kill_at),
            self.stop.and_then(|stop| stop.due()),
            self.shell_at(),
            // No spare is made on the way out: its moment would pass and the loop never sleep again.
            self.spare_at.filter(|_| self.shutdown.is_none() && self.shells.wanted),
        ]
        .into_iter()
        .flatten()
        .min();
        for call in self.calls.values() {
            let Phase::Running(running) = &call.phase else { continue };
            let ending = running.ending.map(|ending| ending.next);
            let settling = match &running.body {
                Body::Worker(body) => body.settling.as_ref().map(|settling| settling.until),
                Body::Process(_) | Body::Shell(_) => None,
            };
            let deadline = settling.or(ending).or(running.deadline);
            let announce = (self.connection.is_some() && running.total_output() > running.announced.output)
                .then_some(running.announced.next_output);
            let is_untold = running.announced.has_begun && !running.announced.started || call.answer_to.is_some();
            let start = (self.connection.is_some() && is_untold)
                .then_some(running.started.saturating_add(super::report::STARTED_AFTER));
            due = [due, deadline, running.spool_at.filter(|_| settling.is_none()), announce, start]
                .into_iter()
                .flatten()
                .min();
        }
        due
    }

    /// When a shell is started ahead of need; `None` when there is no need, or when something else has to happen first.
    pub(super) fn shell_at(&self) -> Option<Moment> {
        let waits = self.shells.wanted && self.shells.current.is_none() && !self.has_running();
        waits.then_some(self.shells.not_before)
    }

    fn orphan_at(&self) -> Option<Moment> {
        let timeout = u64::try_from(self.orphan_timeout?.as_nanos()).unwrap_or(u64::MAX);
        Some(self.alone_since?.saturating_add(timeout))
    }

    pub(super) fn run_due(&mut self, now: Moment) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.exit = Some(ExitReason::DeadlinePassed);
        }
        if self.orphan_at().is_some_and(|moment| moment <= now) {
            self.exit = Some(ExitReason::Orphaned);
        }
        if self.shutdown.is_some_and(|shutdown| shutdown.kill_at <= now || !self.has_running()) {
            self.exit = Some(ExitReason::Shutdown);
        }
        let running: Vec<Key> =
            self.calls.values().filter(|call| matches!(call.phase, Phase::Running(_))).map(|call| call.key).collect();
        for key in running {
            self.run_due_of_call(key, now);
        }
        self.look_at_stop(now);
        if self.next_sweep.is_some_and(|sweep| sweep <= now) {
            self.next_sweep = self.slots.sweep().then(|| now.saturating_add(SWEEP_INTERVAL));
        }
    }

    pub(super) fn has_running(&self) -> bool {
        self.calls.values().any(|call| matches!(call.phase, Phase::Running(_)))
    }

    /// What was put off until the answer was on its way.
    pub(super) fn do_idle_work(&mut self) {
        if self.exit.is_some() || self.shutdown.is_some() {
            return;
        }
        self.settle_shell();
        self.settle_worker();
        if self.shells.wanted {
            self.settle_spare();
        }
        if self.slots.is_unswept() {
            self.slots.sweep();
        }
        if self.slots.has_left() && self.next_sweep.is_none() {
            self.next_sweep = Some(now().saturating_add(SWEEP_INTERVAL));
        }
    }

    /// Makes the slot and the parked process of the next call, a moment after the last ones were taken: a sandbox that lives
    /// for one call does not need them, and would have to end them.
    fn settle_spare(&mut self) {
        if self.slots.has_spare() {
            self.spare_at = None;
            return;
        }
        let now = now();
        if *self.spare_at.get_or_insert(now.saturating_add(SPARE_DELAY)) > now {
            return;
        }
        // Without a spare the next call makes its slot itself, and reports what is wrong.
        let made = self.slots.prepare();
        let parked = self.spawner.park(self.slots.prepared());
        self.slots.set_parked(parked);
        self.spare_at = made.is_err().then(|| now.saturating_add(SWEEP_INTERVAL));
    }
}

#[cfg(test)]
mod tests {
    use super::super::serve::Shutdown;
    use super::super::slot::Slots;
    use super::super::testing::context;
    use super::*;

    #[test]
    fn a_spare_that_is_due_keeps_nobody_awake_once_the_end_is_ordered() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut engine = Engine::new(context(directory.path(), Slots::scan())).expect("an engine");
        engine.shells.wanted = true;
        engine.shells.not_before = Moment::MAX;
        engine.settle_spare();
        assert!(engine.next_due().is_some_and(|due| due <= now().saturating_add(SPARE_DELAY)), "no spare is due");

        let kill_at = now().saturating_add(20_000 * MILLISECOND);
        engine.shutdown = Some(Shutdown { kill_at });
        engine.do_idle_work();

        assert_eq!(engine.next_due(), Some(kill_at));
    }
}
