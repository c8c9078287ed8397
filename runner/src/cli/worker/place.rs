//! Where the journal of one session is, for the time of a work item: a directory that belongs to one process at a time, and is
//! removed when the server has everything. One that was left by a process that died is found again by its session, and
//! removed when nobody has asked for it in a day.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use sha2::{Digest, Sha256};
use tracing::{info, warn};

const PREFIX: &str = "work-";
/// As long as a daemon keeps a result that nobody asks for.
const KEEP: Duration = Duration::from_secs(24 * 3600);
/// Somebody else removed it at the same moment; that cannot go on for ever.
const TRIES: u32 = 16;

/// Why there is no place.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    #[error("cannot use {} for the journal of the session", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("another worker of this host serves this session already ({} is locked); end it first", path.display())]
    Taken { path: PathBuf },
}

/// A directory of this process alone.
#[derive(Debug)]
pub(super) struct Place {
    directory: PathBuf,
    /// Nobody has left anything in it.
    is_new: bool,
    /// Holds the lock.
    _handle: File,
}

impl Place {
    /// Takes the place of a session below `directory`, and removes those that nobody wants any more.
    ///
    /// # Errors
    /// [`PlaceError`].
    pub(super) fn take(directory: &Path, environment_id: &str, session_id: Option<&str>) -> Result<Self, PlaceError> {
        sweep(directory, SystemTime::now());
        let digest = Sha256::digest(format!("{environment_id}/{}", session_id.unwrap_or_default()));
        let name: String = digest.iter().take(12).map(|byte| format!("{byte:02x}")).collect();
        let path = directory.join(format!("{PREFIX}{name}"));
        let failed = |source| PlaceError::Directory { path: path.clone(), source };
        for _ in 0..TRIES {
            let is_new = match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                Err(error) => return Err(failed(error)),
            };
            match locked(&path) {
                Ok(Some(handle)) => return Ok(Self { directory: path, is_new, _handle: handle }),
                Ok(None) => return Err(PlaceError::Taken { path }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Err(failed(io::ErrorKind::NotFound.into()))
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether nobody needs the journal any more: the server has every result, or there never was one. `owed` are calls whose
    /// results the server does not have, where that is known.
    pub(super) fn is_spent(&self, owed: Option<usize>) -> bool {
        owed.map_or(self.is_new, |owed| owed == 0)
    }

    /// Removes it with everything in it.
    pub(super) fn remove(self) {
        // The name goes with the lock still held: whoever opened it before finds that it is gone.
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            warn!(path = %self.directory.display(), %error, "the journal of a session that is over could not be removed");
        }
    }
}

/// The directory of this name, locked; `None` when somebody else has it, `NotFound` when it was removed meanwhile.
fn locked(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let handle = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    match flock(&handle, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        other => other?,
    }
    let (named, held) = (fs::symlink_metadata(path)?, handle.metadata()?);
    let is_it = (named.dev(), named.ino()) == (held.dev(), held.ino());
    if is_it { Ok(Some(handle)) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// Removes what processes that died have left more than a day before `now`.
fn sweep(directory: &Path, now: SystemTime) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let is_old = || now.duration_since(last_written(&path)).is_ok_and(|age| age > KEEP);
        if !is_ours || !is_old() {
            continue;
        }
        if let Ok(Some(handle)) = locked(&path) {
            info!(path = %path.display(), "the journal of a session that nobody asked for in a day is removed");
            Place { directory: path, is_new: false, _handle: handle }.remove();
        }
    }
}

/// When a journal was last written to; the time of the directory where there is none.
fn last_written(path: &Path) -> SystemTime {
    let time = |path: &Path| fs::symlink_metadata(path).and_then(|metadata| metadata.modified()).ok();
    let segments = fs::read_dir(path.join("journal")).into_iter().flatten().flatten();
    segments.filter_map(|entry| time(&entry.path())).chain(time(path)).max().unwrap_or_else(SystemTime::now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn session_has_one_place_which_one_process_has_at_a_time() {
        let home = tempfile::tempdir().expect("temporary directory");
        let place = Place::take(home.path(), "env_1", Some("sesn_1")).expect("a place");
        let again = Place::take(home.path(), "env_1", Some("sesn_1")).expect_err("it is taken");
        assert!(again.to_string().contains("another worker of this host serves this session"), "{again}");
        let other = Place::take(home.path(), "env_1", Some("sesn_2")).expect("another place");
        assert_ne!(place.directory(), other.directory());
        let path = place.directory().to_owned();
        fs::write(path.join("journal"), b"x").expect("written");
        drop(place);
        let found = Place::take(home.path(), "env_1", Some("sesn_1")).expect("it is free again");
        assert_eq!(found.directory(), path);
        assert!(path.join("journal").exists(), "what the last one left is there");
        assert!(!found.is_spent(None), "what it owes is not known, and it is not ours to forget");
        assert!(found.is_spent(Some(0)) && !found.is_spent(Some(1)) && other.is_spent(None));
        found.remove();
        assert!(!path.exists());
    }

    #[test]
    fn place_is_removed_a_day_after_its_process_died_and_not_while_it_lives() {
        let home = tempfile::tempdir().expect("temporary directory");
        let [dead, alive] = ["dead", "alive"].map(|id| Place::take(home.path(), "env_1", Some(id)).expect("a place"));
        let path = dead.directory().to_owned();
        drop(dead);
        let tomorrow = SystemTime::now() + KEEP + Duration::from_secs(60);
        sweep(home.path(), SystemTime::now());
        assert!(path.exists());
        sweep(home.path(), tomorrow);
        assert!(!path.exists() && alive.directory().exists());
    }
}
