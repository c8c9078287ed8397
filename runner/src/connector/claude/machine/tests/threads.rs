//! Threads of a session: whose turn it is, and whom interrupts and ends concern.

use super::*;

fn seen(thread: &str) -> Value {
    in_thread(json!({"type": "session.thread_status_running"}), thread)
}

fn created(thread: &str) -> Value {
    in_thread(json!({"type": "session.thread_created"}), thread)
}

#[test]
fn threads_run_beside_each_other_and_each_in_its_order_and_commands_one_at_a_time() {
    let mut world = World::parallel(vec![
        bash("own1"),
        reading("own2"),
        in_thread(reading("a1"), "th_a"),
        in_thread(reading("a2"), "th_a"),
        in_thread(bash("b1"), "th_b"),
        in_thread(reading("c1"), "th_c"),
    ]);
    let begun = |world: &mut World, ids: &[&str]| {
        for id in ids {
            assert_eq!(world.call_asked(), format!("claude:env_1:{id}"));
        }
        assert_eq!(world.calls_asked(), 0, "after {ids:?}");
    };
    begun(&mut world, &["own1", "a1", "c1"]);
    world.finished("claude:env_1:a1", "x");
    begun(&mut world, &["a2"]);
    world.finished("claude:env_1:c1", "x");
    begun(&mut world, &[]);
    world.finished("claude:env_1:own1", "x");
    begun(&mut world, &["own2", "b1"]);
}

/// As the official worker does.
#[test]
fn tool_uses_of_all_threads_run_one_after_the_other_unless_the_operator_wants_it_otherwise() {
    let mut world = World::served(vec![
        reading("own1"),
        in_thread(reading("a1"), "th_a"),
        reading("own2"),
        in_thread(bash("b1"), "th_b"),
    ]);
    for id in ["own1", "a1", "own2", "b1"] {
        assert_eq!(world.call_asked(), format!("claude:env_1:{id}"));
        assert_eq!(world.calls_asked(), 0, "beside {id}");
        world.finished(&format!("claude:env_1:{id}"), "x");
    }
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
fn interrupt_that_names_the_thread_of_the_session_concerns_its_calls_and_no_others() {
    for other_first in [false, true] {
        let mut threads = vec![seen("th_own"), created("th_a"), seen("th_a")];
        if other_first {
            threads.rotate_left(1);
        }
        threads.extend([bash("own"), in_thread(reading("a1"), "th_a")]);
        let mut world = World::served(threads);
        world.asked.clear();
        world.live(in_thread(interrupt(), "th_own"));
        let cancelled = [("claude:env_1:own".to_owned(), CancelMode::Interrupt)];
        assert_eq!(world.cancels_asked(), cancelled, "{other_first}");
    }
}

#[test]
fn interrupt_without_a_usable_thread_is_none() {
    let mut world = World::served(vec![bash("t1")]);
    for thread in [json!("../x"), json!(3), json!("")] {
        world.live(json!({"type": "user.interrupt", "session_thread_id": thread}));
    }
    assert_eq!(world.cancels_asked(), []);
    world.live(json!({"type": "user.interrupt", "session_thread_id": null}));
    assert_eq!(world.cancels_asked().len(), 1);
}

#[test]
fn interrupted_calls_are_answered_at_once_although_their_turn_has_not_come() {
    let mut world = World::served(vec![bash("t1"), bash("t2"), in_thread(bash("a1"), "th_a")]);
    world.call_asked();
    world.live(interrupt());
    assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Interrupt)]);
    let mut answered = [world.post_asked(), world.post_asked()].map(|(id, text)| format!("{id}: {text}"));
    answered.sort();
    assert_eq!(answered, ["a1: interrupted by user", "t2: interrupted by user"]);
    assert_eq!(world.calls_asked(), 0);
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
