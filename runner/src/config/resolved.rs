//! A configuration that has been checked, and what of the host it was checked against.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::launcher_policy::HostSize;
use crate::telemetry::{LogFormat, LogLevel};

/// A checked configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Where work comes from.
    pub orchestrator: Option<Orchestrator>,
    /// Work queues that are served, one for each environment.
    pub claude: Vec<Claude>,
    /// Name of this runner; the host name when the file has none.
    pub runner_id: String,
    /// The file has it, so that it counts more than the name in a certificate.
    #[serde(skip)]
    pub runner_id_is_given: bool,
    /// Labels that placement may ask for.
    pub labels: BTreeMap<String, String>,
    /// What outlives a boot.
    pub state_directory: PathBuf,
    /// Sockets.
    pub run_directory: PathBuf,
    /// Socket of a launcher that runs on its own; without it the runner starts one.
    pub launcher_socket: Option<PathBuf>,
    /// Weakest isolation under which work is accepted.
    pub min_tier: String,
    /// What one sandbox gets when it asks for nothing.
    pub sandbox: SandboxDefaults,
    /// What all sandboxes together may hold.
    pub capacity: Capacity,
    /// What becomes of sessions without calls.
    pub idle: Idle,
    /// When the host is short of something.
    pub pressure: Pressure,
    /// Form of log lines.
    pub log_format: LogFormat,
    /// Least important log line.
    pub log_level: LogLevel,
}

/// Where work comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Orchestrator {
    /// `https://host:port`.
    pub endpoint: String,
    /// Certificates that somebody else keeps; without them it is the identity that `enroll` has stored.
    #[serde(flatten)]
    pub files: Option<CertificateFiles>,
    /// Name its certificate must have.
    pub server_name: String,
    /// `http://host:port` of a proxy.
    #[serde(serialize_with = "without_password")]
    pub proxy: Option<String>,
    /// Longest wait before the first attempt to connect again, in milliseconds.
    pub reconnect_first_ms: u64,
    /// Longest wait before any attempt to connect again, in milliseconds.
    pub reconnect_most_ms: u64,
}

/// A work queue of Claude Managed Agents. The key is not part of it: it is read where it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Claude {
    /// The environment whose queue is served.
    pub environment_id: String,
    /// File with its key.
    pub key_file: PathBuf,
    /// `https://host:port/prefix`.
    pub base_url: String,
    /// The only authorities that may sign the server's certificate.
    pub ca_file: Option<PathBuf>,
    /// `http://host:port` of a proxy.
    #[serde(serialize_with = "without_password")]
    pub proxy: Option<String>,
    /// Value of the header `anthropic-version`.
    pub api_version: String,
    /// Value of the header `anthropic-workspace-id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workspace_id: Option<String>,
    /// What stands between the base URL and `/environments` or `/sessions`.
    pub api_path: String,
    /// Name of the header that says who asks for work.
    pub worker_id_header: String,
    /// Work items at once.
    pub max_sessions: u64,
    /// Seconds after the end of a turn until the work item is given back; 0: never.
    pub max_idle_seconds: u64,
    /// Seconds for which a work item is held whose session waits for somebody else; 0: for ever.
    pub max_wait_seconds: u64,
    /// Whether tool uses of different threads of a session run beside each other.
    pub parallel_threads: bool,
    /// Seconds for which the sandbox of a session is kept after its work item.
    pub keep_seconds: u64,
    /// Longest time in seconds that a command may ask for.
    pub max_command_seconds: u64,
}

/// Somebody may look over the operator's shoulder, or keep what was shown.
fn without_password<S: serde::Serializer>(proxy: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    let shown = proxy.as_ref().map(|text| match text.rsplit_once('@') {
        Some((_, address)) => format!("http://...@{address}"),
        None => text.clone(),
    });
    serde::Serialize::serialize(&shown, serializer)
}

/// Certificates that somebody else keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CertificateFiles {
    /// Authorities of the orchestrator's certificate.
    pub ca_file: PathBuf,
    /// Our certificate chain.
    pub certificate_file: PathBuf,
    /// Our private key.
    pub key_file: PathBuf,
}

/// What one sandbox gets when it asks for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SandboxDefaults {
    /// Memory.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Disk space.
    pub disk_bytes: u64,
}

/// What all sandboxes together may hold: the host less its reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Capacity {
    /// Sessions at once.
    pub max_sessions: u64,
    /// Memory.
    pub memory_bytes: u64,
    /// Disk space.
    pub disk_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// What becomes of sessions without calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Idle {
    /// When their processes are made to stand still, unless a session says otherwise; absent: never.
    pub freeze_after_seconds: Option<u64>,
    /// When their processes are ended and their files stay, unless a session wants them for longer; absent: never.
    pub stop_after_seconds: Option<u64>,
    /// When they are ended; absent: never.
    pub end_after_seconds: Option<u64>,
}

/// When the host is short of something; 0 is never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Pressure {
    /// Free bytes of a disk below which no session is opened; absent: a tenth of it and at least 5 GiB, a quarter at most.
    pub disk_low_bytes: Option<u64>,
    /// Free bytes of a disk below which no call is taken that may write; absent: 3 % of it and at least 1 GiB, 5 % at most.
    pub disk_critical_bytes: Option<u64>,
    /// Percent of the time in which some process waits for memory.
    pub memory_stall_percent: u64,
    /// Percent of the time in which all processes wait for block devices.
    pub io_stall_percent: u64,
    /// Percent of the time in which some process waits for a processor.
    pub cpu_stall_percent: u64,
}

/// What the machine has.
#[derive(Debug, Clone)]
pub struct Host {
    /// Memory and processors.
    pub size: HostSize,
    /// Free space of the file system of the state directory.
    pub free_disk_bytes: u64,
    /// Processes the kernel allows.
    pub pids: u64,
    /// Name of the machine.
    pub hostname: String,
    /// Where the service manager has put credentials (`CREDENTIALS_DIRECTORY`).
    pub credentials_directory: Option<PathBuf>,
}
