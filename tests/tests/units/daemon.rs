//! Both units at work for an orchestrator.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{CallOutcome, LinkSettings, Orchestrator, Session};
use sandbox_runner_tests::host;
use tokio::runtime::Runtime;

use crate::installed::{
    GROUP, LAUNCHER, PATIENCE, RUNNER, Units, connect, files_of_sandboxes, journal, list, main_pid, property, replaced,
    runner_uid, systemctl, until,
};

/// Where the runner's certificates are.
const CERTIFICATES: &str = "/etc/sandbox-runner/certificates";

/// The runner's unit, connected to an orchestrator of this test.
struct Service {
    orchestrator: Orchestrator,
    runtime: Runtime,
    _units: Units,
}

impl Service {
    fn start() -> Self {
        let units = Units::with_launcher();
        let runtime = Runtime::new().expect("a runtime");
        let orchestrator = runtime.block_on(Orchestrator::start(LinkSettings::default())).expect("an orchestrator");
        fs::create_dir_all(CERTIFICATES).expect("a directory");
        let files = orchestrator.write_client_files(Path::new(CERTIFICATES), "guest").expect("certificates");
        for file in [&files.authorities, &files.certificate, &files.key] {
            chown(file, Some(runner_uid()), None).expect("chown");
        }
        fs::set_permissions(CERTIFICATES, Permissions::from_mode(0o755)).expect("chmod");
        // The machine may be small; by default a sandbox is promised more disk space than it has.
        let limits = "[limits]\nsandbox_disk_bytes = 67108864\nsandbox_memory_bytes = 268435456\n";
        units.write_config(&format!(
            "{}\n[orchestrator]\nendpoint = \"https://{}\"\nca_file = \"{}\"\ncertificate_file = \"{}\"\nkey_file = \
             \"{}\"\nserver_name = \"localhost\"\n",
            units.config().replace("[limits]\n", limits),
            orchestrator.address(),
            files.authorities.display(),
            files.certificate.display(),
            files.key.display(),
        ));
        systemctl(&["start", RUNNER]);
        let service = Self { orchestrator, runtime, _units: units };
        service.wait_for("a runner", async { service.orchestrator.runner().await.expect("a runner") });
        service
    }

    /// Waits for something asynchronous, with the journal in the message when it does not happen.
    fn wait_for<T>(&self, what: &str, future: impl Future<Output = T>) -> T {
        let waited = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await });
        waited.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}\n{}", journal()))
    }

    fn open(&self, session_id: &str, limits: pb::ResourceLimits) -> Session {
        let request = pb::OpenSession { session_id: session_id.to_owned(), limits: Some(limits), ..Default::default() };
        self.wait_for("a session", async {
            self.orchestrator.open_session(request).await.unwrap_or_else(|error| panic!("{error}\n{}", journal()))
        })
    }

    fn bash(&self, session: &Session, call_id: &str, command: &str) -> CallOutcome {
        self.wait_for(command, async {
            session.bash(call_id, command).await.unwrap_or_else(|error| panic!("{command}: {error}\n{}", journal()))
        })
    }

    /// Starts a command that prints `text` when it is told to, which nothing but the test does.
    fn start_held(&self, session: &Session, call_id: &str, text: &str) {
        let command = format!("until [ -e /workspace/go ]; do sleep 0.1; done; echo {text}");
        session.send(call_id, bash(&command));
        self.wait_for("the start", async { session.started(call_id).await.expect("started") });
    }

    fn outcome(&self, session: &Session, call_id: &str) -> CallOutcome {
        self.wait_for("an outcome", async { session.outcome(call_id).await.expect("an outcome") })
    }
}

fn bash(command: &str) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.to_owned()), ..Default::default() })
}

fn kind(outcome: &CallOutcome) -> Kind {
    outcome.message.outcome.clone().and_then(|outcome| outcome.kind).expect("a kind")
}

fn text(outcome: &CallOutcome) -> String {
    outcome.streams.values().map(|stream| String::from_utf8_lossy(&stream.bytes).into_owned()).collect()
}

fn assert_printed(outcome: &CallOutcome, expected: &str) {
    assert_eq!(kind(outcome), Kind::Exited(pb::Exited { code: 0 }), "{outcome:?}");
    assert_eq!(text(outcome).trim(), expected);
}

/// Writes into the working directory of the only sandbox, from outside.
fn release() {
    let pid = host::pids()
        .find(|pid| host::inner_pid(*pid).is_some() && Path::new(&format!("/proc/{pid}/root/workspace")).is_dir())
        .expect("a process of the sandbox");
    fs::write(format!("/proc/{pid}/root/workspace/go"), "").expect("root of the host may write there");
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn limits_hold_and_their_causes_are_named() {
    let service = Service::start();
    let limits = pb::ResourceLimits { memory_bytes: 96 << 20, pids: 48, cpu_millis: 500, ..Default::default() };
    let session = service.open("limited", limits);

    let starved = service.bash(&session, "memory", "tail /dev/zero");
    let crowded = service.bash(
        &session,
        "pids",
        "for i in $(seq 100); do sleep 20 & done 2>/dev/null; kill $(jobs -p); wait; true",
    );
    service.bash(
        &session,
        "cpu",
        "timeout 2 sh -c 'while :; do :; done' & timeout 2 sh -c 'while :; do :; done'; wait",
    );

    match kind(&starved) {
        Kind::OutOfMemory(cause) => assert_eq!(cause.limit_bytes, 96 << 20, "{cause:?}"),
        other => panic!("{other:?}"),
    }
    let notes: Vec<_> = crowded.message.notes.iter().map(pb::Note::kind).collect();
    assert!(notes.contains(&pb::NoteKind::PidsLimit), "{:?}", crowded.message.notes);
    let throttled: Vec<u64> = crate::installed::groups_of_sandboxes()
        .iter()
        .filter_map(|group| fs::read_to_string(group.join("work/cpu.stat")).ok())
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix("nr_throttled ")?.parse().ok()))
        .collect();
    assert!(throttled.iter().any(|periods| *periods > 0), "no period was cut: {throttled:?}");
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn processes_of_a_call_are_born_in_its_slot() {
    let service = Service::start();
    let session = service.open("slots", pb::ResourceLimits::default());

    session.send("first", bash("sleep 600.25"));
    let first = until("the process", || host::processes_with("600.25").into_iter().find(is_inside));
    session.cancel("first", pb::CancelMode::Kill);
    service.outcome(&session, "first");
    service.bash(&session, "left", "sleep 601.25 >/dev/null 2>&1 &");
    let left = until("the process", || host::processes_with("601.25").into_iter().find(is_inside));

    assert!(!Path::new(&format!("/proc/{first}")).exists(), "a killed call left its process");
    let group = fs::read_to_string(format!("/proc/{left}/cgroup")).expect("alive");
    let slot = group.trim().rsplit('/').next().unwrap_or_default().to_owned();
    assert!(group.contains("/sandbox-launcher.service/") && group.contains("/work/c"), "{group}");
    assert!(slot.starts_with('c') && slot[1..].parse::<u64>().is_ok(), "{group}");
}

fn is_inside(pid: &u32) -> bool {
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    host::inner_pid(*pid).is_some() && comm.trim() == "sleep"
}

/// The launcher goes and comes back while a call runs; neither the call nor the session notices.
fn assert_survives(change: impl FnOnce(u32)) {
    let service = Service::start();
    let session = service.open("kept", pb::ResourceLimits::default());
    service.start_held(&session, "held", "survived");

    change(main_pid(LAUNCHER));

    connect();
    release();
    assert_printed(&service.outcome(&session, "held"), "survived");
    assert_printed(&service.bash(&session, "after", "echo after"), "after");
    let second = service.open("new", pb::ResourceLimits::default());
    assert_printed(&service.bash(&second, "new", "echo new"), "new");
    assert_eq!(service.orchestrator.complaints(), Vec::<String>::new());
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn sessions_live_on_when_the_launcher_is_restarted() {
    assert_survives(|before| {
        systemctl(&["restart", LAUNCHER]);
        assert_ne!(main_pid(LAUNCHER), before);
    });
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn sessions_live_on_when_the_launcher_is_killed() {
    assert_survives(|before| {
        host::kill_now(before);
        replaced(LAUNCHER, before);
    });
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn sessions_live_on_when_the_launcher_is_reloaded() {
    assert_survives(|before| {
        systemctl(&["reload", LAUNCHER]);
        let argv = || fs::read(format!("/proc/{before}/cmdline")).unwrap_or_default();
        until("the new program", || argv().starts_with(b"sandbox-init\0launcher\0--resume\0").then_some(()));
    });
}

/// The runner goes and the next one comes while a call runs and another one waits.
fn assert_taken_over(change: impl FnOnce(u32)) {
    let service = Service::start();
    let session = service.open("kept", pb::ResourceLimits::default());
    service.bash(&session, "state", "export KEPT=yes; sleep 600.75 >/dev/null 2>&1 &");
    service.start_held(&session, "held", "survived");
    session.send("waits", bash("echo $KEPT"));
    let before = main_pid(RUNNER);

    change(before);

    assert_ne!(main_pid(RUNNER), before);
    assert_eq!(list(&connect()).len(), 1);
    release();
    assert_printed(&service.outcome(&session, "held"), "survived");
    assert_printed(&service.outcome(&session, "waits"), "yes");
    assert!(!host::processes_with("600.75").is_empty(), "a process that a call had left was ended");
    assert_eq!(service.orchestrator.complaints(), Vec::<String>::new());
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn restarted_runner_leaves_sandboxes_shells_and_commands_to_the_next_one() {
    assert_taken_over(|_| {
        systemctl(&["restart", RUNNER]);
        assert_eq!(property(RUNNER, "Result"), "success");
    });
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn killed_runner_is_replaced_and_what_it_left_is_taken_over() {
    assert_taken_over(|before| {
        host::kill_now(before);
        replaced(RUNNER, before);
    });
}

#[test]
#[ignore = "needs the installed units; tests/guest/suite runs it"]
fn stopped_runner_ends_its_sandboxes_and_exits_with_0() {
    let service = Service::start();
    let session = service.open("ended", pb::ResourceLimits::default());
    service.bash(&session, "some", "head -c 300000 /dev/zero | tr '\\0' x; sleep 600.5 >/dev/null 2>&1 &");

    systemctl(&["stop", RUNNER]);

    let state = |name| property(RUNNER, name);
    assert_eq!([state("ActiveState"), state("Result"), state("ExecMainStatus")], ["inactive", "success", "0"]);
    assert_eq!(list(&connect()), []);
    until("the end of the process", || host::processes_with("600.5").is_empty().then_some(()));
    systemctl(&["stop", LAUNCHER]);
    assert!(!Path::new(GROUP).exists());
    assert_eq!(files_of_sandboxes(), Vec::<std::path::PathBuf>::new());
}
