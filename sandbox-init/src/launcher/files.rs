//! Privileged: gives directories and sockets to the sandbox's range and to the runner (CAP_CHOWN, CAP_FOWNER).
//!
//! What a sandbox has on the host's filesystems: its directory, the spool in it, and its control socket. Their names are
//! those of the blank, so they are made with it, before anybody asks.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::Mode;

use super::host::place;
use crate::sys::mount::{attribute, open_tree, set_attributes};

/// The files of one sandbox.
#[derive(Debug)]
pub struct Files {
    /// Listens for the runner.
    pub listener: OwnedFd,
    /// Spool directory, for process 1 to write in.
    pub spool: OwnedFd,
    /// Detached read-only mount of it, for everybody inside.
    pub spool_mount: OwnedFd,
}

/// Who gets what.
#[derive(Clone, Copy, Debug)]
pub struct Owners {
    /// Uid of the runner.
    pub runner_uid: u32,
    /// Gid of the runner.
    pub runner_gid: u32,
    /// There is one id only, and nothing to give away.
    pub shared: bool,
}

/// Why they could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A file.
    #[error("cannot {step} {}", path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A kernel call.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The cause.
        #[source]
        source: nix::Error,
    },
}

pub(super) fn file<'a>(step: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> FilesError + 'a {
    move |source| FilesError::File { step, path: path.to_owned(), source }
}

fn step(step: &'static str) -> impl FnOnce(nix::Error) -> FilesError {
    move |source| FilesError::Step { step, source }
}

/// Directory of a sandbox; what it writes to disk is below.
#[must_use]
pub fn directory_of(name: &str) -> PathBuf {
    Path::new(place::STATE).join("sandboxes").join(name)
}

fn socket_of(name: &str) -> PathBuf {
    Path::new(place::RUN).join("sandboxes").join(format!("{name}.sock"))
}

impl Files {
    /// Makes them. `keeper` is the host uid of process 1.
    ///
    /// # Errors
    /// [`FilesError`]; what was made goes with the name, see [`super::background::remove_files`].
    pub fn make(name: &str, keeper: u32, owners: Owners) -> Result<Self, FilesError> {
        let directory = directory_of(name);
        fs::create_dir(&directory).map_err(file("create", &directory))?;
        // Nobody else on this host has business in here; the runner reads spool files.
        set_mode(&directory, 0o710)?;
        if !owners.shared {
            chown(&directory, None, Some(owners.runner_gid)).map_err(file("hand over", &directory))?;
        }
        let (spool, spool_mount) = make_spool(&directory.join("output"), keeper, owners)?;
        Ok(Self { listener: make_listener(&socket_of(name), owners)?, spool, spool_mount })
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), FilesError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(file("set the mode of", path))
}

/// The spool: written by process 1 (`keeper`) alone, readable by the runner's group on the host and by everybody inside. A
/// runner that could write here could leave directories of its own, which nobody but root could remove.
fn make_spool(path: &Path, keeper: u32, owners: Owners) -> Result<(OwnedFd, OwnedFd), FilesError> {
    fs::create_dir(path).map_err(file("create", path))?;
    if !owners.shared {
        chown(path, Some(keeper), Some(owners.runner_gid)).map_err(file("hand over", path))?;
    }
    set_mode(path, 0o2755)?;
    let directory = open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(step("open the spool"))?;
    let mount = open_tree(directory.as_fd(), c"", false).map_err(step("copy the mount of the spool"))?;
    let attributes = attribute::READ_ONLY | attribute::NO_SET_UID | attribute::NO_DEVICES | attribute::NO_EXECUTE;
    set_attributes(mount.as_fd(), attributes, 0, None, false).map_err(step("make the spool read-only"))?;
    Ok((directory, mount))
}

/// The control socket: on the host side of the fence, for the runner alone, not visible inside.
pub(super) fn make_listener(path: &Path, owners: Owners) -> Result<OwnedFd, FilesError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener =
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(step("make the control socket"))?;
    let address = UnixAddr::new(path).map_err(step("name the control socket"))?;
    bind(listener.as_raw_fd(), &address).map_err(step("bind the control socket"))?;
    set_mode(path, 0o600)?;
    if !owners.shared {
        chown(path, Some(owners.runner_uid), Some(owners.runner_gid)).map_err(file("hand over", path))?;
    }
    listen(&listener, Backlog::new(4).unwrap_or(Backlog::MAXCONN)).map_err(step("listen on the control socket"))?;
    Ok(listener)
}
