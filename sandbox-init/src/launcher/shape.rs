//! Privileged: tries, in a child that ends at once, what every sandbox with namespaces needs.
//!
//! The launcher works in one of three shapes, found once at its start by doing and never by guessing where it runs. Which
//! layers hold in the end is measured separately; a shape is not a tier.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{geteuid, pipe2, read, write};

use crate::stage::mount::make_proc;
use crate::sys::process::{CloneArguments, Cloned, clone3, exit_now};

/// How sandboxes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Root, with namespaces and ranges of ids.
    Privileged,
    /// An ordinary user, with namespaces below one of his own and a single id.
    Unprivileged,
    /// Root of a container that allows no namespace: one sandbox, of other users.
    Nested,
}

impl Shape {
    /// Name for reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Privileged => "privileged",
            Self::Unprivileged => "unprivileged",
            Self::Nested => "nested",
        }
    }
}

/// What the kernel refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {step}")]
pub struct Refusal {
    /// What was tried.
    pub step: &'static str,
    /// The cause.
    #[source]
    pub source: Errno,
}

impl Refusal {
    /// Whether trying again later would be refused as well: a want of memory or processes is no property of the host, and no
    /// reason to make sandboxes with fewer walls.
    #[must_use]
    pub fn is_for_good(&self) -> bool {
        matches!(
            self.source,
            Errno::EPERM
                | Errno::EACCES
                | Errno::ENOSYS
                | Errno::EINVAL
                | Errno::ENOSPC
                | Errno::EUSERS
                | Errno::ENODEV
        )
    }
}

/// What is tried, in this order.
const STEPS: [&str; 4] =
    ["make a mount namespace", "make its mounts private", "make the namespaces of a sandbox", "mount its /proc"];

/// Finds out. The refusal says why the shape is [`Shape::Nested`].
#[must_use]
pub fn find() -> (Shape, Option<Refusal>) {
    if !geteuid().is_root() {
        return (Shape::Unprivileged, None);
    }
    match try_namespaces() {
        None => (Shape::Privileged, None),
        refusal => (Shape::Nested, refusal),
    }
}

/// `None`: every step was allowed.
fn try_namespaces() -> Option<Refusal> {
    let broken = |source| Some(Refusal { step: "try what a sandbox needs", source });
    let (ours, theirs) = match pipe2(OFlag::O_CLOEXEC) {
        Ok(pair) => pair,
        Err(errno) => return broken(errno),
    };
    let arguments = CloneArguments { exit_signal: libc::SIGCHLD, ..CloneArguments::default() };
    match clone3(&arguments) {
        Ok(Cloned::Child) => {
            attempt(&theirs);
            exit_now(0)
        }
        Ok(Cloned::Parent { pidfd, .. }) => {
            drop(theirs);
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
        }
        Err(errno) => return broken(errno),
    }
    let mut verdict = [0_u8; 2];
    match read(&ours, &mut verdict) {
        Ok(2) if verdict == ALLOWED => None,
        Ok(2) => Some(Refusal {
            step: STEPS.get(usize::from(verdict[0])).copied().unwrap_or("try what a sandbox needs"),
            source: Errno::from_raw(i32::from(verdict[1])),
        }),
        _ => broken(Errno::EPIPE),
    }
}

/// No step has this number.
const ALLOWED: [u8; 2] = [u8::MAX, 0];

/// Writes the number of the step that was refused and its errno.
fn attempt(verdict: &OwnedFd) {
    let nothing: Option<&str> = None;
    let tell = |step: u8, errno: Errno| {
        // Nobody reads when the launcher is gone.
        let _ = write(verdict, &[step, u8::try_from(errno as i32).unwrap_or(u8::MAX)]);
    };
    if let Err(errno) = unshare(CloneFlags::CLONE_NEWNS) {
        return tell(0, errno);
    }
    if let Err(errno) = mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing) {
        return tell(1, errno);
    }
    let namespaces =
        libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let arguments = CloneArguments {
        flags: u64::try_from(namespaces).unwrap_or_default(),
        exit_signal: libc::SIGCHLD,
        ..CloneArguments::default()
    };
    match clone3(&arguments) {
        Ok(Cloned::Child) => {
            match make_proc() {
                Ok(_) => drop(write(verdict, &ALLOWED)),
                Err(error) => tell(3, error.source),
            }
            exit_now(0)
        }
        Ok(Cloned::Parent { pidfd, .. }) => {
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
        }
        Err(errno) => tell(2, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_want_of_memory_is_no_reason_for_fewer_walls() {
        let refusal = |source| Refusal { step: "x", source };
        assert!(refusal(Errno::EPERM).is_for_good() && refusal(Errno::ENOSPC).is_for_good());
        for passing in [Errno::EAGAIN, Errno::ENOMEM, Errno::EMFILE, Errno::EPIPE] {
            assert!(!refusal(passing).is_for_good(), "{passing}");
        }
    }
}
