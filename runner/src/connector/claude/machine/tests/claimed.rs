//! One item that was handed on, and what is counted.

use super::*;
use crate::connector::claude::board::{Happening, Reason};

fn handed_on(order: Order) -> World {
    let machine = Machine::new(Rules { max_items: 0, ..rules() }, half, Handover::default());
    let mut world = World { machine, now: 1_000 * SECOND, asked: VecDeque::new() };
    world.machine.serve_only(Delivery { work_id: WORK.into(), order, token: None });
    world.handle(Event::Tick);
    assert!(world.asked.is_empty() && !world.machine.is_done(), "what an earlier runner left is not known yet");
    world.handle(Event::Update(Update::Restored));
    world.next("the item", |action| matches!(action, Action::Take(_)).then_some(()));
    world
}

fn ended(world: &World) -> Vec<Reason> {
    let reason = |action: &Action| match action {
        Action::Count(Happening::Ended(reason)) => Some(*reason),
        _ => None,
    };
    world.asked.iter().filter_map(reason).collect()
}

fn acks(world: &World) -> usize {
    world.asked(|action| matches!(action, Action::Ack(_) | Action::AckAgain { .. }))
}

#[test]
fn item_that_was_handed_on_is_served_unacknowledged_and_nothing_after_it() {
    let mut world = handed_on(Order::Session(SESSION.into()));
    assert_eq!(world.beat_asked(), "NO_HEARTBEAT");
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    world.connect(vec![end_of_turn()]);
    world.pass_beating(61);
    assert_eq!((world.stops_asked(), acks(&world)), (1, 0));
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    assert_eq!(ended(&world), [Reason::Idle]);
    world.pass(10);
    assert!(world.machine.is_done());
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0);
}

#[test]
fn item_that_nobody_has_acknowledged_is_acknowledged_once() {
    let mut world = handed_on(Order::Session(SESSION.into()));
    world.beaten(Err(status(409)));
    world.next("an acknowledgement", |action| matches!(action, Action::AckAgain { .. }).then_some(()));
    world.handle(Event::Acked { work_id: WORK.into(), result: Ok(()) });
    assert_eq!(world.beat_asked(), "NO_HEARTBEAT");
    world.beaten(Err(status(409)));
    world.pass(5);
    assert_eq!(acks(&world), 0, "it is acknowledged for ever");
    assert_eq!(world.asked(|action| matches!(action, Action::Beat { .. })), 1, "the next beat comes after a second");
}

#[test]
fn conflict_of_an_item_that_we_have_acknowledged_is_no_reason_to_do_it_again() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    world.beaten(Err(status(409)));
    world.pass(5);
    assert_eq!(acks(&world), 0);
}

#[test]
fn item_that_asks_for_nothing_is_given_back_and_is_the_end() {
    let mut world = handed_on(Order::Nothing("healthcheck".into()));
    assert_eq!((world.stops_asked(), acks(&world)), (1, 0));
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    assert_eq!(ended(&world), [Reason::Nothing]);
    assert!(world.machine.is_done());
}

#[test]
fn lost_lease_is_the_end_and_is_told() {
    let mut world = handed_on(Order::Session(SESSION.into()));
    world.beaten(Err(status(412)));
    assert_eq!((ended(&world), world.stops_asked()), (vec![Reason::LeaseLost], 0));
    assert!(world.machine.is_done());
}

#[test]
fn refusal_of_a_poll_is_told_with_what_to_do_and_margins_are_counted() {
    let mut world = World::new();
    world.handle(Event::Polled(Err(status(403))));
    let problem = world.next("a poll", |action| match action {
        Action::Count(Happening::Polled { result: "refused", problem }) => Some(problem.clone()),
        _ => None,
    });
    assert!(problem.contains("another environment"), "{problem}");

    let mut world = World::served(vec![]);
    world.pass(30);
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    let margin = world.next("a renewal", |action| match action {
        Action::Count(Happening::Renewed { margin }) => Some(*margin),
        _ => None,
    });
    assert_eq!(margin, Duration::from_secs(90));
}

#[test]
fn result_that_the_stream_tells_before_its_request_is_answered_is_counted_once() {
    let mut world = World::served(vec![bash("t1")]);
    let call_id = world.call_asked();
    world.finished(&call_id, "done");
    world.post_asked();
    world.live(result_of("t1"));
    world.posted("t1", Ok(()));
    assert_eq!(world.asked(|action| matches!(action, Action::Count(Happening::Posted { .. }))), 1);
}
