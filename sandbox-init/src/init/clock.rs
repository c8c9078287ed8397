//! Time as process 1 counts it: CLOCK_BOOTTIME, which goes on while the machine sleeps.
//!
//! One timer descriptor serves every deadline. It is armed only when the next deadline is earlier than what it is armed
//! for already; an early wake-up finds nothing due and costs less than arming the timer for every call.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// A moment of CLOCK_BOOTTIME in nanoseconds.
pub(crate) type Moment = u64;

/// Nanoseconds in one millisecond.
pub(crate) const MILLISECOND: u64 = 1_000_000;

/// The present moment.
pub(crate) fn now() -> Moment {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        let nanoseconds = u64::try_from(time.tv_nsec()).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
    })
}

/// The one timer of the loop.
#[derive(Debug)]
pub(crate) struct Alarm {
    timer: TimerFd,
    armed: Option<Moment>,
}

impl Alarm {
    /// A disarmed timer.
    pub(crate) fn new() -> Result<Self, nix::Error> {
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
        Ok(Self { timer, armed: None })
    }

    /// Makes sure that the loop wakes up at `next` or earlier.
    pub(crate) fn wake_at(&mut self, next: Option<Moment>) {
        let Some(next) = next else { return };
        if self.armed.is_some_and(|armed| armed <= next) {
            return;
        }
        // A moment in the past fires at once; zero would disarm the timer instead.
        let expiration = Expiration::OneShot(TimeSpec::from_duration(Duration::from_nanos(next.max(1))));
        if self.timer.set(expiration, TimerSetTimeFlags::TFD_TIMER_ABSTIME).is_ok() {
            self.armed = Some(next);
        }
    }

    /// To be called when the descriptor is readable.
    pub(crate) fn acknowledge(&mut self) {
        // The timer is non-blocking: a spurious wake-up gives EAGAIN, which means the same as success here.
        let _ = self.timer.wait();
        self.armed = None;
    }
}

impl AsFd for Alarm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
