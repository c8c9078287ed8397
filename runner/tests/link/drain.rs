//! F-63: emptying a runner, from above by its orchestrator and from below by signals.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::daemon::End;
use runner::dev::LinkSettings;
use runner::journal::Volatile;

use crate::process::Process;
use crate::world::{Options, World, within};

fn bash(command: &str) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() })
}

fn drain(mode: pb::DrainMode, deadline: Option<Duration>) -> pb::Drain {
    let deadline = deadline.map(|time| time.try_into().unwrap());
    pb::Drain { mode: mode.into(), deadline, reason: "test".into() }
}

fn options() -> Options {
    let link = LinkSettings { heartbeat_every: Duration::from_millis(50), ..LinkSettings::default() };
    Options { link, ..Options::default() }
}

#[tokio::test]
async fn what_is_left_at_the_deadline_is_ended() {
    let world = World::new(options()).await;
    let session = within("session", world.session("s")).await;
    session.send("c", bash("print 10; hang"));
    within("started", session.started("c")).await.unwrap();

    world.orchestrator.drain(drain(pb::DrainMode::FinishSessions, Some(Duration::from_millis(1))));

    let finished = within("c", session.outcome("c")).await.unwrap();
    assert!(matches!(finished.message.outcome.unwrap().kind, Some(Kind::Cancelled(_))));
    let status = within("status", world.orchestrator.drained(|status| status.complete)).await.unwrap();
    assert_eq!((status.sessions_left, status.calls_left), (0, 0));
    assert_eq!(world.fakes.closed.load(Ordering::SeqCst), 1);
    let refused = world.orchestrator.open_session(pb::OpenSession { session_id: "t".into(), ..Default::default() });
    assert!(within("refusal", refused).await.unwrap_err().to_string().contains("DRAINING"));
}

#[tokio::test]
async fn taking_work_again_ends_the_deadline_of_a_drain_and_has_none_of_its_own() {
    let world = World::new(options()).await;
    let session = within("session", world.session("s")).await;
    world.orchestrator.drain(drain(pb::DrainMode::FinishSessions, Some(Duration::from_secs(3600))));
    within("status", world.orchestrator.drained(|_| true)).await.unwrap();

    world.orchestrator.drain(drain(pb::DrainMode::Resume, Some(Duration::ZERO)));

    // Deadlines are looked at once a second.
    let (before, _) = world.orchestrator.heartbeats();
    within("heartbeats", async {
        while world.orchestrator.heartbeats().0 < before + 30 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    within("call", session.bash("c", "print 10")).await.unwrap();
    within("another session", world.session("t")).await;
    assert_eq!(world.fakes.closed.load(Ordering::SeqCst), 0);
    let health = world.orchestrator.heartbeats().1.unwrap().health();
    assert_eq!(health, pb::HealthState::Ready);
}

#[tokio::test]
async fn how_far_a_drain_has_come_is_told_again_on_a_new_link() {
    let world = World::new(options()).await;
    let _session = within("session", world.session("s")).await;
    world.orchestrator.drain(drain(pb::DrainMode::FinishSessions, None));
    within("status", world.orchestrator.drained(|_| true)).await.unwrap();
    let links = world.orchestrator.links();

    world.wire.cut();

    within("link", async {
        while world.orchestrator.links() == links {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let status = within("status", world.orchestrator.drained(|_| true)).await.unwrap();
    assert_eq!((status.sessions_left, status.complete), (1, false));
}

#[tokio::test]
async fn second_signal_ends_what_runs_and_its_result_is_delivered_before_the_goodbye() {
    let process = Process::start(Arc::new(Volatile)).await;
    let (orchestrator, session) = (&process.orchestrator, &process.session);
    session.send("c", bash("print 10; hang"));
    within("started", session.started("c")).await.unwrap();

    kill(Pid::this(), Signal::SIGTERM).unwrap();
    let status = within("drain", orchestrator.drained(|_| true)).await.unwrap();
    assert_eq!((status.sessions_left, status.calls_left), (1, 1), "accepted calls may end by themselves");
    // Nobody but the operator takes that back.
    orchestrator.drain(drain(pb::DrainMode::Resume, None));
    kill(Pid::this(), Signal::SIGTERM).unwrap();

    let finished = within("c", session.outcome("c")).await.unwrap();
    assert!(matches!(finished.message.outcome.unwrap().kind, Some(Kind::Cancelled(_))));
    let goodbye = within("goodbye", orchestrator.goodbye()).await.unwrap();
    assert!(!goodbye.sandboxes_kept && goodbye.back_within.is_none());
    assert_eq!(within("end", process.running).await.unwrap().unwrap(), End::Done);
    assert_eq!(process.fakes.closed.load(Ordering::SeqCst), 1);
    assert_eq!(orchestrator.complaints(), Vec::<String>::new());
}
