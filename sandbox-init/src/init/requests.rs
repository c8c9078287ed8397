//! Requests of the runner, one by one. Each gets exactly one answer.

use nix::sys::signal::Signal;
use proto::init::v1::{
    CallPhase, CallPrepared, CallState, CancelMode, Done, Failure, Frame, OutputData, ReadOutput, Request, Resize,
    SlotState, SnapshotReply, StartCall, Stdin, StdinAccepted, Stream, StreamSummary, Welcome, frame, request,
};

use crate::sys::terminal::set_window_size;

use super::call::{Body, Call, Phase};
use super::cause::Ender;
use super::clock::{MILLISECOND, now};
use super::ending::Ending;
use super::event::Key;
use super::prepare::{Refusal, Staging, prepare, window};
use super::serve::{Engine, Shutdown};
use super::slot::SlotId;
use super::stream::INLINE_LIMIT;

/// Major version of the protocol.
const PROTOCOL_MAJOR: u32 = 1;
/// Calls that are prepared, running or not acknowledged.
const CALLS_LIMIT: usize = 128;
/// Acknowledged calls whose ids are remembered.
const ACKNOWLEDGED_LIMIT: usize = 1024;
/// Longest time between SIGTERM and SIGKILL at the end of the sandbox.
const SHUTDOWN_GRACE_LIMIT_MS: u64 = 60_000;
/// How long after the arrival of a runner a shell is started that nobody has asked for yet.
pub(super) const SHELL_DELAY: u64 = 20 * MILLISECOND;

impl Engine {
    /// Handles one request and answers it.
    pub(super) fn answer(&mut self, request: Request) {
        // A frame of an older runner: it was replaced, and must not act any more.
        if request.generation < self.generation {
            return;
        }
        let request_id = request.request_id;
        let is_greeted = self.connection.as_ref().is_some_and(|connection| connection.generation.is_some());
        let result = match request.body {
            _ if request_id == 0 => Err(Refusal::field("request_id", "is 0")),
            None => Err(Refusal::field("body", "is missing or unknown")),
            Some(request::Body::Hello(hello)) => self.greet(request.generation, hello.major),
            Some(_) if !is_greeted => Err(Refusal::field("body", "must be hello first")),
            Some(request::Body::StartCall(start)) => match self.start_call(start, request_id) {
                Ok(None) => return,
                Ok(Some(body)) => Ok(body),
                Err(refusal) => Err(refusal),
            },
            Some(request::Body::StopWork(_)) => match self.stop_work(request_id) {
                Ok(()) => return,
                Err(refusal) => Err(refusal),
            },
            Some(body) => self.act(body),
        };
        let body = result.unwrap_or_else(|refusal| {
            let failure = Failure { code: refusal.code().to_owned(), message: refusal.to_string() };
            frame::Body::Failure(failure)
        });
        self.send_answer(request_id, body);
    }

    pub(super) fn send_answer(&mut self, request_id: u64, body: frame::Body) {
        let frame = Frame { request_id, generation: self.generation, body: Some(body) };
        let sent = self.connection.as_mut().map(|connection| connection.answer(&frame));
        if matches!(sent, Some(Err(_))) {
            self.disconnect();
        }
    }

    fn act(&mut self, body: request::Body) -> Result<frame::Body, Refusal> {
        let done = Ok(frame::Body::Done(Done {}));
        match body {
            // Handled before, all of them.
            request::Body::Hello(_) | request::Body::StartCall(_) | request::Body::StopWork(_) => done,
            request::Body::InputChunk(chunk) => self.staging.add(chunk).and(done),
            request::Body::Go(go) => self.go(&go.call_id).and(done),
            request::Body::Abort(abort) => self.abort(&abort.call_id).and(done),
            request::Body::Cancel(cancel) => self.cancel(&cancel.call_id, cancel.mode).and(done),
            request::Body::Stdin(stdin) => self.stdin(&stdin),
            request::Body::Resize(resize) => self.resize(&resize).and(done),
            request::Body::ReadOutput(read) => self.output(read),
            request::Body::AcknowledgeExit(acknowledge) => self.acknowledge(&acknowledge.call_id).and(done),
            request::Body::Deadline(deadline) => {
                self.deadline = Some(deadline.boottime_ns).filter(|moment| *moment != 0);
                done
            }
            request::Body::Snapshot(_) => Ok(frame::Body::Snapshot(self.snapshot())),
            request::Body::Shutdown(shutdown) => {
                self.shut_down(shutdown.grace_ms);
                done
            }
        }
    }

    fn greet(&mut self, generation: u64, major: u32) -> Result<frame::Body, Refusal> {
        if major != PROTOCOL_MAJOR {
            return Err(Refusal::NotSupported(format!(
                "hello.major is {major}, this process 1 speaks {PROTOCOL_MAJOR}"
            )));
        }
        self.generation = generation;
        if let Some(connection) = &mut self.connection {
            connection.generation = Some(generation);
        }
        // What an earlier runner has left half-sent is never used, and would take the room of what comes.
        self.staging = Staging::default();
        // The new connection has heard nothing yet.
        for call in self.calls.values_mut() {
            call.answer_to = None;
            match &mut call.phase {
                Phase::Prepared => {}
                Phase::Running(running) => {
                    running.announced.started = false;
                    running.announced.output = 0;
                    running.announced.ahead = 0;
                }
                Phase::Finished(finished) => {
                    finished.sent = false;
                    finished.ahead = 0;
                }
            }
        }
        self.forget_who_stopped();
        self.shells.wanted = self.stop.is_none();
        self.shells.not_before = now().saturating_add(SHELL_DELAY);
        Ok(frame::Body::Welcome(Welcome {
            major: PROTOCOL_MAJOR,
            sandbox_id: self.sandbox_id.clone(),
            shell_generation: self.shells.generation,
        }))
    }

    fn find(&self, call_id: &str) -> Option<&Call> {
        self.calls.values().find(|call| call.plan.call_id == call_id)
    }

    fn find_key(&self, call_id: &str, wanted: &'static str, fits: impl Fn(&Phase) -> bool) -> Result<Key, Refusal> {
        let unknown = || Refusal::Unknown { call_id: call_id.chars().take(128).collect(), wanted };
        self.find(call_id).filter(|call| fits(&call.phase)).map(|call| call.key).ok_or_else(unknown)
    }

    /// Prepares a call, and begins it when it has no gate. `None` when the answer follows: one of a call that has begun
    /// waits for a moment, because the end of a short call is answer enough.
    fn start_call(&mut self, start: StartCall, request_id: u64) -> Result<Option<frame::Body>, Refusal> {
        let immediately = start.start_immediately;
        let call_id = start.call_id.clone();
        let plan = prepare(start, self.staging.get(&call_id))?;
        self.staging.remove(&call_id);
        let prepared = frame::Body::CallPrepared(CallPrepared { call_id: plan.call_id.clone() });
        let known = self.find(&plan.call_id).map(|call| call.plan.digest);
        let acknowledged = self.acknowledged.iter().find(|(id, _)| *id == plan.call_id).map(|(_, digest)| *digest);
        match known.or(acknowledged) {
            // Sent again because the answer was lost: it is what it is, and is never started twice.
            Some(digest) if digest == plan.digest && acknowledged.is_none() => return Ok(Some(prepared)),
            Some(_) => return Err(Refusal::Reused { call_id: plan.call_id }),
            None => {}
        }
        if self.shutdown.is_some() {
            return Err(Refusal::Busy("the sandbox is shutting down".to_owned()));
        }
        if self.stop.is_some_and(|stop| stop.is_under_way()) {
            return Err(Refusal::Busy("the processes of the sandbox are being ended".to_owned()));
        }
        if self.calls.len() >= CALLS_LIMIT {
            return Err(Refusal::Busy(format!("{CALLS_LIMIT} calls are not acknowledged yet")));
        }
        let key = self.new_key();
        self.calls.insert(key, Call { key, plan, phase: Phase::Prepared, answer_to: None });
        if !immediately {
            return Ok(Some(prepared));
        }
        if let Err(refusal) = self.begin_after_stop(key) {
            self.calls.remove(&key);
            return Err(refusal);
        }
        if let Some(call) = self.calls.get_mut(&key) {
            call.answer_to = Some(request_id);
        }
        Ok(None)
    }

    fn go(&mut self, call_id: &str) -> Result<(), Refusal> {
        // Repeated after a lost connection: the gate is open already.
        if self.find(call_id).is_some_and(|call| !matches!(call.phase, Phase::Prepared)) {
            return Ok(());
        }
        let key = self.find_key(call_id, "prepared", |phase| matches!(phase, Phase::Prepared))?;
        self.begin_after_stop(key)
    }

    fn abort(&mut self, call_id: &str) -> Result<(), Refusal> {
        self.staging.remove(call_id);
        let key = self.find_key(call_id, "prepared", |phase| matches!(phase, Phase::Prepared))?;
        self.calls.remove(&key);
        Ok(())
    }

    fn cancel(&mut self, call_id: &str, mode: i32) -> Result<(), Refusal> {
        let mode = match CancelMode::try_from(mode) {
            Ok(CancelMode::Unspecified) => CancelMode::Interrupt,
            Ok(mode) => mode,
            Err(_) => return Err(Refusal::field("cancel.mode", format!("has the unknown value {mode}"))),
        };
        // A call that is over needs no cancel: its result is on the way.
        if self.find(call_id).is_some_and(|call| matches!(call.phase, Phase::Finished(_))) {
            return Ok(());
        }
        let key = self.find_key(call_id, "live", |_| true)?;
        self.end_call(key, Ender::Cancel(mode), mode);
        Ok(())
    }

    /// Begins to end a call, or ends it harder.
    pub(super) fn end_call(&mut self, key: Key, ender: Ender, mode: CancelMode) {
        let now = now();
        let Some(call) = self.calls.get_mut(&key) else { return };
        let never = match &mut call.phase {
            Phase::Prepared => true,
            Phase::Running(running) => {
                match &mut running.ending {
                    Some(ending) => ending.harden(ender, mode, now),
                    None => running.ending = Some(Ending::new(ender, mode, now)),
                }
                // Not written to the shell yet: nothing can have happened.
                running.shell().is_some_and(|shell| shell.nonce.is_none())
            }
            Phase::Finished(_) => false,
        };
        if never {
            // A shell that has not become ready for this command will not for the next one either.
            let is_stuck = self.shells.current.as_ref().is_some_and(|shell| !shell.is_ready);
            if is_stuck && matches!(ender, Ender::Timeout { .. }) {
                self.end_shell();
            }
            let reason = match ender {
                Ender::Timeout { .. } => "its time was over before the shell was ready",
                Ender::Cancel(_) => "cancelled before it began",
                Ender::Shutdown => "the sandbox was shut down before it began",
            };
            self.finish_unstarted(key, ender, reason);
        } else {
            self.run_due_of_call(key, now);
        }
    }

    fn stdin(&mut self, stdin: &Stdin) -> Result<frame::Body, Refusal> {
        let key = self.find_key(&stdin.call_id, "running", |phase| matches!(phase, Phase::Running(_)))?;
        let pipe = self.calls.get_mut(&key).and_then(Call::running).and_then(|running| running.process());
        let Some(pipe) = pipe.and_then(|process| process.stdin.as_mut()) else {
            return Err(Refusal::field("stdin.call_id", "names a call without standard input"));
        };
        let Some(accepted) = pipe.accept(stdin.offset, &stdin.data, stdin.eof) else {
            return Err(Refusal::field("stdin.offset", format!("is {}, beyond what was accepted", stdin.offset)));
        };
        self.watch_stdin(key);
        Ok(frame::Body::StdinAccepted(StdinAccepted { accepted }))
    }

    fn resize(&mut self, resize: &Resize) -> Result<(), Refusal> {
        let (columns, rows) = window(resize.columns, resize.rows)?;
        let key = self.find_key(&resize.call_id, "running", |phase| matches!(phase, Phase::Running(_)))?;
        let running = self.calls.get_mut(&key).and_then(Call::running);
        let terminal = running.and_then(|running| {
            running.outputs.iter().find(|output| output.stream.stream() == Stream::Pty)?.reader.as_ref()
        });
        let Some(terminal) = terminal else {
            return Err(Refusal::field("resize.call_id", "names a call without a terminal"));
        };
        use std::os::fd::AsFd as _;
        set_window_size(terminal.as_fd(), columns, rows)
            .map_err(|error| Refusal::NotSupported(format!("the terminal cannot be resized: {error}")))
    }

    fn output(&mut self, read: ReadOutput) -> Result<frame::Body, Refusal> {
        let stream = Stream::try_from(read.stream)
            .map_err(|_| Refusal::field("read_output.stream", format!("has the unknown value {}", read.stream)))?;
        let most = usize::try_from(read.max_bytes).unwrap_or(usize::MAX).min(INLINE_LIMIT);
        let unknown = || Refusal::Unknown { call_id: read.call_id.chars().take(128).collect(), wanted: "started" };
        let call = self.find(&read.call_id).ok_or_else(unknown)?;
        let found = match &call.phase {
            Phase::Prepared => return Err(unknown()),
            Phase::Running(running) => {
                running.outputs.iter().map(|output| &output.stream).find(|output| output.stream() == stream)
            }
            Phase::Finished(finished) => finished.outputs.iter().find(|output| output.stream() == stream),
        };
        let found = found.ok_or_else(|| Refusal::field("read_output.stream", "is not a stream of this call"))?;
        let piece = found.read(read.offset, most);
        Ok(frame::Body::OutputData(OutputData {
            call_id: read.call_id,
            stream: stream.into(),
            offset: piece.offset,
            data: piece.data,
            end: piece.end,
        }))
    }

    fn acknowledge(&mut self, call_id: &str) -> Result<(), Refusal> {
        // Repeated after a lost connection.
        if self.acknowledged.iter().any(|(id, _)| id == call_id) {
            return Ok(());
        }
        let key = self.find_key(call_id, "finished", |phase| matches!(phase, Phase::Finished(_)))?;
        let Some(mut call) = self.calls.remove(&key) else { return Ok(()) };
        if let Some(request_id) = call.answer_to.take() {
            // Acknowledged from a snapshot, before its end was sent.
            let prepared = CallPrepared { call_id: call.plan.call_id.clone() };
            self.send_answer(request_id, frame::Body::CallPrepared(prepared));
        }
        if let Phase::Finished(finished) = call.phase {
            for output in finished.outputs {
                output.retire(&mut self.spool);
            }
        }
        self.acknowledged.push_back((call.plan.call_id, call.plan.digest));
        if self.acknowledged.len() > ACKNOWLEDGED_LIMIT {
            self.acknowledged.pop_front();
        }
        Ok(())
    }

    fn snapshot(&mut self) -> SnapshotReply {
        self.slots.sweep();
        let calls = self.calls.values().map(|call| {
            let (phase, streams) = match &call.phase {
                Phase::Prepared => (CallPhase::Prepared, Vec::new()),
                Phase::Running(running) => {
                    let streams = running.outputs.iter().map(|output| output.stream.summary(0, &self.spool));
                    (CallPhase::Running, streams.collect())
                }
                Phase::Finished(finished) => {
                    // The contents travel in CallFinished; here they would not fit.
                    let without = |summary: &StreamSummary| StreamSummary {
                        inline: Vec::new(),
                        inline_complete: false,
                        ..summary.clone()
                    };
                    (CallPhase::Finished, finished.message.streams.iter().map(without).collect())
                }
            };
            CallState { call_id: call.plan.call_id.clone(), phase: phase.into(), streams }
        });
        let slots = self.slots.left().map(|(call_id, pids)| SlotState {
            call_id: call_id.to_owned(),
            // A long list is of no use to anybody and might not fit into a packet.
            pids: pids.iter().filter_map(|pid| u32::try_from(pid.as_raw()).ok()).take(64).collect(),
        });
        SnapshotReply {
            calls: calls.collect(),
            shell_generation: self.shells.generation,
            slots: slots.collect(),
            stopped: self.stop.is_some_and(|stop| stop.is_over()),
        }
    }

    fn shut_down(&mut self, grace_ms: u64) {
        let grace = grace_ms.min(SHUTDOWN_GRACE_LIMIT_MS).saturating_mul(MILLISECOND);
        let kill_at = now().saturating_add(grace);
        self.shutdown = Some(match self.shutdown {
            Some(shutdown) => Shutdown { kill_at: shutdown.kill_at.min(kill_at) },
            None => Shutdown { kill_at },
        });
        // A program that is ending in order because it was asked is not asked again: the second signal would end what it has
        // started for that.
        let asked_as_calls: Vec<SlotId> = self
            .calls
            .values()
            .filter_map(|call| match &call.phase {
                Phase::Running(running) if matches!(running.body, Body::Process(_)) => running.slot,
                _ => None,
            })
            .collect();
        self.slots.signal_all_but(&asked_as_calls, Signal::SIGTERM);
        let live: Vec<Key> =
            self.calls.values().filter(|call| !matches!(call.phase, Phase::Finished(_))).map(|call| call.key).collect();
        for key in live {
            self.end_call(key, Ender::Shutdown, CancelMode::Terminate);
        }
    }
}
