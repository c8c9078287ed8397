//! The journal as its users have it: a queue, a thread, a real directory.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::file::{Condition, FileJournal, OpenError};
use super::log::Sizes;
use super::oracle::fold;
use super::record::{Record, Recovered};
use super::samples::{accepted, acknowledged, call_id, cancelled, finished, opening, ready, started};
use super::segment::Identity;
use super::simulated::{Fault, SimulatedDisk};
use super::{Journal, JournalError, inspect};
use crate::work::{BoxFuture, CancelMode};

const SIZES: Sizes = Sizes { segment: 4000, ballast: 100, closed: 4 };
/// Nobody looks for room on a full disk.
const NEVER: Duration = Duration::MAX;

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

fn on(disk: &SimulatedDisk) -> (FileJournal, Recovered) {
    let identity = Identity { state_id: "state".into(), boot_id: "boot".into() };
    FileJournal::open_on(disk.clone(), identity, SIZES, NEVER).unwrap()
}

fn at(directory: &Path) -> (FileJournal, Recovered) {
    FileJournal::open(directory, "state", "boot").unwrap()
}

type Appended = BoxFuture<'static, Result<(), JournalError>>;

#[test]
fn records_are_in_the_order_of_the_calls_and_dropped_futures_drop_nothing() {
    let disk = SimulatedDisk::default();
    let (journal, _) = on(&disk);
    let records = [opening(1, 1), ready(1, 1), accepted(1, 1, 5), started(1), finished(1, 0), acknowledged(1)];
    let mut last: Option<Appended> = None;
    for record in &records {
        last = Some(journal.append(record.clone()));
    }
    wait(last.unwrap()).unwrap();
    let (_, recovered) = on(&disk.after_power_cut(|_| 0));
    assert_eq!(Recovered { same_boot: false, ..recovered }, fold(&records));
}

#[test]
fn dropping_the_journal_writes_what_is_queued() {
    let disk = SimulatedDisk::default();
    let (journal, _) = on(&disk);
    for call in 1..200 {
        drop(journal.append(accepted(call, 1, 5)));
    }
    drop(journal);
    assert_eq!(on(&disk.after_power_cut(|_| 0)).1.calls.len(), 199);
}

#[test]
fn after_a_failed_sync_all_waiting_and_later_records_are_refused() {
    let disk = SimulatedDisk::default();
    let (journal, _) = on(&disk);
    wait(journal.append(Record::Term { term: 1 })).unwrap();
    disk.set_fault(Fault::Sync(0));
    let waiting: Vec<Appended> = (2..6).map(|term| journal.append(Record::Term { term })).collect();
    let refused = waiting.into_iter().map(wait).filter(Result::is_err).count();
    assert!(refused >= 1);
    // The disk works again, and it does not matter.
    let operations = disk.operations();
    let error = wait(journal.append(started(1))).unwrap_err();
    assert!(error.to_string().starts_with("journal refused a record (started): cannot sync simulated/"), "{error}");
    assert!(journal.is_broken());
    drop(journal);
    assert_eq!(disk.operations(), operations, "something was tried again");
}

#[test]
fn record_larger_than_a_segment_is_refused_with_both_numbers() {
    let disk = SimulatedDisk::default();
    let (journal, _) = on(&disk);
    let error = wait(journal.append(accepted(1, 1, 5000))).unwrap_err();
    assert!(error.reason.contains("a segment has room for 3468"), "{error}");
    // Nothing builds on a call that is not accepted, so the journal goes on.
    assert_eq!(journal.state(), Condition::Good);
    wait(journal.append(accepted(2, 1, 50))).unwrap();
}

#[test]
fn full_queue_refuses_new_calls_first_and_breaks_only_when_something_else_is_lost() {
    let disk = SimulatedDisk::default();
    let (journal, _) = on(&disk);
    let hold = disk.hold();
    // The thread takes the first and hangs.
    let mut futures: Vec<Appended> = vec![journal.append(Record::Term { term: 1 })];
    let patience = Instant::now();
    while journal.busy_for() == Duration::ZERO {
        assert!(patience.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    futures.extend((0..2048).map(|call| journal.append(accepted(call, 1, 5))));
    let error = wait(journal.append(accepted(9999, 1, 5))).unwrap_err();
    assert!(error.reason.starts_with("2048 records of") && !error.is_final, "{error}");
    assert!(wait(journal.append(acknowledged(9999))).is_err());
    assert_eq!(journal.state(), Condition::Good);
    assert_eq!(refused(&journal, "records"), Some(2));
    futures.extend((0..2048).map(|call| journal.append(started(call))));
    let error = wait(journal.append(finished(1, 0))).unwrap_err();
    assert!(error.reason.starts_with("4096 records of") && error.is_final, "{error}");
    assert_eq!((refused(&journal, "records"), refused(&journal, "bytes")), (Some(3), None));
    assert!(wait(journal.append(started(1))).unwrap_err().reason.contains("an earlier record was refused (finished)"));
    assert!(journal.is_broken());
    drop(hold);
    // What was queued before the refusal is a sequence without a hole, so it is written.
    for future in futures {
        wait(future).unwrap();
    }
}

#[test]
fn bytes_that_wait_are_bounded_and_what_is_refused_for_them_is_counted() {
    let disk = SimulatedDisk::default();
    let identity = Identity { state_id: "state".into(), boot_id: "boot".into() };
    let sizes = Sizes { segment: 8 << 20, ..SIZES };
    let (journal, _) = FileJournal::open_on(disk.clone(), identity, sizes, NEVER).unwrap();
    let hold = disk.hold();
    let mut futures: Vec<Appended> = vec![journal.append(Record::Term { term: 1 })];
    let patience = Instant::now();
    while journal.busy_for() == Duration::ZERO {
        assert!(patience.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    futures.push(journal.append(accepted(1, 1, 5 << 20)));
    let error = wait(journal.append(accepted(2, 1, 5 << 20))).unwrap_err();
    assert!(error.reason.starts_with("1 records of") && !error.is_final, "{error}");
    assert_eq!((refused(&journal, "records"), refused(&journal, "bytes")), (None, Some(1)));
    futures.push(journal.append(finished(1, 0)));
    drop(hold);
    for future in futures {
        wait(future).unwrap();
    }
}

/// How many records were refused for a bound.
fn refused(journal: &FileJournal, bound: &str) -> Option<u64> {
    journal.counters().get(&format!("journal_refused_total{{bound=\"{bound}\"}}")).copied()
}

#[test]
fn cancels_that_a_hanging_disk_does_not_take_are_refused_and_the_journal_goes_on() {
    let disk = SimulatedDisk::default();
    let (journal, _) = on(&disk);
    let hold = disk.hold();
    // The thread takes the first and hangs.
    let first = journal.append(Record::Term { term: 1 });
    while journal.busy_for() == Duration::ZERO {
        std::thread::yield_now();
    }
    let appended: Vec<Appended> = (0..5000).map(|call| journal.append(cancelled(call, CancelMode::Kill))).collect();
    assert_eq!(journal.state(), Condition::Good);
    let later = journal.append(ready(1, 1));
    drop(hold);
    let refused: Vec<_> = appended.into_iter().map(wait).filter_map(Result::err).collect();
    assert_eq!(refused.len(), 5000 - 2048);
    assert!(refused.iter().all(|error| !error.is_final));
    wait(first).unwrap();
    wait(later).unwrap();
}

#[test]
fn journal_whose_own_name_cannot_be_made_durable_is_not_begun() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("journal");
    std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o300)).unwrap();
    let opened = std::thread::scope(|scope| {
        let open = || {
            if nix::unistd::geteuid().is_root() {
                // Of this thread only, and with it go the capabilities that overlook permissions.
                let nobody = nix::unistd::Uid::from_raw(65534);
                nix::unistd::chown(parent.path(), Some(nobody), None).unwrap();
                nix::unistd::setfsuid(nobody);
            }
            FileJournal::open(&directory, "state", "boot").map(drop)
        };
        scope.spawn(open).join().unwrap()
    });
    std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    assert!(directory.exists());
    assert!(matches!(opened, Err(OpenError::Directory { .. })), "{opened:?}");
}

#[test]
fn full_disk_refuses_new_calls_and_takes_results() {
    let disk = SimulatedDisk::default();
    let (journal, _) = on(&disk);
    wait(journal.append(accepted(1, 1, 5))).unwrap();
    wait(journal.append(started(1))).unwrap();
    // Giving the ballast up makes room for one more segment.
    disk.set_room(Some(disk.used() + 3990), false);
    let mut call = 2;
    let refused = loop {
        match wait(journal.append(accepted(call, 1, 300))) {
            Ok(()) => call += 1,
            Err(error) => break error,
        }
        assert!(call < 100, "the disk never filled up");
    };
    assert!(refused.reason.contains("the disk is full"), "{refused}");
    assert_eq!(journal.state(), Condition::OutOfSpace);
    wait(journal.append(finished(1, 0))).unwrap();
    disk.set_room(None, false);
    drop(journal);
    let (journal, recovered) = on(&disk);
    assert_eq!(journal.state(), Condition::Good);
    assert!(recovered.calls.iter().any(|call| call.call.call_id == call_id(1)));
}

#[test]
fn room_that_was_made_is_found_though_records_keep_coming() {
    let disk = SimulatedDisk::default();
    let identity = Identity { state_id: "state".into(), boot_id: "boot".into() };
    let sizes = Sizes { ballast: 6000, ..SIZES };
    let interval = Duration::from_millis(500);
    let (journal, _) = FileJournal::open_on(disk.clone(), identity, sizes, interval).unwrap();
    disk.set_room(Some(disk.used()), false);
    while journal.state() == Condition::Good {
        wait(journal.append(Record::Term { term: 1 })).unwrap();
    }
    assert_eq!(journal.state(), Condition::OutOfSpace);
    disk.set_room(None, false);

    // Less than the interval is between two of them.
    let patience = Instant::now();
    while journal.state() == Condition::OutOfSpace {
        wait(journal.append(Record::Term { term: 2 })).unwrap();
        assert!(patience.elapsed() < Duration::from_secs(60), "nobody looks");
        std::thread::sleep(Duration::from_millis(5));
    }

    assert_eq!(journal.state(), Condition::Good);
    wait(journal.append(accepted(1, 1, 5))).unwrap();
}

#[test]
fn second_journal_in_the_same_directory_is_refused_and_files_are_private() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("journal");
    let (journal, _) = at(&path);
    wait(journal.append(Record::Term { term: 4 })).unwrap();
    let error = FileJournal::open(&path, "state", "boot").unwrap_err();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    assert!(error.to_string().ends_with("/journal is in use by another runner"), "{error}");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    for entry in std::fs::read_dir(&path).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    drop(journal);
    let (_journal, recovered) = at(&path);
    assert_eq!((recovered.same_boot, recovered.term), (true, 4));
}

#[test]
fn inspection_says_what_recovery_gives_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (journal, _) = at(directory.path());
    for record in [opening(1, 3), ready(1, 8), accepted(1, 1, 5), started(1), accepted(2, 1, 5)] {
        wait(journal.append(record)).unwrap();
    }
    let names = |path: &Path| {
        let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
        entries.map(|entry| (entry.file_name(), entry.metadata().unwrap().len())).collect::<BTreeMap<_, _>>()
    };
    let before = names(directory.path());
    let report = inspect(directory.path()).unwrap();
    assert_eq!(names(directory.path()), before);
    assert_eq!(report.recovery.sessions[0].sandbox_id.as_deref(), Some("sandbox-8"));
    let phases: Vec<_> = report.recovery.calls.iter().map(|call| (call.call_id.as_str(), call.phase)).collect();
    assert_eq!(phases, [("call-1", "started"), ("call-2", "accepted")]);
    assert_eq!(report.records.last().unwrap().kind, "accepted");
    assert!(!report.recovery.torn_tail && report.segments.last().unwrap().role == "records");
}

/// In the child: appends until it is killed, and says what it was promised.
#[test]
#[ignore = "the child of the next test"]
fn append_until_killed() {
    let Some(directory) = std::env::var_os("JOURNAL_DIRECTORY") else { return };
    let (journal, recovered) = at(Path::new(&directory));
    let mut next = recovered.term + 1;
    loop {
        let futures: Vec<Appended> = (next..next + 5).map(|term| journal.append(Record::Term { term })).collect();
        next += 5;
        for future in futures {
            wait(future).unwrap();
        }
        println!("promised {}", next - 1);
    }
}

#[test]
fn process_that_is_killed_leaves_everything_that_it_was_promised() {
    let directory = tempfile::tempdir().unwrap();
    let mut promised = 0;
    for round in 1..6_usize {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "journal::file_tests::append_until_killed", "--nocapture"])
            .env("JOURNAL_DIRECTORY", directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let said =
            lines.filter_map(|line| line.rsplit_once("promised ").and_then(|(_, n)| n.trim().parse::<u64>().ok()));
        promised = said.take(round * 7).last().unwrap_or(promised);
        child.kill().unwrap();
        child.wait().unwrap();
        let (_journal, recovered) = at(directory.path());
        assert!(recovered.term >= promised, "{} after {promised} were promised", recovered.term);
    }
    assert!(promised > 0);
}

/// Prints medians, on the disk of `JOURNAL_BENCH_DIRECTORY`.
#[test]
#[ignore = "a measurement"]
fn measure_append() {
    let base = std::env::var_os("JOURNAL_BENCH_DIRECTORY").unwrap_or_else(|| "/var/tmp".into());
    let directory = tempfile::tempdir_in(base).unwrap();
    let median = |mut times: Vec<Duration>| {
        times.sort();
        (times[times.len() / 2], times[times.len() * 99 / 100])
    };
    let file = std::fs::File::create(directory.path().join("bare")).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 16 << 20).unwrap();
    file.sync_all().unwrap();
    let bare = (0..2000_u64).map(|n| {
        let begun = Instant::now();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 256], n * 256).unwrap();
        file.sync_data().unwrap();
        begun.elapsed()
    });
    println!("write and fdatasync of 256 bytes: {:?}", median(bare.collect()));
    let (journal, _) = at(&directory.path().join("journal"));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for batch in [1_u64, 32] {
        let times = (0..2000_u64).map(|round| {
            let begun = Instant::now();
            let futures: Vec<Appended> =
                (0..batch).map(|n| journal.append(Record::Started { call_id: call_id(round * 100 + n) })).collect();
            for future in futures {
                runtime.block_on(future).unwrap();
            }
            begun.elapsed()
        });
        println!("append of {batch} and wait: {:?}", median(times.collect()));
    }
}
