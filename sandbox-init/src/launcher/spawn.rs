//! Privileged: CAP_SYS_ADMIN for namespaces, CAP_SETUID and CAP_SETGID to write id maps.
//!
//! Makes a *blank*: process 1 of a sandbox that nobody has asked for yet. Everything that does not depend on the request is
//! done here, off every request path: network namespace, cgroups, user namespace with its id map, the other namespaces,
//! and `execve` of the sealed image. The blank then waits on its boot socket.
//!
//! Runs in the background process. The blank becomes a child of the launcher (`CLONE_PARENT`), which alone reaps it.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Pid, Uid, pipe2, read, setgroups, setresgid, setresuid};

use super::cgroup::{CgroupError, Group, Mode as CgroupMode, Tree};
use super::files::{Files, FilesError, Owners};
use super::forecast::Ahead;
use super::policy_file::Limits;
use crate::boot::{BOOT_DESCRIPTOR, IMAGE_DESCRIPTOR};
use crate::sys::network::bring_loopback_up;
use crate::sys::process::{
    CloneArguments, Cloned, clone3, close_range, duplicate_above, execute_descriptor, exit_now, inherited_descriptor,
    place_descriptor,
};

/// A process 1 that waits for its boot packet.
#[derive(Debug)]
pub struct Blank {
    /// Name of its cgroups and of its files.
    pub name: String,
    /// Its id slot.
    pub slot: u32,
    /// Host pid.
    pub pid: Pid,
    /// Refers to it.
    pub pidfd: OwnedFd,
    /// Our end of the boot socket.
    pub boot: OwnedFd,
    /// Its mount namespace, where it has one. Held so that process 1, when it ends, is not the one who dissolves it, which
    /// waits for all processors and for every page of a filesystem in memory: whoever waits for that end would wait as well.
    pub mounts: Option<OwnedFd>,
    /// What it has of its own where namespaces can be made.
    pub private: Option<Private>,
    /// Its cgroups; `None` where the host has none for us.
    pub group: Option<Group>,
    /// Limits that its groups have already.
    pub limits: Option<Limits>,
    /// Its root filesystem, as far as it was made ahead.
    pub ahead: Option<Ahead>,
    /// Mounts that it does not need any more. Dropping one dissolves it, which waits for all processors.
    pub spent: Vec<OwnedFd>,
}

/// What a blank has of its own.
#[derive(Debug)]
pub struct Private {
    /// Its user namespace, for idmapped mounts.
    pub user_namespace: OwnedFd,
    /// Its files on the host.
    pub files: Files,
}

/// Why no blank could be made.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A kernel call refused.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The cause.
        #[source]
        source: nix::Error,
    },
    /// A file refused.
    #[error("cannot write {}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The cgroups could not be made.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The files could not be made.
    #[error(transparent)]
    Files(#[from] FilesError),
}

/// A blank that could not be made.
#[derive(Debug)]
pub struct Unmade {
    /// Process 1, if it was begun: a child of the launcher, which has to kill and to reap it.
    pub pid: Option<Pid>,
    /// Why.
    pub source: SpawnError,
}

impl From<SpawnError> for Unmade {
    fn from(source: SpawnError) -> Self {
        Self { pid: None, source }
    }
}

fn step(step: &'static str) -> impl FnOnce(nix::Error) -> SpawnError {
    move |source| SpawnError::Step { step, source }
}

/// What the background process needs to make blanks.
#[derive(Debug)]
pub struct Workshop<'a> {
    /// Our cgroups.
    pub tree: &'a Tree,
    /// The sealed image.
    pub image: BorrowedFd<'a>,
    /// Who gets the files.
    pub owners: Owners,
}

/// Range of ids of a blank.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    /// Number of the slot.
    pub slot: u32,
    /// First host id.
    pub base: u32,
    /// Number of ids.
    pub count: u32,
}

/// Makes one blank.
///
/// # Errors
/// [`Unmade`]; what was made before is removed by the caller through the cgroup name.
pub fn make_blank(workshop: &Workshop<'_>, name: String, range: Range) -> Result<Blank, Unmade> {
    // Not cloned together with the rest: owned by the launcher's user namespace, so nobody inside the sandbox has a
    // capability over it. The background process simply moves on into the new one; it has no use for any network.
    unshare(CloneFlags::CLONE_NEWNET).map_err(step("make a network namespace"))?;
    let network_is_ours = match bring_loopback_up() {
        // Servers inside may bind port 80; nobody inside holds CAP_NET_BIND_SERVICE over this namespace.
        Ok(()) => {
            write_file("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?;
            true
        }
        // A container may lack CAP_NET_ADMIN. The namespace then belongs to the sandbox's outer user namespace, over which the
        // workload holds nothing either, and process 1 does this.
        Err(nix::Error::EPERM) => false,
        Err(source) => return Err(SpawnError::Step { step: "bring loopback up", source }.into()),
    };

    let keeper = range.base + range.count - 1;
    let group = match workshop.tree.mode() {
        CgroupMode::None => None,
        _ => Some(workshop.tree.create(&name, keeper).map_err(SpawnError::from)?),
    };
    let files = Files::make(&name, keeper, workshop.owners).map_err(SpawnError::from)?;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(step("make a socket pair"))?;
    let (gate_read, gate_write) = pipe2(OFlag::O_CLOEXEC).map_err(step("make a pipe"))?;
    let namespaces =
        libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let network = if network_is_ours { 0 } else { libc::CLONE_NEWNET };
    let flags = u64::try_from(namespaces | network | libc::CLONE_PARENT).unwrap_or_default();
    let arguments = CloneArguments {
        flags,
        exit_signal: 0,
        cgroup: group.as_ref().map(|group| group.init.as_fd()),
        ..CloneArguments::default()
    };
    let (pid, pidfd) = match clone3(&arguments).map_err(step("make the namespaces"))? {
        Cloned::Child => {
            drop(gate_write);
            become_process_one(workshop.image, &theirs, &gate_read, range.count > 1)
        }
        Cloned::Parent { pid, pidfd } => (pid, pidfd),
    };
    drop(theirs);
    let (user_namespace, mount_namespace) =
        release(workshop.tree, &name, range, pid, &gate_write).map_err(|source| Unmade { pid: Some(pid), source })?;
    let private = Some(Private { user_namespace, files });
    Ok(Blank {
        name,
        slot: range.slot,
        pid,
        pidfd,
        boot: ours,
        mounts: Some(mount_namespace),
        private,
        group,
        limits: None,
        ahead: None,
        spent: Vec::new(),
    })
}

/// Gives process 1 its ids and its v1 groups and lets it go on. Returns its user and its mount namespace.
fn release(tree: &Tree, name: &str, range: Range, pid: Pid, gate: &OwnedFd) -> Result<(OwnedFd, OwnedFd), SpawnError> {
    let id_map = format!("0 {} {}\n", range.base, range.count);
    write_file(&format!("/proc/{pid}/uid_map"), &id_map)?;
    write_file(&format!("/proc/{pid}/gid_map"), &id_map)?;
    // With CAP_SYS_RESOURCE this also takes back the floor that a service manager gave the launcher: the workload could
    // otherwise make itself as hard to kill as the launcher. Without it there is no such floor.
    let _ = write_file(&format!("/proc/{pid}/oom_score_adj"), "0");
    let namespace = |name| {
        let path = PathBuf::from(format!("/proc/{pid}/ns/{name}"));
        open(path.as_path(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
    };
    let user_namespace = namespace("user").map_err(step("open the user namespace"))?;
    let mount_namespace = namespace("mnt").map_err(step("open the mount namespace"))?;
    tree.attach_v1(name, pid.as_raw())?;
    nix::unistd::write(gate, b"g").map_err(step("release process 1"))?;
    Ok((user_namespace, mount_namespace))
}

/// Runs in the child: waits for the id map, becomes root of the new user namespace and executes the image.
fn become_process_one(image: BorrowedFd<'_>, boot: &OwnedFd, gate: &OwnedFd, groups: bool) -> ! {
    let prepare = || -> nix::Result<()> {
        let mut byte = [0_u8; 1];
        if read(gate, &mut byte)? != 1 {
            return Err(nix::Error::EPIPE);
        }
        if groups {
            setgroups(&[])?;
        }
        let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        execute_image(image, boot, c"init")
    };
    // The launcher sees the end of the boot socket; there is nobody else to tell.
    let status = prepare().map_or_else(|errno| errno as i32, |()| 0);
    exit_now(status & 0x7f)
}

/// Executes the image in this role with exactly two descriptors beside 0 to 2: the boot socket and the image, which closes with
/// the call. Nothing of the launcher's memory survives. Returns only if it fails.
pub(super) fn execute_image(image: BorrowedFd<'_>, boot: &OwnedFd, role: &CStr) -> nix::Result<()> {
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    // All sources first move out of the way of the fixed numbers.
    let sources = [duplicate_above(null.as_fd(), 64)?, duplicate_above(boot.as_fd(), 64)?, duplicate_above(image, 64)?];
    for number in 0..3 {
        place_descriptor(sources[0].as_raw_fd(), number)?;
    }
    place_descriptor(sources[1].as_raw_fd(), BOOT_DESCRIPTOR)?;
    place_descriptor(sources[2].as_raw_fd(), IMAGE_DESCRIPTOR)?;
    let image = inherited_descriptor(IMAGE_DESCRIPTOR)?;
    fcntl(&image, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    close_range(IMAGE_DESCRIPTOR + 1, i32::MAX)?;
    let argv = [c"sandbox-init", role].map(CString::from);
    Err(execute_descriptor(image.as_fd(), &argv, &[]))
}

fn write_file(path: &str, text: &str) -> Result<(), SpawnError> {
    let failed = |source| SpawnError::File { path: PathBuf::from(path), source };
    fs::File::options().write(true).open(path).map_err(failed)?.write_all(text.as_bytes()).map_err(failed)
}
