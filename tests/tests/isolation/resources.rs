//! Attacks on quantities: each ends at the limit of its sandbox, is named, and leaves the host as it was.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use sandbox_runner_tests::host::{self, Snapshot};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::prober::{self, Row, Verdict};
use sandbox_runner_tests::rootfs::{PROBER, Rootfs};
use sandbox_runner_tests::runner::{Caller, Exec, is_slow, wait};

const MIB: u64 = 1 << 20;

#[derive(serde::Deserialize)]
struct Report {
    exit_code: i32,
    stdout: String,
    outcome: Outcome,
    receipt: Receipt,
}

#[derive(serde::Deserialize)]
struct Outcome {
    kind: String,
    #[serde(default)]
    limit_bytes: u64,
    #[serde(default)]
    core_dumped: bool,
}

#[derive(serde::Deserialize)]
struct Receipt {
    layers: Vec<Layer>,
}

#[derive(serde::Deserialize)]
struct Layer {
    name: String,
    enforced: String,
}

impl Report {
    fn row(&self, id: &str) -> Row {
        let rows = prober::rows(self.stdout.as_bytes()).expect("result lines");
        rows.into_iter().find(|row| row.id == id).unwrap_or_else(|| panic!("no row {id} in {}", self.stdout))
    }

    fn enforces(&self, layer: &str) -> bool {
        self.receipt.layers.iter().any(|entry| entry.name == layer && !entry.enforced.is_empty())
    }
}

fn number(row: &Row) -> u64 {
    row.detail.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no number in {row}"))
}

/// Runs the prober in a sandbox with these limits.
fn attack(limits: &[(&str, &str)], arguments: &[&str]) -> Report {
    attack_as(Caller::Root, limits, arguments)
}

/// Those who can be played here, for what is bounded without the cgroups that an ordinary user has not.
fn callers() -> Vec<Caller> {
    let playable = |caller: &Caller| {
        let Some(obstacle) = caller.obstacle() else { return true };
        (|| sandbox_runner_tests::skip!("{obstacle}"))();
        false
    };
    Caller::BOTH.into_iter().filter(playable).collect()
}

fn attack_as(caller: Caller, limits: &[(&str, &str)], arguments: &[&str]) -> Report {
    let rootfs = Rootfs::owned_by(caller.uid());
    let mut exec = Exec::in_rootfs(caller, rootfs.path()).flag("--json");
    for (name, value) in limits {
        exec = exec.option(name, *value);
    }
    let finished = exec.prober(arguments.iter().copied());
    serde_json::from_slice(&finished.stdout)
        .unwrap_or_else(|error| panic!("no report ({error}): {} {}", finished.text(), finished.errors()))
}

#[test]
fn fork_bomb_ends_at_the_limit_while_another_sandbox_works() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let beside = std::thread::spawn(move || Exec::in_rootfs(Caller::Root, rootfs.path()).prober(["exit", "7"]).code());

    let report = attack(&[("--pids", "64")], &["forkbomb", "5000"]);

    let row = report.row("R01");
    assert_eq!((row.result, row.errno.as_str()), (Verdict::Held, "EAGAIN"), "{row}");
    assert!(number(&row) < 64, "{row}");
    assert_eq!(beside.join().expect("the other sandbox"), 7);
}

#[test]
fn memory_bomb_is_killed_and_named() {
    needs_root!();
    let _host = host::shared();
    let report = attack(&[("--memory", "64M")], &["memory", "2048"]);

    assert_eq!(report.exit_code, 137);
    assert_eq!(report.outcome.kind, "out_of_memory");
    assert_eq!(report.outcome.limit_bytes, 64 * MIB);
}

#[test]
fn shared_memory_counts_as_memory() {
    needs_root!();
    let _host = host::shared();
    let report = attack(&[("--memory", "64M")], &["sharedmemory", "2048"]);

    let refused =
        prober::rows(report.stdout.as_bytes()).is_ok_and(|rows| rows.iter().all(|row| row.result == Verdict::Held));
    assert!(refused || report.outcome.kind == "out_of_memory", "{} {}", report.outcome.kind, report.stdout);
}

#[test]
fn memory_filesystems_are_bounded() {
    needs_root!();
    let _host = host::shared();
    for directory in ["/tmp", "/dev/shm"] {
        let report = attack(&[("--memory", "128M")], &["fill", directory, "4096"]);

        // An error of whoever writes, and nobody's end: files in memory cannot be killed.
        let row = report.row("R04");
        assert_eq!((row.result, row.errno.as_str()), (Verdict::Held, "ENOSPC"), "{directory}: {row}");
        assert!(number(&row) <= 32, "{directory}: more than a quarter of the memory: {row}");
    }
}

#[test]
fn disk_ends_at_the_limit() {
    needs_root!();
    let _host = host::shared();
    let report = attack(&[("--disk", "64M"), ("--memory", "512M")], &["fill", "/workspace", "1024"]);

    if !report.enforces("disk_limit") {
        sandbox_runner_tests::skip!("this host has no hard disk limit");
    }
    let row = report.row("R04");
    assert_eq!(row.result, Verdict::Held, "{row}");
    assert!(["ENOSPC", "EDQUOT"].contains(&row.errno.as_str()), "{row}");
    // A twentieth more or less.
    assert!((61..=67).contains(&number(&row)), "{row}");
}

#[test]
fn names_in_tmp_are_bounded() {
    needs_root!();
    let _host = host::shared();
    let report = attack(&[("--memory", "128M")], &["inodes", "/tmp", "400000"]);

    let row = report.row("R05");
    assert_eq!((row.result, row.errno.as_str()), (Verdict::Held, "ENOSPC"), "{row}");
}

#[test]
fn processor_time_stays_below_the_limit() {
    needs_root!();
    let _host = host::shared();
    let report = attack(&[("--cpus", "0.5")], &["cpu", "4", "2000"]);

    if !report.enforces("cgroup_cpu") {
        sandbox_runner_tests::skip!("this host has no processor limit");
    }
    let percent = number(&report.row("R07"));
    // A tenth above the quota for the period in which the attack begins and ends.
    assert!(percent <= 60, "{percent} % of a processor with a limit of 50 %");
}

#[test]
fn zombies_are_collected() {
    for caller in callers() {
        let _host = host::shared();
        let report = attack_as(caller, &[("--pids", "64")], &["zombies", "1000"]);

        let row = report.row("R09");
        assert_eq!(row.result, Verdict::Held, "{caller:?}: {row}");
    }
}

#[test]
fn kernel_objects_are_bounded() {
    for caller in callers() {
        let _host = host::shared();
        for (arguments, rows) in [
            (&["kernelobjects", "300000"][..], &["R15.timers", "R15.queues"][..]),
            (&["files", "2000000"][..], &["R15.files"][..]),
        ] {
            let report = attack_as(caller, &[("--memory", "256M")], arguments);
            for id in rows {
                let row = report.row(id);
                assert_eq!(row.result, Verdict::Held, "{caller:?}: {row}");
            }
        }
    }
}

#[test]
fn missing_names_do_not_outgrow_the_memory_limit() {
    needs_root!();
    let _host = host::shared();
    let report = attack(&[("--memory", "64M")], &["names", "300000"]);

    assert_eq!(report.exit_code, 0, "{}", report.stdout);
}

#[test]
fn crash_leaves_no_core() {
    for caller in callers() {
        let _host = host::shared();
        let report = attack_as(caller, &[], &["core"]);

        assert_eq!((report.exit_code, report.outcome.kind.as_str()), (134, "signaled"), "{caller:?}");
        assert!(!report.outcome.core_dumped, "{caller:?}: a core was written");
    }
}

/// Where `core_pattern` names a program, the kernel starts it on the host, as root, for every crash inside, whatever the
/// limit; except for a limit of one byte.
#[test]
fn crash_does_not_start_the_hosts_core_handler() {
    for caller in callers() {
        let _host = host::shared();
        let rootfs = Rootfs::owned_by(caller.uid());

        let finished = Exec::in_rootfs(caller, rootfs.path()).prober(["read", "/proc/self/limits"]);

        let text = finished.text();
        let line = text.lines().find(|line| line.starts_with("Max core file size")).expect("a line about cores");
        let numbers: Vec<&str> = line.split_whitespace().skip(4).take(2).collect();
        assert_eq!(numbers, ["1", "1"], "{caller:?}: {line}");
    }
}

#[test]
fn command_that_ignores_every_signal_is_killed_at_the_timeout() {
    for caller in callers() {
        let _host = host::exclusive();
        let rootfs = Rootfs::owned_by(caller.uid());
        let exec = Exec::in_rootfs(caller, rootfs.path()).option("--timeout", "1s");
        let before = Snapshot::take(&[]);

        let finished = exec.prober(["stubborn"]);

        assert_eq!(finished.code(), 124, "{caller:?}: {}", finished.errors());
        host::assert_restored(&before, &[], Duration::from_secs(15));
    }
}

#[test]
fn daemon_that_left_its_session_is_gone_with_the_sandbox() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::exclusive();
        let rootfs = Rootfs::owned_by(caller.uid());
        let exec = Exec::in_rootfs(caller, rootfs.path());
        let before = Snapshot::take(&[]);
        let token = format!("sbr-attack-daemon-{}", std::process::id());

        let finished = exec.prober(["daemon", &token]);

        assert_eq!(finished.code(), 0, "{}", finished.errors());
        host::assert_restored(&before, &[], Duration::from_secs(15));
        assert_eq!(host::processes_with(&token), Vec::<u32>::new());
    }
}

#[test]
fn killing_everything_from_inside_hurts_only_the_sandbox() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let rootfs = Rootfs::owned_by(caller.uid());

        let finished = Exec::in_rootfs(caller, rootfs.path()).prober(["killall"]);

        // kill(-1) spares its caller, so the command goes on and ends by itself.
        assert_eq!(finished.code(), 0, "{caller:?}: {}", finished.errors());
        assert_eq!(finished.rows().len(), 1);
    }
}

#[test]
fn output_that_nobody_reads_costs_no_memory() {
    callers().into_iter().for_each(assert_unread_output_costs_no_memory);
}

fn assert_unread_output_costs_no_memory(caller: Caller) {
    let _host = host::shared();
    let rootfs = Rootfs::owned_by(caller.uid());
    let exec = Exec::in_rootfs(caller, rootfs.path()).option("--disk", "64M").option("--timeout", "20s");
    let mut command: Command = exec.command([PROBER, "flood", "4000"]);
    // A pipe that is never read: the slowest of all readers.
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the command starts");
    std::thread::sleep(Duration::from_secs(3));

    let family = host::family_of(child.id());
    let peaks: Vec<(u32, u64)> = family.iter().filter_map(|pid| Some((*pid, peak_kib(*pid)?))).collect();
    let ended = child.try_wait().ok().flatten();
    let _ = child.kill();
    let _ = wait(&mut child, Duration::from_secs(20));
    let mut said = String::new();
    if let Some(mut errors) = child.stderr.take() {
        let _ = std::io::Read::read_to_string(&mut errors, &mut said);
    }

    assert!(!peaks.is_empty(), "{caller:?}: no process to measure: the command ended with {ended:?} and said: {said}");
    for (pid, peak) in &peaks {
        assert!(*peak < 160 * 1024, "{caller:?}: process {pid} grew to {peak} KiB: {peaks:?}");
    }
}

/// Neither the filters nor landlock write down what they refuse, and the kernel bounds what it writes of killed processes.
#[test]
fn refused_calls_do_not_fill_the_kernel_log() {
    needs_root!();
    let _host = host::exclusive();
    let log = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/kmsg");
    let Ok(mut log) = log else { sandbox_runner_tests::skip!("the kernel log cannot be read") };
    log.seek(SeekFrom::End(0)).expect("a log that is read from its end");
    let count = if is_slow() { "5000" } else { "100000" };

    let report = attack(&[], &["denied", count]);

    let row = report.row("R20");
    assert_eq!(row.result, Verdict::Held, "{row}");
    let mut record = vec![0; 16 << 10];
    let mut lines = 0;
    loop {
        match log.read(&mut record) {
            Ok(length) if length > 0 => lines += 1,
            Err(error) if error.kind() == ErrorKind::BrokenPipe => panic!("the log was overrun"),
            _ => break,
        }
    }
    assert!(lines < 500, "{lines} lines of log for {row}");
}

fn peak_kib(pid: u32) -> Option<u64> {
    host::status_field(pid, "VmHWM:")?.split(' ').next()?.parse().ok()
}
