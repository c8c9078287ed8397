//! The domain of a sandbox, by what a confined thread can and cannot do.

use std::fs;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::kill;
use nix::sys::stat::{SFlag, makedev, mknod};
use nix::unistd::{Pid, isatty};

use super::*;

/// A tree with the directories a rootfs has.
fn tree() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a directory");
    for directory in STRICT_WRITABLE.into_iter().chain(["dev", "usr/bin", "etc"]) {
        fs::create_dir_all(root.path().join(directory)).expect("a directory");
    }
    fs::write(root.path().join("etc/passwd"), "root").expect("a file");
    root
}

/// Runs `body` in a thread inside the domain; a domain binds its thread only and ends with it.
fn confined<T: Send + 'static>(profile: Profile, root: &Path, body: impl FnOnce() -> T + Send + 'static) -> T {
    let prepared = prepare(profile, root).expect("a ruleset");
    std::thread::spawn(move || {
        prepared.restrict_self().expect("the domain");
        body()
    })
    .join()
    .expect("the confined thread")
}

fn kind<T>(result: std::io::Result<T>) -> Option<ErrorKind> {
    result.err().map(|error| error.kind())
}

#[test]
fn strict_writes_only_where_the_profile_says_and_reads_everywhere_below_the_root() {
    let root = tree();
    let path = root.path().to_path_buf();
    let (inside, system, device_node_directory, outside, read) = confined(Profile::Strict, root.path(), move || {
        (
            STRICT_WRITABLE.map(|directory| fs::write(path.join(directory).join("new"), "x").is_ok()),
            kind(fs::write(path.join("usr/bin/new"), "x")),
            kind(fs::write(path.join("dev/new"), "x")),
            kind(fs::read("/etc/hostname").or_else(|_| fs::read("/proc/version"))),
            fs::read(path.join("etc/passwd")).is_ok(),
        )
    });
    assert_eq!(inside, [true; 6]);
    assert_eq!(system, Some(ErrorKind::PermissionDenied));
    assert_eq!(device_node_directory, Some(ErrorKind::PermissionDenied));
    assert_eq!(outside, Some(ErrorKind::PermissionDenied));
    assert!(read);
}

#[test]
fn standard_writes_everywhere_below_the_root_and_nowhere_else() {
    let (root, other) = (tree(), tempfile::tempdir().expect("a directory"));
    let (path, outside) = (root.path().to_path_buf(), other.path().join("new"));
    let (below, beside) = confined(Profile::Standard, root.path(), move || {
        (fs::write(path.join("usr/bin/new"), "x").is_ok(), kind(fs::write(outside, "x")))
    });
    assert!(below);
    assert_eq!(beside, Some(ErrorKind::PermissionDenied));
    assert!(!other.path().join("new").exists());
}

#[test]
fn a_descriptor_of_an_outer_directory_opens_nothing_but_one_of_an_outer_file_stays_usable() {
    let (root, other) = (tree(), tempfile::tempdir().expect("a directory"));
    fs::write(other.path().join("procs"), "").expect("a file");
    let directory = open(other.path(), OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).expect("a directory");
    let file = open(&other.path().join("procs"), OFlag::O_WRONLY, Mode::empty()).expect("a file");
    let (opened, written) = confined(Profile::Standard, root.path(), move || {
        let opened = nix::fcntl::openat(&directory, "procs", OFlag::O_WRONLY, Mode::empty()).map(drop);
        (opened, nix::unistd::write(&file, b"1"))
    });
    assert_eq!(opened, Err(Errno::EACCES));
    assert_eq!(written, Ok(1));
}

#[test]
fn files_move_between_directories_in_both_profiles() {
    for profile in Profile::ALL {
        let root = tree();
        fs::write(root.path().join("workspace/a"), "x").expect("a file");
        let path = root.path().to_path_buf();
        let moved = confined(profile, root.path(), move || fs::rename(path.join("workspace/a"), path.join("tmp/b")));
        moved.expect("the rename");
        assert!(root.path().join("tmp/b").exists(), "{profile:?}");
    }
}

#[test]
fn truncating_a_file_that_may_only_be_read_is_refused() {
    let root = tree();
    let file = root.path().join("etc/passwd");
    let truncated = confined(Profile::Strict, root.path(), move || nix::unistd::truncate(&file, 0));
    assert_eq!(truncated, Err(Errno::EACCES));
    assert_eq!(fs::read(root.path().join("etc/passwd")).expect("the file"), b"root");
}

#[test]
fn mounting_is_refused_even_to_a_caller_with_the_capability() {
    let root = tree();
    let target = root.path().join("tmp");
    let prepared = prepare(Profile::Standard, root.path()).expect("a ruleset");
    let (before, inside) = std::thread::spawn(move || {
        // A mount namespace of this thread, so that nothing is mounted on the machine.
        if unshare(CloneFlags::CLONE_NEWNS).is_err() {
            return (None, Err(Errno::EPERM));
        }
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).expect("private");
        let attempt = || mount(Some("none"), &target, Some("tmpfs"), MsFlags::empty(), None::<&str>);
        let before = attempt();
        prepared.restrict_self().expect("the domain");
        (Some(before), attempt())
    })
    .join()
    .expect("the confined thread");
    match before {
        Some(before) => assert_eq!((before, inside), (Ok(()), Err(Errno::EPERM))),
        None => println!("skipped: no right to make a mount namespace"),
    }
}

#[test]
fn signals_and_abstract_sockets_end_at_the_border_of_the_domain() {
    let root = tree();
    let address = SocketAddr::from_abstract_name(format!("sbr-policy-{}", std::process::id())).expect("an address");
    let listener = UnixListener::bind_addr(&address).expect("a socket outside");
    UnixStream::connect_addr(&address).expect("outside, the socket can be reached");
    let mut child = std::process::Command::new("/bin/sleep").arg("60").spawn().expect("a process outside");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    kill(pid, None).expect("outside, the process can be signalled");
    let scopes = prepare(Profile::Standard, root.path()).expect("a ruleset").achieved().scopes;

    let (connected, signalled) =
        confined(Profile::Standard, root.path(), move || (kind(UnixStream::connect_addr(&address)), kill(pid, None)));
    child.kill().expect("the end of the process");
    child.wait().expect("the end of the process");
    drop(listener);

    if scopes {
        assert_eq!(connected, Some(ErrorKind::PermissionDenied));
        assert_eq!(signalled, Err(Errno::EPERM));
    } else {
        println!("skipped: this kernel has no scopes");
    }
}

#[test]
fn device_commands_work_below_dev_only_and_device_nodes_cannot_be_made() {
    let directory = tempfile::tempdir().expect("a directory");
    let (node, new) = (directory.path().join("null"), directory.path().join("new"));
    let made = mknod(&node, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3));
    let usable = made.is_ok() && fs::File::open(&node).is_ok();
    let achieved = prepare(Profile::Standard, Path::new("/")).expect("a ruleset").achieved().clone();

    let (in_dev, elsewhere, made) = confined(Profile::Standard, Path::new("/"), move || {
        let command = |path: &Path| fs::File::open(path).map(|file| isatty(&file));
        let made = mknod(&new, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(1, 3));
        (command(Path::new("/dev/null")), command(&node), made)
    });

    // "Not a terminal" is the device's own answer, so the command has reached it.
    assert_eq!(in_dev.expect("/dev/null"), Ok(false));
    // The domain's answer, which comes before the kernel asks for the right to make nodes (EPERM).
    assert_eq!(made, Err(Errno::EACCES));
    if usable && achieved.ioctl_dev {
        assert_eq!(elsewhere.expect("the node"), Err(Errno::EACCES));
    } else {
        println!("skipped: no device node could be made, or the kernel has no such right");
    }
}

#[test]
fn a_link_of_the_image_in_place_of_a_writable_directory_grants_nothing() {
    let root = tree();
    fs::remove_dir(root.path().join("tmp")).expect("removed");
    symlink("usr", root.path().join("tmp")).expect("a link");
    let path = root.path().to_path_buf();
    let prepared = prepare(Profile::Strict, root.path()).expect("a ruleset");
    assert_eq!(prepared.achieved().not_granted, ["tmp"]);
    let written = confined(Profile::Strict, root.path(), move || kind(fs::write(path.join("usr/new"), "x")));
    assert_eq!(written, Some(ErrorKind::PermissionDenied));
}

#[test]
fn a_root_that_is_missing_is_an_error_with_its_path() {
    let error = prepare(Profile::Standard, Path::new("/nonexistent/root")).expect_err("no such root");
    assert_eq!(error.to_string(), "cannot open /nonexistent/root for the landlock ruleset");
}

#[test]
fn old_kernels_get_less_and_are_told_why() {
    let none = offered(Err(Errno::ENOSYS));
    assert_eq!((none.abi, none.kernel_abi, none.scopes), (0, None, false));
    assert_eq!(none.not_applied, Some(NotApplied::Unavailable(Errno::ENOSYS)));
    let first = offered(Ok(1));
    assert_eq!((first.abi, first.kernel_abi), (0, Some(1)));
    let reason = first.not_applied.expect("a reason").to_string();
    assert_eq!(reason, "landlock ABI 1 forbids renames between directories: Linux 5.19 is needed");
    assert_eq!(first.not_applied.map(NotApplied::errno), Some(Errno::EXDEV));
    for errno in [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::EPERM] {
        let reason = offered(Err(errno)).not_applied.expect("a reason");
        assert_eq!(reason.errno(), errno);
        assert!(reason.to_string().contains(": "), "no remedy: {reason}");
    }
    let features = |abi| {
        let achieved = offered(Ok(abi));
        (achieved.abi, achieved.truncate, achieved.ioctl_dev, achieved.scopes)
    };
    assert_eq!(features(2), (2, false, false, false));
    assert_eq!(features(4), (4, true, false, false));
    assert_eq!(features(5), (5, true, true, false));
    assert_eq!(features(6), (6, true, true, true));
    assert_eq!(features(99), (9, true, true, true));
}
