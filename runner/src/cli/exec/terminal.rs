//! The terminal that this command was started from, while the command runs in one of its own.
//!
//! Two terminals: ours, which stays on this side, and the sandbox's, which process 1 makes inside. Only bytes and sizes go
//! between them, so the command cannot type into ours, change its settings or learn its name. What it prints reaches ours
//! as it is, as with `ssh`. A terminal answers some of that as if somebody had typed; what of it has not been read when
//! the command ends is thrown away with the raw mode, so that no shell takes it for a command line.

use std::convert::Infallible;

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::sandbox::control::Control;
use crate::work::{CallId, Terminal};

/// What a terminal has that does not know its size.
const USUAL: Terminal = Terminal { columns: 80, rows: 24 };
/// Longest `TERM` that is passed on; names of terminals are much shorter.
const LONGEST_TERM: usize = 64;

/// Whether standard input is a terminal.
pub(super) fn is_input() -> bool {
    isatty(std::io::stdin())
}

/// The size of our terminal: that of standard input, else output, else error; 80 by 24 where none of them is one.
pub(super) fn size() -> Terminal {
    let sizes = [tcgetwinsize(std::io::stdin()), tcgetwinsize(std::io::stdout()), tcgetwinsize(std::io::stderr())];
    let found = sizes.into_iter().flatten().find(|size| size.ws_col != 0 && size.ws_row != 0);
    found.map_or(USUAL, |size| Terminal { columns: size.ws_col, rows: size.ws_row })
}

/// `TERM=` and the kind of our terminal, when there is one and that is a plain name.
pub(super) fn kind() -> Option<Vec<u8>> {
    if !is_input() && !isatty(std::io::stdout()) {
        return None;
    }
    let term = std::env::var("TERM").ok()?;
    is_plain(&term).then(|| format!("TERM={term}").into_bytes())
}

fn is_plain(term: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._+".contains(&byte);
    (1..=LONGEST_TERM).contains(&term.len()) && term.bytes().all(plain)
}

/// Our terminal in raw mode: every key goes to the command, Ctrl-C too. Dropping it restores what was there.
#[derive(Debug)]
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Enters it.
    ///
    /// # Errors
    /// What the terminal says.
    pub(super) fn enter() -> std::io::Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        let entered = Self { before };
        entered.again()?;
        Ok(entered)
    }

    /// The mode once more: a shell that has stopped and continued us has put its own in between.
    fn again(&self) -> std::io::Result<()> {
        let mut raw = self.before.clone();
        raw.make_raw();
        Ok(tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw)?)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing any more.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// Hears of a new size, and of being continued.
pub(super) struct Changes {
    window: Signal,
    continued: Signal,
    known: Terminal,
}

impl Changes {
    /// Listens from here on; the size that was there before is [`Changes::known`].
    ///
    /// # Errors
    /// When signals cannot be caught.
    pub(super) fn listen() -> std::io::Result<Self> {
        let continued = SignalKind::from_raw(nix::sys::signal::Signal::SIGCONT as i32);
        let (window, continued) = (signal(SignalKind::window_change())?, signal(continued)?);
        Ok(Self { window, continued, known: size() })
    }

    /// The size the command's terminal has or is getting.
    pub(super) fn known(&self) -> Terminal {
        self.known
    }

    /// Passes sizes on, for ever.
    pub(super) async fn pass_on(mut self, control: Control, call_id: &CallId, raw: Option<&RawMode>) -> Infallible {
        loop {
            let now = size();
            if now != self.known {
                self.known = now;
                if let Err(error) = control.resize(call_id.as_str(), now.columns, now.rows).await {
                    tracing::debug!(%error, "terminal was not resized");
                }
            }
            tokio::select! {
                _ = self.window.recv() => {}
                _ = self.continued.recv() => {
                    // In the background this would stop us again; a terminal that refuses is left as it is.
                    let _ = raw.map(RawMode::again);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_plain_name_of_a_terminal_is_passed_on() {
        assert!(["xterm-256color", "screen.xterm", "vt100", "rxvt+color"].into_iter().all(is_plain));
        assert!(["", "a b", "x\n", "../../etc", "x=y"].into_iter().all(|term| !is_plain(term)));
        assert!(!is_plain(&"x".repeat(LONGEST_TERM + 1)));
    }
}
