//! Puts the output of a call together again and proves that nothing is missing. Pure.

use std::collections::BTreeMap;

use proto::runner::v1 as pb;
use sha2::{Digest, Sha256};

/// Bytes of each stream that are kept for people to look at; hashing goes on beyond.
const KEPT: usize = 8 * 1024 * 1024;

/// One stream, as it was received.
#[derive(Debug, Clone, Default)]
pub struct StreamText {
    /// The first bytes, at most 8 MiB.
    pub bytes: Vec<u8>,
    /// Offset up to which everything has arrived or was declared missing.
    pub through: u64,
    /// Declared holes: first byte and length.
    pub holes: Vec<(u64, u64)>,
    /// The runner has said that the stream ends here.
    pub ended: bool,
    hash: Sha256,
}

/// The end of a call, with its output checked.
#[derive(Debug, Clone)]
pub struct Finished {
    /// What the runner sent.
    pub message: pb::CallFinished,
    /// Output by stream number.
    pub streams: BTreeMap<i32, StreamText>,
}

/// All output of one call.
#[derive(Debug, Clone, Default)]
pub(super) struct Transcript {
    pub(super) streams: BTreeMap<i32, StreamText>,
}

impl Transcript {
    /// Takes a piece. Repeats of what is there already are fine.
    pub(super) fn take(&mut self, chunk: &pb::OutputChunk) -> Result<(), String> {
        let stream = self.streams.entry(chunk.stream).or_default();
        let name = format!("stream {} of call {}", chunk.stream, chunk.call_id);
        let end = chunk.offset + chunk.data.len() as u64;
        if chunk.offset > stream.through {
            let declared = chunk.offset.saturating_sub(chunk.skipped_before);
            if declared > stream.through {
                return Err(format!("{name}: bytes {}..{declared} are missing and not declared", stream.through));
            }
            stream.holes.push((stream.through, chunk.offset - stream.through));
            stream.through = chunk.offset;
        }
        if end > stream.through {
            let known = usize::try_from(stream.through - chunk.offset).unwrap_or(usize::MAX);
            let new = chunk.data.get(known..).unwrap_or_default();
            stream.hash.update(new);
            let room = KEPT.saturating_sub(stream.bytes.len());
            stream.bytes.extend(&new[..new.len().min(room)]);
            stream.through = end;
        }
        stream.ended |= chunk.end;
        Ok(())
    }

    /// Compares with what the runner says about the whole. `Ok(false)`: something is still to come.
    pub(super) fn check(&mut self, finished: &pb::CallFinished) -> Result<bool, String> {
        for summary in &finished.streams {
            let name = format!("stream {} of call {}", summary.stream, finished.call_id);
            if summary.inline_complete {
                if summary.inline.len() as u64 != summary.total_bytes {
                    return Err(format!("{name}: {} bytes inline of {}", summary.inline.len(), summary.total_bytes));
                }
                let stream = self.streams.entry(summary.stream).or_default();
                if !summary.inline.starts_with(&stream.bytes) {
                    return Err(format!("{name}: what was streamed is not the beginning of what came with the end"));
                }
                let known = usize::try_from(stream.through).unwrap_or(usize::MAX).min(summary.inline.len());
                stream.hash.update(&summary.inline[known..]);
                stream.bytes.clone_from(&summary.inline);
                (stream.through, stream.ended) = (summary.total_bytes, true);
            } else if summary.total_bytes == 0 {
                continue;
            }
            let Some(stream) = self.streams.get(&summary.stream) else { return Ok(false) };
            if stream.through > summary.total_bytes {
                return Err(format!("{name}: {} bytes came of {}", stream.through, summary.total_bytes));
            }
            // The mark of the end may be lost with a link; the length in the summary says as much.
            if stream.through < summary.total_bytes {
                return Ok(false);
            }
            let sum: [u8; 32] = stream.hash.clone().finalize().into();
            if stream.holes.is_empty() && sum[..] != summary.sha256[..] {
                return Err(format!("{name}: sha256 differs"));
            }
        }
        Ok(true)
    }

    /// Nothing more will come: what is missing is a hole.
    pub(super) fn give_up(&mut self, finished: &pb::CallFinished) {
        for summary in finished.streams.iter().filter(|summary| !summary.inline_complete) {
            let stream = self.streams.entry(summary.stream).or_default();
            if stream.through < summary.total_bytes {
                stream.holes.push((stream.through, summary.total_bytes - stream.through));
                stream.through = summary.total_bytes;
            }
            stream.ended = true;
        }
    }

    /// What was stored up to `through` and is not any more is a hole.
    pub(super) fn lose(&mut self, stream: i32, through: u64) {
        let stream = self.streams.entry(stream).or_default();
        if stream.through < through {
            stream.holes.push((stream.through, through - stream.through));
            stream.through = through;
        }
    }

    /// Drops the bytes; how far they went stays.
    pub(super) fn shed(&mut self) {
        self.streams.values_mut().for_each(|stream| stream.bytes = Vec::new());
    }

    /// What is stored, for acknowledgement.
    pub(super) fn acks(&self) -> Vec<pb::StreamAck> {
        self.streams.iter().map(|(stream, text)| pb::StreamAck { stream: *stream, through: text.through }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, data: &[u8], skipped_before: u64, end: bool) -> pb::OutputChunk {
        pb::OutputChunk { call_id: "c".into(), stream: 1, offset, data: data.to_vec(), skipped_before, end }
    }

    fn finished(total: &[u8], sha256: [u8; 32]) -> pb::CallFinished {
        let total_bytes = total.len() as u64;
        let summary = pb::StreamSummary { stream: 1, total_bytes, sha256: sha256.to_vec(), ..Default::default() };
        pb::CallFinished { call_id: "c".into(), streams: vec![summary], ..Default::default() }
    }

    #[test]
    fn overlapping_repeats_are_put_together_and_match_the_hash() {
        let mut transcript = Transcript::default();
        for (offset, data, end) in
            [(0, &b"hello "[..], false), (3, b"lo wor", false), (0, b"hel", false), (9, b"ld", true)]
        {
            transcript.take(&chunk(offset, data, 0, end)).unwrap();
        }
        let end = finished(b"hello world", Sha256::digest(b"hello world").into());
        assert_eq!(transcript.check(&end), Ok(true));
        assert_eq!(transcript.streams[&1].bytes, b"hello world");
    }

    #[test]
    fn undeclared_hole_is_a_fault_and_a_declared_one_is_kept() {
        let mut transcript = Transcript::default();
        transcript.take(&chunk(0, b"ab", 0, false)).unwrap();
        assert!(transcript.take(&chunk(5, b"f", 0, false)).unwrap_err().contains("bytes 2..5 are missing"));
        transcript.take(&chunk(5, b"f", 3, true)).unwrap();
        assert_eq!(transcript.streams[&1].holes, [(2, 3)]);
        assert_eq!(transcript.check(&finished(b"abcdef", [0; 32])), Ok(true));
    }

    #[test]
    fn output_that_is_given_up_becomes_a_hole_up_to_its_announced_end() {
        let mut transcript = Transcript::default();
        transcript.take(&chunk(0, b"ab", 0, false)).unwrap();
        let end = finished(b"abcdef", [0; 32]);
        assert_eq!(transcript.check(&end), Ok(false));
        transcript.give_up(&end);
        assert_eq!(transcript.streams[&1].holes, [(2, 4)]);
        assert_eq!(transcript.check(&end), Ok(true));
    }

    #[test]
    fn wrong_bytes_are_found_by_their_hash_and_missing_ones_are_waited_for() {
        let mut transcript = Transcript::default();
        transcript.take(&chunk(0, b"ab", 0, false)).unwrap();
        let end = finished(b"abc", Sha256::digest(b"abX").into());
        assert_eq!(transcript.check(&end), Ok(false));
        transcript.take(&chunk(2, b"c", 0, true)).unwrap();
        assert!(transcript.check(&end).unwrap_err().contains("sha256 differs"));
    }
}
