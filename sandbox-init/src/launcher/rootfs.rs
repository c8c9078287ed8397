//! Privileged: CAP_SYS_ADMIN to mount overlays and to idmap mounts.
//!
//! Builds the root filesystem of one sandbox as a detached overlay: read-only lowers, shown through the sandbox's id map,
//! below an upper that belongs to the sandbox's range. Lowers are never copied and never change hands. Nothing here
//! follows a name that a sandbox or an image chose.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

use super::host::place;
use crate::sys::mount::{FilesystemContext, attach, attribute, open_tree, set_attributes};

/// Why a root filesystem could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct RootfsError {
    /// What was tried.
    pub step: &'static str,
    /// The cause.
    #[source]
    pub source: nix::Error,
}

fn failed(step: &'static str) -> impl FnOnce(nix::Error) -> RootfsError {
    move |source| RootfsError { step, source }
}

/// Where the changes of a sandbox go.
#[derive(Clone, Debug)]
pub enum Upper {
    /// A tmpfs of this many bytes, charged to the sandbox's memory. A hard limit.
    Memory {
        /// Its size.
        bytes: u64,
    },
    /// A directory of the state filesystem. The limit is only watched.
    Directory {
        /// Directory that holds `upper` and `work`, owned by the range.
        path: PathBuf,
    },
}

/// What a root filesystem is made from.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The lower directory in the trimmed namespace.
    pub lower: &'a Path,
    /// Number of the id slot, for the cache.
    pub slot: u32,
    /// First host id of the sandbox.
    pub base: u32,
    /// The sandbox's user namespace.
    pub user_namespace: BorrowedFd<'a>,
    /// Where changes go.
    pub upper: Upper,
    /// The launcher has no privilege over the host's filesystems.
    pub rootless: bool,
    /// Lay the mount points of process 1 over the lower: nobody inside may make them in it.
    pub add_points: bool,
}

/// A root filesystem, ready to be attached.
#[derive(Debug)]
pub struct Built {
    /// The detached overlay.
    pub mount: OwnedFd,
    /// Whether the lowers are shown through the sandbox's id map.
    pub idmapped: bool,
}

/// Builds overlays and remembers idmapped lowers per slot: a slot's map never changes, so its trees can be used again.
#[derive(Debug, Default)]
pub struct Builder {
    cache: HashMap<(u32, PathBuf), OwnedFd>,
    /// Kernels below 6.13 take no descriptors for layers, those below 6.15 no detached ones.
    paths_only: bool,
    /// The filesystem of the lowers cannot be idmapped.
    no_idmap: bool,
}

impl Builder {
    /// Whether lowers could be idmapped so far.
    #[must_use]
    pub fn idmaps(&self) -> bool {
        !self.no_idmap
    }

    /// Builds one over the mount that holds its upper, of which the overlay gets a copy of its own.
    ///
    /// # Errors
    /// [`RootfsError`] names the step.
    pub fn build(&mut self, plan: &Plan<'_>, upper: &OwnedFd) -> Result<Built, RootfsError> {
        if let Some(built) = self.try_descriptors(plan, upper)? {
            return Ok(built);
        }
        // The kernel needs a path, so a tree is attached for a moment. Not a copy of the cached one: before 6.15 the
        // kernel refuses to copy a detached tree.
        let fresh = self.lower_tree(plan)?;
        let mount = by_paths(&fresh, upper, plan)?;
        Ok(Built { mount, idmapped: self.idmaps_for(plan) })
    }

    /// The same without attaching anything anywhere, where the kernel can.
    pub fn build_by_descriptors(&mut self, plan: &Plan<'_>, upper: &OwnedFd) -> Option<Built> {
        self.try_descriptors(plan, upper).ok().flatten()
    }

    /// Another builder has built this one.
    pub fn learn(&mut self, built: &Built, rootless: bool) {
        self.no_idmap |= !built.idmapped && !rootless;
    }

    /// `None`: the kernel wants paths.
    fn try_descriptors(&mut self, plan: &Plan<'_>, upper: &OwnedFd) -> Result<Option<Built>, RootfsError> {
        if self.paths_only {
            return Ok(None);
        }
        let key = (plan.slot, plan.lower.to_owned());
        if !self.cache.contains_key(&key) {
            let tree = self.lower_tree(plan)?;
            self.cache.insert(key.clone(), tree);
        }
        let lower = self.cache.get(&key).ok_or(RootfsError { step: "keep the lower", source: Errno::ENOENT })?;
        match by_descriptors(lower, upper, plan) {
            Ok(mount) => Ok(Some(Built { mount, idmapped: self.idmaps_for(plan) })),
            Err(Errno::EINVAL | Errno::EBADF | Errno::ENOTDIR) => {
                self.paths_only = true;
                Ok(None)
            }
            Err(source) => Err(RootfsError { step: "mount the overlay", source }),
        }
    }

    fn idmaps_for(&self, plan: &Plan<'_>) -> bool {
        !self.no_idmap && !plan.rootless
    }

    fn lower_tree(&mut self, plan: &Plan<'_>) -> Result<OwnedFd, RootfsError> {
        let path = c_string(plan.lower)?;
        let copy = || open_tree(AT_FDCWD, &path, false).map_err(failed("copy the lower"));
        let tree = copy()?;
        let attributes = attribute::READ_ONLY | attribute::NO_SET_UID | attribute::NO_DEVICES;
        if plan.rootless {
            return Ok(tree);
        }
        match set_attributes(tree.as_fd(), attributes, 0, Some(plan.user_namespace), false) {
            Ok(()) => Ok(tree),
            Err(Errno::EINVAL | Errno::EPERM) => {
                self.no_idmap = true;
                let tree = copy()?;
                set_attributes(tree.as_fd(), attributes, 0, None, false).map_err(failed("make the lower read-only"))?;
                Ok(tree)
            }
            Err(source) => Err(RootfsError { step: "idmap the lower", source }),
        }
    }
}

/// Makes the mount that holds `upper` and `work`, both owned by the range from `base` on. Dropping it dissolves it, which
/// waits for other processors, so that is for when nobody waits for the launcher.
///
/// # Errors
/// [`RootfsError`] names the step.
pub fn upper_mount(upper: &Upper, base: u32, rootless: bool) -> Result<OwnedFd, RootfsError> {
    let owner = (Some(Uid::from_raw(base)), Some(Gid::from_raw(base)));
    let holder = match upper {
        Upper::Memory { bytes } => {
            let size = CString::new(bytes.to_string())
                .map_err(|_| RootfsError { step: "size the upper", source: Errno::EINVAL })?;
            // One inode costs about 1 KiB of kernel memory; small files are what fills a disk with inodes.
            let inodes = CString::new((bytes / 4096).clamp(1024, 2_000_000).to_string())
                .map_err(|_| RootfsError { step: "size the upper", source: Errno::EINVAL })?;
            let context = FilesystemContext::open(c"tmpfs").map_err(failed("make the upper"))?;
            context.set_string(c"size", &size).map_err(failed("size the upper"))?;
            context.set_string(c"nr_inodes", &inodes).map_err(failed("size the upper"))?;
            context.set_string(c"mode", c"0755").map_err(failed("make the upper"))?;
            context.create(attribute::NO_SET_UID | attribute::NO_DEVICES).map_err(failed("make the upper"))?
        }
        Upper::Directory { path } => {
            let directory = open(
                path.as_path(),
                OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
            .map_err(failed("open the upper"))?;
            open_tree(directory.as_fd(), c"", false).map_err(failed("copy the mount of the upper"))?
        }
    };
    for name in ["upper", "work"] {
        match mkdirat(&holder, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(source) => return Err(RootfsError { step: "make the upper", source }),
        }
        if !rootless {
            fchownat(&holder, name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(failed("give the upper to the sandbox"))?;
        }
    }
    Ok(holder)
}

fn configure(rootless: bool) -> nix::Result<FilesystemContext> {
    let context = FilesystemContext::open(c"overlay")?;
    context.set_string(c"source", c"sandbox")?;
    if rootless {
        context.set_flag(c"userxattr")?;
    } else {
        // A crafted attribute in a layer must not redirect anything.
        context.set_string(c"redirect_dir", c"nofollow")?;
        context.set_string(c"metacopy", c"off")?;
    }
    Ok(context)
}

const OVERLAY_ATTRIBUTES: u64 = attribute::NO_SET_UID | attribute::NO_DEVICES;

/// Linux 6.13 and up (6.15 for detached trees): no path, so none in the sandbox's mount table either.
fn by_descriptors(lower: &OwnedFd, upper: &OwnedFd, plan: &Plan<'_>) -> nix::Result<OwnedFd> {
    let context = configure(plan.rootless)?;
    let directory = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if plan.add_points {
        context.set_descriptor(c"lowerdir+", &open(place::POINTS, directory, Mode::empty())?)?;
    }
    context.set_descriptor(c"lowerdir+", lower)?;
    let changes = nix::fcntl::openat(upper, "upper", directory, Mode::empty())?;
    let work = nix::fcntl::openat(upper, "work", directory, Mode::empty())?;
    context.set_descriptor(c"upperdir", &changes)?;
    context.set_descriptor(c"workdir", &work)?;
    // Nobody remounts the upper of an ephemeral sandbox; a persistent one is synced when it is unmounted.
    if matches!(plan.upper, Upper::Memory { .. }) {
        context.set_flag(c"volatile")?;
    }
    context.create(OVERLAY_ATTRIBUTES)
}

/// Older kernels: the layers are attached in the launcher's own namespace while the overlay is made. The overlay keeps its
/// own private copies, so both are detached at once afterwards.
fn by_paths(lower: &OwnedFd, upper: &OwnedFd, plan: &Plan<'_>) -> Result<OwnedFd, RootfsError> {
    let scratch = Path::new(place::SCRATCH);
    let (lower_point, upper_point) = (scratch.join("l"), scratch.join("u"));
    let mut attached = Vec::new();
    let result = (|| {
        for (mount, point) in [(lower, &lower_point), (upper, &upper_point)] {
            std::fs::create_dir_all(point)
                .map_err(|_| RootfsError { step: "make a mount point", source: Errno::EIO })?;
            let at = open(point.as_path(), OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
                .map_err(failed("open a mount point"))?;
            attach(mount.as_fd(), at.as_fd(), c"").map_err(failed("attach a layer"))?;
            attached.push(point.clone());
        }
        let make = || -> nix::Result<OwnedFd> {
            let context = configure(plan.rootless)?;
            context.set_string(c"lowerdir", if plan.add_points { c"/points:/m/l" } else { c"/m/l" })?;
            context.set_string(c"upperdir", c"/m/u/upper")?;
            context.set_string(c"workdir", c"/m/u/work")?;
            if matches!(plan.upper, Upper::Memory { .. }) {
                context.set_flag(c"volatile")?;
            }
            context.create(OVERLAY_ATTRIBUTES)
        };
        make().map_err(failed("mount the overlay"))
    })();
    for point in attached {
        // Ours and empty of users; a failure would leave one mount in a namespace that ends with the launcher.
        let _ = umount2(&point, MntFlags::MNT_DETACH);
    }
    result
}

fn c_string(path: &Path) -> Result<CString, RootfsError> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| RootfsError { step: "name a layer", source: Errno::EINVAL })
}
