//! A launcher that is killed, stopped or followed by another one, and what becomes of the sandboxes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use prost::Message;
use proto::launch::v1::{Request, request};
use sandbox_runner_tests::host::{self, Snapshot};
use sandbox_runner_tests::launcher::{Connection, Setup, group_of_launcher, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::Rootfs;
use sandbox_runner_tests::runner::wait;

use crate::{Bench, create, kill, list};

/// The next launcher after one that was killed. Ended with the test, however that ends.
struct Successor {
    process: std::process::Child,
}

impl Successor {
    fn start(mut command: Command, socket: &Path) -> (Self, Connection) {
        // The new socket must not be mistaken for the old one.
        let _ = fs::remove_file(socket);
        let successor = Self { process: command.spawn().expect("the second launcher starts") };
        let connection = (0..400).find_map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            Connection::greeted(socket).ok()
        });
        (successor, connection.expect("the second launcher serves"))
    }

    fn stop(mut self, connection: &Connection) {
        let _ = connection.ask(request::Body::Stop(proto::launch::v1::Stop {}));
        wait(&mut self.process, Duration::from_secs(15)).expect("the launcher ends when it is told to");
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            let pid = nix::unistd::Pid::from_raw(self.process.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = wait(&mut self.process, Duration::from_secs(15));
        }
    }
}

#[test]
fn sandbox_outlives_a_killed_launcher_and_is_adopted_by_the_next() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let (again, socket) = (setup.command(), setup.socket());
    let mut first = setup.start().expect("the launcher starts");
    let created = create(&Connection::greeted(&socket).expect("served"), plain_sandbox("orphan"));

    first.kill();

    assert_eq!(host::inner_pid(created.pid), Some(1), "process 1 went with its launcher");
    let (second, connection) = Successor::start(again, &socket);
    let listed = list(&connection);
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(listed[0].adopted && listed[0].sandbox_id == "orphan" && listed[0].pid == created.pid, "{listed:?}");
    kill(&connection, "orphan");
    assert!(host::is_ended_orphan(created.pid), "process 1 still runs");
    second.stop(&connection);
}

#[test]
fn launcher_whose_helper_was_killed_ends_with_its_sandboxes_instead_of_serving_nobody() {
    needs_root!();
    let mut bench = Bench::start();
    let connection = bench.connect();
    let created = create(&connection, plain_sandbox("one"));
    let helper = host::children_of(bench.launcher.pid()).into_iter().find(|pid| host::is_outside(*pid));

    host::kill_now(helper.expect("the background process"));
    // A request that comes while it ends must not keep it from ending.
    let request = Request { request_id: 1, body: Some(request::Body::CreateSandbox(plain_sandbox("late"))) };
    let _ = connection.send(&request.encode_to_vec());

    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while bench.launcher.is_alive() {
        assert!(std::time::Instant::now() < deadline, "the launcher neither serves nor ends");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(host::is_ended_orphan(created.pid), "process 1 still runs");
}

#[test]
fn sandbox_whose_runner_left_before_the_answer_is_not_kept() {
    needs_root!();
    let mut bench = Bench::start();
    let leaving = bench.connect();
    let request = Request { request_id: 1, body: Some(request::Body::CreateSandbox(plain_sandbox("nobodys"))) };
    leaving.send(&request.encode_to_vec()).expect("sent");

    drop(leaving);

    // Requests are served in their order: when the second sandbox is there, the first one was decided about.
    let connection = bench.connect();
    create(&connection, plain_sandbox("second"));
    let left: Vec<_> = list(&connection).into_iter().map(|entry| entry.sandbox_id).collect();
    assert_eq!(left, ["second"]);
    kill(&connection, "second");
    drop(connection);
    bench.assert_serves();
}

#[test]
fn launcher_that_is_to_be_followed_leaves_its_sandboxes_to_the_next() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let (again, socket) = (setup.command(), setup.socket());
    let mut first = setup.start().expect("the launcher starts");
    let created = create(&Connection::greeted(&socket).expect("served"), plain_sandbox("left"));

    let pid = nix::unistd::Pid::from_raw(first.pid().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).expect("signalled");

    let ended = (0..400).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        !first.is_alive()
    });
    assert!(ended, "the launcher does not end");
    assert_eq!(host::inner_pid(created.pid), Some(1), "process 1 went with its launcher");
    let (second, connection) = Successor::start(again, &socket);
    let listed = list(&connection);
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(listed[0].adopted && listed[0].sandbox_id == "left" && listed[0].pid == created.pid, "{listed:?}");
    kill(&connection, "left");
    assert!(host::is_ended_orphan(created.pid), "process 1 still runs");
    second.stop(&connection);
}

#[test]
fn launcher_that_is_stopped_while_it_starts_leaves_nothing() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let directories = setup.directories();
    let [_, run] = &directories;
    let group = group_of_launcher(run);
    for delay in 0..20 {
        let mut process = setup.command().spawn().expect("spawned");
        std::thread::sleep(Duration::from_millis(2 * delay));

        let pid = nix::unistd::Pid::from_raw(process.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signalled");

        wait(&mut process, Duration::from_secs(15)).expect("the launcher ends when it is told to");
        let left = || -> Vec<PathBuf> {
            directories.iter().flat_map(|path| host::files_below(&path.join("sandboxes"))).collect()
        };
        let is_clean = || left().is_empty() && !host::launcher_groups().contains(&group);
        let clean = (0..200).any(|_| {
            let clean = is_clean();
            if !clean {
                std::thread::sleep(Duration::from_millis(50));
            }
            clean
        });
        assert!(clean, "stopped after {} ms: {:?}, {:?}", 2 * delay, left(), host::launcher_groups());
    }
}

#[test]
fn slots_of_sandboxes_that_died_without_a_launcher_are_free_again() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let (again, socket) = (setup.command(), setup.socket());
    let mut first = setup.start().expect("the launcher starts");
    let connection = Connection::greeted(&socket).expect("served");
    let pids = [create(&connection, plain_sandbox("a")).pid, create(&connection, plain_sandbox("b")).pid];
    first.kill();
    pids.into_iter().for_each(host::kill_now);

    let (second, connection) = Successor::start(again, &socket);

    assert_eq!(list(&connection), []);
    create(&connection, plain_sandbox("c"));
    create(&connection, plain_sandbox("d"));
    second.stop(&connection);
}

#[test]
fn stopped_launcher_leaves_nothing_on_the_host() {
    needs_root!();
    let _host = host::exclusive();
    let before = Snapshot::take(&[]);
    let bench = Bench::start();
    let connection = bench.connect();
    create(&connection, plain_sandbox("one"));
    create(&connection, plain_sandbox("two"));
    drop(connection);

    bench.launcher.stop();

    host::assert_restored(&before, &[], Duration::from_secs(20));
}
