//! What is live, read again from where it is and copied into segments of its own.

use std::io;

use super::codec;
use super::disk::{Disk, DiskFile};
use super::frame::{self, FRAME_BYTES, HEADER_BYTES, Header, Role, wide};
use super::live::{Kept, Live, Place, Step};
use super::record::{Record, Recovered};
use super::scan::{ScanError, name};
use super::segment::{self, Identity, LogError, failed};

/// Segments that together amount to what was live.
pub(super) struct Copied {
    pub(super) segments: Vec<u64>,
    pub(super) next_lsn: u64,
    pub(super) live: Live,
}

/// Writes what is live into segments of their own, beginning with record `first_lsn`. They do not count yet. On failure none
/// of them is left.
pub(super) fn copy<D: Disk>(
    disk: &D,
    identity: &Identity,
    segment_bytes: u64,
    live: &Live,
    first_lsn: u64,
) -> Result<Copied, LogError> {
    let mut copied = Copied { segments: Vec::new(), next_lsn: first_lsn, live: Live::default() };
    let mut reader = Reader::new(disk);
    let result = write_copies(disk, identity, segment_bytes, &live.kept(), &mut reader, &mut copied);
    if let Err(error) = result {
        segment::discard(disk, &copied.segments)?;
        return Err(error);
    }
    Ok(copied)
}

fn write_copies<D: Disk>(
    disk: &D,
    identity: &Identity,
    segment_bytes: u64,
    kept: &[Kept],
    reader: &mut Reader<'_, D>,
    copied: &mut Copied,
) -> Result<(), LogError> {
    let base_lsn = copied.next_lsn;
    let mut rest = kept;
    while !rest.is_empty() {
        let first_lsn = copied.next_lsn;
        let header = identity.header(first_lsn, base_lsn, Role::Copy);
        let seed = header.seed();
        let mut frames = Vec::new();
        while let Some((kept, later)) = rest.split_first() {
            let payload = reader.payload(kept)?;
            let offset = wide(HEADER_BYTES + frames.len() + FRAME_BYTES);
            if !frames.is_empty() && offset + wide(payload.len()) > segment_bytes {
                break;
            }
            frame::put(&mut frames, seed, (copied.next_lsn, first_lsn), &payload);
            copied.live.apply(kept.step.clone(), Place { segment: first_lsn, offset, length: payload.len() });
            copied.next_lsn += 1;
            rest = later;
        }
        segment::make(disk, &header, wide(HEADER_BYTES + frames.len()), &frames)?;
        copied.segments.push(first_lsn);
    }
    Ok(())
}

/// Reads records again by their places.
struct Reader<'a, D: Disk> {
    disk: &'a D,
    open: Option<Open<D::File>>,
}

/// The segment that was read last.
struct Open<F> {
    segment: u64,
    seed: u32,
    file: F,
}

impl<'a, D: Disk> Reader<'a, D> {
    fn new(disk: &'a D) -> Self {
        Self { disk, open: None }
    }

    fn payload(&mut self, kept: &Kept) -> Result<Vec<u8>, LogError> {
        let odd = |reason: String| LogError {
            action: "copy a record in",
            path: self.disk.path(""),
            source: io::Error::new(io::ErrorKind::InvalidData, reason),
            is_open: false,
        };
        match (kept.place, kept.step.record()) {
            (Some(place), _) => {
                let bytes = self.bytes(place).map_err(failed(self.disk, "read", &name(place.segment)))?;
                // What is copied is what was written, or the copy would vouch for something else.
                match codec::decode(&bytes) {
                    Ok(record) if Step::of(&record) == kept.step => Ok(bytes),
                    _ => Err(odd(format!("the record at byte {} has changed", place.offset))),
                }
            }
            (None, Some(record)) => codec::encode(&record).map_err(odd),
            (None, None) => Err(odd("a record without a place cannot be written anew".into())),
        }
    }

    fn record(&mut self, place: Place) -> Result<Record, ScanError> {
        let path = self.disk.path(&name(place.segment));
        let bytes = self.bytes(place).map_err(|source| ScanError::Read { path, source })?;
        codec::decode(&bytes).map_err(|_| changed(self.disk, place, "has changed while it was read"))
    }

    fn bytes(&mut self, place: Place) -> io::Result<Vec<u8>> {
        let open = match self.open.take() {
            Some(open) if open.segment == place.segment => open,
            _ => {
                let file = self.disk.open(&name(place.segment))?;
                let header = Header::decode(&file.read_at(0, HEADER_BYTES)?).map_err(|_| io::ErrorKind::InvalidData)?;
                Open { segment: place.segment, seed: header.seed(), file }
            }
        };
        // The checksum is in the frame before the payload.
        let frame = wide(FRAME_BYTES);
        let bytes = open.file.read_at(place.offset.saturating_sub(frame), FRAME_BYTES + place.length)?;
        let payload = frame::payload(&bytes, open.seed).map(<[u8]>::to_vec);
        self.open = Some(open);
        payload.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// What these records amount to for the next runner.
pub(super) fn recovered<D: Disk>(disk: &D, live: &Live, same_boot: bool) -> Result<Recovered, ScanError> {
    let mut reader = Reader::new(disk);
    let wrong = |place| changed(disk, place, "is of another kind than before");
    live.recovered(same_boot, |place| reader.record(place), wrong)
}

fn changed<D: Disk>(disk: &D, place: Place, what: &str) -> ScanError {
    let reason = format!("the record there {what}");
    ScanError::Damaged { path: disk.path(&name(place.segment)), offset: place.offset, reason }
}
