//! Whoever takes all that a sandbox may have hurts nobody else: the sessions beside it are served, the link lives, and the
//! runner is not the one that is killed.
//!
//! The built daemon beside a launcher of its own, real sandboxes. What the neighbour of a hog waits is told as a figure.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its record")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::Session;
use sandbox_runner_tests::daemon::{Daemon, Options, bash, small_sandboxes, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;

/// Goes on until it is cancelled, whatever it is refused.
struct Hog {
    name: &'static str,
    command: &'static str,
}

const HOGS: [Hog; 4] = [
    Hog { name: "processes", command: "while :; do sleep 60 & done 2>/dev/null" },
    Hog { name: "files", command: "mkdir many; while :; do seq 100000 | (cd many; xargs touch); done 2>/dev/null" },
    Hog { name: "processor", command: "for i in 1 2 3 4; do (while :; do :; done) & done; wait" },
    Hog { name: "disk", command: "while :; do cat /dev/zero > big; rm -f big; done 2>/dev/null" },
];

/// The longest time of fifty calls, which must succeed.
async fn slowest_call(session: &Session, name: &str) -> Duration {
    let mut slowest = Duration::ZERO;
    for number in 0..50 {
        let id = format!("{name}-{number}");
        let sent = Instant::now();
        let finished = within(&id, session.bash(&id, &format!("echo {id}"))).await.expect("an end");
        slowest = slowest.max(sent.elapsed());
        assert_eq!(finished.streams[&1].bytes, format!("{id}\n").into_bytes());
    }
    slowest
}

fn kind(message: pb::CallFinished) -> Kind {
    message.outcome.and_then(|outcome| outcome.kind).expect("an outcome")
}

async fn end(mut daemon: Daemon, sessions: Vec<Session>) {
    for session in sessions {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

/// F-52: each kind of hog, and a neighbour that is served meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neighbour_is_served_and_the_link_lives_beside_a_hog_of_processes_files_processor_or_disk() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(Options { slots: 4, limits: small_sandboxes(), ..Options::default() }).await;
    let neighbour = daemon.session("neighbour").await;
    let alone = slowest_call(&neighbour, "alone").await;

    for Hog { name, command } in HOGS {
        let hog = daemon.session(name).await;
        hog.send(name, bash(command));
        within(name, hog.started(name)).await.expect("started");
        let beside = slowest_call(&neighbour, name).await;
        println!("figures: slowest of 50 calls beside a hog of {name} {beside:.1?}, alone {alone:.1?}");

        hog.cancel(name, pb::CancelMode::Kill);
        let ended = within(name, hog.ended(name)).await.expect("an end");
        assert!(matches!(kind(ended), Kind::Cancelled(_)), "{name}");
        // Its own session is served again as well.
        let cleaned = within("clean", hog.bash("clean", "rm -rf many big; echo clean")).await.expect("an end");
        assert_eq!(cleaned.streams[&1].bytes, b"clean\n", "{name}");
        within("close", hog.close(Duration::ZERO)).await.expect("the session ends");
    }

    assert_eq!(daemon.orchestrator.links(), 1, "the link was lost");
    end(daemon, vec![neighbour]).await;
}

/// F-53: in every sandbox a command that wants more memory than there may be, all at once, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_hogs_in_every_sandbox_end_at_their_own_limits_and_neither_runner_nor_shells_do() {
    needs_root!();
    let _host = host::shared();
    let count = 6;
    let mut daemon = Daemon::start(Options { slots: count + 2, limits: small_sandboxes(), ..Options::default() }).await;
    let (runner, launcher) = (daemon.runner_pid(), daemon.launcher_pid());
    let mut sessions = Vec::new();
    for number in 0..count {
        sessions.push(daemon.session(&format!("hog-{number}")).await);
    }

    for round in 0..3 {
        for (number, session) in sessions.iter().enumerate() {
            session.send(&format!("hog-{number}-{round}"), bash("round=here; tail /dev/zero"));
        }
        for (number, session) in sessions.iter().enumerate() {
            let id = format!("hog-{number}-{round}");
            let ended = within(&id, session.ended(&id)).await.expect("an end");
            let cause = match kind(ended) {
                Kind::OutOfMemory(cause) => cause,
                other => panic!("{id}: {other:?}"),
            };
            assert_eq!(cause.limit_bytes, 128 << 20, "{id}: {cause:?}");
            let next = within("next", session.bash(&format!("next-{id}"), "echo $round")).await.expect("an end");
            assert_eq!(next.streams[&1].bytes, b"here\n", "{id}");
        }
    }

    assert_eq!((daemon.runner_pid(), daemon.launcher_pid()), (runner, launcher));
    assert!(daemon.is_alive());
    assert_eq!(daemon.orchestrator.links(), 1, "the link was lost");
    end(daemon, sessions).await;
}
