//! Privileged: CAP_SETUID, CAP_SETGID, CAP_SETPCAP and CAP_KILL over the container around it.
//!
//! From a fresh `execve` to a closed sandbox where the kernel allows no namespace: process 1, the spawner and the workload are
//! ordinary processes of the container with users of their own. What a mount namespace, a network namespace and cgroups do
//! elsewhere is done, as far as it can be, by landlock, by the filters and by resource limits; the receipt says which is
//! missing. The order, and why:
//!
//! 1. limits, and adoption of orphans: nothing of the workload may escape to the container's own process 1;
//! 2. the spawner, which waits to be told;
//! 3. the boot packet, because ids and directories come with it;
//! 4. the spawner opens every directory it grants while it is root, lowers the limits, becomes the keeper and enters the
//!    domain; it alone keeps the right to change ids;
//! 5. process 1 becomes the keeper beside it, is no longer dumpable, and gives up everything but CAP_KILL;
//! 6. the first spare child, hardened: a sandbox whose workload cannot be confined is not ready.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};
use proto::launch::v1::Layer;

use super::identity::{NO_ROOT, NO_SETUID_FIXUP};
use super::{StageError, confinement, environment, is_without, layer, limit, packet, scopes, settle, spawn_step, step};
use crate::boot::{Boot, Nested, Role};
use crate::init::Context;
use crate::init::slot::Slots;
use crate::init::spawn::{self, Confinement, Domain};
use crate::sys::capability;
use crate::sys::process::{CloneArguments, Cloned, clone3, exit_now, set_securebits};

/// What the workload may change, below the sandbox's own directory.
pub const WRITABLE: [&str; 3] = ["workspace", "home", "tmp"];

const CAP_KILL: u64 = 1 << 5;
const CAP_SETGID: u64 = 1 << 6;
const CAP_SETUID: u64 = 1 << 7;
const CAP_SETPCAP: u64 = 1 << 8;

/// The three users of a sandbox without namespaces. Nobody else in the container has these ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours {
    /// Runs calls. Nothing else is ever this user.
    pub workload: u32,
    /// Is never anybody's id for long: whoever ends the others hides behind it.
    pub nobody: u32,
    /// Process 1 and the spawner.
    pub keeper: u32,
}

impl Neighbours {
    /// Ids of one sandbox.
    pub const COUNT: u32 = 3;

    /// The users of the range that begins at `base`.
    #[must_use]
    pub fn at(base: u32) -> Self {
        Self { workload: base, nobody: base + 1, keeper: base + 2 }
    }

    /// Makes this process the workload, for good.
    ///
    /// # Errors
    /// The step that the kernel refused.
    pub fn become_workload(&self, drop_capabilities: bool) -> nix::Result<()> {
        if drop_capabilities {
            capability::limit_bounding(0)?;
        }
        set_securebits(NO_ROOT)?;
        become_user(self.workload)?;
        // Without namespaces these would be capabilities over the container, so no switch leaves them.
        capability::set(0)?;
        prctl::set_no_new_privs()?;
        // Attempted, not assumed.
        if setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_ok() { Err(Errno::EPERM) } else { Ok(()) }
    }

    /// Makes this process the keeper: process 1, or the spawner, which needs all four capabilities.
    ///
    /// # Errors
    /// [`StageError`] names the step.
    pub fn become_keeper(&self) -> Result<(), StageError> {
        prctl::set_keepcaps(true).map_err(step("keep capabilities"))?;
        set_securebits(NO_SETUID_FIXUP).map_err(step("set securebits"))?;
        become_user(self.keeper).map_err(step("become the user of process 1"))?;
        capability::set(CAP_KILL | CAP_SETUID | CAP_SETGID | CAP_SETPCAP)
            .map_err(step("drop capabilities of process 1"))?;
        prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;
        prctl::set_dumpable(false).map_err(step("protect the memory of process 1"))
    }

    /// Kills every process of the workload, and waits for the one that does it.
    pub fn end_workload(&self) {
        self.end(self.workload);
    }

    /// Kills every process of the sandbox: first those that can make new ones.
    pub fn end_all(&self) {
        self.end(self.keeper);
        self.end(self.workload);
    }

    /// One `kill(-1)` by somebody with the effective id of the victims. The kernel holds its list of processes meanwhile, and
    /// a victim that is making another one gives up, so none is missed.
    fn end(&self, victims: u32) {
        let arguments = CloneArguments { exit_signal: libc::SIGCHLD, ..CloneArguments::default() };
        match clone3(&arguments) {
            Ok(Cloned::Child) => exit_now(i32::from(self.end_as(victims).is_err())),
            Ok(Cloned::Parent { pidfd, .. }) => {
                use nix::sys::wait::{Id, WaitPidFlag, waitid};
                use std::os::fd::AsFd;
                let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
            }
            // Tried again by whoever counts what is left.
            Err(_) => {}
        }
    }

    fn end_as(&self, victims: u32) -> nix::Result<()> {
        // Real and saved id are nobody's: the victims cannot signal this process.
        let nobody = Uid::from_raw(self.nobody);
        setresuid(nobody, Uid::from_raw(victims), nobody)?;
        // With CAP_KILL the next call would end the whole container.
        capability::set(0)?;
        if capability::effective()? != 0 || Uid::effective().is_root() || Uid::current().is_root() {
            return Err(Errno::EPERM);
        }
        kill(Pid::from_raw(-1), Signal::SIGKILL)
    }

    /// Processes of the sandbox that have not ended, as `/proc` shows them.
    #[must_use]
    pub fn living(&self) -> Vec<i32> {
        let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|text| self.is_living(&text))
            })
            .collect()
    }

    /// Whether `/proc/PID/status` tells of a living process of ours.
    fn is_living(&self, status: &str) -> bool {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
        let ended = field("State:").is_some_and(|state| matches!(state.trim().chars().next(), Some('Z' | 'X')));
        let ours = |id: &str| id.parse::<u32>().is_ok_and(|id| (self.workload..=self.keeper).contains(&id));
        !ended && field("Uid:").is_some_and(|ids| ids.split_whitespace().any(ours))
    }
}

/// All ids of this process become `id`.
fn become_user(id: u32) -> nix::Result<()> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

/// Role `nested`: becomes process 1 of a sandbox without namespaces and serves until it ends.
///
/// # Errors
/// What failed; the launcher has been told.
pub fn main() -> Result<u8, String> {
    super::run(close)
}

fn close(boot_socket: &OwnedFd) -> Result<(Context, Vec<Layer>), StageError> {
    limit::apply()?;
    nix::unistd::chdir("/").map_err(step("leave the launcher's directory"))?;
    prctl::set_child_subreaper(true).map_err(step("adopt orphans"))?;
    let spawner = spawn::park(None).map_err(spawn_step)?;
    let (boot, mut handed) = packet(boot_socket)?;
    let nested = boot
        .nested
        .clone()
        .ok_or_else(|| StageError { step: "find the ids in the boot packet".to_owned(), source: Errno::EBADMSG })?;
    let directory = PathBuf::from(&nested.directory);
    let spawner = spawner
        .begin(&Confinement { root: false, nested: Some(nested.clone()), ..confinement(&boot) })
        .map_err(spawn_step)?;
    Neighbours::at(nested.base).become_keeper()?;
    // It reads what the workload writes, so it must not be worth taking over.
    capability::set(CAP_KILL).map_err(step("drop capabilities of process 1"))?;
    settle(&boot)?;

    let mut slots = Slots::scan();
    slots.prepare().map_err(step("make the first slot"))?;
    let spawner = spawner.prove(None).map_err(spawn_step)?;
    handed.keep_slot_lock();
    let layers = layers(&boot, &nested, spawner.domain);
    let context = Context {
        sandbox_id: boot.sandbox_id.clone(),
        listener: handed.take(Role::Listener)?,
        spawner: Box::new(spawner.client),
        spawner_pidfd: Some(spawner.pidfd),
        slots,
        v1: None,
        spool_directory: handed.take(Role::Spool)?,
        spool_path_inside: directory.join("output"),
        spool_budget_bytes: boot.spool_budget_bytes,
        call_directory: handed.take(Role::Calls)?,
        call_path_inside: directory.join("call"),
        default_environment: own_environment(&boot, &directory),
        working_directory: boot.working_directory,
        shell_path: PathBuf::from("/bin/bash"),
        own_terminals: false,
        orphan_timeout: (boot.orphan_timeout_ms > 0).then(|| Duration::from_millis(boot.orphan_timeout_ms)),
        reaps_orphans: true,
    };
    Ok((context, layers))
}

/// The usual environment, with the directories that stand for those of a root filesystem of its own.
fn own_environment(boot: &Boot, directory: &Path) -> Vec<Vec<u8>> {
    let path = |name: &str| directory.join(name).to_string_lossy().into_owned();
    let mut asked = vec![format!("HOME={}", path("home")).into_bytes(), format!("TMPDIR={}", path("tmp")).into_bytes()];
    let named = |name: &[u8]| boot.environment.iter().any(|entry| entry.starts_with(name));
    asked.retain(|entry| !named(entry.split_inclusive(|byte| *byte == b'=').next().unwrap_or_default()));
    asked.extend(boot.environment.iter().cloned());
    environment(&asked, false)
}

fn layers(boot: &Boot, nested: &Nested, domain: Result<Domain, i32>) -> Vec<Layer> {
    let unless = |switch: &str, text: &'static str| if is_without(boot, switch) { "" } else { text };
    let mut layers = vec![
        layer("separate_principals", "launcher, process 1 and workload are three users", 0),
        layer("cgroup_pids", format!("{} processes, counted for the user", nested.pids), 0),
        layer("cgroup_kill", "kill(-1) as the workload's user", 0),
        layer("capabilities", unless("capabilities", "none"), 0),
        layer("no_new_privileges", "yes", 0),
        layer("seccomp", unless("seccomp", "two filters, no socket but unix, no connection"), 0),
    ];
    match domain {
        Ok(domain) => {
            layers.push(layer("landlock", format!("ABI {}, the only wall around files", domain.abi), 0));
            layers.push(layer("private_devices", "six nodes, by landlock", 0));
            layers.push(scopes(domain));
        }
        Err(errno) => {
            for name in ["landlock", "landlock_scopes", "private_devices"] {
                layers.push(layer(name, "", errno));
            }
        }
    }
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_ours_by_any_of_its_ids_and_only_while_it_lives() {
        let neighbours = Neighbours::at(5000);
        let status = |state: &str, ids: &str| format!("Name:\tx\nState:\t{state}\nUid:\t{ids}\nGid:\t5000\n");
        assert!(neighbours.is_living(&status("R (running)", "5000\t5000\t5000\t5000")));
        assert!(neighbours.is_living(&status("S (sleeping)", "0\t5002\t0\t5002")));
        assert!(!neighbours.is_living(&status("Z (zombie)", "5000\t5000\t5000\t5000")));
        assert!(!neighbours.is_living(&status("R (running)", "5003\t4999\t0\t0")));
        assert!(!neighbours.is_living("State:\tR\n"));
    }

    #[test]
    fn ending_a_user_spares_everybody_else() {
        if !Uid::effective().is_root() {
            println!("SKIPPED: needs root to become other users");
            return;
        }
        // Ids of this test process alone.
        let neighbours = Neighbours::at(2_100_000_000 + std::process::id() * 4);
        let sleeper = |id: u32| {
            use std::os::unix::process::CommandExt;
            std::process::Command::new("sleep").arg("60").uid(id).gid(id).spawn().expect("sleep runs")
        };
        let (mut workload, mut stranger) = (sleeper(neighbours.workload), sleeper(neighbours.keeper + 1));
        assert_eq!(neighbours.living(), [i32::try_from(workload.id()).expect("a pid")]);

        neighbours.end_all();

        use std::os::unix::process::ExitStatusExt;
        assert_eq!(workload.wait().expect("wait").signal(), Some(libc::SIGKILL));
        assert!(neighbours.living().is_empty());
        assert!(stranger.try_wait().expect("wait").is_none(), "a process of somebody else was ended");
        stranger.kill().expect("kill");
        stranger.wait().expect("wait");
    }

    #[test]
    fn directories_of_the_sandbox_stand_in_unless_the_request_names_others() {
        let boot = Boot { environment: vec![b"HOME=/x".to_vec()], ..Boot::default() };
        let environment = own_environment(&boot, Path::new("/p"));
        assert!(environment.contains(&b"HOME=/x".to_vec()) && environment.contains(&b"TMPDIR=/p/tmp".to_vec()));
        assert_eq!(environment.iter().filter(|entry| entry.starts_with(b"HOME=")).count(), 1);
    }
}
