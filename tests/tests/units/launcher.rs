//! The launcher's unit, with sandboxes made over its socket.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use proto::launch::v1::{CreateSandbox, KillSandbox, Limits, SandboxCreated, reply, request};
use sandbox_runner_tests::host;
use sandbox_runner_tests::launcher::plain_sandbox;

use crate::installed::{
    GROUP, LAUNCHER, Units, connect, create, create_plain, files_of_sandboxes, groups_of_sandboxes, list, main_pid,
    property, replaced, systemctl, until,
};

/// Where the launcher put process 1.
fn group_of(created: &SandboxCreated) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", created.pid)).expect("alive");
    let path = text.trim().strip_prefix("0::/").expect("the unified hierarchy alone");
    Path::new("/sys/fs/cgroup").join(path)
}

fn assert_adopted(created: &SandboxCreated) {
    let connection = connect();
    let listed = list(&connection);
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(listed[0].adopted, "{listed:?}");
    assert_eq!((&listed[0].sandbox_id, listed[0].pid), (&created.sandbox_id, created.pid));
    assert_eq!(host::inner_pid(created.pid), Some(1), "process 1 went with its launcher");
    let group = group_of(created);

    let body = request::Body::KillSandbox(KillSandbox { sandbox_id: created.sandbox_id.clone() });
    let answer = connection.ask(body).expect("an answer");

    assert!(matches!(answer.body, Some(reply::Body::Done(_))), "{answer:?}");
    until("the end of the group", || (!group.exists()).then_some(()));
    assert_eq!(list(&connection), []);
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn restarted_launcher_adopts_what_lives() {
    let _units = Units::with_launcher();
    let created = create_plain("kept");
    let before = main_pid(LAUNCHER);

    systemctl(&["restart", LAUNCHER]);

    assert_ne!(main_pid(LAUNCHER), before);
    assert_adopted(&created);
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn killed_launcher_is_replaced_and_its_successor_adopts_what_lives() {
    let _units = Units::with_launcher();
    let created = create_plain("kept");
    let before = main_pid(LAUNCHER);

    host::kill_now(before);

    replaced(LAUNCHER, before);
    assert_adopted(&created);
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn reloaded_launcher_executes_the_installed_file_in_place_and_keeps_what_lives() {
    let _units = Units::with_launcher();
    let created = create_plain("kept");
    let before = main_pid(LAUNCHER);

    systemctl(&["reload", LAUNCHER]);

    let argv = || fs::read(format!("/proc/{before}/cmdline")).unwrap_or_default();
    until("the new program", || argv().starts_with(b"sandbox-init\0launcher\0--resume\0").then_some(()));
    assert_eq!(main_pid(LAUNCHER), before);
    assert_adopted(&created);
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn stopped_launcher_leaves_nothing() {
    let _units = Units::with_launcher();
    let created = create_plain("ended");
    assert!(group_of(&created).starts_with(GROUP));

    systemctl(&["stop", LAUNCHER]);

    assert_eq!(
        (property(LAUNCHER, "ActiveState"), property(LAUNCHER, "Result")),
        ("inactive".into(), "success".into())
    );
    assert_eq!(host::inner_pid(created.pid), None, "process 1 lives on");
    assert!(!Path::new(GROUP).exists(), "{:?}", groups_of_sandboxes());
    assert_eq!(files_of_sandboxes(), Vec::<PathBuf>::new());
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn stop_after_an_adoption_leaves_nothing_either() {
    let _units = Units::with_launcher();
    let created = create_plain("ended");
    systemctl(&["restart", LAUNCHER]);
    assert_eq!(list(&connect()).len(), 1);

    systemctl(&["stop", LAUNCHER]);

    assert_eq!(host::inner_pid(created.pid), None, "process 1 lives on");
    assert!(!Path::new(GROUP).exists(), "{:?}", groups_of_sandboxes());
    assert_eq!(files_of_sandboxes(), Vec::<PathBuf>::new());
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn limits_stand_in_the_unified_tree_and_stay_the_launchers_own() {
    let _units = Units::with_launcher();
    let limits = Limits { memory_bytes: 64 << 20, cpu_millis: 500, pids: 32, disk_bytes: 32 << 20 };

    let created = create(&connect(), CreateSandbox { limits: Some(limits), ..plain_sandbox("limited") });

    let init = group_of(&created);
    let work = init.parent().expect("below the sandbox").join("work");
    let text = |path: PathBuf| fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let read = |name: &str| text(work.join(name)).trim().to_owned();
    assert_eq!(init.file_name().and_then(|name| name.to_str()), Some("init"));
    assert_eq!(read("memory.max"), (64 << 20).to_string());
    assert_eq!(read("memory.oom.group"), "0");
    assert_eq!(read("pids.max"), "32");
    assert_eq!(read("cpu.max"), "50000 100000");
    assert_eq!(read("cgroup.controllers"), "cpu memory pids");
    // Process 1 makes slots and cannot move its own bounds.
    let owner = |path: &Path| fs::metadata(path).expect("there").uid();
    assert_eq!(owner(&work), created.id_base + created.id_count - 1);
    for name in ["memory.max", "pids.max", "cpu.max", "cgroup.subtree_control", "cgroup.max.descendants"] {
        assert_eq!(owner(&work.join(name)), 0, "{name}");
    }
    for name in ["memory.max", "pids.max"] {
        assert_ne!(text(init.join(name)).trim(), "max", "{name} of process 1");
        assert_eq!(owner(&init.join(name)), 0, "{name} of process 1");
    }
}
