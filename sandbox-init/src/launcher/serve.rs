//! Privileged: signals sandboxes (CAP_KILL) and orders the background process.
//!
//! The request loop: one epoll over the listening socket, the runner's connections, the boot sockets of blanks, the pidfds
//! of sandboxes, the background process and signals. Nothing in here waits: what may block is ordered from the background
//! process, and an answer is sent when its report arrives.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt::PeerCredentials};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use prost::Message;
use proto::launch::v1 as wire;
use proto::launch::v1::Failure;
use proto::launch::v1::{reply::Body as Answer, request::Body as Question};

use super::background::{Order, PACKET_BYTES, Report, blank_from, chain, root_errno};
use super::cgroup::Tree;
use super::create::{self, Context};
use super::host::{HostRoot, Places};
use super::ids::{Slot, Slots};
use super::nested;
use super::policy_file::Policy;
use super::replace::Program;
use super::rootfs::Builder;
use super::shape::Shape;
use super::spawn::Blank;
use super::state::{self, Record};
use super::validate::{Checked, check, refusal};
use crate::boot::Booted;
use crate::sys::process::pidfd_signal;
use crate::sys::socket::{receive, receive_plain, send};

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

/// One connection of the runner.
#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    greeted: bool,
}

/// A request that waits for a blank.
#[derive(Debug)]
struct Waiting {
    connection: u32,
    request_id: u64,
    request: Checked,
    since: Instant,
}

/// What a process 1 that we made is doing.
#[derive(Debug)]
enum Phase {
    /// Waits for a request.
    Blank,
    /// Has its boot packet.
    Booting { waiting: Box<Waiting>, layers: Vec<wire::Layer> },
    /// Closed and ready.
    Ready { sandbox_id: String },
    /// Killed; waits for its end.
    Ending { sandbox_id: Option<String>, answer: Option<(u32, u64)> },
}

/// A process 1.
#[derive(Debug)]
struct Process {
    name: String,
    pid: i32,
    pidfd: OwnedFd,
    boot: Option<OwnedFd>,
    blank: Option<Blank>,
    slot: Slot,
    phase: Phase,
    adopted: bool,
    record: Option<Record>,
}

/// What is to be said when a sandbox is gone.
#[derive(Debug)]
struct Farewell {
    ended: Option<wire::SandboxEnded>,
    /// Connection and request that asked for the end.
    answer: Option<(u32, u64)>,
}

/// Largest request.
const REQUEST_BYTES: usize = 64 * 1024;
/// Connections at once; a runner needs one, its successor another.
const MAX_CONNECTIONS: usize = 8;
/// Requests that may wait for a blank; beyond that NO_SLOT.
const MAX_WAITING: usize = 64;
/// Time without a request before the pool is filled again: on a small machine a refill competes with the sandbox that was
/// just handed out.
const REFILL_DELAY: Duration = Duration::from_millis(15);
/// Blanks that may fail one after the other before requests are refused instead of tried again.
const MAX_FAILURES: u32 = 3;

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
    next: u32,
    embedded: bool,
    last_request: Instant,
    failures: u32,
    stopping: Option<End>,
    /// Orders that the background process has not taken yet.
    orders: VecDeque<Vec<u8>>,
    background_gone: bool,
    /// Out of descriptors: nobody is accepted until something closes.
    listener_rests: bool,
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
        let watch =
            |fd: &dyn AsFdDyn, event: Event| epoll.add(fd.fd(), EpollEvent::new(EpollFlags::EPOLLIN, event.token()));
        watch(&signals, Event::Signal)?;
        watch(&parts.background, Event::Background)?;
        if let Some(listener) = &parts.listener {
            watch(listener, Event::Listener)?;
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
            next: 1,
            embedded,
            last_request: Instant::now(),
            failures: 0,
            stopping: None,
            orders: VecDeque::new(),
            background_gone: false,
            listener_rests: false,
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

    fn timeout(&self) -> EpollTimeout {
        if !self.orders.is_empty() {
            EpollTimeout::from(2_u8)
        } else if self.wanted_blanks() > self.blanks() {
            EpollTimeout::from(u8::try_from(REFILL_DELAY.as_millis()).unwrap_or(u8::MAX))
        } else {
            EpollTimeout::NONE
        }
    }

    // ---- connections ----

    fn accept(&mut self) {
        let Some(listener) = &self.parts.listener else { return };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let raw = match accept4(listener.as_raw_fd(), flags) {
            Ok(raw) => raw,
            Err(Errno::EMFILE | Errno::ENFILE) => {
                // Level-triggered: without a rest the loop would spin on the connection that it cannot take.
                self.listener_rests = self.epoll.delete(listener).is_ok();
                return;
            }
            Err(_) => return,
        };
        let Ok(socket) = crate::sys::process::inherited_descriptor(raw) else { return };
        let allowed = getsockopt(&socket, PeerCredentials).is_ok_and(|peer| self.is_runner(peer.uid()));
        if allowed && self.connections.len() < MAX_CONNECTIONS {
            // An epoll that is full leaves the peer with a closed connection, which it tries again.
            let _ = self.add_connection(socket);
        }
    }

    fn is_runner(&self, uid: u32) -> bool {
        // In an unprivileged user namespace the runner's uid is the one that is mapped to 0.
        uid == if self.parts.rootless { 0 } else { self.parts.policy.runner_uid }
    }

    fn add_connection(&mut self, socket: OwnedFd) -> nix::Result<()> {
        let number = self.number();
        self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, Event::Connection(number).token()))?;
        self.connections.insert(number, Connection { socket, greeted: false });
        Ok(())
    }

    fn close(&mut self, number: u32) {
        self.connections.remove(&number);
        // Nobody would ever hear of the sandboxes it has asked for.
        self.waiting.retain(|waiting| waiting.connection != number);
        if let Some(listener) = self.parts.listener.as_ref().filter(|_| self.listener_rests) {
            let interest = EpollEvent::new(EpollFlags::EPOLLIN, Event::Listener.token());
            self.listener_rests = self.epoll.add(listener, interest).is_err();
        }
        if self.embedded && self.connections.is_empty() {
            self.stop(End::Stopped);
        }
    }

    fn number(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1).max(1);
        self.next
    }

    fn question(&mut self, number: u32) {
        let Some(connection) = self.connections.get(&number) else { return };
        let packet = match receive_plain(&connection.socket, REQUEST_BYTES) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(Some(packet)) => packet,
            // Descriptors do not travel to the launcher; a packet that was cut is no request.
            Ok(None) | Err(_) => return self.close(number),
        };
        let Ok(request) = wire::Request::decode(packet.as_slice()) else {
            self.answer(
                number,
                0,
                Answer::Failure(refusal(
                    "INVALID_FIELD",
                    "the packet is no launch/v1 request",
                    "send a request of launch/v1",
                )),
            );
            return self.close(number);
        };
        self.last_request = Instant::now();
        let greeted = connection.greeted;
        match request.body {
            Some(Question::Hello(hello)) => self.hello(number, request.request_id, hello.major),
            _ if !greeted => {
                self.answer(
                    number,
                    request.request_id,
                    Answer::Failure(refusal("INVALID_FIELD", "the first request must be hello", "send hello first")),
                );
            }
            Some(body) => self.dispatch(number, request.request_id, body),
            None => self.answer(
                number,
                request.request_id,
                Answer::Failure(refusal(
                    "NOT_SUPPORTED",
                    "the request has no body that this launcher knows",
                    "upgrade the launcher",
                )),
            ),
        }
    }

    fn hello(&mut self, number: u32, request_id: u64, major: u32) {
        if major != 1 {
            let failure = refusal(
                "NOT_SUPPORTED",
                format!("major is {major}, this launcher speaks 1"),
                "upgrade the older of the two",
            );
            return self.answer(number, request_id, Answer::Failure(failure));
        }
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.greeted = true;
        }
        let welcome = wire::Welcome {
            major: 1,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: Some(wire::HostReport {
                idmapped_lowers: self.builder.idmaps() && self.parts.shape == Shape::Privileged,
                ..self.parts.report.clone()
            }),
        };
        self.answer(number, request_id, Answer::Welcome(welcome));
    }

    fn dispatch(&mut self, number: u32, request_id: u64, body: Question) {
        match body {
            Question::CreateSandbox(request) => self.create(number, request_id, &request),
            Question::KillSandbox(kill) => self.kill_sandbox(number, request_id, &kill.sandbox_id),
            Question::ListSandboxes(_) => {
                let sandboxes = self.processes.values().filter_map(entry).collect();
                self.answer(number, request_id, Answer::SandboxList(wire::SandboxList { sandboxes }));
            }
            Question::FreezeSandbox(freeze) => {
                let result =
                    self.find(&freeze.sandbox_id).map(|process| self.parts.tree.freeze(&process.name, freeze.frozen));
                let answer = match result {
                    None => unknown(&freeze.sandbox_id),
                    Some(Ok(())) => Answer::Done(wire::Done {}),
                    Some(Err(error)) => Answer::Failure(host_error(&error)),
                };
                self.answer(number, request_id, answer);
            }
            Question::InspectSandbox(inspect) => {
                let answer = self
                    .find(&inspect.sandbox_id)
                    .map_or_else(|| unknown(&inspect.sandbox_id), |process| self.inspect(process));
                self.answer(number, request_id, answer);
            }
            Question::Reexecute(_) => match self.may_replace() {
                Ok(()) => {
                    self.answer(number, request_id, Answer::Done(wire::Done {}));
                    self.stop(End::Reexecute);
                }
                Err(failure) => self.answer(number, request_id, Answer::Failure(failure)),
            },
            Question::Stop(_) => {
                self.answer(number, request_id, Answer::Done(wire::Done {}));
                self.stop(End::Stopped);
            }
            Question::Hello(_) => {}
        }
    }

    fn answer(&mut self, number: u32, request_id: u64, body: Answer) {
        self.answer_with(number, request_id, body, &[]);
    }

    /// Whether there was somebody who took it.
    fn answer_with(&mut self, number: u32, request_id: u64, body: Answer, descriptors: &[i32]) -> bool {
        let Some(connection) = self.connections.get(&number) else { return false };
        let reply = wire::Reply { request_id, body: Some(body) };
        // A runner that does not read its answers is closed: the launcher keeps no queue for it.
        let taken = send(&connection.socket, &reply.encode_to_vec(), descriptors).is_ok();
        if !taken {
            self.close(number);
        }
        taken
    }

    fn tell_all(&mut self, body: &Answer) {
        let numbers: Vec<u32> = self.connections.iter().filter(|(_, c)| c.greeted).map(|(n, _)| *n).collect();
        for number in numbers {
            self.answer(number, 0, body.clone());
        }
    }

    // ---- making ----

    fn create(&mut self, number: u32, request_id: u64, request: &wire::CreateSandbox) {
        let checked = check(request, &self.parts.policy).and_then(|checked| match self.parts.shape {
            Shape::Nested => nested::check(&checked).map(|()| checked),
            Shape::Privileged | Shape::Unprivileged => Ok(checked),
        });
        let checked = match checked {
            Ok(checked) => checked,
            Err(failure) => return self.answer(number, request_id, Answer::Failure(failure)),
        };
        let taken = self.find(&checked.sandbox_id).is_some()
            || self.waiting.iter().any(|waiting| waiting.request.sandbox_id == checked.sandbox_id)
            || self.processes.values().any(|process| {
                matches!(&process.phase, Phase::Booting { waiting, .. } if waiting.request.sandbox_id == checked.sandbox_id)
            });
        if taken {
            let failure = refusal(
                "SANDBOX_EXISTS",
                format!("sandbox_id {:?} is in use", checked.sandbox_id),
                "choose another sandbox_id",
            );
            return self.answer(number, request_id, Answer::Failure(failure));
        }
        if self.waiting.len() >= MAX_WAITING {
            return self.answer(number, request_id, Answer::Failure(no_slot("too many sandboxes are being made")));
        }
        self.waiting.push_back(Waiting { connection: number, request_id, request: checked, since: Instant::now() });
        self.hand_out();
    }

    /// Gives waiting requests to blanks.
    fn hand_out(&mut self) {
        while !self.waiting.is_empty() {
            let Some(number) = self.processes.iter().find(|(_, p)| matches!(p.phase, Phase::Blank)).map(|(n, _)| *n)
            else {
                break;
            };
            let Some(waiting) = self.waiting.pop_front() else { break };
            self.boot(number, waiting);
        }
    }

    fn boot(&mut self, number: u32, waiting: Waiting) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        let Some(blank) = process.blank.as_ref() else { return };
        let mut context = Context {
            policy: &self.parts.policy,
            tree: &self.parts.tree,
            builder: &mut self.builder,
            host_root: &self.parts.host_root,
            rootless: self.parts.rootless,
            embedded: self.embedded,
            processors: &self.parts.processors,
            places: &self.parts.places,
        };
        let booted = match self.parts.shape {
            Shape::Nested => nested::boot(&mut context, blank, &process.slot, &waiting.request),
            Shape::Privileged | Shape::Unprivileged => {
                create::boot(&mut context, blank, &process.slot, &waiting.request)
            }
        };
        match booted {
            Ok(layers) => process.phase = Phase::Booting { waiting: Box::new(waiting), layers },
            Err(error) => {
                let failure = host_error(&error);
                self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
                self.kill(number, None);
            }
        }
    }

    fn booted(&mut self, number: u32) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        let Some(boot) = process.boot.as_ref() else { return };
        let message = match receive(boot, PACKET_BYTES) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(Some(packet)) => Booted::decode(packet.bytes.as_slice()).ok(),
            Ok(None) | Err(_) => None,
        };
        // One packet is all there is to say; the socket has done its work.
        if let Some(boot) = process.boot.take() {
            let _ = self.epoll.delete(&boot);
        }
        let previous = std::mem::replace(&mut process.phase, Phase::Ending { sandbox_id: None, answer: None });
        let Phase::Booting { waiting, mut layers } = previous else {
            return self.kill(number, None);
        };
        let booted = message.unwrap_or_else(|| Booted {
            failure: "process 1 ended before it was ready".to_owned(),
            errno: libc::EPIPE,
            layers: Vec::new(),
        });
        if !booted.failure.is_empty() {
            let mut failure = refusal(
                "HOST_ERROR",
                format!("the sandbox cannot be closed: {}", booted.failure),
                "run `sandbox-runner doctor`",
            );
            failure.errno = booted.errno;
            self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
            return self.kill(number, None);
        }
        layers.extend(booted.layers);
        let Some(process) = self.processes.get_mut(&number) else { return };
        // Its namespaces and groups live without our descriptors.
        process.blank = None;
        process.phase = Phase::Ready { sandbox_id: waiting.request.sandbox_id.clone() };
        process.record = state::start_time(process.pid).map(|start_time| Record {
            sandbox_id: waiting.request.sandbox_id.clone(),
            name: process.name.clone(),
            pid: process.pid,
            start_time,
            slot: process.slot.number,
        });
        let created = wire::SandboxCreated {
            sandbox_id: waiting.request.sandbox_id,
            socket_name: format!("{}.sock", process.name),
            pid: u32::try_from(process.pid).unwrap_or(0),
            id_base: process.slot.base,
            id_count: process.slot.count,
            layers,
            output_directory: match self.parts.shape {
                Shape::Nested => self.parts.places.sandboxes().join(&process.name).join("output").display().to_string(),
                Shape::Privileged | Shape::Unprivileged => String::new(),
            },
            took_us: u64::try_from(waiting.since.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        let pidfd = process.pidfd.as_raw_fd();
        self.store();
        if !self.answer_with(waiting.connection, waiting.request_id, Answer::SandboxCreated(created), &[pidfd]) {
            // Its runner has gone meanwhile, and a successor may have looked at the list before this one was on it.
            self.kill(number, None);
        }
        self.last_request = Instant::now();
    }

    // ---- ending ----

    fn kill_sandbox(&mut self, connection: u32, request_id: u64, sandbox_id: &str) {
        let found = self
            .processes
            .iter()
            .find(|(_, process)| matches!(&process.phase, Phase::Ready { sandbox_id: id } if id == sandbox_id))
            .map(|(number, _)| *number);
        match found {
            Some(number) => self.kill(number, Some((connection, request_id))),
            None => self.answer(connection, request_id, unknown(sandbox_id)),
        }
    }

    fn kill(&mut self, number: u32, answer: Option<(u32, u64)>) {
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

    fn ended(&mut self, number: u32) {
        let Some(mut process) = self.processes.remove(&number) else { return };
        let _ = self.epoll.delete(&process.pidfd);
        if let Some(boot) = process.boot.take() {
            let _ = self.epoll.delete(&boot);
        }
        let status = wait_status(&process.pidfd);
        let oom_kills = self.parts.tree.oom_kills(&process.name);
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
                self.failures += 1;
                (None, None)
            }
        };
        let order = Order {
            remove: process.name.clone(),
            slot: process.slot.number,
            base: process.slot.base,
            count: process.slot.count,
            ..Order::default()
        };
        self.order(&order);
        let ended = sandbox_id.map(|sandbox_id| wire::SandboxEnded { sandbox_id, wait_status: status, oom_kills });
        let farewell = Farewell { ended, answer };
        // Without the background process nobody will report the removal, and nobody may wait for it.
        let removed = !self.background_gone;
        if removed && self.parts.shape == Shape::Nested {
            // Others of the sandbox may outlive its process 1 for a moment: nobody is told before they are gone.
            self.farewells.insert(process.name.clone(), farewell);
        } else {
            self.say(farewell);
        }
        if removed {
            self.removing.insert(process.name, process.slot);
        }
    }

    /// Tells whoever has to know that a sandbox is gone.
    fn say(&mut self, farewell: Farewell) {
        if let Some(ended) = farewell.ended {
            self.store();
            self.tell_all(&Answer::SandboxEnded(ended));
        }
        if let Some((connection, request_id)) = farewell.answer {
            self.answer(connection, request_id, Answer::Done(wire::Done {}));
        }
    }

    fn stop(&mut self, end: End) {
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
    fn may_replace(&self) -> Result<(), wire::Failure> {
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

    fn finished(&self) -> Option<End> {
        let end = self.stopping?;
        let busy =
            self.processes.values().any(|process| end == End::Stopped || !matches!(process.phase, Phase::Ready { .. }));
        (!busy && self.removing.is_empty() && self.making.is_empty()).then_some(end)
    }

    fn signal(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
            match signal {
                Some(Signal::SIGHUP) => match self.may_replace() {
                    Ok(()) => self.stop(End::Reexecute),
                    Err(failure) => {
                        let Failure { message, remediation, .. } = failure;
                        super::log(&format!("the program was not replaced: {message}; {remediation}"));
                    }
                },
                // Nobody could adopt the sandboxes of an embedded launcher.
                Some(Signal::SIGUSR1) if !self.embedded => self.stop(End::Left),
                _ => self.stop(End::Stopped),
            }
        }
    }

    // ---- the background process ----

    fn order(&mut self, order: &Order) {
        if self.background_gone {
            return;
        }
        self.orders.push_back(order.encode_to_vec());
        self.give_orders();
    }

    /// Sends what the background process can take; the rest waits, bounded by the number of slots.
    fn give_orders(&mut self) {
        while let Some(order) = self.orders.front() {
            match send(&self.parts.background, order, &[]) {
                Ok(()) => {
                    self.orders.pop_front();
                }
                Err(Errno::EAGAIN) => return,
                Err(_) => return self.lose_background(),
            }
        }
    }

    fn report(&mut self) {
        let packet = match receive(&self.parts.background, PACKET_BYTES) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(Some(packet)) => packet,
            // Out of descriptors: one blank is lost, not the process that made it.
            Err(Errno::EMSGSIZE | Errno::ENOBUFS) => return,
            Ok(None) | Err(_) => return self.lose_background(),
        };
        let Ok(report) = Report::decode(packet.bytes.as_slice()) else { return };
        if !report.removed.is_empty() {
            if let Some(farewell) = self.farewells.remove(&report.removed) {
                nested::reap_orphans();
                self.say(farewell);
            }
            // A group that does not become empty keeps its ids: nobody else may get them.
            if let Some(slot) = self.removing.remove(&report.removed).filter(|_| report.failure.is_empty()) {
                self.parts.slots.release(slot);
            }
        } else if !report.failure.is_empty() {
            self.make_failed(&report);
        } else {
            self.made(report, packet.descriptors);
        }
    }

    fn made(&mut self, report: Report, descriptors: Vec<OwnedFd>) {
        let Some(slot) = self.making.remove(&report.made) else { return };
        let Some(blank) = blank_from(report, descriptors) else { return self.parts.slots.release(slot) };
        let number = self.number();
        let watch =
            |fd: &OwnedFd, event: Event| self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, event.token()));
        let (Ok(pidfd), Ok(boot)) = (blank.pidfd.try_clone(), blank.boot.try_clone()) else { return };
        if watch(&pidfd, Event::Ended(number)).is_err() || watch(&boot, Event::Boot(number)).is_err() {
            return;
        }
        self.failures = 0;
        let process = Process {
            name: blank.name.clone(),
            pid: blank.pid.as_raw(),
            pidfd,
            boot: Some(boot),
            blank: Some(blank),
            slot,
            phase: Phase::Blank,
            adopted: false,
            record: None,
        };
        self.processes.insert(number, process);
        if self.stopping.is_some() {
            self.kill(number, None);
        } else {
            self.hand_out();
        }
    }

    fn make_failed(&mut self, report: &Report) {
        self.failures += 1;
        let names: Vec<String> =
            self.making.iter().filter(|(_, slot)| slot.number == report.slot).map(|(n, _)| n.clone()).collect();
        for name in names {
            if let Some(slot) = self.making.remove(&name) {
                self.parts.slots.release(slot);
            }
        }
        if self.failures >= MAX_FAILURES || self.blanks() == 0 {
            if let Some(waiting) = self.waiting.pop_front() {
                let mut failure = refusal(
                    "LAYER_MISSING",
                    format!("no sandbox can be prepared: {}", report.failure),
                    "run `sandbox-runner doctor`",
                );
                failure.errno = report.errno;
                self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
            }
        }
    }

    fn lose_background(&mut self) {
        let _ = self.epoll.delete(&self.parts.background);
        self.background_gone = true;
        self.making.clear();
        self.removing.clear();
        self.stop(End::Stopped);
    }

    fn blanks(&self) -> usize {
        self.processes.values().filter(|process| matches!(process.phase, Phase::Blank)).count() + self.making.len()
    }

    fn wanted_blanks(&self) -> usize {
        if self.stopping.is_some() || self.failures >= MAX_FAILURES && self.waiting.is_empty() {
            return 0;
        }
        self.waiting.len() + self.parts.policy.pool as usize
    }

    fn refill(&mut self) {
        // Requests that wait hear of the end when their connection closes.
        if self.stopping.is_some() {
            return;
        }
        let idle = self.last_request.elapsed() >= REFILL_DELAY;
        while self.blanks() < if idle { self.wanted_blanks() } else { self.waiting.len() } {
            match self.parts.slots.take() {
                Ok(Some(slot)) => {
                    self.next = self.next.wrapping_add(1).max(1);
                    let name = format!("{}-{:x}", self.parts.prefix, self.next);
                    let order = Order {
                        make: name.clone(),
                        slot: slot.number,
                        base: slot.base,
                        count: slot.count,
                        ..Order::default()
                    };
                    self.making.insert(name, slot);
                    self.order(&order);
                }
                Ok(None) | Err(_) => {
                    // All ids are taken. A blank of ours would have been handed out; what waits is refused now, not later.
                    if self.blanks() == 0 && self.removing.is_empty() {
                        while let Some(waiting) = self.waiting.pop_front() {
                            self.answer(waiting.connection, waiting.request_id, Answer::Failure(self.no_slot_left()));
                        }
                    }
                    return;
                }
            }
        }
    }

    fn no_slot_left(&self) -> wire::Failure {
        match self.parts.shape {
            Shape::Nested => refusal(
                "NO_SLOT",
                "this container allows no namespace, so it holds one sandbox at a time, and that one is in use",
                "end it first, start another container, or give this one what the tier pod needs",
            ),
            Shape::Privileged | Shape::Unprivileged => no_slot("every id range is in use"),
        }
    }

    // ---- state ----

    fn find(&self, sandbox_id: &str) -> Option<&Process> {
        self.processes
            .values()
            .find(|process| matches!(&process.phase, Phase::Ready { sandbox_id: id } if id == sandbox_id))
    }

    fn inspect(&self, process: &Process) -> Answer {
        let account = self.parts.tree.account(&process.name);
        let sandbox_id = match &process.phase {
            Phase::Ready { sandbox_id } => sandbox_id.clone(),
            _ => String::new(),
        };
        Answer::Inspection(wire::SandboxInspection {
            sandbox_id,
            memory_bytes: account.memory_bytes,
            memory_peak_bytes: account.memory_peak_bytes,
            oom_kills: account.oom_kills,
            pids: account.pids,
            pids_refused: account.pids_refused,
            cpu_usec: account.cpu_usec,
            limits: Some(wire::Limits {
                memory_bytes: account.memory_limit,
                pids: account.pids_limit,
                cpu_millis: 0,
                disk_bytes: 0,
            }),
            host_pids: self.parts.tree.processes(&process.name),
        })
    }

    fn store(&mut self) {
        if !self.adopts() {
            return;
        }
        let records = self
            .processes
            .values()
            .filter(|process| matches!(process.phase, Phase::Ready { .. }))
            .filter_map(|process| process.record.clone())
            .collect();
        // A state file that cannot be written costs the adoption after a crash, not the sandbox.
        let _ = state::store(records);
    }

    /// Whether a later launcher takes over what lives. In a container that allows no namespace it ends it instead.
    fn adopts(&self) -> bool {
        !self.embedded && self.parts.shape != Shape::Nested
    }

    /// Takes over what an earlier launcher left: living sandboxes are adopted, everything else of ours is killed and removed.
    fn adopt(&mut self) {
        if self.embedded {
            return;
        }
        let mut known = Vec::new();
        for record in if self.adopts() { state::load() } else { Vec::new() } {
            known.push(record.name.clone());
            let slot = self.parts.slots.adopt(record.slot);
            let found = state::find(&record)
                .filter(|_| state::is_in_its_group(&record) || self.parts.tree.mode() == super::cgroup::Mode::None);
            let (pidfd, slot) = match (found, slot) {
                (Some(pidfd), Some(slot)) => (pidfd, slot),
                (_, slot) => {
                    // It died while nobody looked: what it left is removed below, its ids are free.
                    known.pop();
                    if let Some(slot) = slot {
                        self.parts.slots.release(slot);
                    }
                    continue;
                }
            };
            let number = self.number();
            if self.epoll.add(&pidfd, EpollEvent::new(EpollFlags::EPOLLIN, Event::Ended(number).token())).is_err() {
                continue;
            }
            let process = Process {
                name: record.name.clone(),
                pid: record.pid,
                pidfd,
                boot: None,
                blank: None,
                slot,
                phase: Phase::Ready { sandbox_id: record.sandbox_id.clone() },
                adopted: true,
                record: Some(record),
            };
            self.processes.insert(number, process);
        }
        let mut left = self.parts.tree.names("s-");
        left.extend(super::background::leftover_names("s-", &self.parts.places));
        left.sort();
        left.dedup();
        for name in left.into_iter().filter(|name| !known.contains(name)) {
            self.order(&Order { remove: name, ..Order::default() });
        }
        self.store();
    }
}

/// `AsFd` behind a reference, for the watch closure.
trait AsFdDyn {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl<T: AsFd> AsFdDyn for T {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

fn entry(process: &Process) -> Option<wire::SandboxEntry> {
    let Phase::Ready { sandbox_id } = &process.phase else { return None };
    Some(wire::SandboxEntry {
        sandbox_id: sandbox_id.clone(),
        socket_name: format!("{}.sock", process.name),
        pid: u32::try_from(process.pid).unwrap_or(0),
        adopted: process.adopted,
        id_base: process.slot.base,
    })
}

fn unknown(sandbox_id: &str) -> Answer {
    Answer::Failure(refusal("SANDBOX_UNKNOWN", format!("there is no sandbox {sandbox_id:?}"), "list the sandboxes"))
}

fn no_slot(message: &str) -> wire::Failure {
    refusal("NO_SLOT", message, "end a sandbox or raise ids.slots in the policy file")
}

fn host_error(error: &(dyn std::error::Error + 'static)) -> wire::Failure {
    let mut failure = refusal("HOST_ERROR", chain(error), "run `sandbox-runner doctor`");
    failure.errno = root_errno(error);
    failure
}

/// Wait status as in wait(2); -1 for a process that is not our child.
fn wait_status(pidfd: &OwnedFd) -> i32 {
    match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
        Ok(WaitStatus::Exited(_, code)) => code << 8,
        Ok(WaitStatus::Signaled(_, signal, core)) => signal as i32 | if core { 0x80 } else { 0 },
        _ => -1,
    }
}
