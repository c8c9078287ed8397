//! The persistent shell: its process, the lines it is fed, and the files of one command.
//!
//! The shell reads fixed lines from its descriptor 0 and reports on descriptor [`STATUS_NUMBER`]; its own output goes to
//! /dev/null. A command is a file of its own that the shell sources with its output in FIFOs of its own, so that
//! - no variable, and nothing a user can make readonly, stands between the text and its execution;
//! - late output of an old job never appears in a newer call;
//! - bash does not announce job numbers and exits in the output, as it does for text that it evaluates interactively;
//! - a FIFO that was never opened proves that the command never began, whatever the exit status of the shell says.
//!
//! The status line is a line of its own, so that an interrupt does not skip it. Both are written at once and fit into one
//! read of bash, so a command that closes every descriptor still ends the shell instead of hanging it.
//!
//! What the shell says is a claim by the workload. It is believed once, with the nonce of the running command; anything
//! else ends the shell.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat};
use nix::unistd::{Pid, UnlinkatFlags, mkfifoat, read, unlinkat, write};

use super::event::Key;
use super::slot::SlotId;

/// Number of the status descriptor in the shell; closed inside every command.
pub(crate) const STATUS_NUMBER: i32 = 201;
/// What a shell is told with an interrupt: break off the list. The kernel sends this signal to nobody, and hardly anybody uses it.
pub(crate) const LIST_SIGNAL: Signal = Signal::SIGSTKFLT;
/// A trap runs between two commands, however the first of them ended: so what a child that ignores SIGINT would let begin does not.
/// A shell that ignores SIGINT itself has nothing to break off with, and kills itself; one that shows a trap of the user's goes on,
/// as any bash does. It is asked three times, because the child that answers may be hit by the next interrupt. Outside of a
/// command, where `BASH_SOURCE` is empty, nothing happens, so that the line with the status is not lost.
const LIST_TRAP: &str = concat!(
    r"trap '[[ ! ${BASH_SOURCE-} ]] || { \builtin kill -s INT $$; ",
    r"[[ $(\builtin trap -p INT; \builtin echo x) == @(x|trap\ --\ ???*\ *INT*x) ]] || ",
    r"[[ $(\builtin trap -p INT; \builtin echo x) == @(x|trap\ --\ ???*\ *INT*x) ]] || ",
    r"[[ $(\builtin trap -p INT; \builtin echo x) == @(x|trap\ --\ ???*\ *INT*x) ]] || ",
    r"\builtin kill -s KILL $$; }' STKFLT"
);
/// Longest pair of lines: bash takes this much in one read.
const LINES_LIMIT: usize = 1024;
/// Longest claim: a status and a path. What is longer is not from our line.
const CLAIM_LIMIT: usize = 16 * 1024;

/// A shell that runs.
#[derive(Debug)]
pub(crate) struct Shell {
    pub(crate) key: Key,
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    pub(crate) slot: SlotId,
    /// Open until bash has been executed.
    pub(crate) start_error: OwnedFd,
    control: OwnedFd,
    status: OwnedFd,
    received: Vec<u8>,
    /// What it must say first.
    hello: String,
    /// It has said that it is ready.
    pub(crate) is_ready: bool,
    /// Exit status by which our own status line says that it could not report. Chosen at random among the numbers that
    /// no signal and hardly any program uses, because users do write `exit 124`.
    pub(crate) mute_status: i32,
}

/// What the shell claims.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// The nonce of the command, or of the start.
    pub(crate) nonce: String,
    /// `$?`.
    pub(crate) code: i32,
    /// `$PWD`, when it is an absolute path.
    pub(crate) working_directory: Option<Vec<u8>>,
}

/// What reading the status descriptor gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// These claims, in order; often none.
    Claims(Vec<Claim>),
    /// Something that our line does not write.
    Nonsense,
}

impl Shell {
    /// Takes over a started shell and feeds it its first line.
    pub(crate) fn new(key: Key, pid: Pid, pidfd: OwnedFd, slot: SlotId, pipes: ShellPipes) -> Self {
        let shell = Self {
            key,
            pid,
            pidfd,
            slot,
            start_error: pipes.start_error,
            control: pipes.control,
            status: pipes.status,
            received: Vec::new(),
            hello: nonce(),
            is_ready: false,
            mute_status: 193_i32.saturating_add(i32::from(random_byte() % 57)),
        };
        // The shell stays silent at its prompts, keeps no history, announces no jobs, survives a failing exec and does
        // not look for mail. A pipe that was just made takes these bytes; if not, the shell never becomes ready.
        let line = format!(
            "PS1= PS2= PROMPT_COMMAND=; unset MAILCHECK; set +m +H +o history; history -c; shopt -s execfail; {LIST_TRAP}; {}",
            status_line(&shell.hello, shell.mute_status)
        );
        let _ = write(&shell.control, line.as_bytes());
        shell
    }

    /// Descriptor of the claims.
    pub(crate) fn status(&self) -> &OwnedFd {
        &self.status
    }

    /// Whether a program has taken its place: bash keeps its end of the control pipe for itself.
    pub(crate) fn is_replaced(&self) -> bool {
        let mut fds = [PollFd::new(self.control.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds.iter().any(|fd| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLERR)))
    }

    /// Whether this is what a new shell says first.
    pub(crate) fn is_hello(&self, claim: &Claim) -> bool {
        !self.is_ready && claim.nonce == self.hello
    }

    /// Feeds the two lines of a command. `false` when the shell does not take them.
    pub(crate) fn feed(&self, lines: &str) -> bool {
        lines.len() <= LINES_LIMIT && write(&self.control, lines.as_bytes()) == Ok(lines.len())
    }

    /// Reads what the shell says.
    pub(crate) fn listen(&mut self) -> Heard {
        let mut buffer = [0; 4096];
        let mut claims = Vec::new();
        loop {
            match read(self.status.as_fd(), &mut buffer) {
                Ok(0) => break,
                Ok(length) => self.received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                Err(Errno::EINTR) => continue,
                Err(_) => break,
            }
            while let Some(end) = self.received.iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.received.drain(..=end).collect();
                match parse_claim(message.get(..end).unwrap_or_default()) {
                    Some(claim) => claims.push(claim),
                    None => return Heard::Nonsense,
                }
            }
            if self.received.len() > CLAIM_LIMIT || claims.len() > 2 {
                return Heard::Nonsense;
            }
        }
        Heard::Claims(claims)
    }
}

/// Our ends of the pipes of a new shell.
#[derive(Debug)]
pub(crate) struct ShellPipes {
    /// Written by us, descriptor 0 of the shell.
    pub(crate) control: OwnedFd,
    /// Read by us, [`STATUS_NUMBER`] of the shell.
    pub(crate) status: OwnedFd,
    /// Read by us.
    pub(crate) start_error: OwnedFd,
}

/// `NONCE STATUS PATH`; the path may contain anything but NUL.
fn parse_claim(message: &[u8]) -> Option<Claim> {
    let mut parts = message.splitn(3, |byte| *byte == b' ');
    let nonce = String::from_utf8(parts.next()?.to_vec()).ok()?;
    let code = std::str::from_utf8(parts.next()?).ok()?.parse().ok().filter(|code| (0..=255).contains(code))?;
    let working_directory = Some(parts.next()?.to_vec()).filter(|path| path.first() == Some(&b'/'));
    Some(Claim { nonce, code, working_directory })
}

/// The line that reports status and directory, or ends the shell. The backslash keeps aliases away, `builtin` functions.
fn status_line(nonce: &str, mute_status: i32) -> String {
    format!(
        "\\builtin printf '%s %s %s\\0' {nonce} \"$?\" \"${{PWD-}}\" >&{STATUS_NUMBER} || \\builtin exit {mute_status}\n"
    )
}

/// The directory inside the sandbox through which commands and their output travel.
///
/// It belongs to process 1; the workload can reach names it knows, and neither list nor change the directory.
#[derive(Debug)]
pub(crate) struct CallDirectory {
    directory: OwnedFd,
    path_inside: String,
    spare: VecDeque<CommandFiles>,
    /// Commands whose names are still there: one, unless shells die in a row.
    over: Vec<String>,
}

/// The files of one command.
#[derive(Debug)]
pub(crate) struct CommandFiles {
    /// Also what the shell must say at the end.
    pub(crate) nonce: String,
    /// Reading end of the FIFO of standard output.
    pub(crate) stdout: OwnedFd,
    command: File,
}

impl CallDirectory {
    /// Takes over the directory. `path_inside` is where the workload finds it.
    pub(crate) fn new(directory: OwnedFd, path_inside: &Path) -> Self {
        Self {
            directory,
            path_inside: path_inside.to_string_lossy().into_owned(),
            spare: VecDeque::new(),
            over: Vec::new(),
        }
    }

    /// Makes the files of the next command ahead of need.
    pub(crate) fn prepare(&mut self) {
        if self.spare.is_empty() {
            // If it fails now it is tried again when needed, and reported then.
            if let Ok(files) = self.make() {
                self.spare.push_back(files);
            }
        }
    }

    fn make(&self) -> Result<CommandFiles, nix::Error> {
        let nonce = nonce();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let command = openat(&self.directory, command_name(&nonce).as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        fchmod(&command, Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH)?;
        let stdout = self.fifo(&stdout_name(&nonce))?;
        Ok(CommandFiles { nonce, stdout, command: File::from(command) })
    }

    fn fifo(&self, name: &str) -> Result<OwnedFd, nix::Error> {
        mkfifoat(&self.directory, name, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // The mode must not depend on an inherited umask: the workload, another user, opens it for writing.
        let mode = Mode::from_bits_truncate(0o622);
        fchmodat(&self.directory, name, mode, FchmodatFlags::FollowSymlink)?;
        openat(&self.directory, name, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
    }

    /// Writes a command; the files are those made ahead, or new ones.
    pub(crate) fn write_command(&mut self, command: &str) -> std::io::Result<CommandFiles> {
        let mut files = match self.spare.pop_front() {
            Some(files) => files,
            None => self.make()?,
        };
        files.command.write_all(command.as_bytes())?;
        Ok(files)
    }

    /// The FIFO for standard error of a command that wants it apart.
    pub(crate) fn stderr(&self, nonce: &str) -> Result<OwnedFd, nix::Error> {
        self.fifo(&stderr_name(nonce))
    }

    /// The two lines that run a command and report its end.
    pub(crate) fn lines(&self, nonce: &str, separate: bool, mute_status: i32) -> String {
        let path = |name: String| quoted(&format!("{}/{name}", self.path_inside));
        let stderr = if separate { path(stderr_name(nonce)) } else { "&1".to_owned() };
        format!(
            "\\builtin . {} </dev/null >{} 2>{stderr} {STATUS_NUMBER}>&-\n{}",
            path(command_name(nonce)),
            path(stdout_name(nonce)),
            status_line(nonce, mute_status)
        )
    }

    /// The command is over; its names are removed by the next [`CallDirectory::tidy`]. Open descriptors keep working.
    pub(crate) fn remove(&mut self, nonce: &str) {
        self.over.push(nonce.to_owned());
    }

    /// Removes the names of commands that are over. For when nobody waits.
    pub(crate) fn tidy(&mut self) {
        for nonce in std::mem::take(&mut self.over) {
            self.unlink(&nonce);
        }
    }

    fn unlink(&self, nonce: &str) {
        for name in [command_name(nonce), stdout_name(nonce), stderr_name(nonce)] {
            // The name of standard error exists for some commands only.
            let _ = unlinkat(&self.directory, name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }

    /// Removes the names of the files made ahead.
    pub(crate) fn clear(&mut self) {
        self.tidy();
        while let Some(files) = self.spare.pop_front() {
            self.unlink(&files.nonce);
        }
    }
}

fn command_name(nonce: &str) -> String {
    format!("{nonce}.sh")
}

fn stdout_name(nonce: &str) -> String {
    format!("{nonce}.out")
}

fn stderr_name(nonce: &str) -> String {
    format!("{nonce}.err")
}

/// A word for bash, whatever is in it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

/// A name that nobody can guess: an old job must not be able to write into the FIFO of a newer call.
fn nonce() -> String {
    format!("{:016x}", random())
}

fn random_byte() -> u8 {
    random().to_le_bytes().first().copied().unwrap_or(0)
}

/// The hasher of the standard library is keyed from the random source of the kernel; its keys never leave the process.
fn random() -> u64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_nonce_status_and_path_and_nothing_else() {
        let claim = |code, path: Option<&str>| {
            Some(Claim { nonce: "ab".to_owned(), code, working_directory: path.map(|path| path.as_bytes().to_vec()) })
        };
        assert_eq!(parse_claim(b"ab 130 /tmp/with space\n"), claim(130, Some("/tmp/with space\n")));
        assert_eq!(parse_claim(b"ab 0 "), claim(0, None));
        assert_eq!(parse_claim(b"ab 0 relative"), claim(0, None));
        for nonsense in [b"".as_slice(), b"ab", b"ab 0", b"ab x /", b"ab 256 /", b"ab -1 /", b"\xff 0 /"] {
            assert_eq!(parse_claim(nonsense), None);
        }
    }

    #[test]
    fn both_lines_fit_into_one_read_of_bash() {
        let opened = OwnedFd::from(File::open(".").unwrap());
        let directory = CallDirectory::new(opened, Path::new("/run/sandbox-runner/call"));
        let lines = directory.lines(&nonce(), true, 255);
        assert!(lines.len() < LINES_LIMIT / 2, "{} bytes", lines.len());
        assert_eq!(lines.matches('\n').count(), 2);
    }

    #[test]
    fn nonces_differ() {
        assert_ne!(nonce(), nonce());
        assert_eq!(nonce().len(), 16);
    }
}
