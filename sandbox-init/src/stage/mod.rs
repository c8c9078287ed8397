//! Privileged: root in the sandbox's own user namespace, for as long as this module runs.
//!
//! From a fresh `execve` to a closed sandbox. The order, and why:
//!
//! 1. signals, because ignored ones are inherited by every shell below, and resource limits, likewise; the session, because
//!    a terminal that the launcher was started from is none of the sandbox's business;
//! 2. `/proc` and U2, because the kernel gives a child's id map only to a dumpable owner;
//! 3. the spawner, which waits to be told: a process costs more than everything it does later;
//! 4. the mounts that are the same for every sandbox, with `/proc` masked;
//! 5. the boot packet: nothing before it depends on the request, and all of it is done before anybody asks;
//! 6. the other mounts and `pivot_root`, because they need root of U1;
//! 7. identity: process 1 stops being root and is no longer dumpable; the spawner does the same beside it, and enters the
//!    sandbox's one landlock domain; from it every process of the workload comes;
//! 8. the first spare child, hardened: a sandbox whose workload cannot be confined is not ready.

pub mod identity;
pub mod limit;
pub mod mount;
pub mod nested;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::sethostname;
use prost::Message;
use proto::launch::v1::Layer;

use crate::boot::{BOOT_DESCRIPTOR, Boot, Booted, Role};
use crate::init::slot::{Slots, V1Counters};
use crate::init::spawn::{self, Confinement, Domain};
use crate::init::{self, Context};
use crate::policy::capability::{self, mask};
use crate::policy::landlock::WITHOUT_SCOPES;
use crate::sys::process::{inherited_descriptor, reset_signals};
use crate::sys::socket::{receive, send};

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct StageError {
    /// What was tried.
    pub step: String,
    /// The cause.
    #[source]
    pub source: nix::Error,
}

fn step(step: &str) -> impl FnOnce(nix::Error) -> StageError + '_ {
    move |source| StageError { step: step.to_owned(), source }
}

/// Largest boot packet.
const BOOT_BYTES: usize = 128 * 1024;

/// Role `init`: becomes process 1 of a sandbox and serves until it ends.
///
/// Returns its exit code, one of `InitExit` of the schema.
///
/// # Errors
/// What failed; the launcher has been told.
pub fn main() -> Result<u8, String> {
    run(close)
}

/// What makes a closed sandbox out of a fresh process 1 with its boot socket.
type Close = fn(&OwnedFd) -> Result<(Context, Vec<Layer>), StageError>;

fn run(close: Close) -> Result<u8, String> {
    reset_signals();
    // A launcher that was started from a terminal has it as its controlling one, and a copy of it would too.
    nix::unistd::setsid().map_err(|errno| format!("cannot leave the session of the launcher: {errno}"))?;
    let boot = inherited_descriptor(BOOT_DESCRIPTOR).map_err(|errno| format!("no boot socket: {errno}"))?;
    match close(&boot) {
        Ok((context, layers)) => {
            let booted = Booted { failure: String::new(), errno: 0, layers };
            // A launcher that is gone by now is no reason to end: its successor adopts.
            let _ = send(&boot, &booted.encode_to_vec(), &[]);
            drop(boot);
            Ok(init::run(context).code())
        }
        Err(error) => {
            let failure = crate::launcher::background::chain(&error);
            let booted = Booted { failure: failure.clone(), errno: error.source as i32, layers: Vec::new() };
            let _ = send(&boot, &booted.encode_to_vec(), &[]);
            Err(failure)
        }
    }
}

/// Descriptors of the boot packet by role.
#[derive(Debug, Default)]
struct Handed {
    single: std::collections::BTreeMap<i32, OwnedFd>,
    mounts: Vec<OwnedFd>,
}

impl Handed {
    fn new(roles: &[i32], descriptors: Vec<OwnedFd>) -> Self {
        let mut handed = Self::default();
        for (role, descriptor) in roles.iter().zip(descriptors) {
            if *role == Role::Mount as i32 {
                handed.mounts.push(descriptor);
            } else {
                handed.single.insert(*role, descriptor);
            }
        }
        handed
    }

    fn take(&mut self, role: Role) -> Result<OwnedFd, StageError> {
        self.single.remove(&(role as i32)).ok_or_else(|| StageError {
            step: format!("find the descriptor {role:?} in the boot packet"),
            source: nix::Error::EBADF,
        })
    }

    /// Leaves the lock open for as long as this process lives: its ids stay taken.
    fn keep_slot_lock(&mut self) {
        if let Ok(lock) = self.take(Role::SlotLock) {
            std::mem::forget(lock);
        }
    }
}

fn close(boot_socket: &OwnedFd) -> Result<(Context, Vec<Layer>), StageError> {
    limit::apply()?;
    let proc = mount::make_proc()?;
    identity::prepare_network(&proc)?;
    // U2 depends on the number of ids only, which the map of this process tells.
    let ids = own_id_count();
    let nested = identity::nested_user_namespace(&proc, ids)?;
    let spawner = spawn::park(Some(&nested)).map_err(spawn_step)?;
    drop(nested);
    let shared_memory = identity::SharedMemory::open(&proc);
    let prebuilt = mount::prebuild(proc, ids - 1)?;
    let (boot, mut handed) = packet(boot_socket)?;
    shared_memory.bound(boot.temporary_bytes / 4);
    let mounts = std::mem::take(&mut handed.mounts);
    let calls = mount::assemble(mount::Assembly {
        root: handed.take(Role::Root)?,
        prebuilt,
        spool: handed.take(Role::SpoolMount)?,
        extra: boot.mount_targets.iter().cloned().zip(mounts).collect(),
        temporary_bytes: boot.temporary_bytes,
        workload: if boot.root { 0 } else { identity::AGENT },
        working_directory: String::from_utf8_lossy(&boot.working_directory).into_owned(),
        mask: !is_without(&boot, "proc_masked"),
    })?;
    let spawner = spawner.begin(&confinement(&boot)).map_err(spawn_step)?;
    sethostname(&boot.hostname).map_err(step("set the host name"))?;
    identity::become_keeper(boot.id_count)?;
    settle(&boot)?;

    let work = handed.take(Role::WorkCgroup).ok();
    let mut slots = work.map_or_else(Slots::scan, Slots::cgroup);
    // Fail closed: the first spare goes through every step of the hardening before anybody is told that we are ready. It is
    // parked in the slot of the first call, which therefore finds it there.
    slots.prepare().map_err(step("make the first slot"))?;
    let spawner = spawner.prove(slots.prepared()).map_err(spawn_step)?;
    let v1 = match (handed.take(Role::V1Memory), handed.take(Role::V1Pids), handed.take(Role::V1Account)) {
        (Ok(memory), Ok(pids), Ok(cpuacct)) => Some(V1Counters { memory, pids, cpuacct }),
        _ => None,
    };
    handed.keep_slot_lock();
    let layers = layers(&boot, spawner.domain);
    let context = Context {
        sandbox_id: boot.sandbox_id,
        listener: handed.take(Role::Listener)?,
        spawner: Box::new(spawner.client),
        spawner_pidfd: Some(spawner.pidfd),
        slots,
        v1,
        spool_directory: handed.take(Role::Spool)?,
        spool_path_inside: PathBuf::from(mount::OWN_DIRECTORY).join("output"),
        spool_budget_bytes: boot.spool_budget_bytes,
        call_directory: calls,
        call_path_inside: PathBuf::from(mount::OWN_DIRECTORY).join("call"),
        default_environment: environment(&boot.environment, boot.root),
        working_directory: boot.working_directory,
        shell_path: PathBuf::from("/bin/bash"),
        own_terminals: true,
        orphan_timeout: (boot.orphan_timeout_ms > 0).then(|| Duration::from_millis(boot.orphan_timeout_ms)),
        reaps_orphans: true,
    };
    Ok((context, layers))
}

fn packet(boot_socket: &OwnedFd) -> Result<(Boot, Handed), StageError> {
    let packet = receive(boot_socket, BOOT_BYTES)
        .map_err(step("receive the boot packet"))?
        .ok_or_else(|| StageError { step: "wait for the boot packet".to_owned(), source: nix::Error::EPIPE })?;
    let boot = Boot::decode(packet.bytes.as_slice())
        .map_err(|_| StageError { step: "read the boot packet".to_owned(), source: nix::Error::EBADMSG })?;
    let handed = Handed::new(&boot.roles, packet.descriptors);
    Ok((boot, handed))
}

/// Whether the policy has switched this layer off.
fn is_without(boot: &Boot, layer: &str) -> bool {
    boot.without.iter().any(|name| name == layer)
}

/// How the spawner and the workload are confined.
fn confinement(boot: &Boot) -> Confinement {
    Confinement {
        strict: boot.strict,
        root: boot.root,
        id_count: boot.id_count,
        processors: boot.processors.clone(),
        landlock: !is_without(boot, "landlock"),
        seccomp: !is_without(boot, "seccomp"),
        capabilities: !is_without(boot, "capabilities"),
        working_directory: boot.working_directory.clone(),
        nested: None,
    }
}

/// How process 1 ends, and how it hears of the end of others. After the last change of credentials, which clears the first.
fn settle(boot: &Boot) -> Result<(), StageError> {
    if boot.die_with_launcher {
        set_pdeathsig(Signal::SIGKILL).map_err(step("tie process 1 to the launcher"))?;
    }
    SigSet::from(Signal::SIGCHLD).thread_block().map_err(step("block SIGCHLD"))
}

fn spawn_step(error: spawn::SpawnStepError) -> StageError {
    StageError { step: error.step, source: error.source }
}

/// Number of ids mapped in this user namespace, from the one line of `/proc/self/uid_map`.
fn own_id_count() -> u32 {
    std::fs::read_to_string("/proc/self/uid_map")
        .ok()
        .and_then(|map| map.split_whitespace().nth(2)?.parse().ok())
        .unwrap_or(1)
}

/// What every process finds in its environment, unless the request says otherwise.
fn environment(asked: &[Vec<u8>], root: bool) -> Vec<Vec<u8>> {
    let (home, user) = if root { ("/root", "root") } else { ("/home/agent", "agent") };
    let defaults = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        format!("HOME={home}"),
        format!("USER={user}"),
        format!("LOGNAME={user}"),
        "SHELL=/bin/bash".to_owned(),
        "LANG=C.UTF-8".to_owned(),
        "TERM=dumb".to_owned(),
        "TMPDIR=/tmp".to_owned(),
    ];
    let name = |entry: &[u8]| entry.split(|byte| *byte == b'=').next().map(<[u8]>::to_vec);
    let mut result: Vec<Vec<u8>> = defaults
        .into_iter()
        .map(String::into_bytes)
        .filter(|default| !asked.iter().any(|entry| name(entry) == name(default)))
        .collect();
    result.extend(asked.iter().cloned());
    result
}

fn layer(name: &str, enforced: impl Into<String>, errno: i32) -> Layer {
    Layer { name: name.to_owned(), requested: "yes".to_owned(), enforced: enforced.into(), errno }
}

fn layers(boot: &Boot, domain: Result<Domain, i32>) -> Vec<Layer> {
    let unless = |switch: &str, text: &str| if is_without(boot, switch) { String::new() } else { text.to_owned() };
    let single = boot.id_count == 1;
    let kept = mask(capability::Profile::Root).count_ones();
    let capabilities = if boot.root { format!("{kept} inside, none outside") } else { "none".to_owned() };
    let mut layers = vec![
        layer("user_namespace", format!("{} ids", boot.id_count), 0),
        layer(
            "separate_principals",
            if single { "" } else { "process 1 has an id of its own" },
            if single { libc::EPERM } else { 0 },
        ),
        layer("nested_user_namespace", "workload in a nested one, no further one", 0),
        layer("mount_namespace", "own", 0),
        layer("root_switch", "pivot_root", 0),
        layer("pid_namespace", "own", 0),
        layer("network_namespace", "loopback only", 0),
        layer("ipc_namespace", "own", 0),
        layer("uts_namespace", "own", 0),
        layer("cgroup_namespace", "own", 0),
        layer("proc_masked", unless("proc_masked", "masked, hidepid=ptraceable"), 0),
        layer("private_devices", "six nodes, read-only", 0),
        layer("capabilities", unless("capabilities", &capabilities), 0),
        layer("no_new_privileges", "yes", 0),
        layer("seccomp", unless("seccomp", "two filters"), 0),
    ];
    match domain {
        Ok(domain) => {
            layers.push(layer("landlock", format!("ABI {}", domain.abi), 0));
            layers.push(scopes(domain));
        }
        Err(errno) => {
            layers.push(layer("landlock", "", errno));
            layers.push(layer("landlock_scopes", "", errno));
        }
    }
    layers
}

fn scopes(domain: Domain) -> Layer {
    let (enforced, errno) =
        if domain.scopes { ("signal, abstract unix socket", 0) } else { ("", WITHOUT_SCOPES as i32) };
    layer("landlock_scopes", enforced, errno)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(boot: &Boot, domain: Result<Domain, i32>, name: &str) -> (String, i32) {
        let layer = layers(boot, domain).into_iter().find(|layer| layer.name == name).expect("listed");
        (layer.enforced, layer.errno)
    }

    #[test]
    fn the_receipt_counts_the_capabilities_that_root_keeps() {
        let domain = Ok(Domain { abi: 7, scopes: true });
        let of_root = |root| found(&Boot { root, ..Boot::default() }, domain, "capabilities").0;

        assert_eq!(of_root(true), "9 inside, none outside");
        assert_eq!(of_root(false), "none");
    }

    #[test]
    fn the_receipt_has_the_errno_with_which_the_kernel_gives_no_domain() {
        let boot = Boot::default();
        for errno in [libc::ENOSYS, libc::EOPNOTSUPP, libc::EXDEV] {
            assert_eq!(found(&boot, Err(errno), "landlock"), (String::new(), errno));
            assert_eq!(found(&boot, Err(errno), "landlock_scopes"), (String::new(), errno));
        }
        let without_scopes = Ok(Domain { abi: 5, scopes: false });
        assert_eq!(found(&boot, without_scopes, "landlock"), ("ABI 5".to_owned(), 0));
        assert_eq!(found(&boot, without_scopes, "landlock_scopes"), (String::new(), libc::E2BIG));
    }
}
