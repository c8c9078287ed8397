//! Waiting for children and holding on to them by descriptor.
//!
//! nix refuses to report a child that was killed by a real-time signal, although the kernel has then reaped it. A
//! workload can choose its signal, so process 1 asks the kernel itself.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal {
        /// Its number; real-time signals included.
        signal: i32,
        /// Whether the kernel wrote a core.
        core_dumped: bool,
    },
}

/// Which child is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Which<'fd> {
    /// Any child of this process.
    Any,
    /// The child behind this pidfd.
    Process(BorrowedFd<'fd>),
}

/// Reaps one child that has ended; `None` when there is none at present, or no such child at all.
///
/// # Errors
/// Whatever waitid(2) reports besides ECHILD.
pub fn reap(which: Which<'_>) -> Result<Option<(Pid, Exit)>, Errno> {
    let (kind, id) = match which {
        Which::Any => (libc::P_ALL, 0),
        Which::Process(pidfd) => (libc::P_PIDFD, libc::id_t::try_from(pidfd.as_raw_fd()).map_err(|_| Errno::EBADF)?),
    };
    // SAFETY: siginfo_t is plain integers and pointers that nobody follows; all zeroes is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: info lives across the call and is the only pointer passed.
    let result = unsafe { libc::waitid(kind, id, &raw mut info, libc::WEXITED | libc::WNOHANG) };
    match Errno::result(result) {
        Ok(_) => {}
        Err(Errno::ECHILD) => return Ok(None),
        Err(errno) => return Err(errno),
    }
    // SAFETY: waitid succeeded, so the kernel filled the child variant of the union, or left it zero.
    let pid = unsafe { info.si_pid() };
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: as above; a child was reaped.
    let status = unsafe { info.si_status() };
    let exit = match info.si_code {
        libc::CLD_EXITED => Exit::Code(status),
        code => Exit::Signal { signal: status, core_dumped: code == libc::CLD_DUMPED },
    };
    Ok(Some((Pid::from_raw(pid), exit)))
}

/// Opens a descriptor for a process, close-on-exec.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn open_pidfd(pid: Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open(2) takes two integers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let raw = Errno::result(result)?;
    let raw = i32::try_from(raw).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
