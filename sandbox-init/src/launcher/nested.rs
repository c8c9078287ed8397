//! Privileged: CAP_CHOWN for the sandbox's directories; CAP_SETUID, CAP_SETGID and CAP_SETPCAP pass on to process 1.
//!
//! The launcher's side of a sandbox without namespaces, in a container that allows none: one at a time, an ordinary process
//! tree of users of its own, with directories of its own in the state directory. See `stage::nested` for the inner side.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::Mode;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::chdir;
use proto::launch::v1::{Failure, Layer, MissingLayer};

use super::create::{Context, CreateError, layer, message, send_boot, step};
use super::files::{FilesError, Owners, file, make_listener};
use super::ids::Slot;
use super::policy_file::Ids;
use super::shape::Refusal;
use super::spawn::{Blank, Range, SpawnError, execute_image};
use super::validate::{Checked, refusal};
use crate::boot::{Nested, Role};
use crate::stage::nested::{Neighbours, WRITABLE};
use crate::sys::child::{Which, reap};
use crate::sys::process::{CloneArguments, Cloned, clone3, exit_now};
use crate::tree;

/// What is in the directory of one sandbox.
const DIRECTORIES: [&str; 5] = ["workspace", "home", "tmp", "output", "call"];

/// Three ids that nobody in this container has, drawn from the range of the policy.
///
/// Drawn, because the kernel counts the processes of a user over all containers of the host that have no user namespace of
/// their own: with fixed ids one container could use up the process limit of another.
///
/// # Errors
/// No free ids, or no random numbers.
pub fn draw(ids: &Ids) -> io::Result<Ids> {
    let places = u64::from(ids.per_sandbox) * u64::from(ids.slots) / u64::from(Neighbours::COUNT);
    let mut random = File::open("/dev/urandom")?;
    for _ in 0..32 {
        let mut number = [0_u8; 8];
        random.read_exact(&mut number)?;
        let place = u32::try_from(u64::from_ne_bytes(number) % places.max(1)).unwrap_or(0);
        let base = ids.base + place * Neighbours::COUNT;
        if Neighbours::at(base).living().is_empty() {
            return Ok(Ids { base, per_sandbox: Neighbours::COUNT, slots: 1 });
        }
    }
    Err(io::Error::from_raw_os_error(libc::EADDRINUSE))
}

/// Tries what process 1 and the workload need: other ids, and the way to the sandboxes' directories with them.
///
/// # Errors
/// The step that the kernel refused.
pub fn rehearse(ids: &Ids, directory: &Path) -> Result<(), Refusal> {
    let broken = |source| Refusal { step: "try to become another user", source };
    let neighbours = Neighbours::at(ids.base);
    let arguments = CloneArguments { exit_signal: libc::SIGCHLD, ..CloneArguments::default() };
    match clone3(&arguments).map_err(broken)? {
        Cloned::Child => {
            let tried = neighbours.become_workload(true).map_err(|errno| (1, errno));
            let tried = tried.and_then(|()| chdir(directory).map_err(|errno| (2, errno)));
            // Two numbers in one byte of status: errnos of these calls are small.
            exit_now(tried.map_or_else(|(step, errno)| step * 64 + (errno as i32 & 63), |()| 0))
        }
        Cloned::Parent { pidfd, .. } => match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED).map_err(broken)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            WaitStatus::Exited(_, status) if status >= 128 => Err(Refusal {
                step: "reach the state directory as another user; every directory above it must let others pass (chmod o+x)",
                source: Errno::from_raw(status & 63),
            }),
            WaitStatus::Exited(_, status) => Err(Refusal {
                step: "become another user; the container needs CAP_SETUID, CAP_SETGID, CAP_SETPCAP, CAP_KILL and CAP_CHOWN",
                source: Errno::from_raw(status & 63),
            }),
            _ => Err(broken(Errno::ECHILD)),
        },
    }
}

/// Makes process 1 of a sandbox that nobody has asked for yet.
///
/// # Errors
/// [`SpawnError`].
pub fn make_blank(image: BorrowedFd<'_>, name: String, range: Range) -> Result<Blank, SpawnError> {
    let failed = |step| move |source| SpawnError::Step { step, source };
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(failed("make a socket pair"))?;
    let arguments = CloneArguments {
        flags: u64::try_from(libc::CLONE_PARENT).unwrap_or_default(),
        exit_signal: 0,
        ..CloneArguments::default()
    };
    match clone3(&arguments).map_err(failed("start process 1"))? {
        Cloned::Child => {
            let status = execute_image(image, &theirs, c"nested").err().map_or(0, |errno| errno as i32);
            // The launcher sees the end of the boot socket; there is nobody else to tell.
            exit_now(status & 0x7f)
        }
        Cloned::Parent { pid, pidfd } => Ok(Blank {
            name,
            slot: range.slot,
            pid,
            pidfd,
            boot: ours,
            mounts: None,
            private: None,
            group: None,
            limits: None,
            ahead: None,
            spent: Vec::new(),
        }),
    }
}

/// What a sandbox without namespaces cannot have is refused by name.
///
/// # Errors
/// The refusal to send back.
pub fn check(request: &Checked) -> Result<(), Failure> {
    let not_here = |message: &str| {
        Err(refusal(
            "NOT_SUPPORTED",
            format!("{message}; this container allows no namespace"),
            "leave it out, or give the container what the tier pod needs (see the README)",
        ))
    };
    if !request.host_rootfs {
        return not_here("rootfs: a directory as root filesystem needs a mount namespace");
    }
    if !request.volumes.is_empty() {
        return not_here("volumes: they need a mount namespace");
    }
    match below_workspace(&request.working_directory) {
        Some(_) => Ok(()),
        None => not_here("working_directory: without a root filesystem of its own it must be /workspace or below it"),
    }
}

fn below_workspace(directory: &str) -> Option<&Path> {
    Path::new(directory).strip_prefix("/workspace").ok()
}

/// Sends the boot packet. Returns the layers that the launcher itself made.
///
/// # Errors
/// [`CreateError`]; the caller kills the blank.
pub fn boot(
    context: &mut Context<'_>,
    blank: &Blank,
    slot: &Slot,
    request: &Checked,
) -> Result<Vec<Layer>, CreateError> {
    let neighbours = Neighbours::at(slot.base);
    let directory = context.places.sandboxes().join(&blank.name);
    make_directory(&directory, 0o711, None)?;
    for name in WRITABLE {
        make_directory(&directory.join(name), 0o700, Some((neighbours.workload, neighbours.workload)))?;
    }
    let output = directory.join("output");
    make_directory(&output, 0o2755, Some((neighbours.keeper, context.policy.runner_gid)))?;
    let call = directory.join("call");
    make_directory(&call, 0o711, Some((neighbours.keeper, neighbours.keeper)))?;
    let mut working_directory = directory.join("workspace");
    for name in below_workspace(&request.working_directory).into_iter().flatten() {
        working_directory.push(name);
        make_directory(&working_directory, 0o700, Some((neighbours.workload, neighbours.workload)))?;
    }

    let policy = context.policy;
    let owners = Owners { runner_uid: policy.runner_uid, runner_gid: policy.runner_gid, shared: false };
    let listener = make_listener(&context.places.sockets().join(format!("{}.sock", blank.name)), owners)?;
    let (spool, calls) = (open_directory(&output)?, open_directory(&call)?);
    let mut message = message(context, slot, request);
    message.working_directory = working_directory.into_os_string().into_encoded_bytes();
    message.root = false;
    message.nested = Some(Nested {
        base: slot.base,
        directory: directory.to_string_lossy().into_owned(),
        pids: request.limits.pids,
        memory_bytes: request.limits.memory_bytes,
        file_bytes: request.limits.disk_bytes,
    });
    let mut descriptors =
        vec![(Role::Listener, listener.as_fd()), (Role::Spool, spool.as_fd()), (Role::Calls, calls.as_fd())];
    descriptors.extend(slot.lock().map(|lock| (Role::SlotLock, lock)));
    send_boot(blank, message, &descriptors)?;
    let limits = &request.limits;
    // Why they are missing is in the host report.
    Ok(vec![
        layer("cgroup_memory", format!("{} bytes", limits.memory_bytes), "", 0),
        layer("cgroup_cpu", format!("{} thousandths of a processor", limits.cpu_millis), "", 0),
        layer("disk_limit", format!("{} bytes", limits.disk_bytes), "", 0),
    ])
}

fn make_directory(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> Result<(), FilesError> {
    fs::create_dir(path).map_err(file("create", path))?;
    if let Some((uid, gid)) = owner {
        chown(path, Some(uid), Some(gid)).map_err(file("hand over", path))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(file("set the mode of", path))
}

fn open_directory(path: &Path) -> Result<OwnedFd, CreateError> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    open(path, flags, Mode::empty()).map_err(step("open a directory of the sandbox"))
}

/// Ends every process of a sandbox. False: some live on, try again. `base` 0: its ids are read from its directories.
pub fn end(sandboxes: &Path, name: &str, base: u32) -> bool {
    let neighbours = if base > 0 { Some(Neighbours::at(base)) } else { owners(&sandboxes.join(name)) };
    let Some(neighbours) = neighbours else { return true };
    if neighbours.living().is_empty() {
        return true;
    }
    neighbours.end_all();
    neighbours.living().is_empty()
}

/// The users of a sandbox that an earlier launcher left: only directories that look exactly like ours are believed.
fn owners(directory: &Path) -> Option<Neighbours> {
    let owner = |name: &str| fs::symlink_metadata(directory.join(name)).ok().filter(fs::Metadata::is_dir);
    let (workload, keeper) = (owner("workspace")?.uid(), owner("output")?.uid());
    let found = Neighbours::at(workload);
    (workload > 0 && found.keeper == keeper).then_some(found)
}

/// Adopts what a process 1 leaves behind: the container's own first process may be one that reaps nobody.
///
/// # Errors
/// Never on a kernel that has landlock.
pub fn adopt_orphans() -> nix::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)
}

/// Reaps what was adopted. Whoever is waited for by descriptor has been waited for by now.
pub fn reap_orphans() {
    while let Ok(Some(_)) = reap(Which::Any) {}
}

/// Removes what a sandbox had in the state directory. Its processes are gone.
pub fn remove_files(sandboxes: &Path, name: &str) {
    tree::remove_owned(sandboxes, name, &DIRECTORIES);
}

/// What the host report says of every layer that is missing for want of namespaces.
#[must_use]
pub fn missing(refused: &Refusal) -> Vec<MissingLayer> {
    let namespaces =
        "give the container what the tier pod needs (a user namespace of its own and privileged), or run on the host";
    let bound =
        "give the container what the tier pod needs; until then limits of the container itself are the only bound";
    let layers = [
        ("user_namespace", namespaces),
        ("nested_user_namespace", namespaces),
        ("mount_namespace", namespaces),
        ("root_switch", namespaces),
        ("pid_namespace", namespaces),
        ("network_namespace", namespaces),
        ("ipc_namespace", namespaces),
        ("uts_namespace", namespaces),
        ("cgroup_namespace", namespaces),
        ("proc_masked", namespaces),
        ("cgroup_memory", bound),
        ("cgroup_cpu", bound),
        ("disk_limit", bound),
        ("idmapped_lowers", namespaces),
    ];
    let entry = |(layer, remedy): (&str, &str)| MissingLayer {
        layer: layer.to_owned(),
        attempt: refused.step.to_owned(),
        errno: refused.source as i32,
        remedy: remedy.to_owned(),
    };
    layers.map(entry).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_drawn_inside_the_range_of_the_policy() {
        let range = Ids { base: 1_900_000_000, per_sandbox: 10, slots: 3 };
        for _ in 0..20 {
            let drawn = draw(&range).expect("free ids");
            assert!(drawn.base >= range.base && drawn.base + drawn.per_sandbox <= range.base + 30, "{drawn:?}");
            assert_eq!((drawn.per_sandbox, drawn.slots), (3, 1));
        }
    }

    #[test]
    fn a_working_directory_outside_of_the_workspace_has_no_place() {
        assert_eq!(below_workspace("/workspace/a/b"), Some(Path::new("a/b")));
        assert_eq!(below_workspace("/workspace"), Some(Path::new("")));
        for outside in ["/", "/srv", "/workspaces"] {
            assert_eq!(below_workspace(outside), None, "{outside}");
        }
    }

    #[test]
    fn directories_of_somebody_else_name_no_users_to_end() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(owners(directory.path()), None);
        for name in ["workspace", "output"] {
            fs::create_dir(directory.path().join(name)).expect("a directory");
        }
        assert_eq!(owners(directory.path()), None, "root's own directories");
    }
}
