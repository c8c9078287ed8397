//! Privileged: CAP_SYS_ADMIN in the sandbox's own user namespace.
//!
//! Makes ahead what is the same for every sandbox, assembles the sandbox's root in the one order written in [`assemble`], and
//! pivots into it. Never decides *what* to mount
//! and never follows a symbolic link in a target: the image is hostile. A target that is a link or a file is refused.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat, major, minor, mkdirat};
use nix::unistd::{Gid, Uid, fchdir, fchown, fchownat, pivot_root};

use super::StageError;
use crate::launcher::host::place;
use crate::sys::mount::{FilesystemContext, attach, attribute, open_tree, set_attributes};

/// Files of `/proc` that show or change the host: covered with `/dev/null`.
const MASKED_FILES: [&CStr; 18] = [
    c"cmdline",
    c"diskstats",
    c"partitions",
    c"config.gz",
    c"kcore",
    c"keys",
    c"key-users",
    c"kallsyms",
    c"latency_stats",
    c"timer_list",
    c"timer_stats",
    c"sched_debug",
    c"interrupts",
    c"kpageflags",
    c"kpagecount",
    // Locks of the whole machine with inodes and ranges: among them those that say which ids other sandboxes have.
    c"locks",
    c"mdstat",
    c"zoneinfo",
];
/// Directories of `/proc` that show the host's devices: covered with an empty directory.
const MASKED_DIRECTORIES: [&CStr; 4] = [c"acpi", c"asound", c"scsi", c"driver"];
/// Parts of `/proc` that change the kernel: made read-only.
const READ_ONLY: [&CStr; 6] = [c"bus", c"fs", c"irq", c"pressure", c"sys", c"sysrq-trigger"];

const PRIVATE: u64 = attribute::NO_SET_UID | attribute::NO_DEVICES;

/// The mounts that are the same for every sandbox, made before anybody asks for one. They hang below [`place::SCRATCH`] in
/// the mount namespace of process 1 and are moved, with what is mounted on them, when the root is known.
#[derive(Debug)]
pub struct Prebuilt {
    /// `/proc`, masked.
    proc: OwnedFd,
    /// `/dev` with `/dev/pts`, read-only.
    devices: OwnedFd,
    /// `/run/sandbox-runner`.
    own: OwnedFd,
    /// The directory for the shell's FIFOs, in the one above.
    calls: OwnedFd,
}

/// Everything to assemble.
#[derive(Debug)]
pub struct Assembly {
    /// Detached root.
    pub root: OwnedFd,
    /// What was made ahead.
    pub prebuilt: Prebuilt,
    /// Detached spool, read-only.
    pub spool: OwnedFd,
    /// Targets and detached mounts.
    pub extra: Vec<(String, OwnedFd)>,
    /// Size of `/tmp`; `/dev/shm` has a quarter of it.
    pub temporary_bytes: u64,
    /// The workload's id.
    pub workload: u32,
    /// Working directory, made when it does not exist.
    pub working_directory: String,
    /// Cover what `/proc` shows of the host.
    pub mask: bool,
}

/// Where process 1 keeps its own files inside.
pub const OWN_DIRECTORY: &str = "/run/sandbox-runner";

fn step(step: &str) -> impl FnOnce(nix::Error) -> StageError + '_ {
    move |source| StageError { step: step.to_owned(), source }
}

/// A fresh `/proc` of this pid namespace. Processes of other users are not listed.
///
/// # Errors
/// `EPERM` when the `/proc` we came from is not fully visible.
pub fn make_proc() -> Result<OwnedFd, StageError> {
    let make = || {
        let context = FilesystemContext::open(c"proc")?;
        context.set_string(c"hidepid", c"ptraceable")?;
        context.create(PRIVATE | attribute::NO_EXECUTE)
    };
    make().map_err(step("mount /proc"))
}

/// Makes what does not depend on the request. `keeper` is process 1's own id later.
///
/// # Errors
/// [`StageError`] names the step.
pub fn prebuild(proc: OwnedFd, keeper: u32) -> Result<Prebuilt, StageError> {
    let nothing: Option<&str> = None;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
        .map_err(step("make mounts private"))?;
    // A place of our own: the directory below belongs to the launcher.
    let scratch = small_tmpfs(c"0755").map_err(step("make a place for mounts"))?;
    attach_on(place::SCRATCH, &scratch)?;
    let root = scratch.as_fd();
    attach_at(root, "/proc", &proc)?;
    let devices = open_tree(AT_FDCWD, c"/dev", true).map_err(step("copy /dev"))?;
    attach_at(root, "/dev", &devices)?;
    // The nodes are the kernel's, the directory is ours: nobody inside adds to it.
    let attributes = attribute::READ_ONLY | attribute::NO_SET_UID | attribute::NO_EXECUTE;
    set_attributes(devices.as_fd(), attributes, 0, None, false).map_err(step("make /dev read-only"))?;
    attach_at(root, "/dev/pts", &terminals()?)?;
    mask(root)?;
    let (own, calls) = own_directory(root, keeper)?;
    Ok(Prebuilt { proc, devices, own, calls })
}

/// Assembles and pivots. Returns the directory for the shell's FIFOs.
///
/// # Errors
/// [`StageError`] names the step.
pub fn assemble(mut assembly: Assembly) -> Result<OwnedFd, StageError> {
    if !assembly.mask {
        assembly.prebuilt.proc = make_proc()?;
    }
    let prebuilt = &assembly.prebuilt;
    attach_on(place::NEW_ROOT, &assembly.root)?;
    // The mount's own root, not the directory below it.
    let root = assembly.root.as_fd();

    // Programs trust what they find here, and process 1 mounts nothing over it: a link would lead them elsewhere.
    for path in ["/etc", "/sys"] {
        directory_at(root, path)?;
    }
    // First what the host root filesystem shows, so that everything of ours lies above it.
    for (target, tree) in &assembly.extra {
        attach_at(root, target, tree)?;
    }
    attach_at(root, "/proc", &prebuilt.proc)?;
    attach_at(root, "/dev", &prebuilt.devices)?;
    attach_at(root, "/dev/shm", &temporary(assembly.temporary_bytes / 4, attribute::NO_EXECUTE)?)?;
    attach_at(root, "/tmp", &temporary(assembly.temporary_bytes, 0)?)?;
    attach_at(root, OWN_DIRECTORY, &prebuilt.own)?;
    attach_at(root, &format!("{OWN_DIRECTORY}/output"), &assembly.spool)?;
    working_directory(root, &assembly)?;

    fchdir(root).map_err(step("enter the new root"))?;
    pivot_root(".", ".").map_err(step("pivot"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("leave the old root"))?;
    nix::unistd::chdir("/").map_err(step("enter the new root"))?;
    Ok(assembly.prebuilt.calls)
}

fn size_option(bytes: u64) -> CString {
    CString::new(bytes.max(4096).to_string()).unwrap_or_default()
}

fn temporary(bytes: u64, attributes: u64) -> Result<OwnedFd, StageError> {
    let make = || {
        let context = FilesystemContext::open(c"tmpfs")?;
        context.set_string(c"size", &size_option(bytes))?;
        context.set_string(c"nr_inodes", &size_option((bytes / 8192).clamp(1024, 1_000_000)))?;
        context.set_string(c"mode", c"1777")?;
        context.create(PRIVATE | attributes)
    };
    make().map_err(step("make a temporary filesystem"))
}

fn terminals() -> Result<OwnedFd, StageError> {
    let make = || {
        let context = FilesystemContext::open(c"devpts")?;
        context.set_string(c"ptmxmode", c"0666")?;
        context.set_string(c"mode", c"0620")?;
        context.set_string(c"max", c"64")?;
        context.create(attribute::NO_SET_UID | attribute::NO_EXECUTE)
    };
    make().map_err(step("make /dev/pts"))
}

/// `/run/sandbox-runner`: belongs to process 1, so the workload can neither add to it nor rename in it. Returns it and the
/// call directory in it.
fn own_directory(root: BorrowedFd<'_>, keeper: u32) -> Result<(OwnedFd, OwnedFd), StageError> {
    let make = || {
        let context = FilesystemContext::open(c"tmpfs")?;
        context.set_string(c"size", c"20971520")?;
        context.set_string(c"nr_inodes", c"4096")?;
        context.set_string(c"mode", c"0755")?;
        context.create(PRIVATE | attribute::NO_EXECUTE)
    };
    let own = make().map_err(step("make the directory of process 1"))?;
    attach_at(root, "/own", &own)?;
    let keeper = (Some(Uid::from_raw(keeper)), Some(Gid::from_raw(keeper)));
    for (name, mode) in [("output", 0o755), ("call", 0o711)] {
        mkdirat(&own, name, Mode::from_bits_truncate(mode)).map_err(step("make the directory of process 1"))?;
    }
    let calls = open_below(own.as_fd(), "call", OFlag::O_RDONLY | OFlag::O_DIRECTORY)
        .map_err(step("open the call directory"))?;
    fchown(&calls, keeper.0, keeper.1).map_err(step("own the call directory"))?;
    fchownat(&own, "", keeper.0, keeper.1, AtFlags::AT_EMPTY_PATH).map_err(step("own the directory of process 1"))?;
    Ok((own, calls))
}

fn working_directory(root: BorrowedFd<'_>, assembly: &Assembly) -> Result<(), StageError> {
    let directory = directory_at(root, &assembly.working_directory)?;
    if assembly.workload != 0 {
        let owner = (Some(Uid::from_raw(assembly.workload)), Some(Gid::from_raw(assembly.workload)));
        let opened = open_below(directory.as_fd(), ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY)
            .map_err(step("open the working directory"))?;
        fchown(&opened, owner.0, owner.1).map_err(step("give the working directory to the workload"))?;
    }
    Ok(())
}

fn mask(root: BorrowedFd<'_>) -> Result<(), StageError> {
    let proc = open_below(root, "proc", OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(step("open /proc"))?;
    let null = open_below(root, "dev/null", OFlag::O_PATH).map_err(step("open /dev/null"))?;
    let found = fstat(&null).map_err(step("look at /dev/null"))?;
    let is_null = SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR
        && (major(found.st_rdev), minor(found.st_rdev)) == (1, 3);
    if !is_null {
        return Err(StageError {
            step: "mask /proc: /dev/null is not the null device".to_owned(),
            source: Errno::ENODEV,
        });
    }
    for name in MASKED_FILES {
        if let Some(target) = existing(&proc, name)? {
            let cover = open_tree(null.as_fd(), c"", false).map_err(step("copy /dev/null"))?;
            attach(cover.as_fd(), target.as_fd(), c"").map_err(step("mask a file of /proc"))?;
        }
    }
    let mut empty: Option<OwnedFd> = None;
    for name in MASKED_DIRECTORIES {
        if let Some(target) = existing(&proc, name)? {
            let cover = match &empty {
                Some(first) => open_tree(first.as_fd(), c"", false).map_err(step("copy an empty directory"))?,
                None => empty_directory()?,
            };
            attach(cover.as_fd(), target.as_fd(), c"").map_err(step("mask a directory of /proc"))?;
            empty.get_or_insert(cover);
        }
    }
    for name in READ_ONLY {
        if let Some(target) = existing(&proc, name)? {
            let copy = open_tree(target.as_fd(), c"", false).map_err(step("copy a part of /proc"))?;
            set_attributes(copy.as_fd(), attribute::READ_ONLY | PRIVATE | attribute::NO_EXECUTE, 0, None, false)
                .map_err(step("make a part of /proc read-only"))?;
            attach(copy.as_fd(), target.as_fd(), c"").map_err(step("cover a part of /proc"))?;
        }
    }
    Ok(())
}

fn empty_directory() -> Result<OwnedFd, StageError> {
    let make = || {
        let context = FilesystemContext::open(c"tmpfs")?;
        context.set_string(c"size", c"0")?;
        context.set_string(c"nr_inodes", c"1")?;
        context.set_string(c"mode", c"0555")?;
        context.create(attribute::READ_ONLY | PRIVATE | attribute::NO_EXECUTE)
    };
    // A size of 0 is "no limit" to tmpfs; one inode is what keeps it empty.
    make().map_err(step("make an empty directory"))
}

fn small_tmpfs(mode: &CStr) -> nix::Result<OwnedFd> {
    let context = FilesystemContext::open(c"tmpfs")?;
    context.set_string(c"size", c"65536")?;
    context.set_string(c"mode", mode)?;
    context.create(PRIVATE | attribute::NO_EXECUTE)
}

fn existing(proc: &OwnedFd, name: &CStr) -> Result<Option<OwnedFd>, StageError> {
    match open_below(proc.as_fd(), name.to_str().unwrap_or_default(), OFlag::O_PATH) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::ENOENT) => Ok(None),
        Err(source) => Err(StageError { step: format!("open /proc/{}", name.to_string_lossy()), source }),
    }
}

/// Opens below `root` without following any link.
fn open_below(root: BorrowedFd<'_>, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    openat2(root, path, OpenHow::new().flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW).resolve(resolve))
}

/// The directory at an absolute path inside, made where it is missing. A link or a file on the way is refused.
fn directory_at(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, StageError> {
    let refused = |source: Errno| {
        let reason = match source {
            Errno::ELOOP | Errno::ENOTDIR | Errno::EXDEV => {
                " (a link or a file stands there; the root filesystem is refused)"
            }
            _ => "",
        };
        StageError { step: format!("open the directory {path} of the root filesystem{reason}"), source }
    };
    let relative = path.trim_matches('/');
    if relative.is_empty() {
        return open_below(root, ".", OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(refused);
    }
    match open_below(root, relative, OFlag::O_PATH | OFlag::O_DIRECTORY) {
        Err(Errno::ENOENT) => {}
        other => return other.map_err(refused),
    }
    let mut current = open_below(root, ".", OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(refused)?;
    for name in relative.split('/').filter(|name| !name.is_empty()) {
        match mkdirat(&current, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(source) => return Err(refused(source)),
        }
        current = open_below(current.as_fd(), name, OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(refused)?;
    }
    Ok(current)
}

fn attach_at(root: BorrowedFd<'_>, path: &str, tree: &OwnedFd) -> Result<(), StageError> {
    let target = directory_at(root, path)?;
    attach(tree.as_fd(), target.as_fd(), c"").map_err(|source| StageError { step: format!("mount {path}"), source })
}

/// Mounts on a directory of the launcher's namespace.
fn attach_on(path: &str, tree: &OwnedFd) -> Result<(), StageError> {
    let point = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(step("open a mount point"))?;
    attach(tree.as_fd(), point.as_fd(), c"").map_err(|source| StageError { step: format!("mount {path}"), source })
}
