//! Who is killed, when, and who is started again.

use std::time::{Duration, Instant};

use sandbox_runner_tests::daemon::{Daemon, Random};
use sandbox_runner_tests::host;
use sandbox_runner_tests::runner::scaled;

use crate::account::{Account, wall_ns};

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Victim {
    Runner,
    Launcher,
    /// The launcher's helper; without it the launcher ends with everything it holds.
    Background,
    Process1,
    Spawner,
    Workload,
}

impl Victim {
    /// One after the other. The helper takes every sandbox along, so it has fewer turns.
    const TURNS: [Self; 12] = [
        Self::Process1,
        Self::Runner,
        Self::Launcher,
        Self::Workload,
        Self::Runner,
        Self::Spawner,
        Self::Launcher,
        Self::Process1,
        Self::Runner,
        Self::Workload,
        Self::Launcher,
        Self::Background,
    ];
    /// How many there are.
    pub(crate) const KINDS: usize = 6;
}

/// Longest time for which nobody starts a runner again, and longest time between two kills, in milliseconds.
const GAP: u64 = 500;
const PAUSE: u64 = 500;

/// Kills everybody in turn, each at a random moment, and does what a service manager does.
pub(crate) struct Killer<'a> {
    pub(crate) daemon: &'a mut Daemon,
    pub(crate) account: &'a Account,
    random: Random,
    /// When the runner was killed, and when it is to be started again.
    away: Option<(u128, Instant)>,
    /// The wire keeps what a runner that is gone has said, until there are more links than so many.
    kept: Option<u64>,
    /// The helper was killed, and the launcher has yet to end.
    launcher_ends: bool,
}

impl<'a> Killer<'a> {
    pub(crate) fn new(daemon: &'a mut Daemon, account: &'a Account, seed: u64) -> Self {
        let random = Random::new(seed ^ 0x5851_f42d);
        Self { daemon, account, random, away: None, kept: None, launcher_ends: false }
    }

    pub(crate) async fn kill(&mut self, kills: u64) {
        let mut killed = 0;
        let mut turn = 0_usize;
        // What must have happened for the run to mean something may need a few more.
        while killed < kills || (!self.has_seen_everything() && killed < 3 * kills) {
            self.tend().await;
            // Most kills hit a service that works; the others hit one that is away or just starting.
            if self.away.is_none() && self.random.below(4) != 0 {
                let works = async {
                    self.daemon.orchestrator.runner().await.expect("an orchestrator");
                    while self.account.workspaces().is_empty() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                };
                // While the runner cannot connect, tending it is more useful than waiting.
                if tokio::time::timeout(Duration::from_secs(2), works).await.is_err() {
                    continue;
                }
            }
            // On a slow machine longer, so that as many calls begin and end between two kills.
            tokio::time::sleep(scaled(Duration::from_millis(self.random.below(PAUSE)))).await;
            let victim = Victim::TURNS[turn % Victim::TURNS.len()];
            // What does not exist at this moment has its turn when it does.
            if self.strike(victim).await {
                *self.account.figures().killed.entry(victim).or_default() += 1;
                killed += 1;
                turn += 1;
                if killed % 100 == 0 {
                    println!("{killed} kills");
                }
            }
        }
    }

    /// Calls have ended without a runner, and a runner was heard after its successor.
    fn has_seen_everything(&self) -> bool {
        self.account.figures().ended_alone > 0 && self.daemon.orchestrator.late_runners() > 0
    }

    /// Starts again what has ended and is due, and lets late frames pass when there is a new link.
    pub(crate) async fn tend(&mut self) {
        let before = self.daemon.restarts;
        if self.launcher_ends {
            // What was opened while it was ending is gone as well, and that may be told as soon as the next one is there.
            self.account.hits_all();
        }
        self.daemon.tend_launcher().await;
        if self.daemon.restarts != before {
            self.launcher_ends = false;
        }
        match self.away {
            Some((_, due)) if Instant::now() < due => {}
            Some((since, _)) => {
                self.account.was_alone(since, wall_ns());
                self.away = None;
                self.daemon.tend_runner();
            }
            None => self.daemon.tend_runner(),
        }
        if self.kept.is_some_and(|links| self.daemon.orchestrator.links() > links) {
            self.kept = None;
            self.daemon.wire.release();
        }
    }

    /// Kills the victim, if it exists at this moment.
    async fn strike(&mut self, victim: Victim) -> bool {
        match victim {
            Victim::Runner => return self.kill_runner().await,
            Victim::Launcher => self.daemon.launcher_pid(),
            Victim::Background => self.helper().inspect(|_| {
                self.account.hits_all();
                self.launcher_ends = true;
            }),
            Victim::Process1 | Victim::Spawner | Victim::Workload => self.member(victim),
        }
        .inspect(|pid| host::kill_now(*pid))
        .is_some()
    }

    fn helper(&self) -> Option<u32> {
        host::children_of(self.daemon.launcher_pid()?).into_iter().find(|pid| host::is_outside(*pid))
    }

    /// A process of some sandbox.
    fn member(&mut self, victim: Victim) -> Option<u32> {
        let (session_id, workspace) = {
            let workspaces = self.account.workspaces();
            let index = self.random.below(workspaces.len().max(1) as u64);
            let (session_id, workspace) = workspaces.iter().nth(usize::try_from(index).ok()?)?;
            (session_id.clone(), workspace.clone())
        };
        if !workspace.lives() {
            return None;
        }
        if victim == Victim::Workload {
            return workspace.worker();
        }
        let pid = if victim == Victim::Process1 { workspace.process_1 } else { workspace.spawner()? };
        self.account.hits(&session_id);
        Some(pid)
    }

    /// Kills the runner. Every other time it is away for a while, so that calls end without it; and every third time what it
    /// said last arrives only when the next one is there.
    async fn kill_runner(&mut self) -> bool {
        if self.daemon.runner_pid().is_none() {
            return false;
        }
        let is_linked = tokio::time::timeout(Duration::ZERO, self.daemon.orchestrator.runner()).await.is_ok();
        if is_linked && self.kept.is_none() && self.random.below(3) == 0 {
            self.kept = Some(self.daemon.orchestrator.links());
            self.daemon.wire.keep_what_comes_from_the_runner();
            tokio::time::sleep(Duration::from_millis(self.random.below(100))).await;
        }
        self.daemon.kill_runner();
        let gap = if self.random.below(2) == 0 { 0 } else { self.random.below(GAP) };
        self.away = Some((wall_ns(), Instant::now() + Duration::from_millis(gap)));
        true
    }
}
