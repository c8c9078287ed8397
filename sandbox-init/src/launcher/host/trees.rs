//! Privileged: CAP_MKNOD for the device nodes.
//!
//! The two trees that are made once and that every sandbox gets: `/dev`, and the skeleton of the `host` root filesystem.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::{HOST_DIRECTORIES, HostError, c_path, failed, failed_io, make, small_tmpfs};
use crate::sys::mount::{attach, open_tree};

/// Files of the host's `/etc` that programs need to run and that say nothing about the host's users or networks.
const HOST_ETC: [&str; 14] = [
    "ld.so.cache",
    "ld.so.conf",
    "localtime",
    "timezone",
    "protocols",
    "services",
    "mime.types",
    "magic",
    "debian_version",
    "os-release",
    "lsb-release",
    "redhat-release",
    "login.defs",
    "ssl/openssl.cnf",
];

/// Directories of the host's `/etc` that are copied one level deep.
const HOST_ETC_DIRECTORIES: [&str; 4] = ["alternatives", "ld.so.conf.d", "ssl/certs", "terminfo"];

/// Device nodes a sandbox gets: name, major, minor.
const DEVICE_NODES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Copies of the host's device nodes, for a launcher that may not make nodes.
pub(super) fn copy_nodes() -> Result<Vec<(&'static str, OwnedFd)>, HostError> {
    let mut nodes = Vec::new();
    for (name, _, _) in DEVICE_NODES {
        let path = Path::new("/dev").join(name);
        let tree = open_tree(AT_FDCWD, &c_path(&path)?, false).map_err(failed("copy the mount of", &path))?;
        nodes.push((name, tree));
    }
    Ok(nodes)
}

/// `/dev` with the nodes that are made here, or with copies of the host's.
pub(super) fn build_devices(directory: &Path, nodes: Option<Vec<(&'static str, OwnedFd)>>) -> Result<(), HostError> {
    let tree = small_tmpfs(c"65536", c"0755")?;
    let at = open(directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(failed("open", directory))?;
    attach(tree.as_fd(), at.as_fd(), c"").map_err(failed("attach", directory))?;
    for name in ["pts", "shm"] {
        make(&directory.join(name))?;
    }
    for (name, target) in
        [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("ptmx", "pts/ptmx")]
    {
        let link = directory.join(name);
        symlink(target, &link).map_err(failed_io("link", link))?;
    }
    match nodes {
        None => {
            for (name, major, minor) in DEVICE_NODES {
                let path = directory.join(name);
                mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
                    .map_err(failed("make device", &path))?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).map_err(failed_io("chmod", &path))?;
            }
        }
        Some(nodes) => {
            for (name, tree) in nodes {
                let path = directory.join(name);
                let file = fs::File::create(&path).map_err(failed_io("create", &path))?;
                attach(tree.as_fd(), file.as_fd(), c"").map_err(failed("attach", &path))?;
            }
        }
    }
    Ok(())
}

/// Content of the host's `/etc` that the skeleton takes over: path and bytes, or path and link target.
pub(super) enum EtcEntry {
    File(PathBuf, Vec<u8>),
    Link(PathBuf, PathBuf),
}

/// A file of `/etc` larger than this is not one of those we want.
const MAX_ETC_BYTES: u64 = 1 << 20;

/// What there is of it on this host.
pub(super) fn read_host_etc() -> Vec<EtcEntry> {
    let mut entries = Vec::new();
    let mut add = |name: PathBuf| {
        let path = Path::new("/etc").join(&name);
        let Ok(found) = fs::symlink_metadata(&path) else { return };
        if found.is_symlink() {
            // Links into /usr stay links; what they point to is mounted.
            if let Ok(target) = fs::read_link(&path) {
                entries.push(EtcEntry::Link(name, target));
            }
        } else if found.is_file() && found.len() <= MAX_ETC_BYTES && found.permissions().mode() & 0o004 != 0 {
            if let Ok(bytes) = fs::read(&path) {
                entries.push(EtcEntry::File(name, bytes));
            }
        }
    };
    for name in HOST_ETC {
        add(PathBuf::from(name));
    }
    for directory in HOST_ETC_DIRECTORIES {
        let Ok(found) = fs::read_dir(Path::new("/etc").join(directory)) else { continue };
        for entry in found.flatten().take(4096) {
            add(Path::new(directory).join(entry.file_name()));
        }
    }
    entries
}

/// Directories of the skeleton with their modes.
const SKELETON_DIRECTORIES: [(&str, u32); 22] = [
    ("etc", 0o755),
    ("etc/ssl", 0o755),
    ("home", 0o755),
    ("home/agent", 0o755),
    ("root", 0o700),
    ("workspace", 0o755),
    ("tmp", 0o1777),
    ("run", 0o755),
    ("run/sandbox-runner", 0o755),
    ("var", 0o755),
    ("var/tmp", 0o1777),
    ("var/lib", 0o755),
    ("var/cache", 0o755),
    ("var/log", 0o755),
    ("opt", 0o755),
    ("srv", 0o755),
    ("mnt", 0o755),
    ("media", 0o755),
    ("proc", 0o555),
    ("sys", 0o555),
    ("dev", 0o755),
    ("usr", 0o755),
];

/// Users of the sandbox; the host's are not its business.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nagent:x:1000:1000:agent:/home/agent:/bin/bash\n_apt:x:42:65534::/nonexistent:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\ntty:x:5:\nstaff:x:50:\nagent:x:1000:\nnogroup:x:65534:\n";
const NSSWITCH: &str =
    "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nprotocols: files\nservices: files\n";
const HOSTS: &str = "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost ip6-loopback sandbox\n";

/// The skeleton of the `host` root filesystem: directories, links into `/usr`, and an `/etc` that names nobody of the host.
pub(super) fn build_skeleton(directory: &Path, links: &[(&str, PathBuf)], etc: &[EtcEntry]) -> Result<(), HostError> {
    let tree = small_tmpfs(c"33554432", c"0755")?;
    let at = open(directory, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(failed("open", directory))?;
    attach(tree.as_fd(), at.as_fd(), c"").map_err(failed("attach", directory))?;
    for (name, mode) in SKELETON_DIRECTORIES {
        let path = directory.join(name);
        make(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(failed_io("chmod", &path))?;
    }
    for name in HOST_DIRECTORIES {
        let path = directory.join(name);
        match links.iter().find(|(link, _)| *link == name) {
            Some((_, target)) => symlink(target, &path).map_err(failed_io("link", &path))?,
            None => make(&path)?,
        }
    }
    for entry in etc {
        let (EtcEntry::File(name, _) | EtcEntry::Link(name, _)) = entry;
        let path = directory.join("etc").join(name);
        if let Some(parent) = path.parent() {
            make(parent)?;
        }
        match entry {
            EtcEntry::File(_, bytes) => fs::write(&path, bytes).map_err(failed_io("write", &path))?,
            EtcEntry::Link(_, target) => symlink(target, &path).map_err(failed_io("link", &path))?,
        }
        if matches!(entry, EtcEntry::File(..)) {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(failed_io("chmod", &path))?;
        }
    }
    for (name, text) in
        [("passwd", PASSWD), ("group", GROUP), ("nsswitch.conf", NSSWITCH), ("hosts", HOSTS), ("resolv.conf", "")]
    {
        let path = directory.join("etc").join(name);
        fs::write(&path, text).map_err(failed_io("write", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(failed_io("chmod", &path))?;
    }
    Ok(())
}
