//! Two sandboxes that live at the same time, one of which attacks the other: by port, by name, by key, by path, through
//! `/proc`, by signal. A process of the attacked sandbox makes the same attack first, and succeeds.

use std::io::{BufRead, BufReader, ErrorKind};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use proto::init::v1::{Exec as Program, start_call};
use proto::launch::v1::{CreateSandbox, create_sandbox};
use sandbox_runner_tests::host::{self, SandboxPids};
use sandbox_runner_tests::keeper::Keeper;
use sandbox_runner_tests::launcher::{Connection, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::prober::{self, Row, Verdict};
use sandbox_runner_tests::rootfs::{PROBER, Rootfs};
use sandbox_runner_tests::runner::{Caller, Exec, wait};

use crate::expectations::assert_held;

const PATIENCE: Duration = Duration::from_secs(30);
/// Where the neighbour listens, in a network of its own.
const PORT: &str = "4711";

/// What a process of the same sandbox reaches. The rest of the attack is other ways to the same.
const REACHED_FROM_INSIDE: &[&str] = &[
    "T01",
    "T02",
    "T03",
    "T03.number",
    "T04.messages",
    "T04.semaphores",
    "T05",
    "T05.root",
    "T06.cmdline",
    "T06.environ",
    "T07",
    "T07.priority",
    "T07.memory",
    "T07.pidfd",
    "T07.trace",
];

/// A sandbox with something to lose. Ended when dropped.
struct Tenant {
    command: Child,
    pids: SandboxPids,
}

impl Tenant {
    /// Starts it, and returns what a process of its own has reached.
    fn start(exec: &Exec, secret: &str) -> (Self, Vec<Row>) {
        let mut command = exec.command([PROBER, "tenant", secret, PORT]);
        command.stderr(Stdio::null());
        let mut command = command.spawn().expect("the command starts");
        let output = BufReader::new(command.stdout.take().expect("a pipe"));
        let mut control = String::new();
        for line in output.lines().map_while(Result::ok) {
            control.push_str(&line);
            control.push('\n');
            if line.contains("\"T07.trace\"") {
                break;
            }
        }
        let tenant = Self { command, pids: host::wait_for_sandbox(&format!("tenant-{secret}"), PATIENCE) };
        (tenant, prober::rows(control.as_bytes()).expect("result lines"))
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.command.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = wait(&mut self.command, PATIENCE);
    }
}

fn lives(pids: &SandboxPids) -> bool {
    let state = |pid| host::status_field(pid, "State:").is_some_and(|state| !state.starts_with(['Z', 'X']));
    state(pids.workload) && state(pids.process_1) && pids.spawner.is_none_or(state)
}

fn assert_apart(caller: Caller) {
    if let Some(obstacle) = caller.obstacle() {
        sandbox_runner_tests::skip!("{obstacle}");
    }
    let _host = host::shared();
    let rootfs = Rootfs::owned_by(caller.uid());
    let secret = format!("sbr-attack-secret-{}-{}", std::process::id(), caller.uid());
    let (tenant, control) = Tenant::start(&Exec::in_rootfs(caller, rootfs.path()), &secret);
    let attacker = Exec::in_rootfs(caller, rootfs.path());

    let rows = attacker.prober(["peer", &secret, PORT, &tenant.pids.workload.to_string()]).rows();
    let everybody = attacker.prober(["killall"]);

    let reached = |id: &&&str| control.iter().any(|row| row.id == **id && row.result == Verdict::Breached);
    let missed: Vec<_> = REACHED_FROM_INSIDE.iter().filter(|id| !reached(id)).collect();
    assert!(missed.is_empty(), "not even a process of the same sandbox reaches {missed:?}: {control:#?}");
    assert_eq!(rows.len(), control.len(), "the attack is not the one of the control: {rows:#?}");
    assert_held(&rows);
    assert_eq!(everybody.code(), 0, "{}", everybody.errors());
    assert!(lives(&tenant.pids), "a process of the neighbour has ended: {:?}", tenant.pids);
}

#[test]
fn sandbox_reaches_nothing_of_its_neighbour() {
    assert_apart(Caller::Root);
}

/// To the host both are the same user, so ids do not tell them apart.
#[test]
fn sandbox_reaches_nothing_of_its_neighbour_of_the_same_ordinary_user() {
    assert_apart(Caller::Nobody);
}

/// What a workload listens on is its own business: nobody comes in from the host, and so nobody through it.
#[test]
fn host_does_not_reach_the_listeners_of_a_workload() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let rootfs = Rootfs::owned_by(caller.uid());
        let secret = format!("sbr-attack-inbound-{}-{}", std::process::id(), caller.uid());
        let (tenant, control) = Tenant::start(&Exec::in_rootfs(caller, rootfs.path()), &secret);
        for id in ["T01", "T02"] {
            assert!(
                control.iter().any(|row| row.id == id && row.result == Verdict::Breached),
                "nobody listens: {control:#?}"
            );
        }

        for address in ["127.0.0.1", "0.0.0.0", "::1"] {
            let answer = TcpStream::connect((address, PORT.parse::<u16>().expect("a port")));
            let refusal = answer.expect_err("reached from the host").kind();
            let without_it = address == "::1" && refusal == ErrorKind::AddrNotAvailable;
            assert!(refusal == ErrorKind::ConnectionRefused || without_it, "{caller:?} {address}: {refusal}");
        }
        let name = SocketAddr::from_abstract_name(&secret).expect("an abstract name");
        let refusal = UnixStream::connect_addr(&name).expect_err("reached from the host").kind();
        assert_eq!(refusal, ErrorKind::ConnectionRefused, "{caller:?}");
        assert!(lives(&tenant.pids));
    }
}

/// As a runner has them: from one launcher, with ids side by side.
#[test]
fn sandbox_reaches_nothing_of_its_neighbour_at_the_same_launcher() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let secret = format!("sbr-attack-secret-{}-launcher", std::process::id());
    let launcher = Setup::new(2, rootfs.path()).start().expect("the launcher starts");
    let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
    let [_, run] = launcher.setup().directories();
    let [mut tenant, mut attacker] = ["tenant", "attacker"].map(|id| {
        let root = create_sandbox::Rootfs::Directory("allowed".to_owned());
        let sandbox = CreateSandbox { rootfs: Some(root), ..plain_sandbox(id) };
        let created = connection.create(sandbox).expect("a sandbox");
        Keeper::connect(&run.join("sandboxes").join(created.socket_name)).expect("process 1 answers")
    });
    let argv = [PROBER, "tenant", &secret, PORT].map(|argument| argument.as_bytes().to_vec());
    let work = start_call::Work::Exec(Program { argv: argv.to_vec(), ..Program::default() });
    tenant.start(work, 0).expect("the call is taken");
    let pids = host::wait_for_sandbox(&format!("tenant-{secret}"), PATIENCE);

    let attack = attacker.exec(&[PROBER, "peer", &secret, PORT, &pids.workload.to_string()]);

    let rows = prober::rows(attack.text().as_bytes()).expect("result lines");
    assert!(rows.len() >= REACHED_FROM_INSIDE.len(), "{rows:#?}");
    assert_held(&rows);
    assert_eq!(attacker.exec(&[PROBER, "killall"]).code(), Some(0));
    assert!(lives(&pids), "a process of the neighbour has ended: {pids:?}");
    drop((tenant, attacker, connection));
    launcher.stop();
}
