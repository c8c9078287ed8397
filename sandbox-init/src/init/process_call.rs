//! Calls that are a process of their own: programs and built-in tools.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::unistd::pipe2;
use proto::init::v1::Stream;

use crate::sys::child::{Exit, Which, reap};

use super::call::{Announced, Body, Call, Output, Phase, ProcessBody, Running, StartFailure, StartState, start_state};
use super::cause::End;
use super::clock::{MILLISECOND, now};
use super::event::{Event, Key};
use super::pipe::{Drained, StdinPipe, enlarge, input_pipe, output_pipe, sip};
use super::prepare::{Exec, Plan, Refusal, Work, merge_environment};
use super::serve::Engine;
use super::spawner::{Program, SpawnError, SpawnRequest};
use super::stream::OutputStream;
use super::terminal::{self, NewTerminal};

/// A call whose output is short goes to files all the same when it lives longer than this.
const SPOOL_AFTER: u64 = 250 * MILLISECOND;
/// Bytes after which a pipe is made large.
const ENLARGE_AFTER: u64 = 128 * 1024;

/// Our ends of the descriptors of a new process, and its own.
struct Wiring {
    child: Vec<(OwnedFd, RawFd)>,
    outputs: Vec<(Stream, OwnedFd)>,
    stdin: Option<StdinPipe>,
    /// The other end of the call's terminal.
    terminal: Option<OwnedFd>,
}

impl Engine {
    /// Opens the gate of a prepared call.
    ///
    /// Refuses only what cannot even be tried; everything that goes wrong while starting is a result of the call.
    pub(super) fn begin(&mut self, key: Key) -> Result<(), Refusal> {
        let Some(call) = self.calls.get(&key) else { return Ok(()) };
        match &call.plan.work {
            Work::Bash { .. } => self.begin_command(key),
            Work::Exec(_) | Work::Tool { .. } => {
                match self.begin_on_worker(key) {
                    Ok(true) => {}
                    Ok(false) => self.begin_process(key),
                    Err(errno) => {
                        let reason = format!("no process for the tool: {}", errno.desc());
                        self.finish_never(key, End::NeverStarted { reason, errno: errno as i32, code: 125 });
                    }
                }
                Ok(())
            }
        }
    }

    /// A running call without output yet.
    pub(super) fn new_running(&self, plan: &Plan, body: Body) -> Running {
        let started = now();
        let deadline =
            (plan.timeout_ms > 0).then(|| started.saturating_add(plan.timeout_ms.saturating_mul(MILLISECOND)));
        Running {
            started,
            deadline,
            spool_at: Some(started.saturating_add(SPOOL_AFTER)),
            ending: None,
            slot: None,
            outputs: Vec::new(),
            body,
            notes: Vec::new(),
            announced: Announced {
                next_output: started.saturating_add(super::report::ANNOUNCE_INTERVAL),
                ..Announced::default()
            },
        }
    }

    fn begin_process(&mut self, key: Key) {
        if let Err((what, errno)) = self.try_begin_process(key) {
            self.finish_never(key, End::NeverStarted { reason: what, errno, code: 125 });
        }
    }

    fn try_begin_process(&mut self, key: Key) -> Result<(), (String, i32)> {
        let Some(call) = self.calls.get(&key) else { return Ok(()) };
        let plan = call.plan.clone();
        let failed = |what: &str, error: nix::Error| (format!("{what}: {}", error.desc()), error as i32);
        let is_terminal = matches!(&plan.work, Work::Exec(Exec { terminal: Some(_), .. }));
        let missing = if is_terminal { "no terminal for the call" } else { "no pipes for the call" };
        let slot = self.slots.take().map_err(|error| failed("no slot for the call", error))?;
        let spawned = self.wire(&plan).map_err(|error| failed(missing, error)).and_then(|wiring| {
            let (start_error, child_error) =
                pipe2(OFlag::O_CLOEXEC).map_err(|error| failed("no pipes for the call", error))?;
            let _ = fcntl(&start_error, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
            let (program, directory) = self.program(&plan);
            let request = SpawnRequest {
                program,
                working_directory: directory,
                descriptors: wiring.child,
                slot: self.slots.directory(slot),
                terminal: is_terminal,
                start_error: child_error,
            };
            match self.spawner.spawn(request) {
                Ok(spawned) => Ok((spawned, start_error, wiring.outputs, wiring.stdin, wiring.terminal)),
                Err(error) => Err(self.spawn_failure(&error)),
            }
        });
        let (spawned, start_error, outputs, stdin, terminal) = match spawned {
            Ok(spawned) => spawned,
            Err(failure) => {
                self.slots.give_back(slot, &plan.call_id);
                return Err(failure);
            }
        };
        self.slots.set_root(slot, spawned.pid);
        let body = ProcessBody {
            pid: spawned.pid,
            pidfd: spawned.pidfd,
            start_error: Some(start_error),
            failed: None,
            stdin,
            terminal,
            program: program_name(&plan.work),
        };
        // A descriptor that cannot be watched would hang the call; its timeout and the end of the process remain.
        let _ = self.watch(&body.pidfd, Event::Process(key));
        if let Some(start_error) = &body.start_error {
            let _ = self.watch(start_error, Event::StartError(key));
        }
        let mut running = self.new_running(&plan, Body::Process(body));
        running.slot = Some(slot);
        running.outputs = self.watch_outputs(key, &plan, outputs);
        if let Some(call) = self.calls.get_mut(&key) {
            call.phase = Phase::Running(Box::new(running));
        }
        Ok(())
    }

    /// Why a process could not be started, and the errno. A dead spawner ends the sandbox.
    pub(super) fn spawn_failure(&mut self, error: &SpawnError) -> (String, i32) {
        match error {
            SpawnError::Fork(errno) => (format!("{error}: {}", errno.desc()), *errno as i32),
            SpawnError::SpawnerGone(errno) => {
                self.exit = Some(super::ExitReason::SpawnerGone);
                (error.to_string(), *errno as i32)
            }
        }
    }

    /// Registers the reading ends of a call.
    pub(super) fn watch_outputs(&self, key: Key, plan: &Plan, outputs: Vec<(Stream, OwnedFd)>) -> Vec<Output> {
        let watch = |(index, (stream, reader)): (usize, (Stream, OwnedFd))| {
            let index = u8::try_from(index).unwrap_or(u8::MAX);
            let watched = self.watch(&reader, Event::Output(key, index)).is_ok();
            let retention = match stream {
                Stream::Result => self.result_retention(plan.retention),
                _ => plan.retention,
            };
            Output { stream: OutputStream::new(stream, retention), reader: Some(reader), watched, enlarged: false }
        };
        outputs.into_iter().enumerate().map(watch).collect()
    }

    fn program(&self, plan: &Plan) -> (Program, Vec<u8>) {
        match &plan.work {
            Work::Exec(exec) => {
                let mut environment = merge_environment(&self.environment, &exec.environment);
                if exec.terminal.is_some() {
                    environment = terminal::environment(environment, &exec.environment);
                }
                let directory = exec.working_directory.clone().unwrap_or_else(|| self.working_directory.clone());
                (Program::Execute { argv: exec.argv.clone(), environment }, directory)
            }
            Work::Tool { name, input_json } => {
                let tool = Program::Tool { name: name.clone(), input_json: input_json.clone() };
                (tool, self.working_directory.clone())
            }
            // Commands go to the shell and never come here; a program that cannot exist says so if they did.
            Work::Bash { .. } => (Program::Execute { argv: Vec::new(), environment: Vec::new() }, b"/".to_vec()),
        }
    }

    fn wire(&self, plan: &Plan) -> Result<Wiring, nix::Error> {
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        match &plan.work {
            Work::Exec(Exec { terminal: Some(size), .. }) => {
                let NewTerminal { ours, theirs } = NewTerminal::open(*size, self.own_terminals)?;
                let again = || theirs.try_clone().map_err(super::serve::errno_of);
                let child = vec![(again()?, 0), (again()?, 1), (again()?, 2)];
                let stdin = StdinPipe::terminal(ours.try_clone().map_err(super::serve::errno_of)?);
                let outputs = vec![(Stream::Pty, ours)];
                Ok(Wiring { child, outputs, stdin: Some(stdin), terminal: Some(theirs) })
            }
            Work::Exec(exec) => {
                let (child_in, stdin) = if exec.stdin {
                    let (reader, writer) = input_pipe()?;
                    (reader, Some(StdinPipe::new(writer)))
                } else {
                    (null().map_err(super::serve::errno_of)?, None)
                };
                let (out, child_out) = output_pipe()?;
                let mut outputs = vec![(Stream::Stdout, out)];
                let child_err = if plan.separate {
                    let (err, child_err) = output_pipe()?;
                    outputs.push((Stream::Stderr, err));
                    child_err
                } else {
                    child_out.try_clone().map_err(super::serve::errno_of)?
                };
                let child = vec![(child_in, 0), (child_out, 1), (child_err, 2)];
                Ok(Wiring { child, outputs, stdin, terminal: None })
            }
            Work::Tool { .. } | Work::Bash { .. } => {
                let (out, child_out) = output_pipe()?;
                let (err, child_err) = output_pipe()?;
                let null = null().map_err(super::serve::errno_of)?;
                let outputs = vec![(Stream::Result, out), (Stream::Stderr, err)];
                let child = vec![(null, 0), (child_out, 1), (child_err, 2)];
                Ok(Wiring { child, outputs, stdin: None, terminal: None })
            }
        }
    }

    /// The start-error pipe can be read.
    pub(super) fn look_at_start(&mut self, key: Key) {
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return };
        let Some(process) = running.process() else { return };
        let state = process.start_error.as_ref().map(start_state);
        match state {
            None | Some(StartState::Starting) => {}
            Some(StartState::Started) => {
                process.start_error = None;
                running.announced.has_begun = true;
            }
            // Reported when the process has ended, which it does at once: until then its slot is not empty.
            Some(StartState::Failed(failure)) => {
                process.start_error = None;
                process.failed = Some(failure);
            }
        }
    }

    /// The first process of a call has ended.
    pub(super) fn reap_process(&mut self, key: Key) {
        let Some(process) = self.calls.get_mut(&key).and_then(Call::running).and_then(Running::process) else { return };
        if let Ok(Some((_, exit))) = reap(Which::Process(process.pidfd.as_fd())) {
            self.process_ended(key, exit);
        }
    }

    /// The first process of a call has ended and was reaped.
    pub(super) fn process_ended(&mut self, key: Key, exit: Exit) {
        // Its error, if it had one, is in the pipe by now.
        self.look_at_start(key);
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return };
        let Some(process) = running.process() else { return };
        let end = match process.failed {
            Some(failure) => not_executable(failure, &process.program),
            None => {
                running.announced.has_begun = true;
                End::Process(exit)
            }
        };
        self.finish(key, end);
    }

    /// A pipe of a call can be read.
    pub(super) fn read_output(&mut self, key: Key, index: u8) {
        let Some(call) = self.calls.get_mut(&key) else {
            return self.late.read(key, index, &mut self.buffer, &mut self.spool);
        };
        let call_id = &call.plan.call_id;
        let Phase::Running(running) = &mut call.phase else {
            return self.late.read(key, index, &mut self.buffer, &mut self.spool);
        };
        let Some(output) = running.outputs.get_mut(usize::from(index)) else { return };
        let Some(reader) = &output.reader else { return };
        let spool = &mut self.spool;
        let stream = &mut output.stream;
        let drained = sip(reader, &mut self.buffer, |bytes| stream.push(call_id, bytes, spool));
        if !output.enlarged && stream.total() > ENLARGE_AFTER {
            output.enlarged = true;
            enlarge(reader);
        }
        // The last writer is gone, but another may come: the descriptor stays, and is read once more at the end.
        if drained == Drained::Closed && output.watched {
            output.watched = false;
            let _ = self.epoll.delete(reader);
        }
    }

    /// The standard input of a call can take more.
    pub(super) fn feed_stdin(&mut self, key: Key) {
        if let Some(process) = self.calls.get_mut(&key).and_then(Call::running).and_then(Running::process)
            && let Some(stdin) = &mut process.stdin
        {
            stdin.flush();
        }
        self.watch_stdin(key);
    }

    /// Wakes the loop when the input of a call can take more, while there is more.
    pub(super) fn watch_stdin(&mut self, key: Key) {
        let Some(process) = self.calls.get_mut(&key).and_then(Call::running).and_then(Running::process) else { return };
        let Some(stdin) = &mut process.stdin else { return };
        let wanted = stdin.is_waiting();
        if wanted == stdin.watched {
            return;
        }
        stdin.watched = wanted;
        // A pipe that was closed has left the epoll set by itself.
        let Some(pipe) = stdin.descriptor() else { return };
        let _ = if wanted {
            self.epoll.add(pipe, EpollEvent::new(EpollFlags::EPOLLOUT, Event::Stdin(key).token()))
        } else {
            self.epoll.delete(pipe)
        };
    }
}

/// The end of a call whose program could not be executed, with the status a shell would give.
fn not_executable(StartFailure { errno, is_directory }: StartFailure, program: &str) -> End {
    let error = Errno::from_raw(errno);
    if is_directory {
        return End::NeverStarted {
            reason: format!("cannot enter the working directory: {}", error.desc()),
            errno,
            code: 125,
        };
    }
    let code = if matches!(error, Errno::ENOENT | Errno::ENOTDIR) { 127 } else { 126 };
    End::NeverStarted { reason: format!("cannot execute {program}: {}", error.desc()), errno, code }
}

/// What a report calls the program: its first argument, readable and short.
fn program_name(work: &Work) -> String {
    match work {
        Work::Bash { .. } => "bash".to_owned(),
        Work::Exec(exec) => String::from_utf8_lossy(exec.argv.first().map(Vec::as_slice).unwrap_or_default())
            .chars()
            .take(256)
            .collect(),
        Work::Tool { name, .. } => name.clone(),
    }
}
