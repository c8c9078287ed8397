//! The directories a runner and its launcher work in, found, created and checked before anything is put into them.
//!
//! Root uses `/var/lib/sandbox-runner` and `/run/sandbox-runner`; everybody else one directory of their own. A directory
//! that another user owns or could change is refused, because the launcher trusts what it finds there.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A socket name has 108 bytes; this leaves room for `/sandboxes/` and the launcher's names below the run directory.
const LONGEST_RUN_DIRECTORY: usize = 64;

/// Why the directories cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// A directory could not be made or looked at.
    #[error("cannot prepare directory {}", path.display())]
    Prepare {
        /// Which.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Somebody else could change what we trust.
    #[error("directory {} is not safe: {reason}; choose another with --state-dir", path.display())]
    Unsafe {
        /// Which.
        path: PathBuf,
        /// In words.
        reason: String,
    },
    /// Socket names would not fit.
    #[error(
        "run directory {} is {} bytes long, sockets below it need at most {LONGEST_RUN_DIRECTORY}; choose a shorter \
         --state-dir",
        path.display(), path.as_os_str().len()
    )]
    TooLong {
        /// Which.
        path: PathBuf,
    },
}

/// Where a runner and its launcher keep things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// What outlives a boot.
    pub state: PathBuf,
    /// Sockets.
    pub run: PathBuf,
}

/// What the choice depends on.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// Effective uid.
    pub uid: u32,
    /// `HOME`.
    pub home: Option<&'a OsStr>,
    /// `XDG_STATE_HOME`.
    pub state_home: Option<&'a OsStr>,
}

impl Home {
    /// Chooses the directories; `given` is `--state-dir`. Touches nothing.
    pub fn choose(given: Option<&Path>, surroundings: Surroundings<'_>) -> Self {
        if let Some(state) = given {
            return Self::below(state.to_path_buf());
        }
        if surroundings.uid == 0 {
            return Self { state: "/var/lib/sandbox-runner".into(), run: "/run/sandbox-runner".into() };
        }
        let absolute = |value: Option<&OsStr>| value.map(PathBuf::from).filter(|path| path.is_absolute());
        let chosen = absolute(surroundings.state_home)
            .or_else(|| absolute(surroundings.home).map(|home| home.join(".local/state")))
            // A uid without a home, as in containers, often has HOME=/ or a directory it does not own.
            .filter(|base| is_usable_base(base, surroundings.uid))
            .map(|base| base.join("sandbox-runner"))
            .filter(|state| state.as_os_str().len() + "/run".len() <= LONGEST_RUN_DIRECTORY)
            .unwrap_or_else(|| PathBuf::from(format!("/tmp/sandbox-runner-{}", surroundings.uid)));
        Self::below(chosen)
    }

    fn below(state: PathBuf) -> Self {
        Self { run: state.join("run"), state }
    }

    /// The directory of the sandboxes' sockets.
    pub fn sandboxes(&self) -> PathBuf {
        self.run.join("sandboxes")
    }

    /// Makes what is missing and refuses what is unsafe.
    ///
    /// `runner` is the identity the runner will have: when it differs from ours, it gets its own directories below the
    /// state directory and may pass through the others, and nothing more.
    ///
    /// # Errors
    /// [`HomeError`]; nothing is changed in a directory that belongs to somebody else.
    pub fn prepare(&self, runner: Identity) -> Result<(), HomeError> {
        if self.run.as_os_str().len() > LONGEST_RUN_DIRECTORY {
            return Err(HomeError::TooLong { path: self.run.clone() });
        }
        let separate = runner.uid != nix::unistd::geteuid().as_raw();
        // Passing through (x without r) is what the runner and, for the spool, process 1 of a sandbox need.
        let mode = if separate { 0o711 } else { 0o700 };
        prepare_directory(&self.state, mode)?;
        if separate {
            prepare_shared_directory(&self.run, runner)?;
        } else {
            prepare_directory(&self.run, mode)?;
        }
        prepare_directory(&self.sandboxes(), mode)?;
        for name in ["journal", "sessions", "identity"] {
            let path = self.state.join(name);
            if separate {
                prepare_runner_directory(&path, runner)?;
            } else {
                prepare_directory(&path, 0o700)?;
            }
        }
        Ok(())
    }
}

/// A uid and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

fn is_usable_base(base: &Path, uid: u32) -> bool {
    base.ancestors().find_map(|ancestor| fs::metadata(ancestor).ok()).is_some_and(|metadata| metadata.uid() == uid)
}

fn prepare_directory(path: &Path, mode: u32) -> Result<(), HomeError> {
    let failed = |source| HomeError::Prepare { path: path.to_path_buf(), source };
    match DirBuilder::new().recursive(true).mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    let refuse = |reason: String| HomeError::Unsafe { path: path.to_path_buf(), reason };
    let own = nix::unistd::geteuid().as_raw();
    if !metadata.is_dir() {
        return Err(refuse("it is not a directory".into()));
    }
    if metadata.uid() != own {
        return Err(refuse(format!("it belongs to uid {}, not to uid {own}", metadata.uid())));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(refuse(format!("its mode {:o} lets others write", metadata.mode() & 0o7777)));
    }
    if metadata.mode() & mode != mode {
        fs::set_permissions(path, fs::Permissions::from_mode(metadata.mode() & 0o7777 | mode)).map_err(failed)?;
    }
    Ok(())
}

/// The runner makes its administration socket here, beside the launcher's own; the sticky bit keeps it from replacing those.
fn prepare_shared_directory(path: &Path, runner: Identity) -> Result<(), HomeError> {
    const SHARED: u32 = 0o1771;
    let failed = |source| HomeError::Prepare { path: path.to_path_buf(), source };
    let is_shared = |found: &fs::Metadata| {
        found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() && found.mode() & SHARED == SHARED
    };
    let is_ready = || {
        let found = fs::symlink_metadata(path);
        found.is_ok_and(|found| is_shared(&found) && found.mode() & 0o002 == 0 && found.gid() == runner.gid)
    };
    if is_ready() {
        return Ok(());
    }
    // Shared with a group that the runner had before.
    if fs::symlink_metadata(path).is_ok_and(|found| is_shared(&found) && found.gid() != runner.gid) {
        fs::set_permissions(path, fs::Permissions::from_mode(0o711)).map_err(failed)?;
    }
    if let Err(error) = prepare_directory(path, 0o711) {
        // A command beside this one may just have finished the same work.
        return if is_ready() { Ok(()) } else { Err(error) };
    }
    std::os::unix::fs::chown(path, None, Some(runner.gid)).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(SHARED)).map_err(failed)
}

/// Only the runner's own data lives here, so it belongs to the runner.
fn prepare_runner_directory(path: &Path, runner: Identity) -> Result<(), HomeError> {
    let failed = |source| HomeError::Prepare { path: path.to_path_buf(), source };
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    let mut metadata = fs::symlink_metadata(path).map_err(failed)?;
    // The parent is ours alone to write, so a directory of ours is one just made, by this process or by one beside it.
    if metadata.is_dir() && metadata.uid() == nix::unistd::geteuid().as_raw() {
        std::os::unix::fs::lchown(path, Some(runner.uid), Some(runner.gid)).map_err(failed)?;
        metadata = fs::symlink_metadata(path).map_err(failed)?;
    }
    if !metadata.is_dir() || metadata.uid() != runner.uid {
        let reason = format!("it belongs to uid {}, the runner has uid {}", metadata.uid(), runner.uid);
        return Err(HomeError::Unsafe { path: path.to_path_buf(), reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_identity() -> Identity {
        Identity { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
    }

    #[test]
    fn root_uses_the_system_directories_unless_told_otherwise() {
        let surroundings = Surroundings { uid: 0, home: Some(OsStr::new("/root")), state_home: None };

        assert_eq!(Home::choose(None, surroundings).run, Path::new("/run/sandbox-runner"));
        assert_eq!(Home::choose(Some(Path::new("/x")), surroundings).run, Path::new("/x/run"));
    }

    #[test]
    fn user_without_an_own_home_gets_a_directory_below_tmp() {
        let surroundings = Surroundings { uid: 65_534, home: Some(OsStr::new("/nonexistent")), state_home: None };

        assert_eq!(Home::choose(None, surroundings).state, Path::new("/tmp/sandbox-runner-65534"));
    }

    #[test]
    fn own_directories_are_made_private() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let home =
            Home::choose(Some(&directory.path().join("s")), Surroundings { uid: 1, home: None, state_home: None });

        home.prepare(own_identity()).expect("prepared");

        for path in [&home.state, &home.run, &home.sandboxes()] {
            assert_eq!(fs::metadata(path).expect("exists").mode() & 0o777, 0o700, "{}", path.display());
        }
    }

    #[test]
    fn commands_that_start_together_prepare_the_same_directories() {
        for _ in 0..200 {
            let directory = tempfile::tempdir().expect("temporary directory");
            let run = directory.path().join("run");
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| prepare_shared_directory(&run, own_identity()).expect("prepared by both"));
                }
            });
        }
    }

    #[test]
    fn directory_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().expect("temporary directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
        let home = Home::below(directory.path().to_path_buf());

        let error = home.prepare(own_identity()).expect_err("unsafe");

        assert!(error.to_string().contains("mode 777 lets others write"), "{error}");
    }

    #[test]
    fn symbolic_link_in_place_of_the_directory_is_refused() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/etc", &link).expect("symlink");

        let error = Home::below(link).prepare(own_identity()).expect_err("unsafe");

        assert!(error.to_string().contains("is not a directory"), "{error}");
    }

    #[test]
    fn run_directory_too_long_for_a_socket_is_refused_before_anything_is_made() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(100)));

        let error = Home::below(long.clone()).prepare(own_identity()).expect_err("too long");

        assert!(error.to_string().contains("109 bytes long"), "{error}");
        assert!(!long.exists());
    }
}
