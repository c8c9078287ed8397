//! What the launcher tells a fresh process 1, once, and what process 1 answers.
//!
//! One packet each way on the boot socket, descriptor 3 of process 1. Both ends are this same program, so the message has
//! no version: the image that starts process 1 is the image of the launcher.

use proto::launch::v1::Layer;

/// What the nth descriptor of the boot packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Role {
    /// Invalid.
    Unspecified = 0,
    /// Detached mount of the root filesystem.
    Root = 1,
    /// Listening control socket.
    Listener = 3,
    /// Directory `S/work` of the cgroup.
    WorkCgroup = 4,
    /// Spool directory, writable.
    Spool = 5,
    /// Detached read-only mount of the spool directory.
    SpoolMount = 6,
    /// A detached mount for the target with the same position among the mounts.
    Mount = 7,
    /// Lock of the id slot; kept open for as long as the sandbox lives.
    SlotLock = 8,
    /// v1 memory directory of the sandbox.
    V1Memory = 9,
    /// v1 pids directory of the sandbox.
    V1Pids = 10,
    /// v1 cpuacct directory of the sandbox.
    V1Account = 11,
    /// Directory for commands and FIFOs of the shell, in a sandbox without namespaces.
    Calls = 12,
}

/// Everything a fresh process 1 has to know.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Boot {
    /// The sandbox.
    #[prost(string, tag = "1")]
    pub sandbox_id: String,
    /// Host name inside.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// `NAME=value` for every process.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub environment: Vec<Vec<u8>>,
    /// Absolute working directory inside.
    #[prost(bytes = "vec", tag = "4")]
    pub working_directory: Vec<u8>,
    /// Milliseconds without a runner after which the sandbox ends; 0 is never.
    #[prost(uint64, tag = "5")]
    pub orphan_timeout_ms: u64,
    /// Whether the workload is uid 0 inside.
    #[prost(bool, tag = "6")]
    pub root: bool,
    /// Whether the strict tables apply.
    #[prost(bool, tag = "7")]
    pub strict: bool,
    /// Ids of the sandbox: 65536, 4096 or 1.
    #[prost(uint32, tag = "8")]
    pub id_count: u32,
    /// Size of `/tmp`, bytes; `/dev/shm` has a quarter of it.
    #[prost(uint64, tag = "9")]
    pub temporary_bytes: u64,
    /// Bytes all spool files together may take.
    #[prost(uint64, tag = "10")]
    pub spool_budget_bytes: u64,
    /// Layers the policy's danger section switches off.
    #[prost(string, repeated, tag = "11")]
    pub without: Vec<String>,
    /// Processors the sandbox is bound to; empty is all.
    #[prost(uint32, repeated, tag = "12")]
    pub processors: Vec<u32>,
    /// Process 1 dies with the launcher.
    #[prost(bool, tag = "13")]
    pub die_with_launcher: bool,
    /// Absolute targets of the descriptors with [`Role::Mount`], in their order.
    #[prost(string, repeated, tag = "14")]
    pub mount_targets: Vec<String>,
    /// Role of each descriptor.
    #[prost(enumeration = "Role", repeated, tag = "15")]
    pub roles: Vec<i32>,
    /// Memory limit, for the text of an out-of-memory outcome.
    #[prost(uint64, tag = "16")]
    pub memory_bytes: u64,
    /// The root filesystem is our own skeleton: missing directories may be made and given to the workload.
    #[prost(bool, tag = "17")]
    pub own_skeleton: bool,
    /// Set for a sandbox without namespaces.
    #[prost(message, optional, tag = "18")]
    pub nested: Option<Nested>,
}

/// What replaces namespaces and cgroups where the kernel allows none.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Nested {
    /// First of the three ids: the workload, nobody, process 1.
    #[prost(uint32, tag = "1")]
    pub base: u32,
    /// The sandbox's own directory, absolute.
    #[prost(string, tag = "2")]
    pub directory: String,
    /// Most processes of the workload.
    #[prost(uint64, tag = "3")]
    pub pids: u64,
    /// Most bytes of private memory of one process.
    #[prost(uint64, tag = "4")]
    pub memory_bytes: u64,
    /// Most bytes of one file.
    #[prost(uint64, tag = "5")]
    pub file_bytes: u64,
}

/// What process 1 answers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Booted {
    /// Empty when the sandbox is closed and ready; otherwise what failed.
    #[prost(string, tag = "1")]
    pub failure: String,
    /// errno of the failure.
    #[prost(int32, tag = "2")]
    pub errno: i32,
    /// The layers that process 1 made.
    #[prost(message, repeated, tag = "3")]
    pub layers: Vec<Layer>,
}

/// Descriptor of the boot socket in a fresh process 1.
pub const BOOT_DESCRIPTOR: i32 = 3;
/// Descriptor of the program image until `execve`.
pub const IMAGE_DESCRIPTOR: i32 = 4;
