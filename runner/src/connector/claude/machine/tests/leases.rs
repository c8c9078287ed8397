//! Leases that an earlier runner has left: taken up where the server still knows them, and given up where it does not.

use super::*;

fn held() -> Held {
    Held { work_id: WORK.into(), session_id: SESSION.into(), last_heartbeat: "hb-before".into(), ttl_seconds: 300 }
}

/// A call that the earlier runner has written down.
fn restored(phase: CallPhase) -> Event {
    Event::Update(Update::CallRestored {
        call_id: call("claude:env_1:t1"),
        session_id: core(),
        digest: crate::work::RequestDigest([0; 32]),
        quiet: true,
        phase,
    })
}

fn after_a_crash() -> World {
    World::after(Handover { leases: vec![held()], ..Handover::default() })
}

#[test]
fn lease_is_taken_up_with_the_text_of_the_last_heartbeat_and_served_at_once() {
    let mut world = after_a_crash();
    world
        .next("its credential", |action| matches!(action, Action::TakeUp { work_id } if work_id == WORK).then_some(()));
    assert_eq!(world.beat_asked(), "hb-before");
    assert_eq!(world.asked(|action| matches!(action, Action::Stream { .. } | Action::Ack(_))), 0);
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    world.connect(vec![bash("t1")]);
    assert_eq!(world.call_asked(), "claude:env_1:t1");
}

/// It would run although its answer is there already, or although it was interrupted meanwhile.
#[test]
fn nothing_of_an_earlier_runner_begins_before_the_history_says_that_it_is_still_wanted() {
    let mut world = after_a_crash();
    world.handle(Event::Update(Update::SessionRestored { session_id: core(), epoch: 1, ready: true, acknowledged: 0 }));
    world.handle(restored(CallPhase::Accepted));
    world.beat_asked();
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    let resumes = |action: &Action| matches!(action, Action::Work(WorkItem::Resume { .. }));
    assert_eq!(world.asked(resumes), 0, "it may begin");

    world.connect(vec![bash("t1"), result_of("t1")]);

    let word = |action: &Action| match action {
        Action::Work(WorkItem::Cancel { .. }) => Some("cancel"),
        Action::Work(WorkItem::Resume { .. }) => Some("resume"),
        _ => None,
    };
    let order: Vec<_> = world.asked.iter().filter_map(word).collect();
    assert_eq!(order, ["cancel", "resume"]);
}

/// Whoever has it by now is not disturbed, and what an earlier runner has begun is left to whoever gets the session next.
#[test]
fn lease_that_has_run_out_or_is_refused_is_left_without_a_stop() {
    for refusal in [412, 404, 401, 409] {
        let mut world = after_a_crash();
        world.handle(restored(CallPhase::Started));
        world.beat_asked();
        world.beaten(Err(status(refusal)));
        world.pass(60);
        assert_eq!((world.stops_asked(), world.forgotten(), world.cancels_asked().len()), (0, 1, 0), "{refusal}");
        world.asked.clear();
        world.serve(vec![bash("t1")]);
        world.finished("claude:env_1:t1", "went on");
        assert_eq!(world.post_asked().0, "t1", "{refusal}");
    }
}

#[test]
fn item_that_is_taken_back_meanwhile_ends_what_the_earlier_runner_has_begun() {
    let mut world = after_a_crash();
    world.handle(restored(CallPhase::Started));
    world.beaten(Ok(Beat { goes_on: false, last_heartbeat: "x".into(), ttl_seconds: Some(300) }));
    assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Kill)]);
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn what_is_left_is_what_is_held() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    assert_eq!(world.machine.handover().leases, [], "nobody has it before the first heartbeat");
    let beat = world.good_beat();
    let before = world.machine.changes();
    world.beaten(Ok(beat.clone()));
    assert_ne!(world.machine.changes(), before);
    let left = Held { last_heartbeat: beat.last_heartbeat, ttl_seconds: 120, ..held() };
    assert_eq!(world.machine.handover().leases, [left]);
    world.beaten(Err(status(412)));
    assert_eq!(world.machine.handover().leases, []);

    let waits = Machine::new(rules(), half, Handover { leases: vec![held()], ..Handover::default() });
    assert_eq!(waits.handover().leases, [held()], "until it is taken up");
}
