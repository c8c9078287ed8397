//! What a sandbox is to the host. From inside, the maps of its own namespaces are all that can be read.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_runner_tests::host::{self, FIRST_SANDBOX_ID, SandboxPids};
use sandbox_runner_tests::runner::{Caller, Exec, NOBODY, wait};

/// Host ids of one sandbox.
const IDS: u32 = 65_536;

/// A command that ends with this, also when what was seen of it was wrong.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = wait(&mut self.0, Duration::from_secs(30));
    }
}

/// Does something with the processes of a sandbox while it lives.
fn while_one_lives(caller: Caller, profile: &str, look: impl FnOnce(SandboxPids)) {
    let exec = Exec::new(caller).option("--profile", profile);
    let token = format!("sbr-outside-{caller:?}-{profile}-{}", std::process::id());
    let mut command = exec.command(["sh", "-c", "sleep 600; :", &token]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Running(command.spawn().expect("the command starts"));
    look(host::wait_for_sandbox(&token, Duration::from_secs(30)));
}

/// Real, effective, saved and filesystem ids, which must be one.
fn only_id(pid: u32, key: &str) -> u32 {
    let text = host::status_field(pid, key).expect("a process that lives");
    let mut ids: Vec<u32> = text.split_whitespace().map(|id| id.parse().expect("a number")).collect();
    assert_eq!(ids.len(), 4, "{key} {text}");
    ids.dedup();
    assert_eq!(ids.len(), 1, "process {pid} has several ids: {key} {text}");
    ids[0]
}

#[test]
fn processes_of_a_sandbox_have_ids_of_their_own_on_the_host_and_never_those_of_its_root() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        for profile in ["root", "user"] {
            while_one_lives(caller, profile, |pids| {
                let spawner = pids.spawner.expect("a spawner");
                for key in ["Uid:", "Gid:"] {
                    let [workload, process_1, spawner] =
                        [pids.workload, pids.process_1, spawner].map(|pid| only_id(pid, key));
                    let all = format!("{profile} {key} {workload} {process_1} {spawner}");
                    match caller {
                        Caller::Root => {
                            let slot = |id: u32| id.checked_sub(FIRST_SANDBOX_ID).map(|offset| offset / IDS);
                            assert!(slot(workload).is_some(), "{all}: one of the host's own");
                            assert!(
                                [process_1, spawner].iter().all(|id| slot(*id) == slot(workload)),
                                "{all}: two slots"
                            );
                            assert!(workload != process_1 && workload != spawner, "{all}: the keeper is the workload");
                        }
                        // There is one id for all of it, and it is not more than whoever asked.
                        Caller::Nobody => assert!([workload, process_1, spawner] == [NOBODY; 3], "{all}"),
                    }
                }
                let groups = host::status_field(pids.workload, "Groups:").expect("a process that lives");
                assert!(caller == Caller::Nobody || groups.is_empty(), "{profile}: groups of the host: {groups}");
            });
        }
    }
}

#[test]
fn every_namespace_of_a_sandbox_is_another_than_that_of_the_host() {
    let link = |pid: u32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a process that lives");
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        while_one_lives(caller, "root", |pids| {
            let spawner = pids.spawner.expect("a spawner");
            let shown = |kind| (link(std::process::id(), kind), link(pids.process_1, kind), link(pids.workload, kind));
            for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
                let (ours, process_1, workload) = shown(kind);
                assert!(process_1 != ours && workload != ours, "{caller:?}: namespace {kind} of the host");
                // The workload is in a further user namespace, in which it can do nothing to the others.
                assert_eq!(workload == process_1, kind != "user", "{caller:?}: {kind}");
                assert_eq!(link(spawner, kind), process_1, "{caller:?}: {kind} of the spawner");
            }
            // Its root is the group of the call, so process 1, which makes those groups, has none.
            let (ours, _, workload) = shown("cgroup");
            assert_ne!(workload, ours, "{caller:?}: cgroup namespace of the host");
        });
    }
}
