//! Leases over the death and the replacement of a runner.

use sandbox_runner_tests::claude::{Credential, Endpoint, ToolUse, WorkState, ours};
use sandbox_runner_tests::{host, needs_root};

use super::{Site, runs, wait_until};

/// Nobody waits for the lease to run out, whose text of the last heartbeat the next runner has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn next_runner_takes_the_leases_up_where_the_last_one_was_killed_or_has_left() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::start_with("parallel_threads = true\n").await;
    let session = site.session();
    assert_eq!(site.text(&session, ToolUse::bash("KEPT=yes")).await, "(no output)");
    for is_killed in [true, false] {
        let command = "echo ran >> /workspace/count; while [ ! -e /workspace/go ]; do sleep 0.05; done; rm /workspace/go; echo $KEPT";
        let call = site.use_tools(&session, vec![ToolUse::bash(command)]).remove(0);
        let runs = if is_killed { 1 } else { 2 };
        wait_until("the command runs", || ours::read(&site.daemon, "count").lines().count() == runs).await;
        if is_killed {
            site.daemon.kill_runner();
        } else {
            site.daemon.leave_runner();
        }
        site.daemon.tend_runner();
        let thread = site.mock.lock().spawn_thread(&session, "another");
        let go = ToolUse::new("write", serde_json::json!({"file_path": "go", "content": ""})).in_thread(&thread);
        site.text(&session, go).await;
        assert_eq!(site.mock.result_of(&session, &call).await.text(), "yes", "{is_killed}");
    }
    let work = site.mock.lock().live_item(&session).expect("a work item").clone();
    assert_eq!((work.generation, work.deliveries), (0, 1), "the lease ran out, or the item was delivered again");
    assert_eq!(site.text(&session, ToolUse::bash("cat /workspace/count")).await, "ran\nran");

    // Its token was in the memory of the first runner, and nowhere else.
    let beats = site.mock.requests(Endpoint::Heartbeat);
    assert!(beats.iter().any(|beat| matches!(beat.credential, Credential::SessionsToken { .. })));
    assert!(beats.iter().any(|beat| matches!(beat.credential, Credential::EnvironmentKey(_))));
    let tokens: Vec<_> = site.mock.lock().tokens.iter().map(|token| token.value.clone()).collect();
    let [state, _] = site.daemon.directories();
    for path in host::files_below(&state) {
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap_or_default()).into_owned();
        assert!(!tokens.iter().any(|token| text.contains(token)), "a credential is in {}", path.display());
    }
    site.end();
}

/// The heartbeat that the server has taken and the runner has not heard of: the text is not known, so nobody can go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_that_has_run_out_while_no_runner_was_there_is_left_and_the_item_served_when_it_comes_again() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::start().await;
    let session = site.session();
    assert_eq!(site.text(&session, ToolUse::bash("echo hi")).await, "hi");
    let work = site.mock.lock().live_item(&session).expect("a work item").id.clone();
    let call =
        site.use_tools(&session, vec![ToolUse::bash("sleep 1.375; echo once | tee -a /workspace/count")]).remove(0);
    wait_until("the command runs", || runs("1.375")).await;
    site.daemon.kill_runner();

    site.mock.lock().lapse(&work);
    site.daemon.tend_runner();

    assert_eq!(site.mock.result_of(&session, &call).await.text(), "once");
    assert_eq!(site.text(&session, ToolUse::bash("cat /workspace/count")).await, "once");
    assert_eq!(site.mock.requests(Endpoint::Stop).len(), 0, "what is not ours is not given back");
    site.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_that_was_stopped_while_no_runner_was_there_is_given_back_and_its_command_ended() {
    needs_root!();
    let _host = host::shared();
    let mut site = Site::start().await;
    let session = site.session();
    site.use_tools(&session, vec![ToolUse::bash("sleep 623.5")]);
    wait_until("the command runs", || runs("623.5")).await;
    let work = site.mock.lock().live_item(&session).expect("a work item").id.clone();
    site.daemon.kill_runner();

    site.mock.lock().stop(&site.environment.id, &work, false, &Credential::ApiKey).expect("it can be stopped");
    site.daemon.tend_runner();

    site.mock.stopped(&session).await;
    assert_eq!(site.mock.lock().item(&work).state, WorkState::Stopped);
    wait_until("the command is ended", || !runs("623.5")).await;
    site.end();
}
