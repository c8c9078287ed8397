//! Sandboxes beside each other, and shapes of root filesystems that ordinary people have.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use sandbox_runner_tests::rootfs::{PROBER, Rootfs};
use sandbox_runner_tests::runner::{Caller, Exec, NOBODY, wait};
use sandbox_runner_tests::{host, needs_root};

#[test]
fn commands_that_share_a_state_directory_do_not_disturb_each_other() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());

    let failures: Vec<String> = std::thread::scope(|scope| {
        let run = || (0..8).map(|_| exec.prober(["exit", "7"])).collect::<Vec<_>>();
        let running: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        let finished = running.into_iter().flat_map(|thread| thread.join().expect("no panic in the thread"));
        finished.filter(|finished| finished.code() != 7).map(|finished| finished.errors()).collect()
    });

    assert!(failures.is_empty(), "{} of 32 sandboxes were disturbed by others: {failures:#?}", failures.len());
}

/// An image that was unpacked by root, used by somebody else: its directories belong to nobody inside.
#[test]
fn directory_of_another_user_can_be_the_root_of_an_ordinary_users_sandbox() {
    if let Some(obstacle) = Caller::Nobody.obstacle() {
        sandbox_runner_tests::skip!("{obstacle}");
    }
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();

    let finished = Exec::in_rootfs(Caller::Nobody, rootfs.path()).prober(["exit", "7"]);

    assert_eq!(finished.code(), 7, "uid {NOBODY} cannot use a directory of root: {}", finished.errors());
}

/// Paths of the host tell about the host; a mount of a host directory shows its path in the mount table. The one directory
/// of ours that is mounted inside is the sandbox's own spool.
#[test]
fn mount_table_names_nothing_of_the_state_directory_but_the_own_spool() {
    needs_root!();
    let _host = host::shared();
    let exec = Exec::new(Caller::Root);
    let state = exec.state_directory().display().to_string();

    let finished = exec.run(["cat", "/proc/self/mountinfo"]);

    let text = finished.text();
    let named: Vec<&str> = text.lines().filter(|line| line.contains(&state)).collect();
    assert!(text.lines().count() > 5, "no mount table: {text}");
    assert!(named.iter().all(|line| line.contains(" /run/sandbox-runner/output ")), "{named:#?}");
}

/// A shell is kept ready for the first call. Where there is none, that must not become a loop.
#[test]
fn process_1_rests_when_the_image_has_no_shell() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());
    let token = format!("sbr-attack-rest-{}", std::process::id());
    let mut command = exec.command([PROBER, "sleep", "600", &token]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("the command starts");
    let pids = host::wait_for_sandbox(&token, Duration::from_secs(30));
    // Start-up is not rest, and takes long on an emulated machine.
    std::thread::sleep(Duration::from_secs(2));
    let before = processor_ticks(pids.process_1);

    std::thread::sleep(Duration::from_secs(3));

    let ticks = processor_ticks(pids.process_1) - before;

    let _ =
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), nix::sys::signal::Signal::SIGTERM);
    let _ = wait(&mut child, Duration::from_secs(30));
    // A tick is 10 ms.
    assert!(ticks < 30, "process 1 used {} ms of processor time while its only call slept", ticks * 10);
}

/// User and system time of a process in clock ticks, fields 14 and 15 of `/proc/PID/stat`.
fn processor_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("process 1 lives");
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}
