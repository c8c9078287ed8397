//! One output stream of a call: counted and hashed whole, kept in part.
//!
//! A short stream lives in memory and travels in the result. A longer one goes to a spool file up to its head limit, and
//! from there on the last bytes are kept in a ring in memory, so a flood costs neither disk nor memory. What lies between
//! head and tail is dropped and declared: lengths and hash are always those of what the workload wrote.

use proto::init::v1::{self, StreamSummary};
use sha2::{Digest as _, Sha256};

use super::spool::{SpoolDirectory, SpoolError, SpoolFile};

/// Most bytes kept from the end of a stream: the ring is memory of process 1.
pub(crate) const TAIL_LIMIT: usize = 1024 * 1024;
/// Most bytes of one stream in a result.
pub(crate) const INLINE_LIMIT: usize = 64 * 1024;

/// What is kept of a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retention {
    /// Up to this length a stream travels in the result of its call.
    pub(crate) inline: usize,
    /// Up to this length a stream needs no file; never less than `inline`.
    pub(crate) memory: usize,
    /// Bytes kept from the beginning; never less than `memory`.
    pub(crate) head: u64,
    /// Bytes kept from the end.
    pub(crate) tail: usize,
}

/// One stream.
#[derive(Debug)]
pub(crate) struct OutputStream {
    stream: v1::Stream,
    retention: Retention,
    total: u64,
    hash: Sha256,
    sha256: Option<[u8; 32]>,
    /// The beginning of the stream while it is not longer than what may stay in memory, or when there is no file for it.
    memory: Vec<u8>,
    file: Option<SpoolFile>,
    /// Bytes of `file` that belong to the head.
    head: u64,
    head_closed: bool,
    tail: Ring,
    /// Bytes of the tail that were moved behind the head in `file` when the stream ended.
    filed_tail: u64,
    /// Why something could not be kept although it should have been.
    trouble: Option<String>,
}

/// Retained bytes at an offset.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Offset of `data` in the stream, larger than asked when bytes in between were dropped.
    pub(crate) offset: u64,
    /// The bytes.
    pub(crate) data: Vec<u8>,
    /// The stream has ended and `data` reaches its end.
    pub(crate) end: bool,
}

impl OutputStream {
    /// An empty stream.
    pub(crate) fn new(stream: v1::Stream, retention: Retention) -> Self {
        Self {
            stream,
            retention,
            total: 0,
            hash: Sha256::new(),
            sha256: None,
            memory: Vec::new(),
            file: None,
            head: 0,
            head_closed: false,
            tail: Ring::new(retention.tail),
            filed_tail: 0,
            trouble: None,
        }
    }

    /// Which stream this is.
    pub(crate) fn stream(&self) -> v1::Stream {
        self.stream
    }

    /// Bytes the workload wrote so far.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Why something could not be kept, for a note.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Takes the next bytes. Never fails: what cannot be kept becomes a declared hole.
    pub(crate) fn push(&mut self, call_id: &str, bytes: &[u8], spool: &mut SpoolDirectory) {
        self.total = self.total.saturating_add(bytes.len() as u64);
        self.hash.update(bytes);
        let mut rest = bytes;
        if !self.head_closed && self.file.is_none() {
            if self.memory.len().saturating_add(rest.len()) <= self.retention.memory {
                self.memory.extend_from_slice(rest);
                self.head = self.memory.len() as u64;
                return;
            }
            self.open_file(call_id, spool);
            if self.file.is_none() {
                let room = self.retention.memory.saturating_sub(self.memory.len()).min(rest.len());
                let (kept, later) = rest.split_at(room);
                self.memory.extend_from_slice(kept);
                self.head = self.memory.len() as u64;
                self.head_closed = true;
                rest = later;
            }
        }
        if !self.head_closed {
            rest = self.append_head(rest, spool);
        }
        self.tail.push(rest);
    }

    /// Makes the file ahead of need: the call lives long enough that somebody may want to read along.
    pub(crate) fn open_file(&mut self, call_id: &str, spool: &mut SpoolDirectory) {
        if self.file.is_some() || self.head_closed || self.sha256.is_some() {
            return;
        }
        let opened = spool.create(call_id, suffix(self.stream)).and_then(|mut file| {
            spool.append(&mut file, &self.memory)?;
            Ok(file)
        });
        match opened {
            Ok(file) => self.file = Some(file),
            Err(error) => self.note_trouble(&error),
        }
    }

    fn append_head<'bytes>(&mut self, bytes: &'bytes [u8], spool: &mut SpoolDirectory) -> &'bytes [u8] {
        let Some(file) = &mut self.file else { return bytes };
        let limit = self.retention.head.max(self.retention.memory as u64);
        let room = usize::try_from(limit.saturating_sub(self.head)).unwrap_or(usize::MAX).min(bytes.len());
        let (kept, _) = bytes.split_at(room);
        let before = file.length();
        let appended = spool.append(file, kept);
        let written = file.length().saturating_sub(before);
        self.head = self.head.saturating_add(written);
        if self.head > self.retention.memory as u64 {
            self.memory = Vec::new();
        } else {
            // Still short enough to travel in the result.
            let written = usize::try_from(written).unwrap_or(0).min(kept.len());
            self.memory.extend_from_slice(kept.get(..written).unwrap_or_default());
        }
        if let Err(error) = appended {
            self.head_closed = true;
            self.note_trouble(&error);
        } else if self.head >= limit {
            self.head_closed = true;
        }
        bytes.get(usize::try_from(written).unwrap_or(usize::MAX)..).unwrap_or_default()
    }

    /// The stream has ended: its hash is final, and its tail moves behind its head in the file.
    pub(crate) fn seal(&mut self, spool: &mut SpoolDirectory) {
        if self.sha256.is_some() {
            return;
        }
        self.sha256 = Some(self.hash.finalize_reset().into());
        let Some(file) = &mut self.file else { return };
        if self.tail.is_empty() {
            return;
        }
        // If the disk is full the tail stays in memory, where it is as readable.
        let bytes = self.tail.read(0, usize::MAX);
        if file.length() == self.head && spool.append(file, &bytes).is_ok() {
            self.filed_tail = bytes.len() as u64;
            self.tail = Ring::new(0);
        }
    }

    /// Retained bytes from `offset` on.
    pub(crate) fn read(&self, offset: u64, most: usize) -> Piece {
        let tail = self.filed_tail.saturating_add(self.tail.len() as u64);
        let tail_start = self.total.saturating_sub(tail);
        let offset = offset.min(self.total);
        let (offset, data) = if offset < self.head {
            (offset, self.read_head(offset, most))
        } else {
            let offset = offset.max(tail_start);
            (offset, self.read_tail(offset.saturating_sub(tail_start), most))
        };
        let end = self.sha256.is_some() && offset.saturating_add(data.len() as u64) == self.total;
        Piece { offset, data, end }
    }

    fn read_head(&self, offset: u64, most: usize) -> Vec<u8> {
        let room = usize::try_from(self.head.saturating_sub(offset)).unwrap_or(usize::MAX).min(most);
        match &self.file {
            // A file that cannot be read back is a hole that only shows now; an empty answer at this offset says so.
            Some(file) => file.read(offset, room).unwrap_or_default(),
            None => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                self.memory.get(start..start.saturating_add(room)).unwrap_or_default().to_vec()
            }
        }
    }

    fn read_tail(&self, skip: u64, most: usize) -> Vec<u8> {
        if self.filed_tail > 0 {
            let room = usize::try_from(self.filed_tail.saturating_sub(skip)).unwrap_or(usize::MAX).min(most);
            let read = self.file.as_ref().map(|file| file.read(self.head.saturating_add(skip), room));
            return read.and_then(Result::ok).unwrap_or_default();
        }
        self.tail.read(usize::try_from(skip).unwrap_or(usize::MAX), most)
    }

    /// The bytes from `offset` on while the whole stream is in memory.
    pub(crate) fn in_memory(&self, offset: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.memory.get(start..).filter(|_| self.memory.len() as u64 == self.total)
    }

    /// What the result says about this stream. `inline_room` is what is left in the packet.
    pub(crate) fn summary(&self, inline_room: usize, spool: &SpoolDirectory) -> StreamSummary {
        let room = inline_room.min(self.retention.inline);
        let whole = self.memory.len() as u64 == self.total && self.memory.len() <= room;
        StreamSummary {
            stream: self.stream.into(),
            total_bytes: self.total,
            head_bytes: self.head,
            tail_bytes: self.filed_tail.saturating_add(self.tail.len() as u64),
            sha256: self.sha256.map(|digest| digest.to_vec()).unwrap_or_default(),
            inline: if whole { self.memory.clone() } else { Vec::new() },
            inline_complete: whole,
            spool_path: self
                .file
                .as_ref()
                .map(|file| spool.path_inside(file).to_string_lossy().into_owned())
                .unwrap_or_default(),
        }
    }

    /// The result is acknowledged.
    pub(crate) fn retire(self, spool: &mut SpoolDirectory) {
        if let Some(file) = self.file {
            spool.retire(file);
        }
    }

    fn note_trouble(&mut self, error: &SpoolError) {
        if self.trouble.is_none() {
            self.trouble = Some(format!("not all output could be kept: {error}"));
        }
    }
}

/// The last bytes of a stream.
#[derive(Debug)]
struct Ring {
    limit: usize,
    bytes: Vec<u8>,
    /// Position of the oldest byte once the ring is full.
    start: usize,
}

impl Ring {
    fn new(limit: usize) -> Self {
        Self { limit, bytes: Vec::new(), start: 0 }
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn push(&mut self, bytes: &[u8]) {
        // Only the last `limit` bytes of a push can survive it.
        let mut rest = bytes.get(bytes.len().saturating_sub(self.limit)..).unwrap_or_default();
        let room = self.limit.saturating_sub(self.bytes.len()).min(rest.len());
        let (grow, later) = rest.split_at(room);
        self.bytes.extend_from_slice(grow);
        rest = later;
        while !rest.is_empty() {
            let here = self.limit.saturating_sub(self.start).min(rest.len());
            let (now, later) = rest.split_at(here);
            if let Some(target) = self.bytes.get_mut(self.start..self.start.saturating_add(here)) {
                target.copy_from_slice(now);
            }
            self.start = (self.start.saturating_add(here)) % self.limit.max(1);
            rest = later;
        }
    }

    /// Bytes from the `skip`-th oldest on, at most `most`.
    fn read(&self, skip: usize, most: usize) -> Vec<u8> {
        let (newer, older) = self.bytes.split_at(self.start.min(self.bytes.len()));
        let length = self.len().saturating_sub(skip).min(most);
        older.iter().chain(newer).skip(skip).take(length).copied().collect()
    }
}

/// The suffix of a spool file, by stream.
fn suffix(stream: v1::Stream) -> &'static str {
    match stream {
        v1::Stream::Unspecified | v1::Stream::Stdout => "stdout",
        v1::Stream::Stderr => "stderr",
        v1::Stream::Pty => "terminal",
        v1::Stream::Result => "result",
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
