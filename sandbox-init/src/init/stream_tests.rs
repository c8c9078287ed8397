use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

fn spool(directory: &tempfile::TempDir, budget_bytes: u64) -> SpoolDirectory {
    let opened = OwnedFd::from(File::open(directory.path()).unwrap());
    SpoolDirectory::new(opened, PathBuf::from("/inside"), budget_bytes)
}

fn stream(inline: usize, head: u64, tail: usize) -> OutputStream {
    OutputStream::new(v1::Stream::Stdout, Retention { inline, memory: inline, head, tail })
}

/// Reads everything that is retained, in pieces of `step`, as (offset, bytes) with neighbours joined.
fn read_all(stream: &OutputStream, step: usize) -> Vec<(u64, Vec<u8>)> {
    let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut offset = 0;
    loop {
        let piece = stream.read(offset, step);
        if piece.data.is_empty() {
            return runs;
        }
        offset = piece.offset + piece.data.len() as u64;
        match runs.last_mut() {
            Some((start, bytes)) if *start + bytes.len() as u64 == piece.offset => bytes.extend(piece.data),
            _ => runs.push((piece.offset, piece.data)),
        }
    }
}

proptest! {
    #[test]
    fn whatever_the_chunks_head_and_tail_are_exact_and_the_hash_is_of_the_whole(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..30),
        inline in 0_usize..300, head in 0_u64..600, tail in 0_usize..300, step in 1_usize..400, early in any::<bool>(),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = spool(&directory, u64::MAX);
        let mut stream = stream(inline, head, tail);
        if early {
            stream.open_file("call", &mut spool);
        }
        let whole: Vec<u8> = chunks.concat();
        for chunk in &chunks {
            stream.push("call", chunk, &mut spool);
        }
        let running = read_all(&stream, step);
        stream.seal(&mut spool);
        prop_assert_eq!(&running, &read_all(&stream, step));

        let summary = stream.summary(usize::MAX, &spool);
        prop_assert_eq!(summary.total_bytes, whole.len() as u64);
        prop_assert_eq!(&summary.sha256, &Sha256::digest(&whole).to_vec());
        prop_assert_eq!(summary.inline_complete, whole.len() <= inline);
        if summary.inline_complete {
            prop_assert_eq!(&summary.inline, &whole);
        }
        let kept: u64 = running.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        prop_assert_eq!(summary.head_bytes + summary.tail_bytes, kept);
        let expected = (head.max(inline as u64) + tail as u64).min(whole.len() as u64);
        prop_assert_eq!(kept, expected);
        for (offset, bytes) in &running {
            let start = usize::try_from(*offset).unwrap();
            prop_assert_eq!(bytes, &whole[start..start + bytes.len()]);
        }
        if !whole.is_empty() {
            let last = stream.read(whole.len() as u64, 10);
            prop_assert!(last.end && last.data.is_empty());
        }
    }
}

#[test]
fn output_beyond_the_budget_is_a_declared_hole_and_the_end_is_still_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut spool = spool(&directory, 100);
    let mut stream = stream(10, 1000, 20);
    for byte in 0..=9 {
        stream.push("call", &[byte; 50], &mut spool);
    }
    stream.seal(&mut spool);
    let summary = stream.summary(usize::MAX, &spool);
    assert_eq!((summary.total_bytes, summary.head_bytes, summary.tail_bytes), (500, 100, 20));
    assert_eq!(stream.read(100, 50), Piece { offset: 480, data: vec![9; 20], end: true });
    assert_eq!(
        stream.trouble(),
        Some("not all output could be kept: output of this sandbox exceeds its budget of 100 bytes")
    );
}

#[test]
fn the_file_of_an_ended_stream_is_its_head_followed_by_its_tail() {
    let directory = tempfile::tempdir().unwrap();
    let mut spool = spool(&directory, u64::MAX);
    let mut stream = stream(4, 8, 4);
    stream.push("call", b"0123456789abcdefXYZ", &mut spool);
    stream.seal(&mut spool);
    let path = stream.summary(0, &spool).spool_path;
    let name = path.strip_prefix("/inside/").unwrap();
    assert_eq!(std::fs::read(directory.path().join(name)).unwrap(), b"01234567fXYZ");
}

#[test]
fn two_streams_that_do_not_fit_into_one_packet_are_read_by_offset_instead() {
    let directory = tempfile::tempdir().unwrap();
    let mut spool = spool(&directory, u64::MAX);
    let mut stream = stream(100, 100, 0);
    stream.push("call", &[7; 90], &mut spool);
    stream.seal(&mut spool);
    assert!(!stream.summary(89, &spool).inline_complete);
    assert!(stream.summary(90, &spool).inline_complete);
    assert_eq!(stream.read(0, 1000).data, vec![7; 90]);
}

#[test]
fn a_stream_that_may_stay_in_memory_needs_no_file_and_travels_only_up_to_its_inline_limit() {
    let directory = tempfile::tempdir().unwrap();
    let mut spool = spool(&directory, 1000);
    let mut stream = OutputStream::new(v1::Stream::Result, Retention { inline: 4, memory: 8, head: 8, tail: 0 });
    stream.push("call", b"abcd", &mut spool);
    assert!(stream.summary(100, &spool).inline_complete);
    stream.push("call", b"efgh", &mut spool);
    let summary = stream.summary(100, &spool);
    assert_eq!((summary.inline_complete, summary.head_bytes, summary.spool_path.as_str()), (false, 8, ""));
    assert_eq!(stream.in_memory(3), Some(b"defgh".as_slice()));
    stream.push("call", b"i", &mut spool);
    assert_eq!(stream.in_memory(3), None);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}
