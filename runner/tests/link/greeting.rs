//! Why a link is made: the first words of a process say what became of the one before.

use proto::runner::v1 as pb;
use runner::dev::{LinkSettings, Orchestrator};
use runner::journal::Recovered;
use tokio::net::{TcpListener, TcpStream};

use crate::world::{Options, Runner, World, within};

fn after(same_boot: bool) -> Options {
    let recovered = Recovered { same_boot, events_through: 10, ..Recovered::default() };
    Options { recovered, ..Options::default() }
}

async fn reason(world: &World) -> pb::HelloReason {
    within("runner", world.orchestrator.runner()).await.unwrap().reason()
}

#[tokio::test]
async fn first_start_restart_and_restart_of_the_machine_are_told_apart() {
    assert_eq!(reason(&World::new(Options::default()).await).await, pb::HelloReason::FirstStart);
    assert_eq!(reason(&World::new(after(true)).await).await, pb::HelloReason::DaemonRestart);

    let world = World::new(after(false)).await;
    assert_eq!(reason(&world).await, pb::HelloReason::HostReboot);
    // Until something comes of the link, the runner may not have heard that it was heard.
    let _session = within("session", world.session("s")).await;
    world.wire.cut();
    within("link", async {
        while reason(&world).await == pb::HelloReason::HostReboot {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(reason(&world).await, pb::HelloReason::Reconnect, "once is enough");
}

/// F-18: the network often comes later than the runner.
#[tokio::test]
async fn restart_of_the_machine_is_told_although_the_first_attempt_to_connect_fails() {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let files = orchestrator.write_client_files(directory.path(), "runner-1").unwrap();
    let far = orchestrator.address().port();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let _runner = Runner::dial(listener.local_addr().unwrap().port(), files, after(false));

    drop(within("first attempt", listener.accept()).await.unwrap());
    let (mut near, _) = within("second attempt", listener.accept()).await.unwrap();
    tokio::spawn(async move {
        let mut far = TcpStream::connect(("127.0.0.1", far)).await.unwrap();
        // The link ends with the test.
        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
    });

    let hello = within("runner", orchestrator.runner()).await.unwrap();
    assert_eq!(hello.reason(), pb::HelloReason::HostReboot);
}
