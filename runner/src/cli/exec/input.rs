//! What comes to the command from outside: signals and standard input.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::sandbox::control::Control;
use crate::work::{CallId, CancelMode, limits};

/// Ctrl-C and the service manager.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// SIGHUP and SIGQUIT, where our terminal must not be left in raw mode.
    leaving: Option<[Signal; 2]>,
}

impl Signals {
    pub(super) fn new(is_raw: bool) -> std::io::Result<Self> {
        let leaving = || Ok::<_, std::io::Error>([signal(SignalKind::hangup())?, signal(SignalKind::quit())?]);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            leaving: is_raw.then(leaving).transpose()?,
        })
    }

    pub(super) async fn next(&mut self) -> CancelMode {
        let leaving = async {
            match &mut self.leaving {
                Some([hangup, quit]) => tokio::select! {
                    _ = hangup.recv() => {}
                    _ = quit.recv() => {}
                },
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => CancelMode::Interrupt,
            _ = self.terminate.recv() => CancelMode::Terminate,
            () = leaving => CancelMode::Terminate,
        }
    }
}

/// The first signal is passed on, the second kills.
pub(super) async fn cancel_on_signals(control: Control, call_id: CallId, mut signals: Signals) {
    let mut mode = signals.next().await;
    loop {
        if let Err(error) = control.cancel(call_id.as_str(), mode).await {
            tracing::warn!(%error, "command could not be cancelled");
        }
        signals.next().await;
        mode = CancelMode::Kill;
    }
}

/// Passes standard input on; a full pipe inside is waited for, never buffered here.
pub(super) async fn forward_stdin(control: Control, call_id: CallId) {
    let mut input = tokio::io::stdin();
    let mut buffer = vec![0; limits::CHUNK_BYTES];
    let mut accepted = 0u64;
    loop {
        let length = input.read(&mut buffer).await.unwrap_or(0);
        let until = accepted + length as u64;
        let eof = length == 0;
        let mut pause = Duration::from_millis(1);
        loop {
            let rest = buffer[length - usize::try_from(until - accepted).unwrap_or(0)..length].to_vec();
            let Ok(now) = control.stdin(call_id.as_str(), accepted, rest, eof).await else { return };
            let advanced = now > accepted;
            accepted = now.clamp(accepted, until);
            if accepted == until {
                break;
            }
            pause = if advanced { Duration::from_millis(1) } else { (pause * 2).min(Duration::from_millis(100)) };
            tokio::time::sleep(pause).await;
        }
        if eof {
            return;
        }
    }
}

/// Tells a command in a terminal that nobody types into, once, that its input is over: reading would wait for ever.
pub(super) async fn end_input(control: Control, call_id: CallId) {
    // A command that is over already needs no input.
    let _ = control.stdin(call_id.as_str(), 0, Vec::new(), true).await;
}
