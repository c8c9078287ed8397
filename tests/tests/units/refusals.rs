//! What does not heal by itself is not tried again.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use crate::installed::{LAUNCHER, RUNNER, Units, journal, property, systemctl, until};

/// Starts a unit that must fail with this code, and looks whether it is tried again: for longer than `RestartSec`.
fn assert_not_tried_again(unit: &str, code: &str) {
    // A unit that is started when its program is executed fails afterwards, others fail here.
    let _ = Command::new("systemctl").args(["start", unit]).output();

    until("the end of the unit", || (property(unit, "ActiveState") == "failed").then_some(()));
    assert_eq!(property(unit, "ExecMainStatus"), code, "{}", journal());
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!((property(unit, "ActiveState").as_str(), property(unit, "NRestarts").as_str()), ("failed", "0"));
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn isolation_below_the_floor_ends_the_runner_with_77_for_good() {
    let units = Units::stopped();
    units.write_policy(&format!("{}\n[danger]\nwithout = [\"landlock\"]\n", units.policy()));
    systemctl(&["start", LAUNCHER]);

    assert_not_tried_again(RUNNER, "77");

    assert!(journal().contains("missing: landlock"), "{}", journal());
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn wrong_configuration_ends_the_runner_with_78_for_good() {
    let units = Units::with_launcher();
    units.write_config(&format!("colour = \"red\"\n{}", units.config()));

    assert_not_tried_again(RUNNER, "78");

    assert!(journal().contains("colour"), "{}", journal());
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn wrong_policy_ends_the_launcher_with_78_for_good() {
    let units = Units::stopped();
    units.write_policy(&format!("colour = \"red\"\n{}", units.policy()));

    assert_not_tried_again(LAUNCHER, "78");

    assert!(journal().contains("colour"), "{}", journal());
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn runner_that_stands_still_is_replaced_by_the_watchdog() {
    let _units = Units::with_launcher();
    let directory = "/run/systemd/system/sandbox-runner.service.d";
    fs::create_dir_all(directory).expect("a place for a drop-in");
    let drop_in = format!("{directory}/patience.conf");
    fs::write(&drop_in, "[Service]\nWatchdogSec=5\nTimeoutAbortSec=5\n").expect("a drop-in");
    systemctl(&["daemon-reload"]);
    systemctl(&["start", RUNNER]);
    assert_eq!(property(RUNNER, "StatusText"), "taking work");
    let fed = property(RUNNER, "WatchdogTimestampMonotonic");
    until("a fed watchdog", || (property(RUNNER, "WatchdogTimestampMonotonic") != fed).then_some(()));
    let before = crate::installed::main_pid(RUNNER);

    let stop = Command::new("kill").args(["-STOP", &before.to_string()]).status().expect("kill");

    assert!(stop.success());
    crate::installed::replaced(RUNNER, before);
    assert!(journal().contains("Watchdog timeout"), "{}", journal());
    fs::remove_file(&drop_in).expect("removed");
    systemctl(&["daemon-reload"]);
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn key_that_only_the_service_is_given_is_found_by_doctor_while_it_runs() {
    let units = Units::with_launcher();
    let (key, directory) = ("/root/claude.key", "/run/systemd/system/sandbox-runner.service.d");
    fs::write(key, "sk-ant-oat01-key\n").expect("a key");
    fs::set_permissions(key, Permissions::from_mode(0o600)).expect("chmod");
    fs::create_dir_all(directory).expect("a place for a drop-in");
    let drop_in = format!("{directory}/key.conf");
    fs::write(&drop_in, format!("[Service]\nLoadCredential=claude:{key}\n")).expect("a drop-in");
    units.write_config(&format!(
        "{}\n[[claude]]\nenvironment_id = \"env_1\"\nkey_credential = \"claude\"\nbase_url = \"https://127.0.0.1:9\"\n",
        units.config()
    ));
    systemctl(&["daemon-reload"]);
    let doctor = || {
        let finished = Command::new("sandbox-runner").args(["doctor", "--json"]).output().expect("doctor");
        String::from_utf8_lossy(&finished.stdout).into_owned()
    };

    let before = doctor();
    systemctl(&["start", RUNNER]);
    let beside = doctor();

    fs::remove_file(&drop_in).expect("removed");
    systemctl(&["daemon-reload"]);
    assert!(before.contains("beside the service, start it first"), "{before}");
    assert!(beside.contains("/run/credentials/sandbox-runner.service/claude, mode "), "{beside}");
    // Of this queue, only that nobody is there is wrong.
    assert!(beside.contains("127.0.0.1:9") && !beside.contains("cannot read the key file"), "{beside}");
}
