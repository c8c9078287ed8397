//! Process 1's side: keeps one spare ahead and hands it its task.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use nix::unistd::Pid;
use prost::Message;

use super::child::{HARDENED, IN_FILE, INLINE_BYTES, Task};
use super::{Answer, ORDER, PACKET_BYTES, SpawnStepError};
use crate::init::spawner::{Program, SpawnError, SpawnRequest, Spawned, Spawner};
use crate::init::tool_worker::memory_file;
use crate::sys::process::pidfd_signal;
use crate::sys::socket::{receive, send};

/// A spare takes about a millisecond; a spawner that needs this long is as good as gone.
const PATIENCE_MS: u16 = 5_000;

/// A parked child.
#[derive(Debug)]
struct Spare {
    pid: Pid,
    pidfd: OwnedFd,
    socket: OwnedFd,
    /// Inode of its slot directory; `None` without slots.
    slot: Option<u64>,
}

/// Talks to the spawner of this sandbox.
#[derive(Debug)]
pub struct SpawnerClient {
    socket: OwnedFd,
    spare: Option<Spare>,
    /// A spare for this slot was ordered and has not come yet.
    ordered: Option<Option<u64>>,
}

impl SpawnerClient {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, spare: None, ordered: None }
    }

    /// Orders the first spare, hears that the spawner has confined itself, and waits until the spare is hardened.
    ///
    /// # Errors
    /// The step of the confinement that the kernel refused.
    pub(super) fn prove(&mut self, slot: Option<BorrowedFd<'_>>) -> Result<Answer, SpawnStepError> {
        // Ordered before the spawner has answered: it goes on without a pause.
        self.order(slot).map_err(SpawnStepError::new("order a process from the spawner"))?;
        let confined = self.hear().map_err(SpawnStepError::new("hear from the spawner"))?.0;
        if confined.errno != 0 {
            return Err(SpawnStepError { step: confined.step, source: Errno::from_raw(confined.errno) });
        }
        let spare = self.collect().map_err(SpawnStepError::new("start the first process of the workload"))?;
        let proof =
            receive(&spare.socket, HARDENED.len()).map_err(SpawnStepError::new("hear from the first process"))?;
        if proof.is_some_and(|packet| packet.bytes == HARDENED) {
            self.spare = Some(spare);
            return Ok(confined);
        }
        Err(SpawnStepError { step: "harden the first process of the workload".to_owned(), source: exit_errno(&spare) })
    }

    fn order(&mut self, slot: Option<BorrowedFd<'_>>) -> nix::Result<()> {
        let descriptors: Vec<i32> = slot.iter().map(AsRawFd::as_raw_fd).collect();
        send(&self.socket, ORDER, &descriptors)?;
        self.ordered = Some(slot.map(inode).transpose()?);
        Ok(())
    }

    /// Waits for the spare that was ordered.
    fn collect(&mut self) -> nix::Result<Spare> {
        let slot = self.ordered.take().ok_or(Errno::EINVAL)?;
        let (answer, descriptors) = self.hear()?;
        if answer.errno != 0 {
            return Err(Errno::from_raw(answer.errno));
        }
        let mut descriptors = descriptors.into_iter();
        match (descriptors.next(), descriptors.next()) {
            (Some(pidfd), Some(socket)) => Ok(Spare { pid: Pid::from_raw(answer.pid), pidfd, socket, slot }),
            _ => Err(Errno::EBADMSG),
        }
    }

    /// The next packet of the spawner. One that was stopped must not stop process 1 with it.
    fn hear(&self) -> nix::Result<(Answer, Vec<OwnedFd>)> {
        let mut interest = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut interest, PollTimeout::from(PATIENCE_MS))? == 0 {
            return Err(Errno::EPIPE);
        }
        let packet = loop {
            match receive(&self.socket, PACKET_BYTES) {
                Err(Errno::EINTR) => {}
                other => break other?.ok_or(Errno::EPIPE)?,
            }
        };
        let answer = Answer::decode(packet.bytes.as_slice()).map_err(|_| Errno::EBADMSG)?;
        Ok((answer, packet.descriptors))
    }

    /// A spare in the slot given: the parked one, or a new one when it is dead or elsewhere.
    fn spare_in(&mut self, slot: Option<BorrowedFd<'_>>) -> Result<Spare, SpawnError> {
        let wanted = slot.map(inode).transpose().map_err(SpawnError::Fork)?;
        if self.spare.is_none() && self.ordered.is_some() {
            self.spare = self.collect().map_err(classify)?.into();
        }
        if let Some(spare) = self.spare.take() {
            if spare.slot == wanted && !has_ended(&spare.pidfd) {
                return Ok(spare);
            }
            // Wrong place, or killed by the workload (which may: it is one of its own). It never ran anything.
            let _ = pidfd_signal(spare.pidfd.as_fd(), libc::SIGKILL);
        }
        self.order(slot).map_err(SpawnError::SpawnerGone)?;
        self.collect().map_err(classify)
    }
}

impl Spawner for SpawnerClient {
    fn spawn(&mut self, request: SpawnRequest) -> Result<Spawned, SpawnError> {
        let slot = request.slot.as_ref().map(AsFd::as_fd);
        let spare = self.spare_in(slot)?;
        let task = task(&request);
        let mut descriptors = vec![request.start_error.as_raw_fd()];
        descriptors.extend(request.descriptors.iter().map(|(fd, _)| fd.as_raw_fd()));
        let encoded = task.encode_to_vec();
        let sent = if encoded.len() <= INLINE_BYTES {
            send(&spare.socket, &encoded, &descriptors)
        } else {
            memory_file(&encoded).and_then(|file| {
                descriptors.push(file.as_raw_fd());
                send(&spare.socket, IN_FILE, &descriptors)
            })
        };
        sent.map_err(SpawnError::Fork)?;
        // The workload may have stopped the spare, which is one of its own, with everything else (`kill -STOP -1`): the call
        // would wait for its time to be over.
        let _ = pidfd_signal(spare.pidfd.as_fd(), libc::SIGCONT);
        Ok(Spawned { pid: spare.pid, pidfd: spare.pidfd })
    }

    fn park(&mut self, slot: Option<BorrowedFd<'_>>) -> Option<Pid> {
        let wanted = slot.map(inode).transpose().ok()?;
        if !self.is_ready_for(wanted) {
            // One order at a time: what was ordered for another slot is taken off the socket first.
            if self.ordered.is_some() {
                self.spare = self.collect().ok();
            }
            if let Some(spare) = self.spare.take() {
                let _ = pidfd_signal(spare.pidfd.as_fd(), libc::SIGKILL);
            }
            self.order(slot).ok()?;
        }
        if slot.is_none() && self.spare.is_none() {
            // Without cgroups its pid is all that tells it from a process of a call.
            self.spare = self.collect().ok();
        }
        self.spare.as_ref().map(|spare| spare.pid)
    }

    fn unpark(&mut self) {
        if self.ordered.is_some() {
            self.spare = self.collect().ok();
        }
        if let Some(spare) = self.spare.take() {
            let _ = pidfd_signal(spare.pidfd.as_fd(), libc::SIGKILL);
        }
    }
}

impl SpawnerClient {
    /// Whether a spare is in the slot already, or on its way to it.
    fn is_ready_for(&self, wanted: Option<u64>) -> bool {
        self.ordered == Some(wanted)
            || self.spare.as_ref().is_some_and(|spare| spare.slot == wanted && !has_ended(&spare.pidfd))
    }
}

fn task(request: &SpawnRequest) -> Task {
    let mut task = Task {
        working_directory: request.working_directory.clone(),
        terminal: request.terminal,
        targets: request.descriptors.iter().map(|(_, target)| *target).collect(),
        ..Task::default()
    };
    match &request.program {
        Program::Execute { argv, environment } => {
            task.argv.clone_from(argv);
            task.environment.clone_from(environment);
        }
        Program::Tool { name, input_json } => {
            task.tool.clone_from(name);
            task.input_json.clone_from(input_json);
        }
        Program::Worker => task.worker = true,
    }
    task
}

fn inode(directory: BorrowedFd<'_>) -> nix::Result<u64> {
    fstat(directory).map(|found| found.st_ino)
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut interest = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut interest, PollTimeout::ZERO), Ok(ready) if ready > 0)
}

/// A spare that failed to harden exits with the errno.
fn exit_errno(spare: &Spare) -> Errno {
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
    match waitid(Id::PIDFd(spare.pidfd.as_fd()), WaitPidFlag::WEXITED) {
        Ok(WaitStatus::Exited(_, status)) => Errno::from_raw(status),
        _ => Errno::EPERM,
    }
}

fn classify(errno: Errno) -> SpawnError {
    match errno {
        Errno::EPIPE | Errno::EBADMSG | Errno::ECONNRESET | Errno::EINVAL => SpawnError::SpawnerGone(errno),
        errno => SpawnError::Fork(errno),
    }
}
