//! The end of a call: what was left in its pipes, its numbers, its result.

use nix::sys::signal::{Signal, kill};
use proto::init::v1::{
    CallFinished, CancelMode, Cancelled, NeverStarted, Note, NoteKind, Outcome, SandboxLost, Usage, outcome::Kind,
};

use crate::sys::child::Exit;

use super::call::{Body, Finished, Phase, Running};
use super::cause::{End, Ender, Facts, note, notes_of_usage, outcome};
use super::clock::{Moment, now};
use super::connection::PACKET_LIMIT;
use super::ending::Leader;
use super::event::Key;
use super::late::LateOutput;
use super::pipe::{Drained, USUAL_PIPE, capacity, drain};
use super::prepare::Work;
use super::serve::Engine;
use super::shell::LIST_SIGNAL;
use super::slot::Counters;

/// What bash says of a list that an interrupt has broken off.
const INTERRUPTED: i32 = 130;
/// What a packet needs besides the streams: notes, paths, numbers.
const PACKET_RESERVE: usize = 16 * 1024;

impl Engine {
    /// Deadlines and steps of one call that are due.
    pub(super) fn run_due_of_call(&mut self, key: Key, now: Moment) {
        let Some(call) = self.calls.get_mut(&key) else { return };
        let Phase::Running(running) = &mut call.phase else { return };
        if let Some(settling) = running.worker().and_then(|body| body.settling.as_ref()) {
            if settling.until <= now {
                self.give_up_settling(key);
            }
            return;
        }
        if running.spool_at.is_some_and(|moment| moment <= now) {
            running.spool_at = None;
            for output in &mut running.outputs {
                output.stream.open_file(&call.plan.call_id, &mut self.spool);
            }
        }
        if running.ending.is_none() && running.deadline.is_some_and(|deadline| deadline <= now) {
            let mode = match running.body {
                Body::Shell(_) => CancelMode::Interrupt,
                Body::Process(_) | Body::Worker(_) => CancelMode::Terminate,
            };
            let after_ms = call.plan.timeout_ms;
            return self.end_call(key, Ender::Timeout { after_ms }, mode);
        }
        let grace_ms = call.plan.grace_ms;
        let Some(ending) = running.ending.as_mut().filter(|ending| ending.next <= now) else { return };
        let (leader, kind) = match &running.body {
            Body::Shell(_) => {
                let shell = self.shells.current.as_ref();
                let is_shell = shell.is_some_and(|shell| shell.is_ready && !shell.is_replaced());
                (shell.map(|shell| shell.pid), if is_shell { Leader::Shell } else { Leader::Successor })
            }
            Body::Process(process) => (Some(process.pid), Leader::Program),
            Body::Worker(body) => (Some(body.worker.pid), Leader::Program),
        };
        let step = ending.step(kind, grace_ms, now);
        let slot = running.slot;
        // Bash decides by its own SIGINT whether the rest of a list still runs, so it has to be first, and while nobody else moves.
        let tell_leader = || {
            if let (Some(pid), Some(signal)) = (leader, step.leader)
                && signal != Signal::SIGKILL
            {
                let _ = kill(pid, signal);
                if step.breaks_list {
                    let _ = kill(pid, LIST_SIGNAL);
                }
            }
        };
        match (slot, step.others) {
            (Some(slot), Some(Signal::SIGKILL)) if step.leader == Some(Signal::SIGKILL) => self.slots.kill(slot),
            (Some(slot), Some(signal)) => self.slots.signal_after(tell_leader, slot, signal, leader),
            _ => tell_leader(),
        }
        if let (Some(pid), Some(Signal::SIGKILL)) = (leader, step.leader) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }

    /// Reads what is in the pipes of a call at its end: whoever wrote in the foreground has exited, so it is all there.
    /// A background process may go on writing; one look at what a pipe can hold is enough, and is all it gets.
    fn drain_outputs(&mut self, key: Key) {
        let Some(call) = self.calls.get_mut(&key) else { return };
        let call_id = call.plan.call_id.clone();
        let Phase::Running(running) = &mut call.phase else { return };
        if let Some(process) = running.process() {
            // From here on its end tells whether anybody else still has it.
            process.terminal = None;
        }
        for (index, output) in running.outputs.iter_mut().enumerate() {
            let (spool, stream) = (&mut self.spool, &mut output.stream);
            let Some(reader) = output.reader.take() else {
                stream.seal(spool);
                continue;
            };
            let held = if output.enlarged { capacity(&reader) } else { USUAL_PIPE };
            let drained = drain(&reader, &mut self.buffer, held, |bytes| stream.push(&call_id, bytes, spool));
            if drained != Drained::Closed && output.watched {
                let index = u8::try_from(index).unwrap_or(u8::MAX);
                self.late.add(key, index, &call_id, reader, spool);
            }
            stream.seal(spool);
        }
    }

    /// A call has ended.
    pub(super) fn finish(&mut self, key: Key, end: End) {
        let ended = now();
        self.drain_outputs(key);
        let Some(call) = self.calls.get_mut(&key) else { return };
        let phase = std::mem::replace(&mut call.phase, Phase::Prepared);
        let Phase::Running(mut running) = phase else {
            call.phase = phase;
            return;
        };
        let settling = running.worker().and_then(|body| body.settling.take());
        let used = running.slot.map(|slot| self.slots.used(slot)).unwrap_or_default();
        let used = settling.as_ref().map_or(used, |settling| settling.used);
        let program = match &running.body {
            Body::Process(process) => Some(process.program.clone()),
            Body::Worker(body) => Some(body.tool.clone()),
            Body::Shell(_) => None,
        };
        // Whoever ended the call may have hit it, or is about to.
        let has_answered = matches!(end, End::Claimed(_)) || settling.is_some_and(|settling| settling.is_answered);
        let stays = has_answered && running.ending.is_none();
        // A shell that ignores interrupts has killed itself because it was told to break off.
        let is_shell = matches!(running.body, Body::Shell(_));
        let killed_itself =
            is_shell && matches!(end, End::Process(Exit::Signal { signal, .. }) if signal == libc::SIGKILL);
        let killed = running.ending.is_some_and(|ending| ending.killed || killed_itself);
        let facts =
            Facts { end, ender: running.ending.map(|ending| ending.ender), killed, used, program: program.as_deref() };
        let outcome = outcome(&facts);
        let processes_left = self.settle_slot(key, &running, stays, &outcome, &used);
        let mut notes = std::mem::take(&mut running.notes);
        notes.extend(self.notes(key, &running, &outcome, &used, processes_left));
        let is_bash = matches!(running.body, Body::Shell(_));
        let working_directory = String::from_utf8_lossy(&self.shells.working_directory).into_owned();
        let duration_ns = ended.saturating_sub(running.started);
        let mut room = PACKET_LIMIT - PACKET_RESERVE;
        let mut streams = Vec::with_capacity(running.outputs.len());
        for output in &running.outputs {
            let summary = output.stream.summary(room, &self.spool);
            room = room.saturating_sub(summary.inline.len());
            streams.push(summary);
        }
        let Some(call) = self.calls.get_mut(&key) else { return };
        let message = CallFinished {
            call_id: call.plan.call_id.clone(),
            outcome: Some(outcome),
            streams,
            duration_ns,
            processes_left,
            usage: Some(Usage {
                cpu_usec: used.cpu_usec.unwrap_or(0),
                peak_memory_bytes: used.memory_peak.unwrap_or(0),
                shared: used.shared,
            }),
            notes,
            working_directory: if is_bash { working_directory } else { String::new() },
            shell_generation: self.shells.generation,
            started_boottime_ns: running.started,
        };
        // A runner that is told the end is told the beginning first; one that was told neither learns both from the end.
        let ahead = running.announced.ahead;
        let outputs = running.outputs.into_iter().map(|output| output.stream).collect();
        let call_id = message.call_id.clone();
        call.phase = Phase::Finished(Box::new(Finished { message, outputs, ahead, sent: false }));
        if let Body::Worker(body) = running.body {
            let stays = stays && processes_left == 0 && !body.is_large;
            self.release_worker(body, stays, &call_id);
        }
    }

    /// Ends what must not outlive the call, counts what may, and gives the slot of a process back.
    fn settle_slot(&mut self, key: Key, running: &Running, stays: bool, outcome: &Outcome, used: &Counters) -> u32 {
        let Some(slot) = running.slot else { return 0 };
        let shell = match &running.body {
            Body::Shell(_) => self.shells.current.as_ref().filter(|shell| shell.slot == slot).map(|shell| shell.pid),
            Body::Worker(body) => stays.then_some(body.worker.pid),
            Body::Process(_) => None,
        };
        // A call that was ended is ended as a whole, and so is one that the kernel began to kill for memory.
        let is_over = running.ending.is_some() && shell.is_none();
        let is_starved = used.memory_kills.unwrap_or(0) > 0 && matches!(outcome.kind, Some(Kind::OutOfMemory(_)));
        if is_over || is_starved {
            match shell {
                None => self.slots.kill(slot),
                Some(shell) => self.slots.signal(slot, Signal::SIGKILL, Some(shell)),
            }
        }
        let left = self.slots.processes(slot).into_iter().filter(|pid| Some(*pid) != shell).count();
        let call_id = self.calls.get(&key).map(|call| call.plan.call_id.clone()).unwrap_or_default();
        if matches!(running.body, Body::Worker(_)) {
            // Its slot goes with it: see `release_worker`.
        } else if shell.is_none() {
            self.slots.give_back(slot, &call_id);
        } else if left > 0 {
            self.shells.just_left = Some(call_id);
        }
        if is_over || is_starved { 0 } else { u32::try_from(left).unwrap_or(u32::MAX) }
    }

    fn notes(&self, key: Key, running: &Running, outcome: &Outcome, used: &Counters, left: u32) -> Vec<Note> {
        let mut notes = notes_of_usage(outcome, used);
        for output in &running.outputs {
            if let Some(trouble) = output.stream.trouble() {
                notes.push(note(NoteKind::DiskLimit, trouble));
            }
        }
        if left > 0 {
            let late = (0_u8..)
                .zip(&running.outputs)
                .filter(|(index, _)| self.late.is_open(key, *index))
                .map(|(index, _)| {
                    let call_id = self.calls.get(&key).map(|call| call.plan.call_id.as_str()).unwrap_or_default();
                    self.spool.path_of(call_id, LateOutput::suffix(index)).to_string_lossy().into_owned()
                })
                .next();
            let text = match late {
                Some(path) => {
                    format!("{left} background processes still run; what they print from now on is kept in {path}")
                }
                None => format!("{left} background processes still run"),
            };
            notes.push(note(NoteKind::ProcessesLeft, text));
        }
        let shell_lives = matches!(running.body, Body::Shell(_)) && self.shells.current.is_some();
        if let Some(ending) = running.ending.filter(|ending| ending.escalated && shell_lives) {
            // A list that was broken off has this status. Any other may be that of a later command.
            let is_over = ending.breaks_list && status(outcome) == Some(INTERRUPTED);
            let rest = if is_over { "was not begun" } else { "may have begun, and was killed in turn" };
            let text = format!("the command ignored the interrupt and was killed; what followed it in its list {rest}");
            notes.push(note(NoteKind::RestKilled, text));
        }
        notes
    }

    /// A call that provably never ran gets its result without ever having been running.
    pub(super) fn finish_never(&mut self, key: Key, end: End) {
        let (reason, errno, code) = match end {
            End::NeverStarted { reason, errno, code } => (reason, errno, code),
            End::Process(_) | End::Claimed(_) | End::Unknown(_) => return self.finish(key, end),
        };
        self.put_result(key, Kind::NeverStarted(NeverStarted { reason, errno, code }));
    }

    /// A call was ended before it could have had any effect.
    pub(super) fn finish_unstarted(&mut self, key: Key, ender: Ender, reason: &str) {
        let kind = match ender {
            Ender::Cancel(mode) => {
                Kind::Cancelled(Cancelled { mode: mode.into(), before_start: true, killed: false, code: 0 })
            }
            Ender::Timeout { .. } => {
                Kind::NeverStarted(NeverStarted { reason: reason.to_owned(), errno: 0, code: 125 })
            }
            Ender::Shutdown => Kind::SandboxLost(SandboxLost { reason: reason.to_owned() }),
        };
        self.put_result(key, kind);
    }

    fn put_result(&mut self, key: Key, kind: Kind) {
        let Some(call) = self.calls.get_mut(&key) else { return };
        let (notes, duration_ns) = match &mut call.phase {
            Phase::Running(running) => (std::mem::take(&mut running.notes), now().saturating_sub(running.started)),
            Phase::Prepared | Phase::Finished(_) => (Vec::new(), 0),
        };
        let is_bash = matches!(call.plan.work, Work::Bash { .. });
        let message = CallFinished {
            call_id: call.plan.call_id.clone(),
            outcome: Some(Outcome { kind: Some(kind) }),
            duration_ns,
            notes,
            working_directory: if is_bash {
                String::from_utf8_lossy(&self.shells.working_directory).into_owned()
            } else {
                String::new()
            },
            shell_generation: self.shells.generation,
            ..CallFinished::default()
        };
        call.phase = Phase::Finished(Box::new(Finished { message, outputs: Vec::new(), ahead: 0, sent: false }));
    }
}

/// The status of a call that was ended.
fn status(outcome: &Outcome) -> Option<i32> {
    match outcome.kind.as_ref()? {
        Kind::TimedOut(timed_out) => Some(timed_out.code),
        Kind::Cancelled(cancelled) => Some(cancelled.code),
        _ => None,
    }
}
