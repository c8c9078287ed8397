//! A runner goes away without a word, and the next one takes over its sandboxes: what runs goes on, what is over is told,
//! what never began can be dropped, and nobody obeys the old one.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use runner::sandbox::control::{Control, ControlEnd, ControlError, Patience, Violation};
use runner::work::{
    CallId, CallLimits, Code, FoundCall, Gate, Outcome, PreparedCall, Receipt, Sandbox, Sandboxes, Stream,
};
use sandbox_runner_tests::successor::{Host, Listener, bash, call_id, exec, expected, read, sandbox_id};
use sandbox_runner_tests::{host, needs_root};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;

/// Lines of the call that runs across the change, one each hundredth of a second.
const LINES: u32 = 500;
/// Length of what stands behind the number of each line: even a slow machine prints more than a pipe holds while nobody is there.
const PAD: usize = 20_000;
/// How long nobody is there.
const AWAY: Duration = Duration::from_millis(1500);
/// Sandboxes that are taken over side by side.
const SANDBOXES: u32 = 24;

async fn run(control: &Control, call: &PreparedCall) -> Vec<u8> {
    let listener = Arc::new(Listener::default());
    control.start_call(call, listener.clone()).await.expect("prepared");
    let mut end = listener.end().await;
    assert_eq!(end.outcome, Outcome::Exited { code: 0 });
    end.streams.pop().and_then(|stream| stream.inline).unwrap_or_default()
}

async fn start(control: &Control, call: &PreparedCall) -> Arc<Listener> {
    let listener = Arc::new(Listener::default());
    control.start_call(call, listener.clone()).await.expect("prepared");
    listener
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sandbox_and_calls_outlive_their_runner() {
    needs_root!();
    let _host = host::shared();
    let host = Host::start(2);
    let first = host.runner(1);
    let (_, control) = host.make(&first, 1, "survivor").await;
    run(&control, &bash("over", "KEPT=yes; cd /tmp; echo first", Gate::Open)).await;
    start(&control, &exec("large", &["seq", "1", "40000"], Gate::Open)).await.end().await;
    start(&control, &exec("held", &["touch", "/tmp/held-ran"], Gate::Held)).await;
    start(&control, &exec("unrecorded", &["touch", "/tmp/unrecorded-ran"], Gate::Held)).await;
    start(&control, &exec("unknown", &["sleep", "617"], Gate::Open)).await;
    let limits = CallLimits { timeout: Some(AWAY / 3), grace: AWAY / 10, ..CallLimits::default() };
    start(&control, &PreparedCall { limits, ..exec("limited", &["sleep", "618"], Gate::Open) }).await;
    let script = format!(
        "pad=$(printf %0{PAD}d 0); for i in $(seq 1 {LINES}); do echo $i $pad; sleep 0.01; done; echo $KEPT $PWD"
    );
    let long = start(&control, &bash("long", &script, Gate::Open)).await;
    long.output().await;
    let mut printed = read(&control, "long").await;
    assert!(!printed.is_empty());

    drop((control, first));
    tokio::time::sleep(AWAY).await;
    let second = host.runner(2);
    let names = ["over", "large", "limited", "long", "never-arrived"].map(|id| (id, Gate::Open));
    let (calls, listeners): (Vec<_>, Vec<_>) =
        names.into_iter().chain([("held", Gate::Held)]).map(|(id, gate)| expected(id, gate)).unzip();
    let attached = second.attach(sandbox_id("survivor"), Receipt::default(), calls).await.expect("taken over");

    let found = [
        ("over", FoundCall::Finished),
        ("large", FoundCall::Finished),
        ("limited", FoundCall::Finished),
        ("long", FoundCall::Running),
    ];
    assert_eq!(attached.found, found.map(|(id, found)| (call_id(id), found)).into());
    let sandbox = attached.sandbox;
    let [over, large, limited, long, never, held] = &listeners[..] else { panic!("six calls") };
    assert_eq!(over.end().await.streams[0].inline.as_deref(), Some(&b"first\n"[..]));
    assert!(matches!(limited.end().await.outcome, Outcome::TimedOut { .. }), "its limit was enforced meanwhile");
    let mut numbers = String::new();
    (1..=40_000).for_each(|number| writeln!(numbers, "{number}").expect("memory"));
    let end = large.end().await;
    assert_eq!(end.streams[0].sha256, <[u8; 32]>::from(Sha256::digest(&numbers)));
    assert_eq!(read_sandbox(&*sandbox, "large", 0).await, numbers.as_bytes());

    // More than a pipe holds: it was read while nobody was there.
    assert!(long.output().await.get(Stream::Stdout) > printed.len() as u64 + 65_536);
    // The rest of the output begins where the first runner has stopped reading.
    printed.extend(read_sandbox(&*sandbox, "long", printed.len() as u64).await);
    let end = long.end().await;
    let mut wanted: String = (1..=LINES).fold(String::new(), |text, line| text + &format!("{line} {:0>PAD$}\n", 0));
    wanted.push_str("yes /tmp\n");
    assert!(printed == wanted.as_bytes(), "{} bytes of {} and not the same", printed.len(), wanted.len());
    assert_eq!(end.outcome, Outcome::Exited { code: 0 });
    assert_eq!(end.streams[0].sha256, <[u8; 32]>::from(Sha256::digest(&wanted)));
    assert_eq!(end.streams[0].total_bytes, wanted.len() as u64);

    let again = Arc::new(Listener::default());
    let held_again = exec("held", &["echo", "handed over anew"], Gate::Open);
    sandbox.start_call(held_again, again.clone()).await.expect("it was dropped, because it had not begun");
    assert_eq!(again.end().await.streams[0].inline.as_deref(), Some(&b"handed over anew\n"[..]));
    for id in ["over", "large", "limited", "long"] {
        sandbox.acknowledge(&call_id(id)).await.expect("it is over");
    }
    let look =
        "echo $KEPT; ls /tmp; cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 61[78]'; true";
    let listener = Arc::new(Listener::default());
    sandbox.start_call(bash("look", look, Gate::Open), listener.clone()).await.expect("prepared");
    let end = listener.end().await;
    assert_eq!(end.streams[0].inline.as_deref(), Some(&b"yes\n0\n"[..]), "{end:?}");
    assert!(never.events().is_empty() && held.events().is_empty());
    sandbox.close(Duration::ZERO).await;
    assert_eq!(second.launcher().list().await.expect("the launcher answers"), []);
}

async fn read_sandbox(sandbox: &dyn Sandbox, id: &str, mut offset: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let chunk = sandbox.read_output(&call_id(id), Stream::Stdout, offset, 65_536).await.expect("output");
        assert_eq!(chunk.offset, offset, "bytes are missing");
        offset += chunk.bytes.len() as u64;
        if chunk.bytes.is_empty() && !chunk.end {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bytes.extend(chunk.bytes);
        if chunk.end {
            return bytes;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_obeys_a_runner_that_was_replaced() {
    needs_root!();
    let _host = host::shared();
    let host = Host::start(2);
    let runner = host.runner(5);
    let (created, old) = host.make(&runner, 5, "replaced").await;
    start(&old, &bash("held", "echo ran > /tmp/held-ran", Gate::Held)).await;
    let path = host.sockets().join(&created.socket_name);
    let attach = |generation, calls, answer| {
        let path = path.clone();
        let patience = Patience { answer, ..Patience::default() };
        async move { Control::attach(&path, "", generation, patience, calls).await }
    };
    let calls = || vec![expected("held", Gate::Held).0];
    let patient = Patience::default().answer;

    let new = attach(6, calls(), patient).await.expect("taken over");

    // The old runner still lives, and wants to go on.
    assert_eq!(old.ended().await, ControlEnd::Closed);
    assert_eq!(old.go("held").await, Err(ControlError::Ended(ControlEnd::Closed)));
    assert_eq!(new.found, [(call_id("held"), FoundCall::Prepared)].into());
    // It connects again, and gets no answer: what it says is not even refused.
    let late = attach(5, calls(), Duration::from_millis(500)).await.err();
    let silence = Violation::Silence { request: "hello", after: Duration::from_millis(500) };
    assert_eq!(late, Some(ControlError::Ended(ControlEnd::Violated(silence))));
    let newest = attach(7, calls(), patient).await.expect("taken over again");
    assert_eq!(newest.found, [(call_id("held"), FoundCall::Prepared)].into());
    newest.control.abort("held").await.expect("it never began");
    assert_eq!(run(&newest.control, &bash("look", "ls /tmp", Gate::Open)).await, b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_sandboxes_are_taken_over_side_by_side_and_the_others_ended() {
    needs_root!();
    let _host = host::shared();
    let host = Host::start(SANDBOXES + 4);
    let first = host.runner(1);
    let name = |number: u32| format!("many-{number}");
    let mut pids = Vec::new();
    for number in 0..SANDBOXES + 2 {
        let (created, control) = host.make(&first, 1, &name(number)).await;
        run(&control, &bash("over", &format!("KEPT={number}; echo $KEPT"), Gate::Open)).await;
        start(&control, &exec("running", &["sleep", "600"], Gate::Open)).await;
        pids.push(created.pid);
    }
    drop(first);
    // One that ends while nobody is there, and one that nobody wants.
    let (ended, unwanted) = (name(SANDBOXES), name(SANDBOXES + 1));
    host::kill_now(pids[SANDBOXES as usize]);

    let second = host.runner(2);
    let begin = Instant::now();
    let mut attaching = JoinSet::new();
    for number in 0..SANDBOXES {
        let (second, id) = (second.clone(), sandbox_id(&name(number)));
        attaching.spawn(async move {
            let (calls, listeners): (Vec<_>, Vec<_>) =
                ["over", "running"].map(|id| expected(id, Gate::Open)).into_iter().unzip();
            let attached = second.attach(id, Receipt::default(), calls).await.expect("taken over");
            (number, attached, listeners)
        });
    }
    let taken = attaching.join_all().await;
    println!("{} sandboxes taken over in {} ms", taken.len(), begin.elapsed().as_millis());

    let found: [(CallId, FoundCall); 2] =
        [("over", FoundCall::Finished), ("running", FoundCall::Running)].map(|(id, found)| (call_id(id), found));
    for (number, attached, listeners) in &taken {
        assert_eq!(attached.found, found.clone().into());
        assert_eq!(listeners[0].end().await.streams[0].inline.as_deref(), Some(format!("{number}\n").as_bytes()));
    }
    let failure = second.attach(sandbox_id(&ended), Receipt::default(), Vec::new()).await.expect_err("it is gone");
    assert_eq!(failure.code, Code::SandboxLost);
    second.end_others(&[]).await.expect("the launcher answers");
    let listed = second.launcher().list().await.expect("the launcher answers");
    assert_eq!(listed.len(), taken.len());
    assert!(!listed.iter().any(|entry| entry.sandbox_id == unwanted || entry.sandbox_id == ended));
    assert!(listed.iter().all(|entry| entry.id_count == 65_536 && entry.output_directory.is_empty()));
    for (_, attached, _) in taken {
        attached.sandbox.close(Duration::ZERO).await;
    }
    assert_eq!(second.launcher().list().await.expect("the launcher answers"), []);
}
