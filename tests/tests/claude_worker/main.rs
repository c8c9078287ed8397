//! `sandbox-runner worker run` below a poller that hands work items on, as `ant beta:worker poll --on-work SCRIPT` does: the
//! real command in real sandboxes, and a control plane that notices what a worker must not do.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

mod credentials;
mod poller;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use sandbox_runner_tests::claude::{Credential, Endpoint, Secret, ToolUse, WorkState};
use sandbox_runner_tests::runner::{Caller, scaled};
use sandbox_runner_tests::{host, needs_root};
use serde_json::{Value, json};

use poller::{PATIENCE, Poller, has, text};

async fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + scaled(PATIENCE);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Whether a command with this text in its arguments runs anywhere.
fn runs(text: &str) -> bool {
    host::pids().any(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| has(&line, text)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_is_served_and_given_back_and_its_credentials_reach_no_child() {
    needs_root!();
    let _host = host::shared();
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let poller = Poller::new(caller, 300).await;
        let session = poller.session(Secret::Token);
        let item = poller.claim().await;
        let script = poller.hand_on(&item);

        assert_eq!(poller.result(&session, ToolUse::bash("echo hi; echo $USER > f")).await.text(), "hi");
        let write = ToolUse::new("write", json!({"file_path": "a.txt", "content": "x"}));
        assert_eq!(poller.result(&session, write).await.text(), "wrote 1 bytes to a.txt");
        let children = host::family_of(script.child.id()).into_iter().filter(|pid| *pid != script.child.id());
        let environments: Vec<_> = children.filter_map(|pid| fs::read(format!("/proc/{pid}/environ")).ok()).collect();
        assert!(environments.len() > 1, "the launcher and process 1 at least");
        for secret in poller.secrets().into_iter().chain(item["secret"].as_str().map(ToOwned::to_owned)) {
            assert!(!environments.iter().any(|environment| has(environment, &secret)), "a child has a credential");
        }
        let variables = poller.result(&session, ToolUse::bash("env; cat /proc/*/environ")).await.text();
        assert!(!variables.contains("ANTHROPIC"), "{variables}");
        poller.end_turn(&session);

        script.ends_with(0);
        assert_eq!(poller.state(&item), WorkState::Stopped, "it was given back before the script returned");
        let (polls, acks) = (poller.mock.requests(Endpoint::Poll), poller.mock.requests(Endpoint::Ack));
        assert!(
            polls.iter().all(|poll| poll.incoming.header("anthropic-worker-id").is_none()),
            "the worker has polled"
        );
        assert_eq!(acks.len(), 1, "what the poller has acknowledged was acknowledged again");
        let with_key = |endpoint| {
            let requests = poller.mock.requests(endpoint);
            requests.iter().any(|request| matches!(request.credential, Credential::EnvironmentKey(_)))
        };
        for endpoint in [Endpoint::Heartbeat, Endpoint::SendEvents, Endpoint::StreamEvents, Endpoint::Stop] {
            assert!(!with_key(endpoint), "{endpoint:?} was asked with the key of the environment");
        }
        assert_eq!(poller.journals(), Vec::<PathBuf>::new(), "the server has everything, and the journal is kept");
        poller.end();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_that_was_not_acknowledged_is_acknowledged_and_served() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 300).await;
    let session = poller.session(Secret::Token);
    let item = poller.poll().await;
    // The item alone: no variable but the address.
    let script = poller.start(Some(&item), &[], |_| None);
    assert_eq!(poller.result(&session, ToolUse::bash("echo hi")).await.text(), "hi");
    assert_eq!(poller.mock.requests(Endpoint::Ack).len(), 1);
    poller.end_turn(&session);
    script.ends_with(0);
    poller.end();
}

/// Without it nothing is sent, and no server has to know it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workspace_that_is_given_is_named_in_every_request() {
    needs_root!();
    let _host = host::shared();
    for (flags, variable, expected) in [
        (vec![], None, None),
        (vec![], Some("wrkspc_1"), Some("wrkspc_1")),
        (vec!["--workspace-id", "wrkspc_2"], Some("wrkspc_1"), Some("wrkspc_2")),
    ] {
        let poller = Poller::new(Caller::Root, 300).await;
        let session = poller.session(Secret::Token);
        let item = poller.claim().await;
        let before = poller.mock.lock().record.len();
        let script = poller.start(Some(&item), &flags, |name| match name {
            "ANTHROPIC_WORKSPACE_ID" => variable.map(ToOwned::to_owned),
            _ => None,
        });
        assert_eq!(poller.result(&session, ToolUse::bash("echo hi")).await.text(), "hi");
        poller.end_turn(&session);
        script.ends_with(0);
        let record = poller.mock.lock().record[before..].to_vec();
        assert!(record.len() > 4, "heartbeat, session, stream, history and result at least");
        let named = record.iter().map(|request| request.incoming.header("anthropic-workspace-id"));
        assert!(named.into_iter().all(|named| named == expected), "{flags:?}, {variable:?}");
        poller.end();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secret_that_is_no_base64_gives_way_to_the_key_of_the_environment() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 300).await;
    let session = poller.session(Secret::NotBase64);
    let item = poller.claim().await;
    let script = poller.hand_on(&item);
    assert_eq!(poller.result(&session, ToolUse::bash("echo hi")).await.text(), "hi");
    poller.end_turn(&session);
    let log = script.ends_with(0);
    assert!(log.contains("holds no sessions token"), "{log}");
    poller.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_lease_ends_the_command_posts_nothing_and_is_told_by_the_exit_code() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 4).await;
    let session = poller.session(Secret::Token);
    let item = poller.claim().await;
    let script = poller.hand_on(&item);
    poller.use_tool(&session, ToolUse::bash("sleep 621.5"));
    wait_until("the command runs", || runs("621.5")).await;
    let posts = poller.posts();

    poller.mock.lock().take_lease_away(&text(&item["id"]));

    let log = script.ends_with(1);
    assert!(log.contains("its lease was lost"), "{log}");
    assert!(!runs("621.5"));
    assert_eq!((poller.posts(), poller.mock.requests(Endpoint::Stop).len()), (posts, 0));
    poller.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_that_is_asked_to_stop_is_answered_with_an_error_and_given_back() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 4).await;
    let session = poller.session(Secret::Token);
    let item = poller.claim().await;
    let script = poller.hand_on(&item);
    let call = poller.use_tool(&session, ToolUse::bash("sleep 622.5"));
    wait_until("the command runs", || runs("622.5")).await;

    let stopped = poller.mock.lock().stop(&poller.environment.id, &text(&item["id"]), false, &Credential::ApiKey);
    stopped.expect("it can be stopped");

    script.ends_with(0);
    assert!(poller.mock.result_of(&session, &call).await.is_error);
    assert_eq!(poller.state(&item), WorkState::Stopped);
    poller.end();
}

/// The script of a poller that does not wait for its worker: the poller has posted its stop before the first heartbeat.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_that_is_taken_back_before_it_is_served_ends_the_worker_at_once() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 300).await;
    poller.session(Secret::Token);
    let item = poller.claim().await;
    let stopped = poller.mock.lock().stop(&poller.environment.id, &text(&item["id"]), false, &Credential::ApiKey);
    stopped.expect("it can be stopped");
    let log = poller.hand_on(&item).ends_with(0);
    assert!(log.contains("taken back before it was served"), "{log}");
    assert_eq!(poller.state(&item), WorkState::Stopped);
    poller.end();
}

/// A poller that ends sends SIGTERM, and SIGKILL half a minute later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_answers_what_runs_gives_the_item_back_and_leaves_nothing() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 300).await;
    let session = poller.session(Secret::Token);
    let item = poller.claim().await;
    let script = poller.hand_on(&item);
    let call = poller.use_tool(&session, ToolUse::bash("sleep 623.5"));
    wait_until("the command runs", || runs("623.5")).await;
    let begun = Instant::now();

    script.signal(Signal::SIGTERM);

    script.ends_with(0);
    assert!(begun.elapsed() < scaled(Duration::from_secs(30)), "it would have been killed");
    assert!(!runs("623.5"));
    let result = poller.mock.lock().session(&session).call(&call).result.clone();
    assert!(result.is_some_and(|result| result.is_error), "the call was not answered");
    assert_eq!(poller.state(&item), WorkState::Stopped);
    assert_eq!(poller.journals(), Vec::<PathBuf>::new());
    poller.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_of_a_killed_worker_does_not_run_again_with_the_next_one() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 4).await;
    let session = poller.session(Secret::Token);
    let item = poller.claim().await;
    let mut script = poller.hand_on(&item);
    let call = poller.use_tool(&session, ToolUse::bash("echo ran; sleep 624.5"));
    wait_until("the command runs", || runs("624.5")).await;
    script.child.kill().expect("own child");
    script.child.wait().expect("own child");
    assert_eq!(poller.journals().len(), 1, "what it has begun is written down");
    wait_until("its sandbox is gone with it", || !runs("624.5")).await;

    // The lease runs out, and the item is delivered again.
    let item = poller.claim().await;
    let script = poller.hand_on(&item);
    let result = poller.mock.result_of(&session, &call).await;
    assert!(result.is_error && result.text().contains("may have run, but how it ended is not known"), "{result:?}");
    assert!(!runs("624.5"), "it runs again");
    let next = poller.result(&session, ToolUse::bash("echo next")).await.text();
    assert!(next.starts_with("next\n[note: this call ran in a new sandbox"), "{next}");
    assert_eq!(poller.result(&session, ToolUse::bash("echo then")).await.text(), "then");
    poller.end_turn(&session);
    script.ends_with(0);
    assert_eq!(poller.journals(), Vec::<PathBuf>::new());
    poller.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credential_that_has_expired_ends_the_worker_with_what_to_do() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 300).await;
    poller.session(Secret::Missing);
    let item = poller.claim().await;
    let old = poller.hand_on(&item);
    poller.mock.lock().rotate_environment_key(&poller.environment.id);
    let log = old.ends_with(1);
    assert!(log.contains("401") && log.contains("has expired or was revoked"), "{log}");
    poller.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn isolation_below_the_floor_serves_nothing_and_leaves_nothing() {
    needs_root!();
    let _host = host::shared();
    if let Some(obstacle) = Caller::Nobody.obstacle() {
        sandbox_runner_tests::skip!("{obstacle}");
    }
    let poller = Poller::new(Caller::Nobody, 300).await;
    poller.session(Secret::Token);
    let item = poller.claim().await;
    let log = poller.start(Some(&item), &["--min-tier", "full"], |_| None).ends_with(77);
    assert!(log.contains("this host reaches tier rootless"), "{log}");
    assert_eq!(poller.mock.requests(Endpoint::Heartbeat).len(), 0);
    assert_eq!(poller.journals(), Vec::<PathBuf>::new());
    poller.end();
}

/// What is said of it, what is on standard input, flags, and variables beside those that name the item.
type BadInput<'c> = (&'c str, Option<Value>, Vec<&'c str>, Vec<(&'static str, &'static str)>);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_by_its_field_before_anything_is_asked() {
    needs_root!();
    let _host = host::shared();
    let poller = Poller::new(Caller::Root, 300).await;
    poller.session(Secret::Token);
    let item = poller.claim().await;
    let asked = poller.mock.lock().record.len();
    let changed = |change: fn(&mut Value)| {
        let mut item = item.clone();
        change(&mut item);
        Some(item)
    };
    let good = |name: &str| match name {
        "ANTHROPIC_ENVIRONMENT_ID" => Some(text(&item["environment_id"])),
        "ANTHROPIC_WORK_ID" => Some(text(&item["id"])),
        "ANTHROPIC_SESSION_ID" => Some(text(&item["data"]["id"])),
        _ => None,
    };
    let only = |given: Vec<(&'static str, &'static str)>| {
        move |name: &str| {
            given.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()).or_else(|| good(name))
        }
    };
    let key = ("ANTHROPIC_ENVIRONMENT_KEY", "sk-ant-oat01-hunter2");
    let cases: Vec<BadInput<'_>> = vec![
        ("--session-id: \"..x\" is no id", None, vec![], vec![key, ("ANTHROPIC_SESSION_ID", "../x")]),
        ("--work-id: \"ab\" is no id", None, vec!["--work-id", "a/b"], vec![key]),
        (
            "--session-id: \"ab\" is no id",
            changed(|item| item["data"]["id"] = json!("a/b")),
            vec![],
            vec![key, ("ANTHROPIC_SESSION_ID", "")],
        ),
        (
            "--environment-id is env_9, but the work item",
            Some(item.clone()),
            vec!["--environment-id", "env_9"],
            vec![key],
        ),
        ("the session is not known: set ANTHROPIC_SESSION_ID", None, vec![], vec![key, ("ANTHROPIC_SESSION_ID", "")]),
        ("no credential: set ANTHROPIC_WORK_SECRET", None, vec![], vec![]),
        ("holds no sessions token", None, vec![], vec![("ANTHROPIC_WORK_SECRET", "%%% hunter2 %%%")]),
        (
            "ANTHROPIC_ENVIRONMENT_KEY: is not one line",
            None,
            vec![],
            vec![("ANTHROPIC_ENVIRONMENT_KEY", "two hunter2")],
        ),
        ("standard input holds no work item", Some(json!(["hunter2"])), vec![], vec![key]),
        (
            "--base-url would send the key and every result unencrypted",
            None,
            vec!["--base-url", "http://10.1.2.3"],
            vec![key],
        ),
        ("--workspace-id \"a b\" is not the id of a workspace", None, vec!["--workspace-id", "a b"], vec![key]),
        ("unexpected argument '--frobnicate'", None, vec!["--frobnicate"], vec![key]),
        ("\"soon\" is not a duration", None, vec!["--max-idle", "soon"], vec![key]),
    ];
    for (expected, item, flags, given) in cases {
        let script = poller.start(item.as_ref(), &flags, only(given));
        let log = script.ends_with(2);
        assert!(log.contains(expected), "{expected} not in\n{log}");
        assert!(!log.contains("hunter2"), "a credential is shown:\n{log}");
        fs::remove_file(poller.path("log")).expect("the log");
    }
    assert_eq!(poller.mock.lock().record.len(), asked, "something was asked");
    assert_eq!(poller.journals(), Vec::<PathBuf>::new());
}
