//! What the next runner of this state directory needs to go on with the work items of this one.
//!
//! A lease is swapped by the text of its last heartbeat, and whoever knows that text may take it up again: the server decides,
//! and of two that try one is refused. So the texts are written down, without any credential and without a sync: one that is
//! old, or lost, costs the time until the lease has run out, as if nothing had been written.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;

use super::wire::is_id;

/// What is read of the file; it is far smaller.
const MOST_BYTES: u64 = 4 * 1024 * 1024;
/// Ids of calls whose results were dropped; beyond it the oldest are forgotten.
pub(super) const MOST_DROPPED: usize = 4096;

/// A lease that is held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Held {
    pub(super) work_id: String,
    pub(super) session_id: String,
    /// As the server has said it.
    pub(super) last_heartbeat: String,
    pub(super) ttl_seconds: u64,
}

/// What is left to the next runner.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Handover {
    #[serde(default)]
    pub(super) leases: Vec<Held>,
    /// Calls that have run and whose results nobody has asked for in time: they must not run again.
    #[serde(default)]
    pub(super) dropped: VecDeque<String>,
}

impl Handover {
    /// What the runner before this one has left. What cannot be read is as good as nothing.
    pub(super) fn read(path: &Path) -> Self {
        let mut text = String::new();
        let read = fs::File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_string(&mut text));
        match read {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::default(),
            Err(error) => {
                warn!(path = %path.display(), %error, "leases of the runner before cannot be read, they will run out");
                return Self::default();
            }
        }
        let mut left: Self = serde_json::from_str(&text).unwrap_or_else(|error| {
            warn!(path = %path.display(), %error, "leases of the runner before are not understood, they will run out");
            Self::default()
        });
        left.leases.retain(|held| is_id(&held.work_id) && is_id(&held.session_id));
        left
    }

    /// Replaces the file as a whole.
    fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }
}

/// Writes down what changes, outside the loop that decides it: a disk may stand still.
#[derive(Debug)]
pub(super) struct Writer(Option<watch::Sender<Handover>>, Option<tokio::task::JoinHandle<()>>);

impl Writer {
    /// Without a path nothing is kept.
    pub(super) fn start(path: Option<PathBuf>) -> Self {
        let Some(path) = path else { return Self(None, None) };
        let (changes, changed) = watch::channel(Handover::default());
        Self(Some(changes), Some(tokio::spawn(write_all(changed, path))))
    }

    pub(super) fn write(&self, left: Handover) {
        if let Some(changes) = &self.0 {
            changes.send_replace(left);
        }
    }

    /// Waits until the last change is written.
    pub(super) async fn end(self) {
        let Self(changes, writing) = self;
        drop(changes);
        if let Some(writing) = writing {
            // It does not panic, and is not aborted.
            let _ = writing.await;
        }
    }
}

async fn write_all(mut changed: watch::Receiver<Handover>, path: PathBuf) {
    let mut has_failed = false;
    while changed.changed().await.is_ok() {
        let left = changed.borrow_and_update().clone();
        let to = path.clone();
        let written = tokio::task::spawn_blocking(move || left.write(&to)).await;
        if let Err(error) = written.unwrap_or_else(|error| Err(io::Error::other(error)))
            && !std::mem::replace(&mut has_failed, true)
        {
            warn!(path = %path.display(), %error, "leases cannot be written down, after a restart they must run out");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn held(work_id: &str) -> Held {
        Held {
            work_id: work_id.to_owned(),
            session_id: "sesn_1".to_owned(),
            last_heartbeat: "2026-01-01T00:00:01.1+00:00".to_owned(),
            ttl_seconds: 300,
        }
    }

    #[tokio::test]
    async fn what_was_written_last_is_read_by_the_next_one() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("work-queue-env_1.json");
        assert_eq!(Handover::read(&path), Handover::default(), "nothing was left");
        let writer = Writer::start(Some(path.clone()));
        let last = Handover { leases: vec![held("work_2")], dropped: ["c1".to_owned()].into() };
        writer.write(Handover { leases: vec![held("work_1")], ..Handover::default() });
        writer.write(last.clone());
        writer.end().await;
        assert_eq!(Handover::read(&path), last);
        let mode = fs::metadata(&path).expect("a file").permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);
    }

    #[test]
    fn file_that_is_damaged_or_names_what_belongs_into_no_path_is_as_good_as_none() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("env_1.json");
        for text in ["", "{", "[]", "{\"leases\": 3}", "\u{0}"] {
            fs::write(&path, text).expect("written");
            assert_eq!(Handover::read(&path), Handover::default(), "{text:?}");
        }
        let left = Handover { leases: vec![held("../work"), held("work_1")], ..Handover::default() };
        left.write(&path).expect("written");
        assert_eq!(Handover::read(&path).leases, [held("work_1")]);
    }
}
