//! A journal as people see it: segments, records, and what recovery would give. Reads only and takes no lock, so it works
//! beside a running daemon. Names kinds and ids, never inputs or outputs.

use std::io;
use std::path::Path;

use serde::Serialize;

use super::copy::recovered;
use super::disk::HostDisk;
use super::file::OpenError;
use super::frame::Role;
use super::record::{Record, RecoveredCall, RecoveredPhase};
use super::scan::{self, ScanError, Scanned, Seen};
use crate::work::{CallId, SessionId};

/// How often reading begins again because segments were removed meanwhile.
const ATTEMPTS: usize = 5;

/// A journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In order.
    pub segments: Vec<SegmentReport>,
    /// In order.
    pub records: Vec<RecordReport>,
    /// What the next runner would begin with.
    pub recovery: Recovery,
    /// Files that no longer count, and that the next runner removes.
    pub leftovers: Vec<String>,
}

/// A segment that counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SegmentReport {
    /// Its file.
    pub file: String,
    /// `records`, or `copy` of what was live in earlier ones.
    pub role: &'static str,
    /// State directory that it belongs to.
    pub state_id: String,
    /// Boot in which it was made.
    pub boot_id: String,
    /// Number of its first record.
    pub first_lsn: u64,
    /// How many records it has.
    pub records: u64,
    /// Up to the end of its last record.
    pub used_bytes: u64,
    /// Of the file.
    pub file_bytes: u64,
    /// It ends with bytes that are no record: torn, or being written at this moment.
    pub torn: bool,
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RecordReport {
    /// Its number.
    pub lsn: u64,
    /// What it is.
    pub kind: &'static str,
    /// The session it names.
    pub session_id: Option<String>,
    /// The call it is about.
    pub call_id: Option<String>,
    /// First number of its segment.
    pub segment: u64,
    /// Where it begins there.
    pub offset: u64,
    /// Without its frame.
    pub bytes: usize,
}

/// What the next runner would begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recovery {
    /// Highest number of an event that may have been used.
    pub events_through: u64,
    /// Highest term that was obeyed.
    pub term: u64,
    /// Highest epoch of a session that is forgotten.
    pub epoch_floor: u64,
    /// Calls that were cancelled before they arrived.
    pub tombstones: usize,
    /// Sessions that have not ended.
    pub sessions: Vec<SessionReport>,
    /// Calls whose result is not acknowledged.
    pub calls: Vec<CallReport>,
    /// Records that made no sense.
    pub ignored_records: u64,
    /// The last segment ends with bytes that are no record.
    pub torn_tail: bool,
}

/// A session that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SessionReport {
    /// Its id.
    pub session_id: String,
    /// Its placement.
    pub epoch: u64,
    /// Its sandbox, when that was ready.
    pub sandbox_id: Option<String>,
    /// Calls whose results are stored elsewhere.
    pub acknowledged: usize,
}

/// A call whose result is not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CallReport {
    /// Its id.
    pub call_id: String,
    /// Its session.
    pub session_id: String,
    /// The tool.
    pub tool: &'static str,
    /// `accepted`, `started` or `finished`.
    pub phase: &'static str,
    /// How often a runner was about to start it.
    pub starts: u32,
    /// How often a runner took it over after one that panicked while it ran; `None` when a runner has lived on with it.
    pub resumes: Option<u32>,
    /// It was cancelled.
    pub cancelled: bool,
}

/// Reads the journal in `directory`.
///
/// # Errors
/// `OpenError` as the next runner would have it.
pub fn inspect(directory: &Path) -> Result<Report, OpenError> {
    let disk = HostDisk::open_directory(directory)
        .map_err(|source| OpenError::Directory { path: directory.to_path_buf(), source })?;
    for _ in 1..ATTEMPTS {
        match report(&disk) {
            // A daemon that copies its journal removes segments; the list of names is old then.
            Err(ScanError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(ScanError::Damaged { .. }) => {}
            result => return Ok(result?),
        }
    }
    Ok(report(&disk)?)
}

fn report(disk: &HostDisk) -> Result<Report, ScanError> {
    let mut records = Vec::new();
    let scanned = scan::scan(disk, None, |seen| records.push(record(&seen)))?;
    let recovery = recovery(disk, &scanned)?;
    let segments = scanned.segments.iter().map(segment).collect();
    Ok(Report { segments, records, recovery, leftovers: scanned.leftovers })
}

fn record(seen: &Seen<'_>) -> RecordReport {
    let record: &Record = seen.record;
    RecordReport {
        lsn: seen.lsn,
        kind: record.kind(),
        session_id: record.session_id().map(SessionId::to_string),
        call_id: record.call_id().map(CallId::to_string),
        segment: seen.segment,
        offset: seen.offset,
        bytes: seen.bytes,
    }
}

fn segment(segment: &scan::Segment) -> SegmentReport {
    SegmentReport {
        file: scan::name(segment.header.first_lsn),
        role: match segment.header.role {
            Role::Records => "records",
            Role::Copy => "copy",
        },
        state_id: segment.header.state_id.clone(),
        boot_id: segment.header.boot_id.clone(),
        first_lsn: segment.header.first_lsn,
        records: segment.next_lsn.saturating_sub(segment.header.first_lsn),
        used_bytes: segment.used,
        file_bytes: segment.bytes,
        torn: segment.torn,
    }
}

fn recovery(disk: &HostDisk, scanned: &Scanned) -> Result<Recovery, ScanError> {
    // Whether this is the same boot is not asked here, so any answer will do.
    let recovered = recovered(disk, &scanned.live, false)?;
    let sessions = recovered.sessions.iter().map(|session| SessionReport {
        session_id: session.open.session_id.to_string(),
        epoch: session.open.epoch,
        sandbox_id: session.sandbox.as_ref().map(|(sandbox_id, _)| sandbox_id.to_string()),
        acknowledged: session.acknowledged.len(),
    });
    Ok(Recovery {
        events_through: recovered.events_through,
        term: recovered.term,
        epoch_floor: recovered.epoch_floor,
        tombstones: recovered.tombstones.len(),
        sessions: sessions.collect(),
        calls: recovered.calls.iter().map(call).collect(),
        ignored_records: scanned.live.ignored(),
        torn_tail: scanned.segments.last().is_some_and(|segment| segment.torn),
    })
}

fn call(recovered: &RecoveredCall) -> CallReport {
    CallReport {
        call_id: recovered.call.call_id.to_string(),
        session_id: recovered.call.session_id.to_string(),
        tool: recovered.call.input.name(),
        phase: match recovered.phase {
            RecoveredPhase::Accepted => "accepted",
            RecoveredPhase::Started => "started",
            RecoveredPhase::Finished(_) => "finished",
        },
        starts: recovered.starts,
        resumes: recovered.resumes,
        cancelled: recovered.cancel.is_some(),
    }
}
