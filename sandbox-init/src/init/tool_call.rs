//! Calls of file tools that a worker answers, and the life of that worker.
//!
//! The first such call makes the spare process of the next slot the worker; it stays for the calls that follow. A call that
//! is ended ends the worker with it, and the next call has a new one. A second reading call at the same time, a tool that
//! searches, and a reading call whose worker cannot be started take the other way: a process of their own. What replaces a file
//! never does, because of a worker it is known what it was about to do: see `settling`.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proto::init::v1::Stream;

use crate::sys::child::{Exit, Which, reap};

use super::call::{Body, Call, Output, Phase, WorkerBody};
use super::cause::End;
use super::event::{Event, Key};
use super::prepare::Work;
use super::serve::Engine;
use super::spawner::{Program, SpawnRequest};
use super::stream::{OutputStream, Retention};
use super::tool_worker::{Arrived, INTENTS, Look, ToolRequest, ToolWorker, memory_file};

/// The tools that are short and keep nothing behind: no threads, no caches.
const WORKER_TOOLS: [&str; 3] = ["read", "write", "edit"];
/// Those of them that leave a file which is the old one or the new one.
const REPLACING_TOOLS: [&str; 2] = ["write", "edit"];
/// Results up to this length stay in memory and are sent ahead of the end of their call. Above what the runner takes with
/// the end of a call, with room for the frame around a text of that length.
const AHEAD_BYTES: usize = 272 * 1024;
/// Calls that are not acknowledged while results still stay in memory.
const FEW_CALLS: usize = 16;
/// A worker that has handled more than this is not kept: its memory counts against the sandbox.
const RETIRE_ABOVE: u64 = 4 * 1024 * 1024;

impl Engine {
    /// Gives a call to the worker. `false` when it has to go the other way; then nothing of it has happened.
    ///
    /// # Errors
    /// There is no worker, and no other way.
    pub(super) fn begin_on_worker(&mut self, key: Key) -> Result<bool, Errno> {
        let Some(call) = self.calls.get(&key) else { return Ok(false) };
        let Work::Tool { name, input_json } = &call.plan.work else { return Ok(false) };
        let replaces = REPLACING_TOOLS.contains(&name.as_str());
        if !WORKER_TOOLS.contains(&name.as_str()) || !replaces && self.worker_is_busy() {
            return Ok(false);
        }
        let request = ToolRequest { tool: name.clone(), input_json: input_json.clone(), intent: Vec::new() };
        let worker = match self.asked_worker(&request) {
            Ok(worker) => worker,
            Err(errno) if replaces => return Err(errno),
            Err(_) => return Ok(false),
        };
        let slot = worker.slot;
        let is_large = request.input_json.len() as u64 > RETIRE_ABOVE;
        let body = WorkerBody { worker, arrived: Arrived::default(), tool: request.tool, is_large, settling: None };
        let Some(call) = self.calls.get(&key) else { return Ok(true) };
        let retention = self.result_retention(call.plan.retention);
        let mut running = self.new_running(&call.plan, Body::Worker(body));
        running.slot = Some(slot);
        running.announced.has_begun = true;
        let stream = OutputStream::new(Stream::Result, retention);
        running.outputs = vec![Output { stream, reader: None, watched: false, enlarged: false }];
        if let Some(call) = self.calls.get_mut(&key) {
            call.phase = Phase::Running(Box::new(running));
        }
        self.attend();
        Ok(true)
    }

    /// A worker that has been given the request: the one that waits, or another one when it is gone.
    pub(super) fn asked_worker(&mut self, request: &ToolRequest) -> Result<ToolWorker, Errno> {
        if let Some(worker) = self.worker.take() {
            if worker.ask(request).is_ok() {
                return Ok(worker);
            }
            self.end_worker(worker, "");
        }
        let worker = self.start_worker()?;
        match worker.ask(request) {
            Ok(()) => Ok(worker),
            Err(errno) => {
                self.end_worker(worker, "");
                Err(errno)
            }
        }
    }

    /// What is kept of the result of a tool: in memory, where it can be sent ahead, unless many wait already.
    pub(super) fn result_retention(&self, asked: Retention) -> Retention {
        if self.calls.len() > FEW_CALLS {
            return asked;
        }
        Retention { memory: AHEAD_BYTES, head: asked.head.max(AHEAD_BYTES as u64), ..asked }
    }

    fn worker_is_busy(&self) -> bool {
        self.calls
            .values()
            .any(|call| matches!(&call.phase, Phase::Running(running) if matches!(running.body, Body::Worker(_))))
    }

    fn start_worker(&mut self) -> Result<ToolWorker, Errno> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let null = || {
            File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from).map_err(super::serve::errno_of)
        };
        let (output, errors, start_error) = (null()?, null()?, null()?);
        let intents = memory_file(&[])?;
        let noted = intents.try_clone().map_err(super::serve::errno_of)?;
        let slot = self.slots.take()?;
        let request = SpawnRequest {
            program: Program::Worker,
            // It holds no directory: that of the session may be removed, which is then what the tools say.
            working_directory: b"/".to_vec(),
            descriptors: vec![(theirs, 0), (output, 1), (errors, 2), (noted, INTENTS)],
            slot: self.slots.directory(slot),
            terminal: false,
            start_error,
        };
        let spawned = match self.spawner.spawn(request) {
            Ok(spawned) => spawned,
            Err(error) => {
                self.slots.give_back(slot, "");
                return Err(Errno::from_raw(self.spawn_failure(&error).1));
            }
        };
        self.slots.set_root(slot, spawned.pid);
        let key = self.new_key();
        let intents = File::from(intents);
        let worker = ToolWorker { key, pid: spawned.pid, pidfd: spawned.pidfd, slot, socket: ours, intents };
        let watched =
            self.watch(&worker.socket, Event::Worker(key)).and(self.watch(&worker.pidfd, Event::WorkerProcess(key)));
        if let Err(errno) = watched {
            self.end_worker(worker, "");
            return Err(errno);
        }
        Ok(worker)
    }

    /// Kills a worker. It is reaped later.
    pub(super) fn end_worker(&mut self, worker: ToolWorker, call_id: &str) {
        let _ = kill(worker.pid, Signal::SIGKILL);
        self.slots.give_back(worker.slot, call_id);
        self.shells.dying.insert(worker.key, worker.pidfd);
    }

    /// Kills the idle worker, if there is one.
    pub(super) fn end_idle_worker(&mut self) {
        if let Some(worker) = self.worker.take() {
            self.end_worker(worker, "");
        }
    }

    fn call_of_worker(&self, worker: Key) -> Option<Key> {
        self.calls.values().find_map(|call| match &call.phase {
            Phase::Running(running) => match &running.body {
                Body::Worker(body) if body.worker.key == worker => Some(call.key),
                _ => None,
            },
            _ => None,
        })
    }

    /// The socket of a worker can be read.
    pub(super) fn listen_to_worker(&mut self, worker: Key) {
        let Some(key) = self.call_of_worker(worker) else {
            // Nobody asked it anything.
            if self.worker.as_ref().is_some_and(|idle| idle.key == worker) {
                self.end_idle_worker();
            }
            return;
        };
        match self.look_at_worker(key) {
            Look::More => {}
            Look::Complete => self.answered(key),
            Look::Nonsense | Look::Closed => {
                let Some(body) = self.calls.get_mut(&key).and_then(Call::running).and_then(|running| running.worker())
                else {
                    return;
                };
                // The end of the call is reported when it is reaped. A closed socket would wake the loop until then.
                let _ = self.epoll.delete(&body.worker.socket);
                let _ = kill(body.worker.pid, Signal::SIGKILL);
            }
        }
    }

    fn look_at_worker(&mut self, key: Key) -> Look {
        let Some(call) = self.calls.get_mut(&key) else { return Look::More };
        let call_id = &call.plan.call_id;
        let Phase::Running(running) = &mut call.phase else { return Look::More };
        let Body::Worker(body) = &mut running.body else { return Look::More };
        let Some(output) = running.outputs.first_mut() else { return Look::Nonsense };
        if let Some(settling) = &mut body.settling {
            return settling.look(&body.worker, &mut body.arrived, &mut self.buffer);
        }
        let (stream, spool) = (&mut output.stream, &mut self.spool);
        let look = body.worker.look(&mut body.arrived, &mut self.buffer, |bytes| stream.push(call_id, bytes, spool));
        body.is_large |= stream.total() > RETIRE_ABOVE;
        look
    }

    /// A worker has ended.
    pub(super) fn reap_worker(&mut self, worker: Key) {
        if let Some(pidfd) = self.shells.dying.get(&worker) {
            let _ = reap(Which::Process(pidfd.as_fd()));
            self.shells.dying.remove(&worker);
        } else if self.worker.as_ref().is_some_and(|idle| idle.key == worker) {
            self.end_idle_worker();
            self.reap_worker(worker);
        } else if let Some(key) = self.call_of_worker(worker) {
            let body = self.calls.get_mut(&key).and_then(Call::running).and_then(|running| running.worker());
            let exit = body.map(|body| reap(Which::Process(body.worker.pidfd.as_fd())));
            if let Some(Ok(Some((_, exit)))) = exit {
                self.worker_ended(key, exit);
            }
        }
    }

    /// The worker of a call has ended and was reaped. What it had answered before counts.
    pub(super) fn worker_ended(&mut self, key: Key, exit: Exit) {
        let look = loop {
            match self.look_at_worker(key) {
                Look::More => {}
                look => break look,
            }
        };
        if look == Look::Complete {
            self.answered(key);
            return self.end_idle_worker();
        }
        let Some(call) = self.calls.get_mut(&key) else { return };
        let Phase::Running(running) = &mut call.phase else { return };
        if running.worker().is_some_and(|body| REPLACING_TOOLS.contains(&body.tool.as_str())) {
            return self.settle(key, exit);
        }
        self.finish(key, End::Process(exit));
    }

    /// The worker of a call has answered.
    fn answered(&mut self, key: Key) {
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return };
        if let Some(settling) = running.worker().and_then(|body| body.settling.as_mut()) {
            settling.is_answered = true;
            return self.settled(key);
        }
        // Whoever ended it came too late, and has hit a worker that has nothing to do.
        let was_ended = running.ending.take().is_some();
        self.finish(key, End::Claimed(0));
        if was_ended {
            self.end_idle_worker();
        }
    }

    /// The call of a worker is over: it waits for the next one, or is gone.
    pub(super) fn release_worker(&mut self, body: WorkerBody, stays: bool, call_id: &str) {
        if stays && self.worker.is_none() {
            self.worker = Some(body.worker);
            self.worker_needs_mark = true;
        } else {
            self.end_worker(body.worker, call_id);
        }
    }

    /// Marks the numbers of its slot for the next call. For when nobody waits.
    pub(super) fn settle_worker(&mut self) {
        if std::mem::take(&mut self.worker_needs_mark)
            && let Some(worker) = &self.worker
        {
            self.slots.mark_again(worker.slot, worker.pid);
        }
    }
}
