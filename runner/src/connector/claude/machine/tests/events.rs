//! Histories and streams, permission, tools of others.

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
    assert_eq!((world.call_asked(), world.calls_asked()), ("claude:env_1:t2".to_owned(), 0));
    world.finished("claude:env_1:t2", "x");
    assert_eq!((world.call_asked(), world.calls_asked()), ("claude:env_1:t3".to_owned(), 0));
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
    world.finished("claude:env_1:t1", "x");
    assert_eq!(world.post_asked().0, "t1");
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
fn interrupt_in_the_history_concerns_what_came_before_it_only() {
    let mut world = World::served(vec![bash("t1"), interrupt(), bash("t2")]);
    assert_eq!(world.call_asked(), "claude:env_1:t2");
    assert_eq!((world.post_asked().1.as_str(), world.calls_asked()), ("interrupted by user", 0));
}

/// Whoever closes each stream at once would otherwise be asked for whole histories as fast as it answers.
#[test]
fn stream_that_ends_as_soon_as_the_history_is_read_is_made_again_later_each_time() {
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
        world.connect(vec![]);
    }
    assert_eq!(waits, [3, 6, 12, 24, 48, 60]);
    world.live(json!({"type": "user.message"}));
    let link = world.machine.items[WORK].link_number();
    world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: None });
    world.asked.clear();
    world.pass(1);
    assert_eq!(world.asked(|action| matches!(action, Action::Stream { .. })), 1, "it has brought something");
}

#[test]
fn page_that_leads_to_itself_is_no_history() {
    let mut world = World::served(vec![]);
    let link = world.machine.items[WORK].link_number();
    world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: None });
    world.pass(2);
    let link = world.machine.items[WORK].link_number();
    world.handle(Event::Connected { work_id: WORK.into(), link });
    world.asked.clear();
    for _ in 0..2 {
        let page = Page { events: vec![], next: Some("same".into()) };
        world.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(page) });
    }
    assert_eq!(world.asked(|action| matches!(action, Action::List { .. })), 1, "only the first time");
    assert_eq!(world.asked(|action| matches!(action, Action::Unstream { .. })), 1);
}

#[test]
fn stream_that_breaks_while_nothing_happens_does_not_set_the_idle_clock_back() {
    let mut world = World::served(vec![end_of_turn()]);
    for _ in 0..3 {
        world.pass_beating(18);
        let link = world.machine.items[WORK].link_number();
        world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: None });
        world.pass_beating(1);
        world.connect(vec![end_of_turn()]);
    }
    assert_eq!(world.stops_asked(), 0);
    world.pass_beating(5);
    assert_eq!(world.stops_asked(), 1, "60 s after the end of the turn");

    let mut world = World::served(vec![end_of_turn()]);
    world.pass_beating(50);
    let link = world.machine.items[WORK].link_number();
    world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: None });
    world.pass_beating(1);
    world.connect(vec![end_of_turn(), json!({"type": "user.message"}), end_of_turn()]);
    world.pass_beating(50);
    assert_eq!(world.stops_asked(), 0, "something has happened meanwhile");
}
