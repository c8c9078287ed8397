//! Who has the lease, and what happens to who has it no more.

use std::time::Duration;

use sandbox_runner_tests::claude::{Breach, CallState, ControlPlane, Credential, Endpoint, Fate, Fault, How, ToolUse};
use sandbox_runner_tests::needs_official_sdk;

use crate::world::{Served, Whose, World};

/// A lease of two seconds held for four, and more: nobody but the worker had the item.
pub(crate) async fn beats(world: &World<'_>) -> Served {
    world.mock.lock().settings.ttl_seconds = 2;
    let (session, ids) = world.calls(vec![ToolUse::bash("sleep 4; echo slept")]);
    assert_eq!(world.text(&session, &ids[0]).await, "slept");
    let beats = world.mock.requests(Endpoint::Heartbeat);
    let expected: Vec<&str> =
        beats.iter().map(|beat| beat.incoming.parameter("expected_last_heartbeat").unwrap()).collect();
    assert_eq!(expected[0], "NO_HEARTBEAT");
    assert!(expected.len() > 2 && expected[1..].iter().all(|one| one.starts_with("2026-")), "{expected:?}");
    assert!(beats.iter().all(|beat| beat.incoming.parameter("desired_ttl_seconds").is_none()));
    world.end(&session).await;
    assert_eq!(world.mock.lock().work[0].deliveries, 1);
    world.assert_no_breach();
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_heartbeat_expects_what_the_last_one_was_answered_with() {
    let python = needs_official_sdk!();
    beats(&World::new(Whose::Official(&python)).await).await;
}

/// An operator stops the item; an interrupt brings another one.
pub(crate) async fn operator(world: &World<'_>) -> Served {
    world.mock.lock().settings.ttl_seconds = 6;
    let (session, ids) =
        world.calls(vec![ToolUse::bash("echo 1 > begun; sleep 4; echo done"), ToolUse::bash("echo never")]);
    world.file("begun").await;
    let item = world.mock.lock().work[0].id.clone();
    world.mock.lock().stop(&world.environment.id, &item, false, &Credential::ApiKey).unwrap();
    world.mock.stopped(&session).await;
    assert_eq!(world.mock.lock().work.len(), 1, "nothing queues it again by itself");
    Served { session, ids, ..Served::default() }
}

pub(crate) async fn operator_and_interrupt(world: &World<'_>) -> Served {
    let served = operator(world).await;
    world.mock.interrupt(&served.session, None);
    world.mock.result_of(&served.session, &served.ids[1]).await;
    world.mock.stopped(&served.session).await;
    assert_eq!(world.mock.lock().work.len(), 2);
    world.assert_no_breach();
    served
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operator_who_stops_an_item_gets_the_running_call_and_then_a_forced_stop() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let Served { session, ids, .. } = operator(&world).await;
    // The SDK beats no more once it has heard it, so what still runs has one lease of time.
    // The documentation says that a call is ended with an error; the SDK lets it run to its end. What waits is dropped.
    assert_eq!(world.text(&session, &ids[0]).await, "done");
    assert_eq!(world.mock.lock().session(&session).call(&ids[1]).state, CallState::Open);
    world.mock.interrupt(&session, None);
    assert_eq!(world.text(&session, &ids[1]).await, "never");
    world.mock.stopped(&session).await;
    assert_eq!(world.mock.lock().work.len(), 2);
}

/// The lease goes to somebody else while a command runs.
pub(crate) async fn lost_lease(world: &World<'_>) -> Served {
    world.mock.lock().settings.ttl_seconds = 2;
    let (session, ids) = world.calls(vec![ToolUse::bash("echo 1 > begun; sleep 3; echo done >> log; echo done")]);
    world.file("begun").await;
    let item = world.mock.lock().work[0].id.clone();
    world.mock.lock().take_lease_away(&item);
    let refused =
        |plane: &ControlPlane| plane.record.iter().any(|request| request.fate == Fate::Answered(412)).then_some(());
    world.mock.until("a heartbeat that is refused", refused).await;
    // Time enough for a command that goes on.
    tokio::time::sleep(Duration::from_secs(4)).await;
    // It polls again, so it has left the item.
    let polls = world.mock.requests(Endpoint::Poll).len();
    let more = |plane: &ControlPlane| {
        let polled = plane.record.iter().filter(|request| request.endpoint == Some(Endpoint::Poll)).count();
        (polled > polls).then_some(())
    };
    world.mock.until("another poll", more).await;
    assert!(world.mock.requests(Endpoint::Stop).is_empty());
    let effects = world.read("log");
    Served { session, ids, effects, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_lease_is_not_stopped_though_the_result_of_the_running_call_is_still_posted() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let Served { session, ids, .. } = lost_lease(&world).await;
    assert_eq!(world.text(&session, &ids[0]).await, "done");
    assert_eq!(world.mock.lock().breaches, [Breach::ResultAfterLeaseLost { tool_use_id: ids[0].clone() }]);
}

/// The answer to a first heartbeat is lost: the repetition expects none, and the lease has one.
pub(crate) async fn lost_beat(world: &World<'_>) -> Served {
    world.mock.lock().settings.ttl_seconds = 3;
    world.mock.lock().faults.push(Fault::next(Endpoint::Heartbeat, How::LoseResponse));
    let (session, ids) = world.calls(vec![ToolUse::bash("echo served")]);
    // It is refused, leaves the item, and gets it again when its own lease has lapsed.
    assert_eq!(world.text(&session, &ids[0]).await, "served");
    world.end(&session).await;
    let item = world.mock.lock().work[0].clone();
    assert!(item.deliveries == 2 && item.generation == 1, "{item:?}");
    let fates: Vec<Fate> = world.mock.requests(Endpoint::Heartbeat).into_iter().map(|beat| beat.fate).take(2).collect();
    assert_eq!(fates, [Fate::ResponseLost, Fate::Answered(412)]);
    world.assert_no_breach();
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_answer_to_the_first_heartbeat_costs_the_lease() {
    let python = needs_official_sdk!();
    lost_beat(&World::new(Whose::Official(&python)).await).await;
}

/// An item is delivered to two workers at once: whoever comes later hears that it is not its own.
pub(crate) async fn two_workers(world: &mut World<'_>) -> Served {
    world.add_worker().await;
    world.mock.until("two workers that ask at once", |plane| (plane.asking() == 2).then_some(())).await;
    world.mock.lock().duplicate_deliveries = 1;
    let (session, ids) = world.calls(vec![ToolUse::bash("echo once >> log; sleep 2; cat log")]);
    assert_eq!(world.text(&session, &ids[0]).await, "once");
    let refused = |plane: &ControlPlane| {
        plane.record.iter().any(|one| matches!(one.fate, Fate::Answered(409 | 412))).then_some(())
    };
    world.mock.until("a worker that is refused", refused).await;
    let effects = world.read("log");
    world.end(&session).await;
    let plane = world.mock.lock();
    assert_eq!(plane.work[0].deliveries, 2);
    assert_eq!(plane.session(&session).events("user.tool_result").len(), 1);
    assert!(plane.breaches.is_empty(), "{:?}", plane.breaches);
    Served { session, ids, effects, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_workers_with_one_item_one_serves_it() {
    let python = needs_official_sdk!();
    two_workers(&mut World::new(Whose::Official(&python)).await).await;
}

/// The result is refused, and so is the stop; the lease lapses, and the item comes with a token that is accepted.
pub(crate) async fn rejected_token(world: &World<'_>) -> Served {
    world.mock.lock().settings.ttl_seconds = 2;
    let (session, ids) = world.calls(vec![ToolUse::bash("echo ran >> log; echo 1 > begun; sleep 2; echo done")]);
    world.file("begun").await;
    let item = world.mock.lock().work[0].id.clone();
    world.mock.lock().revoke_tokens(&item);
    world.mock.result_of(&session, &ids[0]).await;
    let post = world.mock.requests(Endpoint::SendEvents).pop().unwrap();
    assert_eq!(post.credential, Credential::SessionsToken { work_id: item, generation: 1 });
    let effects = world.read("log");
    world.end(&session).await;
    world.assert_no_breach();
    Served { session, ids, effects, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rejected_token_ends_the_run_and_the_next_delivery_brings_another() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let served = rejected_token(&world).await;
    assert_eq!(world.text(&served.session, &served.ids[0]).await, "done");
    assert_eq!(served.effects, "ran\nran\n", "it runs the command again");
}
