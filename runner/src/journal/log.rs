//! Segments on a disk: opened, appended to in batches, begun anew, and copied when most of them is no longer live.
//!
//! Nothing here runs by itself and nothing waits; `file` gives it a thread. After an error the log is broken for good: what
//! a failed sync has left on the disk cannot be known, so it is never repeated. The one exception is a full disk, whether a write
//! or a sync says so: the ballast makes room, and all records of the batch are written and synced once more, in a fresh segment. It
//! makes void whatever the first attempt left, and before that attempt everything had been synced.
//!
//! Opening copies what is live as well, so that nothing is trusted that only an earlier process, or its page cache, had seen.

use super::copy::{Copied, copy, recovered};
use super::disk::{Disk, DiskFile};
use super::frame::{self, FRAME_BYTES, HEADER_BYTES, wide};
use super::live::{Live, Place, Step};
use super::record::Recovered;
use super::scan::{self, ScanError, Scanned, name};
use super::segment::{self, Active, Identity, LogError, failed};
use crate::crash_point::{self, Kind, Point};

/// Name of the file that is given up when the disk is full.
pub(super) const BALLAST: &str = "ballast";

/// Sizes, smaller in tests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Of a segment.
    pub(super) segment: u64,
    /// Of the ballast.
    pub(super) ballast: u64,
    /// Segments that may be closed before what is live is copied.
    pub(super) closed: usize,
}

/// Sizes in production.
pub(super) const SIZES: Sizes = Sizes { segment: 16 << 20, ballast: 64 << 20, closed: 4 };

impl Sizes {
    /// Longest payload that fits into a segment.
    pub(super) fn longest_payload(&self) -> usize {
        usize::try_from(self.segment).unwrap_or(usize::MAX).saturating_sub(HEADER_BYTES + FRAME_BYTES)
    }
}

/// A record on its way to the disk.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) step: Step,
    pub(super) payload: Vec<u8>,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogOpenError {
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Log(#[from] LogError),
}

/// An open journal.
pub(super) struct Log<D: Disk> {
    disk: D,
    identity: Identity,
    sizes: Sizes,
    live: Live,
    next_lsn: u64,
    base_lsn: u64,
    /// Segments that count, without the active one.
    closed: Vec<u64>,
    active: Active<D::File>,
    has_ballast: bool,
}

impl<D: Disk> Log<D> {
    /// Recovers what is in the directory and begins a new segment.
    ///
    /// # Errors
    /// `LogOpenError::Scan` before anything was changed. After `LogOpenError::Log` the same records are recovered again.
    pub(super) fn open(disk: D, identity: Identity, sizes: Sizes) -> Result<(Self, Recovered), LogOpenError> {
        let scanned = scan::scan(&disk, Some(&identity.state_id), |_| {})?;
        let newest = scanned.segments.last();
        let same_boot = newest.is_some_and(|segment| segment.header.boot_id == identity.boot_id);
        let recovered = recovered(&disk, &scanned.live, same_boot)?;
        crash_point::pass(Point::Scanned, "");
        report(&disk, &scanned);
        // The newest segment may have been named by a process that died before its name was synced. What it makes void must not be
        // gone while it may be lost itself.
        disk.sync_names().map_err(failed(&disk, "sync", ""))?;
        // Unfinished copies first: what is written from here on has their numbers.
        for leftover in &scanned.leftovers {
            disk.remove(leftover).map_err(failed(&disk, "remove", leftover))?;
        }
        disk.sync_names().map_err(failed(&disk, "sync", ""))?;
        let mut log = Self::begin(disk, identity, sizes, scanned)?;
        log.make_ballast();
        Ok((log, recovered))
    }

    /// Appends `entries` in order; `durable` hears how many more of them would survive a power cut.
    ///
    /// # Errors
    /// `LogError`; the log must not be used again.
    pub(super) fn append(&mut self, entries: &[Entry], mut durable: impl FnMut(usize)) -> Result<(), LogError> {
        let mut rest = entries;
        while !rest.is_empty() {
            let fitting = self.fitting(rest);
            if fitting == 0 {
                self.next_segment()?;
                continue;
            }
            let (now, later) = rest.split_at(fitting);
            match self.write(now) {
                Err(error) if error.is_full_disk() && self.drop_ballast() => {
                    // Never the same file: after a failed sync its pages count as written, and the next sync would succeed.
                    self.fresh_segment()?;
                    self.write(now)?;
                }
                result => result?,
            }
            durable(fitting);
            rest = later;
        }
        Ok(())
    }

    /// Whether the ballast is gone: the disk was full, and only what must be recorded should be.
    pub(super) fn is_out_of_space(&self) -> bool {
        !self.has_ballast
    }

    #[cfg(test)]
    pub(super) fn closed_segments(&self) -> usize {
        self.closed.len()
    }

    /// How many of `entries` the active segment has room for; at least one when it is empty.
    fn fitting(&self, entries: &[Entry]) -> usize {
        let mut end = self.active.offset;
        let is_empty = self.active.first_lsn == self.next_lsn;
        let fits = |(index, entry): (usize, &Entry)| {
            end += frame_bytes(entry.payload.len());
            // Larger ones are refused before they come here.
            end <= self.sizes.segment || (is_empty && index == 0)
        };
        entries.iter().enumerate().map(fits).take_while(|fits| *fits).count()
    }

    /// Writes and syncs `entries`, which fit, as one batch.
    fn write(&mut self, entries: &[Entry]) -> Result<(), LogError> {
        let (first, start) = (self.next_lsn, self.active.offset);
        let mut buffer = Vec::new();
        let mut places = Vec::with_capacity(entries.len());
        for (entry, lsn) in entries.iter().zip(first..) {
            let offset = start + wide(buffer.len() + FRAME_BYTES);
            places.push(Place { segment: self.active.first_lsn, offset, length: entry.payload.len() });
            frame::put(&mut buffer, self.active.seed, (lsn, first), &entry.payload);
        }
        let file = name(self.active.first_lsn);
        let written = pass(entries, Point::Write).and_then(|()| self.active.file.write_all_at(start, &buffer));
        written.map_err(failed(&self.disk, "write", &file))?;
        let synced = pass(entries, Point::Sync).and_then(|()| self.active.file.sync());
        synced.map_err(failed(&self.disk, "sync", &file))?;
        pass(entries, Point::Synced).map_err(failed(&self.disk, "sync", &file))?;
        for (entry, place) in entries.iter().zip(places) {
            self.live.apply(entry.step.clone(), place);
        }
        self.active.offset = start + wide(buffer.len());
        self.next_lsn = first + wide(entries.len());
        Ok(())
    }

    /// Goes on in a new segment, with what is live copied before it when enough of the old ones is not.
    fn next_segment(&mut self) -> Result<(), LogError> {
        let closed = self.closed.len() + 1;
        // A copy costs what is live, so it must bring at least as much.
        let room = wide(closed).saturating_mul(self.sizes.segment);
        if closed > self.sizes.closed && self.live.bytes().saturating_mul(2) <= room {
            match self.copy_live() {
                // Copying only saves space, so a disk without any is no reason to end here.
                Err(error) if error.is_full_disk() => {}
                result => return result,
            }
        }
        match self.fresh_segment() {
            // The attempt has left nothing that counts, so it may be repeated.
            Err(error) if error.is_full_disk() && self.drop_ballast() => self.fresh_segment(),
            result => result,
        }
    }

    /// Goes on in a new segment. One that has no record yet is replaced by it.
    fn fresh_segment(&mut self) -> Result<(), LogError> {
        let active = segment::begin(&self.disk, &self.identity, self.sizes.segment, (self.next_lsn, self.base_lsn))?;
        let old = std::mem::replace(&mut self.active, active);
        if old.first_lsn != self.next_lsn {
            self.closed.push(old.first_lsn);
        }
        Ok(())
    }

    /// Copies what is live and goes on in a new segment that builds on the copy; everything before it is removed.
    fn copy_live(&mut self) -> Result<(), LogError> {
        let base_lsn = self.next_lsn.max(self.active.first_lsn + 1);
        let (copied, active) = begin_anew(&self.disk, &self.identity, self.sizes, &self.live, base_lsn)?;
        // What is removed too late is found and removed at the next start.
        let old = std::mem::replace(&mut self.closed, copied.segments);
        let old_active = std::mem::replace(&mut self.active, active).first_lsn;
        (self.live, self.next_lsn, self.base_lsn) = (copied.live, copied.next_lsn, base_lsn);
        segment::remove_old(&self.disk, old.iter().chain([&old_active]).map(|first| name(*first)));
        Ok(())
    }

    /// The first segments of this process.
    fn begin(disk: D, identity: Identity, sizes: Sizes, scanned: Scanned) -> Result<Self, LogError> {
        // Not the number of a segment that is there, even if it is empty: the old journal must stay whole until the end.
        let last = scanned.segments.last().map_or(0, |segment| segment.header.first_lsn);
        let base_lsn = scanned.next_lsn().max(last + 1);
        let mut has_ballast = disk.open(BALLAST).is_ok();
        let (copied, active) = loop {
            match begin_anew(&disk, &identity, sizes, &scanned.live, base_lsn) {
                Ok(begun) => break begun,
                Err(error) if error.is_full_disk() && has_ballast => {
                    has_ballast = false;
                    disk.remove(BALLAST).map_err(failed(&disk, "remove", BALLAST))?;
                }
                Err(error) => return Err(error),
            }
        };
        segment::remove_old(&disk, scanned.segments.iter().map(|segment| name(segment.header.first_lsn)));
        Ok(Self {
            disk,
            identity,
            sizes,
            live: copied.live,
            next_lsn: copied.next_lsn,
            base_lsn,
            closed: copied.segments,
            active,
            has_ballast,
        })
    }

    /// Gives the ballast up; false when it is gone already.
    fn drop_ballast(&mut self) -> bool {
        let dropped = std::mem::take(&mut self.has_ballast) && self.disk.remove(BALLAST).is_ok();
        if dropped {
            tracing::error!(path = %self.disk.path("").display(), "the disk of the journal is full, its ballast was removed");
        }
        dropped
    }

    /// Sets room aside again, once there is enough.
    pub(super) fn make_ballast(&mut self) {
        if self.has_ballast {
            return;
        }
        let made = self.disk.create(BALLAST, self.sizes.ballast).and_then(|file| file.sync());
        self.has_ballast = made.is_ok();
        if let Err(error) = made {
            // A part of it would only take the space that it should keep.
            let _ = self.disk.remove(BALLAST);
            tracing::warn!(error = &error as &dyn std::error::Error, "there is no room for the ballast of the journal");
        }
    }
}

/// Copies what is live and begins a segment that builds on the copy, which makes void everything before. On failure none of
/// it is left, unless the error is open: then all of it is.
fn begin_anew<D: Disk>(
    disk: &D,
    identity: &Identity,
    sizes: Sizes,
    live: &Live,
    base_lsn: u64,
) -> Result<(Copied, Active<D::File>), LogError> {
    crash_point::attempt(Point::Copy, "").map_err(failed(disk, "copy", ""))?;
    let copied = copy(disk, identity, sizes.segment, live, base_lsn)?;
    crash_point::pass(Point::Copied, "");
    match segment::begin(disk, identity, sizes.segment, (copied.next_lsn, base_lsn)) {
        Ok(active) => {
            crash_point::pass(Point::Counts, "");
            Ok((copied, active))
        }
        Err(error) => {
            if !error.is_open {
                segment::discard(disk, &copied.segments)?;
            }
            Err(error)
        }
    }
}

fn report<D: Disk>(disk: &D, scanned: &Scanned) {
    if let Some(torn) = scanned.segments.last().filter(|segment| segment.torn) {
        let path = disk.path(&name(torn.header.first_lsn));
        tracing::warn!(path = %path.display(), offset = torn.used, "the journal ends with a torn record, which nobody was told of");
    }
    if scanned.live.ignored() > 0 {
        tracing::warn!(records = scanned.live.ignored(), "records of the journal made no sense and were ignored");
    }
}

/// Passes a step with the calls of these records.
fn pass(entries: &[Entry], step: fn(Kind) -> Point) -> std::io::Result<()> {
    for entry in entries {
        let (kind, call_id) = match &entry.step {
            Step::Accepted { call_id, .. } => (Kind::Accepted, call_id),
            Step::Started { call_id } => (Kind::Started, call_id),
            Step::Finished { call_id } => (Kind::Finished, call_id),
            Step::Acknowledged { call_id } => (Kind::Acknowledged, call_id),
            _ => continue,
        };
        crash_point::attempt(step(kind), call_id.as_str())?;
    }
    Ok(())
}

fn frame_bytes(payload: usize) -> u64 {
    wide(payload + FRAME_BYTES)
}
