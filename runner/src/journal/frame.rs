//! The bytes of a segment: one header, then frames. Pure.
//!
//! ```text
//! header  magic 8 | format u32 | crc32c u32 | first_lsn u64 | base_lsn u64 | role u8 | lengths 2 x u8 | state id | boot id
//! frame   length u32 | crc32c u32 over state id and what follows | lsn u64 | lag u32 | payload
//! ```
//!
//! Numbers are little-endian. A length of zero marks the end; files are zero beyond what was written. `lag` counts back to
//! the first record of the batch the frame was written with: everything before that batch had been synced. So a frame that
//! cannot be read can be told from one that never reached the disk, when a later one says that it must have. Frames are also looked for between
//! bytes that tools have printed; what tools do not know, the state id, keeps those from passing for a frame.

/// First bytes of every segment.
const MAGIC: [u8; 8] = *b"SBXJRNL\n";
/// Version of everything in a segment but the records, which name their own fields.
pub(super) const FORMAT: u32 = 1;
/// Room for the header. One sector, so it is there as a whole or not.
pub(super) const HEADER_BYTES: usize = 512;
/// Part of a frame before its payload.
pub(super) const FRAME_BYTES: usize = 20;
/// Longest state or boot id: both are UUIDs in practice.
const LONGEST_ID: usize = 128;

/// What a segment is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Records in the order in which they were appended.
    Records,
    /// What was live in earlier segments. Counts only when a later segment of records is based on it.
    Copy,
}

/// Beginning of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// Number of its first record.
    pub(super) first_lsn: u64,
    /// Recovery begins here: everything before is void.
    pub(super) base_lsn: u64,
    pub(super) role: Role,
    /// The state directory it belongs to.
    pub(super) state_id: String,
    /// The boot in which it was made.
    pub(super) boot_id: String,
}

/// Why the beginning of a file is not that of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// Something else.
    NotAJournal,
    /// A later version made it.
    Newer(u32),
    /// It has been changed or cut.
    Damaged,
}

impl Header {
    /// The bytes, or `None` when an id is longer than 128 bytes.
    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        let length = |id: &str| u8::try_from(id.len()).ok().filter(|_| id.len() <= LONGEST_ID);
        let role = match self.role {
            Role::Records => 0,
            Role::Copy => 1,
        };
        let mut rest = Vec::with_capacity(HEADER_BYTES - 16);
        rest.extend_from_slice(&self.first_lsn.to_le_bytes());
        rest.extend_from_slice(&self.base_lsn.to_le_bytes());
        rest.extend_from_slice(&[role, length(&self.state_id)?, length(&self.boot_id)?]);
        rest.extend_from_slice(self.state_id.as_bytes());
        rest.extend_from_slice(self.boot_id.as_bytes());
        rest.resize(HEADER_BYTES - 16, 0);
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&rest).to_le_bytes());
        bytes.extend_from_slice(&rest);
        Some(bytes)
    }

    /// Reads the header at the beginning of `bytes`.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(HeaderError::NotAJournal);
        }
        let format = u32_at(bytes, 8).ok_or(HeaderError::Damaged)?;
        if format > FORMAT {
            return Err(HeaderError::Newer(format));
        }
        let rest = bytes.get(16..HEADER_BYTES).ok_or(HeaderError::Damaged)?;
        if format != FORMAT || u32_at(bytes, 12) != Some(crc32c::crc32c(rest)) {
            return Err(HeaderError::Damaged);
        }
        Self::fields(rest).ok_or(HeaderError::Damaged)
    }

    /// What the checksums of its frames begin with.
    pub(super) fn seed(&self) -> u32 {
        crc32c::crc32c(self.state_id.as_bytes())
    }

    fn fields(rest: &[u8]) -> Option<Self> {
        let role = match rest.get(16)? {
            0 => Role::Records,
            1 => Role::Copy,
            _ => return None,
        };
        let boot = 19 + usize::from(*rest.get(17)?);
        let end = boot + usize::from(*rest.get(18)?);
        let text = |range| std::str::from_utf8(rest.get(range)?).ok().map(str::to_owned);
        Some(Self {
            first_lsn: u64_at(rest, 0)?,
            base_lsn: u64_at(rest, 8)?,
            role,
            state_id: text(19..boot)?,
            boot_id: text(boot..end)?,
        })
    }
}

/// One record in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub(super) lsn: u64,
    /// Number of the first record of its batch: all before it had been synced when it was written.
    pub(super) batch: u64,
    pub(super) payload: &'a [u8],
}

/// What is found where a frame could begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found<'a> {
    Frame(Frame<'a>),
    /// The mark of the end, or the end of the file.
    End,
    /// Bytes that are no frame with the expected number.
    Bad,
}

/// Appends a frame to `buffer`.
pub(super) fn put(buffer: &mut Vec<u8>, seed: u32, (lsn, batch): (u64, u64), payload: &[u8]) {
    // Payloads fit into a segment and batches into the queue, so neither number is ever cut.
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let lag = u32::try_from(lsn.saturating_sub(batch)).unwrap_or(u32::MAX);
    buffer.extend_from_slice(&length.to_le_bytes());
    let checksum = buffer.len();
    buffer.extend_from_slice(&[0; 4]);
    buffer.extend_from_slice(&lsn.to_le_bytes());
    buffer.extend_from_slice(&lag.to_le_bytes());
    buffer.extend_from_slice(payload);
    let crc = crc32c::crc32c_append(seed, &buffer[checksum + 4..]);
    buffer[checksum..checksum + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Reads what begins at `offset` and should be record `expected`.
pub(super) fn at(bytes: &[u8], seed: u32, offset: usize, expected: u64) -> Found<'_> {
    match (u32_at(bytes, offset), frame(bytes, seed, offset)) {
        (None | Some(0), _) => Found::End,
        (_, Some(frame)) if frame.lsn == expected => Found::Frame(frame),
        _ => Found::Bad,
    }
}

/// The payload of the frame that `bytes` begin with.
pub(super) fn payload(bytes: &[u8], seed: u32) -> Option<&[u8]> {
    frame(bytes, seed, 0).map(|frame| frame.payload)
}

/// Whether a frame beyond `offset` proves that record `expected`, which cannot be read, had been synced.
///
/// The frames of one batch reach the disk in any order, so a hole before a readable frame of the same batch is nothing but
/// a torn write.
pub(super) fn was_synced(bytes: &[u8], seed: u32, offset: usize, expected: u64) -> bool {
    let written = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    let most = wide(written);
    (offset..written).any(|offset| {
        let plausible = u64_at(bytes, offset + 8).is_some_and(|lsn| lsn > expected && lsn - expected < most);
        plausible && frame(bytes, seed, offset).is_some_and(|frame| frame.batch > expected)
    })
}

/// A size in memory as a size on disk.
pub(super) fn wide(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

fn frame(bytes: &[u8], seed: u32, offset: usize) -> Option<Frame<'_>> {
    let length = usize::try_from(u32_at(bytes, offset)?).ok().filter(|length| *length > 0)?;
    let checked = bytes.get(offset.checked_add(8)?..offset.checked_add(FRAME_BYTES)?.checked_add(length)?)?;
    if u32_at(bytes, offset + 4)? != crc32c::crc32c_append(seed, checked) {
        return None;
    }
    let lsn = u64_at(checked, 0)?;
    let batch = lsn.checked_sub(u64::from(u32_at(checked, 8)?))?;
    Some(Frame { lsn, batch, payload: checked.get(12..)? })
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..offset.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..offset.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header { first_lsn: 7, base_lsn: 3, role: Role::Copy, state_id: "s".into(), boot_id: "b-1".into() }
    }

    #[test]
    fn header_is_read_back_and_any_changed_bit_is_noticed() {
        let bytes = header().encode().unwrap();
        assert_eq!((bytes.len(), Header::decode(&bytes)), (HEADER_BYTES, Ok(header())));
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&changed).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn header_of_a_later_version_is_told_from_damage() {
        let mut bytes = header().encode().unwrap();
        bytes[8] = 2;
        assert_eq!(Header::decode(&bytes), Err(HeaderError::Newer(2)));
        assert_eq!(Header::decode(&bytes[..4]), Err(HeaderError::NotAJournal));
        assert_eq!(Header::decode(&header().encode().unwrap()[..100]), Err(HeaderError::Damaged));
    }

    #[test]
    fn id_that_does_not_fit_is_refused() {
        assert_eq!(Header { state_id: "x".repeat(129), ..header() }.encode(), None);
    }

    #[test]
    fn hole_before_a_later_batch_is_damage_and_before_the_same_batch_a_torn_write() {
        let mut bytes = Vec::new();
        put(&mut bytes, 9, (1, 1), b"one");
        let second = bytes.len();
        put(&mut bytes, 9, (2, 1), b"two");
        assert!(!was_synced(&bytes, 9, 0, 1));
        put(&mut bytes, 9, (3, 3), b"three");
        assert!(was_synced(&bytes, 9, 0, 1) && was_synced(&bytes, 9, second, 2));
    }

    #[test]
    fn frame_that_a_tool_has_printed_is_not_taken_for_one() {
        let mut printed = vec![0xaa; 30];
        put(&mut printed, 8, (3, 3), b"forged");
        assert!(!was_synced(&printed, 9, 0, 1) && was_synced(&printed, 8, 0, 1));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), offset in 0_usize..220) {
            let _ = (at(&bytes, 9, offset, 1), was_synced(&bytes, 9, offset, 1), Header::decode(&bytes));
        }

        #[test]
        fn frame_is_read_back_and_any_changed_bit_is_noticed(
            payload in proptest::collection::vec(any::<u8>(), 1..40), lsn in 5_u64.., bit in any::<prop::sample::Index>()
        ) {
            let mut bytes = Vec::new();
            put(&mut bytes, 9, (lsn, lsn - 5), &payload);
            let expected = Frame { lsn, batch: lsn - 5, payload: &payload };
            prop_assert_eq!(at(&bytes, 9, 0, lsn), Found::Frame(expected));
            prop_assert_eq!(at(&bytes, 9, 0, lsn - 1), Found::Bad);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!matches!(at(&bytes, 9, 0, lsn), Found::Frame(_)));
        }
    }
}
