//! Privileged: writes the freezer of groups that belong to the launcher.
//!
//! A workload is made to stand still, and the kernel is asked for its memory meanwhile. That takes as long as a disk needs, so
//! the background process does it, and what came of it is in the inspection of the sandbox.

use nix::errno::Errno;
use proto::launch::v1 as wire;
use proto::launch::v1::reply::Body as Answer;

use super::Launcher;
use super::answers::{host_error, unknown};
use super::process::Memory;
use crate::launcher::background::{Order, Report};
use crate::launcher::log;

impl Launcher<'_> {
    /// Stops or continues the work of a sandbox.
    pub(super) fn freeze(&mut self, request: &wire::FreezeSandbox) -> Answer {
        let Some((number, process)) = self.find(&request.sandbox_id) else { return unknown(&request.sandbox_id) };
        if let Err(error) = self.parts.tree.freeze(&process.name, request.frozen) {
            return Answer::Failure(host_error(&error));
        }
        if request.frozen {
            self.reclaim(number);
        }
        Answer::Done(wire::Done {})
    }

    /// Has the memory of a workload asked back, once at a time: a runner that freezes again and again orders no more than that.
    fn reclaim(&mut self, number: u32) {
        let (reclaims, gone) = (self.parts.tree.reclaims(), self.background_gone);
        let Some(process) = self.processes.get_mut(&number).filter(|process| process.memory != Memory::Asked) else {
            return;
        };
        if !reclaims {
            process.memory = Memory::Reclaimed(wire::Reclaim { bytes: 0, errno: libc::EOPNOTSUPP });
            self.say_what_stays(libc::EOPNOTSUPP);
        } else if !gone {
            process.memory = Memory::Asked;
            let order = Order { reclaim: process.name.clone(), ..Order::default() };
            self.order(&order, None);
        }
    }

    /// The background process is done with asking. The sandbox may be gone by now.
    pub(super) fn reclaimed(&mut self, report: &Report) {
        if let Some(process) = self.processes.values_mut().find(|process| process.name == report.reclaimed) {
            process.memory = Memory::Reclaimed(wire::Reclaim { bytes: report.reclaimed_bytes, errno: report.errno });
        }
        self.say_what_stays(report.errno);
    }

    /// Why memory of what stands still stays in use, for the operator: once, until there is another reason.
    fn say_what_stays(&mut self, errno: i32) {
        if ![0, libc::ECANCELED, self.reclaim_told].contains(&errno) {
            self.reclaim_told = errno;
            let why = Errno::from_raw(errno).desc();
            log(&format!("the kernel does not give back all memory of sandboxes that stand still: {why}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::super::pool::tests::{launcher, pair};
    use super::super::process::{Phase, Process};
    use super::*;
    use crate::launcher::background::PACKET_BYTES;
    use crate::launcher::cgroup::Tree;
    use crate::sys::process::pidfd_open;
    use crate::sys::socket::receive;

    #[test]
    fn memory_that_is_being_asked_for_is_not_asked_for_again_and_what_came_of_it_is_told() {
        let directory = tempfile::tempdir().expect("a directory");
        let group = directory.path().join("s-test-1/work");
        std::fs::create_dir_all(&group).expect("a directory");
        std::fs::write(group.join("cgroup.freeze"), "0").expect("written");
        let ((background, theirs), (connection, _runner)) = (pair(), pair());
        let mut launcher = launcher(directory.path(), background, connection);
        launcher.parts.tree = Tree::unified_at(directory.path());
        let slot = launcher.parts.slots.adopt(0).expect("a slot");
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let process = Process {
            name: "s-test-1".to_owned(),
            pid,
            pidfd: pidfd_open(pid).expect("a pidfd"),
            boot: None,
            blank: None,
            mounts: None,
            slot,
            phase: Phase::Ready { sandbox_id: "a".to_owned() },
            adopted: true,
            record: None,
            memory: Memory::default(),
            killed: std::collections::VecDeque::new(),
        };
        launcher.processes.insert(7, process);
        let freeze = |frozen| wire::FreezeSandbox { sandbox_id: "a".to_owned(), frozen };

        for frozen in [true, false, true, true] {
            assert_eq!(launcher.freeze(&freeze(frozen)), Answer::Done(wire::Done {}));
        }

        let order = receive(&theirs, PACKET_BYTES).expect("a packet").expect("an order");
        assert_eq!(Order::decode(order.bytes.as_slice()).expect("an order").reclaim, "s-test-1");
        assert!(launcher.orders.is_empty());
        let mut waiting = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&theirs), nix::poll::PollFlags::POLLIN)];
        assert_eq!(nix::poll::poll(&mut waiting, nix::poll::PollTimeout::ZERO), Ok(0), "ordered again");
        let came = wire::Reclaim { bytes: 5, errno: libc::EAGAIN };
        let report = Report { reclaimed: "s-test-1".to_owned(), reclaimed_bytes: 5, errno: 11, ..Report::default() };
        launcher.reclaimed(&report);
        assert_eq!(launcher.processes.get(&7).map(|process| process.memory), Some(Memory::Reclaimed(came)));
        assert_eq!(launcher.freeze(&freeze(true)), Answer::Done(wire::Done {}));
        assert_eq!(launcher.processes.get(&7).map(|process| process.memory), Some(Memory::Asked), "it has new memory");
    }
}
