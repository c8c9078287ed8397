//! What one sandbox leaves for the next, and the launcher for itself or from whoever started it: nothing.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use prost::Message;
use proto::launch::v1::{CreateSandbox, Hello, InspectSandbox, Limits, Request, reply, request};
use sandbox_runner_tests::host;
use sandbox_runner_tests::keeper::Keeper;
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::Rootfs;
use sandbox_runner_tests::runner::{is_slow, scaled};

use crate::{Bench, MIB, SLOTS, create, kill, list};

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

/// Every fifth is not ended but killed: its process 1, or its spawner.
#[test]
fn two_hundred_sandboxes_of_which_a_fifth_is_killed_leave_nothing_in_the_launcher() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let round = |number: usize| {
        let id = format!("round-{number}");
        let created = create(&connection, plain_sandbox(&id));
        match number % 10 {
            3 => host::kill_now(created.pid),
            8 => host::kill_now(spawner_of(created.pid)),
            _ => return kill(&connection, &id),
        }
        let deadline = Instant::now() + scaled(Duration::from_secs(20));
        while list(&connection).iter().any(|entry| entry.sandbox_id == id) {
            assert!(Instant::now() < deadline, "{id} was killed and is still listed");
            std::thread::sleep(Duration::from_millis(5));
        }
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
    (0..10).for_each(round);
    std::thread::sleep(Duration::from_secs(1));
    let before = footprint(bench.launcher.pid());
    let count = if is_slow() { 40 } else { 200 };

    (10..10 + count).for_each(round);

    let deadline = Instant::now() + scaled(Duration::from_secs(10));
    let mut after = footprint(bench.launcher.pid());
    while after != before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        after = footprint(bench.launcher.pid());
    }
    let count = |footprint: &[String], entry: &String| footprint.iter().filter(|other| *other == entry).count();
    let differs = |entry: &&String| count(&before, entry) != count(&after, entry);
    let new: Vec<_> = after.iter().filter(differs).collect();
    let old: Vec<_> = before.iter().filter(differs).collect();
    assert!(new.is_empty() && old.is_empty(), "descriptors, mounts and children: {old:#?} before, {new:#?} after");
}

fn spawner_of(process_1: u32) -> u32 {
    let is_spawner = |pid: &u32| host::inner_pid(*pid) == Some(host::SPAWNER);
    host::children_of(process_1).into_iter().find(is_spawner).expect("a spawner")
}

/// Descriptors and mounts of the launcher and of the process that works for it in the background, and their children. Numbers
/// are left out: what is made again has others.
fn footprint(launcher: u32) -> Vec<String> {
    let children = host::children_of(launcher);
    let mut found = vec![format!("{} children", children.len())];
    for pid in [launcher].into_iter().chain(children.into_iter().filter(|pid| host::is_outside(*pid))) {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
        found.extend(targets.map(|target| format!("descriptor {}", without_numbers(&target.display().to_string()))));
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        // After the ids of the mount, of its parent and of its device.
        let named = mounts.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        found.extend(named.map(|line| format!("mount {}", without_numbers(line))));
    }
    found.sort();
    found
}

fn without_numbers(text: &str) -> String {
    let named = |part: &str| {
        if part.starts_with("s-") { "sandbox".to_owned() } else { part.replace(|c: char| c.is_ascii_digit(), "") }
    };
    text.split('/').map(named).collect::<Vec<_>>().join("/")
}

/// Starts a launcher from a shell that first does `preparation`, where `$1` is a file of the caller.
fn started_after(preparation: &str, setup: Setup, marker: &Path) -> Launcher {
    let inner = setup.command();
    let mut command = Command::new("bash");
    command.arg("-c").arg(format!("{preparation}\nshift\nexec \"$@\"")).arg("bash").arg(marker);
    command.arg(inner.get_program()).args(inner.get_args()).env_clear().env("SECRET_OF_THE_CALLER", "x");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    setup.start_with(command).expect("the launcher starts")
}

/// Makes a sandbox and looks at all of its processes.
fn assert_sandbox_inherits_nothing(launcher: &Launcher, marker: &Path) {
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
        assert_eq!(held(pid, marker), 0, "process {pid} holds a file of the caller");
    }
    assert_eq!(held(launcher.pid(), marker), 0, "the launcher holds a file of the caller");
    let [_, run] = launcher.setup().directories();
    let mut keeper = Keeper::connect(&run.join("sandboxes").join(&created.socket_name)).expect("process 1 answers");
    let works = keeper.exec(&["/usr/bin/sh", "-c", "echo works; echo error >&2; cat"]);
    assert_eq!((works.code(), works.text().as_str()), (Some(0), "works\nerror\n"), "{works:?}");
    drop(keeper);
    kill(&connection, "heir");
}

#[test]
fn launcher_inherits_nothing_from_whoever_starts_it() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let marker = rootfs.path().join("etc/passwd");
    let opened: String = (3..=20).chain([1000]).map(|fd| format!("exec {fd}<\"$1\"\n")).collect();
    let preparation = format!("ulimit -n 2048\ntrap '' INT TERM HUP\numask 0\n{opened}");

    let launcher = started_after(&preparation, Setup::new(2, rootfs.path()), &marker);

    assert_sandbox_inherits_nothing(&launcher, &marker);
}

/// What it opens itself then gets the numbers of its input and outputs.
#[test]
fn launcher_without_standard_descriptors_serves_all_the_same() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let marker = rootfs.path().join("etc/passwd");
    for closed in ["exec 1>&- 2>&-", "exec 0<&- 1>&- 2>&-", "exec 0<&- 2>&-"] {
        let launcher = started_after(closed, Setup::new(2, rootfs.path()), &marker);

        assert_sandbox_inherits_nothing(&launcher, &marker);
    }
}

/// Only a launcher whose policy names no socket is one that a runner has started for itself.
#[test]
fn installed_launcher_does_not_take_a_socket_at_descriptor_0_for_its_runner() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair");
    let mut command = setup.command();
    command.stdin(Stdio::from(theirs));

    let launcher = setup.start_with(command).expect("the launcher serves at the socket that its policy names");

    let hello = Request { request_id: 7, body: Some(request::Body::Hello(Hello { major: 1 })) };
    send(ours.as_raw_fd(), &hello.encode_to_vec(), MsgFlags::MSG_NOSIGNAL).expect("the socket takes it");
    let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
    create(&connection, plain_sandbox("beside"));
    kill(&connection, "beside");
    let answer = recv(ours.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT);
    assert_eq!(answer, Err(nix::Error::EAGAIN), "whoever started the launcher was answered");
}

fn held(pid: u32, file: &Path) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == file)).count()
}
