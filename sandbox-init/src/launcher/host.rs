//! Privileged: CAP_SYS_ADMIN to make a mount namespace of the launcher's own.
//!
//! The trimmed mount namespace. The launcher leaves the host's tree for a tmpfs that holds nothing but: a bare `/proc`, the
//! cgroup tree, the host's `/usr` read-only, the directories that the policy names, our state and run directories, and two
//! trees made here once: `/dev` with the six nodes a sandbox gets, and the skeleton of the `host` root filesystem. Every
//! sandbox starts from a copy of this namespace, so a busy host's thousands of mounts are neither copied nor reachable.

mod trees;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use self::trees::{build_devices, build_skeleton, copy_nodes, read_host_etc};
use super::policy_file::Policy;
use crate::sys::mount::{FilesystemContext, attach, attribute, open_tree, set_attributes};

/// Why the namespace could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {}", path.display())]
pub struct HostError {
    /// What was tried.
    pub step: &'static str,
    /// On what.
    pub path: PathBuf,
    /// The cause.
    #[source]
    pub source: io::Error,
}

impl HostError {
    /// errno of the cause.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.source.raw_os_error().unwrap_or(0)
    }
}

fn failed<'a>(step: &'static str, path: impl Into<PathBuf> + 'a) -> impl FnOnce(nix::Error) -> HostError + 'a {
    move |errno| HostError { step, path: path.into(), source: errno.into() }
}

fn failed_io<'a>(step: &'static str, path: impl Into<PathBuf> + 'a) -> impl FnOnce(io::Error) -> HostError + 'a {
    move |source| HostError { step, path: path.into(), source }
}

/// Fixed places in the trimmed namespace.
pub mod place {
    /// Where process 1 assembles the sandbox's root.
    pub const NEW_ROOT: &str = "/newroot";
    /// The prebuilt `/dev`.
    pub const DEVICES: &str = "/dev";
    /// Skeleton of the host root filesystem.
    pub const SKELETON: &str = "/skeleton";
    /// What is ours in the state directory of the policy.
    pub const STATE: &str = "/state";
    /// What is ours in the run directory of the policy.
    pub const RUN: &str = "/run";
    /// Named root filesystems.
    pub const ROOTFS: &str = "/rootfs";
    /// Named volumes.
    pub const VOLUMES: &str = "/volumes";
    /// Mount points of ours, laid over a root filesystem in which an ordinary user may not make any.
    pub const POINTS: &str = "/points";
    /// Scratch mount points.
    pub const SCRATCH: &str = "/m";
    /// Read-only copies of the host's directories for the host root filesystem.
    pub const HOST: &str = "/host";
}

/// Where our own directories are. In the trimmed namespace they are in fixed places; without one they are where the policy
/// says.
#[derive(Clone, Debug)]
pub struct Places {
    state: PathBuf,
    run: PathBuf,
}

impl Places {
    /// In the trimmed namespace.
    #[must_use]
    pub fn trimmed() -> Self {
        Self { state: PathBuf::from(place::STATE), run: PathBuf::from(place::RUN) }
    }

    /// In the container's own tree.
    #[must_use]
    pub fn of(policy: &Policy) -> Self {
        Self { state: policy.state_directory.clone(), run: policy.run_directory.clone() }
    }

    /// One directory per sandbox.
    #[must_use]
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }

    /// Control sockets.
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        self.run.join("sandboxes")
    }
}

/// Directories of the host that the host root filesystem shows, when they are not links into `/usr`.
const HOST_DIRECTORIES: [&str; 7] = ["usr", "bin", "sbin", "lib", "lib64", "lib32", "libx32"];

/// What the host root filesystem of this host looks like.
#[derive(Clone, Debug, Default)]
pub struct HostRoot {
    /// Directories below [`place::HOST`] that must be mounted at the same name.
    pub directories: Vec<&'static str>,
}

impl HostRoot {
    /// Looks at a trimmed namespace that was made before.
    #[must_use]
    pub fn found() -> Self {
        let there = |name: &&str| Path::new(place::HOST).join(name).is_dir();
        Self { directories: HOST_DIRECTORIES.into_iter().filter(there).collect() }
    }

    /// A detached copy of each, in their order.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn copies(&self) -> nix::Result<Vec<OwnedFd>> {
        self.directories.iter().map(|name| copy_of(&Path::new(place::HOST).join(name))).collect()
    }
}

/// A detached copy of the mount at a directory of the trimmed namespace.
///
/// # Errors
/// What the kernel says.
pub fn copy_of(path: &Path) -> nix::Result<OwnedFd> {
    let directory = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    open_tree(directory.as_fd(), c"", false)
}

/// Makes a mount namespace of our own, still with the host's tree in it. Descriptors of directories that are to be copied
/// must be opened after this: the kernel copies only what is in the caller's namespace.
///
/// # Errors
/// [`HostError`] names the step.
pub fn separate() -> Result<(), HostError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("make a mount namespace", "/"))?;
    let nothing: Option<&str> = None;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).map_err(failed("make private", "/"))
}

/// Enters the trimmed namespace. `own` are our directories and where they go.
///
/// # Errors
/// [`HostError`] names the step.
pub fn enter(policy: &Policy, own: &[(&str, OwnedFd)], rootless: bool, cgroups: bool) -> Result<HostRoot, HostError> {
    // Mounts that came from a more privileged namespace are locked together, so that a single one of them cannot be copied.
    let copy = |path: &Path| copy_tree(path, rootless);

    let mut host_root = HostRoot::default();
    let mut trees: Vec<(PathBuf, OwnedFd, u64)> = vec![(PathBuf::from("/proc"), copy(Path::new("/proc"))?, 0)];
    if cgroups {
        trees.push((PathBuf::from("/sys/fs/cgroup"), copy_tree(Path::new("/sys/fs/cgroup"), true)?, 0));
    }
    let read_only = attribute::READ_ONLY | attribute::NO_SET_UID | attribute::NO_DEVICES;
    let mut links: Vec<(&str, PathBuf)> = Vec::new();
    for name in HOST_DIRECTORIES {
        let path = Path::new("/").join(name);
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => {
                links.push((name, fs::read_link(&path).map_err(failed_io("read link", &path))?));
            }
            Ok(found) if found.is_dir() => {
                trees.push((Path::new(place::HOST).join(name), copy(&path)?, read_only));
                host_root.directories.push(name);
            }
            _ => {}
        }
    }
    for (name, rootfs) in &policy.rootfs {
        trees.push((Path::new(place::ROOTFS).join(name), copy(&rootfs.path)?, read_only));
    }
    for (name, volume) in &policy.volumes {
        trees.push((
            Path::new(place::VOLUMES).join(name),
            copy(&volume.path)?,
            attribute::NO_SET_UID | attribute::NO_DEVICES,
        ));
    }
    // By descriptor, so that whoever owns the directories above cannot put anything else in their place.
    let hidden = attribute::NO_SET_UID | attribute::NO_DEVICES;
    for (target, directory) in own {
        let tree = open_tree(directory.as_fd(), c"", rootless).map_err(failed("copy the mount of", target))?;
        trees.push((PathBuf::from(target), tree, hidden));
    }
    let etc = read_host_etc();
    // Nobody but root of the whole machine makes device nodes; a container's root binds those it has.
    let nodes = if rootless || in_user_namespace() { Some(copy_nodes()?) } else { None };

    let root = small_tmpfs(c"16777216", c"0755")?;
    let scratch = Path::new("/tmp");
    let scratch_fd = open(scratch, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(failed("open", scratch))?;
    attach(root.as_fd(), scratch_fd.as_fd(), c"").map_err(failed("mount tmpfs on", scratch))?;
    nix::unistd::chdir(scratch).map_err(failed("enter", scratch))?;
    nix::unistd::fchdir(&root).map_err(failed("enter", scratch))?;
    for directory in [place::NEW_ROOT, place::SCRATCH, place::DEVICES, place::SKELETON] {
        make(&relative(Path::new(directory)))?;
    }
    for point in ["run/sandbox-runner", "workspace"] {
        make(&relative(&Path::new(place::POINTS).join(point)))?;
    }
    for (target, tree, attributes) in trees {
        let target = relative(&target);
        make(&target)?;
        if attributes != 0 {
            set_attributes(tree.as_fd(), attributes, 0, None, rootless).map_err(failed("make read-only", &target))?;
        }
        let at = open(&target, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(failed("open", &target))?;
        attach(tree.as_fd(), at.as_fd(), c"").map_err(failed("attach", &target))?;
    }
    build_devices(&relative(Path::new(place::DEVICES)), nodes)?;
    build_skeleton(&relative(Path::new(place::SKELETON)), &links, &etc)?;
    nix::unistd::pivot_root(".", ".").map_err(failed("pivot to", scratch))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("leave", "/"))?;
    nix::unistd::chdir("/").map_err(failed("enter", "/"))?;
    Ok(host_root)
}

/// Whether root here is somebody else on the host, as in a container with a user namespace.
#[must_use]
pub fn in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.split_whitespace().nth(2) != Some("4294967295"))
}

fn relative(path: &Path) -> PathBuf {
    Path::new(".").join(path.strip_prefix("/").unwrap_or(path))
}

fn make(path: &Path) -> Result<(), HostError> {
    fs::create_dir_all(path).map_err(failed_io("create", path))
}

fn c_path(path: &Path) -> Result<CString, HostError> {
    CString::new(path.as_os_str().as_encoded_bytes()).map_err(|error| HostError {
        step: "name",
        path: path.to_owned(),
        source: error.into(),
    })
}

fn copy_tree(path: &Path, recursive: bool) -> Result<OwnedFd, HostError> {
    let directory = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(failed("open", path))?;
    open_tree(directory.as_fd(), c"", recursive).map_err(failed("copy the mount of", path))
}

fn small_tmpfs(size: &std::ffi::CStr, mode: &std::ffi::CStr) -> Result<OwnedFd, HostError> {
    let make = || {
        let context = FilesystemContext::open(c"tmpfs")?;
        context.set_string(c"size", size)?;
        context.set_string(c"mode", mode)?;
        context.create(attribute::NO_SET_UID)
    };
    make().map_err(failed("make a tmpfs for", "/"))
}
