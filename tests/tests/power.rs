//! A machine that loses its power, and one that is rebooted in order: what its runner had written down is all there, and
//! says honestly what nobody can know.
//!
//! Ignored: it boots the Debian guest of `tests/guest` three times, which takes ten minutes by emulation. The guest's disk
//! outlives its machine, the orchestrator is here, outside, and the machine is killed with whatever its kernel had not
//! written yet.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{LinkSettings, Orchestrator, Session};
use sandbox_runner_tests::daemon::{bash, small_sandboxes};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::binary;
use tempfile::TempDir;

/// A boot by emulation takes one to two minutes, and everything in it is slow.
const PATIENCE: Duration = Duration::from_secs(600);
/// Where a build of the guest may have to begin with a file system.
const FIRST_BOOT: Duration = Duration::from_secs(1800);
/// Calls that are under way when the power goes; as many as may wait in one session.
const BURST: usize = 30;

/// A disk, an orchestrator, and now and then a machine.
struct Site {
    orchestrator: Orchestrator,
    place: TempDir,
    machine: Option<Child>,
    /// The keyboard of its console. The emulator takes it away for good when nobody holds it.
    keyboard: File,
}

impl Site {
    async fn new() -> Self {
        let orchestrator = Orchestrator::start(LinkSettings::default()).await.expect("the orchestrator starts");
        let place = tempfile::Builder::new().prefix("sbr-power-").tempdir_in("/var/tmp").expect("a directory");
        let identity = place.path().join("identity");
        fs::create_dir(&identity).expect("a directory");
        orchestrator.write_client_files(&identity, "runner-1").expect("certificates");
        mkfifo(&place.path().join("orders"), Mode::S_IRUSR | Mode::S_IWUSR).expect("a fifo");
        let keyboard =
            OpenOptions::new().read(true).write(true).open(place.path().join("orders")).expect("the fifo of our own");
        let site = Self { orchestrator, place, machine: None, keyboard };
        site.write_config();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// What the package ships, with an orchestrator.
    fn write_config(&self) {
        let shipped = fs::read_to_string(repository().join("deploy/systemd/config.toml")).expect("the configuration");
        let orchestrator = r#"
[orchestrator]
endpoint = "https://10.0.2.100:443"
ca_file = "/var/lib/sandbox-runner/identity/authorities.pem"
certificate_file = "/var/lib/sandbox-runner/identity/certificate.pem"
key_file = "/var/lib/sandbox-runner/identity/key.pem"
server_name = "localhost"
"#;
        // The guest is small.
        let small = shipped.replace("[limits]\n", &format!("[limits]\n{}", small_sandboxes()));
        fs::write(self.path("config.toml"), format!("{small}{orchestrator}")).expect("written");
    }

    /// Boots, and returns when the runner has connected.
    async fn boot(&mut self, patience: Duration) {
        let links = self.orchestrator.links();
        let (guest, tree) = (repository().join("tests/guest"), self.path("tree"));
        let _ = fs::create_dir(&tree);
        let _ = std::os::unix::fs::symlink(repository().join("deploy"), tree.join("deploy"));
        let log = OpenOptions::new().create(true).append(true).open(self.path("log")).expect("a log");
        let child = Command::new(guest.join("run"))
            .args(["--memory", "2048", "--timeout", "1800", "--root"])
            .arg(self.path("root.ext4"))
            .arg("--pid")
            .arg(self.path("pid"))
            .arg("--orders")
            .arg(self.path("orders"))
            .args(["--forward", &self.orchestrator.address().port().to_string()])
            .arg(guest.join("power"))
            .arg(guest.join("install-units"))
            .arg(binary())
            .args([self.path("identity"), self.path("config.toml"), tree])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("the guest starts");
        self.machine = Some(child);
        self.until("the runner connects", patience, |site| site.orchestrator.links() > links).await;
    }

    async fn until(&mut self, what: &str, patience: Duration, mut found: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !found(self) {
            let ended = self.machine.as_mut().and_then(|machine| machine.try_wait().expect("own child"));
            assert!(ended.is_none(), "{what}: the machine has ended: {}", self.log());
            assert!(started.elapsed() < patience, "{what}: not within {patience:?}: {}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Pulls the plug.
    async fn cut_power(&mut self) {
        let pid = fs::read_to_string(self.path("pid")).expect("the machine's process");
        kill(Pid::from_raw(pid.trim().parse().expect("a pid")), Signal::SIGKILL).expect("own process");
        self.off().await;
    }

    /// Types an order at the console.
    fn order(&mut self, text: &str) {
        writeln!(self.keyboard, "{text}").expect("an order");
    }

    /// Waits until the machine is off.
    async fn off(&mut self) {
        let mut machine = self.machine.take().expect("a machine");
        let started = Instant::now();
        while machine.try_wait().expect("own child").is_none() {
            assert!(started.elapsed() < PATIENCE, "the machine stays on: {}", self.log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    async fn session(&self, session_id: &str) -> Session {
        let request = pb::OpenSession { session_id: session_id.into(), ..Default::default() };
        within("session", self.orchestrator.open_session(request)).await.expect("a session")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let Some(mut machine) = self.machine.take() else { return };
        if let Some(pid) = fs::read_to_string(self.path("pid")).ok().and_then(|pid| pid.trim().parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = machine.wait();
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace")
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

async fn end_of(session: &Session, call_id: &str) -> Kind {
    let finished = within(call_id, session.outcome(call_id)).await.expect("an end");
    finished.message.outcome.and_then(|outcome| outcome.kind).expect("an outcome")
}

async fn printed(session: &Session, call_id: &str, command: &str) -> Vec<u8> {
    let finished = within(call_id, session.bash(call_id, command)).await.expect("an end");
    finished.streams.get(&1).map(|stream| stream.bytes.clone()).unwrap_or_default()
}

/// F-46: what counts is how long something took, not what time it is.
async fn clock_is_set(site: &mut Site, session: &Session) {
    let links = site.orchestrator.links();
    let input =
        pb::BashInput { command: Some("sleep 15; echo in time".into()), timeout_ms: 300_000, ..Default::default() };
    session.send("sleeps", pb::call::Input::Bash(input));
    let short = pb::BashInput { command: Some("sleep 3600".into()), timeout_ms: 8_000, ..Default::default() };
    within("start", session.started("sleeps")).await.expect("started");
    let timed = site.session("timed").await;
    timed.send("times-out", pb::call::Input::Bash(short));
    within("start", timed.started("times-out")).await.expect("started");
    site.order("clock");
    site.until("the clock is set", PATIENCE, |site| site.log().contains("CLOCK")).await;

    let slept = within("sleeps", session.outcome("sleeps")).await.expect("an end").message;
    assert_eq!(slept.outcome.and_then(|outcome| outcome.kind), Some(Kind::Exited(pb::Exited { code: 0 })));
    let took = slept.ran_for.expect("a time").seconds;
    assert!((15..300).contains(&took), "a sleep of 15 s took {took} s");
    assert!(matches!(end_of(&timed, "times-out").await, Kind::TimedOut(_)));
    assert_eq!(site.orchestrator.links(), links, "the link was lost when the clock was set");
}

/// F-18, F-19: a power cut in the middle of running, waiting and unacknowledged calls, and then a reboot in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots the guest three times"]
async fn power_cut_and_reboot_lose_no_outcome_and_leave_nothing() {
    needs_root!();
    let mut site = Site::new().await;
    site.boot(FIRST_BOOT).await;
    let (busy, quick, deaf) = (site.session("busy").await, site.session("quick").await, site.session("deaf").await);
    assert_eq!(printed(&busy, "before", "echo before").await, b"before\n");
    busy.send("runs", bash("sleep 3600"));
    busy.send("waits", bash("echo never"));
    within("start", busy.started("runs")).await.expect("started");
    site.orchestrator.set(LinkSettings { acknowledge: false, ..LinkSettings::default() });
    assert_eq!(printed(&deaf, "unacknowledged", "echo written down").await, b"written down\n");
    for number in 0..BURST {
        quick.send(&format!("quick-{number}"), bash(format!("echo {number}")));
    }
    within("the burst is under way", quick.ended("quick-5")).await.expect("an end");

    site.cut_power().await;
    let waited = site.orchestrator.waiting().get("quick").copied().unwrap_or_default();
    site.orchestrator.set(LinkSettings::default());
    site.boot(PATIENCE).await;

    assert!(matches!(end_of(&busy, "runs").await, Kind::Indeterminate(_)));
    assert!(matches!(end_of(&busy, "waits").await, Kind::NeverStarted(_)));
    assert_eq!(end_of(&deaf, "unacknowledged").await, Kind::Exited(pb::Exited { code: 0 }));
    let mut counts = [0; 3];
    for number in 0..BURST {
        match end_of(&quick, &format!("quick-{number}")).await {
            Kind::Exited(_) => counts[0] += 1,
            Kind::Indeterminate(_) => counts[1] += 1,
            Kind::NeverStarted(_) => counts[2] += 1,
            other => panic!("quick-{number}: {other:?}"),
        }
    }
    println!("burst: {} ended, {} unknown, {} never started; {waited} had waited", counts[0], counts[1], counts[2]);
    assert!(counts[0] > 5, "what had been told is told otherwise now");
    assert!(counts[2] > 0, "the cut came after the burst");
    assert_eq!(site.orchestrator.complaints(), Vec::<String>::new());

    let next = site.session("next").await;
    assert_eq!(printed(&next, "works", "echo works").await, b"works\n");
    clock_is_set(&mut site, &next).await;
    next.send("in-the-way", bash("sleep 3600"));
    within("start", next.started("in-the-way")).await.expect("started");
    site.order("reboot");
    site.off().await;
    site.boot(PATIENCE).await;

    assert!(!matches!(end_of(&next, "in-the-way").await, Kind::Exited(_)));
    let last = site.session("last").await;
    assert_eq!(printed(&last, "works-again", "echo again").await, b"again\n");
    site.order("stop");
    site.off().await;
    assert!(site.log().contains("LEFT 0 files, 0 groups, 0 programs"), "{}", site.log());
    assert_eq!(site.orchestrator.complaints(), Vec::<String>::new());
    // The console puts codes of its own before the first line.
    let boots: Vec<_> = site.log().lines().filter(|line| line.contains("BOOT ")).map(str::to_owned).collect();
    assert_eq!(boots.len(), 3, "{boots:?}");
}
