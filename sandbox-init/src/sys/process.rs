//! Making, replacing and marking processes.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// `CLONE_INTO_CGROUP` (linux/sched.h); the constant of libc has too narrow a type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What [`clone3`] makes.
#[derive(Debug, Default)]
pub struct CloneArguments<'a> {
    /// `CLONE_*` flags without `CLONE_PIDFD` and `CLONE_INTO_CGROUP`, which are implied. `CLONE_VM` is refused.
    pub flags: u64,
    /// Signal for the parent when the child ends; 0 with `CLONE_PARENT`.
    pub exit_signal: i32,
    /// Directory of the cgroup v2 group the child starts in (Linux 5.7).
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Pid of the child in the pid namespace of the caller (Linux 5.5; needs `CAP_SYS_ADMIN` over it).
    pub pid: Option<i32>,
}

/// Which side of a [`clone3`] this is.
#[derive(Debug)]
pub enum Cloned {
    /// The new process.
    Child,
    /// The caller.
    Parent {
        /// Pid of the child in the caller's pid namespace.
        pid: Pid,
        /// Refers to the child even after it has ended.
        pidfd: OwnedFd,
    },
}

/// Makes a process that is a copy of this one, like `fork(2)`, with the namespaces and the cgroup given.
///
/// # Errors
/// What the kernel says; `EINVAL` when the flags would share memory or a stack with the caller.
pub fn clone3(arguments: &CloneArguments<'_>) -> nix::Result<Cloned> {
    let sharing = (libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_VFORK) as u64;
    if arguments.flags & sharing != 0 {
        return Err(Errno::EINVAL);
    }
    let mut pidfd: RawFd = -1;
    let wanted: [libc::pid_t; 1] = [arguments.pid.unwrap_or(0)];
    let mut raw = libc::clone_args {
        flags: arguments.flags | libc::CLONE_PIDFD as u64,
        pidfd: (&raw mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: u64::try_from(arguments.exit_signal).map_err(|_| Errno::EINVAL)?,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    if arguments.pid.is_some() {
        raw.set_tid = wanted.as_ptr() as u64;
        raw.set_tid_size = 1;
    }
    if let Some(cgroup) = arguments.cgroup {
        raw.flags |= CLONE_INTO_CGROUP;
        raw.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    }
    // SAFETY: `raw` is a complete, initialised clone_args of the size given and outlives the call; `pidfd` is a valid
    // place for the kernel to write to and `wanted` an array of the length given to read from. Memory is copied, not shared (checked above), and sandbox-init is single-threaded,
    // so the child is a consistent copy in which every lock is in the state this thread left it.
    let rc = unsafe { libc::syscall(libc::SYS_clone3, &raw mut raw, size_of::<libc::clone_args>()) };
    match rc {
        // Container runtimes hide the call, because its flags are out of reach of their filters.
        -1 if Errno::last() == Errno::ENOSYS && arguments.cgroup.is_none() && arguments.pid.is_none() => {
            clone_by_flags(arguments)
        }
        -1 => Err(Errno::last()),
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: the kernel has just made this descriptor for us (CLONE_PIDFD) and nobody else owns it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?;
            Ok(Cloned::Parent { pid: Pid::from_raw(pid), pidfd })
        }
    }
}

/// The same by the older call, which has room for the flags and the signal alone.
fn clone_by_flags(arguments: &CloneArguments<'_>) -> nix::Result<Cloned> {
    let signal = u64::try_from(arguments.exit_signal).map_err(|_| Errno::EINVAL)?;
    let flags = arguments.flags | libc::CLONE_PIDFD as u64 | signal;
    let mut pidfd: RawFd = -1;
    let null = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: as for clone3: memory is copied, not shared (checked by the caller), a null stack keeps this one, and `pidfd`
    // is a valid place for the kernel to write to; the order of the last two arguments does not matter, both are null.
    let rc = unsafe { libc::syscall(libc::SYS_clone, flags, null, &raw mut pidfd, null, null) };
    match Errno::result(rc)? {
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: the kernel has just made this descriptor for us (CLONE_PIDFD) and nobody else owns it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?;
            Ok(Cloned::Parent { pid: Pid::from_raw(pid), pidfd })
        }
    }
}

/// Replaces this program by the file that `image` refers to. Returns only on failure.
#[must_use]
pub fn execute_descriptor(image: BorrowedFd<'_>, argv: &[CString], environment: &[CString]) -> Errno {
    let argv = null_terminated(argv);
    let environment = null_terminated(environment);
    // SAFETY: both arrays end in a null pointer and point to C strings that live until the call returns; the path is an
    // empty C string, which AT_EMPTY_PATH allows.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            image.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::last()
}

fn null_terminated(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
}

/// Closes every descriptor from `first` to `last`.
///
/// # Errors
/// `ENOSYS` below Linux 5.9.
pub fn close_range(first: RawFd, last: RawFd) -> nix::Result<()> {
    close_range_with(first, last, 0)
}

/// Marks every descriptor from `first` up as close-on-exec.
///
/// # Errors
/// `EINVAL` below Linux 5.11.
pub fn close_range_on_exec(first: RawFd) -> nix::Result<()> {
    close_range_with(first, RawFd::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range_with(first: RawFd, last: RawFd, flags: u32) -> nix::Result<()> {
    // SAFETY: close_range(2) takes integers only, so no pointer can dangle. Callers use it right before execve or at the
    // start of a process, where they name every descriptor they still own.
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    Errno::result(rc).map(drop)
}

/// Makes `target` refer to what `source` refers to, without close-on-exec. `target` is whatever number the protocol says.
///
/// # Errors
/// `EBADF`, `EMFILE`.
pub fn place_descriptor(source: RawFd, target: RawFd) -> nix::Result<()> {
    if source == target {
        // SAFETY: F_SETFD takes an integer; a wrong number gives EBADF.
        let rc = unsafe { libc::fcntl(source, libc::F_SETFD, 0) };
        return Errno::result(rc).map(drop);
    }
    // SAFETY: dup2 takes integers only. The caller gives up whatever was behind `target`: this runs between clone and
    // execve (or the tool), where no Rust owner of a low descriptor is used any more.
    let rc = unsafe { libc::dup2(source, target) };
    Errno::result(rc).map(drop)
}

/// Moves a descriptor to the lowest free number at or above `minimum`, close-on-exec.
///
/// # Errors
/// `EMFILE`.
pub fn duplicate_above(source: BorrowedFd<'_>, minimum: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes integers only.
    let rc = unsafe { libc::fcntl(source.as_raw_fd(), libc::F_DUPFD_CLOEXEC, minimum) };
    let fd = Errno::result(rc)?;
    // SAFETY: the kernel has just made this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes ownership of a descriptor whose number is fixed by the start protocol of this program.
///
/// # Errors
/// `EBADF` when nothing is open there.
pub fn inherited_descriptor(number: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: F_GETFD takes an integer; a wrong number gives EBADF.
    let rc = unsafe { libc::fcntl(number, libc::F_GETFD) };
    Errno::result(rc)?;
    // SAFETY: the descriptor is open (checked) and was handed over at start; each caller takes its number exactly once,
    // before anything else is opened.
    let owned = unsafe { OwnedFd::from_raw_fd(number) };
    nix::fcntl::fcntl(&owned, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    Ok(owned)
}

/// Gives every signal its default disposition and unblocks all of them.
///
/// Ignored signals and the mask are inherited over `execve`; a launcher started with SIGINT ignored would make every shell
/// below it deaf to interrupts.
pub fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is a valid disposition for every signal; SIGKILL, SIGSTOP and the two numbers that glibc keeps
        // for itself answer EINVAL, which changes nothing.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let empty = nix::sys::signal::SigSet::empty();
    // Unblocking cannot fail: the set is valid and SIG_SETMASK is a valid way.
    let _ = nix::sys::signal::sigprocmask(nix::sys::signal::SigmaskHow::SIG_SETMASK, Some(&empty), None);
}

/// Sets the securebits of this process (capabilities(7)).
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn set_securebits(bits: libc::c_ulong) -> nix::Result<()> {
    // SAFETY: PR_SET_SECUREBITS takes an integer.
    let rc = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits, 0, 0, 0) };
    Errno::result(rc).map(drop)
}

/// The set of a process id range that `sched_setaffinity` accepts: binds this process to `cpus`.
///
/// # Errors
/// `EINVAL` when none of them is allowed here.
pub fn set_affinity(cpus: &[usize]) -> nix::Result<()> {
    let mut set = nix::sched::CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    nix::sched::sched_setaffinity(Pid::from_raw(0), &set)
}

/// Makes the terminal behind `descriptor` the controlling terminal of this session.
///
/// # Errors
/// `EPERM` when the process is no session leader.
pub fn set_controlling_terminal(descriptor: RawFd) -> nix::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer argument; a wrong descriptor gives EBADF or ENOTTY.
    let rc = unsafe { libc::ioctl(descriptor, libc::TIOCSCTTY, 0) };
    Errno::result(rc).map(drop)
}

/// A raw system call with integer arguments, for the prober that tries the forbidden ones. Null is the only pointer that
/// can be passed, so no call can write into this process.
///
/// # Errors
/// What the kernel says.
pub fn attempt(number: libc::c_long, arguments: [u32; 5]) -> nix::Result<libc::c_long> {
    let [a, b, c, d, e] = arguments.map(libc::c_ulong::from);
    // SAFETY: every argument is below 2^32 and callers pass null, small integers or flags, never an address of this
    // process (crt-static position-independent images and stacks live above 4 GiB), so the kernel has nothing to write to.
    let rc = unsafe { libc::syscall(number, a, b, c, d, e, 0) };
    Errno::result(rc)
}

/// `execve` by path, for programs inside the sandbox. Returns only on failure.
#[must_use]
pub fn execute_path(path: &CStr, argv: &[CString], environment: &[CString]) -> Errno {
    let argv = null_terminated(argv);
    let environment = null_terminated(environment);
    // SAFETY: both arrays end in a null pointer and point to C strings that live until the call returns.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), environment.as_ptr()) };
    Errno::last()
}

/// Ends this process at once, without running destructors or exit handlers of the process it was copied from.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit takes an integer and does not return.
    unsafe { libc::_exit(status) }
}

/// Opens a pidfd.
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes integers only.
    let rc = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(Errno::result(rc)?).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: the kernel has just made this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to the process behind a pidfd.
///
/// # Errors
/// `ESRCH` when it has been reaped.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> nix::Result<()> {
    // SAFETY: pidfd_send_signal takes integers and a null pointer for "no siginfo".
    let rc = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    Errno::result(rc).map(drop)
}

/// Makes a copy of this process with the older `clone` call, for a process whose filter refuses `clone3`.
///
/// # Errors
/// `EAGAIN` at the process limit.
pub fn fork() -> nix::Result<Cloned> {
    // SAFETY: sandbox-init is single-threaded where this is called, so the child is a consistent copy.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Child => Ok(Cloned::Child),
        nix::unistd::ForkResult::Parent { child } => {
            let pidfd = pidfd_open(child.as_raw())?;
            Ok(Cloned::Parent { pid: child, pidfd })
        }
    }
}
