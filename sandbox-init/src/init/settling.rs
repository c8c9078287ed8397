//! What became of a file whose tool was killed: asked before the end of the call is told.
//!
//! A tool that replaces a file writes down what it is about to do, and a tool that is killed has done it whole or not at all.
//! So another worker compares, and the call is told as done, as what ended it, or, when something else has touched the
//! file since, as something that cannot be known. Nothing is done a second time.

use crate::sys::child::Exit;
use crate::tool::{Found, read_intent};
use nix::sys::signal::{Signal, kill};
use proto::init::v1::NoteKind;

use super::call::{Call, Phase, Settling};
use super::cause::{End, note};
use super::clock::{MILLISECOND, now};
use super::event::Key;
use super::serve::Engine;
use super::tool_worker::{Arrived, Look, ToolRequest, ToolWorker};

/// How long the answer is waited for. Two names are looked up, or a file is read that has just been written.
const PATIENCE: u64 = 5_000 * MILLISECOND;
/// An answer of a worker of ours is shorter.
const ANSWER_BYTES: usize = 64 * 1024;

impl Settling {
    /// Reads what has arrived of the answer.
    pub(super) fn look(&mut self, worker: &ToolWorker, arrived: &mut Arrived, buffer: &mut [u8]) -> Look {
        let answer = &mut self.answer;
        let look = worker.look(arrived, buffer, |bytes| answer.extend_from_slice(bytes));
        if answer.len() > ANSWER_BYTES { Look::Nonsense } else { look }
    }
}

impl Engine {
    /// The worker of a call that replaces a file has died without an answer.
    pub(super) fn settle(&mut self, key: Key, exit: Exit) {
        let Some(call) = self.calls.get_mut(&key) else { return };
        let (plan, call_id) = (call.plan.clone(), call.plan.call_id.clone());
        let Phase::Running(running) = &mut call.phase else { return };
        let has_answered = running.outputs.iter().any(|output| output.stream.total() > 0);
        let Some(body) = running.worker() else { return };
        if body.settling.is_some() {
            return self.settled(key);
        }
        let Some(intent) = read_intent(&body.worker.intents) else {
            // It had not come so far, unless it lies; and then the file is its own.
            return self.tell_settled(key, exit, Found::Unchanged);
        };
        let tool = body.tool.clone();
        let super::prepare::Work::Tool { input_json, .. } = plan.work else { return };
        let next = if has_answered { None } else { self.asked_worker(&ToolRequest { tool, input_json, intent }).ok() };
        let Some(next) = next else { return self.tell_settled(key, exit, Found::Neither) };
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return };
        let (ending, slot) = (running.ending, next.slot);
        let Some(body) = running.worker() else { return };
        let dead = std::mem::replace(&mut body.worker, next);
        body.arrived = Arrived::default();
        let used = self.slots.used(dead.slot);
        let until = now().saturating_add(PATIENCE);
        body.settling = Some(Settling { exit, ending, used, until, answer: Vec::new(), is_answered: false });
        running.slot = Some(slot);
        self.slots.kill(dead.slot);
        self.slots.give_back(dead.slot, &call_id);
    }

    /// Nobody waits for the answer any more.
    pub(super) fn give_up_settling(&mut self, key: Key) {
        let Some(body) = self.calls.get_mut(&key).and_then(Call::running).and_then(|running| running.worker()) else {
            return;
        };
        // The end is told when it is reaped.
        let _ = kill(body.worker.pid, Signal::SIGKILL);
        if let Some(settling) = &mut body.settling {
            settling.until = u64::MAX;
        }
    }

    /// The answer is there, or will never be.
    pub(super) fn settled(&mut self, key: Key) {
        let Some(call) = self.calls.get_mut(&key) else { return };
        let call_id = &call.plan.call_id;
        let Phase::Running(running) = &mut call.phase else { return };
        let Some(settling) = running.worker().and_then(|body| body.settling.as_mut()) else { return };
        let (exit, ending, answer) = (settling.exit, settling.ending, std::mem::take(&mut settling.answer));
        // Whoever ended it meanwhile came too late.
        running.ending = ending;
        let (found, result) = Found::decode(&answer).unwrap_or((Found::Neither, &[]));
        if found == Found::Replaced
            && ending.is_none()
            && let Some(output) = running.outputs.first_mut()
        {
            output.stream.push(call_id, result, &mut self.spool);
        }
        self.tell_settled(key, exit, found);
    }

    fn tell_settled(&mut self, key: Key, exit: Exit, found: Found) {
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return };
        let (kind, text) = match found {
            Found::Replaced => {
                (NoteKind::FileReplaced, "the tool was killed when it had done its work; the file has the new content")
            }
            Found::Unchanged => (
                NoteKind::FileUnchanged,
                "the tool was killed before it changed anything; the file is what it was before",
            ),
            Found::Neither => (
                NoteKind::FileUncertain,
                "the tool was killed, and the file is neither what it was nor what was to be made of it",
            ),
        };
        running.notes.push(note(kind, text));
        let end = match found {
            Found::Replaced => End::Claimed(0),
            Found::Unchanged => End::Process(exit),
            Found::Neither => End::Unknown("the tool was killed before it had answered".to_owned()),
        };
        self.finish(key, end);
    }
}
