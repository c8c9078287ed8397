//! A terminal of the host with `sandbox-runner exec` in it, as a person has it: the command is the foreground process of a
//! session whose controlling terminal this is.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{Termios, tcgetattr};
use rustix::termios::tcsetwinsize;

use crate::runner::{Caller, scaled, wait};

/// Nothing that is printed here takes longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Makes the terminal at its standard input the controlling one of a new session, and becomes the command.
const SETSID: &str = "/usr/bin/setsid";

/// The terminal and the command in it.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    before: Termios,
    child: Child,
    printed: Vec<u8>,
    /// Where the next search in what was printed begins.
    seen: usize,
}

impl Terminal {
    /// Starts `command` in a new terminal of this size.
    ///
    /// # Panics
    /// When the host has no terminal, or cannot start the command.
    #[must_use]
    pub fn start(caller: Caller, command: &Command, columns: u16, rows: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(&size, None).expect("a terminal of the host");
        let before = tcgetattr(&slave).expect("its settings");
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        let mut wrapped = caller.command(Path::new(SETSID));
        wrapped.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        let child = wrapped.stdin(end()).stdout(end()).stderr(end()).spawn().expect("the command starts");
        Self { master: File::from(master), slave, before, child, printed: Vec::new(), seen: 0 }
    }

    /// Pid of the command.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end that the command has.
    #[must_use]
    pub fn slave(&self) -> &OwnedFd {
        &self.slave
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn type_in(&self, keys: &[u8]) {
        (&self.master).write_all(keys).expect("the terminal takes keys");
    }

    /// Gives the window another size.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.master, size).expect("a new size");
    }

    /// Waits until `text` was printed behind what was waited for before.
    ///
    /// # Panics
    /// When it is not; with what was.
    pub fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + scaled(PATIENCE);
        loop {
            let rest = &self.printed[self.seen..];
            if let Some(at) = rest.windows(text.len()).position(|window| window == text.as_bytes()) {
                self.seen += at + text.len();
                return;
            }
            assert!(Instant::now() < deadline, "{text:?} was not printed: {:?}", self.text());
            self.read(Duration::from_millis(50));
        }
    }

    /// Waits for the end of the command. Its exit code, 128 + n for a signal.
    ///
    /// # Panics
    /// When it does not end.
    pub fn end(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let deadline = Instant::now() + scaled(PATIENCE);
        let status = loop {
            self.read(Duration::from_millis(20));
            match self.child.try_wait().expect("own child") {
                Some(status) => break status,
                None => assert!(Instant::now() < deadline, "no end; printed: {:?}", self.text()),
            }
        };
        while self.read(Duration::ZERO) {}
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }

    /// Everything that was printed so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.printed).into_owned()
    }

    /// Whether the settings of the terminal are those from before the command.
    ///
    /// # Panics
    /// When the terminal is gone.
    #[must_use]
    pub fn is_restored(&self) -> bool {
        tcgetattr(&self.slave).expect("settings") == self.before
    }

    fn read(&mut self, patience: Duration) -> bool {
        let mut waiting = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        if !matches!(poll(&mut waiting, timeout), Ok(1..)) {
            return false;
        }
        let mut buffer = [0; 65_536];
        let length = self.master.read(&mut buffer).unwrap_or(0);
        self.printed.extend_from_slice(&buffer[..length]);
        length > 0
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A test that has failed leaves no command behind.
        let _ = self.child.kill();
        let _ = wait(&mut self.child, PATIENCE);
    }
}
