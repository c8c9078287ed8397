//! A tool call below a script hunts for credentials. The script was handed all of them: in its environment, on its standard
//! input and in a file.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use sandbox_runner_tests::claude::hunt::{HUNT, PLANT, assert_only_planted, found};
use sandbox_runner_tests::claude::{Secret, ToolUse};
use sandbox_runner_tests::runner::Caller;
use sandbox_runner_tests::{host, needs_root, skip};
use serde_json::json;

use super::poller::{Poller, text};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tool_call_that_hunts_for_credentials_of_the_script_finds_none() {
    needs_root!();
    let _host = host::shared();
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            skip!("{obstacle}");
        }
        let poller = Poller::new(caller, 300).await;
        let session = poller.session(Secret::Token);
        let item = poller.claim().await;
        // As a script would keep a secret for later: beside it, in a file that the caller may read.
        let file = poller.path("state").join("secret");
        fs::write(&file, poller.key()).expect("a file");
        fs::set_permissions(&file, Permissions::from_mode(0o644)).expect("chmod of it");
        let script = poller.hand_on(&item);
        assert_eq!(poller.result(&session, ToolUse::bash(PLANT)).await.text(), "(no output)");
        let hunter = json!({"file_path": "hunt.sh", "content": HUNT});
        assert!(!poller.result(&session, ToolUse::new("write", hunter)).await.is_error);

        let home = poller.home.path().display();
        for command in [format!("bash /workspace/hunt.sh {home} /proc/{}", script.child.id()), ". hunt.sh".to_owned()] {
            let hunt = poller.result(&session, ToolUse::bash(&command)).await.text();
            assert_only_planted(&hunt);
        }
        for path in ["/proc/1/environ", "/proc/self/environ", &file.display().to_string()] {
            let read = poller.result(&session, ToolUse::new("read", json!({"file_path": path}))).await;
            assert!(read.is_error, "{path}: {read:?}");
        }

        // The same hunt where they are.
        let pid = script.child.id().to_string();
        let outside = Command::new("bash")
            .args(["-c", HUNT, "hunt"])
            .arg(&file)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("PIDS", &pid)
            .env("PLACES", poller.path("state"))
            .output()
            .expect("a shell");
        let found = found(&String::from_utf8_lossy(&outside.stdout));
        let token = poller.mock.lock().tokens.last().expect("a token").value.clone();
        for (place, secret) in [
            (format!("file {}", file.display()), poller.key()),
            (format!("environment of {pid}"), poller.key()),
            (format!("memory of {pid}"), &token),
        ] {
            let has = found.iter().any(|(found, other)| *found == place && other == secret);
            assert!(has, "the control finds nothing in {place}: {found:?}");
        }
        fs::remove_file(&file).expect("it is there");
        poller.end_turn(&session);
        script.ends_with(0);
        assert_eq!(text(&item["type"]), "work");
        poller.end();
    }
}
