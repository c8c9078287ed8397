//! Polling, acknowledging, and the lease of an item to its end.

use super::*;

#[test]
fn nothing_is_polled_before_what_an_earlier_runner_left_is_known() {
    let mut machine = Machine::new(rules(), half, Handover::default());
    assert!(machine.handle(SECOND, Event::Tick).is_empty());
    assert!(matches!(machine.handle(SECOND, Event::Update(Update::Restored))[..], [Action::Poll]));
}

#[test]
fn polling_stops_without_room_and_goes_on_with_it() {
    let mut world = World::new();
    world.deliver("work_1", Order::Session("sesn_1".into()));
    world.deliver("work_2", Order::Session("sesn_2".into()));
    world.asked.clear();
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0, "two items are the most");

    let mut world = World::new();
    world.machine.set_room(Room { others: 8, closed: false });
    world.handle(Event::Polled(Ok(None)));
    world.asked.clear();
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0, "others have all of it");
    world.machine.set_room(Room { others: 7, closed: true });
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0, "the host is short of something");
    world.machine.set_room(Room { others: 7, closed: false });
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 1, "one at a time");
}

#[test]
fn question_that_is_under_way_holds_a_place_until_it_is_answered_with_nothing() {
    let mut world = World::new();
    world.handle(Event::Polled(Ok(None)));
    assert_eq!(world.machine.claims(), 0);
    world.asked.clear();
    world.pass(10);
    assert_eq!((world.asked(|action| matches!(action, Action::Poll)), world.machine.claims()), (1, 1));
    world.handle(Event::Polled(Err(lost())));
    assert_eq!(world.machine.claims(), 0, "a failed question holds none");
    world.pass(10);
    world.deliver("work_1", Order::Session("sesn_1".into()));
    assert!(world.machine.claims() >= 1, "what it brought holds the place from then on");
}

#[test]
fn failed_polls_come_slower_and_refused_ones_slowest() {
    let mut world = World::new();
    let mut waits = Vec::new();
    for _ in 0..8 {
        world.handle(Event::Polled(Err(lost())));
        waits.push((world.machine.wake() - world.now) / SECOND);
        world.now = world.machine.wake();
        world.handle(Event::Tick);
    }
    assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
    world.handle(Event::Polled(Err(status(401))));
    assert_eq!((world.machine.wake() - world.now) / SECOND, 90);
}

#[test]
fn heartbeats_begin_with_the_acknowledgement_and_nothing_else_before_the_first_is_taken() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    assert_eq!(world.asked(|action| matches!(action, Action::Stream { .. } | Action::Fetch { .. })), 0);
    assert_eq!(world.beat_asked(), "NO_HEARTBEAT");
    let beat = world.good_beat();
    world.beaten(Ok(beat.clone()));
    assert_eq!(world.asked(|action| matches!(action, Action::Stream { .. })), 1);
    world.asked.clear();
    world.pass(40);
    assert_eq!(world.beat_asked(), beat.last_heartbeat);
}

#[test]
fn items_that_ask_for_nothing_are_acknowledged_and_given_back() {
    let mut world = World::new();
    world.deliver(WORK, Order::Nothing("healthcheck".into()));
    assert_eq!((world.stops_asked(), world.asked(|action| matches!(action, Action::Beat { .. }))), (1, 0));
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    assert_eq!(world.forgotten(), 1);
}

#[test]
fn delivery_that_cannot_be_acknowledged_in_time_is_left_and_a_conflict_is_decided_by_the_first_beat() {
    let mut world = World::new();
    world.next("a poll", |action| matches!(action, Action::Poll).then_some(()));
    let delivery = Delivery { work_id: WORK.into(), order: Order::Session(SESSION.into()), token: None };
    world.handle(Event::Polled(Ok(Some(delivery.clone()))));
    world.handle(Event::Acked { work_id: WORK.into(), result: Err(lost()) });
    world.pass(2);
    assert_eq!(world.asked(|action| matches!(action, Action::AckAgain { .. })), 1);
    world.handle(Event::Acked { work_id: WORK.into(), result: Err(status(409)) });
    assert_eq!(world.beat_asked(), "NO_HEARTBEAT");

    let mut world = World::new();
    world.handle(Event::Polled(Ok(Some(delivery.clone()))));
    world.pass(6);
    assert_eq!((world.forgotten(), world.stops_asked()), (1, 0));

    let mut world = World::new();
    world.handle(Event::Polled(Ok(Some(delivery))));
    world.handle(Event::Acked { work_id: WORK.into(), result: Err(status(403)) });
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn delivery_of_what_is_served_already_is_not_acknowledged() {
    let mut world = World::served(vec![]);
    for work_id in [WORK, "work_2"] {
        world.asked.clear();
        let delivery = Delivery { work_id: work_id.into(), order: Order::Session(SESSION.into()), token: None };
        world.handle(Event::Polled(Ok(Some(delivery))));
        assert_eq!(world.asked(|action| matches!(action, Action::Ack(_))), 0, "{work_id}");
        // What has a lease is delivered to nobody, so it may be lost.
        assert!(world.beat_asked().starts_with("hb-"), "{work_id}");
        let beat = world.good_beat();
        world.beaten(Ok(beat));
        world.pass(3);
    }
}

/// F-16: whoever has lost the lease ends what runs at once, and posts nothing more.
#[test]
fn lost_lease_ends_everything_and_posts_nothing() {
    for is_assumed in [false, true] {
        let mut world = World::served(vec![bash("t1"), in_thread(reading("t2"), "th")]);
        world.call_asked();
        world.finished("claude:env_1:t2", "done");
        world.asked.clear();
        if is_assumed {
            for _ in 0..125 {
                world.pass(1);
                if world.asked(|action| matches!(action, Action::Beat { .. })) > 0 && world.forgotten() == 0 {
                    world.asked.retain(|action| !matches!(action, Action::Beat { .. }));
                    world.beaten(Err(lost()));
                }
            }
        } else {
            world.pass(40);
            world.beaten(Err(status(412)));
        }
        assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Kill)], "{is_assumed}");
        assert_eq!((world.forgotten(), world.stops_asked()), (1, 0), "{is_assumed}");
        let suspended = world.asked(|action| matches!(action, Action::Work(WorkItem::Suspend { session_id: Some(_) })));
        assert!(suspended > 0, "something could still begin");
        world.asked.clear();
        world.finished("claude:env_1:t1", "killed");
        world.posted("t2", Err(lost()));
        world.pass(100);
        assert_eq!((world.posts_asked(), world.acknowledged()), (0, vec![]), "{is_assumed}");
    }
}

#[test]
fn item_that_is_taken_back_is_answered_with_errors_and_then_given_back() {
    let mut world = World::served(vec![bash("t1")]);
    world.call_asked();
    world.pass(40);
    let beat = Beat { goes_on: false, ..world.good_beat() };
    world.beaten(Ok(beat));
    assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Kill)]);
    assert_eq!(world.stops_asked(), 0, "its answer comes first");
    world.finished("claude:env_1:t1", "killed");
    assert_eq!(world.post_asked().0, "t1");
    world.posted("t1", Ok(()));
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn item_is_given_back_in_the_end_although_nothing_answers() {
    let mut world = World::served(vec![bash("t1")]);
    world.pass(40);
    world.beaten(Ok(Beat { goes_on: false, last_heartbeat: "x".into(), ttl_seconds: Some(120) }));
    world.asked.clear();
    world.pass(11);
    assert_eq!(world.stops_asked(), 1);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Err(status(500)) });
    world.pass(10);
    assert_eq!(world.stops_asked(), 2);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Err(status(409)) });
    assert_eq!(world.forgotten(), 1);
}

#[test]
fn idle_clock_runs_only_while_nothing_is_left_to_do() {
    let mut world = World::served(vec![bash("t1")]);
    world.live(end_of_turn());
    world.pass_beating(200);
    assert_eq!(world.stops_asked(), 0, "a call runs");
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Ok(()));
    world.pass_beating(59);
    assert_eq!(world.stops_asked(), 0, "it counts from the end of the call");
    world.live(json!({"type": "user.message"}));
    world.pass_beating(200);
    assert_eq!(world.stops_asked(), 0, "somebody has said something");
    world.live(end_of_turn());
    world.live(verdict("other", "allow"));
    world.pass_beating(59);
    assert_eq!(world.stops_asked(), 0);
    world.pass_beating(2);
    assert_eq!(world.stops_asked(), 1, "a verdict is no sign of life");
}

#[test]
fn runner_that_is_emptied_answers_polls_no_more_and_gives_items_back() {
    let mut world = World::served(vec![bash("t1")]);
    world.handle(Event::Update(Update::Drained { draining: true, sessions_left: 1, calls_left: 1 }));
    world.handle(Event::Polled(Ok(None)));
    world.asked.clear();
    world.pass_beating(30);
    assert_eq!((world.stops_asked(), world.asked(|action| matches!(action, Action::Poll))), (0, 0));
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Ok(()));
    assert_eq!(world.stops_asked(), 1);
}

/// A supervisor waits for some time and kills then.
#[test]
fn what_runs_when_the_process_is_told_to_end_has_a_little_time_and_is_then_ended_and_answered() {
    let mut world = World::served(vec![bash("t1"), bash("t2")]);
    world.handle(Event::Ending);
    world.handle(Event::Polled(Ok(None)));
    world.asked.retain(|action| matches!(action, Action::Beat { .. }));
    world.pass_beating(19);
    assert_eq!((world.cancels_asked().len(), world.asked(|action| matches!(action, Action::Poll))), (0, 0));
    world.handle(Event::Ending);
    world.pass_beating(2);
    assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Kill)]);
    assert_eq!(world.post_asked(), ("t2".to_owned(), "cancelled before it started; nothing was run".to_owned()));
    world.finished("claude:env_1:t1", "part");
    world.posted("t1", Ok(()));
    world.posted("t2", Ok(()));
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn item_that_has_nothing_to_do_is_given_back_when_the_process_is_told_to_end() {
    let mut world = World::served(vec![bash("t1"), result_of("t1")]);
    world.handle(Event::Ending);
    assert_eq!(world.stops_asked(), 1);
}

/// By default it is held for as long as somebody needs to decide, as the official worker does.
#[test]
fn item_whose_session_waits_for_somebody_else_is_given_back_after_the_operators_time_and_unanswered() {
    for (limit, stops) in [(None, 0), (Some(Duration::from_secs(300)), 1)] {
        for open in [asking("t1"), json!({"type": "agent.custom_tool_use", "id": "t1", "name": "mine", "input": {}})] {
            let mut world = World::with(Rules { max_wait: limit, ..rules() }, Handover::default());
            world.serve(vec![bash("t0"), result_of("t0"), open, action_required()]);
            world.pass_beating(290);
            assert_eq!(world.stops_asked(), 0);
            world.pass_beating(20);
            assert_eq!((world.stops_asked(), world.posts_asked()), (stops, 0), "{limit:?}");
        }
    }
}

#[test]
fn time_for_somebody_else_counts_only_while_nothing_runs() {
    let mut world = World::with(Rules { max_wait: Some(Duration::from_secs(300)), ..rules() }, Handover::default());
    world.serve(vec![asking("t1"), bash("t2"), action_required()]);
    world.pass_beating(400);
    assert_eq!(world.stops_asked(), 0);
    world.finished("claude:env_1:t2", "x");
    world.posted("t2", Ok(()));
    world.live(result_of("t2"));
    world.pass_beating(290);
    assert_eq!(world.stops_asked(), 0);
    world.live(verdict("t1", "allow"));
    world.pass_beating(100);
    assert_eq!((world.stops_asked(), world.calls_asked()), (0, 2));
}

/// Another thread of it may have the next tool use at any moment.
#[test]
fn time_for_somebody_else_does_not_count_while_the_session_is_at_work() {
    let mut world = World::with(Rules { max_wait: Some(Duration::from_secs(300)), ..rules() }, Handover::default());
    world.serve(vec![asking("t1")]);
    world.pass_beating(400);
    world.live(action_required());
    world.pass_beating(200);
    world.live(json!({"type": "session.status_running"}));
    world.pass_beating(400);
    assert_eq!(world.stops_asked(), 0);
    world.live(action_required());
    world.pass_beating(310);
    assert_eq!(world.stops_asked(), 1);
}

/// Somebody may have decided while nobody heard it.
#[test]
fn item_is_not_given_back_while_its_stream_is_broken_and_the_time_goes_on() {
    for is_decided in [false, true] {
        let mut world = World::with(Rules { max_wait: Some(Duration::from_secs(300)), ..rules() }, Handover::default());
        let mut history = vec![asking("t1"), action_required()];
        world.serve(history.clone());
        world.pass_beating(200);
        let link = world.machine.items[WORK].link_number();
        world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: None });
        world.pass_beating(200);
        assert_eq!(world.stops_asked(), 0);
        history.extend(is_decided.then(|| verdict("t1", "allow")));
        world.connect(history);
        assert_eq!((world.calls_asked(), world.stops_asked()), if is_decided { (1, 0) } else { (0, 1) });
    }
}

#[test]
fn item_that_is_delivered_or_not_acknowledged_yet_when_the_process_is_told_to_end_is_not_served() {
    let mut world = World::new();
    world.next("a poll", |action| matches!(action, Action::Poll).then_some(()));
    world.handle(Event::Ending);
    let order = wire::Order::Session(SESSION.into());
    world.handle(Event::Polled(Ok(Some(Delivery { work_id: WORK.into(), order, token: None }))));
    assert_eq!(world.asked(|action| matches!(action, Action::Ack(_))), 0, "it is delivered again to somebody else");

    let mut world = World::new();
    let order = wire::Order::Session(SESSION.into());
    world.handle(Event::Polled(Ok(Some(Delivery { work_id: WORK.into(), order, token: None }))));
    world.handle(Event::Ending);
    world.handle(Event::Acked { work_id: WORK.into(), result: Ok(()) });
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    world.pass_beating(21);
    assert_eq!((world.calls_asked(), world.stops_asked()), (0, 1));
}

#[test]
fn end_of_the_runner_gives_every_item_back() {
    let mut world = World::served(vec![bash("t1")]);
    world.handle(Event::Finish(Finish::Patient));
    assert_eq!(world.cancels_asked().len(), 1);
    assert!(!world.machine.is_done());
    world.handle(Event::Finish(Finish::AtOnce));
    assert_eq!(world.stops_asked(), 1);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    assert!(world.machine.is_done());
}

/// Somebody else may have the item by then, and would lose it to a late stop.
#[test]
fn item_whose_lease_runs_out_or_is_lost_while_it_is_given_back_is_left_alone() {
    let ending = || {
        let mut world = World::served(vec![]);
        world.pass(40);
        world.beaten(Ok(Beat { goes_on: false, last_heartbeat: "x".into(), ttl_seconds: Some(4) }));
        assert_eq!(world.stops_asked(), 1);
        world.asked.clear();
        world
    };
    let mut world = ending();
    world.handle(Event::Stopped { work_id: WORK.into(), result: Err(status(500)) });
    world.pass(3);
    assert_eq!(world.stops_asked(), 1, "it is tried again while the lease is held");
    world.handle(Event::Stopped { work_id: WORK.into(), result: Err(status(500)) });
    world.pass(60);
    assert_eq!((world.stops_asked(), world.forgotten()), (1, 1));

    let mut world = ending();
    world.pass(5);
    assert_eq!((world.stops_asked(), world.forgotten()), (0, 1), "a stop that gets no answer is dropped");

    let mut world = ending();
    world.beaten(Err(status(412)));
    world.pass(60);
    assert_eq!((world.stops_asked(), world.forgotten()), (0, 1));
}

#[test]
fn key_that_was_replaced_is_tried_at_once() {
    let mut world = World::new();
    world.handle(Event::Polled(Err(status(401))));
    world.asked.clear();
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0);
    world.handle(Event::KeyReplaced);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 1);
}
