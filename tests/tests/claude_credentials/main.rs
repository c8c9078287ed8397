//! A tool call hunts for credentials: in its own environment, in every process that it sees, in their memory and descriptors,
//! in files and in its own spools. The same hunt on the host, by root, finds them.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::process::Command;

use sandbox_runner_tests::claude::hunt::{HUNT, PLANT, assert_only_planted, found};
use sandbox_runner_tests::claude::{Mock, NewSession, PostedResult, ToolUse, ours};
use sandbox_runner_tests::{host, needs_root};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tool_call_that_hunts_for_credentials_finds_what_was_planted_for_it_and_nothing_else() {
    needs_root!();
    let _host = host::shared();
    let mock = Mock::start().await;
    let environment = mock.lock().create_environment("test").expect("an environment");
    let mut daemon = ours::start(&mock, &environment).await;
    let session = mock.lock().create_session(&environment.id, NewSession::default()).expect("a session");
    let call = async |tool_use: ToolUse| -> PostedResult {
        let id = mock.lock().call_tools(&session, vec![tool_use]).remove(0);
        mock.result_of(&session, &id).await
    };
    assert_eq!(call(ToolUse::bash(PLANT)).await.text(), "(no output)");
    let script = json!({"file_path": "hunt.sh", "content": HUNT});
    assert!(!call(ToolUse::new("write", script)).await.is_error);

    // Where they are on the host, as if somebody had told it.
    let [state, run] = daemon.directories();
    let key = ours::key_file(&daemon, &environment);
    let places = format!("{} {} {} /etc/sandbox-runner", state.display(), run.display(), key.display());
    let inside = call(ToolUse::bash(&format!("bash /workspace/hunt.sh {places}"))).await.text();
    let other = call(ToolUse::bash(". /workspace/hunt.sh")).await.text();
    for hunt in [&inside, &other] {
        assert_only_planted(hunt);
    }
    for path in ["/proc/1/environ", "/proc/self/environ", "/etc/sandbox-runner/claude.key", &key.display().to_string()]
    {
        let read = call(ToolUse::new("read", json!({"file_path": path}))).await;
        assert!(read.is_error, "{path}: {read:?}");
        let search = call(ToolUse::new("grep", json!({"pattern": "sk-ant", "path": path}))).await;
        assert!(search.is_error, "{path}: {search:?}");
    }

    // The same hunt where they are.
    let runner = daemon.runner_pid().expect("a runner").to_string();
    let outside = Command::new("bash")
        .args(["-c", HUNT, "hunt"])
        .args([&state, &key])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("PIDS", &runner)
        .env("PLACES", &run)
        .output()
        .expect("a shell");
    let found = found(&String::from_utf8_lossy(&outside.stdout));
    let token = mock.lock().tokens.last().expect("a token").value.clone();
    let expected = [
        (format!("file {}", key.display()), &environment.keys[0]),
        (format!("memory of {runner}"), &environment.keys[0]),
        (format!("memory of {runner}"), &token),
    ];
    for (place, secret) in expected {
        let has = found.iter().any(|(found, other)| *found == place && other == secret);
        assert!(has, "the control finds nothing in {place}: {found:?}");
    }
    daemon.end_with_nothing_left();
}
