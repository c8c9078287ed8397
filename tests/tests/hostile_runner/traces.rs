//! What one sandbox leaves for the next, and the launcher for itself or from whoever started it: nothing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use proto::launch::v1::{CreateSandbox, InspectSandbox, Limits, reply, request};
use sandbox_runner_tests::host;
use sandbox_runner_tests::launcher::{Connection, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::Rootfs;

use crate::{Bench, MIB, SLOTS, create, kill};

/// A blank has the limits of the last sandbox ahead of need. They must be nobody's who asks for others, larger or smaller.
#[test]
fn limits_are_those_of_the_request_whatever_the_sandbox_before_it_had() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let asked = [(64, 40), (64, 40), (192, 80), (32, 20), (192, 80)];
    for (round, (mebibytes, pids)) in asked.into_iter().enumerate() {
        let id = format!("round-{round}");
        let limits = Limits { memory_bytes: mebibytes * MIB, pids, cpu_millis: 500 + 10 * pids, disk_bytes: 16 * MIB };
        create(&connection, CreateSandbox { limits: Some(limits), ..plain_sandbox(&id) });

        let inspect = InspectSandbox { sandbox_id: id.clone() };
        let answer = connection.ask(request::Body::InspectSandbox(inspect)).expect("an answer").body;

        kill(&connection, &id);
        let Some(reply::Body::Inspection(inspection)) = answer else { panic!("no inspection: {answer:?}") };
        let found = inspection.limits.expect("limits");
        assert_eq!((found.memory_bytes, found.pids), (mebibytes * MIB, pids), "round {round}");
    }
}

#[test]
fn thirty_sandboxes_leave_nothing_in_the_launcher() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let round = |number: usize| {
        let id = format!("round-{number}");
        create(&connection, plain_sandbox(&id));
        kill(&connection, &id);
    };
    // Every slot keeps the layers it has once shown. The lowest free one is taken first, so a turn for all of them takes
    // as many sandboxes at once.
    let all = ["first", "second", "third"];
    assert_eq!(all.len(), usize::try_from(SLOTS).expect("few"), "one sandbox for each slot");
    for id in all {
        create(&connection, plain_sandbox(id));
    }
    for id in all {
        kill(&connection, id);
    }
    (0..3).for_each(round);
    std::thread::sleep(Duration::from_secs(1));
    let before = footprint(bench.launcher.pid());

    (3..33).for_each(round);

    let mut after = footprint(bench.launcher.pid());
    for _ in 0..100 {
        if after == before {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        after = footprint(bench.launcher.pid());
    }
    assert_eq!(after, before, "descriptors, mounts and children of the launcher");
}

/// How many descriptors, mounts and children it has.
fn footprint(launcher: u32) -> (usize, usize, usize) {
    let descriptors = fs::read_dir(format!("/proc/{launcher}/fd")).map_or(0, Iterator::count);
    let mounts = fs::read_to_string(format!("/proc/{launcher}/mountinfo")).unwrap_or_default().lines().count();
    (descriptors, mounts, host::children_of(launcher).len())
}

#[test]
fn launcher_inherits_nothing_from_whoever_starts_it() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let marker = rootfs.path().join("etc/passwd");
    let setup = Setup::new(2, rootfs.path());
    let inner = setup.command();
    let mut command = Command::new("bash");
    let opened: String = (3..=20).map(|fd| format!("exec {fd}<\"$1\"\n")).collect();
    command
        .arg("-c")
        .arg(format!("trap '' INT TERM HUP\numask 0\n{opened}shift\nexec \"$@\""))
        .arg("bash")
        .arg(&marker);
    command.arg(inner.get_program()).args(inner.get_args()).env_clear().env("SECRET_OF_THE_CALLER", "x");
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let launcher = setup.start_with(command).expect("the launcher starts");
    let connection = Connection::greeted(&launcher.setup().socket()).expect("served");

    let created = create(&connection, plain_sandbox("heir"));

    for pid in host::family_of(created.pid) {
        let ignored = host::status_field(pid, "SigIgn:").unwrap_or_default();
        let mask = u64::from_str_radix(&ignored, 16).unwrap_or(0);
        // SIGHUP 1, SIGINT 2, SIGTERM 15.
        assert_eq!(mask & 0x4003, 0, "process {pid} of the sandbox ignores signals of the caller");
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        assert!(
            !String::from_utf8_lossy(&environment).contains("SECRET_OF_THE_CALLER"),
            "process {pid} has a variable"
        );
        assert_eq!(held(pid, &marker), 0, "process {pid} holds a file of the caller");
    }
    kill(&connection, "heir");
}

fn held(pid: u32, file: &Path) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == file)).count()
}
