//! One call: prepared behind its gate, running, or finished and not acknowledged.

use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::unistd::{Pid, read};
use proto::init::v1::{CallFinished, Note};

use crate::sys::child::Exit;

use super::clock::Moment;
use super::ending::Ending;
use super::event::Key;
use super::pipe::StdinPipe;
use super::prepare::Plan;
use super::slot::{Counters, SlotId};
use super::stream::OutputStream;
use super::tool_worker::{Arrived, ToolWorker};

/// A call and what it is at.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) key: Key,
    pub(crate) plan: Plan,
    pub(crate) phase: Phase,
    /// The request that started it and has no answer yet.
    pub(crate) answer_to: Option<u64>,
}

/// Where a call is in its life.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Checked, waiting for Go.
    Prepared,
    /// Begun.
    Running(Box<Running>),
    /// Over; kept until the runner has stored the result.
    Finished(Box<Finished>),
}

/// A call that has begun.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) started: Moment,
    /// When its time is over.
    pub(crate) deadline: Option<Moment>,
    /// When its output goes to files although it is short; `None` once it did.
    pub(crate) spool_at: Option<Moment>,
    pub(crate) ending: Option<Ending>,
    /// Where its processes are; the shell call has none before it was written to the shell.
    pub(crate) slot: Option<SlotId>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) body: Body,
    pub(crate) notes: Vec<Note>,
    pub(crate) announced: Announced,
}

/// What the runner was told. Everything else is computed from the state of the call when the socket can take it.
#[derive(Debug, Default)]
pub(crate) struct Announced {
    /// The program runs, or the command was written to the shell: CallStarted may be sent.
    pub(crate) has_begun: bool,
    /// CallStarted was sent on this connection.
    pub(crate) started: bool,
    /// Total bytes in the last OutputAdvanced.
    pub(crate) output: u64,
    /// Earliest moment of the next OutputAdvanced.
    pub(crate) next_output: Moment,
    /// Bytes of the result of a tool that were sent ahead on this connection.
    pub(crate) ahead: u64,
}

/// What a running call consists of.
#[derive(Debug)]
pub(crate) enum Body {
    /// A process of its own: a program or a built-in tool.
    Process(ProcessBody),
    /// A command in the shell.
    Shell(ShellBody),
    /// A file tool that a worker answers.
    Worker(WorkerBody),
}

/// A file tool that a worker answers.
#[derive(Debug)]
pub(crate) struct WorkerBody {
    pub(crate) worker: ToolWorker,
    pub(crate) arrived: Arrived,
    /// Name for an out-of-memory report.
    pub(crate) tool: String,
    /// It is not kept after this call.
    pub(crate) is_large: bool,
    /// The worker that was given the call has died, and this one is asked what became of it.
    pub(crate) settling: Option<Settling>,
}

/// What is known of a call whose worker has died.
#[derive(Debug)]
pub(crate) struct Settling {
    /// How it died.
    pub(crate) exit: Exit,
    /// Who ended it, if anybody did.
    pub(crate) ending: Option<Ending>,
    /// What it had used.
    pub(crate) used: Counters,
    /// When nobody waits for the answer any more.
    pub(crate) until: Moment,
    /// The answer, as far as it has arrived.
    pub(crate) answer: Vec<u8>,
    /// All of it is there, and the worker may be asked something else.
    pub(crate) is_answered: bool,
}

/// A process of its own.
#[derive(Debug)]
pub(crate) struct ProcessBody {
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    /// Open until the program has started.
    pub(crate) start_error: Option<OwnedFd>,
    /// Why the program could not be executed.
    pub(crate) failed: Option<StartFailure>,
    pub(crate) stdin: Option<StdinPipe>,
    /// The program's end of its terminal, kept open until the call is over: a program that closes its descriptors and opens
    /// `/dev/tty` again would otherwise write into a terminal that nobody reads.
    pub(crate) terminal: Option<OwnedFd>,
    /// Name for an out-of-memory report.
    pub(crate) program: String,
}

/// A command in the shell.
#[derive(Debug, Default)]
pub(crate) struct ShellBody {
    /// What the shell must say at the end; set when the command was written to it.
    pub(crate) nonce: Option<String>,
    /// Shells that died before they had begun the command.
    pub(crate) attempts: u8,
    /// The call only starts a new shell.
    pub(crate) only_restart: bool,
}

/// One pipe of a running call.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) stream: OutputStream,
    pub(crate) reader: Option<OwnedFd>,
    /// Registered with epoll. Not any more after the last writer has closed: that state would wake the loop for ever.
    pub(crate) watched: bool,
    /// The pipe was made as large as the host allows.
    pub(crate) enlarged: bool,
}

/// A call that is over.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) message: CallFinished,
    pub(crate) outputs: Vec<OutputStream>,
    /// Bytes of the result of a tool that were sent ahead on this connection.
    pub(crate) ahead: u64,
    /// CallFinished was sent on this connection.
    pub(crate) sent: bool,
}

impl Call {
    /// The running part.
    pub(crate) fn running(&mut self) -> Option<&mut Running> {
        match &mut self.phase {
            Phase::Running(running) => Some(running),
            Phase::Prepared | Phase::Finished(_) => None,
        }
    }
}

impl Running {
    /// Total bytes of all streams.
    pub(crate) fn total_output(&self) -> u64 {
        self.outputs.iter().map(|output| output.stream.total()).sum()
    }

    /// The first process, when the call has one of its own.
    pub(crate) fn process(&mut self) -> Option<&mut ProcessBody> {
        match &mut self.body {
            Body::Process(process) => Some(process),
            Body::Shell(_) | Body::Worker(_) => None,
        }
    }

    /// The shell part, when the call is a command in the shell.
    pub(crate) fn shell(&mut self) -> Option<&mut ShellBody> {
        match &mut self.body {
            Body::Shell(shell) => Some(shell),
            Body::Process(_) | Body::Worker(_) => None,
        }
    }

    /// The worker, when the call is a file tool that one answers.
    pub(crate) fn worker(&mut self) -> Option<&mut WorkerBody> {
        match &mut self.body {
            Body::Worker(worker) => Some(worker),
            Body::Process(_) | Body::Shell(_) => None,
        }
    }
}

/// What the start-error pipe of a new process says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StartState {
    /// Not decided yet.
    Starting,
    /// The program runs.
    Started,
    /// It could not be executed.
    Failed(StartFailure),
}

/// Why a process never became its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StartFailure {
    pub(crate) errno: i32,
    /// It is the working directory that could not be entered; the program was not tried.
    pub(crate) is_directory: bool,
}

/// Reads the start-error pipe.
pub(crate) fn start_state(pipe: &OwnedFd) -> StartState {
    let mut errno = [0; 4];
    match read(pipe.as_fd(), &mut errno) {
        Ok(4) => {
            let number = i32::from_ne_bytes(errno);
            let errno = number.checked_abs().unwrap_or(libc::EIO);
            StartState::Failed(StartFailure { errno, is_directory: number < 0 })
        }
        Ok(_) => StartState::Started,
        Err(Errno::EAGAIN | Errno::EINTR) => StartState::Starting,
        Err(_) => StartState::Started,
    }
}
