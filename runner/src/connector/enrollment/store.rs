//! The identity of a runner on disk: whole sets, of which `current` names one.
//!
//! ```text
//! identity/current -> set-5f1c...   authorities.pem certificate.pem key.pem enrollment.json
//! identity/pending.pem              a key that was made and has no certificate yet
//! ```
//!
//! A set is written under another name, synced, renamed, and only then does `current` change, in one rename. So whatever is
//! interrupted leaves the old set or the new one, and never a key without its certificate.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::connector::tls::{TlsFiles, TlsSource};

/// Of the format of `enrollment.json`.
const VERSION: u32 = 1;
const PENDING: &str = "pending.pem";
const CURRENT: &str = "current";
const ABOUT: &str = "enrollment.json";

/// What is wrong with the directory of the identity.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A step was refused by the system.
    #[error("cannot {step} {}: {source}", path.display())]
    Step {
        /// What was tried.
        step: &'static str,
        /// With what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process changes the identity.
    #[error("another process changes the identity in {}; wait until it is done", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{} is not usable: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// Where an identity came from, and when to renew it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Of this format.
    pub version: u32,
    /// As the certificate names the runner.
    pub runner_id: String,
    /// Host of the enrolment service.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Name its certificate must carry; the host when missing.
    pub server_name: Option<String>,
    /// Where the service says that the orchestrator is.
    pub endpoints: Vec<String>,
    /// Seconds since 1970 from which the certificate is to be renewed, where the service says so.
    pub renew_after: Option<i64>,
}

/// One whole identity.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) authorities_pem: String,
    pub(super) certificate_pem: String,
    pub(super) key_pem: String,
    pub(super) about: About,
}

impl Set {
    /// The name depends on the content, so that the same set written twice is one.
    fn name(&self, about: &[u8]) -> String {
        let mut hash = Sha256::new();
        for part in [self.authorities_pem.as_bytes(), self.certificate_pem.as_bytes(), self.key_pem.as_bytes(), about] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let digest = hash.finalize();
        let digits: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        format!("set-{digits}")
    }
}

impl About {
    pub(super) fn new(runner_id: String) -> Self {
        Self {
            version: VERSION,
            runner_id,
            host: String::new(),
            port: 0,
            server_name: None,
            endpoints: Vec::new(),
            renew_after: None,
        }
    }
}

/// Files of the identity that is stored below `directory`, whether or not there is one.
#[must_use]
pub fn files(directory: &Path) -> TlsFiles {
    files_of_set(&directory.join(CURRENT))
}

fn files_of_set(set: &Path) -> TlsFiles {
    TlsFiles {
        authorities: set.join("authorities.pem"),
        certificate: set.join("certificate.pem"),
        key: set.join("key.pem"),
    }
}

/// What is known of the identity that is stored below `directory`; `None` when there is none.
///
/// # Errors
/// `StoreError` when it cannot be read, is of another version, or has unknown keys.
pub fn about(directory: &Path) -> Result<Option<About>, StoreError> {
    about_set(&directory.join(CURRENT))
}

fn about_set(set: &Path) -> Result<Option<About>, StoreError> {
    let path = set.join(ABOUT);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StoreError::Step { step: "read", path, source }),
    };
    let bad = |problem: String| StoreError::Content { path: path.clone(), problem };
    let about: About = serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))?;
    if about.version != VERSION {
        return Err(bad(format!("it has version {}, this program knows {VERSION}", about.version)));
    }
    Ok(Some(about))
}

/// How often the lock is asked for before somebody counts as having it, and the rest between: a fifth of a second in all.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_REST: std::time::Duration = std::time::Duration::from_millis(20);

/// The directory, while nobody else changes it.
#[derive(Debug)]
pub(super) struct Store {
    directory: PathBuf,
    /// Held until this is dropped, or the process is gone.
    _lock: File,
}

impl Store {
    /// Makes the directory if it is not there, and keeps everybody else from changing it.
    pub(super) fn open(directory: &Path) -> Result<Self, StoreError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(step("make directory", directory))?;
        let path = directory.join(".lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let lock = lock.map_err(step("open", &path))?;
        for attempt in 1.. {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                // A process that another thread of the last holder was just starting has its descriptors until it executes.
                Err(Errno::WOULDBLOCK) if attempt < LOCK_ATTEMPTS => std::thread::sleep(LOCK_REST),
                Err(Errno::WOULDBLOCK) => return Err(StoreError::Busy { path: directory.to_owned() }),
                Err(errno) => return Err(StoreError::Step { step: "lock", path, source: errno.into() }),
            }
        }
        Ok(Self { directory: directory.to_owned(), _lock: lock })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The key that waits for its certificate.
    pub(super) fn pending_key(&self) -> Result<Option<String>, StoreError> {
        read_text(&self.directory.join(PENDING))
    }

    /// The key in use.
    pub(super) fn current_key(&self) -> Result<Option<String>, StoreError> {
        read_text(&files(&self.directory).key)
    }

    /// The set of the pending key, when it was written and its time is not over: only putting it into use was interrupted.
    /// Its token may have ended since, so nobody else could give it again.
    pub(super) fn pending_set(&self, now: SystemTime) -> Result<Option<(String, About)>, StoreError> {
        let Some(pending) = self.pending_key()? else { return Ok(None) };
        for entry in fs::read_dir(&self.directory).map_err(step("read directory", &self.directory))? {
            let entry = entry.map_err(step("read directory", &self.directory))?;
            let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            // A set gets such a name when it is whole.
            let is_set = name.starts_with("set-") && path.is_dir();
            if !is_set || read_text(&path.join("key.pem"))?.as_ref() != Some(&pending) {
                continue;
            }
            if let (Some(about), Ok(_)) = (about_set(&path)?, TlsSource::load(files_of_set(&path), now)) {
                return Ok(Some((name, about)));
            }
        }
        Ok(None)
    }

    /// Keeps a key before anybody hears of it. It is on the disk when this returns.
    pub(super) fn keep_pending_key(&self, key_pem: &str) -> Result<(), StoreError> {
        let (path, new) = (self.directory.join(PENDING), self.directory.join("pending.new"));
        write_synced(&new, key_pem.as_bytes())?;
        fs::rename(&new, &path).map_err(step("rename to", &path))?;
        sync_directory(&self.directory)
    }

    /// Writes a set beside those that are there. It is on the disk, and not in use, when this returns.
    pub(super) fn write(&self, set: &Set) -> Result<String, StoreError> {
        let about = serde_json::to_vec_pretty(&set.about)
            .map_err(|error| StoreError::Content { path: self.directory.join(ABOUT), problem: error.to_string() })?;
        let name = set.name(&about);
        let path = self.directory.join(&name);
        if path.is_dir() {
            // It got this name when it was whole.
            return Ok(name);
        }
        let new = self.directory.join("set.new");
        remove(&new)?;
        fs::DirBuilder::new().mode(0o700).create(&new).map_err(step("make directory", &new))?;
        write_synced(&new.join("authorities.pem"), set.authorities_pem.as_bytes())?;
        write_synced(&new.join("certificate.pem"), set.certificate_pem.as_bytes())?;
        write_synced(&new.join("key.pem"), set.key_pem.as_bytes())?;
        write_synced(&new.join(ABOUT), &about)?;
        sync_directory(&new)?;
        fs::rename(&new, &path).map_err(step("rename to", &path))?;
        sync_directory(&self.directory)?;
        Ok(name)
    }

    /// Puts a written set into use, in one step.
    pub(super) fn switch(&self, name: &str) -> Result<(), StoreError> {
        let (path, new) = (self.directory.join(CURRENT), self.directory.join("current.new"));
        remove(&new)?;
        symlink(name, &new).map_err(step("make link", &new))?;
        fs::rename(&new, &path).map_err(step("rename to", &path))?;
        sync_directory(&self.directory)
    }

    /// Removes what is not in use: the pending key, older sets, and what was never finished.
    pub(super) fn clean(&self) -> Result<(), StoreError> {
        let path = self.directory.join(CURRENT);
        let current = fs::read_link(&path).map_err(step("read link", &path))?;
        for entry in fs::read_dir(&self.directory).map_err(step("read directory", &self.directory))? {
            let entry = entry.map_err(step("read directory", &self.directory))?;
            let name = entry.file_name();
            let text = name.to_string_lossy();
            let ours = text == PENDING || text.ends_with(".new") || text.starts_with("set-");
            if ours && Path::new(&name) != current {
                remove(&entry.path())?;
            }
        }
        sync_directory(&self.directory)
    }
}

fn step(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Step { step, path, source }
}

fn read_text(path: &Path) -> Result<Option<String>, StoreError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StoreError::Step { step: "read", path: path.to_owned(), source }),
    }
}

/// Nobody but this user may read what is written here, from its first moment on.
fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    remove(path)?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(step("make", path))?;
    file.write_all(bytes).map_err(step("write", path))?;
    file.sync_all().map_err(step("sync", path))
}

fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(step("sync", path))
}

/// Whatever it is, and it need not be there.
fn remove(path: &Path) -> Result<(), StoreError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(StoreError::Step { step: "look at", path: path.to_owned(), source }),
    };
    let removed = if found.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(step("remove", path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn set(key: &str) -> Set {
        Set {
            authorities_pem: "authorities".into(),
            certificate_pem: format!("certificate of {key}"),
            key_pem: key.into(),
            about: About::new("runner-1".into()),
        }
    }

    #[test]
    fn nobody_else_may_read_a_key_and_nobody_else_may_change_the_identity_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity");
        let store = Store::open(&path).unwrap();
        store.keep_pending_key("pending").unwrap();
        store.switch(&store.write(&set("key")).unwrap()).unwrap();
        for file in [path.join(PENDING), files(&path).key] {
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{}", file.display());
        }
        let error = Store::open(&path).unwrap_err().to_string();
        assert!(error.contains("another process changes the identity"), "{error}");
        drop(store);
        Store::open(&path).unwrap();
    }

    #[test]
    fn lock_that_is_about_to_be_let_go_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(2 * LOCK_REST);
                drop(store);
            });
            Store::open(directory.path()).unwrap();
        });
    }

    #[test]
    fn what_was_never_finished_does_not_get_in_the_way_and_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.switch(&store.write(&set("old")).unwrap()).unwrap();
        fs::create_dir(directory.path().join("set.new")).unwrap();
        fs::write(directory.path().join("set.new/key.pem"), "ha").unwrap();
        symlink("nowhere", directory.path().join("current.new")).unwrap();
        fs::write(directory.path().join("pending.new"), "ha").unwrap();
        assert_eq!(store.current_key().unwrap().as_deref(), Some("old"));
        store.keep_pending_key("new").unwrap();
        store.switch(&store.write(&set("new")).unwrap()).unwrap();
        store.clean().unwrap();
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(left[0] == ".lock" && left[1] == CURRENT && left[2].starts_with("set-"), "{left:?}");
        assert_eq!(store.current_key().unwrap().as_deref(), Some("new"));
        assert_eq!(about(directory.path()).unwrap(), Some(About::new("runner-1".into())));
    }

    #[test]
    fn newer_formats_and_unknown_keys_are_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.switch(&store.write(&set("key")).unwrap()).unwrap();
        let path = directory.path().join(CURRENT).join(ABOUT);
        let text = fs::read_to_string(&path).unwrap();
        for (text, expected) in [
            (text.replace(": 1,", ": 2,"), "version 2"),
            (text.replace('{', "{\"colour\": 1,"), "unknown field `colour`"),
        ] {
            fs::write(&path, text).unwrap();
            let error = about(directory.path()).unwrap_err().to_string();
            assert!(error.contains("enrollment.json is not usable") && error.contains(expected), "{error}");
        }
    }
}
