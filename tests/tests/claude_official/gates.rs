//! Calls that wait for a verdict, end with their thread, or are interrupted.

use std::time::Duration;

use sandbox_runner_tests::claude::{CallState, Endpoint, Fate, ToolUse, Verdict};
use sandbox_runner_tests::needs_official_sdk;
use serde_json::json;

use crate::world::{MAX_IDLE, Served, Whose, World};

pub(crate) async fn interrupt(world: &World<'_>) -> Served {
    let (session, ids) = world.calls(vec![ToolUse::bash("echo 1 > begun; sleep 2; echo done")]);
    world.file("begun").await;
    world.mock.interrupt(&session, None);
    world.mock.turn_over(&session).await;
    world.mock.stopped(&session).await;
    world.assert_no_breach();
    let idle = world.mock.lock().session(&session).events("session.status_idle").last().copied().cloned().unwrap();
    assert_eq!(idle["stop_reason"]["type"], "end_turn");
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interrupt_is_not_looked_at_and_the_turn_ends_with_the_call() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let served = interrupt(&world).await;
    assert_eq!(world.text(&served.session, &served.ids[0]).await, "done");
}

pub(crate) async fn verdicts(world: &World<'_>) -> Served {
    let mark = |name: &str, permission| ToolUse::bash(&format!("echo {name} >> log")).permission(Some(permission));
    let uses = vec![
        mark("allowed", "ask"),
        mark("refused", "ask"),
        mark("novel", "some_new_value"),
        mark("denied", "deny"),
        mark("free", "allow"),
        ToolUse::custom("lookup", json!({"order": 7})),
    ];
    let (session, ids) = world.calls(uses);
    world.mock.result_of(&session, &ids[4]).await;
    // Longer than the idle time: what waits for somebody keeps the worker.
    tokio::time::sleep(Duration::from_secs_f64(MAX_IDLE * 2.0)).await;
    world.mock.confirm(&session, &ids[1], Verdict::Deny);
    world.mock.confirm(&session, &ids[0], Verdict::Allow);
    world.mock.result_of(&session, &ids[0]).await;
    world.mock.confirm(&session, &ids[2], Verdict::Allow);
    world.mock.result_of(&session, &ids[2]).await;
    let effects = world.read("log");
    assert_eq!(effects, "free\nallowed\nnovel\n");
    assert_eq!(world.mock.lock().session(&session).waiting(), [ids[5].clone()], "the custom tool is another client's");
    world.assert_no_breach();
    Served { session, ids, effects, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gated_call_waits_for_its_verdict_and_a_denied_one_never_runs() {
    let python = needs_official_sdk!();
    verdicts(&World::new(Whose::Official(&python)).await).await;
}

pub(crate) async fn thread(world: &World<'_>) -> Served {
    let (session, ids) = world.calls(vec![ToolUse::bash("echo primary")]);
    world.mock.result_of(&session, &ids[0]).await;
    let thread = world.mock.lock().spawn_thread(&session, "reviewer");
    let uses = vec![
        ToolUse::bash("echo 1 > begun; sleep 2; echo late >> log").in_thread(&thread),
        ToolUse::bash("echo never >> log").in_thread(&thread),
    ];
    let of_thread = world.mock.lock().call_tools(&session, uses);
    world.file("begun").await;
    world.mock.lock().terminate_thread(&session, &thread);
    let next = world.call(&session, ToolUse::bash("[ -e begun ] && echo next"));
    assert_eq!(world.text(&session, &next).await, "next");
    for id in &of_thread {
        assert_eq!(world.mock.lock().session(&session).call(id).state, CallState::Closed);
    }
    // The last one may not have heard so yet.
    let posts: Vec<Fate> = world.mock.requests(Endpoint::SendEvents).into_iter().map(|post| post.fate).collect();
    let is_taken = |fate: &Fate| matches!(fate, Fate::Answered(200) | Fate::Pending);
    assert!(posts.iter().all(is_taken) && posts.len() == 2, "{posts:?}");
    let effects = world.read("log");
    assert!(!effects.contains("never"));
    world.end(&session).await;
    world.assert_no_breach();
    Served { session, ids: of_thread, effects, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thread_that_ends_takes_its_calls_with_it() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    // What runs goes on to its end, though nobody hears of it.
    assert_eq!(thread(&world).await.effects, "late\n");
}
