//! `sandbox-runner launcher`: the installed command becomes the launcher, and replaces itself by a newer installed command.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::launch::v1::{ListSandboxes, reply, request};
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::{Rootfs, shared_directory};
use sandbox_runner_tests::runner::{binary, finish, scaled};
use tempfile::TempDir;

fn sandboxes(socket: &Path) -> Option<Vec<String>> {
    let answer = Connection::greeted(socket).ok()?.ask(request::Body::ListSandboxes(ListSandboxes::default())).ok()?;
    match answer.body {
        Some(reply::Body::SandboxList(list)) => {
            Some(list.sandboxes.into_iter().map(|entry| entry.sandbox_id).collect())
        }
        _ => None,
    }
}

#[test]
fn the_command_becomes_a_launcher_that_serves_its_socket() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(1, rootfs.path());
    let socket = setup.socket();
    let start = setup.installed_command(binary());

    let launcher = setup.start_with(start).expect("the launcher starts");

    assert_eq!(sandboxes(&socket), Some(Vec::new()));
    let running = fs::read_link(format!("/proc/{}/exe", launcher.pid())).expect("alive");
    assert!(running.to_string_lossy().starts_with("/memfd:sandbox-init"), "{}", running.display());
    let environment = fs::read(format!("/proc/{}/environ", launcher.pid())).expect("readable by root");
    assert_eq!(String::from_utf8_lossy(&environment), "");
}

/// A launcher whose policy names an installed command, and that command's place.
fn start_installed(slots: u32, rootfs: &Rootfs) -> (Launcher, TempDir) {
    let installed = shared_directory("installed");
    let program = installed.path().join("sandbox-runner");
    fs::copy(binary(), &program).expect("installed");
    let mut setup = Setup::new(slots, rootfs.path());
    setup.policy = format!("program = \"{}\"\n{}", program.display(), setup.policy);
    let start = setup.installed_command(&program);
    (setup.start_with(start).expect("the launcher starts"), installed)
}

fn pid_of(process: u32) -> Pid {
    Pid::from_raw(i32::try_from(process).expect("a pid"))
}

/// What the launcher serves once its new program has taken over from the one that held `connection`.
fn sandboxes_of_the_next_program(launcher: &mut Launcher, connection: &Connection) -> Vec<String> {
    // The connection from before ends with the program that held it.
    while connection.receive().is_ok_and(|packet| !packet.is_empty()) {}
    let deadline = Instant::now() + scaled(Duration::from_secs(20));
    loop {
        match sandboxes(&launcher.setup().socket()) {
            Some(found) => return found,
            None => assert!(launcher.is_alive() && Instant::now() < deadline, "the new program does not serve"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_launcher_replaced_by_the_installed_command_keeps_pid_and_sandboxes() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let (mut launcher, _installed) = start_installed(1, &rootfs);
    let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
    connection.create(plain_sandbox("kept")).expect("made");

    kill(pid_of(launcher.pid()), Signal::SIGHUP).expect("signalled");

    assert_eq!(sandboxes_of_the_next_program(&mut launcher, &connection), ["kept"]);
    let argv = fs::read(format!("/proc/{}/cmdline", launcher.pid())).expect("alive");
    assert!(argv.starts_with(b"sandbox-init\0launcher\0--resume\0"), "{}", String::from_utf8_lossy(&argv));
}

/// It has ended, and nobody has waited for it.
fn is_zombie(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

#[test]
fn a_sandbox_that_ends_while_the_launcher_is_replaced_is_reaped_by_the_next_program_and_its_slot_is_free() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let (mut launcher, _installed) = start_installed(2, &rootfs);
    let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
    connection.create(plain_sandbox("kept")).expect("made");
    let ends = connection.create(plain_sandbox("ends")).expect("made");
    let launcher_pid = pid_of(launcher.pid());

    // Both wait for the launcher, and the signal that replaces it comes first, because its number is lower.
    kill(launcher_pid, Signal::SIGSTOP).expect("stopped");
    kill(launcher_pid, Signal::SIGHUP).expect("signalled");
    kill(pid_of(ends.pid), Signal::SIGKILL).expect("killed");
    let deadline = Instant::now() + scaled(Duration::from_secs(20));
    while !is_zombie(ends.pid) {
        assert!(Instant::now() < deadline, "process 1 has not ended");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(launcher_pid, Signal::SIGCONT).expect("continued");

    let mut found = sandboxes_of_the_next_program(&mut launcher, &connection);
    while found != ["kept"] {
        assert!(Instant::now() < deadline, "{found:?}");
        found = sandboxes(&launcher.setup().socket()).unwrap_or_default();
    }
    assert!(!is_zombie(ends.pid), "nobody has waited for it");
    let next = Connection::greeted(&launcher.setup().socket()).expect("served");
    assert_ne!(next.create(plain_sandbox("next")).expect("made").pid, ends.pid);
}

#[test]
fn a_policy_that_does_not_hold_ends_with_78_so_that_nobody_tries_again() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let mut setup = Setup::new(1, rootfs.path());
    setup.policy = format!("colour = \"red\"\n{}", setup.policy);

    let finished = finish(setup.installed_command(binary()), Duration::from_secs(10)).expect("ends");

    assert_eq!(finished.status.code(), Some(78), "{}", finished.errors());
    assert!(finished.errors().contains("colour"), "{}", finished.errors());
}

#[test]
fn without_a_policy_the_usage_is_shown_and_the_code_is_2() {
    let mut command = Command::new(binary());
    command.arg("launcher").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());

    let finished = finish(command, Duration::from_secs(10)).expect("ends");

    assert_eq!(finished.status.code(), Some(2));
    assert!(finished.errors().contains("--policy <FILE>"), "{}", finished.errors());
}
