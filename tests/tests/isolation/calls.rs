//! The system call table against the kernel: every number from 0 to 600 is called in a sandbox, and the answer must be
//! the one that the table gives for these very arguments.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use sandbox_init::policy::Profile;
use sandbox_init::policy::seccomp::{Arch, Options, Verdict, verdict};
use sandbox_runner_tests::host;
use sandbox_runner_tests::prober::{self, Scanned};
use sandbox_runner_tests::rootfs::Rootfs;
use sandbox_runner_tests::runner::{Caller, Exec, NOBODY, finish};

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
const LAST: u32 = 600;

/// The arguments with which the prober calls `number`.
fn arguments(number: u32) -> [u64; 6] {
    let futex = match Arch::NATIVE {
        Arch::X86_64 => 202,
        Arch::Aarch64 => 98,
    };
    if number == futex { [0; 6] } else { [u64::MAX; 6] }
}

/// What the kernel answers to an ordinary user without any filter.
fn unfiltered() -> BTreeMap<u32, Scanned> {
    let mut command = Command::new(prober::path());
    command.args(["table", "0", &LAST.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if nix::unistd::geteuid().is_root() {
        std::os::unix::process::CommandExt::uid(&mut command, NOBODY);
    }
    prober::scan(&finish(command, Duration::from_secs(60)).expect("the scan ends").stdout).expect("a scan")
}

/// Why the answer of the sandbox to one number is wrong.
fn objection(expected: Verdict, inside: &Scanned, outside: &Scanned) -> Option<&'static str> {
    match expected {
        Verdict::Errno(errno) if inside.outcome != "returned" || inside.errno != errno as i32 => {
            Some("the table refuses it with another errno")
        }
        Verdict::Errno(_) => None,
        Verdict::Allow if inside.outcome == "killed" => Some("the table allows it and a filter kills"),
        // The kernel's own refusals: without a filter they are the same.
        Verdict::Allow if inside.errno == ENOSYS && outside.errno != ENOSYS => {
            Some("the table allows it and it does not exist")
        }
        Verdict::Allow if inside.errno == EPERM && outside.errno != EPERM => {
            Some("the table allows it and it is refused")
        }
        Verdict::Allow => None,
    }
}

fn assert_table(caller: Caller, profile: &str, options: Options) {
    if let Some(obstacle) = caller.obstacle() {
        sandbox_runner_tests::skip!("{obstacle}");
    }
    let _host = host::shared();
    let rootfs = Rootfs::owned_by(caller.uid());
    let exec = Exec::in_rootfs(caller, rootfs.path()).option("--profile", profile);

    let finished = exec.prober(["table", "0", &LAST.to_string()]);
    let inside = prober::scan(&finished.stdout).expect("a scan");
    let outside = unfiltered();

    let mut wrong = String::new();
    let mut compared = 0;
    for number in 0..=LAST {
        let expected = verdict(Arch::NATIVE, &options, number, &arguments(number));
        let (Some(inside), Some(outside)) = (inside.get(&number), outside.get(&number)) else {
            panic!("number {number} was not scanned: {}", finished.errors());
        };
        if inside.outcome == "skipped" {
            continue;
        }
        compared += 1;
        if let Some(objection) = objection(expected, inside, outside) {
            let _ = writeln!(wrong, "{number}: {objection}: {expected:?}, inside {inside:?}, outside {outside:?}");
        }
    }
    assert!(compared > 590, "only {compared} numbers were compared");
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn every_call_of_the_standard_table_is_answered_as_written() {
    assert_table(
        Caller::Root,
        "root",
        Options { profile: Profile::Standard, shared_identity: false, no_namespaces: false },
    );
}

#[test]
fn every_call_of_the_strict_table_is_answered_as_written() {
    assert_table(
        Caller::Root,
        "strict",
        Options { profile: Profile::Strict, shared_identity: false, no_namespaces: false },
    );
}

/// With a single id, process 1 and the workload are one user to the kernel, and the table refuses more.
#[test]
fn every_call_is_answered_as_written_for_an_ordinary_user() {
    assert_table(
        Caller::Nobody,
        "root",
        Options { profile: Profile::Standard, shared_identity: true, no_namespaces: false },
    );
}
