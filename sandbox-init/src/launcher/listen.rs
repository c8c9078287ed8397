//! Privileged: CAP_CHOWN to give the socket to the runner.
//!
//! Makes the socket that the runner connects to.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat, fstat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, geteuid, unlinkat};

use super::policy_file::Policy;
use super::start::{StartError, file, step};

/// Name of the directory in which the socket is made.
const WORKSHOP: &str = ".launcher-socket";

/// The socket of the runner, under the name that the policy gives.
///
/// The directory above may be the runner's. If the socket were made there and then given its mode and its owner by name, the
/// runner could exchange it for a link in between, and be given any file of the host. So it is made in a directory that
/// nobody else can enter, and moves to its name when it is complete.
pub(super) fn listen_on(policy: &Policy, rootless: bool) -> Result<OwnedFd, StartError> {
    let path = policy.listen.as_deref().ok_or(StartError::NoSocket)?;
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else { return Err(StartError::NoSocket) };
    let failed = |errno: nix::Error| file(path)(errno.into());
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let above = open(above, flags, Mode::empty()).map_err(failed)?;
    match mkdirat(&above, WORKSHOP, Mode::S_IRWXU) {
        Ok(()) | Err(nix::Error::EEXIST) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let workshop = openat(&above, WORKSHOP, flags | OFlag::O_NOFOLLOW, Mode::empty()).map_err(failed)?;
    let found = fstat(&workshop).map_err(failed)?;
    if found.st_uid != geteuid().as_raw() || found.st_mode & 0o077 != 0 {
        return Err(StartError::Foreign { path: path.with_file_name(WORKSHOP), owner: found.st_uid });
    }
    // What a launcher that was killed at this moment has left.
    match unlinkat(&workshop, "socket", UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(nix::Error::ENOENT) => {}
        Err(errno) => return Err(failed(errno)),
    }
    let kind = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, kind, None).map_err(step("make the socket"))?;
    let address = UnixAddr::new(format!("/proc/self/fd/{}/socket", workshop.as_raw_fd()).as_str())
        .map_err(step("name the socket"))?;
    bind(listener.as_raw_fd(), &address).map_err(step("bind the socket"))?;
    let place = || {
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        fchmodat(&workshop, "socket", mode, FchmodatFlags::FollowSymlink)?;
        if !rootless {
            let (uid, gid) = (Uid::from_raw(policy.runner_uid), Gid::from_raw(policy.runner_gid));
            fchownat(&workshop, "socket", Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        }
        renameat(&workshop, "socket", &above, name)
    };
    let placed = place();
    // Empty now, unless the move failed; then what is in it is removed by the next launcher.
    let _ = unlinkat(&above, WORKSHOP, UnlinkatFlags::RemoveDir);
    placed.map_err(failed)?;
    listen(&listener, Backlog::new(16).unwrap_or(Backlog::MAXCONN)).map_err(step("listen"))?;
    Ok(listener)
}
