//! The spawner and its spare children.
//!
//! ```text
//! process 1 --order(slot)--> spawner --clone3 into slot--> spare: joins U2, becomes the workload, two filters, parks
//!     |                         |                            ^
//!     |<---pid, pidfd, socket---+                            |
//!     +--------- program, descriptors ----------------------+   execve, or runs a built-in tool
//! ```
//!
//! The spawner enters the sandbox's one landlock domain at start, so every process of the workload is in the same domain
//! and none is in that of process 1. It keeps the credentials of process 1, which the workload cannot signal or trace.
//! A spare is made ahead of every call: at the moment of the call it only receives descriptors and executes. Spares are
//! children of process 1 (`CLONE_PARENT`), which alone reaps.

mod child;
mod client;
mod process;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::policy::{Profile, landlock};
use crate::sys::process::{CloneArguments, Cloned, clone3, exit_now};
use crate::sys::socket::receive;

pub use client::SpawnerClient;

/// How the workload is confined.
#[derive(Debug)]
pub struct Confinement {
    /// Which tables.
    pub profile: Profile,
    /// U2.
    pub nested: OwnedFd,
    /// Uid 0 inside, with a small capability set.
    pub root: bool,
    /// Process 1 and the workload share the only id there is.
    pub single_id: bool,
    /// Processors to bind to; empty is all.
    pub processors: Vec<usize>,
    /// Enter a landlock domain.
    pub landlock: bool,
    /// Load the seccomp filters.
    pub seccomp: bool,
    /// Drop capabilities.
    pub capabilities: bool,
    /// Where the file tools are confined to.
    pub working_directory: PathBuf,
}

/// A spawner that runs.
#[derive(Debug)]
pub struct Started {
    /// Talks to it.
    pub client: SpawnerClient,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Its landlock domain; `None` when the kernel has none or it is switched off.
    pub achieved: Option<landlock::Achieved>,
}

/// Why there is no spawner or no spare.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct SpawnStepError {
    /// What was tried.
    pub step: String,
    /// The cause.
    #[source]
    pub source: nix::Error,
}

impl SpawnStepError {
    fn new(step: impl Into<String>) -> impl FnOnce(nix::Error) -> Self {
        let step = step.into();
        move |source| Self { step, source }
    }

    /// errno of the cause.
    #[must_use]
    pub fn errno(&self) -> nix::Error {
        self.source
    }
}

/// The spawner's pid in every sandbox.
const SPAWNER_PID: i32 = 2;

/// Process 1 asks for a spare. One descriptor: the slot directory, when there are slots.
const ORDER: &[u8] = b"spare";
/// Largest packet on the spawner's socket.
const PACKET_BYTES: usize = 1024;

/// First packet of the spawner, and the answer to every order.
#[derive(Clone, PartialEq, prost::Message)]
struct Answer {
    /// Pid of the spare in the sandbox's pid namespace.
    #[prost(int32, tag = "1")]
    pid: i32,
    /// Set when it failed.
    #[prost(int32, tag = "2")]
    errno: i32,
    /// What failed.
    #[prost(string, tag = "3")]
    step: String,
}

/// Starts the spawner.
///
/// # Errors
/// [`SpawnStepError`] names the step; a landlock domain that the kernel supports and refuses is one.
pub fn start(confinement: Confinement) -> Result<Started, SpawnStepError> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
        .map_err(SpawnStepError::new("make the spawner's socket"))?;
    let prepared = if confinement.landlock { process::prepare_landlock(confinement.profile)? } else { None };
    let achieved = prepared.as_ref().map(|prepared| prepared.achieved().clone());
    let arguments = CloneArguments { flags: 0, exit_signal: libc::SIGCHLD, cgroup: None, ..CloneArguments::default() };
    match clone3(&arguments).map_err(SpawnStepError::new("start the spawner"))? {
        Cloned::Child => {
            drop(ours);
            process::run(theirs, prepared, confinement);
            exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => {
            drop(theirs);
            if pid.as_raw() != SPAWNER_PID {
                // The filter of a single-id sandbox protects this number; any other would be open to the workload.
                return Err(SpawnStepError {
                    step: format!("give the spawner pid {SPAWNER_PID}"),
                    source: nix::Error::EEXIST,
                });
            }
            let answer = receive(&ours, PACKET_BYTES)
                .map_err(SpawnStepError::new("hear from the spawner"))?
                .and_then(|packet| <Answer as prost::Message>::decode(packet.bytes.as_slice()).ok())
                .ok_or(SpawnStepError { step: "hear from the spawner".to_owned(), source: nix::Error::EPIPE })?;
            if answer.errno != 0 {
                return Err(SpawnStepError { step: answer.step, source: nix::Error::from_raw(answer.errno) });
            }
            Ok(Started { client: SpawnerClient::new(ours), pidfd, achieved })
        }
    }
}
