//! A runner whose host runs short of something takes no new work, says why, goes on with what it has, and takes work again.
//!
//! The built daemon beside a launcher of its own, real sandboxes; a small file system of its own and the limits of the
//! running process are what it runs short of.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proto::runner::v1 as pb;
use runner::dev::{DevError, LinkSettings, Session};
use sandbox_runner_tests::daemon::{Daemon, Options, PATIENCE, bash, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::launcher::RUNNER_UID;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::{binary, scaled};

const MIB: u64 = 1 << 20;

/// The run directory on a file system of its own.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn on(directory: &Path, options: &str) -> Self {
        let before = fs::metadata(directory).expect("a directory");
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some(options)).expect("a tmpfs");
        chown(directory, Some(before.uid()), Some(before.gid())).expect("chown");
        fs::set_permissions(directory, Permissions::from_mode(before.mode() & 0o7777)).expect("chmod");
        Self(directory.to_owned())
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
