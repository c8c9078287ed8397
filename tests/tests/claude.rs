//! The built daemon on a work queue of Claude Managed Agents: real sandboxes, and a control plane that notices what a worker
//! must not do.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sandbox_runner_tests::claude::{
    ControlPlane, Credential, Endpoint, Environment, Fault, How, Mock, NewSession, PostedResult, Recorded, ToolUse,
    Verdict, WorkState, ours,
};
use sandbox_runner_tests::daemon::{Daemon, MARKER, Options, Workspace, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;
use serde_json::{Value, json};

/// What the first result of a new sandbox says where the session has run something before.
const NEW_SANDBOX: &str =
    "[note: this call ran in a new sandbox: files, processes and variables of earlier calls are not here]";

/// A daemon and the control plane that it serves.
struct Site {
    daemon: Daemon,
    mock: Mock,
    environment: Environment,
}

impl Site {
    /// Installs a daemon that has a queue, and nothing else unless `beside` says so. `ttl_seconds` is how long leases last.
    async fn install(ttl_seconds: u64, beside: bool) -> Self {
        let mock = Mock::start().await;
        mock.lock().settings.ttl_seconds = ttl_seconds;
        let environment = mock.lock().create_environment("test").expect("an environment");
        let daemon = ours::install(&mock, &environment, beside).await;
        Self { daemon, mock, environment }
    }

    async fn start(ttl_seconds: u64) -> Self {
        let mut site = Self::install(ttl_seconds, false).await;
        site.daemon.start_launcher().await;
        site.daemon.tend_runner();
        site
    }

    /// With these lines in the section of the queue, in place of a short idle time and nothing else.
    async fn start_with(lines: &str) -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("test").expect("an environment");
        let mut daemon = ours::install_with(&[(&mock, &environment)], false, Options::default(), lines).await;
        daemon.start_launcher().await;
        daemon.tend_runner();
        Self { daemon, mock, environment }
    }

    fn session(&self) -> String {
        self.mock.lock().create_session(&self.environment.id, NewSession::default()).expect("a session")
    }

    fn use_tool(&self, session: &str, tool_use: ToolUse) -> String {
        self.mock.lock().call_tools(session, vec![tool_use]).remove(0)
    }

    async fn result(&self, session: &str, tool_use: ToolUse) -> PostedResult {
        let id = self.use_tool(session, tool_use);
        self.mock.result_of(session, &id).await
    }

    async fn text(&self, session: &str, tool: &str, input: Value) -> (String, bool) {
        let result = self.result(session, ToolUse::new(tool, input)).await;
        (result.text(), result.is_error)
    }

    async fn bash(&self, session: &str, command: &str) -> String {
        self.result(session, ToolUse::bash(command)).await.text()
    }

    fn end_turn(&self, session: &str) {
        self.mock.lock().end_turn(session, json!({"type": "end_turn"}));
    }

    /// The work item that serves a session.
    fn work(&self, session: &str) -> String {
        self.mock.lock().live_item(session).expect("a work item").id.clone()
    }

    /// The sandbox of a session, which is told its name.
    async fn workspace(&self, session: &str) -> Workspace {
        // Sessions of two control planes have the same ids, and their ports differ.
        let name = format!("{session} of {}", self.mock.base_url());
        assert_eq!(self.bash(session, &format!("echo {name} > /workspace/{MARKER}")).await, "(no output)");
        Workspace::find(&name).expect("a sandbox with that marker")
    }

    fn results_posted(&self) -> usize {
        self.mock.requests(Endpoint::SendEvents).len()
    }

    fn assert_no_breach(&self) {
        let breaches = self.mock.lock().breaches.clone();
        assert!(breaches.is_empty(), "{breaches:?}\n{}", self.daemon.end_of_log());
    }

    fn end(mut self) {
        self.daemon.end_with_nothing_left();
        self.assert_no_breach();
        let log = self.daemon.log();
        let mut secrets = self.environment.keys.clone();
        secrets.extend(self.mock.lock().tokens.iter().map(|token| token.value.clone()));
        for secret in secrets {
            assert!(!log.contains(&secret), "a credential is in the log");
        }
    }
}

async fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + scaled(Duration::from_secs(60));
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether a command with this text in its arguments runs anywhere.
fn runs(text: &str) -> bool {
    let has = |pid: u32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.windows(text.len()).any(|w| w == text.as_bytes()))
    };
    host::pids().any(has)
}

/// A file below `directory` that holds this text.
fn file_with(directory: &Path, text: &str) -> Option<PathBuf> {
    let holds = |path: &PathBuf| fs::read(path).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(text));
    host::files_below(directory).into_iter().find(holds)
}

/// Nobody can know how far it came: that is what the model is told, and it may go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_whose_sandbox_is_killed_is_answered_as_one_that_may_have_run_and_the_session_goes_on() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(60).await;
    let session = site.session();
    let workspace = site.workspace(&session).await;
    let id = site.use_tool(&session, ToolUse::bash("echo begun; sleep 631.5"));
    wait_until("the command runs", || runs("631.5")).await;

    host::kill_now(workspace.process_1);

    let result = site.mock.result_of(&session, &id).await;
    let text = result.text();
    assert!(result.is_error && text.contains("may have run, but how it ended is not known"), "{text}");
    assert!(text.contains("its process 1 was killed by SIGKILL"), "{text}");
    assert!(!runs("631.5"), "it outlived its sandbox");
    assert_eq!(site.bash(&session, "ls /workspace; echo on").await, format!("on\n{NEW_SANDBOX}"));
    assert_eq!(site.bash(&session, "echo on").await, "on");
    site.end_turn(&session);
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_uses_all_tools_and_finds_its_workspace_in_the_next_work_item() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    let session = site.session();

    let write = json!({"file_path": "a/b.txt", "content": "l1\nl2\nl3\n"});
    assert_eq!(site.text(&session, "write", write).await, ("wrote 9 bytes to a/b.txt".to_owned(), false));
    let read = json!({"file_path": "a/b.txt", "view_range": [2, 2]});
    assert_eq!(site.text(&session, "read", read).await, ("l2".to_owned(), false));
    let edit = json!({"file_path": "a/b.txt", "old_string": "l2", "new_string": "L2"});
    assert_eq!(site.text(&session, "edit", edit).await, ("edited a/b.txt (1 replacement(s))".to_owned(), false));
    assert_eq!(site.text(&session, "glob", json!({"pattern": "**/*.txt"})).await.0, "/workspace/a/b.txt");
    assert_eq!(site.text(&session, "grep", json!({"pattern": "L2"})).await.0.trim_end(), "/workspace/a/b.txt:2:L2");
    let missing = ("read: nope: no such file or directory".to_owned(), true);
    assert_eq!(site.text(&session, "read", json!({"file_path": "nope"})).await, missing);
    assert_eq!(site.text(&session, "read", json!({})).await, ("read: file_path is required".to_owned(), true));
    assert_eq!(site.text(&session, "bash", json!({})).await, ("bash: command is required".to_owned(), true));
    let failed = site.text(&session, "bash", json!({"command": "echo hi; echo err >&2; false"})).await;
    assert_eq!(failed, ("hi\nerr\nexit code: 1".to_owned(), true));
    let late = site.text(&session, "bash", json!({"command": "echo part; sleep 60", "timeout_ms": 300})).await;
    assert!(late.1 && late.0.starts_with("part\nbash: command timed out after 300ms"), "{late:?}");
    assert_eq!(site.bash(&session, "cd /tmp; A=5").await, "(no output)");
    assert_eq!(site.bash(&session, "echo $A in $PWD").await, "5 in /tmp");

    let long = site.bash(&session, "head -c 150000 /dev/zero | tr '\\0' a").await;
    let (shown, note) = long.rsplit_once('\n').expect("a last line");
    assert!(shown.starts_with("[output truncated]\naaa") && shown.len() < 110_000, "{} bytes", shown.len());
    let path = note.strip_prefix("[all 150000 bytes of output are in ").and_then(|rest| rest.strip_suffix(']'));
    let path = path.unwrap_or_else(|| panic!("{note}"));
    assert_eq!(site.bash(&session, &format!("wc -c < {path}")).await.trim(), "150000");
    let magic = "cd /workspace; printf '\\x89PNG\\r\\n\\x1a\\n' > p.png; printf %%PDF-1.7 > d.pdf; cd /tmp";
    assert_eq!(site.bash(&session, magic).await, "(no output)");
    for (file, kind, media_type) in [("p.png", "image", "image/png"), ("d.pdf", "document", "application/pdf")] {
        let block = site.result(&session, ToolUse::new("read", json!({"file_path": file}))).await.content.remove(0);
        assert_eq!((&block["type"], &block["source"]["media_type"]), (&json!(kind), &json!(media_type)));
    }
    // Too large to travel with the end of a call: it is read back from the sandbox.
    let large = "cd /workspace; (cat p.png; head -c 299992 /dev/zero) > large.png; cd /tmp";
    assert_eq!(site.bash(&session, large).await, "(no output)");
    let large = site.result(&session, ToolUse::new("read", json!({"file_path": "large.png"}))).await.content.remove(0);
    assert_eq!(large["source"]["data"].as_str().map(str::len), Some(400_000));

    let variables = site.bash(&session, "env").await;
    for secret in site.environment.keys.iter().chain(site.mock.lock().tokens.iter().map(|token| &token.value)) {
        assert!(!variables.contains(secret.as_str()), "a credential is in the sandbox");
        let [state, _] = site.daemon.directories();
        assert_eq!(file_with(&state, secret), None, "a credential is in a file");
    }
    site.end_turn(&session);
    site.mock.stopped(&session).await;

    site.mock.say(&session, "go on");
    assert_eq!(site.bash(&session, "cat /workspace/a/b.txt; echo $A").await, "l1\nL2\nl3\n5");
    site.end_turn(&session);
    site.mock.stopped(&session).await;
    assert_eq!(site.mock.lock().work.len(), 2);
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bash_rows_of_the_toolset_hold_in_a_sandbox() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    let session = site.session();
    let command = |command: &str| json!({"command": command});
    for (input, text, is_error) in [
        (command("(exit 4)"), "exit code: 4", true),
        (
            json!({"command": "echo part; sleep 60", "timeout_ms": 1500}),
            "part\nbash: command timed out after 1500ms",
            true,
        ),
        (command("echo alive"), "alive", false),
        (command("exit 7"), "exit code: 7 (shell restarted)", true),
        (command("echo x"), "x", false),
        (command("exit 0"), "exit code: 0 (shell restarted)", true),
        (json!({"restart": true, "command": "echo r"}), "r", false),
        (json!({"restart": true}), "bash session restarted", false),
        (command("printf '\\033[31mred\\033[0m'"), "red", false),
        (command("cd /tmp && export A=5"), "(no output)", false),
        (command("pwd; echo $A"), "/tmp\n5", false),
    ] {
        assert_eq!(site.text(&session, "bash", input.clone()).await, (text.to_owned(), is_error), "{input}");
    }
    site.end_turn(&session);
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_that_was_spilled_can_be_read_and_searched_and_not_written() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    let session = site.session();

    let long = site.bash(&session, "seq 1 30000").await;

    let (_, note) = long.rsplit_once('\n').expect("a last line");
    let path = note.strip_suffix(']').and_then(|note| note.rsplit_once(' ')).unwrap_or_else(|| panic!("{note}")).1;
    let read = json!({"file_path": path, "view_range": [9, 10]});
    assert_eq!(site.text(&session, "read", read).await, ("9\n10".to_owned(), false));
    let found = site.text(&session, "grep", json!({"pattern": "^29999$", "path": path})).await;
    assert_eq!((found.0.trim_end(), found.1), ("29999:29999", false));
    for (tool, input) in [
        ("write", json!({"file_path": path, "content": "x"})),
        ("edit", json!({"file_path": path, "old_string": "29999", "new_string": "x"})),
    ] {
        let (text, is_error) = site.text(&session, tool, input).await;
        assert!(is_error && text.contains("is inside read-only directory"), "{tool}: {text}");
    }
    assert_eq!(site.bash(&session, &format!("tail -1 {path}")).await, "30000");
    site.end_turn(&session);
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workspace_of_a_session_that_stays_away_for_longer_than_configured_is_removed() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start_with("max_idle_seconds = 1\nkeep_seconds = 1\n").await;
    let session = site.session();
    assert_eq!(site.bash(&session, "echo kept > /workspace/file").await, "(no output)");
    site.end_turn(&session);
    site.mock.stopped(&session).await;

    wait_until("its sandbox is removed", || site.daemon.sandboxes().is_empty()).await;

    site.mock.say(&session, "go on");
    assert_eq!(site.bash(&session, "ls /workspace; echo anew").await, format!("anew\n{NEW_SANDBOX}"));
    assert_eq!(site.bash(&session, "echo again").await, "again");
    site.end_turn(&session);
    site.end();
}

/// F-02: a call that runs when its runner is killed runs once, and the next runner posts its result.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_of_a_killed_runner_runs_once_and_is_answered_by_the_next_one() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::start(300).await;
    let session = site.session();
    let workspace = site.workspace(&session).await;
    let running = site.use_tool(&session, ToolUse::bash("echo begun >> /workspace/count; sleep 3; echo over"));
    let waiting = site.use_tool(&session, ToolUse::bash("echo second >> /workspace/count; cat /workspace/count"));
    wait_until("the command begins", || workspace.read("count") == b"begun\n").await;

    site.daemon.kill_runner();
    site.daemon.tend_runner();

    assert_eq!(site.mock.result_of(&session, &running).await.text(), "over");
    assert_eq!(site.mock.result_of(&session, &waiting).await.text(), "begun\nsecond");
    assert!(workspace.lives(), "the sandbox is another one");
    let work = site.work(&session);
    assert_eq!(site.mock.lock().item(&work).generation, 0, "the next runner did not take the lease up");
    site.end();
}

/// A result that was written down and not posted when the runner was killed is posted by the next one, unrun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn result_that_was_not_posted_when_the_runner_was_killed_is_posted_by_the_next_one() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::start(4).await;
    let session = site.session();
    let workspace = site.workspace(&session).await;
    site.mock.lock().faults.push(Fault::times(Endpoint::SendEvents, 100, How::Status(503)));
    let call = site.use_tool(&session, ToolUse::bash("echo ran >> /workspace/count; echo kept"));
    let before = site.results_posted();
    wait_until("a post is tried", || site.results_posted() > before).await;

    site.daemon.kill_runner();
    site.mock.lock().faults.clear();
    site.daemon.tend_runner();

    assert_eq!(site.mock.result_of(&session, &call).await.text(), "kept");
    assert_eq!(workspace.read("count"), b"ran\n");
    site.end();
}

/// F-16: a lease that somebody else has: the command is ended, and nothing is posted or stopped any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_lease_ends_the_command_and_posts_nothing() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(8).await;
    let session = site.session();
    site.workspace(&session).await;
    site.use_tool(&session, ToolUse::bash("echo part; sleep 611.5"));
    wait_until("the command runs", || runs("611.5")).await;
    let (posted, work) = (site.results_posted(), site.work(&session));

    site.mock.lock().take_lease_away(&work);

    wait_until("the command is ended", || !runs("611.5")).await;
    let refused = |request: &Recorded| format!("{:?}", request.fate).contains("412");
    assert!(site.mock.requests(Endpoint::Heartbeat).iter().any(refused), "it ended for another reason");
    // Time enough for whatever might still come.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!((site.results_posted(), site.mock.requests(Endpoint::Stop).len()), (posted, 0));
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupt_ends_the_command_at_once_and_the_shell_goes_on() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    let session = site.session();
    assert_eq!(site.bash(&session, "KEPT=yes").await, "(no output)");
    let call = site.use_tool(&session, ToolUse::bash("echo part; sleep 612.5"));
    wait_until("the command runs", || runs("612.5")).await;

    site.mock.interrupt(&session, None);

    let result = site.mock.result_of(&session, &call).await;
    assert!(result.is_error && result.text().starts_with("part\n"), "{result:?}");
    assert!(result.text().ends_with("interrupted by user"), "{result:?}");
    assert!(!runs("612.5"));
    site.mock.say(&session, "again");
    assert_eq!(site.bash(&session, "echo $KEPT").await, "yes");
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_that_is_asked_to_stop_is_answered_with_an_error_and_then_stopped() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(4).await;
    let session = site.session();
    let call = site.use_tool(&session, ToolUse::bash("sleep 613.5"));
    wait_until("the command runs", || runs("613.5")).await;
    let work = site.work(&session);

    site.mock.lock().stop(&site.environment.id, &work, false, &Credential::ApiKey).expect("it can be stopped");

    assert!(site.mock.result_of(&session, &call).await.is_error);
    site.mock.stopped(&session).await;
    assert!(!runs("613.5"));
    let record = site.mock.lock().record.clone();
    let place = |endpoint| record.iter().rposition(|request| request.endpoint == Some(endpoint));
    assert!(place(Endpoint::SendEvents) < place(Endpoint::Stop), "it was stopped before it was answered");
    assert_eq!(site.mock.lock().item(&work).state, WorkState::Stopped);
    site.end();
}

/// Whoever deletes a session wants nothing of it any more: no result, and no workspace.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_is_deleted_or_terminated_is_ended_with_its_command_and_its_workspace_and_nothing_is_posted() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    for deleted in [true, false] {
        let session = site.session();
        site.workspace(&session).await;
        site.use_tool(&session, ToolUse::bash("echo part; sleep 614.5"));
        wait_until("the command runs", || runs("614.5")).await;
        let (posted, work) = (site.results_posted(), site.work(&session));

        let end = if deleted { ControlPlane::delete_session } else { ControlPlane::terminate_session };
        end(&mut site.mock.lock(), &session);

        wait_until("the command is ended", || !runs("614.5")).await;
        wait_until("its sandbox is removed", || site.daemon.sandboxes().is_empty()).await;
        wait_until("the item is given back", || site.mock.lock().item(&work).state == WorkState::Stopped).await;
        assert_eq!(site.results_posted(), posted);
    }
    let other = site.session();
    assert_eq!(site.bash(&other, "echo on").await, "on");
    site.end_turn(&other);
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_that_runs_out_of_memory_is_answered_with_the_limit_and_the_session_goes_on() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    let session = site.session();
    let workspace = site.workspace(&session).await;

    let result = site.result(&session, ToolUse::bash("echo part; head -c 2000000000 /dev/zero | tail")).await;

    let text = result.text();
    assert!(result.is_error && text.starts_with("part\n"), "{text}");
    assert!(text.contains("bash: out of memory: ") && text.contains(" at the memory limit of "), "{text}");
    assert_eq!(site.bash(&session, "cd /workspace; echo on").await, "on");
    assert!(workspace.lives(), "the sandbox is another one");
    site.end_turn(&session);
    site.end();
}

/// A supervisor that has asked for the end kills after some time: 45 s is what the contract gives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_that_runs_when_the_runner_is_told_to_end_is_ended_answered_and_its_item_given_back() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::start(300).await;
    let session = site.session();
    let short = site.session();
    let call = site.use_tool(&session, ToolUse::bash("echo part; sleep 615.5"));
    let finishes = site.use_tool(&short, ToolUse::bash("sleep 2; echo over"));
    wait_until("the command runs", || runs("615.5")).await;
    wait_until("the other one is begun", || site.daemon.sandboxes().len() == 2).await;

    // It waits for a minute, which is less than calls of an orchestrator may go on.
    let status = site.daemon.stop_runner();

    assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", site.daemon.end_of_log());
    let result = site.mock.result_of(&session, &call).await;
    assert!(result.is_error && result.text().starts_with("part\n"), "{result:?}");
    assert_eq!(site.mock.result_of(&short, &finishes).await.text(), "over", "it had time to finish");
    assert!(!runs("615.5"));
    for session in [&session, &short] {
        assert!(site.mock.lock().live_item(session).is_none(), "the item was not given back");
    }
    site.end();
}

/// Otherwise a person who does not decide keeps a place for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_that_waits_longer_than_configured_for_a_confirmation_is_given_back_and_its_call_runs_when_that_comes() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start_with("max_idle_seconds = 1\nmax_wait_seconds = 1\n").await;
    let session = site.session();
    assert_eq!(site.bash(&session, "echo kept > /workspace/file").await, "(no output)");
    let asked = site.use_tool(&session, ToolUse::bash("cat /workspace/file").permission(Some("ask")));

    site.mock.stopped(&session).await;
    assert_eq!(site.mock.lock().session(&session).waiting(), std::slice::from_ref(&asked));

    site.mock.confirm(&session, &asked, Verdict::Allow);
    assert_eq!(site.mock.result_of(&session, &asked).await.text(), "kept");
    site.end_turn(&session);
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_runs_without_permission_and_what_others_run_is_left_to_them() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    let session = site.session();
    let workspace = site.workspace(&session).await;
    let ask =
        |text: &str| ToolUse::bash(&format!("echo {text} >> /workspace/ran; echo {text}")).permission(Some("ask"));
    let allowed = site.use_tool(&session, ask("allowed"));
    let denied = site.use_tool(&session, ask("denied"));
    site.use_tool(&session, ToolUse::custom("get_order", json!({"order": 7})));
    site.use_tool(&session, ToolUse::new("nosuch", json!({})));
    assert_eq!(
        site.bash(&session, "cat /workspace/ran; echo none").await,
        "cat: /workspace/ran: No such file or directory\nnone"
    );

    site.mock.confirm(&session, &denied, Verdict::Deny);
    site.mock.confirm(&session, &allowed, Verdict::Allow);

    assert_eq!(site.mock.result_of(&session, &allowed).await.text(), "allowed");
    assert_eq!(workspace.read("ran"), b"allowed\n");
    let waiting = site.mock.lock().session(&session).waiting();
    assert_eq!(waiting.len(), 2, "the tools of others wait for them");
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_are_lost_and_streams_that_break_cost_nothing() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start(300).await;
    for (endpoint, how) in [
        (Endpoint::Poll, How::Status(500)),
        (Endpoint::Poll, How::LoseRequest),
        (Endpoint::Ack, How::LoseResponse),
        (Endpoint::StreamEvents, How::Status(503)),
        (Endpoint::ListEvents, How::CutBody(5)),
        (Endpoint::SendEvents, How::LoseResponse),
        (Endpoint::SendEvents, How::Status(429)),
    ] {
        site.mock.lock().faults.push(Fault::next(endpoint, how));
    }
    site.mock.lock().enqueue(
        &site.environment.id,
        "healthcheck",
        "check_1",
        sandbox_runner_tests::claude::Secret::Missing,
    );
    let session = site.session();
    let workspace = site.workspace(&session).await;
    for number in 0..5 {
        let text = site.bash(&session, &format!("echo {number} | tee -a /workspace/count")).await;
        assert_eq!(text, number.to_string());
    }
    assert_eq!(workspace.read("count"), b"0\n1\n2\n3\n4\n");
    let all_stopped = || site.mock.lock().work.iter().filter(|work| work.state == WorkState::Stopped).count() == 1;
    wait_until("the healthcheck is given back", all_stopped).await;
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_that_is_stopped_gives_its_items_back() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::start(300).await;
    let session = site.session();
    assert_eq!(site.bash(&session, "echo hi").await, "hi");
    let status = site.daemon.stop_runner();
    assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", site.daemon.end_of_log());
    assert!(site.mock.lock().live_item(&session).is_none(), "the item was not given back");
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queue_and_orchestrator_are_served_beside_each_other() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::install(300, true).await;
    site.daemon.start_launcher().await;
    site.daemon.start_runner().await;
    let theirs = site.daemon.session("theirs").await;
    let session = site.session();
    assert_eq!(site.bash(&session, "echo queue").await, "queue");
    let finished = within("theirs", theirs.bash("c1", "echo link")).await.expect("an end");
    assert_eq!(finished.streams[&1].bytes, b"link\n");

    site.daemon.wire.hold_what_goes_to_the_runner();
    assert_eq!(site.bash(&session, "echo still").await, "still");
    site.daemon.wire.release();

    within("close", theirs.close(Duration::ZERO)).await.expect("the session ends");
    site.end();
}
