//! The loop of process 1: wait, handle every event, run what is due, tell the runner, then do what nobody waits for.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::sys::child::{Exit, Which, reap};

use super::call::Call;
use super::clock::{Alarm, MILLISECOND, Moment, now};
use super::connection::{Connection, PACKET_LIMIT, Received};
use super::event::{Event, Key};
use super::late::LateOutput;
use super::pipe::READ_BUDGET;
use super::prepare::Staging;
use super::shell::{CallDirectory, Shell};
use super::slot::Slots;
use super::spawner::Spawner;
use super::spool::SpoolDirectory;
use super::stop_work::Stop;
use super::tool_worker::ToolWorker;
use super::{Context, ExitReason};

/// Requests of one wake-up; the rest waits for the next, so that output is read in between.
const REQUESTS_PER_WAKE: usize = 32;
/// How long the answer to a call is looked for without sleeping. A short command of a shell takes a tenth of a millisecond.
const ATTENTION: u64 = MILLISECOND / 5;

/// Process 1.
pub(crate) struct Engine {
    pub(super) sandbox_id: String,
    pub(super) epoll: Epoll,
    pub(super) alarm: Alarm,
    pub(super) listener: UnixListener,
    pub(super) connection: Option<Connection>,
    /// The loop also wakes up when the socket can take more.
    pub(super) waits_for_socket: bool,
    /// Highest generation of a runner seen so far.
    pub(super) generation: u64,
    pub(super) spawner: Box<dyn Spawner + Send>,
    pub(super) spawner_pidfd: Option<OwnedFd>,
    children: Option<SignalFd>,
    pub(super) slots: Slots,
    pub(super) spool: SpoolDirectory,
    pub(super) environment: Vec<Vec<u8>>,
    pub(super) working_directory: Vec<u8>,
    /// A terminal may be opened by its name.
    pub(super) own_terminals: bool,
    pub(super) calls: BTreeMap<Key, Call>,
    pub(super) acknowledged: VecDeque<(String, [u8; 32])>,
    pub(super) staging: Staging,
    pub(super) next_key: Key,
    pub(super) late: LateOutput,
    pub(super) shells: Shells,
    pub(super) deadline: Option<Moment>,
    pub(super) orphan_timeout: Option<Duration>,
    pub(super) alone_since: Option<Moment>,
    pub(super) shutdown: Option<Shutdown>,
    /// The work was ended, and no call has come since.
    pub(super) stop: Option<Stop>,
    pub(super) next_sweep: Option<Moment>,
    /// Until then the loop does not sleep while a call runs.
    attentive_until: Moment,
    /// When the spare that is missing is made.
    pub(super) spare_at: Option<Moment>,
    /// The worker of the file tools while no call is with it.
    pub(super) worker: Option<ToolWorker>,
    /// A call of the worker has ended since the counters of its slot were marked.
    pub(super) worker_needs_mark: bool,
    pub(super) exit: Option<ExitReason>,
    pub(super) buffer: Vec<u8>,
    packet: Vec<u8>,
}

/// The shell and what is remembered between shells.
pub(super) struct Shells {
    pub(super) path: PathBuf,
    pub(super) current: Option<Shell>,
    /// Shells that were killed and not reaped yet.
    pub(super) dying: BTreeMap<Key, OwnedFd>,
    pub(super) generation: u64,
    /// Last known working directory.
    pub(super) working_directory: Vec<u8>,
    /// A shell with state was lost while no call ran; the next call says so.
    pub(super) lost_idle: bool,
    /// A runner is there, so a shell is worth having before the first command.
    pub(super) wanted: bool,
    /// A runner that has just come usually brings a call. On a small machine the start of a shell would delay it by more
    /// than the call takes, so a shell that nobody has asked for yet waits until then.
    pub(super) not_before: Moment,
    pub(super) files: CallDirectory,
    /// The call that has just left the shell; whether it left processes is looked at after its answer was sent.
    pub(super) just_left: Option<String>,
    /// A command has ended since the counters of the slot were marked.
    pub(super) needs_mark: bool,
    /// Something else than our line wrote to the status descriptor of the current shell.
    pub(super) doubted: bool,
}

/// The sandbox is ending.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shutdown {
    pub(super) kill_at: Moment,
}

impl Engine {
    /// Takes over everything in `context`.
    pub(crate) fn new(context: Context) -> Result<Self, nix::Error> {
        let listener = UnixListener::from(context.listener);
        listener.set_nonblocking(true).map_err(errno_of)?;
        let children = if context.reaps_orphans {
            let mask = SigSet::from(Signal::SIGCHLD);
            Some(SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
        } else {
            None
        };
        let mut slots = context.slots.with_v1(context.v1);
        slots.set_sees_orphans(context.reaps_orphans);
        let engine = Self {
            sandbox_id: context.sandbox_id,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            alarm: Alarm::new()?,
            listener,
            connection: None,
            waits_for_socket: false,
            generation: 0,
            spawner: context.spawner,
            spawner_pidfd: context.spawner_pidfd,
            children,
            slots,
            spool: SpoolDirectory::new(context.spool_directory, context.spool_path_inside, context.spool_budget_bytes),
            environment: context.default_environment,
            calls: BTreeMap::new(),
            acknowledged: VecDeque::new(),
            staging: Staging::default(),
            next_key: 1,
            late: LateOutput::default(),
            shells: Shells {
                path: context.shell_path,
                current: None,
                dying: BTreeMap::new(),
                generation: 0,
                working_directory: context.working_directory.clone(),
                lost_idle: false,
                wanted: false,
                not_before: now(),
                files: CallDirectory::new(context.call_directory, &context.call_path_inside),
                just_left: None,
                needs_mark: false,
                doubted: false,
            },
            working_directory: context.working_directory,
            own_terminals: context.own_terminals,
            deadline: None,
            orphan_timeout: context.orphan_timeout,
            alone_since: Some(now()),
            shutdown: None,
            stop: None,
            next_sweep: None,
            attentive_until: 0,
            spare_at: None,
            worker: None,
            worker_needs_mark: false,
            exit: None,
            buffer: vec![0; READ_BUDGET],
            packet: vec![0; PACKET_LIMIT + 1],
        };
        engine.watch(&engine.listener, Event::Accept)?;
        engine.watch(&engine.alarm, Event::Alarm)?;
        if let Some(pidfd) = &engine.spawner_pidfd {
            engine.watch(pidfd, Event::SpawnerGone)?;
        }
        if let Some(children) = &engine.children {
            engine.watch(children, Event::Children)?;
        }
        Ok(engine)
    }

    /// Runs until the sandbox ends.
    pub(crate) fn run(&mut self) -> ExitReason {
        let mut events = [EpollEvent::empty(); 32];
        loop {
            self.run_due(now());
            if self.tell_runner() {
                // The runner may have been woken on this very processor, and it goes first.
                let _ = nix::sched::sched_yield();
            }
            self.do_idle_work();
            if let Some(reason) = self.exit.take() {
                self.tear_down();
                return reason;
            }
            let count = match self.wait(&mut events) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(error) => {
                    self.tear_down();
                    return ExitReason::Failed(error);
                }
            };
            for event in events.iter().take(count) {
                if let Some(event) = Event::from_token(event.data()) {
                    self.handle(event);
                }
            }
        }
    }

    /// Waits for events. Right after a call was handed on it looks again and again for a moment, because waking a process
    /// whose processor has gone to sleep takes longer than most short commands; whoever else can run there goes first.
    fn wait(&mut self, events: &mut [EpollEvent]) -> nix::Result<usize> {
        while now() < self.attentive_until && self.has_running() {
            match self.epoll.wait(events, EpollTimeout::ZERO)? {
                // Nothing depends on whether somebody else ran.
                0 => drop(nix::sched::sched_yield()),
                count => return Ok(count),
            }
        }
        let timeout = self.sleep_until(self.next_due());
        self.epoll.wait(events, timeout)
    }

    /// A call was handed on: its answer is awaited attentively.
    pub(super) fn attend(&mut self) {
        self.attentive_until = now().saturating_add(ATTENTION);
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Accept => self.accept(),
            Event::Connection => self.serve_connection(),
            Event::Alarm => self.alarm.acknowledge(),
            Event::Children => self.reap_children(),
            Event::SpawnerGone => self.exit = Some(ExitReason::SpawnerGone),
            Event::Output(key, index) => self.read_output(key, index),
            Event::Stdin(key) => self.feed_stdin(key),
            Event::StartError(key) => self.look_at_start(key),
            Event::Process(key) => self.reap_process(key),
            Event::ShellStatus(key) => self.listen_to_shell(key),
            Event::ShellProcess(key) => self.reap_shell(key),
            Event::Worker(key) => self.listen_to_worker(key),
            Event::WorkerProcess(key) => self.reap_worker(key),
        }
    }

    /// Wakes the loop with `event` whenever `fd` can be read.
    pub(super) fn watch(&self, fd: impl AsFd, event: Event) -> Result<(), nix::Error> {
        self.epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, event.token()))
    }

    /// A key that was never used before.
    pub(super) fn new_key(&mut self) -> Key {
        let key = self.next_key;
        self.next_key = self.next_key.saturating_add(1);
        key
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            // The newest connection wins: the older runner is gone, or is about to notice that it is not wanted.
            let connection = Connection::new(OwnedFd::from(stream));
            if self.watch(&connection, Event::Connection).is_ok() {
                self.alone_since = None;
                self.connection = Some(connection);
                self.waits_for_socket = false;
            }
        }
    }

    fn serve_connection(&mut self) {
        for _ in 0..REQUESTS_PER_WAKE {
            let Some(connection) = &mut self.connection else { return };
            if connection.flush().is_err() {
                return self.disconnect();
            }
            if !connection.may_read() {
                return;
            }
            match connection.receive(&mut self.packet) {
                Received::Request(request) => self.answer(*request),
                Received::Nothing => return,
                Received::Over => return self.disconnect(),
            }
        }
    }

    /// Forgets the connection. Calls go on; what they have to say waits for the next runner.
    pub(super) fn disconnect(&mut self) {
        self.connection = None;
        self.alone_since = Some(now());
    }

    /// While something waits for the socket, the loop wakes up when the socket can take more.
    pub(super) fn watch_connection(&mut self, wants_to_write: bool) {
        let Some(connection) = &self.connection else { return };
        let reads = if connection.may_read() { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
        let writes = if wants_to_write { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        let mut interest = EpollEvent::new(reads | writes, Event::Connection.token());
        // A connection that cannot be watched cannot be served.
        if self.epoll.modify(connection, &mut interest).is_err() {
            self.disconnect();
        }
    }

    fn reap_children(&mut self) {
        if let Some(children) = &self.children {
            while let Ok(Some(_)) = children.read_signal() {}
        }
        // A reaped pid may be used again at once, so whose it was is settled before the next one is reaped.
        while let Ok(Some((pid, exit))) = reap(Which::Any) {
            self.child_ended(pid, exit);
        }
    }

    fn child_ended(&mut self, pid: nix::unistd::Pid, exit: Exit) {
        if self.shells.current.as_ref().is_some_and(|shell| shell.pid == pid) {
            return self.shell_ended(exit);
        }
        if self.worker.as_ref().is_some_and(|worker| worker.pid == pid) {
            return self.end_idle_worker();
        }
        let owner = self.calls.values_mut().find_map(|call| {
            let key = call.key;
            let running = call.running()?;
            let is_worker = running.worker().is_some_and(|body| body.worker.pid == pid);
            (is_worker || running.process()?.pid == pid).then_some((key, is_worker))
        });
        match owner {
            Some((key, true)) => self.worker_ended(key, exit),
            Some((key, false)) => self.process_ended(key, exit),
            None => {}
        }
    }

    fn tear_down(&mut self) {
        self.slots.tear_down();
        if let Some(shell) = &self.shells.current {
            // Where slots are read from /proc the shell may have escaped the reading; it is our child in any case.
            let _ = nix::sys::signal::kill(shell.pid, Signal::SIGKILL);
        }
        self.end_idle_worker();
        self.shells.files.clear();
    }
}

/// The number behind an error of the standard library.
pub(super) fn errno_of(error: std::io::Error) -> nix::Error {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
