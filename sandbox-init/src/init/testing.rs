//! A running engine and a runner that talks to it over a real socket.

use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen, recv, send, socket,
};
use prost::Message as _;
use proto::init::v1::{
    AcknowledgeExit, Bash, CallFinished, CallPrepared, Cancel, CancelMode, Exec, Failure, Frame, Hello, OutputData,
    OutputMode, ReadOutput, Request, StartCall, Stream, Welcome, frame, outcome::Kind, request, start_call,
};

use super::local_spawner::LocalSpawner;
use super::slot::Slots;
use super::{Context, ExitReason, run};

/// Nothing takes so long.
pub(crate) fn patience() -> Duration {
    scaled(Duration::from_secs(30))
}

/// A time on this machine. `SANDBOX_TEST_PATIENCE` says how many times slower than a real one an emulated one is.
pub(crate) fn scaled(time: Duration) -> Duration {
    time * std::env::var("SANDBOX_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// A sandbox without a sandbox: the engine in a thread, processes of this machine.
pub(crate) struct TestSandbox {
    pub(crate) directory: tempfile::TempDir,
    thread: Option<JoinHandle<ExitReason>>,
    cgroup: Option<PathBuf>,
}

/// The runner's side of a connection.
pub(crate) struct Client {
    socket: OwnedFd,
    next_request: u64,
    next_call: u64,
    pub(crate) generation: u64,
    /// Events that were not asked for yet.
    pub(crate) events: Vec<frame::Body>,
}

/// What a finished call printed and how it ended.
#[derive(Debug)]
pub(crate) struct TestResult {
    pub(crate) finished: CallFinished,
}

/// What an engine needs, in an empty directory.
pub(crate) fn context(directory: &Path, slots: Slots) -> Context {
    for name in ["spool", "call", "work"] {
        std::fs::create_dir(directory.join(name)).unwrap();
    }
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(&directory.join("socket")).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    let open = |name: &str| OwnedFd::from(File::open(directory.join(name)).unwrap());
    let path = std::env::var("PATH").unwrap();
    Context {
        sandbox_id: "sandbox-of-the-test".to_owned(),
        listener,
        spawner: Box::new(LocalSpawner),
        spawner_pidfd: None,
        slots,
        v1: None,
        spool_directory: open("spool"),
        spool_path_inside: directory.join("spool"),
        spool_budget_bytes: 1 << 30,
        call_directory: open("call"),
        call_path_inside: directory.join("call"),
        default_environment: vec![format!("PATH={path}").into_bytes(), b"HOME=/nowhere".to_vec()],
        working_directory: directory.join("work").into_os_string().into_encoded_bytes(),
        shell_path: PathBuf::from("/bin/bash"),
        own_terminals: false,
        orphan_timeout: None,
        reaps_orphans: false,
    }
}

impl TestSandbox {
    pub(crate) fn start() -> Self {
        Self::start_with(|_| {})
    }

    /// Starts an engine whose context was changed.
    pub(crate) fn start_with(change: impl FnOnce(&mut Context)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let cgroup = make_cgroup();
        let slots = match &cgroup {
            Some(path) => Slots::cgroup(OwnedFd::from(File::open(path).unwrap())),
            None => Slots::scan(),
        };
        let mut context = context(directory.path(), slots);
        change(&mut context);
        let thread = std::thread::spawn(move || run(context));
        Self { directory, thread: Some(thread), cgroup }
    }

    /// The working directory of calls.
    pub(crate) fn work(&self) -> PathBuf {
        self.directory.path().join("work")
    }

    /// Connects without a greeting.
    pub(crate) fn connect_silently(&self, generation: u64) -> Client {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(&self.directory.path().join("socket")).unwrap()).unwrap();
        let timeout = nix::sys::time::TimeVal::new(i64::try_from(patience().as_secs()).unwrap(), 0);
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::ReceiveTimeout, &timeout).unwrap();
        Client { socket, next_request: 1, next_call: 1, generation, events: Vec::new() }
    }

    /// Connects as the runner of this generation.
    pub(crate) fn connect(&self, generation: u64) -> Client {
        let mut client = self.connect_silently(generation);
        let welcome = client.greet();
        assert_eq!((welcome.major, welcome.sandbox_id.as_str()), (1, "sandbox-of-the-test"));
        client
    }

    /// Waits for the end of the engine.
    pub(crate) fn join(&mut self) -> ExitReason {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for TestSandbox {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            if !thread.is_finished() {
                let mut client = self.connect(u64::MAX >> 1);
                let _ = client.ask(request::Body::Shutdown(proto::init::v1::Shutdown { grace_ms: 0 }));
            }
            let _ = thread.join();
        }
        if let Some(cgroup) = &self.cgroup {
            remove_cgroup(cgroup);
        }
    }
}

impl Client {
    pub(crate) fn greet(&mut self) -> Welcome {
        match self.ask(request::Body::Hello(Hello { major: 1 })) {
            frame::Body::Welcome(welcome) => welcome,
            other => panic!("no welcome but {other:?}"),
        }
    }

    /// Sends bytes as they are.
    pub(crate) fn send_raw(&self, bytes: &[u8]) -> nix::Result<usize> {
        send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)
    }

    /// Sends a request and returns its id.
    pub(crate) fn send(&mut self, body: request::Body) -> u64 {
        let request_id = self.next_request;
        self.next_request += 1;
        let request = Request { request_id, generation: self.generation, body: Some(body) };
        self.send_raw(&request.encode_to_vec()).unwrap();
        request_id
    }

    /// The next packet; `None` when the connection is closed.
    pub(crate) fn receive(&mut self) -> Option<Frame> {
        let mut buffer = vec![0; 256 * 1024];
        let mut length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty());
        while length == Err(nix::Error::EINTR) {
            length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty());
        }
        match length {
            Ok(0) | Err(nix::Error::ECONNRESET) => None,
            Ok(length) => Some(Frame::decode(&buffer[..length]).unwrap()),
            Err(error) => panic!("nothing came from process 1: {error}"),
        }
    }

    /// Sends a request and waits for its answer; events on the way are kept.
    pub(crate) fn ask(&mut self, body: request::Body) -> frame::Body {
        let request_id = self.send(body);
        loop {
            let frame = self.receive().expect("process 1 has closed the connection");
            if frame.request_id == request_id {
                // The end of a call that was over at once is the answer to its start, and an event all the same.
                if let Some(frame::Body::CallFinished(finished)) = &frame.body {
                    let prepared = CallPrepared { call_id: finished.call_id.clone() };
                    self.events.push(frame::Body::CallFinished(finished.clone()));
                    return frame::Body::CallPrepared(prepared);
                }
                return frame.body.unwrap();
            }
            assert_eq!(frame.request_id, 0);
            self.events.push(frame.body.unwrap());
        }
    }

    /// Sends a request that must be refused.
    pub(crate) fn refused(&mut self, body: request::Body) -> Failure {
        match self.ask(body) {
            frame::Body::Failure(failure) => failure,
            other => panic!("not refused but {other:?}"),
        }
    }

    /// Sends a request that must be done.
    pub(crate) fn done(&mut self, body: request::Body) {
        match self.ask(body) {
            frame::Body::Done(_) | frame::Body::CallPrepared(_) => {}
            other => panic!("not done but {other:?}"),
        }
    }

    /// Waits for an event.
    pub(crate) fn wait_for<Wanted>(&mut self, pick: impl Fn(&frame::Body) -> Option<Wanted>) -> Wanted {
        let until = Instant::now() + patience();
        loop {
            if let Some(at) = self.events.iter().position(|event| pick(event).is_some()) {
                return pick(&self.events.remove(at)).unwrap();
            }
            assert!(Instant::now() < until, "the event did not come");
            let frame = self.receive().expect("process 1 has closed the connection");
            self.events.push(frame.body.unwrap());
        }
    }

    pub(crate) fn new_call_id(&mut self) -> String {
        self.next_call += 1;
        format!("g{}-call-{}", self.generation, self.next_call)
    }

    /// A call with the usual limits.
    pub(crate) fn call(&mut self, work: start_call::Work) -> StartCall {
        StartCall {
            call_id: self.new_call_id(),
            start_immediately: true,
            timeout_ms: 0,
            grace_ms: 200,
            output_mode: OutputMode::Merged.into(),
            inline_limit_bytes: 65536,
            spool_head_bytes: 16 << 20,
            spool_tail_bytes: 1 << 20,
            staged_input_bytes: 0,
            work: Some(work),
        }
    }

    /// Starts a call and does not wait for its end.
    pub(crate) fn start(&mut self, call: StartCall) -> String {
        let call_id = call.call_id.clone();
        self.done(request::Body::StartCall(call));
        call_id
    }

    pub(crate) fn start_bash(&mut self, command: &str) -> String {
        let call = self.call(bash(command));
        self.start(call)
    }

    /// Waits for the end of a call and acknowledges it.
    pub(crate) fn finish(&mut self, call_id: &str) -> TestResult {
        let result = self.finish_unacknowledged(call_id);
        self.done(request::Body::AcknowledgeExit(AcknowledgeExit { call_id: call_id.to_owned() }));
        result
    }

    pub(crate) fn finish_unacknowledged(&mut self, call_id: &str) -> TestResult {
        let finished = self.wait_for(|event| match event {
            frame::Body::CallFinished(finished) if finished.call_id == call_id => Some(finished.clone()),
            _ => None,
        });
        self.events.retain(|event| match event {
            frame::Body::CallStarted(started) => started.call_id != call_id,
            frame::Body::OutputAdvanced(advanced) => advanced.call_id != call_id,
            _ => true,
        });
        TestResult { finished }
    }

    pub(crate) fn run(&mut self, call: StartCall) -> TestResult {
        let call_id = self.start(call);
        self.finish(&call_id)
    }

    /// Runs a command in the shell.
    pub(crate) fn bash(&mut self, command: &str) -> TestResult {
        let call = self.call(bash(command));
        self.run(call)
    }

    /// Runs a command that takes too long: it is ended as timed out.
    pub(crate) fn bash_with_timeout(&mut self, command: &str, timeout_ms: u64) -> TestResult {
        let call = StartCall { timeout_ms, ..self.call(bash(command)) };
        self.run(call)
    }

    /// Runs a program.
    pub(crate) fn exec(&mut self, argv: &[&str]) -> TestResult {
        let call = self.call(exec(argv));
        self.run(call)
    }

    pub(crate) fn cancel(&mut self, call_id: &str, mode: CancelMode) {
        self.done(request::Body::Cancel(Cancel { call_id: call_id.to_owned(), mode: mode.into() }));
    }

    pub(crate) fn read_output(&mut self, call_id: &str, stream: Stream, offset: u64, max_bytes: u32) -> OutputData {
        let read = ReadOutput { call_id: call_id.to_owned(), stream: stream.into(), offset, max_bytes };
        match self.ask(request::Body::ReadOutput(read)) {
            frame::Body::OutputData(data) => data,
            other => panic!("no output but {other:?}"),
        }
    }

    /// Waits until a running call has printed `text`.
    pub(crate) fn wait_for_output(&mut self, call_id: &str, text: &str) {
        let until = Instant::now() + patience();
        loop {
            let data = self.read_output(call_id, Stream::Stdout, 0, 65536);
            if String::from_utf8_lossy(&data.data).contains(text) {
                return;
            }
            assert!(Instant::now() < until, "{text} was not printed");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl TestResult {
    pub(crate) fn kind(&self) -> &Kind {
        self.finished.outcome.as_ref().unwrap().kind.as_ref().unwrap()
    }

    pub(crate) fn code(&self) -> i32 {
        match self.kind() {
            Kind::Exited(exited) => exited.code,
            other => panic!("not exited but {other:?} {:?}", self.finished),
        }
    }

    pub(crate) fn bytes(&self, stream: Stream) -> Vec<u8> {
        let summary = self.finished.streams.iter().find(|summary| summary.stream() == stream).unwrap();
        assert!(summary.inline_complete, "not inline: {summary:?}");
        summary.inline.clone()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.bytes(Stream::Stdout)).unwrap()
    }

    pub(crate) fn has_note(&self, kind: proto::init::v1::NoteKind) -> bool {
        self.finished.notes.iter().any(|note| note.kind() == kind)
    }
}

pub(crate) fn bash(command: &str) -> start_call::Work {
    start_call::Work::Bash(Bash { command: command.to_owned(), restart: false })
}

pub(crate) fn exec(argv: &[&str]) -> start_call::Work {
    let argv = argv.iter().map(|argument| argument.as_bytes().to_vec()).collect();
    start_call::Work::Exec(Exec { argv, ..Exec::default() })
}

/// A cgroup of our own in the unified hierarchy, where this user may make one.
fn make_cgroup() -> Option<PathBuf> {
    static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .find(|path| Path::new(path).join("cgroup.controllers").exists())?;
    let path = Path::new(root).join(format!("sbr-shell-{}-{count}", std::process::id()));
    std::fs::create_dir(&path).ok()?;
    Some(path)
}

fn remove_cgroup(path: &Path) {
    let until = Instant::now() + patience();
    loop {
        for entry in std::fs::read_dir(path).into_iter().flatten().flatten() {
            let _ = std::fs::write(entry.path().join("cgroup.kill"), "1");
            let _ = std::fs::remove_dir(entry.path());
        }
        if std::fs::remove_dir(path).is_ok() || !path.exists() || Instant::now() > until {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
