//! Starts a launcher of our own: the way in which one command, as root or as an ordinary user, is a whole runner.
//!
//! The launcher runs from the embedded program with the first connection as its descriptor 0 and ends when that connection
//! closes, taking all its sandboxes along; so whatever kills the runner also cleans up after it. Everything here happens
//! before the async runtime exists, because afterwards the process has threads and could no longer change its identity.

use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{MemfdFlags, Mode, fchmod, memfd_create};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, recv, sendmsg, socketpair,
};
use std::os::fd::AsFd;

use super::home::{Home, HomeError, Identity};
use super::identity::{IdentityError, become_identity};
use super::image::{ExecutableImage, ImageError};
use super::launch::{self, HostReport, ReplyError};
use crate::config::launcher_policy::LauncherPolicy;

/// The launcher probes the host before it answers; a slow host must not look like a broken one.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the launcher may take to remove its sandboxes when the runner is done.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// Why no launcher is running.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The directories are unusable.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The program cannot be executed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The policy cannot be written.
    #[error("cannot write the launcher's policy")]
    Policy {
        /// The cause.
        source: io::Error,
    },
    /// A path in the policy is not UTF-8.
    #[error("cannot write the launcher's policy: a path in it is not UTF-8")]
    PolicyText(#[source] toml::ser::Error),
    /// The kernel refused a socket or the process.
    #[error("cannot start the launcher: {step}")]
    Spawn {
        /// What was attempted.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It ended instead of answering.
    #[error("the launcher ended before it was ready ({status}); its message is above")]
    Ended {
        /// Exit code or signal.
        status: String,
    },
    /// It did not answer.
    #[error("the launcher did not answer within {} seconds", READY_TIMEOUT.as_secs())]
    Silent,
    /// It answered something else.
    #[error("the launcher's first answer is not a welcome")]
    Greeting(#[source] ReplyError),
    /// Root could not be given up.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// A launcher that has answered, and the connection to it.
#[derive(Debug)]
pub struct StartedLauncher {
    /// The process; our child.
    pub process: LauncherProcess,
    /// The connection, on which the greeting is done.
    pub connection: OwnedFd,
    /// What the launcher found out about the host.
    pub host: HostReport,
    /// The directories both sides use.
    pub home: Home,
}

/// Starts a launcher with `policy`, waits until it is ready, and then gives up root for the identity in the policy.
///
/// # Errors
/// [`StartError`]. No process and no file is left behind then.
pub fn start_launcher(home: &Home, policy: &LauncherPolicy) -> Result<StartedLauncher, StartError> {
    let runner = Identity { uid: policy.runner_uid, gid: policy.runner_gid };
    home.prepare(runner)?;
    let policy = policy_in_memory(policy)?;
    let (mut process, connection) = spawn(home, &policy)?;
    let host = match greet(&connection, &mut process) {
        Ok(host) => host,
        Err(error) => {
            drop(connection);
            process.end();
            return Err(error);
        }
    };
    become_identity(runner)?;
    Ok(StartedLauncher { process, connection, host, home: home.clone() })
}

fn spawn(home: &Home, policy: &OwnedFd) -> Result<(LauncherProcess, OwnedFd), StartError> {
    match ExecutableImage::in_memory().map(|image| spawn_image(&image, policy)) {
        Ok(Ok(started)) => Ok(started),
        // Refused memory execution (vm.memfd_noexec=2, or a security module) shows as either error.
        Ok(Err(error)) if error.kind() != io::ErrorKind::PermissionDenied => {
            Err(StartError::Spawn { step: "executing sandbox-init from memory", source: error })
        }
        _ => {
            let image = ExecutableImage::in_directory(&home.state)?;
            spawn_image(&image, policy)
                .map_err(|source| StartError::Spawn { step: "executing sandbox-init from the state directory", source })
        }
    }
}

fn spawn_image(image: &ExecutableImage, policy: &OwnedFd) -> io::Result<(LauncherProcess, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let child = Command::new(image.path())
        .arg0("sandbox-init")
        .arg("launcher")
        // Its standard output: a memory file, so that nothing is left behind whoever is killed when.
        .args(["--policy", "/proc/self/fd/1"])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::from(policy.try_clone()?))
        // Ctrl-C at a terminal reaches the whole foreground group; the launcher must outlive the runner's own clean end.
        .process_group(0)
        .spawn()?;
    Ok((LauncherProcess { child }, ours))
}

/// The greeting, blocking: there is no runtime yet, and a failure here can still be reported by a privileged process.
fn greet(connection: &OwnedFd, process: &mut LauncherProcess) -> Result<HostReport, StartError> {
    let spawn_error = |step| move |errno: rustix::io::Errno| StartError::Spawn { step, source: errno.into() };
    let hello = launch::encoded_hello();
    let sent = sendmsg(connection, &[IoSlice::new(&hello)], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL);
    if let Err(errno) = sent {
        return Err(process.ended_early().unwrap_or_else(|| spawn_error("sending the greeting")(errno)));
    }
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(StartError::Silent);
        }
        let mut waiting = [PollFd::new(connection.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Err(StartError::Silent),
            Ok(_) => break,
            Err(nix::Error::EINTR) => {}
            Err(source) => return Err(StartError::Spawn { step: "waiting for the greeting", source: source.into() }),
        }
    }
    let mut buffer = vec![0; launch::LARGEST_PACKET];
    match recv(connection, &mut buffer[..], RecvFlags::empty()) {
        Ok((0, _)) => return Err(process.ended_early().unwrap_or(StartError::Silent)),
        // Reset instead of closed: it ended with our greeting unread.
        Err(errno) => return Err(process.ended_early().unwrap_or_else(|| spawn_error("reading the greeting")(errno))),
        Ok((length, _)) => buffer.truncate(length),
    }
    launch::decode_welcome(&buffer).map_err(StartError::Greeting)
}

/// The launcher as a child process.
#[derive(Debug)]
pub struct LauncherProcess {
    child: Child,
}

impl LauncherProcess {
    /// Waits until it has ended, which it does by itself once its connection is closed; kills it when it does not.
    ///
    /// Returns whether it ended by itself and in good order.
    pub fn end(&mut self) -> bool {
        let deadline = Instant::now() + END_TIMEOUT;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return status.success(),
                Err(_) => return false,
                Ok(None) if Instant::now() >= deadline => break,
                // Waiting for a child by pidfd would need a raw call; at the end of a command this costs nobody anything.
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        // Not permitted once the runner has given up root; then the launcher is left to finish on its own.
        if self.child.kill().is_ok() {
            let _ = self.child.wait();
        }
        false
    }

    fn ended_early(&mut self) -> Option<StartError> {
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Some(StartError::Ended { status: status.to_string() });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

/// The policy in a memory file that only this user can change.
fn policy_in_memory(policy: &LauncherPolicy) -> Result<OwnedFd, StartError> {
    let text = policy.to_toml().map_err(StartError::PolicyText)?;
    let failed = |errno: rustix::io::Errno| StartError::Policy { source: errno.into() };
    let descriptor = memfd_create("launcher-policy", MemfdFlags::CLOEXEC).map_err(failed)?;
    fchmod(&descriptor, Mode::from_raw_mode(0o600)).map_err(failed)?;
    let mut file = File::from(descriptor);
    file.write_all(text.as_bytes()).map_err(|source| StartError::Policy { source })?;
    Ok(file.into())
}
