//! Privileged: signals sandboxes (CAP_KILL) and orders the background process.
//!
//! The request loop: one epoll over the listening socket, the runner's connections, the boot sockets of blanks, the pidfds
//! of sandboxes, the background process and signals. Nothing in here waits: what may block is ordered from the background
//! process, and an answer is sent when its report arrives.
//!
//! This file has the state and the events. What an event leads to is one module each: [`connection`] reads requests and
//! sends answers, [`making`] turns a blank into a sandbox, [`ending`] ends one, [`orders`] is the talk with the background
//! process, [`pool`] keeps blanks ready, [`resting`] makes workloads stand still, [`kills`] knows whom the kernel has killed
//! for memory, and [`adoption`] is what outlives this process.

mod adoption;
mod answers;
mod connection;
mod ending;
mod kills;
mod making;
mod orders;
mod pool;
mod process;
mod resting;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use proto::launch::v1 as wire;

use self::connection::Connection;
use self::ending::Farewell;
use self::making::Waiting;
use self::process::{Process, Unwatched};
use super::cgroup::Tree;
use super::forecast::Forecast;
use super::host::{HostRoot, Places};
use super::ids::{Slot, Slots};
use super::kernel_log::KernelLog;
use super::policy_file::Policy;
use super::replace::Program;
use super::rootfs::Builder;
use super::shape::Shape;
use super::spawn::Blank;

/// Everything that can wake the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Listener,
    Background,
    Signal,
    Connection(u32),
    Boot(u32),
    Ended(u32),
}

impl Event {
    fn token(self) -> u64 {
        let (kind, number) = match self {
            Self::Listener => (0_u64, 0),
            Self::Background => (1, 0),
            Self::Signal => (2, 0),
            Self::Connection(number) => (3, number),
            Self::Boot(number) => (4, number),
            Self::Ended(number) => (5, number),
        };
        kind << 32 | u64::from(number)
    }

    fn from_token(token: u64) -> Option<Self> {
        let number = u32::try_from(token & 0xffff_ffff).ok()?;
        Some(match token >> 32 {
            0 => Self::Listener,
            1 => Self::Background,
            2 => Self::Signal,
            3 => Self::Connection(number),
            4 => Self::Boot(number),
            5 => Self::Ended(number),
            _ => return None,
        })
    }
}

/// The launcher's parts.
#[derive(Debug)]
pub struct Parts {
    /// The policy.
    pub policy: Policy,
    /// Our cgroups.
    pub tree: Tree,
    /// Id slots.
    pub slots: Slots,
    /// The host's directories.
    pub host_root: HostRoot,
    /// What `Welcome` says about the host.
    pub report: wire::HostReport,
    /// To the background process.
    pub background: OwnedFd,
    /// Listening socket.
    pub listener: Option<OwnedFd>,
    /// The one connection of embedded mode.
    pub connection: Option<OwnedFd>,
    /// The launcher works in an unprivileged user namespace.
    pub rootless: bool,
    /// How sandboxes are made.
    pub shape: Shape,
    /// Our directories.
    pub places: Places,
    /// Processors of this host.
    pub processors: Vec<u32>,
    /// How names of new sandboxes begin.
    pub prefix: String,
    /// The program can be replaced in place.
    pub replaceable: bool,
    /// Says whom the kernel has killed for memory.
    pub kernel_log: KernelLog,
}

/// Why the loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Everything is gone.
    Stopped,
    /// The program is to be replaced; sandboxes live.
    Reexecute,
    /// Another launcher follows and adopts; sandboxes live.
    Left,
}

/// The loop's state.
#[derive(Debug)]
pub struct Launcher<'a> {
    parts: Parts,
    program: Option<&'a Program>,
    epoll: Epoll,
    signals: SignalFd,
    builder: Builder,
    connections: BTreeMap<u32, Connection>,
    processes: BTreeMap<u32, Process>,
    waiting: VecDeque<Waiting>,
    removing: BTreeMap<String, Slot>,
    making: BTreeMap<String, Slot>,
    /// What is said when the processes of these are gone.
    farewells: BTreeMap<String, Farewell>,
    /// What blanks get ahead of need.
    forecast: Option<Forecast>,
    /// What came with blanks that have become sandboxes. It holds mounts, whose end waits for all processors, so they go when
    /// nobody has asked for anything for a moment.
    spent: VecDeque<(Instant, Blank)>,
    /// Killed, and no event will tell their end.
    unwatched: Vec<Unwatched>,
    next: u32,
    embedded: bool,
    last_request: Instant,
    /// When the last sandbox was asked for.
    last_asked: Option<Instant>,
    /// It was asked for soon after the one before.
    in_a_row: bool,
    failures: u32,
    /// How often a bound was reached.
    counters: wire::Counters,
    stopping: Option<End>,
    /// Orders that the background process has not taken yet.
    orders: VecDeque<(Vec<u8>, Option<OwnedFd>)>,
    background_gone: bool,
    /// Out of descriptors: nobody is accepted until something closes.
    listener_rests: bool,
    /// The last errno that the operator was told of why memory stays in use; 0: none.
    reclaim_told: i32,
}

/// Holds back the signals that the loop reads, until it does. One that comes while the launcher still starts is obeyed then:
/// there may be sandboxes of an earlier launcher to end, and our own groups are made already.
///
/// # Errors
/// What the kernel says.
pub fn hold_signals() -> nix::Result<SigSet> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        mask.add(signal);
    }
    mask.thread_block()?;
    Ok(mask)
}

impl<'a> Launcher<'a> {
    /// Prepares the loop.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(parts: Parts, program: Option<&'a Program>) -> nix::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let signals = SignalFd::with_flags(&hold_signals()?, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        watch(&epoll, &signals, Event::Signal)?;
        watch(&epoll, &parts.background, Event::Background)?;
        if let Some(listener) = &parts.listener {
            watch(&epoll, listener, Event::Listener)?;
        }
        let embedded = parts.connection.is_some();
        let mut launcher = Self {
            epoll,
            signals,
            builder: Builder::default(),
            connections: BTreeMap::new(),
            processes: BTreeMap::new(),
            waiting: VecDeque::new(),
            removing: BTreeMap::new(),
            making: BTreeMap::new(),
            farewells: BTreeMap::new(),
            forecast: Forecast::first(&parts.policy),
            spent: VecDeque::new(),
            unwatched: Vec::new(),
            next: 1,
            embedded,
            last_request: Instant::now(),
            last_asked: None,
            in_a_row: false,
            failures: 0,
            counters: wire::Counters::default(),
            stopping: None,
            orders: VecDeque::new(),
            background_gone: false,
            listener_rests: false,
            reclaim_told: 0,
            program,
            parts,
        };
        if let Some(socket) = launcher.parts.connection.take() {
            launcher.add_connection(socket)?;
        }
        launcher.adopt();
        Ok(launcher)
    }

    /// Serves until there is nothing left to serve.
    ///
    /// # Errors
    /// Only what makes the loop itself impossible.
    pub fn run(mut self) -> nix::Result<End> {
        loop {
            self.bury();
            self.refill();
            self.give_orders();
            if let Some(end) = self.finished() {
                return Ok(end);
            }
            let mut events = [EpollEvent::empty(); 32];
            let ready = match self.epoll.wait(&mut events, self.timeout()) {
                Err(Errno::EINTR) => 0,
                other => other?,
            };
            for event in events.iter().take(ready) {
                if let Some(event) = Event::from_token(event.data()) {
                    self.handle(event);
                }
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Listener => self.accept(),
            Event::Background => self.report(),
            Event::Signal => self.signal(),
            Event::Connection(number) => self.question(number),
            Event::Boot(number) => self.booted(number),
            Event::Ended(number) => self.ended(number),
        }
    }

    fn signal(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
            match signal {
                Some(Signal::SIGHUP) => match self.may_replace() {
                    Ok(()) => self.stop(End::Reexecute),
                    Err(failure) => {
                        let wire::Failure { message, remediation, .. } = failure;
                        super::log(&format!("the program was not replaced: {message}; {remediation}"));
                    }
                },
                // Nobody could adopt the sandboxes of an embedded launcher.
                Some(Signal::SIGUSR1) if !self.embedded => self.stop(End::Left),
                _ => self.stop(End::Stopped),
            }
        }
    }

    fn watch(&self, descriptor: impl AsFd, event: Event) -> nix::Result<()> {
        watch(&self.epoll, descriptor, event)
    }

    /// A number that nothing else has: for whatever the loop watches, and for the names of blanks.
    fn number(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1).max(1);
        self.next
    }

    /// The sandbox of this id, if it is ready.
    fn find(&self, sandbox_id: &str) -> Option<(u32, &Process)> {
        let mut processes = self.processes.iter().map(|(number, process)| (*number, process));
        processes.find(|(_, process)| process.sandbox_id() == Some(sandbox_id))
    }
}

fn watch(epoll: &Epoll, descriptor: impl AsFd, event: Event) -> nix::Result<()> {
    epoll.add(descriptor, EpollEvent::new(EpollFlags::EPOLLIN, event.token()))
}
