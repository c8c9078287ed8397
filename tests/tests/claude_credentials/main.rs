//! A tool call hunts for credentials: in its own environment, in every process that it sees, in their memory and descriptors,
//! in files and in its own spools. The same hunt on the host, by root, finds them.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::process::Command;

use sandbox_runner_tests::claude::{Mock, NewSession, PostedResult, ToolUse, ours};
use sandbox_runner_tests::{host, needs_root};
use serde_json::json;

const HUNT: &str = include_str!("hunt.sh");
/// What is planted in the sandbox begins so; the hunter must find that.
const CANARY: &str = "sk-ant-canary-";

/// What a hunt found, each with its place.
fn found(hunt: &str) -> Vec<(String, String)> {
    assert!(hunt.trim_end().ends_with("HUNTED to the end"), "the hunt did not end:\n{hunt}");
    let lines = hunt.lines().filter_map(|line| line.strip_prefix("FOUND "));
    let split = |line: &str| line.rsplit_once(": ").map(|(place, secret)| (place.to_owned(), secret.to_owned()));
    lines.filter_map(split).collect()
}

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
    let plant = "export PLANTED=$(printf 'sk-an%s' t-canary-memory); sleep 600 & \
                 printf 'sk-an%s' t-canary-file > .token; exec 9< .token";
    assert_eq!(call(ToolUse::bash(plant)).await.text(), "(no output)");
    let script = json!({"file_path": "hunt.sh", "content": HUNT});
    assert!(!call(ToolUse::new("write", script)).await.is_error);

    // Where they are on the host, as if somebody had told it.
    let [state, run] = daemon.directories();
    let key = ours::key_file(&daemon, &environment);
    let places = format!("{} {} {} /etc/sandbox-runner", state.display(), run.display(), key.display());
    let inside = call(ToolUse::bash(&format!("bash /workspace/hunt.sh {places}"))).await.text();
    let other = call(ToolUse::bash(". /workspace/hunt.sh")).await.text();
    for hunt in [&inside, &other] {
        let found = found(hunt);
        let planted =
            |place: &str| found.iter().any(|(found, secret)| found.starts_with(place) && secret.starts_with(CANARY));
        for place in ["environment of ", "memory of ", "descriptor ", "file /workspace/.token"] {
            assert!(planted(place), "the hunter is blind to {place}\n{hunt}");
        }
        let foreign: Vec<_> = found.iter().filter(|(_, secret)| !secret.starts_with(CANARY)).collect();
        assert!(foreign.is_empty(), "credentials are in the sandbox: {foreign:?}");
        assert!(hunt.contains("REFUSED memory of 1\n"), "process 1 let itself be read\n{hunt}");
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
