//! Answers that are lost, streams that break, a server that goes away.

use std::time::Duration;

use sandbox_runner_tests::claude::{Breach, Endpoint, Fault, Frame, How, ToolUse, Wire};
use sandbox_runner_tests::needs_official_sdk;

use crate::world::{Served, Whose, World};

pub(crate) async fn lost_answers(world: &World<'_>) -> Served {
    {
        let mut plane = world.mock.lock();
        plane.settings.ttl_seconds = 4;
        for endpoint in
            [Endpoint::Ack, Endpoint::SendEvents, Endpoint::GetSession, Endpoint::Stop, Endpoint::ListEvents]
        {
            plane.faults.push(Fault::next(endpoint, How::LoseResponse));
        }
        plane.faults.push(Fault::times(Endpoint::StreamEvents, 2, How::Status(503)));
        plane.faults.push(Fault::times(Endpoint::Poll, 2, How::StatusRetryAfter(429, 1)));
        plane.faults.push(Fault::next(Endpoint::Heartbeat, How::Status(500)).after(1));
    }
    let (session, mut ids) = world.calls(vec![ToolUse::bash("echo one >> log; cat log")]);
    assert_eq!(world.text(&session, &ids[0]).await, "one");
    // Whoever sends it again has done so by then.
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.mock.lock().faults.push(Fault::next(Endpoint::SendEvents, How::Status(529)));
    ids.push(world.call(&session, ToolUse::bash("echo two >> log; cat log")));
    assert_eq!(world.text(&session, &ids[1]).await, "one\ntwo");
    world.end(&session).await;
    assert_eq!(world.mock.lock().work.len(), 1);
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_answers_repeat_no_command_and_lose_no_result() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let served = lost_answers(&world).await;
    assert!(world.mock.lock().faults.is_empty(), "{:?}", world.mock.lock().faults);
    // The one whose answer was lost is sent again, refused as a second one, and nothing comes of it.
    assert_eq!(world.mock.lock().breaches, [Breach::SecondResult { tool_use_id: served.ids[0].clone() }]);
}

pub(crate) async fn however_events_come(world: &World<'_>) -> Served {
    world.mock.lock().settings.ping_every = Duration::from_millis(100);
    let mark = |name: &str| ToolUse::bash(&format!("echo {name} >> log; tail -n 1 log"));
    // Before the stream is open: from the history. Everything after it: from the stream.
    let (session, ids) = world.calls(vec![mark("history")]);
    assert_eq!(world.text(&session, &ids[0]).await, "history");
    let uses = vec![
        mark("whole"),
        mark("pieces").over(Wire::Pieces(5)),
        mark("lines").over(Wire::ManyLines),
        mark("named").over(Wire::Named(Some("message".to_owned()))),
        mark("twice").over(Wire::Twice),
    ];
    let ids = world.mock.lock().call_tools(&session, uses);
    for id in ids {
        world.mock.result_of(&session, &id).await;
    }
    for frame in
        [b": comment\n\n".to_vec(), b"event: novel.event\ndata: {\"type\":\"novel.event\",\"id\":\"x\"}\n\n".to_vec()]
    {
        world.mock.lock().frame(&session, Frame::Raw(frame));
    }
    // Broken within a frame, without a frame, and by the server's own error: the next connection finds them in the history.
    for one in [mark("cut").over(Wire::CutAfter(25)), mark("absent").over(Wire::Absent)] {
        let id = world.mock.lock().call_tools(&session, vec![one.clone()]).remove(0);
        if one.wire == Wire::Absent {
            world.mock.lock().frame(&session, Frame::End);
        }
        world.mock.result_of(&session, &id).await;
    }
    let error =
        b"event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"busy\"}}\n\n";
    let id = world.mock.lock().call_tools(&session, vec![mark("error").over(Wire::Absent)]).remove(0);
    world.mock.lock().frame(&session, Frame::Raw(error.to_vec()));
    world.mock.lock().frame(&session, Frame::Break);
    world.mock.result_of(&session, &id).await;
    let effects = world.read("log");
    world.end(&session).await;
    assert_eq!(
        effects.lines().collect::<Vec<_>>(),
        ["history", "whole", "pieces", "lines", "named", "twice", "cut", "absent", "error"]
    );
    world.assert_no_breach();
    let ids = world.mock.lock().session(&session).calls.iter().map(|call| call.id.clone()).collect();
    Served { session, ids, effects, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_is_run_once_however_its_event_comes() {
    let python = needs_official_sdk!();
    however_events_come(&World::new(Whose::Official(&python)).await).await;
}

/// Between a call and its result there is a page boundary, and a restart of the server besides.
pub(crate) async fn restart_of_the_server(world: &mut World<'_>) -> Served {
    world.mock.lock().settings.page_limit = 3;
    let (session, ids) = world.calls(vec![
        ToolUse::bash("echo one >> log; cat log"),
        ToolUse::bash("echo 1 > begun; sleep 2; echo two >> log; cat log"),
    ]);
    assert_eq!(world.text(&session, &ids[0]).await, "one");
    world.file("begun").await;
    world.mock.halt().await;
    tokio::time::sleep(Duration::from_millis(2500)).await;
    world.mock.resume().await;
    assert_eq!(world.text(&session, &ids[1]).await, "one\ntwo");
    let third = world.mock.lock().call_tools(&session, vec![ToolUse::bash("cat log")]).remove(0);
    assert_eq!(world.text(&session, &third).await, "one\ntwo");
    world.end(&session).await;
    world.assert_no_breach();
    assert!(world.mock.requests(Endpoint::ListEvents).iter().any(|list| list.incoming.parameter("page").is_some()));
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_of_the_server_repeats_nothing_that_was_answered() {
    let python = needs_official_sdk!();
    restart_of_the_server(&mut World::new(Whose::Official(&python)).await).await;
}
