//! The log on a disk without room: the ballast is given up for what must be written, and nothing that was promised is lost.

use super::log::{BALLAST, LogOpenError};
use super::log_tests::{append, chooser, entries, open, prefix, small_life};
use super::oracle::fold;
use super::samples::accepted;
use super::simulated::{Fault, SimulatedDisk};

/// F-33: what a failed sync should have synced is lost though the page cache shows it, and the room of the ballast saves the
/// records only because they are written again, elsewhere. Wherever the process dies after that, and whatever the power then takes.
#[test]
fn sync_that_fails_for_want_of_room_loses_its_pages_and_no_record() {
    const NEVER: usize = usize::MAX;
    let records = small_life();
    for (sync, batch, dies) in (0..6)
        .flat_map(|sync| (1..4).flat_map(move |batch| (0..12).chain([NEVER]).map(move |dies| (sync, batch, dies))))
    {
        let disk = SimulatedDisk::default();
        let (mut log, _) = open(&disk).unwrap();
        disk.set_fault(Fault::SyncWithoutRoom(sync, dies));
        let (promised, whole) = append(&mut log, &records, &[batch]);
        assert!(whole || dies != NEVER, "sync {sync} of batches of {batch} ended the journal");
        assert!(dies != NEVER || log.is_out_of_space(), "no sync failed");
        drop(log);
        for seed in 0..6 {
            for left in [disk.after_process_crash(), disk.after_power_cut(chooser(seed))] {
                let (_, recovered) = open(&left).unwrap();
                let length = prefix(&records, &recovered, promised..=records.len());
                assert!(
                    length.is_some(),
                    "sync {sync}, batches of {batch}, dead after {dies}, seed {seed}: {promised}"
                );
                let (_, again) = open(&left.after_power_cut(chooser(seed + 1))).unwrap();
                assert_eq!(recovered, again, "sync {sync}, batches of {batch}, dead after {dies}, seed {seed}");
            }
        }
    }
}

#[test]
fn second_sync_that_fails_for_want_of_room_ends_the_journal() {
    let disk = SimulatedDisk::default();
    let (mut log, _) = open(&disk).unwrap();
    let records = small_life();
    disk.set_fault(Fault::SyncWithoutRoom(0, usize::MAX));
    assert!(append(&mut log, &records[..4], &[2]).1);
    assert!(log.is_out_of_space());
    disk.set_fault(Fault::SyncWithoutRoom(0, usize::MAX));
    assert_eq!(append(&mut log, &records[4..], &[2]), (0, false));
}

#[test]
fn full_disk_costs_the_ballast_and_no_record() {
    for lazy in [false, true] {
        let disk = SimulatedDisk::default();
        let (mut log, _) = open(&disk).unwrap();
        // Calls that stay live, so copying gains nothing and every segment needs room of its own.
        let records: Vec<_> = (1..400).map(|call| accepted(call, 1, 40)).collect();
        disk.set_room(None, lazy);
        disk.set_room(Some(disk.used() + if lazy { 900 } else { 2000 }), lazy);
        let (promised, whole) = append(&mut log, &records, &[1]);
        assert!(!whole && log.is_out_of_space() && promised > 0, "lazy {lazy}: {promised}");
        assert!(!disk.files().contains_key(BALLAST));
        disk.set_room(None, lazy);
        let (log, recovered) = open(&disk.after_power_cut(chooser(1))).unwrap();
        assert!(prefix(&records, &recovered, promised..=records.len()).is_some(), "lazy {lazy}");
        assert!(!log.is_out_of_space(), "there is room for ballast again");
    }
}

#[test]
fn write_that_met_a_full_disk_is_found_once_in_a_fresh_segment() {
    let disk = SimulatedDisk::default();
    let (mut log, _) = open(&disk).unwrap();
    let records = small_life();
    assert!(append(&mut log, &records[..5], &[5]).1);
    let segments = || disk.files().keys().filter(|name| name.ends_with(".wal")).count();
    let before = segments();
    // Room for a part of the next write, and after it for what the ballast takes.
    disk.set_room(None, true);
    disk.set_room(Some(disk.used() + 100), true);
    let mut promised = 0;
    log.append(&entries(&records[5..8]), |count| promised += count).unwrap();
    assert_eq!((promised, segments()), (3, before + 1));
    assert!(log.is_out_of_space());
    for seed in 0..20 {
        assert_eq!(open(&disk.after_power_cut(chooser(seed))).unwrap().1, fold(&records[..8]));
    }
    assert!(append(&mut log, &records[8..], &[1]).1);
    assert_eq!(open(&disk.after_process_crash()).unwrap().1, fold(&records));
}

#[test]
fn start_on_a_full_disk_gives_the_ballast_up() {
    let disk = SimulatedDisk::default();
    let records = small_life();
    let (mut log, _) = open(&disk).unwrap();
    assert!(append(&mut log, &records, &[5]).1);
    drop(log);
    disk.set_room(Some(disk.used()), false);
    assert_eq!(open(&disk).unwrap().1, fold(&records));
    // No room at all: the error says so, and nothing is lost.
    disk.set_room(Some(0), false);
    let error = open(&disk).map(|_| ()).unwrap_err();
    assert!(matches!(error, LogOpenError::Log(_)), "{error}");
    disk.set_room(None, false);
    assert_eq!(open(&disk).unwrap().1, fold(&records));
}
