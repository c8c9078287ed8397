//! Removing and measuring a tree by descriptors.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FchmodatFlags, Mode, fchmodat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// What a tree holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Entries.
    pub entries: u64,
    /// Bytes on disk, in blocks of 512.
    pub bytes: u64,
}

/// A directory that is being worked on: its descriptor and the names still to do.
struct Level {
    directory: OwnedFd,
    name: CString,
    pending: Vec<(CString, bool)>,
}

/// Empties `directory`. Deep trees cost memory, not stack; at most `MAX_DEPTH` descriptors are open.
///
/// # Errors
/// The first refusal that is not "already gone".
pub fn remove_contents<F: AsFd>(directory: F) -> nix::Result<Tally> {
    let mut tally = Tally::default();
    let root = openat(directory.as_fd(), c".", FLAGS, Mode::empty())?;
    let pending = list(&root)?;
    let mut stack = vec![Level { directory: root, name: CString::default(), pending }];
    let mut hoisted = 0_u64;
    while let Some(level) = stack.last_mut() {
        let Some((name, is_directory)) = level.pending.pop() else {
            let done = stack.pop();
            if let (Some(done), Some(parent)) = (done, stack.last()) {
                gone(unlinkat(&parent.directory, done.name.as_c_str(), UnlinkatFlags::RemoveDir))?;
            }
            continue;
        };
        tally.entries += 1;
        if !is_directory {
            gone(unlinkat(&level.directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir))?;
            continue;
        }
        if gone(unlinkat(&level.directory, name.as_c_str(), UnlinkatFlags::RemoveDir)).is_ok() {
            continue;
        }
        let child = open_directory(&level.directory, &name)?;
        let pending = list(&child)?;
        if stack.len() >= MAX_DEPTH {
            // Too deep to hold every level open: the directory moves to the top and is taken from there.
            hoisted += 1;
            hoist(&mut stack, &name, hoisted)?;
            continue;
        }
        stack.push(Level { directory: child, name, pending });
    }
    Ok(tally)
}

/// Counts what is below `directory`.
///
/// # Errors
/// The first refusal that is not "already gone".
pub fn measure<F: AsFd>(directory: F) -> nix::Result<Tally> {
    let mut tally = Tally::default();
    let root = openat(directory.as_fd(), c".", FLAGS, Mode::empty())?;
    let pending = list(&root)?;
    let mut stack = vec![(root, pending)];
    while let Some((level, pending)) = stack.last_mut() {
        let Some((name, is_directory)) = pending.pop() else {
            stack.pop();
            continue;
        };
        tally.entries += 1;
        match fstatat(&*level, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) => tally.bytes += u64::try_from(found.st_blocks).unwrap_or(0) * 512,
            Err(Errno::ENOENT) => continue,
            Err(errno) => return Err(errno),
        }
        if is_directory {
            let child = openat(&*level, name.as_c_str(), FLAGS, Mode::empty())?;
            let pending = list(&child)?;
            if stack.len() >= MAX_DEPTH {
                return Err(Errno::ENAMETOOLONG);
            }
            stack.push((child, pending));
        }
    }
    Ok(tally)
}

/// Moves the directory `name` of the deepest level to the top level, under a name that is free there.
fn hoist(stack: &mut [Level], name: &CStr, number: u64) -> nix::Result<()> {
    let free =
        CString::new(format!(".sandbox-runner-removing-{}-{number}", std::process::id())).map_err(|_| Errno::EINVAL)?;
    let [top, .., deepest] = stack else { return Err(Errno::ENAMETOOLONG) };
    renameat(&deepest.directory, name, &top.directory, free.as_c_str())?;
    top.pending.push((free, true));
    Ok(())
}

/// Below the usual limit of 1,024 open descriptors; PATH_MAX allows 2,048 levels, deeper ones are made by hand.
const MAX_DEPTH: usize = 900;
const FLAGS: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Opens a directory that its owner may have closed to himself.
fn open_directory(parent: &OwnedFd, name: &CStr) -> nix::Result<OwnedFd> {
    match openat(parent, name, FLAGS, Mode::empty()) {
        Err(Errno::EACCES) => {
            fchmodat(parent, name, Mode::S_IRWXU, FchmodatFlags::NoFollowSymlink)
                .or_else(|_| fchmodat(parent, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink))?;
            openat(parent, name, FLAGS, Mode::empty())
        }
        other => other,
    }
}

fn list(directory: &OwnedFd) -> nix::Result<Vec<(CString, bool)>> {
    let mut names = Vec::new();
    let mut stream = Dir::openat(directory, c".", FLAGS, Mode::empty())?;
    for entry in stream.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let is_directory = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            None => fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)
                .is_ok_and(|found| found.st_mode & libc::S_IFMT == libc::S_IFDIR),
        };
        names.push((name.to_owned(), is_directory));
    }
    Ok(names)
}

fn gone(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_tree_with_links_and_closed_directories_is_removed_and_nothing_else() {
        let root = tempfile::tempdir().expect("temporary directory");
        let outside = tempfile::tempdir().expect("temporary directory");
        fs::write(outside.path().join("keep"), "x").expect("write");
        let deep = root.path().join("a/b/c");
        fs::create_dir_all(&deep).expect("mkdir");
        fs::write(deep.join("file"), "x").expect("write");
        symlink(outside.path(), root.path().join("link")).expect("symlink");
        fs::set_permissions(root.path().join("a/b"), fs::Permissions::from_mode(0o000)).expect("chmod");
        let directory = fs::File::open(root.path()).expect("open");
        let tally = remove_contents(&directory).expect("remove");
        assert_eq!(tally.entries, 5);
        assert_eq!(fs::read_dir(root.path()).expect("list").count(), 0);
        assert!(outside.path().join("keep").exists());
    }

    #[test]
    fn a_tree_deeper_than_descriptors_reach_is_removed() {
        let root = tempfile::tempdir().expect("temporary directory");
        let mut level = OwnedFd::from(fs::File::open(root.path()).expect("open"));
        for _ in 0..(2 * MAX_DEPTH + 50) {
            nix::sys::stat::mkdirat(&level, "d", Mode::S_IRWXU).expect("mkdir");
            level = openat(&level, "d", FLAGS, Mode::empty()).expect("open");
        }
        drop(level);
        remove_contents(fs::File::open(root.path()).expect("open")).expect("remove");
        assert_eq!(fs::read_dir(root.path()).expect("list").count(), 0);
    }

    #[test]
    fn a_tree_is_measured_without_following_links() {
        let root = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(root.path().join("d")).expect("mkdir");
        fs::write(root.path().join("d/f"), vec![1_u8; 8192]).expect("write");
        symlink("/", root.path().join("link")).expect("symlink");
        let tally = measure(fs::File::open(root.path()).expect("open")).expect("measure");
        assert_eq!(tally.entries, 3);
        assert!(tally.bytes >= 8192);
    }
}
