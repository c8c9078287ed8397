//! Privileged: CAP_SETUID and CAP_SETGID in the sandbox's own user namespace.
//!
//! Who is who inside. The outer user namespace (U1) holds process 1, the spawner and every mount. The workload lives in a
//! nested one (U2) with another uid, so it owns no mount and shares no principal with process 1. No third level can be made.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, pause, setgroups, setresgid, setresuid};

use super::StageError;
use crate::policy::capability::{Profile, mask};
use crate::sys::process::{CloneArguments, Cloned, clone3, exit_now, pidfd_signal, set_securebits};

fn step(step: &str) -> impl FnOnce(nix::Error) -> StageError + '_ {
    move |source| StageError { step: step.to_owned(), source }
}

/// Uid of the workload inside when it is not root.
pub const AGENT: u32 = 1000;

/// `SECBIT_NO_SETUID_FIXUP` (linux/securebits.h): a change of the effective uid leaves the capabilities alone.
pub(super) const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
/// `SECBIT_NOROOT`: uid 0 and set-uid programs gain nothing at `execve`.
pub(super) const NO_ROOT: libc::c_ulong = 1;

/// Pid of the parked child. A fixed one, so that the next process of this namespace, the spawner, gets pid 2: where ids are
/// shared, the filter protects process 1 and the spawner by number.
const HELPER_PID: i32 = 300;

/// Makes U2 and forbids every further user namespace.
///
/// Must run while this process is dumpable and root of U1: the kernel gives `/proc/PID/uid_map` of the parked child to the
/// owner of its memory.
///
/// # Errors
/// [`StageError`] names the step.
pub fn nested_user_namespace(proc: &OwnedFd, id_count: u32) -> Result<OwnedFd, StageError> {
    // One user namespace below U1 may exist: U2. The limit counts whatever is made below it too (user_namespaces(7)).
    write_below(proc, "sys/user/max_user_namespaces", "1")?;
    // What is counted per user inside is also counted for the user that made U1, on the host: bounded here, so that one
    // sandbox cannot use up what root and every other sandbox need. A kernel without the file does not have the object.
    for (name, most) in
        [("max_inotify_instances", "32"), ("max_inotify_watches", "16384"), ("max_fanotify_groups", "0")]
    {
        match write_below(proc, &format!("sys/user/{name}"), most) {
            Err(StageError { source: nix::Error::ENOENT, .. }) | Ok(()) => {}
            Err(error) => return Err(error),
        }
    }
    let flags = u64::try_from(libc::CLONE_NEWUSER).unwrap_or_default();
    let arguments =
        CloneArguments { flags, exit_signal: libc::SIGCHLD, pid: Some(HELPER_PID), ..CloneArguments::default() };
    let (pid, pidfd) = match clone3(&arguments).map_err(step("make the nested user namespace"))? {
        Cloned::Child => {
            // Killed by the parent as soon as the namespace has a descriptor of its own.
            pause();
            exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    let inner = if id_count > 1 { id_count - 1 } else { 1 };
    let map = format!("0 0 {inner}");
    let mapped = write_below(proc, &format!("{pid}/uid_map"), &map)
        .and_then(|()| write_below(proc, &format!("{pid}/gid_map"), &map))
        .and_then(|()| {
            openat(proc, format!("{pid}/ns/user").as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(step("open the nested user namespace"))
        });
    // The child has done its work either way; it is reaped with the other orphans.
    let _ = pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
    mapped
}

/// Loopback of a network namespace that belongs to U1. One that the launcher made is ready, and not ours to change (EPERM).
///
/// # Errors
/// [`StageError`] names the step.
pub fn prepare_network(proc: &OwnedFd) -> Result<(), StageError> {
    match crate::sys::network::bring_loopback_up() {
        Ok(()) => write_below(proc, "sys/net/ipv4/ip_unprivileged_port_start", "0"),
        Err(nix::Error::EPERM) => Ok(()),
        Err(source) => Err(StageError { step: "bring loopback up".to_owned(), source }),
    }
}

/// The bound of System V shared memory in this ipc namespace, open before `/proc/sys` is covered.
#[derive(Debug)]
pub struct SharedMemory(Option<std::fs::File>);

impl SharedMemory {
    /// Opens it. A kernel below 5.19 gives it to nobody in a user namespace; the memory limit is then the only one.
    #[must_use]
    pub fn open(proc: &OwnedFd) -> Self {
        Self(openat(proc, "sys/kernel/shmall", OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()).ok().map(Into::into))
    }

    /// Sets it. A segment stays when the last process that knows it is killed, so segments may not take all of the memory
    /// limit, as no files in memory may.
    pub fn bound(self, bytes: u64) {
        if let Some(mut file) = self.0 {
            let _ = file.write_all((bytes / PAGE_BYTES).max(1).to_string().as_bytes());
        }
    }
}

/// `shmall` counts pages; those of the two architectures have this size or a multiple, which errs on the small side.
const PAGE_BYTES: u64 = 4096;

fn write_below(proc: &OwnedFd, path: &str, text: &str) -> Result<(), StageError> {
    let name = format!("write /proc/{path}");
    let opened = openat(proc, path, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(step(&name))?;
    std::fs::File::from(opened).write_all(text.as_bytes()).map_err(|error| StageError {
        step: name,
        source: nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
    })
}

/// Gives up root of U1: process 1 becomes the last id of the range, which U2 does not map, with the few capabilities that
/// its duties need.
///
/// # Errors
/// [`StageError`] names the step.
pub fn become_keeper(id_count: u32) -> Result<(), StageError> {
    nix::sys::prctl::set_keepcaps(true).map_err(step("keep capabilities"))?;
    set_securebits(NO_SETUID_FIXUP).map_err(step("set securebits"))?;
    if id_count > 1 {
        let (uid, gid) = (Uid::from_raw(id_count - 1), Gid::from_raw(id_count - 1));
        setresgid(gid, gid, gid).map_err(step("set the gid of process 1"))?;
        setresuid(uid, uid, uid).map_err(step("set the uid of process 1"))?;
    }
    crate::sys::capability::set(mask(Profile::Process1)).map_err(step("drop capabilities of process 1"))?;
    nix::sys::prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;
    nix::sys::prctl::set_dumpable(false).map_err(step("protect the memory of process 1"))
}

/// Makes this process the workload: inside U2, with the workload's ids and capabilities. The bounding set is dropped after
/// the entry, because entering a user namespace fills it again.
///
/// # Errors
/// The cause.
pub fn become_workload(nested: &OwnedFd, root: bool, single_id: bool, drop_capabilities: bool) -> nix::Result<()> {
    nix::sched::setns(nested, nix::sched::CloneFlags::CLONE_NEWUSER)?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)?;
    let kept = if root { mask(Profile::Root) } else { mask(Profile::None) };
    if drop_capabilities {
        crate::sys::capability::limit_bounding(kept)?;
    }
    if !root {
        set_securebits(NO_ROOT)?;
    }
    if !single_id {
        setgroups(&[])?;
    }
    let id = if root { 0 } else { AGENT };
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    // All three ids: a saved id of 0 would leave a way back, and would make process 1 a target of signals.
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    if drop_capabilities {
        crate::sys::capability::set(kept)?;
    }
    nix::sys::prctl::set_no_new_privs()
}
