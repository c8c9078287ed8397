//! Measures process 1 without a sandbox: one `echo hi` through the socket, the shell and back, and a flood of output.
//!
//! Prints numbers and asserts nothing: run it on an idle machine, in a release build, and read it beside the bare floor
//! that it measures in the same run.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement, not a product")]
#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "numbers for people")]
#![allow(unreachable_pub, dead_code, missing_docs, reason = "modules of the library, included as they are")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, listen, recv, send, socket,
};
use prost::Message as _;
use proto::init::v1::{
    AcknowledgeExit, Bash, CallFinished, Frame, Hello, Request, Shutdown, Snapshot, StartCall, frame, request,
    start_call,
};
use sandbox_init::init::{Context, run, slot::Slots};

/// The included spawner names its neighbours from the root of its crate.
mod init {
    pub use sandbox_init::init::spawner;
}
mod sys {
    pub use sandbox_init::sys::child;
}
#[path = "../src/init/local_spawner.rs"]
mod local_spawner;

const ROUNDS: usize = 3000;

struct Client {
    socket: OwnedFd,
    buffer: Vec<u8>,
    next: u64,
}

impl Client {
    fn send(&mut self, body: request::Body) -> u64 {
        self.next += 1;
        let request = Request { request_id: self.next, generation: 1, body: Some(body) };
        send(self.socket.as_raw_fd(), &request.encode_to_vec(), MsgFlags::empty()).unwrap();
        self.next
    }

    fn receive(&mut self) -> Frame {
        let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()).unwrap();
        Frame::decode(&self.buffer[..length]).unwrap()
    }

    fn ask(&mut self, body: request::Body) {
        let id = self.send(body);
        while self.receive().request_id != id {}
    }

    fn bash(&mut self, command: &str) -> CallFinished {
        let call_id = format!("call-{}", self.next);
        let work = start_call::Work::Bash(Bash { command: command.to_owned(), restart: false });
        self.send(request::Body::StartCall(StartCall {
            call_id: call_id.clone(),
            start_immediately: true,
            timeout_ms: 120_000,
            inline_limit_bytes: 65536,
            spool_head_bytes: 1 << 20,
            spool_tail_bytes: 64 << 10,
            work: Some(work),
            ..StartCall::default()
        }));
        loop {
            match self.receive().body {
                Some(frame::Body::CallFinished(finished)) => return finished,
                Some(frame::Body::Failure(failure)) => panic!("{failure:?}"),
                _ => {}
            }
        }
    }

    fn acknowledge(&mut self, call_id: &str) {
        self.ask(request::Body::AcknowledgeExit(AcknowledgeExit { call_id: call_id.to_owned() }));
    }
}

fn report(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_nanos() as f64 / 1000.0;
    println!("{name:<44} p50 {:>8.1} us   p90 {:>8.1} us   p99 {:>8.1} us", at(50), at(90), at(99));
}

fn main() {
    // In a sandbox these directories are on a tmpfs as well.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    for name in ["spool", "call", "work"] {
        std::fs::create_dir(directory.path().join(name)).unwrap();
    }
    let open = |name: &str| OwnedFd::from(File::open(directory.path().join(name)).unwrap());
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let address = directory.path().join("socket");
    bind(listener.as_raw_fd(), &UnixAddr::new(&address).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    let cgroup = PathBuf::from(format!("/sys/fs/cgroup/unified/sbr-shell-latency-{}", std::process::id()));
    let slots = match std::fs::create_dir(&cgroup) {
        Ok(()) => Slots::cgroup(OwnedFd::from(File::open(&cgroup).unwrap())),
        Err(_) => Slots::scan(),
    };
    println!("slots: {}", if cgroup.exists() { "cgroup" } else { "read from /proc" });
    let path = std::env::var("PATH").unwrap();
    let context = Context {
        sandbox_id: "latency".to_owned(),
        listener,
        spawner: Box::new(local_spawner::LocalSpawner),
        spawner_pidfd: None,
        slots,
        v1: None,
        spool_directory: open("spool"),
        spool_path_inside: directory.path().join("spool"),
        spool_budget_bytes: 1 << 30,
        call_directory: open("call"),
        call_path_inside: directory.path().join("call"),
        default_environment: vec![format!("PATH={path}").into_bytes()],
        working_directory: b"/tmp".to_vec(),
        shell_path: PathBuf::from("/bin/bash"),
        own_terminals: false,
        orphan_timeout: None,
        reaps_orphans: false,
    };
    let thread = std::thread::spawn(move || run(context));
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(socket.as_raw_fd(), &UnixAddr::new(&address).unwrap()).unwrap();
    let mut client = Client { socket, buffer: vec![0; 256 * 1024], next: 0 };
    client.ask(request::Body::Hello(Hello { major: 1 }));
    let first = client.bash("true");
    client.acknowledge(&first.call_id);

    let mut shell = Command::new("/bin/bash");
    let mut bare = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut to, mut from) = (bare.stdin.take().unwrap(), bare.stdout.take().unwrap());
    let (mut floor, mut ping, mut echo, mut echo_two) = (vec![], vec![], vec![], vec![]);
    let mut buffer = [0; 4096];
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        to.write_all(b"{ echo hi\n} </dev/null 2>&1; printf '\\n__DONE__%d\\n' $?\n").unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"__DONE__0\n") {
            let length = from.read(&mut buffer).unwrap();
            seen.extend_from_slice(&buffer[..length]);
        }
        floor.push(begin.elapsed());

        let begin = Instant::now();
        client.ask(request::Body::Snapshot(Snapshot {}));
        ping.push(begin.elapsed());

        let begin = Instant::now();
        let finished = client.bash("echo hi");
        echo.push(begin.elapsed());
        assert_eq!(finished.streams[0].inline, b"hi\n");
        client.acknowledge(&finished.call_id);

        let begin = Instant::now();
        let finished = client.bash("cd /tmp && echo hi; x=$((x + 1))");
        echo_two.push(begin.elapsed());
        client.acknowledge(&finished.call_id);
    }
    bare.kill().unwrap();
    bare.wait().unwrap();
    report("floor: bash over pipes with a sentinel", floor);
    report("socket: snapshot and back", ping);
    report("bash call: echo hi", echo);
    report("bash call: cd, echo, assignment", echo_two);

    for (name, command) in
        [("head -c 2G /dev/zero", "head -c 2147483648 /dev/zero"), ("yes | head -c 1G", "yes | head -c 1073741824")]
    {
        let begin = Instant::now();
        let finished = client.bash(command);
        let seconds = begin.elapsed().as_secs_f64();
        let bytes = finished.streams[0].total_bytes as f64;
        println!("{name:<44} {:>8.0} MB/s", bytes / seconds / 1e6);
        client.acknowledge(&finished.call_id);
    }
    client.ask(request::Body::Shutdown(Shutdown { grace_ms: 0 }));
    println!("ended: {:?}", thread.join().unwrap());
    while cgroup.exists() && std::fs::remove_dir(&cgroup).is_err() {
        // What was killed takes a moment to leave.
        for slot in std::fs::read_dir(&cgroup).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir(slot.path());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
