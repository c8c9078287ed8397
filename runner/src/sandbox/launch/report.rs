//! What the launcher tells us, in our own types.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::sync::watch;

/// What the host allows, as the launcher found out.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct HostReport {
    /// Version of the launcher.
    pub launcher_version: String,
    /// `unified`, `hybrid`, `legacy` or `none`.
    pub cgroup_mode: String,
    /// Controllers that limits can be set with.
    pub cgroup_controllers: Vec<String>,
    /// Highest landlock ABI; 0 when there is none.
    pub landlock_abi: u32,
    /// Ids each sandbox gets.
    pub ids_per_sandbox: u32,
    /// Sandboxes that can exist at once.
    pub slots: u32,
    /// The launcher works inside an unprivileged user namespace.
    pub rootless: bool,
    /// `memfd` or `file`.
    pub image_source: String,
    /// Lowers are idmapped into each range.
    pub idmapped_lowers: bool,
    /// One entry per layer that is missing.
    pub missing: Vec<MissingLayer>,
    /// Layers switched off in the policy.
    pub switched_off: Vec<String>,
    /// How sandboxes are made: `privileged`, `unprivileged`, or `nested` where no namespace can be made.
    pub shape: String,
}

/// A layer the host refuses.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MissingLayer {
    /// Name as in the receipt.
    pub layer: String,
    /// What was tried.
    pub attempt: String,
    /// errno of the attempt.
    pub errno: i32,
    /// The setting that would change it.
    pub remedy: String,
}

/// One layer, as the launcher reports it for one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportedLayer {
    /// Name as in the receipt.
    pub name: String,
    /// What was asked.
    pub requested: String,
    /// What is enforced; `None` when missing.
    pub enforced: Option<String>,
    /// errno where it is missing.
    pub errno: i32,
}

/// A sandbox that exists.
#[derive(Debug)]
pub struct Created {
    /// File name of the control socket below the sandboxes directory.
    pub socket_name: String,
    /// Host pid of process 1.
    pub pid: u32,
    /// First host id of the range.
    pub id_base: u32,
    /// Number of ids.
    pub id_count: u32,
    /// Layer by layer.
    pub layers: Vec<ReportedLayer>,
    /// From request to ready.
    pub took: Duration,
    /// Where the workload sees the output of its calls; empty is the usual place.
    pub output_directory: String,
    /// pidfd of process 1, when the launcher sent one.
    pub pidfd: Option<OwnedFd>,
    /// Becomes `Some` when the sandbox has ended.
    pub ended: watch::Receiver<Option<Ended>>,
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Wait status of process 1; `None` when it cannot be known.
    pub wait_status: Option<i32>,
    /// Kills for memory since creation.
    pub oom_kills: u64,
    /// In words, for logs.
    pub reason: String,
}

/// The kernel's account of a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Inspection {
    /// Bytes in use.
    pub memory_bytes: u64,
    /// Highest use.
    pub memory_peak_bytes: u64,
    /// Kills for memory since creation.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Forks refused since creation.
    pub pids_refused: u64,
    /// Processor time in microseconds.
    pub cpu_usec: u64,
    /// Limits in force.
    pub limits: InspectedLimits,
    /// Host pids of every process.
    pub host_pids: Vec<u32>,
    /// The newest of the kills, in their order, as far as the kernel's log names the victims.
    pub memory_kills: Vec<MemoryKill>,
}

/// A process that the kernel has killed for memory.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MemoryKill {
    /// Which kill of the sandbox it was; the first is 1.
    pub number: u64,
    /// Its name, printable ASCII. The workload has chosen it.
    pub process: String,
    /// Bytes of memory that were its own; 0 when unknown.
    pub used_bytes: u64,
}

/// Limits as the kernel reports them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct InspectedLimits {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

/// One living sandbox in the launcher's list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedSandbox {
    /// Its id.
    pub sandbox_id: String,
    /// File name of its control socket.
    pub socket_name: String,
    /// Host pid of process 1.
    pub pid: u32,
    /// Taken over from an earlier launcher.
    pub adopted: bool,
    /// First host id of the range.
    pub id_base: u32,
    /// Number of ids.
    pub id_count: u32,
    /// Where the workload sees the output of its calls; empty is the usual place.
    pub output_directory: String,
    /// Its processes stand still.
    pub frozen: bool,
}
