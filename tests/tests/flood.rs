//! A command that never stops writing costs neither memory nor unbounded disk, whether somebody reads it or not.
#![forbid(unsafe_code)]

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::{Caller, Exec, wait};

/// What buffers, allocators and page tables may add once a flood runs.
const GROWTH: u64 = 16 << 20;
/// More than the head and tail that are kept of a stream, and far less than a second of the flood.
const ON_DISK: u64 = 256 << 20;
/// Exit code of `exec` for a command that reached its time limit.
const TIMED_OUT: i32 = 124;

#[derive(Clone, Copy, PartialEq)]
enum Reader {
    Keen,
    /// Reads the first mebibyte and then nothing until the command has ended.
    Stalled,
}

/// Resident bytes of the command and everything it started: runner, launcher, process 1, spawner, workload.
fn resident(root: u32) -> u64 {
    let kibibytes = |pid| {
        let text = host::status_field(pid, "VmRSS")?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    host::family_of(root).into_iter().filter_map(kibibytes).sum::<u64>() * 1024
}

/// Bytes that the files below a directory take on the disk.
fn on_disk(directory: &Path) -> u64 {
    host::files_below(directory)
        .iter()
        .filter_map(|path| path.symlink_metadata().ok())
        .map(|file| file.blocks() * 512)
        .sum()
}

fn flood(caller: Caller, reader: Reader, seconds: u64) {
    let exec = Exec::new(caller).option("--timeout", format!("{seconds}s"));
    let mut child =
        exec.command(["yes", "0123456789abcdef0123456789abcdef0123456789abcdef"]).spawn().expect("the command starts");
    let mut stdout = child.stdout.take().expect("a pipe");
    let (pid, mut read) = (child.id(), 0_u64);
    let (mut early, mut most, mut disk) = (0, 0, 0);
    let begin = Instant::now();
    let mut next = Duration::from_millis(500);
    let mut buffer = vec![0; 1 << 20];
    let mut at_end = false;
    let patience = Duration::from_secs(seconds + 60);
    while !at_end {
        assert!(begin.elapsed() < patience, "the flood has no end");
        if reader == Reader::Stalled && read >= 1 << 20 && begin.elapsed() < Duration::from_secs(seconds) {
            std::thread::sleep(Duration::from_millis(50));
        } else {
            let count = stdout.read(&mut buffer).expect("reading the output");
            read += count as u64;
            at_end = count == 0;
        }
        if begin.elapsed() >= next && !at_end {
            next += Duration::from_millis(500);
            let now = resident(pid);
            early = if begin.elapsed() < Duration::from_millis(1500) { early.max(now) } else { early };
            most = most.max(now);
            disk = disk.max(on_disk(exec.state_directory()));
        }
    }
    let status = wait(&mut child, Duration::from_secs(30)).expect("the command ends");
    println!(
        "read {} MiB; resident {} KiB at first, {} KiB at most; {} MiB on disk",
        read >> 20,
        early >> 10,
        most >> 10,
        disk >> 20
    );
    assert_eq!(status.code(), Some(TIMED_OUT));
    assert!(read >= 1 << 20, "only {read} bytes arrived");
    assert!(early > 0 && most <= early + GROWTH, "{early} bytes resident at first, {most} at most");
    assert!(disk <= ON_DISK, "{disk} bytes on disk");
}

#[test]
fn output_that_is_read_costs_no_memory() {
    let _alone = host::exclusive();
    needs_root!();
    flood(Caller::Root, Reader::Keen, 5);
}

#[test]
fn output_that_nobody_reads_costs_no_memory() {
    let _alone = host::exclusive();
    needs_root!();
    flood(Caller::Root, Reader::Stalled, 5);
}

#[test]
#[ignore = "takes two minutes"]
fn a_minute_of_output_costs_no_memory() {
    let _alone = host::exclusive();
    needs_root!();
    flood(Caller::Root, Reader::Keen, 60);
    flood(Caller::Root, Reader::Stalled, 60);
}
