//! Pipes between process 1 and a call.
//!
//! Bounds: one wake-up reads at most [`READ_BUDGET`] bytes of one pipe, so a flood delays everything else by well under a
//! millisecond; input for a call waits in a buffer of [`STDIN_LIMIT`] bytes, and what does not fit is not accepted.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{pipe2, read, write};

use super::terminal::end_of_input;

/// Bytes read from one pipe per wake-up.
pub(crate) const READ_BUDGET: usize = 256 * 1024;
/// Bytes of input that wait for a call to read them.
const STDIN_LIMIT: usize = 256 * 1024;
/// Size that a pipe with much output is given, where the host allows it.
const LARGE_PIPE: i32 = 1024 * 1024;
/// Size of a pipe nobody has enlarged.
pub(crate) const USUAL_PIPE: usize = 64 * 1024;

/// How a look at a pipe ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// The budget is used up; there may be more.
    Budget,
    /// Nothing more at present.
    Empty,
    /// Every writer has closed it.
    Closed,
}

/// Reads at most `budget` bytes and hands them on.
pub(crate) fn drain(reader: &OwnedFd, buffer: &mut [u8], budget: usize, mut take: impl FnMut(&[u8])) -> Drained {
    let mut left = budget;
    while left > 0 {
        let most = left.min(buffer.len());
        let target = buffer.get_mut(..most).unwrap_or_default();
        match read(reader.as_fd(), target) {
            Ok(0) => return Drained::Closed,
            Ok(length) => {
                take(target.get(..length).unwrap_or_default());
                left = left.saturating_sub(length);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Drained::Empty,
            // EIO is how a terminal says that nobody has it open any more.
            Err(_) => return Drained::Closed,
        }
    }
    Drained::Budget
}

/// Reads once: enough when the loop comes back for the rest anyway. A read that does not fill the buffer has emptied the
/// pipe, which saves the question.
pub(crate) fn sip(reader: &OwnedFd, buffer: &mut [u8], mut take: impl FnMut(&[u8])) -> Drained {
    match read(reader.as_fd(), buffer) {
        Ok(0) => Drained::Closed,
        Ok(length) => {
            take(buffer.get(..length).unwrap_or_default());
            if length < buffer.len() { Drained::Empty } else { Drained::Budget }
        }
        Err(Errno::EINTR | Errno::EAGAIN) => Drained::Empty,
        Err(_) => Drained::Closed,
    }
}

/// Bytes a pipe can hold: as much can be in it when its last writer of interest has ended.
pub(crate) fn capacity(pipe: &OwnedFd) -> usize {
    fcntl(pipe, FcntlArg::F_GETPIPE_SZ).ok().and_then(|size| usize::try_from(size).ok()).unwrap_or(USUAL_PIPE)
}

/// Makes a pipe large: fewer wake-ups per megabyte. A host that refuses leaves it as it is.
pub(crate) fn enlarge(pipe: &OwnedFd) {
    let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(LARGE_PIPE));
}

/// Whether anybody has ever opened the other end of this FIFO for writing.
///
/// The kernel reports a hang-up only after there was a writer, end of file also before, and "nothing yet" only while there
/// is one.
pub(crate) fn was_opened(fifo: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let flags = fds.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty());
    if polled.is_err() || !flags.is_empty() {
        return true;
    }
    // Nothing to read, so this read takes nothing away.
    !matches!(read(fifo.as_fd(), &mut [0; 1]), Ok(0))
}

/// A pipe whose reader is ours and does not block. The other end may be opened again through /dev/stdout, so the
/// workload, another user, must have the right to.
pub(crate) fn output_pipe() -> Result<(OwnedFd, OwnedFd), nix::Error> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    fchmod(&writer, Mode::from_bits_truncate(0o622))?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
}

/// A pipe whose writer is ours and does not block; reader first.
pub(crate) fn input_pipe() -> Result<(OwnedFd, OwnedFd), nix::Error> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    fchmod(&reader, Mode::from_bits_truncate(0o644))?;
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
}

/// Standard input of a call.
#[derive(Debug)]
pub(crate) struct StdinPipe {
    /// `None` once it was closed, by us or by the reader.
    pipe: Option<OwnedFd>,
    accepted: u64,
    buffer: VecDeque<u8>,
    ends: bool,
    /// A terminal, whose end of input is a character.
    is_terminal: bool,
    /// The last byte that was taken.
    last: Option<u8>,
    /// Registered with epoll, because the buffer is not empty.
    pub(crate) watched: bool,
}

impl StdinPipe {
    /// Takes over the writing end.
    pub(crate) fn new(pipe: OwnedFd) -> Self {
        Self {
            pipe: Some(pipe),
            accepted: 0,
            buffer: VecDeque::new(),
            ends: false,
            is_terminal: false,
            last: None,
            watched: false,
        }
    }

    /// Types into a terminal instead. Its end is typed as well, and nothing after it.
    pub(crate) fn terminal(ours: OwnedFd) -> Self {
        Self { is_terminal: true, ..Self::new(ours) }
    }

    /// The descriptor, while it is open.
    pub(crate) fn descriptor(&self) -> Option<&OwnedFd> {
        self.pipe.as_ref()
    }

    /// Takes bytes at an offset; those that were accepted before are skipped, those beyond the buffer are not accepted.
    /// Returns how many bytes are accepted in all, or `None` for a gap.
    pub(crate) fn accept(&mut self, offset: u64, data: &[u8], ends: bool) -> Option<u64> {
        let skip = usize::try_from(self.accepted.checked_sub(offset)?).unwrap_or(usize::MAX);
        let fresh = data.get(skip..).unwrap_or_default();
        if self.ends || self.pipe.is_none() {
            // Nobody reads any more: accepting is the truth, as it is with any program that does not read its input.
            self.accepted = self.accepted.saturating_add(fresh.len() as u64);
            return Some(self.accepted);
        }
        let room = STDIN_LIMIT.saturating_sub(self.buffer.len()).min(fresh.len());
        self.buffer.extend(fresh.iter().take(room));
        self.accepted = self.accepted.saturating_add(room as u64);
        self.last = fresh.get(..room).and_then(<[u8]>::last).copied().or(self.last);
        self.ends = ends && room == fresh.len();
        if let Some(terminal) = self.pipe.as_ref().filter(|_| self.ends && self.is_terminal) {
            self.buffer.extend(end_of_input(terminal, self.last));
        }
        self.flush();
        Some(self.accepted)
    }

    /// Writes what the pipe takes; closes it when all is written and more will not come.
    pub(crate) fn flush(&mut self) {
        while let Some(pipe) = &self.pipe {
            let (first, _) = self.buffer.as_slices();
            if first.is_empty() {
                break;
            }
            match write(pipe, first) {
                Ok(length) => drop(self.buffer.drain(..length)),
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    self.buffer.clear();
                    self.pipe = None;
                }
            }
        }
        if self.ends {
            self.pipe = None;
        }
    }

    /// Whether bytes wait.
    pub(crate) fn is_waiting(&self) -> bool {
        self.pipe.is_some() && !self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::open;
    use nix::unistd::mkfifo;

    #[test]
    fn a_fifo_knows_whether_it_ever_had_a_writer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let reader = open(&path, OFlag::O_RDONLY | OFlag::O_NONBLOCK, Mode::empty()).unwrap();
        assert!(!was_opened(&reader));
        let writer = open(&path, OFlag::O_WRONLY, Mode::empty()).unwrap();
        assert!(was_opened(&reader), "a writer that has written nothing");
        drop(writer);
        assert!(was_opened(&reader), "a writer that has written nothing and is gone");
    }

    #[test]
    fn input_is_idempotent_by_offset_and_a_gap_is_refused() {
        let (reader, writer) = input_pipe().unwrap();
        let mut stdin = StdinPipe::new(writer);
        assert_eq!(stdin.accept(0, b"abc", false), Some(3));
        assert_eq!(stdin.accept(0, b"abc", false), Some(3));
        assert_eq!(stdin.accept(1, b"bcd", false), Some(4));
        assert_eq!(stdin.accept(5, b"x", false), None);
        assert_eq!(stdin.accept(4, b"", true), Some(4));
        let mut buffer = [0; 100];
        let mut seen = Vec::new();
        let end = drain(&reader, &mut buffer, 100, |bytes| seen.extend_from_slice(bytes));
        assert_eq!((end, seen.as_slice()), (Drained::Closed, b"abcd".as_slice()));
    }

    #[test]
    fn input_that_nobody_reads_is_bounded() {
        let (reader, writer) = input_pipe().unwrap();
        let mut stdin = StdinPipe::new(writer);
        let pipe = capacity(&reader) as u64;
        let large = vec![1; 1024 * 1024];
        let accepted = stdin.accept(0, &large, true).unwrap();
        assert_eq!(accepted, STDIN_LIMIT as u64);
        let more = stdin.accept(accepted, &large, true).unwrap();
        assert_eq!(more, STDIN_LIMIT as u64 + pipe);
        assert!(stdin.is_waiting());
    }
}
