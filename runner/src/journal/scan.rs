//! From the files of a directory to the records that count. Reads only, so it serves recovery and inspection alike.
//!
//! Segments that count begin with the base that the newest segment of records names. In all but the last of them, what
//! follows the first number of the next one is void: it was torn, or given up after a write failed. Every number before that
//! must be there. Nothing but the end of the last segment may be torn.

use std::io;
use std::path::PathBuf;

use super::codec::{self, DecodeError};
use super::disk::{Disk, DiskFile};
use super::frame::{self, FORMAT, Found, HEADER_BYTES, Header, HeaderError, Role, wide};
use super::live::{Live, Place, Step};
use super::record::Record;

/// What ends the name of a segment; before it stands its first number in 20 digits.
const SUFFIX: &str = ".wal";
/// What ends the name of a segment that is not complete yet.
pub(super) const UNFINISHED: &str = ".new";

/// Why a journal cannot be read. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The system did not let us.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else has the name of a segment.
    #[error("{} is not a journal segment", path.display())]
    NotAJournal {
        /// The file.
        path: PathBuf,
    },
    /// Made by a later version.
    #[error("{} has journal format {format}, this version knows {FORMAT}; start the newer version again", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// Made with another state directory.
    #[error(
        "{} belongs to state {found}, not to {expected}: it is the journal of another host or from a copied disk; start with \
         an empty journal directory",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What we are.
        expected: String,
    },
    /// Records are missing that had been written.
    #[error("{} is damaged at byte {offset}: {reason}; nothing was changed", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// A record is complete and not understood.
    #[error("record {lsn} in {} at byte {offset} is not understood; nothing was changed", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Its number.
        lsn: u64,
        /// Why.
        #[source]
        source: Unreadable,
    },
}

/// Why a record is not understood.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Unreadable(DecodeError);

/// A segment that counts.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) header: Header,
    /// First number after it.
    pub(super) next_lsn: u64,
    /// Bytes up to the end of its last record.
    pub(super) used: u64,
    /// Size of the file.
    pub(super) bytes: u64,
    /// It ends with bytes that are no record.
    pub(super) torn: bool,
}

/// Everything that counts.
#[derive(Debug, Default)]
pub(super) struct Scanned {
    pub(super) live: Live,
    /// In order; empty in a directory without a journal.
    pub(super) segments: Vec<Segment>,
    /// Names that no longer count.
    pub(super) leftovers: Vec<String>,
}

impl Scanned {
    /// Number of the next record.
    pub(super) fn next_lsn(&self) -> u64 {
        self.segments.last().map_or(1, |segment| segment.next_lsn)
    }
}

/// A record where it was found.
#[derive(Debug)]
pub(super) struct Seen<'a> {
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) lsn: u64,
    pub(super) bytes: usize,
    pub(super) record: &'a Record,
}

/// Name of the segment that begins with this number.
pub(super) fn name(first_lsn: u64) -> String {
    format!("{first_lsn:020}{SUFFIX}")
}

/// Reads everything that counts, and shows each record to `see` in order. With `state_id`, another one is refused.
///
/// # Errors
/// `ScanError` names the file and the place.
pub(super) fn scan<D: Disk>(
    disk: &D,
    state_id: Option<&str>,
    mut see: impl FnMut(Seen<'_>),
) -> Result<Scanned, ScanError> {
    let (headers, leftovers) = chain(disk, state_id)?;
    let mut scanned = Scanned { leftovers, ..Scanned::default() };
    for (index, header) in headers.iter().enumerate() {
        let next = headers.get(index + 1).map(|next| next.first_lsn);
        let segment = read_segment(disk, header, next, &mut scanned.live, &mut see)?;
        scanned.segments.push(segment);
    }
    Ok(scanned)
}

/// Headers of the segments that count, in order, and every other name.
fn chain<D: Disk>(disk: &D, state_id: Option<&str>) -> Result<(Vec<Header>, Vec<String>), ScanError> {
    let directory = |source| ScanError::Read { path: disk.path(""), source };
    let mut names = disk.list().map_err(directory)?;
    names.sort();
    let mut headers = Vec::new();
    let mut leftovers: Vec<_> = names.iter().filter(|name| name.ends_with(UNFINISHED)).cloned().collect();
    for name in names.iter().filter(|name| name.ends_with(SUFFIX)) {
        headers.push(header(disk, name, state_id)?);
    }
    let Some(newest) = headers.iter().rev().find(|header| header.role == Role::Records).cloned() else {
        // A copy that nothing is based on was never finished; whatever it copied would be here too.
        leftovers.extend(headers.iter().map(|header| name(header.first_lsn)));
        return Ok((Vec::new(), leftovers));
    };
    let counts = |header: &Header| {
        let in_range = (newest.base_lsn..=newest.first_lsn).contains(&header.first_lsn);
        in_range && (header.role == Role::Records || header.base_lsn == newest.base_lsn)
    };
    let (headers, void): (Vec<_>, Vec<_>) = headers.into_iter().partition(counts);
    leftovers.extend(void.iter().map(|header| name(header.first_lsn)));
    if headers.first().is_none_or(|first| first.first_lsn != newest.base_lsn) {
        let reason = format!("it builds on record {}, and no segment begins with that", newest.base_lsn);
        return Err(ScanError::Damaged { path: disk.path(&name(newest.first_lsn)), offset: 0, reason });
    }
    Ok((headers, leftovers))
}

fn header<D: Disk>(disk: &D, file: &str, state_id: Option<&str>) -> Result<Header, ScanError> {
    let path = disk.path(file);
    let read = disk.open(file).and_then(|file| file.read_at(0, HEADER_BYTES));
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Vec::new(),
        Err(source) => return Err(ScanError::Read { path, source }),
    };
    let damaged = |reason: &str| ScanError::Damaged { path: path.clone(), offset: 0, reason: reason.to_owned() };
    let header = match Header::decode(&bytes) {
        Ok(header) => header,
        Err(HeaderError::NotAJournal) => return Err(ScanError::NotAJournal { path }),
        Err(HeaderError::Newer(format)) => return Err(ScanError::Newer { path, format }),
        // A segment gets its name when its header is complete.
        Err(HeaderError::Damaged) => return Err(damaged("its header cannot be read")),
    };
    if let Some(expected) = state_id.filter(|expected| *expected != header.state_id) {
        return Err(ScanError::Foreign { path, found: header.state_id, expected: expected.to_owned() });
    }
    if file != name(header.first_lsn) {
        return Err(damaged(&format!("its header says that it is {}", name(header.first_lsn))));
    }
    Ok(header)
}

/// Reads one segment up to the first number of the next one, or to its end when it is the last.
fn read_segment<D: Disk>(
    disk: &D,
    header: &Header,
    next: Option<u64>,
    live: &mut Live,
    see: &mut impl FnMut(Seen<'_>),
) -> Result<Segment, ScanError> {
    let file = name(header.first_lsn);
    let path = disk.path(&file);
    let read = disk.open(&file).and_then(|file| file.read());
    let bytes = read.map_err(|source| ScanError::Read { path: path.clone(), source })?;
    let seed = header.seed();
    let (mut lsn, mut offset, mut torn) = (header.first_lsn, HEADER_BYTES, false);
    while next != Some(lsn) {
        match frame::at(&bytes, seed, offset, lsn) {
            Found::Frame(frame) => {
                let start = offset + frame::FRAME_BYTES;
                let place = Place { segment: header.first_lsn, offset: wide(start), length: frame.payload.len() };
                let record = codec::decode(frame.payload).map_err(|error| ScanError::Record {
                    path: path.clone(),
                    offset: wide(offset),
                    lsn,
                    source: Unreadable(error),
                })?;
                let (segment, bytes) = (header.first_lsn, frame.payload.len());
                see(Seen { segment, offset: wide(offset), lsn, bytes, record: &record });
                live.apply(Step::of(&record), place);
                (lsn, offset) = (lsn + 1, start + frame.payload.len());
            }
            found => {
                let reason = match next {
                    Some(next) => Some(format!("records {lsn} to {} should be there", next - 1)),
                    None if frame::was_synced(&bytes, seed, offset, lsn) => {
                        Some(format!("record {lsn} had been written"))
                    }
                    None => None,
                };
                if let Some(reason) = reason {
                    return Err(ScanError::Damaged { path, offset: wide(offset), reason });
                }
                torn = found == Found::Bad;
                break;
            }
        }
    }
    Ok(Segment { header: header.clone(), next_lsn: lsn, used: wide(offset), bytes: wide(bytes.len()), torn })
}
