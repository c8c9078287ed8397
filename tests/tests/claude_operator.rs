//! What an operator of a Claude work queue sees: keys that are refused, items that are not ours, and the answers of `doctor`,
//! `status`, `ps` and `inspect`, from the built command on a control plane of the tests.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_runner_tests::claude::{Endpoint, Environment, Mock, NewSession, Secret, ToolUse};
use sandbox_runner_tests::daemon::{Daemon, Options};
use sandbox_runner_tests::launcher::RUNNER_UID;
use sandbox_runner_tests::runner::{Finished, binary, finish};
use sandbox_runner_tests::{host, needs_root};
use serde_json::{Value, json};

/// A daemon that has a queue and nothing else.
struct Site {
    daemon: Daemon,
    mock: Mock,
    environment: Environment,
}

impl Site {
    /// Nothing of it runs yet.
    async fn install() -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("test").expect("an environment");
        let daemon = Daemon::install(Options::default()).await;
        let site = Self { daemon, mock, environment };
        let written = fs::read_to_string(site.daemon.config()).expect("the configuration");
        let rest = &written[written.find("[runner]").expect("a section")..];
        let queue = format!(
            "[[claude]]\nenvironment_id = {:?}\nkey_file = {:?}\nbase_url = {:?}\nallow_plain_http = true\n\
             max_idle_seconds = 1\n\n",
            site.environment.id,
            site.key_file(),
            site.mock.base_url(),
        );
        fs::write(site.daemon.config(), format!("{queue}{rest}")).expect("the configuration");
        site.write_key(&site.environment.keys[0]);
        site
    }

    async fn start(mut self) -> Self {
        self.daemon.start_launcher().await;
        self.daemon.tend_runner();
        self
    }

    fn key_file(&self) -> PathBuf {
        self.daemon.config().with_file_name("claude.key")
    }

    fn write_key(&self, key: &str) {
        fs::write(self.key_file(), format!("{key}\n")).expect("the key");
        chown(self.key_file(), Some(RUNNER_UID), Some(RUNNER_UID)).expect("chown of the key");
        fs::set_permissions(self.key_file(), Permissions::from_mode(0o600)).expect("chmod of the key");
    }

    fn reload(&self) {
        let pid = self.daemon.runner_pid().expect("a runner");
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGHUP).expect("own child");
    }

    fn session(&self) -> String {
        self.mock.lock().create_session(&self.environment.id, NewSession::default()).expect("a session")
    }

    async fn bash(&self, session: &str, command: &str) -> String {
        let id = self.mock.lock().call_tools(session, vec![ToolUse::bash(command)]).remove(0);
        self.mock.result_of(session, &id).await.text()
    }

    /// One of `status`, `ps` and `inspect`.
    fn view(&self, arguments: &[&str]) -> Finished {
        let [_, run] = self.daemon.directories();
        let mut command = Command::new(binary());
        command.args(arguments).arg("--socket").arg(run.join("admin.sock"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command, Duration::from_secs(60)).expect("it ends")
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<_> = arguments.iter().copied().chain(["--json"]).collect();
        let shown = self.view(&arguments);
        serde_json::from_slice(&shown.stdout).unwrap_or_else(|_| panic!("{} {}", shown.text(), shown.errors()))
    }

    /// `doctor` with this configuration; `variables` are those of its environment.
    fn doctor(&self, json: bool, variables: &[(&str, &str)]) -> Finished {
        let state = sandbox_runner_tests::rootfs::shared_directory("doctor");
        let mut command = Command::new(binary());
        command.arg("doctor").arg("--config").arg(self.daemon.config()).arg("--state-dir").arg(state.path());
        command.args(json.then_some("--json")).envs(variables.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        finish(command, Duration::from_secs(60)).expect("it ends")
    }

    /// A figure of the queue, once there is one.
    async fn figure(&self, name: &str, labels: &str) -> u64 {
        let name = format!("{name}{{environment=\"{}\"{labels}}}", self.environment.id);
        for _ in 0..500 {
            let status = self.json(&["status"]);
            if let Some(value) = status["numbers"][&name].as_u64() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{name} is never shown: {}", self.json(&["status"]));
    }

    fn polls(&self) -> usize {
        self.mock.requests(Endpoint::Poll).len()
    }

    fn end(mut self) {
        self.daemon.end_with_nothing_left();
        let (breaches, log) = (self.mock.lock().breaches.clone(), self.daemon.log());
        assert!(breaches.is_empty(), "{breaches:?}\n{log}");
        for key in &self.environment.keys {
            assert!(!log.contains(key), "a key is in the log");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_key_is_told_once_in_a_while_and_a_new_one_serves_at_once() {
    needs_root!();
    let _host = host::shared();
    let site = Site::install().await;
    let key = site.mock.lock().rotate_environment_key(&site.environment.id);
    let mut site = site.start().await;

    site.daemon.said("the key has expired, was revoked or is mistyped").await;
    let (session, polls) = (site.session(), site.polls());
    let status = site.json(&["status"]);
    let problem = status["queues"][0]["problem"].as_str().unwrap_or_default().to_owned();
    assert!(problem.contains("401") && problem.contains("send SIGHUP"), "{status}");
    assert!(site.view(&["status"]).text().contains("ALARM        env_"), "no alarm");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(site.polls(), polls, "it asks again at once");
    assert!(site.daemon.runner_is_alive(), "{}", site.daemon.end_of_log());

    site.write_key(&key);
    site.reload();

    assert_eq!(site.bash(&session, "echo hi").await, "hi");
    assert_eq!(site.json(&["status"])["queues"][0]["problem"], "");
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_of_another_environment_is_told_apart_by_log_and_doctor() {
    needs_root!();
    let _host = host::shared();
    let site = Site::install().await;
    let other = site.mock.lock().create_environment("other").expect("an environment");
    site.write_key(&other.keys[0]);
    let site = site.start().await;
    site.daemon.said("the key is good, but for another environment").await;
    let doctor = site.doctor(false, &[]);
    assert_eq!(doctor.code(), 1, "{}", doctor.errors());
    assert!(doctor.text().contains("403 (permission_error); the key is good, but for another"), "{}", doctor.text());
    assert!(!site.daemon.log().contains(&other.keys[0]));
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_of_another_environment_is_not_taken_and_told() {
    needs_root!();
    let _host = host::shared();
    let site = Site::install().await;
    site.mock.lock().settings.delivered_as = Some("env_other".to_owned());
    let session = site.session();
    let site = site.start().await;
    site.daemon.said("has delivered an item of another environment").await;
    let work = site.mock.lock().live_item(&session).expect("a work item").id.clone();
    assert_eq!(site.mock.requests(Endpoint::Ack).len() + site.mock.requests(Endpoint::Stop).len(), 0);
    assert_eq!(site.mock.lock().item(&work).state.name(), "queued");

    site.mock.lock().settings.delivered_as = None;
    site.reload();
    assert_eq!(site.bash(&session, "echo hi").await, "hi");
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_items_and_figures_of_the_queue_are_shown() {
    needs_root!();
    let _host = host::shared();
    let site = Site::install().await.start().await;
    let session = site.session();
    assert_eq!(site.bash(&session, "echo hi").await, "hi");
    let work = site.mock.lock().live_item(&session).expect("a work item").id.clone();
    let core = format!("claude:{}:{session}", site.environment.id);

    let ps = site.view(&["ps"]).text();
    assert!(ps.contains(&work) && ps.contains("serving") && ps.contains(" s left"), "{ps}");
    let item = site.json(&["ps"])[0]["work_items"][0].clone();
    assert_eq!(item["server_session_id"], json!(session));
    assert_eq!(
        (&item["work_id"], &item["session_id"], &item["state"]),
        (&json!(work), &json!(core), &json!("serving"))
    );
    assert!(item["lease_left_seconds"].as_f64().is_some_and(|left| left > 100.0 && left <= 300.0), "{item}");
    for target in [["--work", work.as_str()], ["--session", core.as_str()]] {
        let shown = site.json(&["inspect", target[0], target[1]]);
        let seen = (&shown["work_items"][0]["work_id"], &shown["session_id"]);
        assert_eq!(seen, (&json!(work), &json!(core)), "{target:?}");
    }
    let unknown = site.view(&["inspect", "--work", "work_none"]);
    assert!(
        unknown.code() == 1 && unknown.errors().contains("work item work_none is not known here"),
        "{}",
        unknown.errors()
    );

    // The server has a result a moment before the runner knows that it has.
    assert_eq!(site.figure("claude_results_total", ",result=\"posted\"").await, 1);
    for (name, labels) in [
        ("claude_items", ",state=\"serving\""),
        ("claude_acks_total", ",result=\"taken\""),
        ("claude_polls_total", ",result=\"item\""),
    ] {
        assert_eq!(site.figure(name, labels).await, 1, "{name}");
    }
    let left = site.figure("claude_lease_left_milliseconds", "").await;
    assert!((100_000..=300_000).contains(&left), "{left}");
    for name in ["claude_ack_milliseconds_total", "claude_result_milliseconds_total"] {
        assert!(site.figure(name, "").await < 60_000, "{name}");
    }
    site.mock.lock().end_turn(&session, json!({"type": "end_turn"}));
    site.mock.stopped(&session).await;
    assert_eq!(site.figure("claude_items_ended_total", ",reason=\"idle\"").await, 1);
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn doctor_says_what_waits_and_what_keeps_a_queue_from_being_served() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::install().await;
    // Its socket says whom the runner runs as.
    site.daemon.start_launcher().await;
    site.session();
    site.mock.lock().enqueue(&site.environment.id, "healthcheck", "check_1", Secret::Missing);
    let found = |doctor: &Finished| {
        let shown: Value = serde_json::from_slice(&doctor.stdout).expect("JSON");
        shown["queues"].clone()
    };

    let good = site.doctor(true, &[]);
    let queue = found(&good)[0].clone();
    assert_eq!(good.code(), 0, "{queue} {}", good.errors());
    assert_eq!((&queue["depth"], &queue["pending"], &queue["problems"]), (&json!(2), &json!(0), &json!([])));
    assert!(queue["oldest_queued_at"].is_string() && queue["answered_seconds"].is_number(), "{queue}");
    assert!(
        queue["key"].as_str().is_some_and(|key| key.contains(&format!("mode 600, owner {RUNNER_UID}:"))),
        "{queue}"
    );
    let text = site.doctor(false, &[]).text();
    assert!(text.contains("waiting    2 queued, 0 delivered and not acknowledged, the oldest since 2026-"), "{text}");

    let with_problem = |site: &Site, variables: &[(&str, &str)], expected: &str| {
        let doctor = site.doctor(true, variables);
        let queues = found(&doctor).to_string();
        assert!(doctor.code() == 1 && queues.contains(expected), "{expected} not in {queues} {}", doctor.errors());
        assert!(!queues.contains(&site.environment.keys[0]), "the key is shown");
    };
    site.mock.lock().settings.date = Some("Fri, 27 Nov 2020 06:19:51 GMT".to_owned());
    with_problem(&site, &[], "s ahead of that of the server");
    site.mock.lock().settings.date = None;
    site.mock.lock().environments[0].archived_at = Some("2026-01-01T00:00:00Z".to_owned());
    with_problem(&site, &[], "404 (not_found_error); the server does not know this environment");
    site.mock.lock().environments[0].archived_at = None;
    chown(site.key_file(), Some(0), Some(0)).expect("chown of the key");
    with_problem(&site, &[], "cannot read the key file: chown it");
    chown(site.key_file(), Some(RUNNER_UID), None).expect("chown of the key");

    // What `worker run` would be given, beside what is configured.
    let base_url = site.mock.base_url();
    let given = |key: &'static str| {
        [
            ("ANTHROPIC_ENVIRONMENT_ID", site.environment.id.as_str()),
            ("ANTHROPIC_BASE_URL", base_url.as_str()),
            ("ANTHROPIC_ENVIRONMENT_KEY", key),
        ]
    };
    with_problem(&site, &given("sk-ant-oat01-unknown"), "has expired, was revoked or is mistyped");
    with_problem(&site, &given(""), "ANTHROPIC_ENVIRONMENT_KEY is not set");
    let mut elsewhere = given("sk-ant-oat01-unknown").to_vec();
    elsewhere.push(("ANTHROPIC_WORKSPACE_ID", "a b"));
    with_problem(&site, &elsewhere, "ANTHROPIC_WORKSPACE_ID \\\"a b\\\" is not the id of a workspace");
    elsewhere.pop();
    elsewhere.push(("ANTHROPIC_WORKSPACE_ID", "wrkspc_1"));
    site.doctor(true, &elsewhere);
    let written = fs::read_to_string(site.daemon.config()).expect("the configuration");
    let named = written.replace("max_idle_seconds = 1\n", "max_idle_seconds = 1\nworkspace_id = \"wrkspc_2\"\n");
    fs::write(site.daemon.config(), named).expect("the configuration");
    site.doctor(true, &[]);
    let asked = site.mock.requests(Endpoint::Stats);
    let workspaces: Vec<_> =
        asked.iter().filter_map(|request| request.incoming.header("anthropic-workspace-id")).collect();
    assert_eq!(workspaces, ["wrkspc_1", "wrkspc_2"]);
    site.mock.halt().await;
    with_problem(&site, &[], "look at name resolution");
    assert_eq!(site.polls(), 0, "it has claimed something");
    site.end();
}
