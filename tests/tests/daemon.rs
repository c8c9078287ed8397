//! What the built daemon refuses, and how: places that are taken, requests that make no sense, configurations that do not
//! describe a runner. Each is answered with the field and the fix, nothing runs, and what worked before goes on.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use runner::dev::DevError;
use sandbox_runner_tests::daemon::{Daemon, Options, bash, exec, small_sandboxes, text_of, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::ON_DISK;
use sandbox_runner_tests::runner::{Finished, binary, finish, scaled, wait};
use sandbox_runner_tests::way::Way;

const MIB: u64 = 1 << 20;

fn open(session_id: &str, limits: pb::ResourceLimits) -> pb::OpenSession {
    pb::OpenSession { session_id: session_id.into(), limits: Some(limits), ..Default::default() }
}

/// The refusal of a session that must not be opened.
async fn refused(daemon: &Daemon, request: pb::OpenSession) -> pb::ToolFailure {
    let name = request.session_id.clone();
    match within(&name, daemon.orchestrator.open_session(request)).await {
        Err(DevError::Refused { failure, .. }) => *failure,
        Ok(_) => panic!("{name} was opened"),
        Err(other) => panic!("{name}: {other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_sessions_are_reserved_and_refused_with_their_numbers() {
    needs_root!();
    let _host = host::shared();
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("proc");
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("MemTotal");
    let total: u64 = total.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024;
    let capacity = 300 * MIB;
    let limits = format!(
        "max_sessions = 3\nsandbox_memory_bytes = {}\nsandbox_pids = 64\nsandbox_disk_bytes = {}\n\
         sandbox_cpu_millis = 1000\nhost_reserve_memory_bytes = {}\n",
        128 * MIB,
        64 * MIB,
        total - capacity,
    );
    let daemon = Daemon::start(Options { slots: 5, limits, ..Options::default() }).await;
    let first = daemon.session("first").await;
    let _second = daemon.session("second").await;

    let failure = refused(&daemon, open("third", pb::ResourceLimits::default())).await;
    assert_eq!((failure.code.as_str(), failure.retryable), ("CAPACITY", true));
    let expected = format!("memory_bytes: {} asked, {} of {capacity} are reserved", 128 * MIB, 256 * MIB);
    assert!(failure.message.starts_with(&expected), "{}", failure.message);
    assert!(failure.retry_after.is_some() && !failure.remediation.is_empty());

    let small = pb::ResourceLimits { memory_bytes: 32 * MIB, ..Default::default() };
    within("small", daemon.orchestrator.open_session(open("small", small))).await.expect("there is room for it");
    let failure = refused(&daemon, open("fourth", small)).await;
    assert!(failure.message.starts_with("sessions: 1 asked, 3 of 3 are reserved"), "{}", failure.message);

    assert_eq!(daemon.sandboxes().len(), 3);
    within("close", first.close(Duration::ZERO)).await.expect("the session ends");
    daemon.session("instead").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn descriptors_are_reserved_and_what_never_fits_is_not_worth_another_try() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::install(Options { slots: 6, ..Options::default() }).await;
    daemon.start_launcher().await;
    // Three quarters of 100, at 16 for each session: four fit.
    daemon.start_runner_with(&["prlimit", "--nofile=100:100"]).await;
    let mut sessions = Vec::new();
    for number in 0..4 {
        sessions.push(daemon.session(&format!("s{number}")).await);
    }

    let failure = refused(&daemon, open("s4", pb::ResourceLimits::default())).await;
    assert!(failure.message.starts_with("descriptors: 16 asked, 64 of 75 are reserved"), "{}", failure.message);
    assert!(failure.retryable);

    within("close", sessions.remove(0).close(Duration::ZERO)).await.expect("the session ends");
    let never = [
        ("memory_bytes", pb::ResourceLimits { memory_bytes: u64::MAX, ..Default::default() }),
        ("disk_bytes", pb::ResourceLimits { disk_bytes: u64::MAX, ..Default::default() }),
        ("pids", pb::ResourceLimits { pids: u64::MAX, ..Default::default() }),
    ];
    for (field, limits) in never {
        let failure = refused(&daemon, open(&format!("much-{field}"), limits)).await;
        assert!(failure.message.starts_with(&format!("{field}: {} asked", u64::MAX)), "{}", failure.message);
        assert!(!failure.retryable && failure.remediation.contains(field), "{failure:?}");
    }
    for session in &sessions {
        let id = format!("{}-works", session.session_id);
        let finished = within(&id, session.bash(&id, "echo yes")).await.expect("an end");
        assert_eq!(finished.streams[&1].bytes, b"yes\n");
    }
    assert_eq!(daemon.sandboxes().len(), 3);
    assert_eq!(daemon.orchestrator.links(), 1);
}

fn call(call_id: &str, input: Option<pb::call::Input>) -> pb::Call {
    pb::Call { call_id: call_id.into(), session_id: "s".into(), epoch: 1, input, ..Default::default() }
}

fn read(path: &str, view_range: &[i64]) -> Option<pb::call::Input> {
    Some(pb::call::Input::Read(pb::ReadInput { file_path: path.into(), view_range: view_range.to_vec() }))
}

fn run(argv: &[&[u8]]) -> pb::ExecInput {
    pb::ExecInput { argv: argv.iter().map(|word| word.to_vec()).collect(), ..Default::default() }
}

/// Calls that must be refused before anything runs: what is sent, the code, and how the message begins.
fn bad_calls() -> Vec<(pb::Call, &'static str, &'static str)> {
    use pb::call::Input;
    let touch = || Some(bash("echo ran >> ran"));
    let mode = |mode| Some(pb::OutputPolicy { mode, ..Default::default() });
    let bash_for = |timeout_ms| {
        Some(Input::Bash(pb::BashInput { command: Some("echo ran >> ran".into()), timeout_ms, ..Default::default() }))
    };
    vec![
        (call("no-tool", None), "INVALID_FIELD", "input: no tool is set"),
        (call("", touch()), "INVALID_FIELD", "call_id is empty"),
        (call("a b", touch()), "INVALID_FIELD", "call_id contains ' '"),
        (
            pb::Call { session_id: "elsewhere".into(), ..call("c1", touch()) },
            "SESSION_UNKNOWN",
            "session_id: session elsewhere",
        ),
        (pb::Call { epoch: 0, ..call("c2", touch()) }, "INVALID_FIELD", "epoch: is missing"),
        (pb::Call { epoch: 7, ..call("c3", touch()) }, "STALE_EPOCH", "epoch: 7"),
        (pb::Call { output: mode(99), ..call("c4", touch()) }, "INVALID_FIELD", "output.mode: 99"),
        (pb::Call { output: mode(-1), ..call("c5", touch()) }, "INVALID_FIELD", "output.mode: -1"),
        (
            pb::Call {
                output: Some(pb::OutputPolicy { head_bytes: 2 << 30, ..Default::default() }),
                ..call("c6", touch())
            },
            "INVALID_FIELD",
            "output: head_bytes and tail_bytes",
        ),
        (call("c7", bash_for(i64::MIN)), "INVALID_FIELD", "bash.timeout_ms: is negative"),
        (call("c8", bash_for(i64::MAX)), "INVALID_FIELD", "bash.timeout_ms: is more than 30 days"),
        (call("c9", Some(bash("echo ran >> ran\0"))), "INVALID_FIELD", "bash.command: contains a NUL"),
        (call("c10", Some(bash("x".repeat(300_000)))), "TOO_LARGE", "bash input has 300000 bytes"),
        (call("c11", Some(bash("x".repeat(2 << 20)))), "TOO_LARGE", "the frame has 20971"),
        (call("c12", read("a\0b", &[])), "INVALID_FIELD", "read.file_path: contains a NUL"),
        (call("c13", read("f", &[-5, -2])), "INVALID_FIELD", "read.view_range: [-5, -2]"),
        (call("c14", read("f", &[5, 2])), "INVALID_FIELD", "read.view_range: [5, 2]"),
        (call("c15", read("f", &[1, 2, 3])), "INVALID_FIELD", "read.view_range: 3 numbers"),
        (call("c16", Some(Input::Exec(run(&[])))), "INVALID_FIELD", "exec.argv"),
        (call("c17", Some(Input::Exec(run(&[b"/bin/echo", b"a\0b"])))), "INVALID_FIELD", "exec.argv: contains a NUL"),
        (
            call("c18", Some(Input::Exec(pb::ExecInput { env: vec![b"no equals sign".to_vec()], ..run(&[b"true"]) }))),
            "INVALID_FIELD",
            "exec.env",
        ),
        (
            call("c19", Some(Input::Exec(pb::ExecInput { cwd: Some(b"a\0b".to_vec()), ..run(&[b"true"]) }))),
            "INVALID_FIELD",
            "exec.cwd: contains a NUL",
        ),
        (
            pb::Call { start_within: Some(prost_types::Duration { seconds: -1, nanos: 0 }), ..call("c20", touch()) },
            "INVALID_FIELD",
            "start_within: is negative",
        ),
        (call("first", Some(bash("echo other"))), "CALL_ID_REUSED", "call_id: first was used before"),
    ]
}

/// Everything else that an orchestrator can send wrongly.
fn bad_requests() -> Vec<(Body, &'static str, &'static str)> {
    let stdin = |data: Vec<u8>, call_id: &str| pb::WriteStdin { call_id: call_id.into(), data, ..Default::default() };
    let session = |session_id: &str| pb::OpenSession { session_id: session_id.into(), epoch: 50, ..Default::default() };
    vec![
        (Body::WriteStdin(stdin(vec![0; 300_000], "first")), "INVALID_FIELD", "data: 300000 bytes"),
        (Body::WriteStdin(stdin(vec![0], "nobody")), "CALL_UNKNOWN", "call_id: call nobody is not running"),
        (
            Body::ResizeTerminal(pb::ResizeTerminal { call_id: "first".into(), size: None }),
            "INVALID_FIELD",
            "size: is missing",
        ),
        (
            Body::CancelCall(pb::CancelCall { call_id: "first".into(), session_id: "s".into(), epoch: 1, mode: 99 }),
            "INVALID_FIELD",
            "mode: 99",
        ),
        (
            Body::CloseSession(pb::CloseSession { session_id: "nobody".into(), epoch: 1, grace: None }),
            "SESSION_UNKNOWN",
            "session_id: session nobody",
        ),
        (Body::OpenSession(session("a/b")), "INVALID_FIELD", "session_id contains '/'"),
        (Body::OpenSession(pb::OpenSession { epoch: 0, ..session("t1") }), "INVALID_FIELD", "epoch: is missing"),
        (
            Body::OpenSession(pb::OpenSession {
                variables: [("A=B".to_owned(), "x".to_owned())].into(),
                ..session("t2")
            }),
            "INVALID_FIELD",
            "variables: \"A=B\"",
        ),
        (
            Body::OpenSession(pb::OpenSession { on_lease_loss: 77, ..session("t3") }),
            "INVALID_FIELD",
            "on_lease_loss: 77",
        ),
        (
            Body::OpenSession(pb::OpenSession {
                network: Some(pb::NetworkPolicy { mode: 42, ..Default::default() }),
                ..session("t4")
            }),
            "INVALID_FIELD",
            "network.mode: 42",
        ),
        (
            Body::OpenSession(pb::OpenSession {
                orphan_ttl: Some(prost_types::Duration { seconds: i64::MAX, nanos: 0 }),
                ..session("t5")
            }),
            "INVALID_FIELD",
            "orphan_ttl: is more than 30 days",
        ),
        (Body::Drain(pb::Drain { mode: 12, ..Default::default() }), "INVALID_FIELD", "mode: 12"),
        (Body::ForwardData(pb::ForwardData::default()), "UNIMPLEMENTED", "forward_data"),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_mistake_is_refused_by_field_and_nothing_of_it_runs() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("s").await;
    assert_eq!(session.epoch, 1);
    session.send("first", bash("echo first; sleep 600; echo never"));
    within("start", session.started("first")).await.expect("started");

    let calls = bad_calls().into_iter().map(|(call, code, text)| (Body::Call(call), code, text));
    for (body, code, text) in calls.chain(bad_requests()) {
        let about = format!("{body:.200?}");
        daemon.orchestrator.send_raw(body);
        let refused = within(&about, daemon.orchestrator.refusal()).await.expect("a refusal");
        let failure = refused.failure.expect("a failure");
        assert_eq!(failure.code, code, "{about}: {}", failure.message);
        assert!(failure.message.starts_with(text), "{about}: {} does not start with {text}", failure.message);
        assert!(!failure.remediation.is_empty(), "{about}: {} has no remedy", failure.message);
    }

    // What ran goes on, and nothing else has.
    session.cancel("first", pb::CancelMode::Interrupt);
    let first = within("first", session.outcome("first")).await.expect("an end");
    assert_eq!(first.streams[&1].bytes, b"first\n");
    let after = within("after", session.bash("after", "ls -A")).await.expect("an end");
    assert!(after.streams.get(&1).is_none_or(|output| output.bytes.is_empty()), "{}", text_of(&after.message));
    assert_eq!(daemon.orchestrator.links(), 1);
    assert_eq!(daemon.sandboxes().len(), 1);
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    // Neither of what ran nor of what was refused is any input in the log.
    assert!(!daemon.log().contains("echo ") && !daemon.log().contains("ls -A"), "{}", daemon.end_of_log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inputs_that_only_the_sandbox_can_judge_are_errors_of_their_call() {
    use pb::call::Input;
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("s").await;
    within("first", session.bash("first", "echo same; echo same > twice; echo same >> twice")).await.expect("an end");
    let edit = |old: &str| {
        let (file_path, old_string) = ("twice".to_owned(), old.to_owned());
        Input::Edit(pb::EditInput { file_path, old_string, new_string: "x".into(), replace_all: false })
    };
    let cases: Vec<(&str, Input, &str)> = vec![
        ("missing", read("nothing/here", &[]).expect("an input"), "nothing/here"),
        ("empty-path", read("", &[]).expect("an input"), "file_path"),
        ("directory", read("/usr", &[]).expect("an input"), "/usr"),
        ("not-unique", edit("same"), "2"),
        ("not-there", edit("nowhere"), "twice"),
        ("nothing-to-find", edit(""), "old_string"),
        ("bad-glob", Input::Glob(pb::GlobInput { pattern: "[".into(), path: None }), "pattern"),
        ("bad-expression", Input::Grep(pb::GrepInput { pattern: "(".into(), path: None }), "invalid regex"),
        ("no-program", exec("exec /no/such/program"), "/no/such/program"),
    ];
    let mut problems = Vec::new();
    for (id, input, named) in cases {
        let finished = within(id, session.run(id, input)).await.unwrap_or_else(|error| panic!("{id}: {error}"));
        let text = text_of(&finished.message);
        let is_error = finished.message.result.as_ref().is_some_and(|result| result.is_error);
        if !is_error || !text.contains(named) {
            problems.push(format!("{id}: {text:?} is no error that names {named}"));
        }
    }
    assert!(problems.is_empty(), "{problems:#?}");
    // An environment that is not known ends the session before it begins, with the reason.
    let environment = Some(pb::EnvironmentRef { name: "nowhere".into(), ..Default::default() });
    let request = pb::OpenSession { session_id: "t".into(), environment, ..Default::default() };
    let error = within("t", daemon.orchestrator.open_session(request)).await.expect_err("not known");
    assert!(error.to_string().contains("environment \"nowhere\" is not known here"), "{error}");
    let request = pb::OpenSession { session_id: "u".into(), min_tier: "best".into(), ..Default::default() };
    let error = within("u", daemon.orchestrator.open_session(request)).await.expect_err("no tier");
    assert!(error.to_string().contains("min_tier"), "{error}");
    assert_eq!(daemon.sandboxes().len(), 1);
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    daemon.end_with_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn configuration_with_a_mistake_is_refused_by_key_with_the_fix_and_nothing_is_begun() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::install(Options { limits: small_sandboxes(), ..Options::default() }).await;
    let good = std::fs::read_to_string(daemon.config()).expect("the configuration");
    let before = files(&daemon);
    let cases = [
        ("[runner]", "[runner]\nmax_session = 3", "runner.max_session: is not a known key; "),
        ("[limits]", "[limits]\nmax_session = 3", "limits.max_session: is not a known key; did you mean max_sessions?"),
        ("[log]", "[logs]", "logs: is not a known key; did you mean log?"),
        ("key_file = \"/", "key_file = \"", "orchestrator.key_file: "),
        ("state_directory = \"/", "state_directory = \"", "is a relative path; write an absolute path"),
        ("launcher_socket = \"/", "launcher_socket = \"", "runner.launcher_socket: "),
        ("https://", "http://", "orchestrator.endpoint: "),
        ("min_tier = \"none\"", "min_tier = \"best\"", "runner.min_tier: \"best\" is not a tier"),
        ("sandbox_pids = 64", "sandbox_pids = -64", "limits.sandbox_pids: "),
        ("reconnect_most_ms = 20", "reconnect_most_ms = 0", "orchestrator.reconnect_most_ms: 0 is no useful time"),
        ("level = \"info\"", "level = info", "line "),
    ];
    for (from, to, expected) in cases {
        assert!(good.contains(from), "the case {from} no longer applies");
        std::fs::write(daemon.config(), good.replacen(from, to, 1)).expect("the configuration");
        let mut command = daemon.runner_command();
        command.stderr(Stdio::piped());
        let finished = finish(command, Duration::from_secs(30)).expect("it ends");
        assert_eq!(finished.code(), 78, "{to}: {}", finished.errors());
        assert!(finished.errors().contains(expected), "{to}: {} does not say {expected}", finished.errors());
    }
    std::fs::write(daemon.config(), good).expect("the configuration");
    assert_eq!(files(&daemon), before);
    assert_eq!(daemon.orchestrator.links(), 0);
}

/// Everything in the directories of an installation but its log.
fn files(daemon: &Daemon) -> Vec<std::path::PathBuf> {
    let mut found: Vec<_> =
        daemon.directories().iter().flat_map(|top: &std::path::PathBuf| host::files_below(Path::new(top))).collect();
    found.sort();
    found
}

/// A runner that made its own launcher cannot serve without it. Whoever started the runner is to start it again.
#[test]
fn runner_ends_when_the_launcher_of_its_own_is_killed() {
    needs_root!();
    let _host = host::shared();
    let directory = tempfile::tempdir_in(ON_DISK).expect("a directory");
    let path = |name: &str| directory.path().join(name);
    let config = format!(
        "[runner]\nid = \"alone\"\nmin_tier = \"none\"\nstate_directory = \"{}\"\nrun_directory = \"{}\"\n",
        path("state").display(),
        path("run").display()
    );
    std::fs::write(path("config.toml"), config).expect("a file of our own");
    let log = std::fs::File::create(path("log")).expect("a file of our own");
    let mut runner = std::process::Command::new(binary())
        .args(["run", "--config"])
        .arg(path("config.toml"))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("the runner starts");
    let said = || std::fs::read_to_string(path("log")).unwrap_or_default();
    let deadline = std::time::Instant::now() + scaled(Duration::from_secs(60));
    while !said().contains("runner started") {
        assert!(std::time::Instant::now() < deadline, "the runner does not start: {}", said());
        assert!(runner.try_wait().expect("own child").is_none(), "the runner has ended: {}", said());
        std::thread::sleep(Duration::from_millis(10));
    }
    let launcher = *host::children_of(runner.id()).first().expect("a launcher of its own");

    host::kill_now(launcher);

    let status = wait(&mut runner, Duration::from_secs(60));
    host::kill_now(runner.id());
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{}", said());
    assert!(said().contains("the launcher is gone"), "{}", said());
}

/// A command of an operator, and how it ended.
fn operator<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Finished {
    let mut command = Command::new(binary());
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command, Duration::from_secs(60)).expect("it ends")
}

fn config_command(daemon: &Daemon, what: &str) -> Finished {
    operator(["config", what, "--config", daemon.config().to_str().expect("a plain path")])
}

fn rewrite(daemon: &Daemon, from: &str, to: &str) {
    let text = std::fs::read_to_string(daemon.config()).expect("the configuration");
    assert!(text.contains(from), "{from} is not in it");
    std::fs::write(daemon.config(), text.replacen(from, to, 1)).expect("the configuration");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn link_goes_through_a_proxy_that_wants_credentials_and_nobody_is_shown_them() {
    needs_root!();
    let _host = host::shared();
    let proxy = Way::proxy().await;
    let mut daemon = Daemon::install(Options::default()).await;
    let line = format!("proxy = \"http://runner:hunter2@127.0.0.1:{}\"\n", proxy.port());
    rewrite(&daemon, "server_name", &format!("{line}server_name"));
    daemon.start_launcher().await;
    daemon.start_runner().await;
    let session = daemon.session("s").await;

    let finished = within("call", session.bash("c", "echo hi")).await.expect("an end");

    assert_eq!(finished.streams[&1].bytes, b"hi\n");
    let (heads, asked) = (proxy.heads(), format!("CONNECT 127.0.0.1:{} HTTP/1.1\r\n", daemon.wire.port()));
    let credentials = "\r\nProxy-Authorization: Basic cnVubmVyOmh1bnRlcjI=\r\n";
    assert!(!heads.is_empty() && heads.iter().all(|head| head.starts_with(&asked) && head.contains(credentials)));
    let shown = config_command(&daemon, "show");
    assert_eq!(shown.code(), 0, "{}", shown.errors());
    assert!(shown.text().contains("http://...@127.0.0.1:"), "{}", shown.text());
    for text in [shown.text(), shown.errors(), daemon.log(), config_command(&daemon, "check").text()] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_of_a_configuration_tells_every_problem_at_once_with_those_of_the_certificates() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::install(Options::default()).await;
    let good = config_command(&daemon, "check");
    assert_eq!((good.code(), good.text().trim()), (0, "no problem found"), "{}", good.errors());

    rewrite(&daemon, "id = \"runner-1\"", "id = \"runner-2\"");
    rewrite(&daemon, "server_name = \"localhost\"", "server_name = \"two words\"");
    rewrite(&daemon, "min_tier = \"none\"", "min_tier = \"best\"");

    let bad = config_command(&daemon, "check");
    assert_eq!(bad.code(), 78, "{}", bad.errors());
    let expected = [
        "orchestrator.server_name: \"two words\" is neither a host name nor an address",
        "runner.min_tier: \"best\" is not a tier",
        "names runner runner-1, and runner.id is runner-2; write id = \"runner-1\" into [runner]",
    ];
    for text in expected {
        assert!(bad.errors().contains(text), "{} does not say {text}", bad.errors());
    }
    assert_eq!(bad.errors().lines().count(), expected.len(), "{}", bad.errors());
    assert_eq!(config_command(&daemon, "show").code(), 78);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_another_runner_end_it_with_78_and_those_that_may_be_good_later_with_1() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::install(Options::default()).await;
    daemon.start_launcher().await;
    let ends = |expected: &str| {
        let mut command = daemon.runner_command();
        command.stderr(Stdio::piped());
        let finished = finish(command, Duration::from_secs(60)).expect("it ends");
        assert!(finished.errors().contains(expected), "{}", finished.errors());
        finished.code()
    };
    let key = daemon.directories()[0].join("identity/key.pem");
    let away = key.with_extension("away");

    std::fs::rename(&key, &away).expect("renamed");
    let missing = ends("cannot read private key");
    std::fs::rename(&away, &key).expect("renamed");
    rewrite(&daemon, "id = \"runner-1\"", "id = \"runner-2\"");
    let another = ends("names runner runner-1, and runner.id is runner-2; write id = \"runner-1\"");

    assert_eq!((missing, another), (1, 78));
    assert_eq!(daemon.orchestrator.links(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operator_reads_the_output_of_a_call_and_ends_calls_and_sessions() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("s").await;
    session.send("runs", bash("echo first; echo other >&2; sleep 600"));
    session.send("waits", bash("echo never"));
    within("start", session.started("runs")).await.expect("started");
    let socket = daemon.directories()[1].join("admin.sock");
    let ask = |arguments: &[&str]| {
        let socket = socket.to_str().expect("a plain path");
        tokio::task::block_in_place(|| operator(arguments.iter().copied().chain(["--socket", socket])))
    };
    let told = |finished: &Finished, expected: &str| {
        assert_eq!(finished.code(), 1, "{}", finished.text());
        assert!(finished.errors().contains(expected), "{} does not say {expected}", finished.errors());
    };

    // Without --follow it ends although the call goes on.
    let deadline = std::time::Instant::now() + scaled(Duration::from_secs(60));
    while ask(&["logs", "runs"]).text() != "first\nother\n" {
        assert!(std::time::Instant::now() < deadline, "{:?}", ask(&["logs", "runs"]));
    }
    assert_eq!(ask(&["logs", "runs", "--offset", "6"]).text(), "other\n");
    told(&ask(&["logs", "nobody"]), "call nobody is not known here; `ps` lists what is");
    told(&ask(&["logs", "a b"]), "call_id contains ' '");
    told(&ask(&["kill", "--call", "nobody"]), "call nobody is not known here");
    told(&ask(&["kill", "--session", "nobody"]), "session nobody is not known here");
    assert_eq!(ask(&["kill"]).code(), 2, "neither a session nor a call");

    for call_id in ["waits", "runs"] {
        let killed = ask(&["kill", "--call", call_id]);
        assert_eq!((killed.code(), killed.text().as_str()), (0, ""), "{}", killed.errors());
        let finished = within(call_id, session.outcome(call_id)).await.expect("an end");
        let kind = finished.message.outcome.and_then(|outcome| outcome.kind);
        assert!(matches!(kind, Some(pb::outcome::Kind::Cancelled(_))), "{call_id}: {kind:?}");
    }
    // It prints faster than anybody reads, so its output has no end; what is there has one.
    session.send("floods", bash("yes"));
    within("start", session.started("floods")).await.expect("started");
    let shown = ask(&["logs", "floods"]);
    assert_eq!(shown.code(), 0, "{}", shown.errors());
    assert!(shown.stdout.starts_with(b"y\ny\n"), "{} bytes", shown.stdout.len());
    assert_eq!(ask(&["kill", "--call", "floods"]).code(), 0);
    within("floods", session.ended("floods")).await.expect("an end");
    assert_eq!(ask(&["kill", "--session", "s"]).code(), 0);
    within("end", session.over()).await.expect("an end");
    assert_eq!(daemon.sandboxes(), Vec::<String>::new());
}

/// Sockets of these processes on which somebody could be answered from elsewhere: those that listen for TCP, and any of UDP but
/// connected ones.
fn network_addresses(pids: &[u32]) -> Vec<String> {
    let inodes: Vec<String> = pids
        .iter()
        .flat_map(|pid| std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process that lives"))
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()?.to_str().map(str::to_owned))
        .filter_map(|target| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    assert!(!inodes.is_empty(), "no socket of {pids:?} is seen");
    let tables = ["tcp", "tcp6", "udp", "udp6", "raw", "raw6"];
    let lines = tables.iter().flat_map(|table| {
        let text = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        text.lines().skip(1).map(|line| format!("{table} {line}")).collect::<Vec<_>>()
    });
    lines
        .filter(|line| {
            // table, sl, local, remote, state, queues, timer, retransmits, uid, timeout, inode: proc(5)
            let words: Vec<_> = line.split_whitespace().collect();
            // TCP_LISTEN of a stream, TCP_CLOSE of what is not connected.
            let open = if line.starts_with("tcp") { "0A" } else { "07" };
            words.get(4) == Some(&open) && words.get(10).is_some_and(|inode| inodes.iter().any(|own| own == inode))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_and_launcher_listen_on_no_network_address_and_sandbox_init_has_one_thread_while_they_serve() {
    needs_root!();
    let _host = host::shared();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    // Other tests of this process have listeners as well.
    let port = format!(":{:04X} ", listener.local_addr().expect("its address").port());
    let own = network_addresses(&[std::process::id()]);
    assert!(own.iter().any(|line| line.contains(&port)), "our own listener is not seen: {own:?}");
    let daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("s").await;
    session.send("runs", bash("exec sleep 600"));
    within("start", session.started("runs")).await.expect("started");

    let pids = [daemon.runner_pid().expect("a runner"), daemon.launcher_pid().expect("a launcher")];

    assert_eq!(network_addresses(&pids), Vec::<String>::new());
    // The launcher, process 1, the spawner, and what they have for calls.
    let family = host::family_of(pids[1]);
    assert!(family.len() > 3, "{family:?}");
    let several: Vec<_> =
        family.iter().filter_map(|pid| host::status_field(*pid, "Threads:")).filter(|threads| threads != "1").collect();
    assert!(several.is_empty(), "{several:?}");
}
