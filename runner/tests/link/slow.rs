//! An orchestrator that takes no output: heartbeats and results go on, and what is not taken stays where it is.

use std::time::Duration;

use proto::runner::v1 as pb;
use runner::dev::LinkSettings;

use crate::world::{Options, World, within};

const NOTHING: LinkSettings = LinkSettings {
    window: 0,
    acknowledge: true,
    lease_ttl: Duration::from_secs(30),
    heartbeat_every: Duration::from_millis(50),
    windows: true,
};

/// F-49: the orchestrator never grants credit.
#[tokio::test]
async fn without_credit_results_and_heartbeats_go_on_and_output_waits() {
    let world = World::new(Options { link: NOTHING, ..Default::default() }).await;
    let session = within("session", world.session("s")).await;
    for number in 0..20 {
        let script = pb::BashInput { command: Some("print 1000000".into()), ..Default::default() };
        session.send(&format!("c{number}"), pb::call::Input::Bash(script));
    }
    for number in 0..20 {
        within("end", session.ended(&format!("c{number}"))).await.unwrap();
    }
    let (before, _) = world.orchestrator.heartbeats();
    within("heartbeats", async {
        while world.orchestrator.heartbeats().0 < before + 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let (_, last) = world.orchestrator.heartbeats();
    assert_eq!(last.unwrap().unacked_output_bytes, 20_000_000);
    // Credit comes: everything arrives, byte for byte.
    world.orchestrator.set(LinkSettings { window: 1 << 20, ..NOTHING });
    for number in 0..20 {
        let finished = within("output", session.outcome(&format!("c{number}"))).await.unwrap();
        assert_eq!(finished.streams[&1].through, 1_000_000);
    }
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// F-50: the orchestrator never acknowledges an event.
#[tokio::test]
async fn caller_that_acknowledges_nothing_is_refused_at_the_bound() {
    let link = LinkSettings { acknowledge: false, ..LinkSettings::default() };
    let core = runner::session::core::Config { unacknowledged_per_session: 8, ..Default::default() };
    let world = World::new(Options { link, core, ..Default::default() }).await;
    let session = within("session", world.session("s")).await;
    for number in 0..8 {
        within("call", session.bash(&format!("c{number}"), "exit 0")).await.unwrap();
    }
    let error = within("call", session.bash("c8", "exit 0")).await.unwrap_err();
    assert!(error.to_string().contains("8 results of this session without acknowledgement"), "{error}");
    world.orchestrator.set(LinkSettings::default());
    within("room", async {
        let mut number = 9;
        while session.bash(&format!("c{number}"), "exit 0").await.is_err() {
            number += 1;
        }
    })
    .await;
}
