//! How process 1 gets a new process: the interface, and the spawner that stands behind it.
//!
//! A spawn never happens in process 1 itself. It asks the spawner, which holds a spare child that is already hardened and
//! parked in the next slot; the spare takes the descriptors, and becomes the program or runs the built-in tool.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use nix::unistd::Pid;

/// What a new process becomes.
#[derive(Debug)]
pub enum Program {
    /// `execve` of `argv[0]`, looked up in the `PATH` of `environment` when it has no slash.
    Execute {
        /// Program and arguments, no NUL inside.
        argv: Vec<Vec<u8>>,
        /// `NAME=value`, the whole environment.
        environment: Vec<Vec<u8>>,
    },
    /// A built-in tool runs in the child without `execve`. Writes an encoded `ToolResult` to descriptor 1, exits 0.
    Tool {
        /// `read`, `write`, `edit`, `glob`, `grep` or `probe`.
        name: String,
        /// The input as JSON.
        input_json: Vec<u8>,
    },
    /// Answers file tools on its descriptor 0, a SOCK_SEQPACKET socket, until that is closed. Before it replaces a file it
    /// writes into its descriptor 3 what it is about to do.
    Worker,
}

/// One new process.
#[derive(Debug)]
pub struct SpawnRequest {
    /// What it becomes.
    pub program: Program,
    /// Working directory, absolute inside the sandbox.
    pub working_directory: Vec<u8>,
    /// Each descriptor and the number it gets in the child. Everything else is closed. 0, 1 and 2 must be present.
    pub descriptors: Vec<(OwnedFd, RawFd)>,
    /// Directory of the slot cgroup the child must be in; `None` where the host has no cgroups for us.
    pub slot: Option<OwnedFd>,
    /// The child becomes the leader of a new session whose controlling terminal is its descriptor 0.
    pub terminal: bool,
    /// Write end of a pipe. The child writes its errno (4 bytes, native order) here when `execve` fails, and the negative
    /// errno when `chdir` does, and exits 127; the pipe closes without a byte when the program has started.
    pub start_error: OwnedFd,
}

/// A process that was started. It is a direct child of process 1, which reaps it.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid in the sandbox's pid namespace.
    pub pid: Pid,
    /// Its pidfd; readable when it has ended.
    pub pidfd: OwnedFd,
}

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The kernel refused to make a process.
    #[error("cannot start a process in the sandbox")]
    Fork(#[source] nix::Error),
    /// The spawner does not answer.
    #[error("the spawner of this sandbox is gone")]
    SpawnerGone(#[source] nix::Error),
}

/// Starts processes inside the sandbox as the workload.
pub trait Spawner {
    /// Starts one process.
    ///
    /// # Errors
    /// [`SpawnError::Fork`] when the process limit of the sandbox is reached; [`SpawnError::SpawnerGone`] is fatal for
    /// the sandbox.
    fn spawn(&mut self, request: SpawnRequest) -> Result<Spawned, SpawnError>;

    /// Nobody waits: gets ready for a [`Spawner::spawn`] in this slot. Returns the process that waits there, if one is
    /// known; it belongs to no call.
    fn park(&mut self, slot: Option<BorrowedFd<'_>>) -> Option<Pid> {
        let _ = slot;
        None
    }

    /// Ends the process that [`Spawner::park`] has made, if there is one: no call is expected.
    fn unpark(&mut self) {}
}
