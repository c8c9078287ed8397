//! What goes wrong in a world, and the next runner after it.

use super::*;

impl World {
    /// A process begins, and may die while it recovers what the one before it has left.
    pub(super) fn begin(&mut self) -> Result<(), String> {
        let dies = !self.quiet && self.enabled.contains(&Fault::RunnerDiesWriting) && self.random.one_in(3);
        let dies_at = dies.then(|| self.random.index(14));
        let Some(opened) = self.machine.open(dies_at)? else {
            self.machine = self.machine.after_process_crash();
            self.note("runner died while it recovered");
            return Ok(());
        };
        if opened.1.term < self.highest_term && !self.is_set_back {
            return Err(format!(
                "I4: term {} was obeyed, and the next runner knows of {}",
                self.highest_term, opened.1.term
            ));
        }
        self.tally.counts[1] += 1;
        let instance = format!("instance-{}", self.tally.counts[1]);
        self.note(format!(
            "{instance} begins with {} sessions, {} calls",
            opened.1.sessions.len(),
            opened.1.calls.len()
        ));
        let (host, mistake) = (Arc::clone(&self.host), self.mistake);
        let surroundings = Surroundings { host, instance, credentials: credentials(), clock: boottime_ns, mistake };
        self.life = Some(Life::begin(opened, surroundings));
        Ok(())
    }

    /// The runner dies; with `writing`, at that operation of writing what waits.
    pub(super) fn die(&mut self, writing: Option<usize>) {
        self.hang_up();
        let Some(life) = self.life.take() else { return };
        self.note(format!("runner dies with {} records waiting, writing {writing:?}", life.journal.waiting()));
        if let Some(operation) = writing {
            life.journal.die(operation);
        }
        drop(life);
        let random = &mut self.random;
        self.host.lock().unwrap().runner_died(boottime_ns(), |bound| random.index(bound));
        self.machine = self.machine.after_process_crash();
    }

    pub(super) async fn fault(&mut self, fault: Fault) -> Result<(), String> {
        let happened = match fault {
            Fault::Cut => {
                self.note("link cut");
                let any = self.current.is_some();
                self.hang_up();
                any
            }
            Fault::Stall | Fault::OneWay => {
                let both = fault == Fault::Stall;
                let way = self.random.index(2);
                match self.current {
                    Some(current) => {
                        let stalled = &mut self.wires[current].stalled;
                        *stalled = if both { [true; 2] } else { [way == 0, way == 1] };
                        self.note(format!("link stalls, both ways: {both}, else {way}"));
                        // It is found to be dead, or goes on, before the next fault of this kind.
                        let wait = Duration::from_secs(self.random.below(45));
                        for _ in 0..self.random.below(60) {
                            self.step().await?;
                        }
                        self.pass(wait, false).await;
                        match self.current {
                            Some(_) if wait >= Duration::from_secs(30) => self.hang_up(),
                            Some(current) => self.wires[current].stalled = [false; 2],
                            None => {}
                        }
                        true
                    }
                    None => false,
                }
            }
            Fault::RunnerDies => {
                let alive = self.life.is_some();
                self.die(None);
                alive
            }
            Fault::RunnerDiesWriting => {
                let waits = self.life.as_ref().is_some_and(|life| life.journal.waiting() > 0);
                let operation = self.random.index(6);
                self.die(Some(operation));
                waits
            }
            Fault::PowerCut => {
                let operation = self.random.index(6);
                self.die(Some(operation));
                self.note("power fails");
                let random = &mut self.random;
                self.machine = self.machine.after_power_cut(|bound| random.index(bound));
                self.copy = None;
                self.host.lock().unwrap().power_cut();
                true
            }
            Fault::FailOver => {
                self.store.fail_over();
                self.note(format!("replica of term {} takes over", self.store.term()));
                true
            }
            Fault::StaleReplica => {
                self.hang_up();
                self.next_is_stale = true;
                self.highest_term > 1
            }
            Fault::TimeJump => {
                let time = Duration::from_secs(60 * self.random.below(200));
                self.note(format!("asleep for {} s", time.as_secs()));
                self.pass(time, true).await;
                true
            }
            Fault::TimePasses => {
                let time = Duration::from_secs(self.random.below(50));
                self.pass(time, false).await;
                true
            }
            Fault::SandboxDies => {
                let sandbox_id = if self.random.one_in(3) { self.some_sandbox() } else { None };
                if let Some(sandbox_id) = &sandbox_id {
                    self.note(format!("{sandbox_id} dies"));
                    self.host.lock().unwrap().lose(sandbox_id, "killed");
                }
                sandbox_id.is_some()
            }
            Fault::SentAgain => {
                let call_id = self.calls.get(self.random.index(self.calls.len())).map(|(_, call_id)| call_id.clone());
                call_id.is_some_and(|call_id| self.store.call_again(&call_id))
            }
            Fault::OlderPlacement => {
                let session_id = self.sessions.get(self.random.index(self.sessions.len()));
                session_id.is_some_and(|session_id| self.store.close_older_placement(session_id))
            }
            Fault::SetBack => self.set_back().await?,
            Fault::SyncFails => match self.life.as_ref().filter(|_| self.random.one_in(3)) {
                Some(life) => {
                    life.journal.fail_sync();
                    self.note("the next sync fails");
                    true
                }
                None => false,
            },
        };
        if happened {
            *self.tally.faults.entry(fault).or_default() += 1;
        }
        Ok(())
    }
}
