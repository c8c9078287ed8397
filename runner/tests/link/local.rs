//! The administration socket and the composition root.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::admin::v1 as admin;
use proto::admin::v1::admin_service_client::AdminServiceClient;
use proto::runner::v1 as pb;
use runner::admin::{Counted, Parts, SocketError};
use runner::daemon::{AdminSocket, Daemon, DaemonError};
use runner::dev::{LinkSettings, Orchestrator};
use runner::journal::{Journal, JournalError, Record, Volatile};
use runner::work::BoxFuture;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::fake::{FakeSandboxes, Fakes, bytes_of};
use crate::world::{DEFAULTS, Options, RESERVE, World, calm, settings, within};

async fn client(path: &std::path::Path) -> AdminServiceClient<Channel> {
    let path = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://local").connect_with_connector(connector).await.unwrap();
    AdminServiceClient::new(channel)
}

fn parts(world: &World, path: std::path::PathBuf) -> Parts {
    let own_uid = nix::unistd::geteuid().as_raw();
    let (sessions, link) = (world.sessions.clone(), Some(world.connector.status.clone()));
    let sandboxes = Arc::new(FakeSandboxes(Arc::clone(&world.fakes)));
    let counted = Counted { journal: Arc::new(Counting), sandboxes };
    let (queues, clock) = (Vec::new(), || 0);
    Parts { path, own_uid, sessions, link, queues, clock, receipt: Default::default(), pressure: calm(), counted }
}

/// A journal that says that it has refused something.
struct Counting;

impl Journal for Counting {
    fn is_durable(&self) -> bool {
        false
    }

    fn append(&self, record: Record) -> BoxFuture<'static, Result<(), JournalError>> {
        Volatile.append(record)
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        [("journal_refused_total{bound=\"bytes\"}".to_owned(), 7)].into()
    }
}

fn bash(command: &str) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() })
}

async fn collected(mut stream: tonic::Streaming<admin::LogsResponse>) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let Some(piece) = within("logs", stream.message()).await.unwrap() {
        assert_eq!(piece.offset, bytes.len() as u64);
        bytes.extend(piece.data);
    }
    bytes
}

#[tokio::test]
async fn socket_is_private_shows_what_runs_follows_its_output_and_ends_it() {
    let world = World::new(Options::default()).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let _server = runner::admin::serve(parts(&world, path.clone())).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let session = within("session", world.session("s")).await;
    session.send("c", bash("print 100000; hang"));
    session.send("waiting", bash("exit 0"));
    within("started", session.started("c")).await.unwrap();

    let mut client = client(&path).await;
    let list = client.list_sessions(admin::ListSessionsRequest {}).await.unwrap().into_inner();
    let phases: Vec<_> = list.sessions[0].calls.iter().map(|c| (c.call_id.as_str(), c.phase.as_str())).collect();
    assert_eq!(phases, [("c", "running"), ("waiting", "queued")]);
    let target = admin::inspect_request::Target::CallId("c".into());
    let one = client.inspect(admin::InspectRequest { target: Some(target) }).await.unwrap().into_inner();
    assert_eq!((one.session.unwrap().calls.len(), one.receipt.unwrap().tier.as_str()), (1, "fake"));

    let request = admin::LogsRequest { call_id: "c".into(), follow: true, ..Default::default() };
    let logs = client.logs(request).await.unwrap().into_inner();
    let reading = tokio::spawn(collected(logs));
    let target = admin::kill_request::Target::CallId("c".into());
    client.kill(admin::KillRequest { target: Some(target) }).await.unwrap();
    let finished = within("c", session.outcome("c")).await.unwrap();
    assert!(matches!(finished.message.outcome.unwrap().kind, Some(pb::outcome::Kind::Cancelled(_))));
    // The call may be acknowledged and forgotten before the reader is through; what it got is right all the same.
    let bytes = within("logs", reading).await.unwrap();
    assert!(bytes_of("c", 100_000).starts_with(&bytes));

    let status = client.status(admin::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.link.as_str(), status.sessions), ("connected", 1));
    let number = |name: &str| status.numbers.iter().find(|number| number.name == name).map(|number| number.value);
    assert_eq!(number("journal_refused_total{bound=\"bytes\"}"), Some(7));
    assert_eq!(number("fakes_created_total"), Some(1));
    let target = admin::kill_request::Target::SessionId("s".into());
    client.kill(admin::KillRequest { target: Some(target) }).await.unwrap();
    within("end", async {
        while !world.sessions.view().await.unwrap().sessions.is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let gone =
        client.inspect(admin::InspectRequest { target: Some(admin::inspect_request::Target::SessionId("s".into())) });
    assert!(gone.await.unwrap_err().message().contains("session s is not known here"));
}

#[tokio::test]
async fn requests_that_name_nothing_here_are_refused_with_the_fix_and_nothing_ends() {
    use admin::{inspect_request, kill_request};
    let world = World::new(Options {
        link: LinkSettings { acknowledge: false, ..LinkSettings::default() },
        ..Options::default()
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let _server = runner::admin::serve(parts(&world, path.clone())).unwrap();
    let session = within("session", world.session("s")).await;
    session.send("over", bash("print 5"));
    within("over", session.ended("over")).await.unwrap();
    session.send("runs", bash("hang"));
    within("started", session.started("runs")).await.unwrap();

    let mut client = client(&path).await;
    let mut refused = Vec::new();
    let ids = ["nobody", "a b", "", &"x".repeat(300)];
    for id in ids {
        let call = Some(kill_request::Target::CallId(id.into()));
        refused.push(client.kill(admin::KillRequest { target: call }).await.unwrap_err());
        let session = Some(kill_request::Target::SessionId(id.into()));
        refused.push(client.kill(admin::KillRequest { target: session }).await.unwrap_err());
        let call = Some(inspect_request::Target::CallId(id.into()));
        refused.push(client.inspect(admin::InspectRequest { target: call }).await.unwrap_err());
        let logs = admin::LogsRequest { call_id: id.into(), ..Default::default() };
        refused.push(client.logs(logs).await.unwrap_err());
    }
    for status in &refused {
        assert!(status.message().contains("`ps` lists what"), "{status:?}");
    }
    refused.clear();
    refused.push(client.kill(admin::KillRequest { target: None }).await.unwrap_err());
    refused.push(client.inspect(admin::InspectRequest { target: None }).await.unwrap_err());
    let over = Some(kill_request::Target::CallId("over".into()));
    refused.push(client.kill(admin::KillRequest { target: over }).await.unwrap_err());
    let stream = admin::LogsRequest { call_id: "runs".into(), stream: "stdin".into(), ..Default::default() };
    refused.push(client.logs(stream).await.unwrap_err());
    let expected = [
        "target: is missing; name a session or a call",
        "target: is missing; name a session, a call or a work item",
        "call_id: call over has ended already; `logs` shows what it has printed",
        "stream: \"stdin\" is not stdout, stderr, terminal or result",
    ];
    let said: Vec<_> = refused.iter().map(tonic::Status::message).collect();
    assert_eq!(said, expected);

    session.cancel("runs", pb::CancelMode::Kill);
    within("runs", session.ended("runs")).await.unwrap();
    assert_eq!(world.fakes.executions_of("runs"), 1);
}

#[tokio::test]
async fn second_runner_at_the_same_socket_is_refused_and_a_dead_one_is_replaced() {
    let world = World::new(Options::default()).await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let first = runner::admin::serve(parts(&world, path.clone())).unwrap();
    assert!(matches!(runner::admin::serve(parts(&world, path.clone())), Err(SocketError::Taken { .. })));
    first.abort();
    let _ = first.await;
    let _second = runner::admin::serve(parts(&world, path.clone())).unwrap();
    client(&path).await.status(admin::StatusRequest {}).await.unwrap();
}

#[tokio::test]
async fn daemon_ends_in_order_calls_then_sandboxes_then_delivery_then_goodbye() {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let files = orchestrator.write_client_files(directory.path(), "runner-1").unwrap();
    let fakes = Arc::new(Fakes::default());
    let path = directory.path().join("admin.sock");
    let daemon = Daemon::start(runner::daemon::Parts {
        sandboxes: Arc::new(FakeSandboxes(Arc::clone(&fakes))),
        journal: Arc::new(Volatile),
        recovered: Default::default(),
        reserve: RESERVE,
        defaults: DEFAULTS,
        idle: Default::default(),
        pressure: Default::default(),
        link: Some(settings(orchestrator.address().port(), files)),
        queues: Vec::new(),
        admin: Some(AdminSocket { path: path.clone(), own_uid: nix::unistd::geteuid().as_raw() }),
        drain_time: Duration::from_secs(30),
    })
    .unwrap();
    let request = pb::OpenSession { session_id: "s".into(), ..Default::default() };
    let session = within("session", orchestrator.open_session(request)).await.unwrap();
    session.send("c", bash("print 200000; pause 200; print 200000"));
    within("started", session.started("c")).await.unwrap();
    within("end", daemon.end(Duration::from_secs(30))).await;
    let finished = within("c", session.outcome("c")).await.unwrap();
    assert_eq!(finished.streams[&1].through, 400_000);
    within("goodbye", orchestrator.goodbye()).await.unwrap();
    assert_eq!(fakes.closed.load(std::sync::atomic::Ordering::SeqCst), 1);
    assert!(!path.exists());
    assert_eq!(orchestrator.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn daemon_without_usable_certificates_does_not_begin() {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let files = orchestrator.write_client_files(directory.path(), "runner-1").unwrap();
    std::fs::write(&files.key, "nonsense").unwrap();
    let error = Daemon::start(runner::daemon::Parts {
        sandboxes: Arc::new(FakeSandboxes(Arc::default())),
        journal: Arc::new(Volatile),
        recovered: Default::default(),
        reserve: RESERVE,
        defaults: DEFAULTS,
        idle: Default::default(),
        pressure: Default::default(),
        link: Some(settings(1, files)),
        queues: Vec::new(),
        admin: None,
        drain_time: Duration::ZERO,
    })
    .unwrap_err();
    assert!(matches!(error, DaemonError::Certificates(_)));
}
