//! A runner that was taken over speaks to the launcher. It holds the right uid and the protocol; it must not get anything
//! the policy file does not name, and must not be able to stop the launcher from serving.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use prost::Message;
use proto::launch::v1::{
    CreateSandbox, Failure, FreezeSandbox, Hello, InspectSandbox, KillSandbox, LayerList, Limits, ListSandboxes,
    Reexecute, Request, SandboxCreated, SandboxEntry, Volume, create_sandbox, reply, request,
};
use sandbox_runner_tests::host::{self, Snapshot};
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, group_of_launcher, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::Rootfs;
use sandbox_runner_tests::runner::{finish, wait};

const MIB: u64 = 1 << 20;
/// Id ranges of the launcher.
const SLOTS: u32 = 3;

/// A launcher with three slots, and the directory that its policy allows.
struct Bench {
    launcher: Launcher,
    rootfs: Rootfs,
}

impl Bench {
    fn start() -> Self {
        let rootfs = Rootfs::with_prober();
        let launcher = Setup::new(SLOTS, rootfs.path()).start().expect("the launcher starts");
        Self { launcher, rootfs }
    }

    fn socket(&self) -> PathBuf {
        self.launcher.setup().socket()
    }

    fn connect(&self) -> Connection {
        Connection::greeted(&self.socket()).expect("the launcher serves its runner")
    }

    /// The launcher still runs and makes sandboxes.
    fn assert_serves(&mut self) {
        assert!(self.launcher.is_alive(), "the launcher has ended");
        let connection = self.connect();
        create(&connection, plain_sandbox("alive"));
        kill(&connection, "alive");
    }
}

fn create(connection: &Connection, sandbox: CreateSandbox) -> SandboxCreated {
    match connection.ask(request::Body::CreateSandbox(sandbox)).expect("an answer").body {
        Some(reply::Body::SandboxCreated(created)) => created,
        other => panic!("not created: {other:?}"),
    }
}

fn kill(connection: &Connection, id: &str) {
    let body = request::Body::KillSandbox(KillSandbox { sandbox_id: id.to_owned() });
    let answer = connection.ask(body).expect("an answer");
    assert!(matches!(answer.body, Some(reply::Body::Done(_))), "{answer:?}");
}

fn list(connection: &Connection) -> Vec<SandboxEntry> {
    match connection.ask(request::Body::ListSandboxes(ListSandboxes::default())).expect("an answer").body {
        Some(reply::Body::SandboxList(list)) => list.sandboxes,
        other => panic!("no list: {other:?}"),
    }
}

fn refused(connection: &Connection, sandbox: CreateSandbox) -> Failure {
    let asked = format!("{sandbox:?}");
    connection
        .refusal(request::Body::CreateSandbox(sandbox))
        .unwrap_or_else(|error| panic!("{asked} was not refused: {error}"))
}

/// Refused with one of these codes, a message that names the field, and a way out.
fn assert_refusal(failure: &Failure, codes: &[&str], field: &str) {
    assert!(codes.contains(&failure.code.as_str()), "{failure:?}");
    assert!(failure.message.contains(field), "the message does not name {field}: {failure:?}");
    assert!(!failure.remediation.is_empty(), "no remediation: {failure:?}");
}

#[test]
fn unknown_profile_is_refused_by_name() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for profile in ["", "admin", "../default", "default\0", "default/../default", &"x".repeat(10_000)] {
        let failure = refused(&connection, CreateSandbox { profile: profile.to_owned(), ..plain_sandbox("p") });
        assert_refusal(&failure, &["INVALID_FIELD", "NOT_ALLOWED"], "profile");
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn host_paths_in_place_of_names_are_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let own = bench.rootfs.path().display().to_string();
    for name in
        ["", ".", "..", "/", "/etc", "../../etc", "allowed/../../etc", "allowed/", "./allowed", "allowed\0", &own]
    {
        let rootfs = Some(create_sandbox::Rootfs::Directory(name.to_owned()));
        let failure = refused(&connection, CreateSandbox { rootfs, ..plain_sandbox("r") });
        assert_refusal(&failure, &["INVALID_FIELD", "NOT_ALLOWED"], "directory");

        let volumes = vec![Volume { name: name.to_owned(), read_only: true }];
        let failure = refused(&connection, CreateSandbox { volumes, ..plain_sandbox("v") });
        assert_refusal(&failure, &["INVALID_FIELD", "NOT_ALLOWED"], "volume");
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn missing_or_unsupported_root_is_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let failure = refused(&connection, CreateSandbox { rootfs: None, ..plain_sandbox("none") });
    assert_refusal(&failure, &["INVALID_FIELD"], "rootfs");
    for digest in ["sha256:".to_owned() + &"0".repeat(64), "../../etc".to_owned(), String::new()] {
        let rootfs = Some(create_sandbox::Rootfs::Layers(LayerList { digest: vec![digest] }));
        let failure = refused(&connection, CreateSandbox { rootfs, ..plain_sandbox("layers") });
        assert_refusal(&failure, &["NOT_SUPPORTED", "INVALID_FIELD", "LAYER_MISSING"], "layers");
    }
}

#[test]
fn sandbox_ids_that_could_be_paths_are_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for id in ["", ".", "..", "/", "a/b", "../x", "a b", "a\0b", "ä", "a\n", &"x".repeat(65), &"x".repeat(60_000)] {
        let failure = refused(&connection, plain_sandbox(id));
        assert_refusal(&failure, &["INVALID_FIELD"], "sandbox_id");
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn limits_above_the_maximum_are_refused_by_field() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let cases = [
        ("memory_bytes", Limits { memory_bytes: 513 * MIB, ..Limits::default() }),
        ("memory_bytes", Limits { memory_bytes: u64::MAX, ..Limits::default() }),
        ("cpu_millis", Limits { cpu_millis: 2001, ..Limits::default() }),
        ("pids", Limits { pids: 129, ..Limits::default() }),
        ("pids", Limits { pids: u64::MAX, ..Limits::default() }),
        ("disk_bytes", Limits { disk_bytes: 129 * MIB, ..Limits::default() }),
    ];
    for (field, limits) in cases {
        let failure = refused(&connection, CreateSandbox { limits: Some(limits), ..plain_sandbox("big") });
        assert_refusal(&failure, &["NOT_ALLOWED", "INVALID_FIELD"], field);
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn malformed_environment_names_and_directories_are_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for entry in [&b"no equals sign"[..], b"=value", b"NUL\0=x", b"A=\0", b""] {
        let environment = vec![entry.to_vec()];
        let failure = refused(&connection, CreateSandbox { environment, ..plain_sandbox("env") });
        assert_refusal(&failure, &["INVALID_FIELD"], "environment");
    }
    for directory in ["relative", "../..", "/a\0b", "/../../etc"] {
        let working_directory = directory.to_owned();
        let failure = refused(&connection, CreateSandbox { working_directory, ..plain_sandbox("wd") });
        assert_refusal(&failure, &["INVALID_FIELD"], "working_directory");
    }
    for name in ["a/b", "a\0b", "a b", "-\n", &"x".repeat(65)] {
        let hostname = name.to_owned();
        let failure = refused(&connection, CreateSandbox { hostname, ..plain_sandbox("host") });
        assert_refusal(&failure, &["INVALID_FIELD"], "hostname");
    }
}

#[test]
fn foreign_sandboxes_cannot_be_named() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for id in ["other", "../other", "0", "1", "", "/sys/fs/cgroup"] {
        let sandbox_id = || id.to_owned();
        for body in [
            request::Body::KillSandbox(KillSandbox { sandbox_id: sandbox_id() }),
            request::Body::FreezeSandbox(FreezeSandbox { sandbox_id: sandbox_id(), frozen: true }),
            request::Body::InspectSandbox(InspectSandbox { sandbox_id: sandbox_id() }),
        ] {
            let failure = connection.refusal(body).expect("refused");
            assert_refusal(&failure, &["SANDBOX_UNKNOWN", "INVALID_FIELD"], "sandbox");
        }
    }
}

#[test]
fn same_sandbox_is_never_made_twice() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    create(&connection, plain_sandbox("twin"));

    let failure = refused(&connection, plain_sandbox("twin"));

    assert_refusal(&failure, &["SANDBOX_EXISTS"], "twin");
    assert_eq!(list(&connection).len(), 1);
}

#[test]
fn thousand_creations_end_at_the_slots_and_nothing_is_lost() {
    needs_root!();
    let mut bench = Bench::start();
    let connection = bench.connect();
    let mut made = Vec::new();
    let mut refusals = 0;
    for number in 0..1000 {
        let id = format!("flood-{number}");
        match connection.ask(request::Body::CreateSandbox(plain_sandbox(&id))).expect("an answer").body {
            Some(reply::Body::SandboxCreated(created)) => made.push(created),
            Some(reply::Body::Failure(failure)) => {
                assert_refusal(&failure, &["NO_SLOT"], "in use");
                refusals += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((made.len(), refusals), (3, 997));
    let bases: BTreeSet<u32> = made.iter().map(|created| created.id_base).collect();
    assert_eq!(bases.len(), 3, "two sandboxes share their ids: {made:?}");
    for created in &made {
        let beyond = sandbox_runner_tests::launcher::ID_BASE + 3 * 65_536;
        assert!(
            created.id_base >= sandbox_runner_tests::launcher::ID_BASE && created.id_base + created.id_count <= beyond
        );
        kill(&connection, &created.sandbox_id);
    }
    drop(connection);
    bench.assert_serves();
}

#[test]
fn other_users_are_not_answered() {
    needs_root!();
    let mut bench = Bench::start();
    for uid in [65_534, 1, sandbox_runner_tests::launcher::ID_BASE, sandbox_runner_tests::launcher::RUNNER_UID + 1] {
        // Refused by the file mode of the socket or by the uid of the peer: either is fine, an answer is not.
        let Ok(connection) = Connection::open_as(&bench.socket(), uid) else { continue };
        let answer = connection.ask(request::Body::Hello(Hello { major: 1 }));
        assert!(answer.is_err(), "uid {uid} was answered: {answer:?}");
    }
    // The same with the file mode out of the way, so that only the peer's uid can protect.
    fs::set_permissions(bench.socket(), Permissions::from_mode(0o777)).expect("chmod of the socket");
    let run = bench.socket().parent().expect("a parent").to_owned();
    fs::set_permissions(run, Permissions::from_mode(0o755)).expect("chmod of the run directory");
    let connection = Connection::open_as(&bench.socket(), 65_534).expect("the socket is open to everybody now");
    let answer = connection.ask(request::Body::Hello(Hello { major: 1 }));
    assert!(answer.is_err(), "a foreign uid was answered: {answer:?}");
    bench.assert_serves();
}

#[test]
fn conversation_that_does_not_begin_with_a_greeting_is_refused() {
    needs_root!();
    let mut bench = Bench::start();
    let connection = Connection::open(&bench.socket()).expect("connected");
    let answer = connection.ask(request::Body::CreateSandbox(plain_sandbox("early")));
    assert!(
        !matches!(answer, Ok(ref reply) if matches!(reply.body, Some(reply::Body::SandboxCreated(_)))),
        "{answer:?}"
    );

    let connection = Connection::open(&bench.socket()).expect("connected");
    let answer = connection.ask(request::Body::Hello(Hello { major: 2 }));
    assert!(!matches!(answer, Ok(ref reply) if matches!(reply.body, Some(reply::Body::Welcome(_)))), "{answer:?}");
    bench.assert_serves();
}

#[test]
fn garbage_unknown_fields_and_oversize_packets_do_no_harm() {
    needs_root!();
    let mut bench = Bench::start();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |length: usize| -> Vec<u8> {
        (0..length)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .collect()
    };
    let valid =
        Request { request_id: 1, body: Some(request::Body::CreateSandbox(plain_sandbox("cut"))) }.encode_to_vec();
    let mut packets: Vec<Vec<u8>> = (0..60).map(|number| random(1 + number * 37)).collect();
    packets.extend((1..valid.len()).step_by(3).map(|length| valid[..length].to_vec()));
    // A request whose only field is unknown, lengths that lie, and nesting.
    packets.push(vec![0xfa, 0x06, 0x03, b'a', b'b', b'c']);
    packets.push(vec![0x5a, 0xff, 0xff, 0xff, 0xff, 0x07]);
    packets.push(vec![0x5a; 4000]);
    packets.push(random(65_536));
    packets.push(random(200_000));
    for packet in packets {
        let Ok(connection) = Connection::greeted(&bench.socket()) else { panic!("no longer served after garbage") };
        // A packet larger than the socket's buffer is refused by the kernel before it is sent.
        if connection.send(&packet).is_ok() {
            let _ = connection.ask(request::Body::ListSandboxes(ListSandboxes::default()));
        }
    }
    let connection = bench.connect();
    let unexpected: Vec<_> = list(&connection).into_iter().filter(|entry| entry.sandbox_id != "cut").collect();
    assert_eq!(unexpected, []);
    for entry in list(&connection) {
        kill(&connection, &entry.sandbox_id);
    }
    drop(connection);
    bench.assert_serves();
}

#[test]
fn silent_connections_do_not_stop_the_service() {
    needs_root!();
    let mut bench = Bench::start();
    // A predecessor that hangs may still hold some; the launcher bounds how many.
    let few: Vec<_> = (0..4).map_while(|_| Connection::open(&bench.socket()).ok()).collect();
    bench.assert_serves();
    let many: Vec<_> = (0..64).map_while(|_| Connection::open(&bench.socket()).ok()).collect();
    let before = fs::read_dir(format!("/proc/{}/fd", bench.launcher.pid())).map_or(0, Iterator::count);
    assert!(before < 100, "{before} descriptors: connections are not bounded");

    drop((few, many));

    bench.assert_serves();
}

#[test]
fn replacing_its_program_needs_a_file_that_only_root_can_change() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let directory = sandbox_runner_tests::rootfs::shared_directory("program");
    let program = directory.path().join("sandbox-init");
    fs::copy(sandbox_runner_tests::runner::sandbox_init(), &program).expect("a copy of the program");
    for (owner, mode) in [(65_534, 0o755), (0, 0o775), (0, 0o777)] {
        chown(&program, Some(owner), None).expect("chown");
        fs::set_permissions(&program, Permissions::from_mode(mode)).expect("chmod");
        let mut setup = Setup::new(1, rootfs.path());
        setup.policy = format!("program = \"{}\"\n{}", program.display(), setup.policy);
        // Refused at once, or when it is asked for.
        let Ok(mut launcher) = setup.start() else { continue };
        let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
        let failure = connection.refusal(request::Body::Reexecute(Reexecute {})).expect("refused");
        assert_refusal(&failure, &["NOT_ALLOWED"], "program");
        assert!(launcher.is_alive());
    }
}

#[test]
fn replacing_its_program_without_one_in_the_policy_is_refused() {
    needs_root!();
    let mut bench = Bench::start();
    let failure = bench.connect().refusal(request::Body::Reexecute(Reexecute {})).expect("refused");
    assert_refusal(&failure, &["NOT_ALLOWED", "NOT_SUPPORTED"], "program");
    bench.assert_serves();
}

/// Starts a launcher that must refuse its policy, and returns what it says.
fn policy_refusal(change: impl FnOnce(&mut Setup)) -> String {
    let rootfs = Rootfs::with_prober();
    let mut setup = Setup::new(1, rootfs.path());
    change(&mut setup);
    let finished = finish(setup.command(), Duration::from_secs(10)).expect("a launcher that refuses its policy ends");
    assert!(!finished.status.success(), "the policy was accepted: {}", setup.policy);
    finished.errors()
}

#[test]
fn policy_that_others_can_change_is_refused() {
    needs_root!();
    for mode in [0o620, 0o602, 0o666, 0o664] {
        let message = policy_refusal(|setup| setup.mode = mode);
        assert!(message.contains("launcher.toml"), "mode {mode:o}: {message}");
    }
    let message = policy_refusal(|setup| setup.owner = 65_534);
    assert!(message.contains("65534"), "{message}");
}

#[test]
fn policy_with_a_mistake_is_refused_by_key() {
    needs_root!();
    let cases: [(&str, &str, &str); 6] = [
        ("version = 1", "version = 2", "version"),
        ("version = 1", "version = 1\nrunner_user = 5", "runner_user"),
        ("state_directory = \"/", "state_directory = \"", "state_directory"),
        ("pids = 64", "pids = 640", "default"),
        ("seccomp = \"standard\"", "seccomp = \"none\"", "seccomp"),
        ("without = []", "without = [\"everything\"]", "everything"),
    ];
    for (from, to, named) in cases {
        let message = policy_refusal(|setup| {
            assert!(setup.policy.contains(from), "the case {from} no longer applies");
            setup.policy = setup.policy.replacen(from, to, 1);
        });
        assert!(message.contains(named), "{to}: the message does not name {named}: {message}");
    }
}

/// The run directory may be the runner's own. Whatever it does to the names there while the launcher makes its socket, the
/// launcher may not give it a file of the host.
#[test]
fn socket_exchanged_for_a_link_while_it_is_made_gives_nothing_away() {
    use std::sync::atomic::{AtomicBool, Ordering};
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let victim = rootfs.path().join("etc/passwd");
    let before = fs::metadata(&victim).expect("a file of root");
    for _ in 0..25 {
        let setup = Setup::new(1, rootfs.path());
        let socket = setup.socket();
        let stop = AtomicBool::new(false);
        let exchanged = socket.with_file_name("exchanged");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Only what appears under the name is exchanged, once.
                    if fs::rename(&socket, &exchanged).is_ok() {
                        let _ = std::os::unix::fs::symlink(&victim, &socket);
                        break;
                    }
                }
            });
            let mut launcher = setup.command().spawn().expect("the launcher starts");
            let deadline = std::time::Instant::now() + Duration::from_secs(20);
            while !exchanged.exists() && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(20));
            stop.store(true, Ordering::Relaxed);
            let pid = nix::unistd::Pid::from_raw(launcher.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            wait(&mut launcher, Duration::from_secs(15)).expect("the launcher ends when it is told to");
        });
        let after = fs::metadata(&victim).expect("a file of root");
        let (uid, mode) = (std::os::unix::fs::MetadataExt::uid(&after), after.permissions().mode());
        assert_eq!(
            (uid, mode),
            (std::os::unix::fs::MetadataExt::uid(&before), before.permissions().mode()),
            "the launcher gave a file of the host away"
        );
    }
}

/// The state directory is the launcher's. A runner that could write below it could fill the disk with trees that the tree
/// workers, which are nobody there, cannot remove.
#[test]
fn spool_of_a_sandbox_is_no_place_for_the_runner_to_write() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let created = create(&connection, plain_sandbox("spool"));
    let [state, _] = bench.launcher.setup().directories();
    let name = created.socket_name.trim_end_matches(".sock");
    let spool = state.join("sandboxes").join(name).join("output");
    assert!(spool.is_dir(), "the spool is elsewhere: {}", spool.display());
    let as_runner = |script: &str| {
        let mut command = Command::new("sh");
        let runner = sandbox_runner_tests::launcher::RUNNER_UID;
        std::os::unix::process::CommandExt::uid(&mut command, runner);
        std::os::unix::process::CommandExt::gid(&mut command, runner);
        command.args(["-c", script, "sh"]).arg(&spool).current_dir("/");
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped());
        finish(command, Duration::from_secs(10)).expect("sh ends")
    };

    let read = as_runner("ls \"$1\"");
    let made = as_runner("mkdir \"$1/planted\"");

    kill(&connection, "spool");
    assert!(read.status.success(), "the runner cannot read the spool: {}", read.errors());
    assert!(!made.status.success(), "the runner made a directory in {}", spool.display());
}

/// A blank has the limits of the last sandbox ahead of need. They must be nobody's who asks for others, larger or smaller.
#[test]
fn limits_are_those_of_the_request_whatever_the_sandbox_before_it_had() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let asked = [(64, 40), (64, 40), (192, 80), (32, 20), (192, 80)];
    for (round, (mebibytes, pids)) in asked.into_iter().enumerate() {
        let id = format!("round-{round}");
        let limits = Limits { memory_bytes: mebibytes * MIB, pids, cpu_millis: 500 + 10 * pids, disk_bytes: 16 * MIB };
        create(&connection, CreateSandbox { limits: Some(limits), ..plain_sandbox(&id) });

        let inspect = InspectSandbox { sandbox_id: id.clone() };
        let answer = connection.ask(request::Body::InspectSandbox(inspect)).expect("an answer").body;

        kill(&connection, &id);
        let Some(reply::Body::Inspection(inspection)) = answer else { panic!("no inspection: {answer:?}") };
        let found = inspection.limits.expect("limits");
        assert_eq!((found.memory_bytes, found.pids), (mebibytes * MIB, pids), "round {round}");
    }
}

#[test]
fn thirty_sandboxes_leave_nothing_in_the_launcher() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let round = |number: usize| {
        let id = format!("round-{number}");
        create(&connection, plain_sandbox(&id));
        kill(&connection, &id);
    };
    // Every slot keeps the layers it has once shown. The lowest free one is taken first, so a turn for all of them takes
    // as many sandboxes at once.
    let all = ["first", "second", "third"];
    assert_eq!(all.len(), usize::try_from(SLOTS).expect("few"), "one sandbox for each slot");
    for id in all {
        create(&connection, plain_sandbox(id));
    }
    for id in all {
        kill(&connection, id);
    }
    (0..3).for_each(round);
    std::thread::sleep(Duration::from_secs(1));
    let before = footprint(bench.launcher.pid());

    (3..33).for_each(round);

    let mut after = footprint(bench.launcher.pid());
    for _ in 0..100 {
        if after == before {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        after = footprint(bench.launcher.pid());
    }
    assert_eq!(after, before, "descriptors, mounts and children of the launcher");
}

/// How many descriptors, mounts and children it has.
fn footprint(launcher: u32) -> (usize, usize, usize) {
    let descriptors = fs::read_dir(format!("/proc/{launcher}/fd")).map_or(0, Iterator::count);
    let mounts = fs::read_to_string(format!("/proc/{launcher}/mountinfo")).unwrap_or_default().lines().count();
    (descriptors, mounts, host::children_of(launcher).len())
}

#[test]
fn launcher_inherits_nothing_from_whoever_starts_it() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let marker = rootfs.path().join("etc/passwd");
    let setup = Setup::new(2, rootfs.path());
    let inner = setup.command();
    let mut command = Command::new("bash");
    let opened: String = (3..=20).map(|fd| format!("exec {fd}<\"$1\"\n")).collect();
    command
        .arg("-c")
        .arg(format!("trap '' INT TERM HUP\numask 0\n{opened}shift\nexec \"$@\""))
        .arg("bash")
        .arg(&marker);
    command.arg(inner.get_program()).args(inner.get_args()).env_clear().env("SECRET_OF_THE_CALLER", "x");
    command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let launcher = setup.start_with(command).expect("the launcher starts");
    let connection = Connection::greeted(&launcher.setup().socket()).expect("served");

    let created = create(&connection, plain_sandbox("heir"));

    for pid in host::family_of(created.pid) {
        let ignored = host::status_field(pid, "SigIgn:").unwrap_or_default();
        let mask = u64::from_str_radix(&ignored, 16).unwrap_or(0);
        // SIGHUP 1, SIGINT 2, SIGTERM 15.
        assert_eq!(mask & 0x4003, 0, "process {pid} of the sandbox ignores signals of the caller");
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        assert!(
            !String::from_utf8_lossy(&environment).contains("SECRET_OF_THE_CALLER"),
            "process {pid} has a variable"
        );
        assert_eq!(held(pid, &marker), 0, "process {pid} holds a file of the caller");
    }
    kill(&connection, "heir");
}

fn held(pid: u32, file: &Path) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == file)).count()
}

/// The next launcher after one that was killed. Ended with the test, however that ends.
struct Successor {
    process: std::process::Child,
}

impl Successor {
    fn start(mut command: Command, socket: &Path) -> (Self, Connection) {
        // The new socket must not be mistaken for the old one.
        let _ = fs::remove_file(socket);
        let successor = Self { process: command.spawn().expect("the second launcher starts") };
        let connection = (0..400).find_map(|_| {
            std::thread::sleep(Duration::from_millis(50));
            Connection::greeted(socket).ok()
        });
        (successor, connection.expect("the second launcher serves"))
    }

    fn stop(mut self, connection: &Connection) {
        let _ = connection.ask(request::Body::Stop(proto::launch::v1::Stop {}));
        wait(&mut self.process, Duration::from_secs(15)).expect("the launcher ends when it is told to");
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if matches!(self.process.try_wait(), Ok(None)) {
            let pid = nix::unistd::Pid::from_raw(self.process.id().cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
            let _ = wait(&mut self.process, Duration::from_secs(15));
        }
    }
}

#[test]
fn sandbox_outlives_a_killed_launcher_and_is_adopted_by_the_next() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let (again, socket) = (setup.command(), setup.socket());
    let mut first = setup.start().expect("the launcher starts");
    let created = create(&Connection::greeted(&socket).expect("served"), plain_sandbox("orphan"));

    first.kill();

    assert_eq!(host::inner_pid(created.pid), Some(1), "process 1 went with its launcher");
    let (second, connection) = Successor::start(again, &socket);
    let listed = list(&connection);
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(listed[0].adopted && listed[0].sandbox_id == "orphan" && listed[0].pid == created.pid, "{listed:?}");
    kill(&connection, "orphan");
    assert!(host::is_ended_orphan(created.pid), "process 1 still runs");
    second.stop(&connection);
}

#[test]
fn launcher_whose_helper_was_killed_ends_with_its_sandboxes_instead_of_serving_nobody() {
    needs_root!();
    let mut bench = Bench::start();
    let connection = bench.connect();
    let created = create(&connection, plain_sandbox("one"));
    let helper = host::children_of(bench.launcher.pid()).into_iter().find(|pid| host::is_outside(*pid));

    host::kill_now(helper.expect("the background process"));
    // A request that comes while it ends must not keep it from ending.
    let request = Request { request_id: 1, body: Some(request::Body::CreateSandbox(plain_sandbox("late"))) };
    let _ = connection.send(&request.encode_to_vec());

    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while bench.launcher.is_alive() {
        assert!(std::time::Instant::now() < deadline, "the launcher neither serves nor ends");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(host::is_ended_orphan(created.pid), "process 1 still runs");
}

#[test]
fn sandbox_whose_runner_left_before_the_answer_is_not_kept() {
    needs_root!();
    let mut bench = Bench::start();
    let leaving = bench.connect();
    let request = Request { request_id: 1, body: Some(request::Body::CreateSandbox(plain_sandbox("nobodys"))) };
    leaving.send(&request.encode_to_vec()).expect("sent");

    drop(leaving);

    // Requests are served in their order: when the second sandbox is there, the first one was decided about.
    let connection = bench.connect();
    create(&connection, plain_sandbox("second"));
    let left: Vec<_> = list(&connection).into_iter().map(|entry| entry.sandbox_id).collect();
    assert_eq!(left, ["second"]);
    kill(&connection, "second");
    drop(connection);
    bench.assert_serves();
}

#[test]
fn launcher_that_is_to_be_followed_leaves_its_sandboxes_to_the_next() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let (again, socket) = (setup.command(), setup.socket());
    let mut first = setup.start().expect("the launcher starts");
    let created = create(&Connection::greeted(&socket).expect("served"), plain_sandbox("left"));

    let pid = nix::unistd::Pid::from_raw(first.pid().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGUSR1).expect("signalled");

    let ended = (0..400).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        !first.is_alive()
    });
    assert!(ended, "the launcher does not end");
    assert_eq!(host::inner_pid(created.pid), Some(1), "process 1 went with its launcher");
    let (second, connection) = Successor::start(again, &socket);
    let listed = list(&connection);
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(listed[0].adopted && listed[0].sandbox_id == "left" && listed[0].pid == created.pid, "{listed:?}");
    kill(&connection, "left");
    assert!(host::is_ended_orphan(created.pid), "process 1 still runs");
    second.stop(&connection);
}

#[test]
fn launcher_that_is_stopped_while_it_starts_leaves_nothing() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let directories = setup.directories();
    let [_, run] = &directories;
    let group = group_of_launcher(run);
    for delay in 0..20 {
        let mut process = setup.command().spawn().expect("spawned");
        std::thread::sleep(Duration::from_millis(2 * delay));

        let pid = nix::unistd::Pid::from_raw(process.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signalled");

        wait(&mut process, Duration::from_secs(15)).expect("the launcher ends when it is told to");
        let left = || -> Vec<PathBuf> {
            directories.iter().flat_map(|path| host::files_below(&path.join("sandboxes"))).collect()
        };
        let is_clean = || left().is_empty() && !host::launcher_groups().contains(&group);
        let clean = (0..200).any(|_| {
            let clean = is_clean();
            if !clean {
                std::thread::sleep(Duration::from_millis(50));
            }
            clean
        });
        assert!(clean, "stopped after {} ms: {:?}, {:?}", 2 * delay, left(), host::launcher_groups());
    }
}

#[test]
fn slots_of_sandboxes_that_died_without_a_launcher_are_free_again() {
    needs_root!();
    let rootfs = Rootfs::with_prober();
    let setup = Setup::new(2, rootfs.path());
    let (again, socket) = (setup.command(), setup.socket());
    let mut first = setup.start().expect("the launcher starts");
    let connection = Connection::greeted(&socket).expect("served");
    let pids = [create(&connection, plain_sandbox("a")).pid, create(&connection, plain_sandbox("b")).pid];
    first.kill();
    pids.into_iter().for_each(host::kill_now);

    let (second, connection) = Successor::start(again, &socket);

    assert_eq!(list(&connection), []);
    create(&connection, plain_sandbox("c"));
    create(&connection, plain_sandbox("d"));
    second.stop(&connection);
}

#[test]
fn stopped_launcher_leaves_nothing_on_the_host() {
    needs_root!();
    let _host = host::exclusive();
    let before = Snapshot::take(&[]);
    let bench = Bench::start();
    let connection = bench.connect();
    create(&connection, plain_sandbox("one"));
    create(&connection, plain_sandbox("two"));
    drop(connection);

    bench.launcher.stop();

    host::assert_restored(&before, &[], Duration::from_secs(20));
}
