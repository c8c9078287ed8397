//! Calls and their answers.

use super::*;

#[test]
fn call_is_run_in_a_session_of_its_own_and_acknowledged_when_its_result_is_posted() {
    let mut world = World::served(vec![]);
    world.live(bash("t1"));
    let opened = world.next("a session", |action| match action {
        Action::Work(WorkItem::Open(open)) => Some((open.session_id.to_string(), open.epoch)),
        _ => None,
    });
    assert_eq!(opened, (CORE.to_owned(), 1));
    let lease = world.next("a lease", |action| match action {
        Action::Work(WorkItem::Lease { session_id, until_ns, .. }) => Some((session_id.clone(), *until_ns)),
        _ => None,
    });
    assert_eq!(lease, (Some(core()), world.now + 120 * SECOND));
    assert_eq!(world.call_asked(), "claude:env_1:t1");
    world.finished("claude:env_1:t1", "hi");
    assert_eq!(world.post_asked(), ("t1".to_owned(), "\"hi\" false".to_owned()));
    assert_eq!(world.acknowledged(), Vec::<String>::new(), "the server does not have it yet");
    world.posted("t1", Ok(()));
    assert_eq!(world.acknowledged(), ["claude:env_1:t1"]);
    world.live(result_of("t1"));
    world.live(bash("t1"));
    assert_eq!(world.calls_asked(), 0);
}

#[test]
fn bad_input_is_answered_to_the_model_and_runs_nothing() {
    let mut world = World::served(vec![json!({"type": "agent.tool_use", "id": "t1", "name": "read", "input": {}})]);
    assert_eq!(world.post_asked(), ("t1".to_owned(), "read: file_path is required".to_owned()));
    assert_eq!(world.calls_asked(), 0);
}

/// F-02: what an earlier runner has begun is not run again, and its result is posted.
#[test]
fn calls_of_an_earlier_runner_are_found_by_their_ids() {
    let mut world = World::new();
    let restored = |id: &str, phase| Update::CallRestored {
        call_id: call(id),
        session_id: core(),
        digest: crate::work::RequestDigest([0; 32]),
        quiet: true,
        phase,
    };
    world.handle(Event::Update(Update::SessionRestored { session_id: core(), epoch: 1, ready: true, acknowledged: 0 }));
    assert_eq!(
        world.asked(|action| matches!(action, Action::Work(WorkItem::Suspend { .. }))),
        1,
        "nobody has a lease yet"
    );
    world.handle(Event::Update(restored("claude:env_1:t1", CallPhase::Finished)));
    world.finished("claude:env_1:t1", "stored");
    world.handle(Event::Update(restored("claude:env_1:t2", CallPhase::Started)));
    for (id, phase) in [("claude:env_1:t4", CallPhase::Finished), ("claude:env_1:t5", CallPhase::Started)] {
        world.handle(Event::Update(restored(id, phase)));
    }
    world.finished("claude:env_1:t4", "posted by the earlier one");
    world.asked.clear();
    world.serve(vec![bash("t1"), bash("t2"), bash("t3"), bash("t4"), result_of("t4"), bash("t5"), result_of("t5")]);
    assert_eq!(world.acknowledged(), ["claude:env_1:t4"], "the server has it");
    assert_eq!(
        world.cancels_asked(),
        [("claude:env_1:t5".to_owned(), CancelMode::Interrupt)],
        "somebody has answered it"
    );
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 0);
    assert_eq!(world.calls_asked(), 0, "the one before it still runs");
    assert_eq!(world.post_asked(), ("t1".to_owned(), "\"stored\" false".to_owned()));
    world.finished("claude:env_1:t5", "ended");
    assert_eq!(world.acknowledged(), ["claude:env_1:t5"]);
    world.finished("claude:env_1:t2", "went on");
    assert_eq!(world.call_asked(), "claude:env_1:t3");
    assert_eq!(world.post_asked(), ("t2".to_owned(), "\"went on\" false".to_owned()));
}

#[test]
fn posts_are_repeated_for_as_long_as_the_lease_lasts_and_refused_ones_are_given_up() {
    let mut world = World::served(vec![bash("t1")]);
    world.finished("claude:env_1:t1", "x");
    let mut tries = 0;
    for _ in 0..400 {
        world.pass_beating(1);
        if world.posts_asked() > 0 {
            tries += world.posts_asked();
            world.asked.retain(|action| !matches!(action, Action::Post { .. }));
            world.posted("t1", Err(status(503)));
        }
    }
    assert!((5..30).contains(&tries), "{tries}");
    assert_eq!(world.acknowledged(), Vec::<String>::new(), "a later item may still get it");

    let mut world = World::served(vec![bash("t1")]);
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Err(status(400)));
    world.posted("t1", Err(status(400)));
    world.pass_beating(100);
    assert_eq!(world.posts_asked(), 2, "the first, and once that the server does not take it");
}

#[test]
fn result_that_is_too_large_for_the_server_is_answered_as_such() {
    let mut world = World::served(vec![bash("t1")]);
    world.finished("claude:env_1:t1", "x");
    world.asked.clear();
    world.posted("t1", Err(status(413)));
    assert!(world.post_asked().1.starts_with("the result was refused by the control plane as too large"));
}

/// A result that was not asked for in a day is gone, and its call must not run a second time because of that.
#[test]
fn call_whose_result_is_not_kept_any_more_is_answered_as_such_and_does_not_run_again() {
    let mut world = World::new();
    world.handle(Event::Update(finished("claude:env_1:t1", "nobody asks")));
    let before = world.machine.changes();
    world.pass(25 * 3600);
    assert_eq!(world.acknowledged(), ["claude:env_1:t1"]);
    assert_ne!(world.machine.changes(), before, "the next runner must know it");
    for mut world in [World::after(world.machine.handover()), world] {
        world.serve(vec![bash("t1")]);
        assert_eq!(world.calls_asked(), 0);
        assert_eq!(
            world.post_asked(),
            ("t1".to_owned(), crate::connector::claude::machine::calls::NOT_KEPT.to_owned())
        );
    }
}

#[test]
fn call_that_the_sessions_know_as_acknowledged_is_answered_and_not_passed_over() {
    let mut world = World::served(vec![bash("t1")]);
    world.handle(refused(RequestKind::Call, Some("claude:env_1:t1"), Code::CallForgotten));
    assert!(world.post_asked().1.starts_with("the call has run"));
}

#[test]
fn input_that_no_tool_takes_is_answered_with_its_size_and_the_limit() {
    let input = json!({"command": "x".repeat(3 * 1024 * 1024)});
    let mut world = World::served(vec![json!({"type": "agent.tool_use", "id": "t1", "name": "bash", "input": input})]);
    let text = world.post_asked().1;
    assert!(text.starts_with("bash input has 3145742 bytes; at most 262144 are allowed"), "{text}");
    assert_eq!(world.calls_asked(), 0);
}

#[test]
fn post_waits_as_long_as_the_server_asks_for() {
    let mut world = World::served(vec![bash("t1")]);
    world.finished("claude:env_1:t1", "x");
    world.asked.clear();
    let failure = Failure::Status { status: 429, kind: String::new(), retry_after: Some(Duration::from_secs(20)) };
    world.posted("t1", Err(failure));
    world.pass_beating(19);
    assert_eq!(world.posts_asked(), 0);
    world.pass_beating(2);
    assert_eq!(world.posts_asked(), 1);
}
