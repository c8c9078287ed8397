//! Privileged: takes id ranges and has blanks made in them.
//!
//! Keeps as many blanks as requests wait, one more while sandboxes are asked for one after the other, and when nobody asks
//! for anything as many as the policy wants on top. A host on which blanks fail one after the other has its requests refused
//! instead of tried for ever.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::sys::epoll::EpollTimeout;
use proto::launch::v1::reply::Body as Answer;

use super::answers::{host_error, no_slot_left};
use super::process::{Memory, Phase, Process, Unwatched};
use super::{Event, Launcher};
use crate::launcher::background::{Order, Report, blank_from};
use crate::launcher::ids::Slot;
use crate::launcher::spawn::Blank;
use crate::launcher::validate::refusal;

/// Time without a request before the pool is filled again: on a small machine a refill competes with the sandbox that was
/// just handed out.
pub(super) const REFILL_DELAY: Duration = Duration::from_millis(15);
/// How long the mounts of a blank that has become a sandbox are kept when there is no quiet moment.
const SPENT_AT_MOST: Duration = Duration::from_secs(1);
/// Blanks that may fail, without a sandbox that has booted from one in between, before requests are refused instead of tried again.
const MAX_FAILURES: u32 = 3;

impl Launcher<'_> {
    /// Orders the blanks that are missing. For requests that wait at once, for the pool when it has been quiet for a moment.
    pub(super) fn refill(&mut self) {
        // Requests that wait hear of the end when their connection closes.
        if self.stopping.is_some() {
            return;
        }
        let idle = self.last_request.elapsed() >= REFILL_DELAY;
        // A runner that never rests must not keep uppers of sandboxes that are gone.
        while self.spent.front().is_some_and(|(since, _)| idle || since.elapsed() >= SPENT_AT_MOST) {
            self.spent.pop_front();
        }
        while self.blanks() < if idle { self.wanted_blanks() } else { self.waiting.len() + self.ahead() } {
            match self.parts.slots.take() {
                Ok(Some(slot)) => {
                    let number = self.number();
                    let name = format!("{}-{number:x}", self.parts.prefix);
                    let order = Order {
                        make: name.clone(),
                        slot: slot.number,
                        base: slot.base,
                        count: slot.count,
                        forecast: self.forecast.clone(),
                        ..Order::default()
                    };
                    self.making.insert(name, slot);
                    self.order(&order, None);
                }
                Err(error) => {
                    // No wait heals it: whoever has no blank on its way hears the cause.
                    let failure = host_error(&error);
                    while self.waiting.len() > self.blanks() {
                        let Some(waiting) = self.waiting.pop_back() else { break };
                        self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure.clone()));
                    }
                    return;
                }
                Ok(None) => {
                    // All ids are taken. A blank of ours would have been handed out; what waits is refused now, not later.
                    if self.blanks() == 0 && self.removing.is_empty() && self.unwatched.is_empty() {
                        while let Some(waiting) = self.waiting.pop_front() {
                            self.answer(
                                waiting.connection,
                                waiting.request_id,
                                Answer::Failure(no_slot_left(self.parts.shape)),
                            );
                        }
                    }
                    return;
                }
            }
        }
    }

    /// A blank is there: the first request that waits gets it.
    pub(super) fn made(&mut self, report: Report, descriptors: Vec<OwnedFd>) {
        let Some((name, slot)) = self.making.remove_entry(&report.made) else { return };
        let pid = report.pid;
        let Some(blank) = blank_from(report, descriptors) else {
            self.kill_unwatched(Unwatched { name, slot, pid, pidfd: None });
            return self.count_failure("no descriptors were left for process 1", libc::EMFILE);
        };
        let number = self.number();
        let (pidfd, boot) = match self.watch_blank(number, &blank) {
            Ok(watched) => watched,
            Err(error) => return self.give_up(blank, slot, &error),
        };
        let process = Process {
            name,
            pid: blank.pid.as_raw(),
            pidfd,
            boot: Some(boot),
            blank: Some(blank),
            mounts: None,
            slot,
            phase: Phase::Blank,
            adopted: false,
            record: None,
            memory: Memory::default(),
            killed: VecDeque::new(),
        };
        self.processes.insert(number, process);
        if self.stopping.is_some() {
            self.kill(number, None);
        } else {
            self.hand_out();
        }
    }

    /// Watches the boot socket and the end of a blank, or neither.
    fn watch_blank(&self, number: u32, blank: &Blank) -> io::Result<(OwnedFd, OwnedFd)> {
        let (pidfd, boot) = (blank.pidfd.try_clone()?, blank.boot.try_clone()?);
        self.watch(&boot, Event::Boot(number))?;
        if let Err(error) = self.watch(&pidfd, Event::Ended(number)) {
            // Closing the duplicate is not enough: it is watched for as long as any descriptor of it is open.
            let _ = self.epoll.delete(&boot);
            return Err(error.into());
        }
        Ok((pidfd, boot))
    }

    /// Ends a blank that is not watched. Its ids are free when nothing of it is left.
    fn give_up(&mut self, blank: Blank, slot: Slot, error: &io::Error) {
        let Blank { name, pid, pidfd, .. } = blank;
        self.kill_unwatched(Unwatched { name, slot, pid: pid.as_raw(), pidfd: Some(pidfd) });
        self.count_failure(&format!("cannot watch process 1: {error}"), error.raw_os_error().unwrap_or(0));
    }

    /// A blank could not be made: its ids are free again, at once or when the process that was begun is gone.
    pub(super) fn make_failed(&mut self, report: &Report) {
        let name = self.making.iter().find(|(_, slot)| slot.number == report.slot).map(|(name, _)| name.clone());
        if let Some((name, slot)) = name.and_then(|name| self.making.remove_entry(&name)) {
            match report.pid {
                0 => self.parts.slots.release(slot),
                pid => self.kill_unwatched(Unwatched { name, slot, pid, pidfd: None }),
            }
        }
        self.count_failure(&report.failure, report.errno);
    }

    /// One blank less than was wanted. When none is on its way or too many have failed, the oldest request is refused.
    pub(super) fn count_failure(&mut self, message: &str, errno: i32) {
        self.failures += 1;
        if self.failures >= MAX_FAILURES || self.blanks() == 0 {
            if let Some(waiting) = self.waiting.pop_front() {
                self.counters.creations_given_up += u64::from(self.failures >= MAX_FAILURES);
                let mut failure = refusal(
                    "LAYER_MISSING",
                    format!("no sandbox can be prepared: {message}"),
                    "run `sandbox-runner doctor`",
                );
                failure.errno = errno;
                self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
            }
        }
    }

    /// Blanks that are there or on their way.
    fn blanks(&self) -> usize {
        self.processes.values().filter(|process| matches!(process.phase, Phase::Blank)).count() + self.making.len()
    }

    /// Blanks that are made ahead though somebody is being served: where the next request is near, it would wait for all of
    /// the making.
    fn ahead(&self) -> usize {
        usize::from(self.in_a_row && self.failures == 0).min(self.parts.policy.pool as usize)
    }

    fn wanted_blanks(&self) -> usize {
        if self.stopping.is_some() || self.failures >= MAX_FAILURES && self.waiting.is_empty() {
            return 0;
        }
        self.waiting.len() + self.parts.policy.pool as usize
    }

    /// How long the loop may sleep: until orders can be tried again, or the pool be filled.
    pub(super) fn timeout(&self) -> EpollTimeout {
        if !self.orders.is_empty() {
            EpollTimeout::from(2_u8)
        } else if self.wanted_blanks() > self.blanks() || !self.spent.is_empty() || !self.unwatched.is_empty() {
            EpollTimeout::from(u8::try_from(REFILL_DELAY.as_millis()).unwrap_or(u8::MAX))
        } else {
            EpollTimeout::NONE
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::process::{Child, Command};
    use std::time::Instant;

    use nix::sys::epoll::EpollEvent;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use prost::Message;
    use proto::launch::v1::{CreateSandbox, Failure, HostReport, HostRootfs, Reply, create_sandbox::Rootfs};

    use super::*;
    use crate::launcher::background::PACKET_BYTES;
    use crate::launcher::cgroup::Tree;
    use crate::launcher::host::{HostRoot, Places};
    use crate::launcher::ids::Slots;
    use crate::launcher::kernel_log::KernelLog;
    use crate::launcher::policy_file::{self, tests::roomy};
    use crate::launcher::serve::making::Waiting;
    use crate::launcher::serve::{End, Parts};
    use crate::launcher::shape::Shape;
    use crate::launcher::validate::check;
    use crate::sys::process::pidfd_open;
    use crate::sys::socket::{receive, send};

    pub(in crate::launcher::serve) fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a socket pair")
    }

    /// A launcher with one id range, at the other ends of `background` and `connection`.
    pub(in crate::launcher::serve) fn launcher(
        directory: &Path,
        background: OwnedFd,
        connection: OwnedFd,
    ) -> Launcher<'static> {
        let policy = roomy().replace("slots = 4", "slots = 1");
        let policy = policy_file::parse(&policy, Path::new("/p")).expect("valid policy");
        let parts = Parts {
            tree: Tree::nothing(),
            slots: Slots::open(directory, policy.ids.clone(), false).expect("a lock directory"),
            host_root: HostRoot { directories: Vec::new() },
            report: HostReport::default(),
            background,
            listener: None,
            connection: Some(connection),
            rootless: false,
            shape: Shape::Privileged,
            places: Places::of(&policy),
            processors: Vec::new(),
            prefix: "s-test".to_owned(),
            replaceable: false,
            kernel_log: KernelLog::default(),
            policy,
        };
        Launcher::new(parts, None).expect("a loop")
    }

    pub(in crate::launcher::serve) fn until_buried(launcher: &mut Launcher<'_>) {
        for _ in 0..5000 {
            launcher.bury();
            if launcher.unwatched.is_empty() {
                return;
            }
            assert!(launcher.parts.slots.take().expect("lock").is_none(), "its ids are free while it lives");
            assert!(launcher.removing.is_empty(), "what it holds is removed while it lives");
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("it lives on");
    }

    /// A launcher that makes one blank, and the process of that.
    fn making(directory: &Path, background: OwnedFd, connection: OwnedFd) -> (Launcher<'static>, Child) {
        let mut launcher = launcher(directory, background, connection);
        let slot = launcher.parts.slots.take().expect("lock").expect("free");
        launcher.making.insert("s-test-1".to_owned(), slot);
        (launcher, Command::new("sleep").arg("600").spawn().expect("a process"))
    }

    pub(in crate::launcher::serve) fn is_removal_ordered(theirs: &OwnedFd) -> bool {
        let order = receive(theirs, PACKET_BYTES).expect("a packet").expect("an order");
        Order::decode(order.bytes.as_slice()).expect("an order").remove == "s-test-1"
    }

    /// A request of the runner that waits for a blank.
    fn waiting(launcher: &Launcher<'_>) -> Waiting {
        let request = CreateSandbox {
            sandbox_id: "a".to_owned(),
            profile: "default".to_owned(),
            rootfs: Some(Rootfs::Host(HostRootfs {})),
            ..CreateSandbox::default()
        };
        let request = check(&request, &launcher.parts.policy).expect("allowed");
        let connection = *launcher.connections.keys().next().expect("a connection");
        Waiting { connection, request_id: 7, request, since: Instant::now() }
    }

    fn failure(runner: &OwnedFd) -> Failure {
        let reply = receive(runner, PACKET_BYTES).expect("a packet").expect("a reply");
        match Reply::decode(reply.bytes.as_slice()).expect("a reply").body {
            Some(Answer::Failure(failure)) => failure,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_lock_file_that_cannot_be_opened_is_the_answer_and_not_a_lack_of_ids() {
        let directory = tempfile::tempdir().expect("a directory");
        std::os::unix::fs::symlink("elsewhere", directory.path().join("ids.lock")).expect("a link");
        let ((background, _theirs), (connection, runner)) = (pair(), pair());
        let mut launcher = launcher(directory.path(), background, connection);
        launcher.waiting.push_back(waiting(&launcher));

        launcher.refill();

        let failure = failure(&runner);
        assert_eq!((failure.code.as_str(), failure.errno), ("HOST_ERROR", libc::ELOOP));
        assert!(failure.message.starts_with("cannot lock id slot 0"), "{}", failure.message);
        assert!(launcher.waiting.is_empty());
    }

    #[test]
    fn blanks_that_always_end_by_themselves_are_not_made_for_ever() {
        let directory = tempfile::tempdir().expect("a directory");
        let ((background, _theirs), (connection, runner)) = (pair(), pair());
        let mut launcher = launcher(directory.path(), background, connection);
        for _ in 0..MAX_FAILURES {
            assert!(launcher.wanted_blanks() > 0, "given up too early");
            let slot = launcher.parts.slots.adopt(0).expect("a slot");
            launcher.making.insert("s-test-1".to_owned(), slot);
            let mut child = Command::new("sleep").arg("600").spawn().expect("a process");
            let pid = i32::try_from(child.id()).expect("a pid");
            let (boot, _inside) = pair();
            let report = Report { made: "s-test-1".to_owned(), pid, ..Report::default() };
            launcher.made(report, vec![pidfd_open(pid).expect("a pidfd"), boot]);
            let number = *launcher.processes.keys().next().expect("a blank");
            child.kill().expect("a living process");
            child.wait().expect("a child");
            launcher.waiting.push_back(waiting(&launcher));
            launcher.ended(number);
            let failure = failure(&runner);
            assert_eq!((failure.code.as_str(), failure.errno), ("LAYER_MISSING", libc::EPIPE));
            assert!(launcher.waiting.is_empty());
        }
        assert_eq!(launcher.counters.creations_given_up, 1, "those before were tried again");
        assert_eq!(launcher.wanted_blanks(), 0, "nobody asks, and they are made without end");
        launcher.waiting.push_back(waiting(&launcher));
        assert!(launcher.wanted_blanks() > 0, "whoever asks has it tried again");
    }

    #[test]
    fn a_blank_whose_descriptors_found_no_room_is_ended_and_its_slot_comes_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let ((background, theirs), (connection, _runner)) = (pair(), pair());
        let (mut launcher, mut child) = making(directory.path(), background, connection);
        let pid = i32::try_from(child.id()).expect("a pid");
        send(&theirs, &Report { made: "s-test-1".to_owned(), pid, ..Report::default() }.encode_to_vec(), &[])
            .expect("room");

        launcher.report();
        assert_eq!(launcher.blanks(), 0);
        until_buried(&mut launcher);

        assert!(child.wait().is_err(), "it was left for somebody else to reap");
        assert!(is_removal_ordered(&theirs));
        launcher.stop(End::Stopped);
        assert!(launcher.finished().is_none(), "it has not been removed yet");
        send(&theirs, &Report { removed: "s-test-1".to_owned(), ..Report::default() }.encode_to_vec(), &[])
            .expect("room");
        launcher.report();
        assert_eq!(launcher.finished(), Some(End::Stopped));
    }

    #[test]
    fn what_was_begun_of_a_blank_that_failed_is_gone_before_its_ids_are_free() {
        let directory = tempfile::tempdir().expect("a directory");
        let ((background, theirs), (connection, _runner)) = (pair(), pair());
        let (mut launcher, mut child) = making(directory.path(), background, connection);
        let pid = i32::try_from(child.id()).expect("a pid");
        let failure = "cannot write /proc/1/uid_map".to_owned();
        send(&theirs, &Report { failure, pid, ..Report::default() }.encode_to_vec(), &[]).expect("room");

        launcher.report();
        until_buried(&mut launcher);

        assert!(child.wait().is_err(), "it was left for somebody else to reap");
        assert!(is_removal_ordered(&theirs));
        assert!(launcher.parts.slots.take().expect("lock").is_none(), "its groups are not removed yet");
    }

    #[test]
    fn a_blank_that_cannot_be_watched_is_ended_removed_and_reaped_and_its_ids_come_back() {
        let directory = tempfile::tempdir().expect("a directory");
        let ((background, theirs), (connection, _runner)) = (pair(), pair());
        let mut launcher = launcher(directory.path(), background, connection);
        let slot = launcher.parts.slots.take().expect("lock").expect("free");
        launcher.making.insert("s-test-1".to_owned(), slot);
        let mut child = Command::new("sleep").arg("600").spawn().expect("a process");
        let pid = i32::try_from(child.id()).expect("a pid");
        let pidfd = pidfd_open(pid).expect("a pidfd");
        // epoll refuses regular files.
        let boot = File::create(directory.path().join("boot")).expect("a file");

        let report = Report { made: "s-test-1".to_owned(), pid, ..Report::default() };
        launcher.made(report, vec![pidfd, boot.into()]);
        until_buried(&mut launcher);
        assert!(child.wait().is_err(), "it was left for somebody else to reap");

        let order = receive(&theirs, PACKET_BYTES).expect("a packet").expect("an order");
        assert_eq!(Order::decode(order.bytes.as_slice()).expect("an order").remove, "s-test-1");
        assert!(launcher.processes.is_empty());
        assert!(launcher.parts.slots.take().expect("lock").is_none(), "nothing has been removed yet");
        let report = Report { removed: "s-test-1".to_owned(), ..Report::default() };
        send(&theirs, &report.encode_to_vec(), &[]).expect("room");
        launcher.report();
        // A process that another test has just forked holds the lock as well until it executes something.
        let free = (0..5000).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            launcher.parts.slots.take().expect("lock").is_some()
        });
        assert!(free, "its ids are still taken");
        let mut events = [EpollEvent::empty(); 4];
        assert_eq!(
            launcher.epoll.wait(&mut events, EpollTimeout::ZERO),
            Ok(0),
            "somebody is watched whom nobody knows"
        );
    }
}
