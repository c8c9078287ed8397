//! Whoever hands work items on, and the script that it runs for each.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_runner_tests::claude::client::Client;
use sandbox_runner_tests::claude::{Endpoint, Environment, Mock, NewSession, PostedResult, Secret, ToolUse, WorkState};
use sandbox_runner_tests::daemon::small_sandboxes;
use sandbox_runner_tests::runner::{Caller, NOBODY, binary, scaled, wait};
use sandbox_runner_tests::{host, rootfs};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Nothing here takes longer on a machine that is not broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What `ant beta:worker poll --on-work` is: it polls, acknowledges, runs a script and posts a stop when that returns.
pub(crate) struct Poller {
    pub(crate) mock: Mock,
    pub(crate) environment: Environment,
    pub(crate) caller: Caller,
    pub(crate) ttl_seconds: u64,
    pub(crate) home: TempDir,
}

/// A script that runs.
pub(crate) struct Script {
    pub(crate) child: Child,
    pub(crate) log: PathBuf,
}

impl Poller {
    /// `ttl_seconds` is how long a heartbeat prolongs a lease.
    pub(crate) async fn new(caller: Caller, ttl_seconds: u64) -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("test").expect("an environment");
        let home = rootfs::shared_directory("worker");
        let poller = Self { mock, environment, caller, ttl_seconds, home };
        let config = format!(
            "[runner]\nid = \"worker\"\nmin_tier = \"none\"\n[pressure]\ndisk_low_bytes = 0\ndisk_critical_bytes = 0\n\
             memory_stall_percent = 0\nio_stall_percent = 0\n[limits]\n{}",
            small_sandboxes(),
        );
        fs::write(poller.path("config.toml"), config).expect("the configuration");
        let script = format!(
            "#!/bin/sh\nexec {} beta:worker run --state-dir {} \"$@\"\n",
            binary().display(),
            poller.path("state").display(),
        );
        fs::write(poller.path("on-work"), script).expect("the script");
        fs::set_permissions(poller.path("on-work"), Permissions::from_mode(0o755)).expect("chmod of the script");
        fs::create_dir(poller.path("state")).expect("a directory");
        if caller == Caller::Nobody {
            chown(poller.path("state"), Some(NOBODY), Some(NOBODY)).expect("chown as root");
        }
        poller
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub(crate) fn session(&self, secret: Secret) -> String {
        let new = NewSession { secret, ..NewSession::default() };
        self.mock.lock().create_session(&self.environment.id, new).expect("a session")
    }

    pub(crate) fn key(&self) -> &str {
        &self.environment.keys[0]
    }

    /// The next work item, as the poll brings it.
    pub(crate) async fn claim(&self) -> Value {
        let item = self.poll().await;
        // From the acknowledgement to the first heartbeat a worker must start, however slow this machine is.
        for work in self.mock.lock().work.iter_mut().filter(|work| json!(work.id) == item["id"]) {
            work.ttl_seconds = 300;
        }
        self.mock.lock().settings.ttl_seconds = self.ttl_seconds;
        let path = format!("/v1/environments/{}/work/{}/ack", self.environment.id, text(&item["id"]));
        let acked = self.client().post(&path, &Value::Null).await.expect("an answer");
        assert_eq!(acked.status, 200, "{:?}", acked.body);
        item
    }

    pub(crate) async fn poll(&self) -> Value {
        let path = format!("/v1/environments/{}/work/poll?block_ms=900", self.environment.id);
        let deadline = Instant::now() + scaled(PATIENCE);
        loop {
            let answer = self.client().get(&path).await.expect("an answer");
            assert_eq!(answer.status, 200, "{:?}", answer.body);
            if answer.body.is_object() {
                return answer.body;
            }
            assert!(Instant::now() < deadline, "no work item comes");
        }
    }

    pub(crate) fn client(&self) -> Client {
        Client::bearer(&self.mock, self.key())
    }

    /// Starts the script with the item on its standard input, and the variables that the poller sets.
    pub(crate) fn hand_on(&self, item: &Value) -> Script {
        self.start(Some(item), &[], |name| match name {
            "ANTHROPIC_ENVIRONMENT_KEY" => Some(self.key().to_owned()),
            "ANTHROPIC_ENVIRONMENT_ID" => Some(text(&item["environment_id"])),
            "ANTHROPIC_WORK_ID" => Some(text(&item["id"])),
            "ANTHROPIC_SESSION_ID" => Some(text(&item["data"]["id"])),
            _ => None,
        })
    }

    pub(crate) fn start(
        &self,
        item: Option<&Value>,
        flags: &[&str],
        variable: impl Fn(&str) -> Option<String>,
    ) -> Script {
        let log = self.path("log");
        let output = File::options().create(true).append(true).open(&log).expect("the log");
        let mut command = self.caller.command(&self.path("on-work"));
        // A flag that is given twice is a mistake of its own.
        let idle: &[&str] = if flags.contains(&"--max-idle") { &[] } else { &["--max-idle", "1s"] };
        command
            .args(idle)
            .args(flags)
            .env("RUNNER_CONFIG", self.path("config.toml"))
            .env("ANTHROPIC_BASE_URL", self.mock.base_url());
        for name in [
            "ANTHROPIC_ENVIRONMENT_KEY",
            "ANTHROPIC_ENVIRONMENT_ID",
            "ANTHROPIC_WORK_ID",
            "ANTHROPIC_SESSION_ID",
            "ANTHROPIC_WORK_SECRET",
            "ANTHROPIC_WORK_SECRET_FILE",
            "ANTHROPIC_WORKSPACE_ID",
        ] {
            match variable(name) {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let input = if item.is_some() { Stdio::piped() } else { Stdio::null() };
        command.stdin(input).stdout(output.try_clone().expect("the log")).stderr(output);
        let mut child = command.spawn().expect("the script starts");
        if let (Some(mut input), Some(item)) = (child.stdin.take(), item) {
            // Whoever refuses it may not have read it.
            let _ = input.write_all(item.to_string().as_bytes());
        }
        Script { child, log }
    }

    pub(crate) async fn result(&self, session: &str, tool_use: ToolUse) -> PostedResult {
        let id = self.use_tool(session, tool_use);
        self.mock.result_of(session, &id).await
    }

    pub(crate) fn use_tool(&self, session: &str, tool_use: ToolUse) -> String {
        self.mock.lock().call_tools(session, vec![tool_use]).remove(0)
    }

    pub(crate) fn end_turn(&self, session: &str) {
        self.mock.lock().end_turn(session, json!({"type": "end_turn"}));
    }

    pub(crate) fn state(&self, item: &Value) -> WorkState {
        self.mock.lock().item(&text(&item["id"])).state
    }

    pub(crate) fn posts(&self) -> usize {
        self.mock.requests(Endpoint::SendEvents).len()
    }

    /// Journals of sessions that are still there.
    pub(crate) fn journals(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("state").join("sessions")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// Nothing was done that a worker must not do, nothing is left, and no credential was told to anybody.
    pub(crate) fn end(self) {
        let breaches = self.mock.lock().breaches.clone();
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        assert!(breaches.is_empty(), "{breaches:?}\n{log}");
        for secret in self.secrets() {
            assert!(!log.contains(&secret), "a credential is in the log");
            let state = self.path("state");
            let holds = |path: &PathBuf| fs::read(path).is_ok_and(|bytes| has(&bytes, &secret));
            assert_eq!(host::files_below(&state).into_iter().find(holds), None, "a credential is in a file");
        }
        let left: Vec<_> = host::files_below(&self.path("state").join("run/sandboxes"));
        assert!(left.is_empty(), "{left:?} is left");
    }

    pub(crate) fn secrets(&self) -> Vec<String> {
        let tokens: Vec<_> = self.mock.lock().tokens.iter().map(|token| token.value.clone()).collect();
        self.environment.keys.iter().cloned().chain(tokens).collect()
    }
}

impl Script {
    pub(crate) fn ended(mut self) -> (ExitStatus, String) {
        let status = wait(&mut self.child, PATIENCE);
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        (status.unwrap_or_else(|| panic!("the script does not end:\n{log}")), log)
    }

    /// Asserts how it ends.
    pub(crate) fn ends_with(self, code: i32) -> String {
        let (status, log) = self.ended();
        assert_eq!(status.code(), Some(code), "{status:?}\n{log}");
        log
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("own child");
    }
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().expect("a text").to_owned()
}

pub(crate) fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}
