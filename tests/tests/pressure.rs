//! A runner whose host runs short of something takes no new work, says why, goes on with what it has, and takes work again.
//!
//! The built daemon beside a launcher of its own, real sandboxes; a small file system of its own and the limits of the
//! running process are what it runs short of.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs::{self, File, Metadata, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{DevError, LinkSettings, Session};
use sandbox_runner_tests::daemon::{Daemon, MARKER, Options, PATIENCE, Workspace, bash, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::launcher::RUNNER_UID;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::{binary, scaled};
use sha2::{Digest, Sha256};

const MIB: u64 = 1 << 20;

/// A directory on a file system of its own.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn on(directory: &Path, options: &str) -> Self {
        let before = fs::metadata(directory).expect("a directory");
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("a tmpfs");
        Self(directory.to_owned()).looking_like(&before)
    }

    /// An ext4 in the file `image`; where there are no loop devices, a tmpfs of the same size.
    fn in_file(directory: &Path, image: &Path, bytes: u64) -> Self {
        let before = fs::metadata(directory).expect("a directory");
        File::create(image).and_then(|file| file.set_len(bytes)).expect("an image");
        let works = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        // The kernel gives the device back with the last user of the file system.
        let mounted = works(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(image))
            && works(Command::new("mount").args(["-o", "loop"]).arg(image).arg(directory));
        if mounted {
            Self(directory.to_owned()).looking_like(&before)
        } else {
            Self::on(directory, &format!("size={bytes}"))
        }
    }

    fn looking_like(self, before: &Metadata) -> Self {
        chown(&self.0, Some(before.uid()), Some(before.gid())).expect("chown");
        fs::set_permissions(&self.0, Permissions::from_mode(before.mode() & 0o7777)).expect("chmod");
        self
    }

    /// Leaves so many bytes.
    fn leave(&self, bytes: u64) {
        let found = statvfs(&self.0).expect("its numbers");
        let taken = found.blocks_available() * found.fragment_size() - bytes;
        fs::write(self.filler(), vec![1; usize::try_from(taken).expect("small")]).expect("it fits");
    }

    /// Takes every byte that is left.
    fn fill(&self) {
        let mut file = File::options().create(true).append(true).open(self.filler()).expect("a file");
        // What is written down may take less room than what was set aside for it.
        for _ in 0..3 {
            for bytes in [1 << 20, 4096] {
                while file.write_all(&vec![1; bytes]).is_ok() {}
            }
            file.sync_all().expect("what was taken is written");
        }
    }

    fn make_room(&self) {
        fs::remove_file(self.filler()).expect("ours");
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What is still open in it goes with whoever has it open.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// The refusal of a session, or the session.
async fn open(daemon: &Daemon, name: &str) -> Result<Session, pb::ToolFailure> {
    let request = pb::OpenSession { session_id: name.into(), ..Default::default() };
    match within(name, daemon.orchestrator.open_session(request)).await {
        Ok(session) => Ok(session),
        Err(DevError::Refused { failure, .. }) => Err(*failure),
        Err(other) => panic!("{name}: {other}"),
    }
}

/// The refusal of a call, or what it printed.
async fn call(session: &Session, call_id: &str, input: pb::call::Input) -> Result<Vec<u8>, pb::ToolFailure> {
    match within(call_id, session.run(call_id, input)).await {
        Ok(finished) => Ok(finished.streams.get(&1).map(|stream| stream.bytes.clone()).unwrap_or_default()),
        Err(DevError::Refused { failure, .. }) => Err(*failure),
        Err(other) => panic!("{call_id}: {other}"),
    }
}

fn glob() -> pb::call::Input {
    pb::call::Input::Glob(pb::GlobInput { pattern: "*".into(), ..Default::default() })
}

/// Waits for a heartbeat that says this, or that nothing is short.
async fn until_told(daemon: &Daemon, reason: Option<&str>) {
    let deadline = Instant::now() + scaled(PATIENCE);
    loop {
        let told = daemon.orchestrator.heartbeats().1.map(|last| (last.health(), last.reasons));
        match (&told, reason) {
            (Some((pb::HealthState::Saturated, reasons)), Some(reason))
                if reasons.iter().any(|told| told.contains(reason)) =>
            {
                return;
            }
            (Some((pb::HealthState::Ready, reasons)), None) if reasons.is_empty() => return,
            _ => {}
        }
        assert!(Instant::now() < deadline, "{reason:?} is not told, but {told:?}: {}", daemon.end_of_log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the daemon says of itself to people.
fn status(daemon: &Daemon) -> serde_json::Value {
    let [_, run] = daemon.directories();
    let output = Command::new(binary())
        .args(["status", "--json", "--socket"])
        .arg(run.join("admin.sock"))
        .output()
        .expect("the command runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn often() -> LinkSettings {
    LinkSettings { heartbeat_every: Duration::from_millis(200), ..LinkSettings::default() }
}

async fn end(mut daemon: Daemon, disk: Option<SmallDisk>, session: &Session) {
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    daemon.end_with_nothing_left();
    drop(disk);
}

/// F-36, F-37: bytes first, then files.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_that_fills_closes_sessions_then_what_writes_and_opens_again() {
    needs_root!();
    let _host = host::exclusive();
    let pressure =
        format!("disk_low_bytes = {}\ndisk_critical_bytes = {}\nmemory_stall_percent = 0\n", 16 * MIB, 8 * MIB);
    let mut daemon = Daemon::install(Options { pressure, link: often(), ..Options::default() }).await;
    let [_, run] = daemon.directories();
    let disk = SmallDisk::on(&run, "size=32m,nr_inodes=1000,mode=0755");
    daemon.start_launcher().await;
    daemon.start_runner().await;
    let session = open(&daemon, "first").await.expect("there is room");
    until_told(&daemon, None).await;

    let ballast = run.join("ballast");
    fs::write(&ballast, vec![1; 20 << 20]).expect("it fits");
    until_told(&daemon, Some("of the run disk are free, 16 MiB are kept free")).await;
    let refused = open(&daemon, "second").await.expect_err("the disk is low");
    assert_eq!((refused.code.as_str(), refused.retryable), ("DISK_LOW", true));
    assert!(refused.message.contains("MiB of the run disk are free"), "{}", refused.message);
    assert_eq!(call(&session, "works", bash("echo yes")).await, Ok(b"yes\n".to_vec()));

    fs::write(&ballast, vec![1; 26 << 20]).expect("it fits");
    until_told(&daemon, Some("8 MiB are kept free")).await;
    let refused = call(&session, "writes", bash("echo no")).await.expect_err("it may write");
    assert_eq!(refused.code, "DISK_LOW");
    call(&session, "reads", glob()).await.expect("it only reads");
    let told = status(&daemon);
    assert_eq!(told["numbers"]["refused_total{request=\"open\",code=\"DISK_LOW\"}"], 1);
    assert_eq!(told["numbers"]["refused_total{request=\"call\",code=\"DISK_LOW\"}"], 1);
    assert!(told["numbers"]["disk_free_inodes{disk=\"run\"}"].as_u64().is_some_and(|free| free < 1000), "{told}");
    assert!(told["short_of"].as_array().is_some_and(|reasons| reasons.len() == 2), "{told}");
    assert!(told["numbers"]["disk_free_bytes{disk=\"run\"}"].as_u64().is_some_and(|free| free < 8 * MIB), "{told}");

    fs::remove_file(&ballast).expect("ours");
    until_told(&daemon, None).await;
    assert_eq!(call(&session, "again", bash("echo yes")).await, Ok(b"yes\n".to_vec()));

    let files = run.join("files");
    fs::create_dir(&files).expect("a directory");
    for number in 0.. {
        if File::create(files.join(number.to_string())).is_err() {
            break;
        }
    }
    until_told(&daemon, Some("files more fit on the run disk")).await;
    assert_eq!(open(&daemon, "third").await.expect_err("no file fits").code, "DISK_LOW");
    fs::remove_dir_all(&files).expect("ours");
    until_told(&daemon, None).await;
    let second = open(&daemon, "fourth").await.expect("there is room again");
    within("close", second.close(Duration::ZERO)).await.expect("the session ends");
    end(daemon, Some(disk), &session).await;
}

/// Processor time of a process, in hundredths of a second.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum()
}

fn limit_descriptors(pid: u32, soft: u64) {
    // As the runner's own user: root may lack the capability over the processes of others.
    let status = Command::new("prlimit")
        .uid(RUNNER_UID)
        .gid(RUNNER_UID)
        .args(["--pid", &pid.to_string(), &format!("--nofile={soft}:")])
        .status()
        .expect("prlimit runs");
    assert!(status.success());
}

/// F-54: without a free descriptor nothing is taken, nothing breaks and nothing spins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_without_descriptors_refuses_work_does_not_spin_and_recovers() {
    needs_root!();
    let _host = host::exclusive();
    let mut daemon = Daemon::install(Options { link: often(), ..Options::default() }).await;
    daemon.start_launcher().await;
    // The lower limit is raised to the higher one at start.
    daemon.start_runner_with(&["prlimit", "--nofile=64:256"]).await;
    let session = open(&daemon, "first").await.expect("there is room");
    assert_eq!(call(&session, "before", bash("export KEPT=yes; echo yes")).await, Ok(b"yes\n".to_vec()));
    until_told(&daemon, None).await;
    assert_eq!(status(&daemon)["numbers"]["descriptors_limit"], 256);
    let pid = daemon.runner_pid().expect("it runs");

    // What it uses, without what it holds to give back.
    limit_descriptors(pid, host::descriptors(pid) - 16);
    until_told(&daemon, Some("descriptors are open")).await;
    let [_, run] = daemon.directories();
    let knocks: Vec<_> =
        (0..20).map(|_| UnixStream::connect(run.join("admin.sock")).expect("the backlog takes it")).collect();
    let (heartbeats, used, since) = (daemon.orchestrator.heartbeats().0, ticks(pid), Instant::now());
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (used, hundredths) = (ticks(pid) - used, u64::try_from(since.elapsed().as_millis() / 10).expect("few"));
    assert!(used * 2 < hundredths, "it spins: {used} of {hundredths} hundredths of a second");
    assert!(daemon.orchestrator.heartbeats().0 > heartbeats, "it is silent");
    assert_eq!(open(&daemon, "second").await.expect_err("no descriptor is free").code, "FD_LOW");
    assert_eq!(call(&session, "during", bash("echo no")).await.expect_err("no descriptor is free").code, "FD_LOW");

    drop(knocks);
    limit_descriptors(pid, 256);
    until_told(&daemon, None).await;
    assert_eq!(call(&session, "after", bash("echo $KEPT")).await, Ok(b"yes\n".to_vec()));
    let second = open(&daemon, "third").await.expect("there is room again");
    within("close", second.close(Duration::ZERO)).await.expect("the session ends");
    assert_eq!(daemon.orchestrator.links(), 1, "the link broke");
    end(daemon, None, &session).await;
}

/// A session with the workspace of its sandbox.
async fn session_with_workspace(daemon: &Daemon, name: &str) -> (Session, Workspace) {
    let session = daemon.session(name).await;
    within(name, session.run(&format!("{name}-marks"), bash(format!("echo {name} > {MARKER}")))).await.expect("an end");
    (session, Workspace::find(name).expect("its sandbox"))
}

fn kind(finished: &pb::CallFinished) -> Option<&Kind> {
    finished.outcome.as_ref().and_then(|outcome| outcome.kind.as_ref())
}

fn notes_about_the_disk(finished: &pb::CallFinished) -> Vec<&str> {
    let notes = finished.notes.iter().filter(|note| note.kind() == pb::NoteKind::DiskLimit);
    notes.map(|note| note.text.as_str()).collect()
}

/// F-36: the file that keeps the output of a command meets a full disk. What the disk does not take is a hole that is declared,
/// and costs neither the command nor the hash of what it has printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_that_meets_a_full_disk_is_a_declared_hole_and_the_command_goes_on_to_its_end() {
    const LAST: u64 = 5_400_000;
    needs_root!();
    let _host = host::exclusive();
    let mut daemon = Daemon::install(Options::default()).await;
    // Only the launcher's state, where output is kept: a runner does not start with a journal in memory.
    let [state, _] = daemon.directories();
    let own = state.with_file_name("own");
    fs::rename(&state, &own).expect("ours");
    fs::create_dir(&state).expect("a directory");
    fs::set_permissions(&state, Permissions::from_mode(0o711)).expect("chmod");
    let (before, after) = (state.to_str().expect("text"), own.to_str().expect("text"));
    let config = fs::read_to_string(daemon.config()).expect("the configuration").replace(before, after);
    fs::write(daemon.config(), config).expect("the configuration");
    let disk = SmallDisk::on(&state, "size=32m");
    daemon.start_launcher().await;
    daemon.start_runner().await;
    let (session, workspace) = session_with_workspace(&daemon, "prints").await;
    let marker = workspace.path(MARKER);
    let script = format!("until [ -e /workspace/go ]; do sleep 0.05; done; seq {LAST}; rm /workspace/{MARKER}; exit 3");
    session.send("prints", bash(script));
    within("start", session.started("prints")).await.expect("started");

    disk.leave(3 * MIB);
    // Nobody reads along, or what came in time would be missing nowhere.
    let stopped = host::Stopped::new(daemon.runner_pid().expect("it runs"));
    fs::write(workspace.path("go"), "").expect("a file");
    let deadline = Instant::now() + scaled(PATIENCE);
    while marker.exists() {
        assert!(Instant::now() < deadline, "the command stands still: {}", daemon.end_of_log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(stopped);

    let finished = within("prints", session.outcome("prints")).await.expect("an end");
    let (message, stream) = (&finished.message, &finished.streams[&1]);
    assert_eq!(kind(message), Some(&Kind::Exited(pb::Exited { code: 3 })));
    let whole = (1..=LAST).map(|number| format!("{number}\n")).collect::<String>().into_bytes();
    let summary = message.streams.iter().find(|summary| summary.stream == 1).expect("its summary");
    assert_eq!(summary.total_bytes, whole.len() as u64);
    assert_eq!(summary.sha256, Sha256::digest(&whole).to_vec(), "the hash is not that of what was printed");
    assert_eq!(stream.through, whole.len() as u64);
    // Without the disk it would be more than twice as much.
    let first = stream.holes.first().expect("a hole");
    assert!((MIB..=3 * MIB).contains(&first.0), "the first hole begins at {first:?}");
    let (mut kept, mut at) = (Vec::new(), 0);
    for hole in &stream.holes {
        let [from, to] = [hole.0, hole.0 + hole.1].map(|offset| usize::try_from(offset).expect("small"));
        kept.extend_from_slice(&whole[at..from]);
        at = to;
    }
    kept.extend_from_slice(&whole[at..]);
    assert!(stream.bytes == kept, "a byte beside the holes {:?} is wrong", stream.holes);
    let told = "not all output could be kept: the disk that keeps it is full";
    assert_eq!(notes_about_the_disk(message), [told]);

    let dropped: u64 = stream.holes.iter().map(|hole| hole.1).sum();
    assert_eq!(status(&daemon)["numbers"]["output_dropped_bytes_total"], dropped);

    assert_eq!(call(&session, "while-full", bash("echo yes")).await, Ok(b"yes\n".to_vec()));
    disk.make_room();
    let finished = within("later", session.run("later", bash("seq 300000"))).await.expect("an end");
    assert_eq!(finished.streams[&1].bytes, (1..=300_000).map(|n| format!("{n}\n")).collect::<String>().into_bytes());
    assert_eq!(notes_about_the_disk(&finished.message), [""; 0]);
    end(daemon, Some(disk), &session).await;
}

/// A runner whose journal has used up what was set aside for a full disk, with a call that runs and one that waits behind it.
struct FullJournal {
    // Dropped in this order: a directory that is still mounted cannot be removed.
    disk: SmallDisk,
    daemon: Daemon,
    /// Of the call that runs until there is a file `go`, and the one behind it.
    busy: (Session, Workspace),
    other: Session,
    /// Calls of the other session that ran until the disk was full.
    ran: u64,
}

/// Counts itself where each run of it is seen.
fn counted(name: &str, rest: &str) -> pb::call::Input {
    bash(format!("echo {name} >> /workspace/count; {rest}"))
}

impl FullJournal {
    async fn new() -> Self {
        let mut daemon = Daemon::install(Options { link: often(), ..Options::default() }).await;
        let [state, _] = daemon.directories();
        // Of the journal alone: what sandboxes write may not make it full, nor fail with it.
        let image = state.with_file_name("image");
        let disk = SmallDisk::in_file(&state.join("journal"), &image, 160 * MIB);
        daemon.start_launcher().await;
        daemon.start_runner().await;
        let busy = session_with_workspace(&daemon, "busy").await;
        let other = daemon.session("other").await;
        busy.0.send("runs", counted("runs", "until [ -e /workspace/go ]; do sleep 0.05; done; seq 3; exit 3"));
        within("start", busy.0.started("runs")).await.expect("started");
        busy.0.send("waits", counted("waits", "echo yes"));
        until_told(&daemon, None).await;

        disk.fill();
        let mut full = Self { daemon, disk, busy, other, ran: 0 };
        full.use_ballast_up().await;
        until_told(&full.daemon, Some("the disk of the journal is full")).await;
        full.disk.fill();
        full
    }

    /// Sends calls until one is refused: a segment is full, and there is room for the next one only where the ballast was.
    async fn use_ballast_up(&mut self) {
        let padding = "#".repeat(200_000);
        for attempt in 0..1000 {
            let call_id = format!("fills-{attempt}");
            let input = counted(&self.ran.to_string(), &format!("true {padding}"));
            match within(&call_id, self.other.run(&call_id, input)).await {
                Ok(finished) => match kind(&finished.message) {
                    Some(Kind::Exited(pb::Exited { code: 0 })) => self.ran += 1,
                    // The journal has refused it; whoever admits calls has not looked at the journal since.
                    Some(Kind::NeverStarted(never)) => {
                        let failure = never.failure.as_ref().expect("a failure");
                        assert!(failure.retryable && failure.message.contains("the disk is full"), "{failure:?}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    other => panic!("{call_id}: {other:?}"),
                },
                Err(DevError::Refused { failure, .. }) => return assert_eq!(failure.code, "DISK_LOW"),
                Err(other) => panic!("{call_id}: {other}"),
            }
        }
        panic!("the journal of {} calls fits on its disk", self.ran);
    }

    fn let_go(&self) {
        fs::write(self.busy.1.path("go"), "").expect("a file");
    }

    /// What was taken has ended as it should have, each call ran once, and nothing is left.
    async fn end(self) {
        let Self { daemon, disk, busy: (busy, _), other, ran } = self;
        let runs = within("runs", busy.outcome("runs")).await.expect("an end");
        assert_eq!(kind(&runs.message), Some(&Kind::Exited(pb::Exited { code: 3 })));
        assert_eq!(runs.streams[&1].bytes, b"1\n2\n3\n");
        let waits = within("waits", busy.outcome("waits")).await.expect("an end");
        assert_eq!(waits.streams[&1].bytes, b"yes\n");
        until_told(&daemon, None).await;
        assert_eq!(call(&busy, "counts", bash("cat /workspace/count")).await, Ok(b"runs\nwaits\n".to_vec()));
        let expected: String = (0..ran).map(|number| format!("{number}\n")).collect();
        assert_eq!(call(&other, "counts-too", bash("cat /workspace/count")).await, Ok(expected.into_bytes()));
        within("close", other.close(Duration::ZERO)).await.expect("the session ends");
        end(daemon, Some(disk), &busy).await;
    }
}

/// F-35: thanks to the ballast, which is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn journal_on_a_full_disk_records_what_was_taken_refuses_what_is_new_and_takes_calls_when_there_is_room() {
    needs_root!();
    let _host = host::exclusive();
    let full = FullJournal::new().await;

    for (call_id, input) in [("refused", counted("refused", "true")), ("refused-too", glob())] {
        let refused = call(&full.other, call_id, input).await.expect_err("the journal has no room");
        assert_eq!((refused.code.as_str(), refused.retryable), ("DISK_LOW", true));
        assert_eq!(refused.message, "this runner takes no calls now: the disk of the journal is full");
    }
    assert_eq!(open(&full.daemon, "third").await.expect_err("the journal has no room").code, "DISK_LOW");
    full.let_go();
    // Told while the disk is full, and nothing is told that is not written down.
    let waits = within("waits", full.busy.0.outcome("waits")).await.expect("an end");
    assert_eq!(waits.streams[&1].bytes, b"yes\n");
    until_told(&full.daemon, Some("the disk of the journal is full")).await;

    full.disk.make_room();
    until_told(&full.daemon, None).await;
    assert_eq!(full.daemon.orchestrator.links(), 1, "the link broke");
    full.end().await;
}

/// F-35: the next runner needs room to begin. Without, it says so and changes nothing; sandboxes and their commands live on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_killed_while_its_journal_is_full_is_followed_by_one_that_loses_nothing_once_there_is_room() {
    needs_root!();
    let _host = host::exclusive();
    let mut full = FullJournal::new().await;

    full.daemon.kill_runner();
    let status = full.daemon.start_runner_to_its_end().await;
    assert!(!status.success(), "{status:?}");
    assert!(full.daemon.log().contains("no journal segment can be begun"), "{}", full.daemon.end_of_log());
    full.let_go();
    full.disk.make_room();
    full.daemon.start_runner().await;

    full.end().await;
}
