//! A link on which nothing passes, and nobody is told, for longer than a test could wait.

use proto::runner::v1::outcome::Kind;

use super::*;

pub(super) const SESSION: &str = "session-0";
pub(super) const RUNS: &str = "call-0";
pub(super) const WAITS: &str = "call-1";
/// What a runner gives a sandbox beyond its lease when nobody says.
const ORPHAN_TIME: Duration = Duration::from_secs(8100);
/// Time that passes between two looks.
const STRIDE: Duration = Duration::from_secs(5);

impl World {
    /// A call ends meanwhile, and another waits behind it.
    pub(in super::super) async fn nothing_passes_for(mut self, length: Duration) -> Result<(), String> {
        self.begin_calls("60000 3 0").await?;
        self.fall_silent(length, |world, _| {
            if world.begun(WAITS) > 0 { Err("a call began without a lease".into()) } else { Ok(()) }
        })
        .await?;
        let alive = self.host.lock().unwrap().sandboxes.values().any(|sandbox| sandbox.alive);
        if !alive {
            return Err("the sandbox is gone".into());
        }
        self.come_back().await?;
        for (call_id, code) in [(RUNS, 3), (WAITS, 0)] {
            let known = self.store.known(call_id).ok_or("a call is unknown")?;
            let exited = Kind::Exited(pb::Exited { code });
            if known.outcome != Some(exited) || known.has_holes || self.begun(call_id) != 1 {
                return Err(format!("{call_id} began {} times: {known:?}", self.begun(call_id)));
            }
        }
        self.finish().await
    }

    /// A call runs all the time, and its sandbox does not outlive its orphan time.
    pub(in super::super) async fn nothing_passes_for_too_long(mut self) -> Result<(), String> {
        self.begin_calls("60000 3 1").await?;
        let limit = LEASE + ORPHAN_TIME;
        self.fall_silent(limit + Duration::from_secs(1800), |world, silent| {
            let alive = world.host.lock().unwrap().sandboxes.values().any(|sandbox| sandbox.alive);
            // The lease counts from its last renewal, which may be that old.
            let (earliest, latest) = (limit - LEASE, limit + STRIDE);
            match alive {
                true if silent > latest => Err(format!("the sandbox lives after {silent:?}")),
                false if silent < earliest => Err(format!("the sandbox has ended after {silent:?}")),
                _ => Ok(()),
            }
        })
        .await?;
        self.come_back().await?;
        let outcome = |call_id| self.store.known(call_id).and_then(|known| known.outcome);
        match (outcome(RUNS), outcome(WAITS)) {
            (Some(Kind::Indeterminate(_)), Some(Kind::NeverStarted(_))) if self.begun(WAITS) == 0 => {}
            outcomes => return Err(format!("told {outcomes:?}")),
        }
        self.finish().await
    }

    pub(super) async fn begin_calls(&mut self, command: &str) -> Result<(), String> {
        self.scripted = true;
        self.enabled.clear();
        self.store.open_session(SESSION);
        self.sessions.push(SESSION.into());
        self.until("the session", |world| world.store.session_is(SESSION).0).await?;
        for (call_id, command) in [(RUNS, command), (WAITS, "100 0 0")] {
            self.store.call(SESSION, call_id, command);
            self.calls.push((SESSION.into(), call_id.into()));
        }
        let accepted = |world: &Self| world.store.known(WAITS).is_some_and(|known| known.accepted);
        self.until("a call that runs", |world| world.begun(RUNS) == 1 && accepted(world)).await
    }

    /// Nothing passes from here on. What the kernel would notice is noticed: a connection that does not answer ends.
    async fn fall_silent(
        &mut self,
        length: Duration,
        look: impl Fn(&Self, Duration) -> Result<(), String>,
    ) -> Result<(), String> {
        if self.begun(WAITS) > 0 {
            return Err("the call that is to wait has begun already".into());
        }
        self.black_hole = true;
        self.wires.iter_mut().for_each(|wire| wire.stalled = [true; 2]);
        let from = boottime_ns();
        // The lease is over before anything else happens.
        self.pass(LEASE, false).await;
        for _ in 0..100 {
            self.with_life(|life, _| life.connector.look_around())?;
            self.with_life(|life, _| {
                life.work();
                Ok(())
            })?;
        }
        self.hang_up();
        loop {
            let silent = Duration::from_nanos(boottime_ns() - from);
            if silent >= length {
                return Ok(());
            }
            // What was under way is lost.
            if self.current.is_none() {
                self.wires.clear();
            }
            self.pass(STRIDE, false).await;
            for _ in 0..20 {
                self.step().await?;
            }
            look(self, silent)?;
        }
    }

    async fn come_back(&mut self) -> Result<(), String> {
        self.black_hole = false;
        self.hang_up();
        self.wires.clear();
        self.until("both ends", |world| world.is_final(RUNS) && world.is_final(WAITS)).await
    }

    pub(super) async fn finish(&mut self) -> Result<(), String> {
        (self.scripted, self.quiet) = (false, true);
        self.until("the end", Self::is_done).await?;
        self.last_look()
    }

    pub(super) async fn until(&mut self, what: &str, reached: impl Fn(&Self) -> bool) -> Result<(), String> {
        for _ in 0..PATIENCE {
            if reached(self) {
                return Ok(());
            }
            self.step().await?;
        }
        Err(format!("{what} did not come: {}", self.state()))
    }

    fn begun(&self, call_id: &str) -> u32 {
        let begun = CallId::new(call_id).ok().and_then(|id| self.host.lock().unwrap().ledger.get(&id).copied());
        begun.unwrap_or(0)
    }
}
