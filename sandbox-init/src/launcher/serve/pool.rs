//! Privileged: takes id ranges and has blanks made in them.
//!
//! Keeps as many blanks as requests wait, and when nobody asks for anything as many as the policy wants on top. A host on
//! which blanks fail one after the other has its requests refused instead of tried for ever.

use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::epoll::EpollTimeout;
use proto::launch::v1::reply::Body as Answer;

use super::answers::no_slot_left;
use super::process::{Phase, Process};
use super::{Event, Launcher};
use crate::launcher::background::{Order, Report, blank_from};
use crate::launcher::validate::refusal;

/// Time without a request before the pool is filled again: on a small machine a refill competes with the sandbox that was
/// just handed out.
const REFILL_DELAY: Duration = Duration::from_millis(15);
/// Blanks that may fail one after the other before requests are refused instead of tried again.
const MAX_FAILURES: u32 = 3;

impl Launcher<'_> {
    /// Orders the blanks that are missing. For requests that wait at once, for the pool when it has been quiet for a moment.
    pub(super) fn refill(&mut self) {
        // Requests that wait hear of the end when their connection closes.
        if self.stopping.is_some() {
            return;
        }
        let idle = self.last_request.elapsed() >= REFILL_DELAY;
        while self.blanks() < if idle { self.wanted_blanks() } else { self.waiting.len() } {
            match self.parts.slots.take() {
                Ok(Some(slot)) => {
                    let number = self.number();
                    let name = format!("{}-{number:x}", self.parts.prefix);
                    let order = Order {
                        make: name.clone(),
                        slot: slot.number,
                        base: slot.base,
                        count: slot.count,
                        ..Order::default()
                    };
                    self.making.insert(name, slot);
                    self.order(&order);
                }
                Ok(None) | Err(_) => {
                    // All ids are taken. A blank of ours would have been handed out; what waits is refused now, not later.
                    if self.blanks() == 0 && self.removing.is_empty() {
                        while let Some(waiting) = self.waiting.pop_front() {
                            self.answer(
                                waiting.connection,
                                waiting.request_id,
                                Answer::Failure(no_slot_left(self.parts.shape)),
                            );
                        }
                    }
                    return;
                }
            }
        }
    }

    /// A blank is there: the first request that waits gets it.
    pub(super) fn made(&mut self, report: Report, descriptors: Vec<OwnedFd>) {
        let Some(slot) = self.making.remove(&report.made) else { return };
        let Some(blank) = blank_from(report, descriptors) else { return self.parts.slots.release(slot) };
        let number = self.number();
        let (Ok(pidfd), Ok(boot)) = (blank.pidfd.try_clone(), blank.boot.try_clone()) else { return };
        if self.watch(&pidfd, Event::Ended(number)).is_err() || self.watch(&boot, Event::Boot(number)).is_err() {
            return;
        }
        self.failures = 0;
        let process = Process {
            name: blank.name.clone(),
            pid: blank.pid.as_raw(),
            pidfd,
            boot: Some(boot),
            blank: Some(blank),
            slot,
            phase: Phase::Blank,
            adopted: false,
            record: None,
        };
        self.processes.insert(number, process);
        if self.stopping.is_some() {
            self.kill(number, None);
        } else {
            self.hand_out();
        }
    }

    /// A blank could not be made: its ids are free again.
    pub(super) fn make_failed(&mut self, report: &Report) {
        self.failures += 1;
        let names: Vec<String> =
            self.making.iter().filter(|(_, slot)| slot.number == report.slot).map(|(n, _)| n.clone()).collect();
        for name in names {
            if let Some(slot) = self.making.remove(&name) {
                self.parts.slots.release(slot);
            }
        }
        if self.failures >= MAX_FAILURES || self.blanks() == 0 {
            if let Some(waiting) = self.waiting.pop_front() {
                let mut failure = refusal(
                    "LAYER_MISSING",
                    format!("no sandbox can be prepared: {}", report.failure),
                    "run `sandbox-runner doctor`",
                );
                failure.errno = report.errno;
                self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
            }
        }
    }

    /// Blanks that are there or on their way.
    fn blanks(&self) -> usize {
        self.processes.values().filter(|process| matches!(process.phase, Phase::Blank)).count() + self.making.len()
    }

    fn wanted_blanks(&self) -> usize {
        if self.stopping.is_some() || self.failures >= MAX_FAILURES && self.waiting.is_empty() {
            return 0;
        }
        self.waiting.len() + self.parts.policy.pool as usize
    }

    /// How long the loop may sleep: until orders can be tried again, or the pool be filled.
    pub(super) fn timeout(&self) -> EpollTimeout {
        if !self.orders.is_empty() {
            EpollTimeout::from(2_u8)
        } else if self.wanted_blanks() > self.blanks() {
            EpollTimeout::from(u8::try_from(REFILL_DELAY.as_millis()).unwrap_or(u8::MAX))
        } else {
            EpollTimeout::NONE
        }
    }
}
