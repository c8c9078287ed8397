//! The format of the files does not change by accident: a journal written by the first version of it is read, and written
//! again byte by byte.

use super::codec;
use super::live::Step;
use super::log::{Entry, Log, Sizes};
use super::oracle::fold;
use super::record::Record;
use super::samples;
use super::scan;
use super::segment::Identity;
use super::simulated::SimulatedDisk;

const SIZES: Sizes = Sizes { segment: 64 << 10, ballast: 1, closed: 4 };
const GOLDEN: [(&str, &[u8]); 2] = [
    ("00000000000000000001.wal", include_bytes!("testdata/format-1-copy.wal")),
    ("00000000000000000004.wal", include_bytes!("testdata/format-1.wal")),
];

/// What was added since, in a journal of its own that begins with the same copy.
const ADDED: [(&str, &[u8]); 2] = [GOLDEN[0], (GOLDEN[1].0, include_bytes!("testdata/format-1-added.wal"))];

fn write(records: &[Record]) -> SimulatedDisk {
    let disk = SimulatedDisk::default();
    let identity = Identity { state_id: "golden-state".into(), boot_id: "golden-boot".into() };
    let (mut log, _) = Log::open(disk.clone(), identity, SIZES).unwrap();
    for records in records.chunks(10) {
        let entries: Vec<_> = records
            .iter()
            .map(|record| Entry { step: Step::of(record), payload: codec::encode(record).unwrap() })
            .collect();
        log.append(&entries, |_| {}).unwrap();
    }
    disk
}

/// Without the zeros at the end, which are nothing but room.
fn trimmed(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    &bytes[..end]
}

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(64 << 10, 0);
    bytes
}

fn read(golden: [(&str, &[u8]); 2], expected: &[Record]) {
    let disk = SimulatedDisk::with_files(golden.map(|(name, bytes)| (name.to_owned(), padded(bytes))));
    let mut records = Vec::new();
    let scanned = scan::scan(&disk, Some("golden-state"), |seen| records.push(seen.record.clone())).unwrap();
    let own = records.split_off(3);
    assert_eq!(own, expected);
    assert_eq!(records, [Record::Events { through: 0 }, Record::Term { term: 0 }, Record::Floor { epoch: 0 }]);
    assert_eq!(super::copy::recovered(&disk, &scanned.live, false).unwrap(), fold(expected));
}

#[test]
fn journal_of_the_first_format_is_read() {
    read(GOLDEN, &samples::every_kind());
    read(ADDED, &samples::added_kinds());
}

#[test]
fn the_same_journal_is_written_today() {
    for (golden, records) in [(GOLDEN, samples::every_kind()), (ADDED, samples::added_kinds())] {
        let files = write(&records).files();
        for (name, bytes) in golden {
            assert!(
                trimmed(&files[name]) == bytes,
                "{name} would be written in another way: a new format needs a new number"
            );
        }
    }
}

/// Writes the golden files anew; for a format with a new number.
#[test]
#[ignore = "changes the sources"]
fn write_golden_files() {
    let (files, added) = (write(&samples::every_kind()).files(), write(&samples::added_kinds()).files());
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/journal/testdata");
    let [copy, own] = GOLDEN.map(|(name, _)| name);
    for (bytes, file) in
        [(&files[copy], "format-1-copy.wal"), (&files[own], "format-1.wal"), (&added[own], "format-1-added.wal")]
    {
        std::fs::write(directory.join(file), trimmed(bytes)).unwrap();
    }
}
