//! A command that never stops writing costs neither memory nor unbounded disk, whether somebody reads it or not; under the
//! daemon it neither holds up heartbeats nor other sessions.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use runner::dev::{Link, LinkSettings};
use sandbox_runner_tests::daemon::{Daemon, MARKER, Options, Workspace, bash, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::{Caller, Exec, is_slow, scaled, wait};

/// What buffers, allocators and page tables may add once a flood runs.
const GROWTH: u64 = 16 << 20;
/// More than the quarter of the disk limit that output may take, and far less than a second of the flood.
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
    host::family_of(root).into_iter().map(host::resident_bytes).sum()
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
    let exec = Exec::new(caller).option("--timeout", format!("{seconds}s")).option("--disk", "512M");
    let mut child =
        exec.command(["yes", "0123456789abcdef0123456789abcdef0123456789abcdef"]).spawn().expect("the command starts");
    let mut stdout = child.stdout.take().expect("a pipe");
    let (pid, mut read) = (child.id(), 0_u64);
    let (mut early, mut most, mut disk) = (0, 0, 0);
    let begin = Instant::now();
    let mut next = Duration::from_millis(500);
    let mut buffer = vec![0; 1 << 20];
    let mut at_end = false;
    let mut first = None;
    let patience = Duration::from_secs(seconds) + scaled(Duration::from_secs(60));
    while !at_end {
        assert!(begin.elapsed() < patience, "the flood has no end");
        if reader == Reader::Stalled && read >= 1 << 20 && begin.elapsed() < Duration::from_secs(seconds) {
            std::thread::sleep(Duration::from_millis(50));
        } else {
            let count = stdout.read(&mut buffer).expect("reading the output");
            read += count as u64;
            at_end = count == 0;
            first.get_or_insert_with(Instant::now);
        }
        if begin.elapsed() >= next && !at_end {
            next += Duration::from_millis(500);
            let now = resident(pid);
            // On an emulated machine the first byte takes seconds.
            let is_early = first.is_none_or(|first| first.elapsed() < Duration::from_millis(1500));
            early = if is_early { early.max(now) } else { early };
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
    let mut errors = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut errors).expect("reading the errors");
    }
    assert_eq!(status.code(), Some(TIMED_OUT), "{errors}");
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

/// How an orchestrator takes output.
#[derive(Clone, Copy, PartialEq)]
enum Taker {
    /// It asks for some and gets it over a wire of 320 KiB a second.
    Slow,
    /// It never asks for any.
    Stalled,
}

/// Time the runner has to renew its lease in; a heartbeat comes every twentieth part of it.
const LEASE: Duration = Duration::from_secs(10);

async fn daemon_flood(taker: Taker, time: Duration) {
    let _alone = host::exclusive();
    let window = if taker == Taker::Slow { 64 * 1024 } else { 0 };
    let link = LinkSettings { window, lease_ttl: LEASE, heartbeat_every: LEASE / 20, ..LinkSettings::default() };
    let daemon = Daemon::start(Options { link, ..Options::default() }).await;
    let (flooding, other) = (daemon.session("flooding").await, daemon.session("other").await);
    let marked = flooding.run("first", bash(format!("echo flooding > {MARKER}"))).await;
    marked.expect("the first call");
    let workspace = Workspace::find("flooding").expect("its sandbox");
    if taker == Taker::Slow {
        daemon.wire.rest_after_each_piece(Duration::from_millis(50));
    }
    let mut seen = daemon.orchestrator.watch();
    let heartbeats = tokio::spawn(async move {
        let mut beats = Vec::new();
        loop {
            match seen.recv().await {
                Ok(Link::Heartbeat(beat)) => beats.push((beat.lease_seq, beat.sent_boottime_ns)),
                Ok(Link::Finished(call_id)) if call_id == "over" => return beats,
                Ok(_) => {}
                Err(error) => panic!("events were missed: {error}"),
            }
        }
    });

    let timeout_ms = i64::try_from(time.as_millis()).expect("short");
    let command = Some("yes 0123456789abcdef0123456789abcdef".to_owned());
    flooding.send("flood", pb::call::Input::Bash(pb::BashInput { command, timeout_ms, ..Default::default() }));
    within("start", flooding.started("flood")).await.expect("started");
    let held = || {
        let processes = [daemon.runner_pid(), daemon.launcher_pid(), Some(workspace.process_1), workspace.spawner()];
        processes.into_iter().flatten().map(host::resident_bytes).sum::<u64>()
    };
    let (begin, mut early, mut most, mut disk, mut answered) = (Instant::now(), 0, 0, 0, 0_u64);
    let mut over = std::pin::pin!(flooding.ended("flood"));
    let ended = loop {
        // The other session is served all the time.
        let id = format!("other-{answered}");
        let finished = within(&id, other.bash(&id, "echo served")).await.expect("an end");
        assert_eq!(finished.streams[&1].bytes, b"served\n");
        answered += 1;
        let now = held();
        early = if begin.elapsed() < time / 4 { early.max(now) } else { early };
        most = most.max(now);
        disk = disk.max(daemon.directories().iter().map(|top| on_disk(top)).sum());
        if let Ok(ended) = tokio::time::timeout(Duration::from_millis(20), &mut over).await {
            break ended.expect("an end");
        }
        assert!(begin.elapsed() < time + scaled(Duration::from_secs(60)), "the flood has no end");
    };
    let total = ended.streams.iter().map(|stream| stream.total_bytes).sum::<u64>();
    assert!(matches!(ended.outcome.and_then(|outcome| outcome.kind), Some(pb::outcome::Kind::TimedOut(_))));
    println!(
        "{} MiB written, {answered} other calls; resident {early} at first, {most} at most; disk {disk}",
        total >> 20
    );
    assert!(total > 16 << 20, "{total} bytes are no flood");
    assert!(early > 0 && most <= early + GROWTH, "{early} bytes resident at first, {most} at most");
    assert!(disk <= ON_DISK, "{disk} bytes on disk");
    assert!(answered > 3, "only {answered} calls of the other session were answered");

    within("over", other.bash("over", "true")).await.expect("an end");
    let beats = within("heartbeats", heartbeats).await.expect("no panic");
    assert!(beats.len() > 3, "{} heartbeats", beats.len());
    for pair in beats.windows(2) {
        let [(seq, sent), (next_seq, next_sent)] = pair else { continue };
        assert_eq!(*next_seq, seq + 1, "a heartbeat is missing");
        // Four of them may be late on a machine that is busy, and no more than the lease on an emulated one.
        let most = if is_slow() { LEASE } else { LEASE / 5 };
        assert!(u128::from(next_sent - sent) < most.as_nanos(), "no heartbeat for {} ns", next_sent - sent);
    }
    assert!(!daemon.log().contains("lease lapsed"), "{}", daemon.end_of_log());
    assert_eq!(daemon.orchestrator.links(), 1);

    // Whatever was kept of it can still be had, and what was not is declared.
    daemon.wire.rest_after_each_piece(Duration::ZERO);
    daemon.orchestrator.set(LinkSettings { window: 1 << 20, ..link });
    let finished = within("output", flooding.outcome("flood")).await.expect("an end");
    assert_eq!(finished.streams[&1].through, total);
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_orchestrator_costs_no_memory_and_holds_up_nobody() {
    needs_root!();
    daemon_flood(Taker::Slow, Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_orchestrator_costs_no_memory_and_holds_up_nobody() {
    needs_root!();
    daemon_flood(Taker::Stalled, Duration::from_secs(5)).await;
}

/// It has asked for more than it takes, so only the socket holds the runner back; the lease ends, and what runs goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orchestrator_that_reads_nothing_any_more_costs_no_memory_and_ends_no_call() {
    needs_root!();
    let _alone = host::exclusive();
    let daemon = Daemon::start(Options {
        link: LinkSettings {
            window: 1 << 30,
            lease_ttl: LEASE,
            heartbeat_every: LEASE / 20,
            ..LinkSettings::default()
        },
        ..Options::default()
    })
    .await;
    let session = daemon.session("flooding").await;
    session.run("first", bash(format!("echo flooding > {MARKER}"))).await.expect("the first call");
    let workspace = Workspace::find("flooding").expect("its sandbox");
    let command = Some("yes 0123456789abcdef0123456789abcdef".to_owned());
    let input = pb::BashInput { command, timeout_ms: 10_000, ..Default::default() };
    session.send("flood", pb::call::Input::Bash(input));
    within("start", session.started("flood")).await.expect("started");
    let held = || {
        let processes = [daemon.runner_pid(), daemon.launcher_pid(), Some(workspace.process_1), workspace.spawner()];
        processes.into_iter().flatten().map(host::resident_bytes).sum::<u64>()
    };
    // While it still reads, everything that is ever kept in memory has its size.
    let (begin, mut early, mut most) = (Instant::now(), 0, 0);
    while begin.elapsed() < Duration::from_secs(2) {
        early = early.max(held());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    daemon.wire.keep_what_comes_from_the_runner();
    while begin.elapsed() < Duration::from_secs(7) {
        most = most.max(held());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    assert!(early > 0 && most <= early + GROWTH, "{early} bytes resident at first, {most} at most");
    daemon.wire.release();
    let finished = within("output", session.outcome("flood")).await.expect("an end");
    let outcome = finished.message.outcome.and_then(|outcome| outcome.kind);
    assert!(matches!(outcome, Some(pb::outcome::Kind::TimedOut(_))), "{outcome:?}");
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes two minutes"]
async fn a_minute_for_a_slow_and_a_stalled_orchestrator_costs_no_memory() {
    needs_root!();
    daemon_flood(Taker::Slow, Duration::from_secs(60)).await;
    daemon_flood(Taker::Stalled, Duration::from_secs(60)).await;
}
