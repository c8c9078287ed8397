//! The descriptor-based mount interface (Linux 5.2, 5.12 for `mount_setattr`).

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// Attributes of a mount, as in `mount_setattr(2)`.
pub mod attribute {
    /// Read-only.
    pub const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// Set-uid bits and file capabilities have no effect.
    pub const NO_SET_UID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// Device nodes do not open.
    pub const NO_DEVICES: u64 = libc::MOUNT_ATTR_NODEV;
    /// Nothing can be executed.
    pub const NO_EXECUTE: u64 = libc::MOUNT_ATTR_NOEXEC;
}

fn descriptor(rc: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(rc)?;
    let fd = i32::try_from(fd).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: every caller passes the result of a system call that returns a new descriptor nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A detached copy of the mount at `path` (and of those below it when `recursive`).
///
/// # Errors
/// What the kernel says.
pub fn open_tree(directory: BorrowedFd<'_>, path: &CStr, recursive: bool) -> nix::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
    flags |= libc::AT_SYMLINK_NOFOLLOW as u32;
    if recursive {
        flags |= libc::AT_RECURSIVE as u32;
    }
    // SAFETY: `path` is a C string that outlives the call.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, directory.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches a detached mount at the place that `target` and `path` name (`path` empty: at `target` itself).
///
/// # Errors
/// What the kernel says.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>, path: &CStr) -> nix::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are C strings that outlive the call.
    let rc = unsafe {
        libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), c"".as_ptr(), target.as_raw_fd(), path.as_ptr(), flags)
    };
    Errno::result(rc).map(drop)
}

/// Sets and clears attributes of a mount; with `user_namespace` it becomes idmapped.
///
/// # Errors
/// `EINVAL` when the filesystem cannot be idmapped.
pub fn set_attributes(
    mount: BorrowedFd<'_>,
    set: u64,
    clear: u64,
    user_namespace: Option<BorrowedFd<'_>>,
    recursive: bool,
) -> nix::Result<()> {
    let mut attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    if let Some(namespace) = user_namespace {
        attributes.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attributes.userns_fd = u64::try_from(namespace.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    }
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: `attributes` is initialised, of the size given, and outlives the call; the path is an empty C string.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(rc).map(drop)
}

/// A filesystem that is being configured (`fsopen(2)`).
#[derive(Debug)]
pub struct FilesystemContext(OwnedFd);

impl FilesystemContext {
    /// Opens a context for the filesystem type `name`.
    ///
    /// # Errors
    /// `ENODEV` when the kernel does not know it, `EPERM` without `CAP_SYS_ADMIN`.
    pub fn open(name: &CStr) -> nix::Result<Self> {
        // SAFETY: `name` is a C string that outlives the call. FSOPEN_CLOEXEC is 1.
        descriptor(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), 1) }).map(Self)
    }

    /// Sets `key` to a string.
    ///
    /// # Errors
    /// `EINVAL` for an unknown key or value.
    pub fn set_string(&self, key: &CStr, value: &CStr) -> nix::Result<()> {
        self.configure(1, key.as_ptr(), value.as_ptr(), 0)
    }

    /// Sets a flag.
    ///
    /// # Errors
    /// `EINVAL` for an unknown flag.
    pub fn set_flag(&self, key: &CStr) -> nix::Result<()> {
        self.configure(0, key.as_ptr(), std::ptr::null(), 0)
    }

    /// Sets `key` to a descriptor.
    ///
    /// # Errors
    /// `EINVAL` where the filesystem takes strings only.
    pub fn set_descriptor<F: AsFd>(&self, key: &CStr, value: &F) -> nix::Result<()> {
        self.configure(5, key.as_ptr(), std::ptr::null(), value.as_fd().as_raw_fd())
    }

    /// Makes the filesystem and a detached mount of it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(self, attributes: u64) -> nix::Result<OwnedFd> {
        self.configure(6, std::ptr::null(), std::ptr::null(), 0)?;
        // SAFETY: fsmount(2) takes integers only. FSMOUNT_CLOEXEC is 1.
        descriptor(unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), 1, attributes) })
    }

    fn configure(
        &self,
        command: libc::c_uint,
        key: *const libc::c_char,
        value: *const libc::c_char,
        auxiliary: i32,
    ) -> nix::Result<()> {
        // SAFETY: callers pass null or pointers to C strings that outlive the call, as the command demands
        // (linux/mount.h: 0 flag, 1 string, 5 descriptor, 6 create).
        let rc = unsafe { libc::syscall(libc::SYS_fsconfig, self.0.as_raw_fd(), command, key, value, auxiliary) };
        Errno::result(rc).map(drop)
    }
}
