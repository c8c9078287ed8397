//! The spawner and its spare children.
//!
//! ```text
//! process 1 --order(slot)--> spawner --clone3 into slot--> spare: joins U2, becomes the workload, two filters, parks
//!     |                         |                            ^
//!     |<---pid, pidfd, socket---+                            |
//!     +--------- program, descriptors ----------------------+   execve, or runs a built-in tool,
//!                                                                or answers file tools until it is ended
//! ```
//!
//! The spawner is made before the request is known, and enters the sandbox's one landlock domain when it is told how; so every process of the workload is in the same domain
//! and none is in that of process 1. It keeps the credentials of process 1, which the workload cannot signal or trace.
//! A spare is made ahead of every call: at the moment of the call it only receives descriptors and executes. Spares are
//! children of process 1 (`CLONE_PARENT`), which alone reaps.

mod child;
mod client;
mod process;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::boot::Nested;
use crate::policy::Profile;
use crate::stage::mount::OWN_DIRECTORY;
use crate::sys::process::{CloneArguments, Cloned, clone3, exit_now};
use crate::sys::socket::send;

pub use client::SpawnerClient;

/// How the workload is confined. The spawner, which waits since before the request, hears it in one packet.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Confinement {
    /// Whether the strict tables apply.
    #[prost(bool, tag = "1")]
    pub strict: bool,
    /// Uid 0 inside, with a small capability set.
    #[prost(bool, tag = "2")]
    pub root: bool,
    /// Ids of the sandbox; with 1, process 1 and the workload share the only one there is.
    #[prost(uint32, tag = "3")]
    pub id_count: u32,
    /// Processors to bind to; empty is all.
    #[prost(uint32, repeated, tag = "4")]
    pub processors: Vec<u32>,
    /// Enter a landlock domain.
    #[prost(bool, tag = "5")]
    pub landlock: bool,
    /// Load the seccomp filters.
    #[prost(bool, tag = "6")]
    pub seccomp: bool,
    /// Drop capabilities.
    #[prost(bool, tag = "7")]
    pub capabilities: bool,
    /// Where the file tools are confined to.
    #[prost(bytes = "vec", tag = "8")]
    pub working_directory: Vec<u8>,
    /// The users and the directory of a sandbox without namespaces.
    #[prost(message, optional, tag = "9")]
    pub nested: Option<Nested>,
}

impl Confinement {
    fn profile(&self) -> Profile {
        if self.strict { Profile::Strict } else { Profile::Standard }
    }

    fn single_id(&self) -> bool {
        self.id_count == 1
    }

    /// Where the workload finds the output of earlier calls.
    fn output_directory(&self) -> PathBuf {
        match &self.nested {
            Some(nested) => Path::new(&nested.directory).join("output"),
            None => Path::new(OWN_DIRECTORY).join("output"),
        }
    }
}

/// The spawner of a sandbox that nobody has asked for yet.
#[derive(Debug)]
pub struct Waiting {
    socket: OwnedFd,
    pidfd: OwnedFd,
}

/// A spawner that was told its confinement and is entering it.
#[derive(Debug)]
pub struct Begun(Waiting);

/// A spawner that runs.
#[derive(Debug)]
pub struct Started {
    /// Talks to it.
    pub client: SpawnerClient,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// Its landlock domain, or the errno with which the kernel gives none; 0 when it is switched off.
    pub domain: Result<Domain, i32>,
}

/// The landlock domain of the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Domain {
    /// ABI whose rights are handled.
    pub abi: i32,
    /// Signals and abstract unix sockets stay inside.
    pub scopes: bool,
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

/// First packet of a spawner that has begun, and the answer to every order.
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
    /// ABI of the landlock domain, 0 when there is none; first packet only.
    #[prost(int32, tag = "4")]
    landlock_abi: i32,
    /// Whether that domain has scopes; first packet only.
    #[prost(bool, tag = "5")]
    landlock_scopes: bool,
    /// Why there is none, 0 when it is switched off; first packet only.
    #[prost(int32, tag = "6")]
    landlock_errno: i32,
}

/// Makes the spawner, which waits to be told how to confine itself. Must come before any other child but the one that
/// made U2, and while this process is dumpable: the spawner opens its own score for the out-of-memory killer. `nested` is
/// U2, where there is one.
///
/// # Errors
/// [`SpawnStepError`] names the step.
pub fn park(nested: Option<&OwnedFd>) -> Result<Waiting, SpawnStepError> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(SpawnStepError::new("make the spawner's socket"))?;
    let arguments = CloneArguments { flags: 0, exit_signal: libc::SIGCHLD, cgroup: None, ..CloneArguments::default() };
    match clone3(&arguments).map_err(SpawnStepError::new("start the spawner"))? {
        Cloned::Child => {
            // Closes its copies of everything else, the boot socket among them.
            process::run(&theirs, nested);
            exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => {
            if nested.is_some() && pid.as_raw() != SPAWNER_PID {
                // The filter of a single-id sandbox protects this number; any other would be open to the workload.
                return Err(SpawnStepError {
                    step: format!("give the spawner pid {SPAWNER_PID}"),
                    source: nix::Error::EEXIST,
                });
            }
            Ok(Waiting { socket: ours, pidfd })
        }
    }
}

impl Waiting {
    /// Tells it how the workload is confined. The root must have been switched: the landlock rules are about what is below
    /// `/` now. Does not wait.
    ///
    /// # Errors
    /// [`SpawnStepError`] when it is gone.
    pub fn begin(self, confinement: &Confinement) -> Result<Begun, SpawnStepError> {
        let packet = prost::Message::encode_to_vec(confinement);
        send(&self.socket, &packet, &[]).map_err(SpawnStepError::new("speak to the spawner"))?;
        Ok(Begun(self))
    }
}

impl Begun {
    /// Orders the first spare and waits until it is hardened, so that nobody is told of a sandbox whose workload cannot
    /// be confined.
    ///
    /// # Errors
    /// [`SpawnStepError`] names the step; a landlock domain that the kernel supports and refuses is one.
    pub fn prove(self, slot: Option<BorrowedFd<'_>>) -> Result<Started, SpawnStepError> {
        let Waiting { socket, pidfd } = self.0;
        let mut client = SpawnerClient::new(socket);
        let answer = client.prove(slot)?;
        let entered = Domain { abi: answer.landlock_abi, scopes: answer.landlock_scopes };
        let domain = if answer.landlock_abi > 0 { Ok(entered) } else { Err(answer.landlock_errno) };
        Ok(Started { client, pidfd, domain })
    }
}
