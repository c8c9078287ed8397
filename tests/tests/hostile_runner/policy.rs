//! What only root may say or change: the policy file, the program that replaces the launcher, the socket and the spools.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::Command;
use std::time::Duration;

use proto::launch::v1::{Reexecute, request};
use sandbox_runner_tests::launcher::{Connection, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::Rootfs;
use sandbox_runner_tests::runner::{finish, wait};

use crate::{Bench, assert_refusal, create, kill};

#[test]
fn replacing_its_program_needs_a_file_that_only_root_can_change() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let directory = sandbox_runner_tests::rootfs::shared_directory("program");
    let program = directory.path().join("sandbox-init");
    fs::copy(sandbox_runner_tests::runner::sandbox_init(), &program).expect("a copy of the program");
    for (owner, mode) in [(65_534, 0o755), (0, 0o775), (0, 0o777)] {
        chown(&program, Some(owner), None).expect("chown");
        fs::set_permissions(&program, Permissions::from_mode(mode)).expect("chmod");
        let mut setup = Setup::new(1, rootfs.path());
        setup.policy = format!("program = \"{}\"\n{}", program.display(), setup.policy);
        // Refused when it is asked for, not before: the file may be repaired meanwhile.
        let mut launcher = setup.start().expect("the launcher starts");
        let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
        let failure = connection.refusal(request::Body::Reexecute(Reexecute {})).expect("refused");
        assert_refusal(&failure, &["NOT_ALLOWED"], "program");
        assert!(launcher.is_alive());
    }
}

#[test]
fn replacing_its_program_without_one_in_the_policy_is_refused() {
    needs_root!();
    let mut bench = Bench::start();
    let failure = bench.connect().refusal(request::Body::Reexecute(Reexecute {})).expect("refused");
    assert_refusal(&failure, &["NOT_ALLOWED", "NOT_SUPPORTED"], "program");
    bench.assert_serves();
}

/// Starts a launcher that must refuse its policy, and returns what it says.
fn policy_refusal(change: impl FnOnce(&mut Setup)) -> String {
    let rootfs = Rootfs::with_prober();
    let mut setup = Setup::new(1, rootfs.path());
    change(&mut setup);
    let finished = finish(setup.command(), Duration::from_secs(10)).expect("a launcher that refuses its policy ends");
    assert!(!finished.status.success(), "the policy was accepted: {}", setup.policy);
    finished.errors()
}

#[test]
fn policy_that_others_can_change_is_refused() {
    needs_root!();
    for mode in [0o620, 0o602, 0o666, 0o664] {
        let message = policy_refusal(|setup| setup.mode = mode);
        assert!(message.contains("launcher.toml"), "mode {mode:o}: {message}");
    }
    let message = policy_refusal(|setup| setup.owner = 65_534);
    assert!(message.contains("65534"), "{message}");
}

#[test]
fn policy_with_a_mistake_is_refused_by_key() {
    needs_root!();
    let cases: [(&str, &str, &str); 14] = [
        ("version = 1", "version = 2", "version"),
        ("version = 1", "version = 1\nrunner_user = 5", "runner_user"),
        ("state_directory = \"/", "state_directory = \"", "state_directory"),
        ("pids = 64", "pids = 640", "default"),
        ("seccomp = \"standard\"", "seccomp = \"none\"", "seccomp"),
        ("without = []", "without = [\"everything\"]", "everything"),
        ("[rootfs.allowed]\npath = \"/", "[rootfs.allowed]\npath = \"", "rootfs.allowed.path"),
        ("per_sandbox = 65536", "per_sandbox = 0", "ids.per_sandbox"),
        ("base = 2080374784", "base = 4294950000", "base + per_sandbox * slots"),
        ("base = 2080374784", "base = 1000", "ids.base is 1000"),
        ("slots = 1", "slots = 0", "ids.slots"),
        ("[danger]", "[volumes.shared]\npath = \"data\"\n\n[danger]", "volumes.shared"),
        ("[danger]", "[volumes.shared]\npath = \"/data\"\ntarget = \"data\"\n\n[danger]", "volumes.shared"),
        // What would be cut may be a table that nobody misses.
        ("version = 1", &format!("version = 1\n#{}", "x".repeat(1 << 20)), "bytes"),
    ];
    for (from, to, named) in cases {
        let message = policy_refusal(|setup| {
            assert!(setup.policy.contains(from), "the case {from} no longer applies");
            setup.policy = setup.policy.replacen(from, to, 1);
        });
        assert!(message.contains(named), "{to}: the message does not name {named}: {message}");
    }
}

/// The run directory may be the runner's own. Whatever it does to the names there while the launcher makes its socket, the
/// launcher may not give it a file of the host.
#[test]
fn socket_exchanged_for_a_link_while_it_is_made_gives_nothing_away() {
    use std::sync::atomic::{AtomicBool, Ordering};
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let victim = rootfs.path().join("etc/passwd");
    let before = fs::metadata(&victim).expect("a file of root");
    for _ in 0..25 {
        let setup = Setup::new(1, rootfs.path());
        let socket = setup.socket();
        let stop = AtomicBool::new(false);
        let exchanged = socket.with_file_name("exchanged");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Only what appears under the name is exchanged, once.
                    if fs::rename(&socket, &exchanged).is_ok() {
                        let _ = std::os::unix::fs::symlink(&victim, &socket);
                        break;
                    }
                }
            });
            let mut launcher = setup.command().spawn().expect("the launcher starts");
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            while !exchanged.exists() && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(20));
            stop.store(true, Ordering::Relaxed);
            let pid = nix::unistd::Pid::from_raw(launcher.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            wait(&mut launcher, Duration::from_secs(15)).expect("the launcher ends when it is told to");
        });
        let after = fs::metadata(&victim).expect("a file of root");
        let (uid, mode) = (std::os::unix::fs::MetadataExt::uid(&after), after.permissions().mode());
        assert_eq!(
            (uid, mode),
            (std::os::unix::fs::MetadataExt::uid(&before), before.permissions().mode()),
            "the launcher gave a file of the host away"
        );
    }
}

/// The state directory is the launcher's. A runner that could write below it could fill the disk with trees that the tree
/// workers, which are nobody there, cannot remove.
#[test]
fn spool_of_a_sandbox_is_no_place_for_the_runner_to_write() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let created = create(&connection, plain_sandbox("spool"));
    let [state, _] = bench.launcher.setup().directories();
    let name = created.socket_name.trim_end_matches(".sock");
    let spool = state.join("sandboxes").join(name).join("output");
    assert!(spool.is_dir(), "the spool is elsewhere: {}", spool.display());
    let as_runner = |script: &str| {
        let mut command = Command::new("sh");
        let runner = sandbox_runner_tests::launcher::RUNNER_UID;
        std::os::unix::process::CommandExt::uid(&mut command, runner);
        std::os::unix::process::CommandExt::gid(&mut command, runner);
        command.args(["-c", script, "sh"]).arg(&spool).current_dir("/");
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped());
        finish(command, Duration::from_secs(10)).expect("sh ends")
    };

    let read = as_runner("ls \"$1\"");
    let made = as_runner("mkdir \"$1/planted\"");

    kill(&connection, "spool");
    assert!(read.status.success(), "the runner cannot read the spool: {}", read.errors());
    assert!(!made.status.success(), "the runner made a directory in {}", spool.display());
}
