//! Process 1 of a sandbox: one loop over everything that can wake it.
//!
//! Holds the pipes of every call, keeps their output, enforces their deadlines while the runner is away, and answers by
//! offset. Starts nothing itself: new processes come from the [`spawner`]. Reads nothing of the workload except bytes and
//! claims, and believes neither.
//!
//! Limits, and what happens beyond them:
//!
//! | what | limit | beyond it |
//! | --- | --- | --- |
//! | packet, both directions | 128 KiB | the connection is closed |
//! | answers that wait | 1 MiB | no request is read until the runner reads |
//! | events | none wait | they are made from the state when the socket can take them |
//! | calls: prepared, running, not acknowledged | 128 | `CALL_BUSY` |
//! | acknowledged ids remembered | 1024 | the oldest is forgotten |
//! | input sent ahead in pieces | 16 MiB a call, 8 calls, 24 MiB | `TOO_LARGE`, `CALL_BUSY` |
//! | standard input not read by its call | 256 KiB and the pipe | not accepted |
//! | one pipe, per wake-up | 256 KiB | the rest at the next wake-up |
//! | output in memory, per stream | 64 KiB from the beginning, 1 MiB from the end | a declared hole |
//! | spool files | the budget of the sandbox | acknowledged files are removed, then a declared hole and a note |
//! | output after the end of a call | 64 pipes, 1 MiB each | the oldest pipe is closed; further bytes are dropped |
//! | slots with processes of finished calls | 64 | the oldest is killed |
//! | what the shell says about one command | 16 KiB | the shell is ended |
//! | result of a tool in memory | 272 KiB, for 16 calls | it goes to a spool file |
//! | what the worker of the file tools says | what it announced | the worker is ended |
//! | what one worker reads or answers in a call | 4 MiB | the next call has a new worker |

pub(crate) mod bash_call;
pub(crate) mod call;
pub(crate) mod cause;
pub(crate) mod clock;
pub(crate) mod connection;
mod due;
pub(crate) mod ending;
pub(crate) mod event;
pub(crate) mod finish;
pub(crate) mod late;
#[cfg(test)]
pub(crate) mod local_spawner;
pub(crate) mod pipe;
pub(crate) mod prepare;
pub(crate) mod process_call;
pub(crate) mod process_table;
pub(crate) mod report;
pub(crate) mod requests;
pub(crate) mod serve;
mod settling;
pub(crate) mod shell;
pub mod slot;
pub mod spawn;
pub mod spawner;
pub(crate) mod spool;
mod stop_work;
pub(crate) mod stream;
pub(crate) mod terminal;
pub(crate) mod tool_call;
pub(crate) mod tool_worker;

#[cfg(test)]
mod reconnect_tests;
#[cfg(test)]
mod serve_tests;
#[cfg(test)]
mod shell_tests;
#[cfg(test)]
mod stop_work_tests;
#[cfg(test)]
mod terminal_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tool_worker_tests;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use proto::launch::v1::InitExit;

use self::slot::{Slots, V1Counters};
use self::spawner::Spawner;

/// Everything process 1 needs, opened and decided by whoever made the sandbox.
pub struct Context {
    /// The sandbox this is process 1 of.
    pub sandbox_id: String,
    /// Listening SOCK_SEQPACKET socket. The newest connection wins.
    pub listener: OwnedFd,
    /// Starts processes inside the sandbox.
    pub spawner: Box<dyn Spawner + Send>,
    /// Readable when the spawner has ended, which ends the sandbox.
    pub spawner_pidfd: Option<OwnedFd>,
    /// How calls are told apart.
    pub slots: Slots,
    /// Usage counters of the sandbox on a host with cgroup v1 controllers.
    pub v1: Option<V1Counters>,
    /// Directory for spool files. Files are made in it with mode 0644.
    pub spool_directory: OwnedFd,
    /// Where the workload sees it.
    pub spool_path_inside: PathBuf,
    /// Most bytes of all spool files.
    pub spool_budget_bytes: u64,
    /// Directory for commands and FIFOs of the shell: owned by process 1, searchable but not listable or writable by the
    /// workload (0711), on a file system inside the sandbox where the workload may open FIFOs for writing.
    pub call_directory: OwnedFd,
    /// Where the workload sees it.
    pub call_path_inside: PathBuf,
    /// `NAME=value` of every process.
    pub default_environment: Vec<Vec<u8>>,
    /// Absolute path inside the sandbox in which calls begin.
    pub working_directory: Vec<u8>,
    /// The shell, normally `/bin/bash`.
    pub shell_path: PathBuf,
    /// The devpts is the sandbox's own, so a terminal in it may be opened by name: nobody but the workload sees it.
    pub own_terminals: bool,
    /// The sandbox ends when no runner has been connected for this long.
    pub orphan_timeout: Option<Duration>,
    /// Reap every child, also those we did not start. For pid 1; SIGCHLD must then be blocked by the caller.
    pub reaps_orphans: bool,
}

/// Why the loop ended. The processes of the sandbox have been killed, as far as they were in slots.
#[derive(Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The runner asked for it.
    Shutdown,
    /// The dead-man deadline passed.
    DeadlinePassed,
    /// No runner came back in time.
    Orphaned,
    /// The spawner is gone; nothing can be started any more.
    SpawnerGone,
    /// The loop itself cannot go on.
    Failed(nix::Error),
}

impl ExitReason {
    /// As the exit code of process 1.
    #[must_use]
    pub fn code(&self) -> u8 {
        let code = match self {
            Self::Shutdown => InitExit::Unspecified,
            Self::DeadlinePassed => InitExit::DeadlinePassed,
            Self::Orphaned => InitExit::Orphaned,
            Self::SpawnerGone => InitExit::SpawnerGone,
            Self::Failed(_) => InitExit::Failed,
        };
        u8::try_from(i32::from(code)).unwrap_or(u8::MAX)
    }
}

/// Runs process 1 until the sandbox ends.
pub fn run(context: Context) -> ExitReason {
    match serve::Engine::new(context) {
        Ok(mut engine) => engine.run(),
        Err(error) => ExitReason::Failed(error),
    }
}
