//! Sessions of the runner: kept between items, full, ending, named.

use super::*;

#[test]
fn session_outlives_its_items_and_is_closed_when_nobody_has_wanted_it_for_long() {
    let mut world = World::served(vec![bash("t1"), end_of_turn()]);
    let session_id = core();
    world.handle(Event::Update(Update::SessionOpened {
        session_id,
        epoch: 1,
        receipt: Receipt::default(),
        replay: Replay::First,
    }));
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Ok(()));
    world.live(end_of_turn());
    world.pass_beating(61);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    let closes = |action: &Action| matches!(action, Action::Work(WorkItem::Close(_)));
    world.asked.retain(|action| matches!(action, Action::Poll));
    world.pass(300);
    assert_eq!(world.asked(closes), 0);
    assert!(world.asked(|action| matches!(action, Action::Work(WorkItem::Lease { .. }))) >= 9, "its sandbox would end");

    world.asked.retain(|action| matches!(action, Action::Poll));
    world.serve(vec![bash("t1"), result_of("t1"), bash("t2")]);
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 0, "it is there");
    assert_eq!(world.call_asked(), "claude:env_1:t2");
    world.finished("claude:env_1:t2", "x");
    world.posted("t2", Ok(()));
    world.live(end_of_turn());
    world.pass_beating(61);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    world.pass(640);
    assert_eq!(world.asked(closes), 1);
}

#[test]
fn session_that_is_over_is_closed_and_its_results_are_dropped() {
    let mut world = World::served(vec![bash("t1"), bash("t2")]);
    world.finished("claude:env_1:t1", "x");
    world.asked.clear();
    world.live(json!({"type": "session.status_terminated"}));
    assert_eq!(world.cancels_asked(), [("claude:env_1:t2".to_owned(), CancelMode::Kill)]);
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Close(_)))), 1);
    assert_eq!((world.stops_asked(), world.posts_asked()), (1, 0));
    world.finished("claude:env_1:t2", "killed");
    assert_eq!(world.acknowledged(), ["claude:env_1:t1", "claude:env_1:t2"]);
}

#[test]
fn session_without_room_is_opened_later_and_its_calls_with_it() {
    let mut world = World::served(vec![bash("t1")]);
    world.asked.clear();
    world.handle(refused(RequestKind::Open, None, Code::Capacity));
    world.handle(refused(RequestKind::Call, Some("claude:env_1:t1"), Code::SessionUnknown));
    assert_eq!((world.calls_asked(), world.posts_asked()), (0, 0));
    world.pass_beating(3);
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 1);
    assert_eq!(world.call_asked(), "claude:env_1:t1");
    for _ in 0..40 {
        world.handle(refused(RequestKind::Open, None, Code::Capacity));
        world.handle(refused(RequestKind::Call, Some("claude:env_1:t1"), Code::SessionUnknown));
        world.pass_beating(3);
    }
    assert_eq!(world.post_asked().1, "the call did not run: no room");
}

#[test]
fn session_that_is_still_ending_is_opened_again_when_it_has_ended() {
    let mut world = World::served(vec![bash("t1")]);
    world.asked.clear();
    world.handle(refused(RequestKind::Open, None, Code::SessionClosed));
    world.handle(refused(RequestKind::Call, Some("claude:env_1:t1"), Code::SessionClosed));
    world.pass_beating(10);
    assert_eq!(world.calls_asked(), 0);
    let ended = Update::SessionEnded { session_id: core(), epoch: 1, end: SessionEnd::Closed };
    world.handle(Event::Update(ended));
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 1);
    assert_eq!(world.call_asked(), "claude:env_1:t1");
}

#[test]
fn ids_of_the_server_become_ids_of_the_runner_and_no_two_the_same() {
    let long = "x".repeat(128);
    let scoped =
        [scoped("env_1", "s"), scoped("env_1", &long), scoped("env_2", &long), scoped("env_1", &format!("{long}y"))];
    assert_eq!(scoped[0], "claude:env_1:s");
    for (at, id) in scoped.iter().enumerate() {
        assert!(SessionId::new(id).is_ok_and(|id| id.is_of_queue()), "{id}");
        assert!(!scoped[..at].contains(id), "{id}");
    }
}

/// Whoever has built something there would look for it.
#[test]
fn first_result_of_a_new_sandbox_says_so_where_calls_have_run_before() {
    let mut first = World::served(vec![bash("t1"), bash("t2")]);
    first.finished("claude:env_1:t1", "x");
    assert!(!first_is_new(&mut first), "nothing was before");
    first.posted("t1", Ok(()));
    first.finished("claude:env_1:t2", "x");
    assert!(!first_is_new(&mut first));
    first.posted("t2", Ok(()));
    let ended = Update::SessionEnded { session_id: core(), epoch: 1, end: SessionEnd::Closed };
    first.handle(Event::Update(ended));
    for (id, expected) in [("t3", true), ("t4", false)] {
        first.live(bash(id));
        first.finished(&format!("claude:env_1:{id}"), "x");
        assert_eq!(first_is_new(&mut first), expected, "{id}");
        first.posted(id, Ok(()));
    }

    let mut later = World::served(vec![bash("t1"), result_of("t1"), bash("t2")]);
    later.finished("claude:env_1:t2", "x");
    assert!(first_is_new(&mut later), "another runner has served it, or this one has not kept it");

    let mut denied = World::served(vec![asking("t1"), verdict("t1", "deny"), result_of("t1"), bash("t2")]);
    denied.finished("claude:env_1:t2", "x");
    assert!(!first_is_new(&mut denied), "nothing has run");
}

/// What did not run says nothing of what is there, and a result that nobody wants is read by nobody.
#[test]
fn call_that_never_ran_and_result_that_is_dropped_leave_it_to_the_next_one_to_say_that_the_sandbox_is_new() {
    let mut world = World::served(vec![bash("t0"), result_of("t0"), bash("t1")]);
    let failure = ToolFailure::new(Code::Capacity, "no room", "wait");
    let end = CallEnd::without_output(Outcome::NeverStarted { failure, code: 125 });
    let result = Arc::new(CallResult { end, presented: ToolResult::text(true, "no room"), recovered: false });
    let call_id = call("claude:env_1:t1");
    world.handle(Event::Update(Update::CallFinished { call_id, session_id: core(), epoch: 1, result }));
    assert!(!first_is_new(&mut world), "nothing has run there");
    world.posted("t1", Ok(()));
    world.live(bash("t2"));
    // The server answers it before this runner does.
    world.live(result_of("t2"));
    world.finished("claude:env_1:t2", "x");
    world.live(bash("t3"));
    world.finished("claude:env_1:t3", "x");
    assert!(first_is_new(&mut world));
}

#[test]
fn result_that_is_posted_again_under_another_lease_says_again_that_the_sandbox_is_new() {
    let history = vec![bash("t0"), result_of("t0"), bash("t1")];
    let mut world = World::served(history.clone());
    world.finished("claude:env_1:t1", "x");
    assert!(first_is_new(&mut world));
    world.pass(40);
    world.beaten(Err(status(412)));
    world.asked.retain(|action| matches!(action, Action::Poll));
    world.serve(history);
    assert!(first_is_new(&mut world), "the one before was not taken");
}

#[test]
fn sandbox_that_the_runner_before_has_left_is_told_as_new_only_when_it_is_made_anew() {
    for ready in [true, false] {
        let mut world = World::new();
        let restored = Update::SessionRestored { session_id: core(), epoch: 1, ready, acknowledged: 0 };
        world.handle(Event::Update(restored));
        world.serve(vec![bash("t1"), result_of("t1"), bash("t2")]);
        world.finished("claude:env_1:t2", "x");
        assert_eq!(first_is_new(&mut world), !ready);
    }
}

fn first_is_new(world: &mut World) -> bool {
    world.next("a post", |action| match action {
        Action::Post { answer: Answer::Result { is_new, .. }, .. } => Some(*is_new),
        _ => None,
    })
}
