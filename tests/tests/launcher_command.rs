//! `sandbox-runner launcher`: the installed command becomes the launcher, and replaces itself by a newer installed command.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::launch::v1::{ListSandboxes, reply, request};
use sandbox_runner_tests::launcher::{Connection, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::{Rootfs, shared_directory};
use sandbox_runner_tests::runner::{binary, finish};

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

#[test]
fn a_launcher_replaced_by_the_installed_command_keeps_pid_and_sandboxes() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let installed = shared_directory("installed");
    let program = installed.path().join("sandbox-runner");
    fs::copy(binary(), &program).expect("installed");
    let mut setup = Setup::new(1, rootfs.path());
    setup.policy = format!("program = \"{}\"\n{}", program.display(), setup.policy);
    let socket = setup.socket();
    let start = setup.installed_command(&program);
    let mut launcher = setup.start_with(start).expect("the launcher starts");
    let connection = Connection::greeted(&socket).expect("served");
    let created = connection.ask(request::Body::CreateSandbox(plain_sandbox("kept"))).expect("an answer").body;
    assert!(matches!(created, Some(reply::Body::SandboxCreated(_))), "{created:?}");

    kill(Pid::from_raw(i32::try_from(launcher.pid()).expect("a pid")), Signal::SIGHUP).expect("signalled");

    // The connection from before ends with the program that held it.
    while connection.receive().is_ok_and(|packet| !packet.is_empty()) {}
    let deadline = Instant::now() + Duration::from_secs(20);
    let found = loop {
        match sandboxes(&socket) {
            Some(found) => break found,
            None => assert!(launcher.is_alive() && Instant::now() < deadline, "the new program does not serve"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(found, ["kept"]);
    let argv = fs::read(format!("/proc/{}/cmdline", launcher.pid())).expect("alive");
    assert!(argv.starts_with(b"sandbox-init\0launcher\0--resume\0"), "{}", String::from_utf8_lossy(&argv));
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
