//! A greeting that arrives after the next one, of the same process or of its successor.

use super::black_hole::{RUNS, SESSION, WAITS};
use super::*;

impl World {
    /// With `dies` the process that has greeted dies; otherwise it gives its link up and greets again.
    pub(in super::super) async fn late_greeting(mut self, dies: bool) -> Result<(), String> {
        self.begin_calls("5000 3 0").await?;
        self.hang_up();
        self.wires.clear();
        while self.current.is_none() {
            self.dial()?;
        }
        for _ in 0..10 {
            self.send();
        }
        // All of it is under way when its sender gives up.
        let mut late = self.wires.pop().ok_or("no wire")?;
        self.current = None;
        late.cut(usize::MAX, 0);
        if dies {
            self.die(None);
        } else if let Some(life) = &mut self.life {
            life.connector.hang_up();
        }
        self.until("both ends", |world| world.is_final(RUNS) && world.is_final(WAITS) && world.is_linked()).await?;
        let (links, up) = (self.tally.counts[0], late.under_way().0);
        if up == 0 {
            return Err("nothing was under way".into());
        }
        while late.orchestrator_is_there {
            late.arrive(&self.store);
        }
        self.look()?;
        self.store.call(SESSION, "after", "100 0 0");
        self.calls.push((SESSION.into(), "after".into()));
        self.until("the next call", |world| world.is_final("after")).await?;
        if self.tally.counts[0] != links {
            return Err("the link was lost".into());
        }
        self.finish().await
    }

    fn is_linked(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.connector.is_live() && life.connector.is_delivered())
    }
}
