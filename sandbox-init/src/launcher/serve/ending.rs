//! Privileged: CAP_KILL over the processes of a sandbox.
//!
//! The end of one sandbox, and of the launcher. A sandbox is killed at its process 1; who has to know is told when that is
//! gone, and what it held is ordered to be removed.

use std::os::fd::{AsFd, OwnedFd};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use proto::launch::v1 as wire;
use proto::launch::v1::reply::Body as Answer;

use super::answers::unknown;
use super::process::{Phase, Unwatched};
use super::{End, Launcher, kills};
use crate::launcher::background::{Order, chain};
use crate::launcher::ids::Slot;
use crate::launcher::shape::Shape;
use crate::launcher::validate::refusal;
use crate::sys::process::pidfd_signal;

/// What is to be said when a sandbox is gone.
#[derive(Debug)]
pub(super) struct Farewell {
    ended: Option<wire::SandboxEnded>,
    /// Connection and request that asked for the end.
    answer: Option<(u32, u64)>,
}

impl Launcher<'_> {
    /// Kills a sandbox for a request, which is answered when it is gone.
    pub(super) fn kill_sandbox(&mut self, connection: u32, request_id: u64, sandbox_id: &str) {
        match self.find(sandbox_id).map(|(number, _)| number) {
            Some(number) => self.kill(number, Some((connection, request_id))),
            None => self.answer(connection, request_id, unknown(sandbox_id)),
        }
    }

    /// Kills a process 1 and everything in its sandbox. `answer`: the connection and the request that asked for it.
    pub(super) fn kill(&mut self, number: u32, answer: Option<(u32, u64)>) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        // Killing pid 1 kills its pid namespace; the kernel does not let go of it before every process in it is gone.
        let _ = pidfd_signal(process.pidfd.as_fd(), libc::SIGKILL);
        self.parts.tree.kill(&process.name);
        let sandbox_id = match &process.phase {
            Phase::Ready { sandbox_id } => Some(sandbox_id.clone()),
            Phase::Ending { sandbox_id, .. } => sandbox_id.clone(),
            Phase::Blank | Phase::Booting { .. } => None,
        };
        let answer = match (&process.phase, answer) {
            (Phase::Ending { answer: earlier, .. }, None) => *earlier,
            (_, answer) => answer,
        };
        process.phase = Phase::Ending { sandbox_id, answer };
    }

    /// A process 1 is gone: has what it held removed, and tells whoever has to know.
    pub(super) fn ended(&mut self, number: u32) {
        let Some(name) = self.processes.get(&number).map(|process| process.name.clone()) else { return };
        let oom_kills = self.parts.tree.oom_kills(&name);
        let mut memory_limit_bytes = 0;
        if oom_kills > 0 {
            memory_limit_bytes = self.parts.tree.reached_memory_limit(&name);
            self.learn_of_kills();
        }
        let Some(mut process) = self.processes.remove(&number) else { return };
        let _ = self.epoll.delete(&process.pidfd);
        if let Some(boot) = process.boot.take() {
            let _ = self.epoll.delete(&boot);
        }
        let status = wait_status(&process.pidfd);
        let (sandbox_id, answer) = match process.phase {
            Phase::Ready { sandbox_id } => (Some(sandbox_id), None),
            Phase::Ending { sandbox_id, answer } => (sandbox_id, answer),
            Phase::Booting { waiting, .. } => {
                let mut failure =
                    refusal("HOST_ERROR", "process 1 ended before it was ready", "run `sandbox-runner doctor`");
                failure.errno = libc::EPIPE;
                self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
                (None, None)
            }
            Phase::Blank => {
                self.count_failure("process 1 ended before anybody asked for it", libc::EPIPE);
                (None, None)
            }
        };
        let mounts = process.mounts.or_else(|| process.blank?.mounts);
        let removed = self.remove(process.name.clone(), process.slot, mounts);
        let last_memory_kill = kills::named(&process.killed).next_back().cloned();
        let ended = sandbox_id.map(|sandbox_id| wire::SandboxEnded {
            sandbox_id,
            wait_status: status,
            // The last may be there before it is counted.
            oom_kills: last_memory_kill.as_ref().map_or(oom_kills, |kill| kill.number.max(oom_kills)),
            memory_limit_bytes,
            last_memory_kill: last_memory_kill.filter(|kill| kill.number >= oom_kills),
        });
        let farewell = Farewell { ended, answer };
        if removed && self.parts.shape == Shape::Nested {
            // Others of the sandbox may outlive its process 1 for a moment: nobody is told before they are gone.
            self.farewells.insert(process.name, farewell);
        } else {
            self.say(farewell);
        }
    }

    /// Kills a process 1 that cannot be watched. What it held is removed when it is gone.
    pub(super) fn kill_unwatched(&mut self, unwatched: Unwatched) {
        unwatched.kill();
        self.parts.tree.kill(&unwatched.name);
        self.unwatched.push(unwatched);
        self.bury();
    }

    /// Has removed what those held that were not watched and are gone.
    pub(super) fn bury(&mut self) {
        let (gone, living) = std::mem::take(&mut self.unwatched).into_iter().partition(Unwatched::is_gone);
        self.unwatched = living;
        for Unwatched { name, slot, .. } in gone {
            self.remove(name, slot, None);
        }
    }

    /// Has removed what a sandbox held; its ids are free when that is reported. False: there is nobody to do and report it, and
    /// nobody may wait for it.
    pub(super) fn remove(&mut self, name: String, slot: Slot, mounts: Option<OwnedFd>) -> bool {
        let order =
            Order { remove: name.clone(), slot: slot.number, base: slot.base, count: slot.count, ..Order::default() };
        self.order(&order, mounts);
        if !self.background_gone {
            self.removing.insert(name, slot);
        }
        !self.background_gone
    }

    /// Tells whoever has to know that a sandbox is gone.
    pub(super) fn say(&mut self, farewell: Farewell) {
        if let Some(ended) = farewell.ended {
            self.store();
            self.tell_all(&Answer::SandboxEnded(ended));
        }
        if let Some((connection, request_id)) = farewell.answer {
            self.answer(connection, request_id, Answer::Done(wire::Done {}));
        }
    }

    /// Begins to end the launcher. Sandboxes that are ready live on, unless everything is to stop.
    pub(super) fn stop(&mut self, end: End) {
        if self.stopping.is_some() {
            return;
        }
        self.stopping = Some(end);
        let numbers: Vec<u32> = self
            .processes
            .iter()
            .filter(|(_, process)| end == End::Stopped || !matches!(process.phase, Phase::Ready { .. }))
            .map(|(number, _)| *number)
            .collect();
        for number in numbers {
            self.kill(number, None);
        }
    }

    /// Whether the program can be replaced now.
    pub(super) fn may_replace(&self) -> Result<(), wire::Failure> {
        let Some(program) = self.program.filter(|_| self.parts.replaceable) else {
            return Err(refusal(
                "NOT_ALLOWED",
                "the policy names no program to replace this one",
                "set program in the policy file",
            ));
        };
        program.check().map(drop).map_err(|error| {
            refusal("NOT_ALLOWED", chain(&error), "give the program and its directory to root, writable by nobody else")
        })
    }

    /// How the launcher ends, once nothing is under way any more.
    pub(super) fn finished(&self) -> Option<End> {
        let end = self.stopping?;
        let busy =
            self.processes.values().any(|process| end == End::Stopped || !matches!(process.phase, Phase::Ready { .. }));
        let busy = busy || !self.unwatched.is_empty() || !self.removing.is_empty();
        (!busy && self.making.is_empty()).then_some(end)
    }
}

/// Wait status as in wait(2); -1 for a process that is not our child.
fn wait_status(pidfd: &OwnedFd) -> i32 {
    match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
        Ok(WaitStatus::Exited(_, code)) => code << 8,
        Ok(WaitStatus::Signaled(_, signal, core)) => signal as i32 | if core { 0x80 } else { 0 },
        _ => -1,
    }
}
