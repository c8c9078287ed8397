//! Making and removing segment files, so that a crash at any point leaves a journal that can be read.

use std::io;
use std::path::PathBuf;

use super::disk::{Disk, DiskFile};
use super::frame::{HEADER_BYTES, Header, Role, wide};
use super::scan::{UNFINISHED, name};
use crate::crash_point::{self, Point};

/// Whose journal it is.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    /// Of the state directory.
    pub(super) state_id: String,
    /// Of this boot.
    pub(super) boot_id: String,
}

impl Identity {
    /// The header of a segment.
    pub(super) fn header(&self, first_lsn: u64, base_lsn: u64, role: Role) -> Header {
        Header { first_lsn, base_lsn, role, state_id: self.state_id.clone(), boot_id: self.boot_id.clone() }
    }
}

/// What failed, on which file.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub(super) struct LogError {
    pub(super) action: &'static str,
    pub(super) path: PathBuf,
    pub(super) source: io::Error,
    /// What was attempted may have been done all the same.
    pub(super) is_open: bool,
}

impl LogError {
    /// Whether nothing but room was missing, so that another attempt makes sense.
    pub(super) fn is_full_disk(&self) -> bool {
        !self.is_open && matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// The segment that is appended to.
pub(super) struct Active<F> {
    pub(super) first_lsn: u64,
    pub(super) seed: u32,
    pub(super) file: F,
    /// Where the next frame goes.
    pub(super) offset: u64,
}

/// Makes an empty segment of records. When it is there, it counts.
pub(super) fn begin<D: Disk>(
    disk: &D,
    identity: &Identity,
    bytes: u64,
    (first_lsn, base_lsn): (u64, u64),
) -> Result<Active<D::File>, LogError> {
    let header = identity.header(first_lsn, base_lsn, Role::Records);
    let file = make(disk, &header, bytes, &[])?;
    Ok(Active { first_lsn, seed: header.seed(), file, offset: wide(HEADER_BYTES) })
}

/// Makes a segment that gets its name when it is complete and synced. On failure nothing is left that counts, unless the
/// error is open: then the name may be there or not, and what it builds on must stay.
pub(super) fn make<D: Disk>(disk: &D, header: &Header, bytes: u64, frames: &[u8]) -> Result<D::File, LogError> {
    let name = name(header.first_lsn);
    let unfinished = format!("{name}{UNFINISHED}");
    let made = (|| {
        let mut contents = header.encode().ok_or(io::ErrorKind::InvalidInput)?;
        contents.extend_from_slice(frames);
        let file = disk.create(&unfinished, bytes)?;
        file.write_all_at(0, &contents)?;
        file.sync()?;
        crash_point::attempt(Point::Unnamed, "")?;
        disk.rename(&unfinished, &name)?;
        Ok(file)
    })();
    let file = made.map_err(|error| {
        // It takes space where there may be none. If it stays, the next start removes it.
        let _ = disk.remove(&unfinished);
        failed(disk, "make", &name)(error)
    })?;
    let synced = crash_point::attempt(Point::Named, "").and_then(|()| disk.sync_names());
    synced.map_err(|error| LogError { is_open: true, ..failed(disk, "sync", "")(error) })?;
    Ok(file)
}

/// Removes copies that will not count. Later segments have the same numbers, so it must succeed.
pub(super) fn discard<D: Disk>(disk: &D, segments: &[u64]) -> Result<(), LogError> {
    for first_lsn in segments {
        disk.remove(&name(*first_lsn)).map_err(failed(disk, "remove", &name(*first_lsn)))?;
    }
    disk.sync_names().map_err(failed(disk, "sync", ""))
}

/// Removes what no longer counts; a name that stays is ignored by the next start, and removed by it.
pub(super) fn remove_old<D: Disk>(disk: &D, names: impl Iterator<Item = String>) {
    for name in names {
        if let Err(error) = disk.remove(&name) {
            tracing::warn!(name, error = &error as &dyn std::error::Error, "an old journal segment was not removed");
        }
        crash_point::pass(Point::Removed, "");
    }
}

/// The error for a file.
pub(super) fn failed<'a, D: Disk>(
    disk: &'a D,
    action: &'static str,
    name: &'a str,
) -> impl Fn(io::Error) -> LogError + 'a {
    move |source| LogError { action, path: disk.path(name), source, is_open: false }
}
