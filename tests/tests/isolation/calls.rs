//! The system call table against the kernel: every number from 0 to 600 is called in a sandbox, and the answer must be
//! the one that the table gives for these very arguments.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

use sandbox_init::policy::Profile;
use sandbox_init::policy::seccomp::Options;
use sandbox_runner_tests::host;
use sandbox_runner_tests::prober::{self, Scanned};
use sandbox_runner_tests::rootfs::Rootfs;
use sandbox_runner_tests::runner::{Caller, Exec, NOBODY, finish};

use crate::table::{LAST, assert_answers};

/// What the kernel answers to an ordinary user without any filter.
fn unfiltered() -> BTreeMap<u32, Scanned> {
    let mut command = Command::new(prober::path());
    command.args(["table", "0", &LAST.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if nix::unistd::geteuid().is_root() {
        std::os::unix::process::CommandExt::uid(&mut command, NOBODY);
    }
    prober::scan(&finish(command, Duration::from_secs(60)).expect("the scan ends").stdout).expect("a scan")
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
    assert!(!inside.is_empty(), "{}", finished.errors());

    assert_answers(&options, &inside, &unfiltered());
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

#[test]
fn every_call_is_answered_as_written_for_an_ordinary_user_in_the_strict_profile() {
    assert_table(
        Caller::Nobody,
        "strict",
        Options { profile: Profile::Strict, shared_identity: true, no_namespaces: false },
    );
}
