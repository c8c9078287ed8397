//! Directories that a sandbox can have as its root: nothing but the prober, or something hostile.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// Where the prober is inside.
pub const PROBER: &str = "/usr/bin/prober";

/// Where [`Rootfs::with_set_uid_prober`] has the second one.
pub const SET_UID_PROBER: &str = "/usr/bin/set-uid-prober";

/// Where a runner keeps its journal in these suites: on a disk on every distribution, unlike /tmp.
pub const ON_DISK: &str = "/var/tmp";

/// A temporary directory on a disk that uid 65534 can read. Removed when dropped.
///
/// # Panics
/// When the temporary directory of the host is unusable.
#[must_use]
pub fn shared_directory(purpose: &str) -> TempDir {
    let directory = tempfile::Builder::new()
        .prefix(&format!("sbr-attack-{purpose}-"))
        .tempdir_in(ON_DISK)
        .expect("a temporary directory");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).expect("chmod of an own directory");
    directory
}

/// A root filesystem in a temporary directory.
#[derive(Debug)]
pub struct Rootfs {
    directory: TempDir,
}

impl Rootfs {
    /// The usual directories and the prober.
    ///
    /// # Panics
    /// When the files cannot be written.
    #[must_use]
    pub fn with_prober() -> Self {
        let rootfs = Self { directory: shared_directory("rootfs") };
        for name in
            ["dev", "etc", "home", "opt", "proc", "root", "run", "sys", "tmp", "usr/bin", "var/tmp", "workspace"]
        {
            fs::create_dir_all(rootfs.path().join(name)).expect("a directory of the rootfs");
        }
        for name in ["opt", "tmp", "var/tmp"] {
            fs::set_permissions(rootfs.path().join(name), Permissions::from_mode(0o1777))
                .expect("chmod of a directory");
        }
        symlink("usr/bin", rootfs.path().join("bin")).expect("a link of the rootfs");
        fs::write(rootfs.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").expect("passwd");
        let prober = rootfs.path().join(PROBER.trim_start_matches('/'));
        fs::copy(crate::prober::path(), &prober).expect("a copy of the prober");
        fs::set_permissions(&prober, Permissions::from_mode(0o755)).expect("chmod of the prober");
        rootfs
    }

    /// The same and a second prober, which is set-uid and set-gid for root as `su` is in most images.
    ///
    /// # Panics
    /// When the files cannot be written.
    #[must_use]
    pub fn with_set_uid_prober() -> Self {
        let rootfs = Self::with_prober();
        let gift = rootfs.path().join(SET_UID_PROBER.trim_start_matches('/'));
        fs::copy(crate::prober::path(), &gift).expect("a copy of the prober");
        fs::set_permissions(&gift, Permissions::from_mode(0o6755)).expect("chmod of the prober");
        rootfs
    }

    /// The same, as a tree that this user has unpacked.
    ///
    /// # Panics
    /// When the files cannot be given away.
    #[must_use]
    pub fn owned_by(uid: u32) -> Self {
        let rootfs = Self::with_prober();
        if uid != nix::unistd::geteuid().as_raw() {
            for path in crate::host::files_below(rootfs.path()).iter().map(PathBuf::as_path).chain([rootfs.path()]) {
                lchown(path, Some(uid), Some(uid)).expect("root gives a file away");
            }
        }
        rootfs
    }

    /// The same, with `name` replaced by a symbolic link to `target`: an image made to redirect a mount.
    ///
    /// # Panics
    /// When the files cannot be written.
    #[must_use]
    pub fn with_link(name: &str, target: &Path) -> Self {
        let rootfs = Self::with_prober();
        let place = rootfs.path().join(name);
        if place.is_dir() {
            fs::remove_dir_all(&place).expect("a directory of our own");
        }
        symlink(target, &place).expect("a link of the rootfs");
        rootfs
    }

    /// The directory on the host.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Every file below the directory with its kind, size and mode: unchanged means that no sandbox wrote to it.
    #[must_use]
    pub fn listing(&self) -> Vec<String> {
        let mut list = Vec::new();
        list_below(self.path(), &mut list);
        list.sort();
        list
    }
}

fn list_below(directory: &Path, list: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path: PathBuf = entry.path();
        if let Ok(metadata) = fs::symlink_metadata(&path) {
            list.push(format!(
                "{} {:o} {}",
                path.display(),
                metadata.permissions().mode(),
                if metadata.is_dir() { 0 } else { metadata.len() }
            ));
            if metadata.is_dir() {
                list_below(&path, list);
            }
        }
    }
}
