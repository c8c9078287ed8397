//! Histories and streams, permission, threads, interrupts.

use super::*;

#[test]
fn call_of_history_and_stream_runs_once_and_answered_ones_do_not_run() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    world.beat_asked();
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    let link = world.next("a stream", |action| match action {
        Action::Stream { link, .. } => Some(*link),
        _ => None,
    });
    world.handle(Event::Connected { work_id: WORK.into(), link });
    for event in [bash("t2"), bash("t3")] {
        world.handle(Event::Live { work_id: WORK.into(), link, event: wire::event(event) });
    }
    assert_eq!(world.calls_asked(), 0, "the history may say that they are answered");
    let first = Page { events: [bash("t1"), bash("t2")].map(wire::event).into(), next: Some("p2".into()) };
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(first) });
    let page = world.next("the next page", |action| match action {
        Action::List { page: Some(page), .. } => Some(page.clone()),
        _ => None,
    });
    assert_eq!(page, "p2");
    let second = Page { events: [result_of("t1")].map(wire::event).into(), next: None };
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(second) });
    let ids = [world.call_asked(), world.call_asked()];
    assert_eq!((ids, world.calls_asked()), (["claude:env_1:t2".to_owned(), "claude:env_1:t3".to_owned()], 0));
}

#[test]
fn history_that_cannot_be_read_whole_is_read_again_with_a_new_stream() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    world.beat_asked();
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    let link = world.next("a stream", |action| match action {
        Action::Stream { link, .. } => Some(*link),
        _ => None,
    });
    world.handle(Event::Connected { work_id: WORK.into(), link });
    let page = Page { events: [bash("t1")].map(wire::event).into(), next: Some("p2".into()) };
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(page) });
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Err(status(503)) });
    assert_eq!(world.calls_asked(), 0);
    world.pass(1);
    world.connect(vec![bash("t1"), result_of("t1")]);
    assert_eq!(world.calls_asked(), 0);
}

#[test]
fn stream_that_breaks_is_made_again_later_each_time_and_a_refusal_ends_the_item() {
    let mut world = World::served(vec![]);
    let mut waits = Vec::new();
    for _ in 0..6 {
        let link = world.machine.items[WORK].link_number();
        world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: None });
        let before = world.now;
        while world.machine.items[WORK].link_number() == link {
            world.now += SECOND / 8;
            world.handle(Event::Tick);
        }
        waits.push((world.now - before) * 8 / SECOND);
    }
    assert_eq!(waits, [3, 6, 12, 24, 48, 60]);
    let link = world.machine.items[WORK].link_number();
    world.asked.clear();
    world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: Some(status(404)) });
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn gate_fails_closed() {
    let novel = json!({"type": "agent.tool_use", "id": "t3", "name": "bash", "input": {"command": "x"}, "evaluated_permission": "novel"});
    let denied = json!({"type": "agent.tool_use", "id": "t4", "name": "bash", "input": {"command": "x"}, "evaluated_permission": "deny"});
    let mut world = World::served(vec![
        verdict("t1", "allow"),
        asking("t1"),
        verdict("t2", "allow "),
        asking("t2"),
        novel,
        verdict("t4", "allow"),
        denied,
        verdict("t6", "deny"),
        bash("t6"),
    ]);
    assert_eq!(world.call_asked(), "claude:env_1:t1");
    assert_eq!((world.calls_asked(), world.posts_asked()), (0, 0), "denied ones are answered by the server itself");
    world.live(verdict("t3", "allow"));
    assert_eq!(world.call_asked(), "claude:env_1:t3");
    world.live(asking("t5"));
    world.live(verdict("t5", "deny"));
    world.live(verdict("t5", "allow"));
    assert_eq!((world.calls_asked(), world.posts_asked()), (0, 0));
}

#[test]
fn tools_of_others_are_left_to_them_and_keep_the_item() {
    let custom = json!({"type": "agent.custom_tool_use", "id": "t1", "name": "bash", "input": {}});
    let unknown = json!({"type": "agent.tool_use", "id": "t2", "name": "nosuch", "input": {}});
    let mut world = World::served(vec![custom, unknown, end_of_turn()]);
    world.pass_beating(300);
    assert_eq!((world.calls_asked(), world.posts_asked(), world.stops_asked()), (0, 0, 0));
    world.live(json!({"type": "user.custom_tool_result", "custom_tool_use_id": "t1"}));
    world.live(result_of("t2"));
    world.live(end_of_turn());
    world.pass_beating(61);
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn interrupt_ends_what_runs_and_what_waits_in_its_thread_and_nothing_else() {
    let mut world = World::served(vec![
        in_thread(bash("a1"), "th_a"),
        in_thread(bash("b1"), "th_b"),
        in_thread(asking("a2"), "th_a"),
    ]);
    world.asked.clear();
    world.live(in_thread(interrupt(), "th_a"));
    assert_eq!(world.cancels_asked(), [("claude:env_1:a1".to_owned(), CancelMode::Interrupt)]);
    assert_eq!(world.post_asked(), ("a2".to_owned(), "interrupted by user".to_owned()));
    world.finished("claude:env_1:a1", "part");
    assert_eq!(world.post_asked(), ("a1".to_owned(), "\"part\" true".to_owned()));
    world.live(interrupt());
    assert_eq!(world.cancels_asked(), [("claude:env_1:b1".to_owned(), CancelMode::Interrupt)]);
}

#[test]
fn interrupt_in_the_history_concerns_what_came_before_it_only() {
    let mut world = World::served(vec![bash("t1"), interrupt(), bash("t2")]);
    assert_eq!(world.call_asked(), "claude:env_1:t2");
    assert_eq!((world.post_asked().1.as_str(), world.calls_asked()), ("interrupted by user", 0));
}

#[test]
fn end_of_a_thread_drops_its_calls_without_an_answer() {
    let ended = |thread: &str| in_thread(json!({"type": "session.thread_status_terminated"}), thread);
    let mut world = World::served(vec![in_thread(bash("t1"), "th"), in_thread(asking("t2"), "th")]);
    world.asked.clear();
    world.live(ended("th"));
    world.live(verdict("t2", "allow"));
    world.live(in_thread(bash("t3"), "th"));
    assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Interrupt)]);
    world.finished("claude:env_1:t1", "ended");
    assert_eq!((world.posts_asked(), world.calls_asked()), (0, 0));
    assert_eq!(world.acknowledged(), ["claude:env_1:t1"], "nobody will ask for it");
}
