//! Threads of one session: beside each other, on one filesystem and with one shell, and ended one by one.

use sandbox_runner_tests::claude::{Endpoint, ToolUse};
use sandbox_runner_tests::{host, needs_root};
use serde_json::json;

use super::{Site, runs, wait_until};

/// Were they served one after the other, the first would wait for ever for what the second writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_run_beside_each_other_and_each_result_goes_to_its_call() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start_with("parallel_threads = true\n").await;
    let session = site.session();
    let thread = site.mock.lock().spawn_thread(&session, "reviewer");
    let waits = "while [ ! -e /workspace/go ]; do sleep 0.05; done; cat /workspace/go";
    let ids = site.use_tools(
        &session,
        vec![
            ToolUse::bash(waits),
            ToolUse::new("read", json!({"file_path": "go"})),
            ToolUse::new("write", json!({"file_path": "go", "content": "of the thread"})).in_thread(&thread),
        ],
    );
    assert_eq!(site.mock.result_of(&session, &ids[2]).await.text(), "wrote 13 bytes to go");
    assert_eq!(site.mock.result_of(&session, &ids[0]).await.text(), "of the thread");
    assert_eq!(site.mock.result_of(&session, &ids[1]).await.text(), "of the thread");

    // The server knows the thread of a call, and takes no other word for it.
    let posted: Vec<_> = site.mock.requests(Endpoint::SendEvents).iter().map(|request| request.json()).collect();
    assert!(posted.iter().all(|body| body["events"][0].get("session_thread_id").is_none()), "{posted:?}");
    let results =
        site.mock.lock().session(&session).events("user.tool_result").into_iter().cloned().collect::<Vec<_>>();
    let of_thread = results.iter().find(|event| event["tool_use_id"] == ids[2].as_str()).expect("a result");
    assert_eq!(of_thread["session_thread_id"], thread.as_str());
    site.end();
}

/// As with the official worker: one shell for all threads of a session, one command at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_share_the_shell_and_its_directory_and_their_commands_wait_for_each_other() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start().await;
    let session = site.session();
    let thread = site.mock.lock().spawn_thread(&session, "reviewer");
    let ids = site.use_tools(
        &session,
        vec![
            ToolUse::bash("cd /tmp; A=5; sleep 0.5; echo first >> /workspace/order"),
            ToolUse::bash("echo $A in $PWD; echo second >> /workspace/order").in_thread(&thread),
        ],
    );
    assert_eq!(site.mock.result_of(&session, &ids[1]).await.text(), "5 in /tmp");
    assert_eq!(site.text(&session, ToolUse::bash("cat /workspace/order")).await, "first\nsecond");
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn end_of_a_thread_ends_its_command_and_nothing_is_posted_for_it() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start().await;
    let session = site.session();
    let thread = site.mock.lock().spawn_thread(&session, "reviewer");
    let of_thread = site.use_tools(
        &session,
        vec![ToolUse::bash("sleep 621.5").in_thread(&thread), ToolUse::bash("echo never").in_thread(&thread)],
    );
    wait_until("the command runs", || runs("621.5")).await;
    let own = site.use_tools(&session, vec![ToolUse::bash("echo own")]).remove(0);

    site.mock.lock().terminate_thread(&session, &thread);

    assert_eq!(site.mock.result_of(&session, &own).await.text(), "own");
    assert!(!runs("621.5"));
    let posted = site.mock.requests(Endpoint::SendEvents);
    let is_of_thread = |text: String| of_thread.iter().any(|id| text.contains(id.as_str()));
    assert!(!posted.iter().any(|request| is_of_thread(request.json().to_string())));
    site.end();
}

/// The session's own thread has a name as well, though its calls do not say it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupt_of_one_thread_ends_its_calls_and_leaves_those_of_the_others() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start().await;
    let session = site.session();
    site.mock.say(&session, "begin");
    let own = site.mock.lock().session(&session).threads[0].id.clone();
    let other = site.mock.lock().spawn_thread(&session, "reviewer");
    for (interrupted, left) in [(&other, None), (&own, Some(&other))] {
        let of = |tool_use: ToolUse, thread: Option<&String>| match thread {
            Some(thread) => tool_use.in_thread(thread),
            None => tool_use,
        };
        let first = if left.is_none() { Some(&other) } else { None };
        let sleeps = of(ToolUse::bash("echo part; sleep 622.5"), first);
        let waits = of(ToolUse::bash("echo still here"), left);
        let ids = site.use_tools(&session, vec![sleeps, waits]);
        wait_until("the command runs", || runs("622.5")).await;

        site.mock.interrupt(&session, Some(interrupted));

        let ended = site.mock.result_of(&session, &ids[0]).await;
        assert!(ended.is_error && ended.text().ends_with("interrupted by user"), "{ended:?}");
        assert!(!runs("622.5"));
        let went_on = site.mock.result_of(&session, &ids[1]).await;
        assert_eq!((went_on.text().as_str(), went_on.is_error), ("still here", false));
    }
    site.end();
}
