//! The runner goes away, and perhaps another one comes: what process 1 does meanwhile, and what it forgets.

use std::time::{Duration, Instant};

use proto::init::v1::{CallPhase, InputChunk, Snapshot, StartCall, frame, outcome::Kind, request};

use super::ExitReason;
use super::testing::{TestSandbox, exec, patience};

#[test]
fn orphan_time_begins_when_the_last_runner_has_gone_and_ends_when_the_next_one_comes() {
    let orphan_time = Duration::from_millis(400);
    let mut sandbox = TestSandbox::start_with(|context| context.orphan_timeout = Some(orphan_time));
    let mut first = sandbox.connect(1);
    std::thread::sleep(orphan_time * 2);
    assert_eq!(first.exec(&["true"]).code(), 0, "it is no orphan while a runner is there");
    drop(first);
    let mut second = sandbox.connect(2);
    std::thread::sleep(orphan_time * 2);
    assert_eq!(second.exec(&["true"]).code(), 0, "the next runner has come in time");

    let gone = Instant::now();
    drop(second);

    assert_eq!(sandbox.join(), ExitReason::Orphaned);
    assert!(gone.elapsed() >= orphan_time, "it has all of its time");
}

#[test]
fn time_limit_of_a_call_is_enforced_while_no_runner_is_there() {
    let sandbox = TestSandbox::start();
    let mut first = sandbox.connect(1);
    let call = first.call(exec(&["sleep", "60"]));
    let call_id = first.start(StartCall { timeout_ms: 100, grace_ms: 100, ..call });
    drop(first);
    std::thread::sleep(Duration::from_millis(1000));

    let mut second = sandbox.connect(2);
    let frame::Body::Snapshot(snapshot) = second.ask(request::Body::Snapshot(Snapshot {})) else { panic!("none") };

    assert_eq!(snapshot.calls[0].phase(), CallPhase::Finished, "it was ended before anybody asked");
    assert!(matches!(second.finish(&call_id).kind(), Kind::TimedOut(_)));
}

#[test]
fn output_is_read_while_no_runner_is_there_and_a_flood_does_not_wait_for_one() {
    let sandbox = TestSandbox::start();
    let mut first = sandbox.connect(1);
    let call = first.call(exec(&["sh", "-c", "head -c 3000000 /dev/zero; touch written"]));
    let call_id = first.start(call);
    drop(first);

    // More than any pipe holds, so somebody must have read it.
    let until = Instant::now() + patience();
    while !sandbox.work().join("written").exists() {
        assert!(Instant::now() < until, "nobody reads");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(sandbox.connect(2).finish(&call_id).finished.streams[0].total_bytes, 3_000_000);
}

#[test]
fn input_that_an_earlier_runner_left_half_sent_takes_no_room() {
    let sandbox = TestSandbox::start();
    for generation in 1..20 {
        let mut client = sandbox.connect(generation);
        for call in 0..8 {
            let call_id = format!("left-{generation}-{call}");
            client.done(request::Body::InputChunk(InputChunk { call_id, offset: 0, data: vec![b'x'; 1000] }));
        }
    }
    assert_eq!(sandbox.connect(20).exec(&["true"]).code(), 0);
}
