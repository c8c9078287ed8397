//! The built daemon as a worker of a control plane of the tests.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use super::{Environment, Mock};
use crate::daemon::{Daemon, Options};
use crate::host;
use crate::launcher::RUNNER_UID;

/// Installs a daemon that serves the queue of `environment`, and no orchestrator unless `beside` says so. Nothing of it runs yet.
///
/// # Panics
/// When the host does not let us.
pub async fn install(mock: &Mock, environment: &Environment, beside: bool) -> Daemon {
    install_for(&[(mock, environment)], beside).await
}

/// The same for several queues, whose environments have different ids.
///
/// # Panics
/// When the host does not let us.
pub async fn install_for(queues: &[(&Mock, &Environment)], beside: bool) -> Daemon {
    let slots = u32::try_from(queues.len()).expect("few queues") + 3;
    install_with(queues, beside, Options { slots, ..Options::default() }, "max_idle_seconds = 1\n").await
}

/// The same with other options, and with these lines in the section of each queue.
///
/// # Panics
/// When the host does not let us.
pub async fn install_with(queues: &[(&Mock, &Environment)], beside: bool, options: Options, lines: &str) -> Daemon {
    let daemon = Daemon::install(options).await;
    let written = fs::read_to_string(daemon.config()).expect("the configuration");
    let rest = if beside { written.as_str() } else { &written[written.find("[runner]").expect("a section")..] };
    let sections = queues.iter().map(|(mock, environment)| {
        let key = key_file(&daemon, environment);
        fs::write(&key, format!("{}\n", environment.keys[0])).expect("the key");
        chown(&key, Some(RUNNER_UID), Some(RUNNER_UID)).expect("chown of the key");
        fs::set_permissions(&key, Permissions::from_mode(0o600)).expect("chmod of the key");
        format!(
            "[[claude]]\nenvironment_id = {:?}\nkey_file = {key:?}\nbase_url = {:?}\nallow_plain_http = true\n\
             {lines}\n",
            environment.id,
            mock.base_url(),
        )
    });
    let sections: String = sections.collect();
    fs::write(daemon.config(), format!("{sections}{rest}")).expect("the configuration");
    daemon
}

/// The same as [`install`] without an orchestrator, and starts launcher and runner.
///
/// # Panics
/// When one of them does not start.
pub async fn start(mock: &Mock, environment: &Environment) -> Daemon {
    let mut daemon = install(mock, environment, false).await;
    daemon.start_launcher().await;
    daemon.tend_runner();
    daemon
}

/// The file with the key of an environment.
#[must_use]
pub fn key_file(daemon: &Daemon, environment: &Environment) -> PathBuf {
    daemon.config().with_file_name(format!("{}.key", environment.id))
}

/// The working directories of this installation's sandboxes, seen from the host.
#[must_use]
pub fn workspaces(daemon: &Daemon) -> Vec<PathBuf> {
    let group = daemon.group();
    let is_ours = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(&group));
    let first = host::pids().filter(|pid| host::inner_pid(*pid) == Some(1)).filter(is_ours);
    first.map(|pid| PathBuf::from(format!("/proc/{pid}/root/workspace"))).filter(|path| path.is_dir()).collect()
}

/// What a file of this name says in the workspaces, empty when there is none.
#[must_use]
pub fn read(daemon: &Daemon, name: &str) -> String {
    workspaces(daemon).iter().filter_map(|path| fs::read_to_string(path.join(name)).ok()).collect()
}
