//! Memory of a sandbox that stands still: the kernel is asked for it where it can be, and what came of it is told.
//!
//! Controllers of cgroup version 1 have nothing like it, so there only the telling is seen. The guest has version 2.
#![forbid(unsafe_code)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use proto::launch::v1::{
    CreateSandbox, FreezeSandbox, Hello, HostReport, InspectSandbox, Reclaim, SandboxInspection, Volume, reply, request,
};
use sandbox_runner_tests::keeper::Keeper;
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::{Rootfs, shared_directory};
use sandbox_runner_tests::runner::scaled;

const MIB: u64 = 1 << 20;

/// A launcher with one sandbox that has a directory of the host's disk.
struct Bench {
    keeper: Keeper,
    connection: Connection,
    _launcher: Launcher,
    _rootfs: Rootfs,
    _volume: tempfile::TempDir,
}

impl Bench {
    fn start() -> Self {
        let (rootfs, volume) = (Rootfs::with_prober(), shared_directory("volume"));
        // The workload has ids of its own, and none of the host's.
        fs::set_permissions(volume.path(), Permissions::from_mode(0o777)).expect("chmod of an own directory");
        let mut setup = Setup::new(2, rootfs.path());
        let section = format!("[volumes.data]\npath = \"{}\"\nwritable = true\n\n[profiles", volume.path().display());
        setup.policy = setup.policy.replacen("[profiles", &section, 1);
        let launcher = setup.start().expect("the launcher starts");
        let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
        let volumes = vec![Volume { name: "data".to_owned(), read_only: false }];
        let sandbox = CreateSandbox { volumes, ..plain_sandbox("rests") };
        let created = match connection.ask(request::Body::CreateSandbox(sandbox)).expect("an answer").body {
            Some(reply::Body::SandboxCreated(created)) => created,
            other => panic!("not created: {other:?}"),
        };
        let [_, run] = launcher.setup().directories();
        let keeper = Keeper::connect(&run.join("sandboxes").join(created.socket_name)).expect("process 1 answers");
        Self { keeper, connection, _launcher: launcher, _rootfs: rootfs, _volume: volume }
    }

    fn host(&self) -> HostReport {
        match self.connection.ask(request::Body::Hello(Hello { major: 1 })).expect("an answer").body {
            Some(reply::Body::Welcome(welcome)) => welcome.host.expect("a report"),
            other => panic!("no welcome: {other:?}"),
        }
    }

    /// Whether its memory is limited by version 2, whose groups can be asked for it.
    fn can_be_asked(&self) -> bool {
        let host = self.host();
        host.cgroup_mode == "unified" && host.cgroup_controllers.iter().any(|name| name == "memory")
    }

    fn freeze(&self, frozen: bool) {
        let body = request::Body::FreezeSandbox(FreezeSandbox { sandbox_id: "rests".to_owned(), frozen });
        let answer = self.connection.ask(body).expect("an answer");
        assert!(matches!(answer.body, Some(reply::Body::Done(_))), "{answer:?}");
    }

    fn inspection(&self) -> SandboxInspection {
        let body = request::Body::InspectSandbox(InspectSandbox { sandbox_id: "rests".to_owned() });
        match self.connection.ask(body).expect("an answer").body {
            Some(reply::Body::Inspection(inspection)) => inspection,
            other => panic!("no inspection: {other:?}"),
        }
    }

    fn reclaim(&self) -> Reclaim {
        let until = Instant::now() + scaled(Duration::from_secs(60));
        loop {
            if let Some(reclaim) = self.inspection().reclaim {
                return reclaim;
            }
            assert!(Instant::now() < until, "nothing is told of what was asked for");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn what_came_of_asking_is_told_also_where_there_is_nothing_to_ask() {
    needs_root!();
    let bench = Bench::start();
    assert_eq!(bench.inspection().reclaim, None, "nobody has asked");

    bench.freeze(true);
    let reclaim = bench.reclaim();

    if bench.can_be_asked() {
        let normal = [0, Errno::EAGAIN as i32];
        assert!(normal.contains(&reclaim.errno), "Linux 5.19 and later can be asked: {reclaim:?}");
    } else {
        assert_eq!(reclaim, Reclaim { bytes: 0, errno: Errno::EOPNOTSUPP as i32 });
    }
    bench.freeze(false);
}

#[test]
fn memory_that_is_on_a_disk_is_given_back_and_read_again_when_the_sandbox_is_woken() {
    needs_root!();
    let mut bench = Bench::start();
    if !bench.can_be_asked() {
        // No machine promises both versions, so this is no failure where everything is promised.
        #[allow(clippy::print_stderr, reason = "the test runner shows it")]
        {
            eprintln!("SKIPPED: memory is not limited by cgroup version 2 here, and version 1 has no memory.reclaim");
        }
        return;
    }
    let written =
        bench.keeper.bash("cd /mnt/data && head -c 64M /dev/urandom > cache && sync cache && sha256sum < cache");
    assert_eq!(written.code(), Some(0), "{written:?}");
    let before = bench.inspection().memory_bytes;
    assert!(before >= 64 * MIB, "what was written is counted: {before}");

    bench.freeze(true);
    let reclaim = bench.reclaim();
    let after = bench.inspection().memory_bytes;

    assert!(reclaim.bytes >= 48 * MIB && after <= before - 48 * MIB, "{before} before, {after} after: {reclaim:?}");
    bench.freeze(false);
    let read = bench.keeper.bash("sha256sum < cache");
    assert_eq!((read.code(), read.text()), (Some(0), written.text()), "{read:?}");
}

/// A runner that was taken over cannot pile up orders for the background process, which makes and removes sandboxes.
#[test]
fn freezing_again_and_again_holds_up_nobody() {
    needs_root!();
    let bench = Bench::start();
    for _ in 0..2000 {
        bench.freeze(true);
        bench.freeze(false);
    }
    let other = plain_sandbox("other");
    let answer = bench.connection.ask(request::Body::CreateSandbox(other)).expect("an answer");
    assert!(matches!(answer.body, Some(reply::Body::SandboxCreated(_))), "{answer:?}");
}
