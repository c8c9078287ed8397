//! The state of the runner is set back to an old copy for a while, and then the newest one is put back.
//!
//! Where the orchestrator could not tell the copy from the newest one, it is away: such a runner would be served, and with
//! reason, because nothing that it has forgotten is owed.

use super::*;

impl World {
    /// Takes a copy, or puts it in place of what there is; false while there is no copy, or nobody who would notice.
    pub(super) async fn set_back(&mut self) -> Result<bool, String> {
        let Some(copy) = self.copy.take() else {
            self.copy = Some(self.machine.after_process_crash());
            return Ok(false);
        };
        self.die(None);
        let newest = std::mem::replace(&mut self.machine, copy);
        let is_seen = self.lacks_what_is_owed()?;
        let (was_scripted, length) = (std::mem::replace(&mut self.scripted, true), 300 + self.random.below(600));
        (self.is_set_back, self.black_hole) = (true, !is_seen);
        // It does not know the newest term, so a replica of an older one would be obeyed.
        self.next_is_stale = false;
        self.wires.iter_mut().for_each(|wire| wire.stalled = [self.black_hole; 2]);
        self.note(format!("state is set back, the orchestrator can see that: {is_seen}"));
        let ended = {
            let mut host = self.host.lock().unwrap();
            host.is_set_back = true;
            host.ended
        };
        for _ in 0..length {
            self.step().await?;
            if self.host.lock().unwrap().ended > ended {
                return Err("I7: a runner whose state was set back has ended what nobody had said it may".into());
            }
        }
        self.die(None);
        self.host.lock().unwrap().is_set_back = false;
        (self.is_set_back, self.black_hole, self.scripted) = (false, false, was_scripted);
        self.wires.clear();
        self.machine = newest;
        self.note("the newest state is back");
        Ok(true)
    }

    /// Whether the end of a call that was accepted is not here, or not all of its output, and the journal in place does not know it.
    ///
    /// What the runner has sent before may still arrive before the copy greets. A call that is all here then may have been
    /// acknowledged and forgotten by whoever greets, so such a copy could not be told from the newest state.
    fn lacks_what_is_owed(&self) -> Result<bool, String> {
        let Some((_, recovered)) = self.machine.after_process_crash().open(None)? else { return Ok(false) };
        let knows = |call_id: &str| recovered.calls.iter().any(|call| call.call.call_id.as_str() == call_id);
        let is_owed = |call_id: &str| {
            let Some(known) = self.store.known(call_id) else { return false };
            let comes = self.wires.iter().any(|wire| wire.may_complete(call_id, known.has_end));
            known.accepted && known.outcome.is_none() && known.refused.is_none() && !comes
        };
        Ok(self.calls.iter().any(|(_, call_id)| is_owed(call_id) && !knows(call_id)))
    }
}
