//! What calls say that they do, written down outside of everything that runner and launcher have.
//!
//! A call writes a line into a pipe of its workspace before it does anything else, and another at its end. The other end of
//! the pipe is here, so what was written outlives sandbox, runner and launcher, and goes into one file for all of them.
//! Nobody who is killed can add a line for a call, or take one away.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::OFlag;
use tempfile::TempDir;

use crate::daemon::Workspace;

/// Name of the pipe in a workspace.
const PIPE: &str = "ledger";

/// Makes the pipe. For the first command of a session.
pub const MAKE_PIPE: &str = "mkfifo ledger";

/// What a shell does first in a call.
#[must_use]
pub fn begin(call_id: &str) -> String {
    format!("echo begin {call_id} $$ > /workspace/{PIPE}")
}

/// What it does last.
#[must_use]
pub fn end(call_id: &str) -> String {
    format!("date +'end {call_id} %s%N' > /workspace/{PIPE}")
}

/// One file of lines, and what they say about each call.
#[derive(Debug)]
pub struct Ledger {
    directory: TempDir,
    lines: Mutex<Lines>,
}

#[derive(Debug)]
struct Lines {
    file: File,
    entries: BTreeMap<String, Entry>,
}

/// What is written about a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Entry {
    /// How often it has begun.
    pub begun: u64,
    /// How often it has come to its end.
    pub ended: u64,
    /// When it last did, in nanoseconds since 1970.
    pub ended_ns: u128,
}

impl Ledger {
    /// An empty one, in a directory of its own.
    ///
    /// # Panics
    /// When it cannot be written.
    #[must_use]
    pub fn new() -> Arc<Self> {
        let directory = tempfile::Builder::new().prefix("sbr-ledger-").tempdir().expect("a directory of our own");
        let path = directory.path().join("ledger");
        let file = OpenOptions::new().create(true).append(true).open(path).expect("a file of our own");
        Arc::new(Self { directory, lines: Mutex::new(Lines { file, entries: BTreeMap::new() }) })
    }

    /// The other end of the pipe in a workspace, where a command has made it.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn page(self: &Arc<Self>, workspace: &Workspace) -> io::Result<Page> {
        // Open for both, so that nobody waits for the other.
        let mut options = OpenOptions::new();
        let pipe = options.read(true).write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(workspace.path(PIPE))?;
        Ok(Page { pipe, rest: Vec::new(), ledger: Arc::clone(self) })
    }

    /// What is written about a call.
    #[must_use]
    pub fn entry(&self, call_id: &str) -> Entry {
        self.lines().entries.get(call_id).copied().unwrap_or_default()
    }

    /// Everything, by call.
    #[must_use]
    pub fn entries(&self) -> BTreeMap<String, Entry> {
        self.lines().entries.clone()
    }

    /// Where the file is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, line: &str) -> io::Result<()> {
        let mut lines = self.lines();
        writeln!(lines.file, "{line}")?;
        let mut words = line.split(' ');
        let (Some(what), Some(call_id), Some(number)) = (words.next(), words.next(), words.next()) else {
            return Err(io::Error::other(format!("{line:?} is no line of a ledger")));
        };
        let entry = lines.entries.entry(call_id.to_owned()).or_default();
        match what {
            "begin" => entry.begun += 1,
            "end" => {
                entry.ended += 1;
                entry.ended_ns = number.parse().map_err(io::Error::other)?;
            }
            _ => return Err(io::Error::other(format!("{line:?} is no line of a ledger"))),
        }
        Ok(())
    }
}

/// The reader of one workspace's pipe.
#[derive(Debug)]
pub struct Page {
    pipe: File,
    rest: Vec<u8>,
    ledger: Arc<Ledger>,
}

impl Page {
    /// Enters everything that has been written so far.
    ///
    /// # Errors
    /// When the pipe cannot be read, or what is in it is no line of a ledger.
    pub fn enter(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        loop {
            match self.pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => self.rest.extend(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        while let Some(at) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=at).collect();
            self.ledger.enter(String::from_utf8_lossy(&line).trim())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_that_begins_twice_is_seen_and_a_line_that_is_none_is_refused() {
        let ledger = Ledger::new();
        for line in ["begin a 7", "begin a 8", "end a 1700000000000000000", "begin b 9"] {
            ledger.enter(line).expect("a line");
        }
        assert_eq!(ledger.entry("a"), Entry { begun: 2, ended: 1, ended_ns: 1_700_000_000_000_000_000 });
        assert_eq!(ledger.entry("b").begun, 1);
        assert_eq!(ledger.entry("c"), Entry::default());
        assert!(ledger.enter("nothing").is_err());
        let written = std::fs::read_to_string(ledger.directory().join("ledger")).expect("the file");
        assert_eq!(written.lines().count(), 5);
    }
}
