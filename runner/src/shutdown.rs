//! Signals as events, and the order in which a runner ends.
//!
//! The first SIGTERM or SIGINT asks for a drain, the second ends what still runs and delivers its results, the third ends the
//! process. SIGUSR1 leaves the sandboxes to the
//! next runner; a service manager sends it for a restart. SIGHUP looks at the certificates again. Nothing here decides what a drain is.

use std::io;

use tokio::signal::unix::{Signal as Stream, SignalKind, signal};

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Look at files that may have changed.
    Reload,
    /// End, and leave every sandbox as it is.
    Leave,
    /// End when accepted calls have ended.
    Drain,
    /// End what still runs, and then the process.
    Now,
}

/// The signals of this process.
#[derive(Debug)]
pub struct Signals {
    terminate: Stream,
    interrupt: Stream,
    hangup: Stream,
    leave: Stream,
    seen: bool,
}

impl Signals {
    /// Takes the signals over; from here they no longer end the process.
    ///
    /// # Errors
    /// When the runtime cannot listen to signals.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
            leave: signal(SignalKind::user_defined1())?,
            seen: false,
        })
    }

    /// The next signal. Safe to drop.
    pub async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hangup.recv() => return Signal::Reload,
            _ = self.leave.recv() => return Signal::Leave,
        }
        if std::mem::replace(&mut self.seen, true) { Signal::Now } else { Signal::Drain }
    }
}
