//! The log on a disk that fails: whatever happens, what is recovered is a prefix with everything that was promised.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::codec;
use super::live::Step;
use super::log::{Entry, Log, LogOpenError, Sizes};
use super::oracle::fold;
use super::record::{Record, Recovered};
use super::samples::{accepted, acknowledged, any_record, ended, finished, opening, ready, started};
use super::scan::ScanError;
use super::segment::Identity;
use super::simulated::{Fault, SimulatedDisk};
use crate::work::CancelMode;

pub(super) const SIZES: Sizes = Sizes { segment: 3000, ballast: 6000, closed: 4 };

fn identity() -> Identity {
    Identity { state_id: "state".into(), boot_id: "boot".into() }
}

pub(super) fn open(disk: &SimulatedDisk) -> Result<(Log<SimulatedDisk>, Recovered), LogOpenError> {
    open_with(disk, SIZES)
}

fn open_with(disk: &SimulatedDisk, sizes: Sizes) -> Result<(Log<SimulatedDisk>, Recovered), LogOpenError> {
    let (log, mut recovered) = Log::open(disk.clone(), identity(), sizes)?;
    // An empty journal has no boot; every other one here has the same.
    recovered.same_boot = false;
    Ok((log, recovered))
}

pub(super) fn entries(records: &[Record]) -> Vec<Entry> {
    let entry = |record| Entry { step: Step::of(record), payload: codec::encode(record).unwrap() };
    records.iter().map(entry).collect()
}

/// Appends in batches of these sizes; how many records are promised to be there.
pub(super) fn append(log: &mut Log<SimulatedDisk>, records: &[Record], batches: &[usize]) -> (usize, bool) {
    let (mut promised, mut rest) = (0, records);
    let mut sizes = batches.iter().copied().cycle();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(sizes.next().unwrap_or(1).clamp(1, rest.len()));
        if log.append(&entries(now), |count| promised += count).is_err() {
            return (promised, false);
        }
        rest = later;
    }
    (promised, true)
}

/// Numbers that look random, the same for the same seed.
pub(super) fn chooser(mut seed: u64) -> impl FnMut(usize) -> usize {
    move |below| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).unwrap() % below.max(1)
    }
}

/// The length of a prefix with this meaning, among those that are allowed.
pub(super) fn prefix(
    records: &[Record],
    recovered: &Recovered,
    allowed: std::ops::RangeInclusive<usize>,
) -> Option<usize> {
    allowed.into_iter().find(|length| fold(&records[..*length]) == *recovered)
}

/// A life of two sessions: enough for two segments.
pub(super) fn small_life() -> Vec<Record> {
    let mut records = vec![Record::Term { term: 2 }, opening(1, 3), ready(1, 1), opening(2, 4)];
    for call in 1..5 {
        records.extend([accepted(call, 1, 20), started(call), finished(call, 0)]);
    }
    records.extend([acknowledged(1), acknowledged(3), ended(2, 4), Record::Events { through: 99 }]);
    records
}

#[test]
fn empty_directory_is_an_empty_journal_and_stays_one() {
    let disk = SimulatedDisk::default();
    for _ in 0..3 {
        let (_, recovered) = open(&disk).unwrap();
        assert_eq!(recovered, Recovered::default());
    }
}

#[test]
fn same_boot_is_that_of_the_newest_segment() {
    let disk = SimulatedDisk::default();
    let at = |boot_id: &str| {
        let identity = Identity { boot_id: boot_id.into(), ..identity() };
        Log::open(disk.clone(), identity, SIZES).unwrap().1.same_boot
    };
    assert_eq!([at("a"), at("a"), at("b"), at("a"), at("a")], [false, true, false, false, true]);
}

#[test]
fn last_segment_cut_at_every_byte_gives_every_record_before_the_cut() {
    let records = small_life();
    let disk = SimulatedDisk::default();
    let (mut log, _) = open_with(&disk, Sizes { segment: 1 << 16, ..SIZES }).unwrap();
    let mut ends = Vec::new();
    for record in &records {
        log.append(&entries(std::slice::from_ref(record)), |_| {}).unwrap();
        let files = disk.files();
        let last = files.iter().rfind(|(name, _)| name.ends_with(".wal")).unwrap();
        ends.push(written(last.1));
    }
    let files = disk.files();
    let last = files.keys().rfind(|name| name.ends_with(".wal")).unwrap().clone();
    for cut in 512..=*ends.last().unwrap() + 30 {
        let whole = ends.iter().filter(|end| **end <= cut).count();
        let expected = fold(&records[..whole]);
        for padded in [false, true] {
            let mut files = files.clone();
            let bytes = files.get_mut(&last).unwrap();
            let length = bytes.len();
            bytes.truncate(cut);
            if padded {
                bytes.resize(length, 0);
            }
            let disk = SimulatedDisk::with_files(files);
            let (mut log, recovered) = open(&disk).unwrap();
            assert_eq!(recovered, expected, "cut at {cut}");
            // It goes on from there, and what was torn never comes back.
            assert!(append(&mut log, &[Record::Term { term: 77 }], &[1]).1);
            let expected = Recovered { term: 77, ..recovered };
            assert_eq!(open(&disk).unwrap().1, expected, "cut at {cut}");
        }
    }
}

fn written(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

#[test]
fn earlier_segment_cut_at_every_byte_is_damage_by_name_and_place() {
    let disk = SimulatedDisk::default();
    let (mut log, _) = open(&disk).unwrap();
    let (_, whole) = append(&mut log, &small_life(), &[3]);
    assert!(whole && log.closed_segments() >= 2);
    let files = disk.files();
    let names: Vec<_> = files.keys().filter(|name| name.ends_with(".wal")).collect();
    for name in &names[..names.len() - 1] {
        for cut in 0..written(&files[*name]) {
            let mut changed = files.clone();
            changed.get_mut(*name).unwrap().truncate(cut);
            let disk = SimulatedDisk::with_files(changed.clone());
            let Err(LogOpenError::Scan(error)) = open(&disk) else { panic!("{name} cut at {cut} was not noticed") };
            assert!(error.to_string().contains(name.as_str()), "{error}");
            assert_eq!(disk.files(), changed, "something was changed");
        }
    }
}

#[test]
fn every_flipped_bit_is_noticed_or_in_the_last_batch_or_in_nobodys_space() {
    let records = small_life();
    let disk = SimulatedDisk::default();
    let (mut log, _) = open(&disk).unwrap();
    assert!(append(&mut log, &records, &[4]).1);
    let expected = fold(&records);
    let last_batch = (records.len() - 1) / 4 * 4;
    let files = disk.files();
    for (name, bytes) in files.iter().filter(|(name, _)| name.ends_with(".wal")) {
        for bit in 0..written(bytes) * 8 {
            let mut changed = files.clone();
            changed.get_mut(name).unwrap()[bit / 8] ^= 1 << (bit % 8);
            match open(&SimulatedDisk::with_files(changed)) {
                Err(LogOpenError::Scan(_)) => {}
                Err(LogOpenError::Log(error)) => panic!("{name} bit {bit}: {error}"),
                Ok((_, recovered)) if recovered == expected => {}
                Ok((_, recovered)) => {
                    let length = prefix(&records, &recovered, last_batch..=records.len());
                    assert!(length.is_some(), "{name} bit {bit}: more than the last batch is gone");
                }
            }
        }
    }
}

#[test]
fn journal_of_another_state_or_version_or_kind_is_refused_and_left_alone() {
    let disk = SimulatedDisk::default();
    drop(open(&disk).unwrap());
    let files = disk.files();
    let first = files.keys().find(|name| name.ends_with(".wal")).unwrap().clone();
    let refused = |files: &BTreeMap<String, Vec<u8>>, identity: Identity| {
        let disk = SimulatedDisk::with_files(files.clone());
        let Err(LogOpenError::Scan(error)) = Log::open(disk.clone(), identity, SIZES) else { panic!("opened") };
        assert_eq!(disk.files(), *files, "something was changed");
        error
    };

    let error = refused(&files, Identity { state_id: "other".into(), ..identity() });
    assert!(
        error.to_string().contains("belongs to state state, not to other: it is the journal of another host"),
        "{error}"
    );

    let mut newer = files.clone();
    newer.get_mut(&first).unwrap()[8] = 9;
    let error = refused(&newer, identity());
    assert!(error.to_string().contains("has journal format 9, this version knows 1"), "{error}");

    let mut other = files.clone();
    other.insert(first.replace('0', "9"), b"hello".to_vec());
    assert!(matches!(refused(&other, identity()), ScanError::NotAJournal { .. }));

    let mut renamed = files;
    let bytes = renamed.remove(&first).unwrap();
    renamed.insert("00000000000000000077.wal".into(), bytes);
    assert!(matches!(refused(&renamed, identity()), ScanError::Damaged { offset: 0, .. }));
}

#[test]
fn missing_segment_is_damage() {
    let disk = SimulatedDisk::default();
    let (mut log, _) = open(&disk).unwrap();
    assert!(append(&mut log, &small_life(), &[3]).1);
    let files = disk.files();
    let names: Vec<_> = files.keys().filter(|name| name.ends_with(".wal")).cloned().collect();
    for name in &names[..names.len() - 1] {
        let mut fewer = files.clone();
        fewer.remove(name);
        let result = open(&SimulatedDisk::with_files(fewer));
        assert!(matches!(result, Err(LogOpenError::Scan(ScanError::Damaged { .. }))), "without {name}");
    }
}

#[test]
fn record_of_a_newer_version_is_refused_by_name_and_nothing_is_changed() {
    let disk = SimulatedDisk::default();
    let (mut log, _) = open(&disk).unwrap();
    let mut payload = Vec::new();
    ciborium::into_writer(&BTreeMap::from([("Paused", 1)]), &mut payload).unwrap();
    log.append(&[Entry { step: Step::Term { term: 0 }, payload }], |_| {}).unwrap();
    let before = disk.files();
    let Err(LogOpenError::Scan(error)) = open(&disk) else { panic!("opened") };
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("written by a newer version: unknown variant `Paused`"), "{source}");
    assert_eq!(disk.files(), before);
}

#[test]
fn old_segments_are_removed_and_what_is_live_stays() {
    let disk = SimulatedDisk::default();
    let (mut log, _) = open(&disk).unwrap();
    let mut records = vec![opening(1, 1), ready(1, 1), accepted(1, 1, 50), started(1)];
    for call in 2..200 {
        records.extend([accepted(call, 1, 50), started(call), finished(call, 0), acknowledged(call)]);
    }
    assert!(append(&mut log, &records, &[7]).1);
    let segments = disk.files().keys().filter(|name| name.ends_with(".wal")).count();
    assert!(segments <= SIZES.closed + 6, "{segments} segments");
    assert_eq!(open(&disk).unwrap().1, fold(&records));
}

#[test]
fn failed_sync_is_not_repeated_and_what_was_promised_before_is_there() {
    let records = small_life();
    for fault in (0..10).flat_map(|n| [Fault::Sync(n), Fault::Write(n)]) {
        let disk = SimulatedDisk::default();
        let (mut log, _) = open(&disk).unwrap();
        disk.set_fault(fault);
        let (promised, whole) = append(&mut log, &records, &[2]);
        assert!(!whole, "{fault:?}");
        drop(log);
        let torn = disk.after_power_cut(chooser(7));
        let (_, recovered) = open(&torn).unwrap();
        assert!(prefix(&records, &recovered, promised..=records.len()).is_some(), "{fault:?}");
        // The page cache still has what the failed sync lost. What is recovered from it must stay.
        let again = disk.after_process_crash();
        let (_, recovered) = open(&again).unwrap();
        let (_, after_power_cut) = open(&again.after_power_cut(chooser(3))).unwrap();
        assert_eq!(recovered, after_power_cut, "{fault:?}");
    }
}

/// F-32
#[test]
fn write_that_is_cut_short_or_interrupted_is_gone_on_with() {
    let records = small_life();
    for (interrupted, shortest) in (0..30).flat_map(|write| [(write, 1), (write, 13), (write, 700)]) {
        let disk = SimulatedDisk::default();
        let (mut log, _) = open(&disk).unwrap();
        disk.set_shortest(shortest);
        disk.set_fault(Fault::InterruptedWrite(interrupted));
        let (promised, whole) = append(&mut log, &records, &[3]);
        assert_eq!((promised, whole), (records.len(), true), "write {interrupted} of at most {shortest} bytes");
        assert_eq!(open(&disk.after_power_cut(chooser(5))).unwrap().1, fold(&records));
    }
}

/// F-12, F-19: seeds 7271 and 7516 of the simulation. A process dies when its newest segment has a name that is not synced, the next
/// one while it removes what that made void, and then the power fails: of names that are not synced any may be there.
#[test]
fn two_deaths_in_recovery_and_a_power_cut_lose_nothing() {
    let records = small_life();
    for (first, second, seed) in
        (0..24).flat_map(|first| (0..16).flat_map(move |second| (0..6).map(move |seed| (first, second, seed))))
    {
        let mut disk = SimulatedDisk::default();
        let (mut log, _) = open(&disk).unwrap();
        assert!(append(&mut log, &records, &[3]).1);
        for operation in [first, second] {
            disk = disk.after_process_crash();
            disk.set_fault(Fault::Everything(operation));
            // It dies on the way, or has nothing left to do.
            let _ = open(&disk);
        }

        let recovered = open(&disk.after_power_cut(chooser(seed))).map(|(_, recovered)| recovered);

        let recovered = recovered.unwrap_or_else(|error| panic!("dead at {first} and {second}, seed {seed}: {error}"));
        assert_eq!(recovered, fold(&records), "dead at {first} and {second}, seed {seed}");
    }
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    proptest::collection::vec(any_record(), 0..120)
}

fn batches() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(1_usize..12, 1..6)
}

proptest! {
    #[test]
    fn what_was_written_is_recovered_however_often_it_is_opened(
        records in records(), batches in batches(), pauses in 0_usize..4, shortest in 1_usize..900
    ) {
        let disk = SimulatedDisk::default();
        disk.set_shortest(shortest);
        let share = records.len() / (pauses + 1) + 1;
        let mut so_far = Vec::new();
        for part in records.chunks(share) {
            let (mut log, recovered) = open(&disk).unwrap();
            prop_assert_eq!(recovered, fold(&so_far));
            prop_assert!(append(&mut log, part, &batches).1);
            so_far.extend_from_slice(part);
        }
        for _ in 0..2 {
            prop_assert_eq!(open(&disk).unwrap().1, fold(&records));
        }
    }

    #[test]
    fn power_cut_anywhere_leaves_a_prefix_with_everything_promised(
        records in records(), batches in batches(), dies in 0_usize..400, seed in any::<u64>(), again in 0_usize..40
    ) {
        let disk = SimulatedDisk::default();
        disk.set_fault(Fault::Everything(dies));
        let promised = match open(&disk) {
            Ok((mut log, _)) => append(&mut log, &records, &batches).0,
            Err(_) => 0,
        };
        let torn = disk.after_power_cut(chooser(seed));
        // The first attempt to recover dies as well.
        torn.set_fault(Fault::Everything(again));
        let first = open(&torn).map(|(_, recovered)| recovered);
        let torn = torn.after_power_cut(chooser(seed.wrapping_add(1)));
        let (mut log, recovered) = open(&torn).unwrap();
        if let Ok(first) = first {
            prop_assert_eq!(&first, &recovered);
        }
        let length = prefix(&records, &recovered, promised..=records.len());
        prop_assert!(length.is_some(), "{promised} were promised");
        let mut all = records[..length.unwrap_or(0)].to_vec();
        let more = [opening(7, 9), Record::Cancelled { call_id: super::samples::call_id(3), mode: CancelMode::Kill }];
        prop_assert!(append(&mut log, &more, &[1]).1);
        all.extend(more);
        prop_assert_eq!(open(&torn).unwrap().1, fold(&all));
    }

    #[test]
    fn one_failure_anywhere_loses_nothing_that_was_promised(
        records in records(), batches in batches(), fails in 0_usize..300, at_start in 0_usize..20, seed in any::<u64>()
    ) {
        let disk = SimulatedDisk::default();
        disk.set_fault(Fault::Any(fails));
        let promised = match open(&disk) {
            Ok((mut log, _)) => append(&mut log, &records, &batches).0,
            Err(_) => 0,
        };
        for disk in [disk.after_process_crash(), disk.after_power_cut(chooser(seed))] {
            disk.set_fault(Fault::Any(at_start));
            let first = open(&disk).map(|(_, recovered)| recovered);
            disk.set_fault(Fault::Any(usize::MAX));
            let (_, recovered) = open(&disk).unwrap();
            if let Ok(first) = first {
                prop_assert_eq!(&first, &recovered);
            }
            prop_assert!(prefix(&records, &recovered, promised..=records.len()).is_some(), "{promised} were promised");
            prop_assert_eq!(open(&disk.after_power_cut(chooser(seed))).unwrap().1, recovered);
        }
    }

    #[test]
    fn process_that_dies_anywhere_leaves_a_prefix_with_everything_promised(
        records in records(), batches in batches(), dies in 0_usize..400, seed in any::<u64>()
    ) {
        let disk = SimulatedDisk::default();
        disk.set_fault(Fault::Everything(dies));
        let promised = match open(&disk) {
            Ok((mut log, _)) => append(&mut log, &records, &batches).0,
            Err(_) => 0,
        };
        let left = disk.after_process_crash();
        let (_, recovered) = open(&left).unwrap();
        prop_assert!(prefix(&records, &recovered, promised..=records.len()).is_some(), "{promised} were promised");
        // What was recovered has been told to others, so it must not be lost by a power cut after it.
        let (_, after) = open(&left.after_power_cut(chooser(seed))).unwrap();
        prop_assert_eq!(recovered, after);
    }

    #[test]
    fn no_bytes_in_place_of_a_segment_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), seed in any::<u64>()) {
        let disk = SimulatedDisk::default();
        let (mut log, _) = open(&disk).unwrap();
        append(&mut log, &small_life(), &[3]);
        let mut files = disk.files();
        let mut choose = chooser(seed);
        let victim = files.keys().nth(choose(files.len())).unwrap().clone();
        let target = files.get_mut(&victim).unwrap();
        let from = choose(target.len());
        for (place, byte) in target[from..].iter_mut().zip(&bytes) {
            *place = *byte;
        }
        let _ = open(&SimulatedDisk::with_files(files));
    }
}
