//! Runners that are not to be served: with a copied or an old state, with a revoked certificate. Each hears why, asks again
//! slowly, and disturbs nobody.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::connector::orchestrator::{Handle, Refusal};
use runner::dev::pki::{Issued, Validity};
use runner::dev::{Denied, LinkSettings};
use runner::journal::RecoveredPhase;
use runner::session::core::CallStage;
use runner::work::CallId;

use crate::scripted::{self, Script, welcome};
use crate::versions::{greet, hello};
use crate::world::{Options, Runner, World, boottime_ns, left, within};

fn bash(command: &str) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() })
}

/// A runner that keeps what it knows, as this process.
fn durable(instance: &'static str) -> Options {
    Options { instance, ephemeral: false, ..Options::default() }
}

/// Waits until a runner has heard that it is refused, and checks that it tells its operator what to do.
async fn refused(connector: &Handle, refusal: Refusal) {
    let mut status = connector.status.clone();
    let told = status.wait_for(|status| status.refusal == Some(refusal));
    let status = within(refusal.name(), told).await.unwrap().clone();
    assert!(!status.connected);
    let alarms = status.alarms();
    assert!(alarms[0].contains(refusal.name()) && alarms[0].contains(refusal.remediation()), "{alarms:?}");
}

/// A first runner with a call that runs, and what it must still be able to do.
async fn first() -> (World, runner::dev::Session) {
    let world = World::new(durable("first")).await;
    let session = within("session", world.session("s")).await;
    session.send("runs", bash("print 70000; hang"));
    within("start", session.started("runs")).await.unwrap();
    (world, session)
}

async fn goes_on(world: &World, session: &runner::dev::Session) {
    within("next", session.stdin("runs", 0, b"x", false)).await.unwrap();
    session.cancel("runs", pb::CancelMode::Kill);
    let finished = within("runs", session.outcome("runs")).await.unwrap();
    assert!(matches!(finished.message.outcome.unwrap().kind, Some(Kind::Cancelled(_))));
    within("next", session.bash("next", "print 5")).await.unwrap();
    assert_eq!((world.fakes.executions_of("runs"), world.orchestrator.links()), (1, 1));
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// F-44, F-66: the copy was made before the first runner had done anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_with_an_older_copy_of_the_state_is_refused_and_the_first_one_goes_on() {
    let (world, session) = first().await;

    let copy = Runner::dial(world.orchestrator.address().port(), world.files.clone(), durable("copy"));

    refused(&copy.connector, Refusal::StateRolledBack).await;
    goes_on(&world, &session).await;
    // Without patience it would have asked a thousand times by now.
    assert_eq!(world.orchestrator.refused_links().len(), 1, "{:?}", world.orchestrator.refused_links());
    assert_eq!(copy.fakes.created.load(Ordering::SeqCst), 0);
}

/// F-66: the numbers of the old state are above all that was used, because they are reserved in blocks; what it does not know
/// gives it away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_does_not_know_what_was_accepted_or_has_started_is_refused_whatever_numbers_it_gives() {
    for recovered in [left("another", RecoveredPhase::Accepted, None), left("runs", RecoveredPhase::Accepted, None)] {
        let (world, session) = first().await;

        let options = Options { recovered, ..durable("set back") };
        let copy = Runner::dial(world.orchestrator.address().port(), world.files.clone(), options);

        refused(&copy.connector, Refusal::StateRolledBack).await;
        goes_on(&world, &session).await;
    }
}

/// F-66: the call has ended, and would begin a second time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_in_which_a_call_waits_that_has_ended_is_refused() {
    let (world, session) = first().await;
    session.cancel("runs", pb::CancelMode::Kill);
    within("runs", session.outcome("runs")).await.unwrap();
    within("next", session.bash("next", "print 5")).await.unwrap();

    let options = Options { recovered: left("next", RecoveredPhase::Accepted, None), ..durable("set back") };
    let copy = Runner::dial(world.orchestrator.address().port(), world.files.clone(), options);

    refused(&copy.connector, Refusal::StateRolledBack).await;
    assert_eq!((world.fakes.executions_of("next"), copy.fakes.executions_of("next")), (1, 0));
}

/// F-44, F-66: nothing of what it does not know could run again, but it would end the session of the runner that does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_does_not_know_of_calls_that_have_ended_and_are_acknowledged_is_refused_by_their_number() {
    let (world, session) = first().await;
    session.cancel("runs", pb::CancelMode::Kill);
    within("runs", session.outcome("runs")).await.unwrap();
    within("after", session.bash("after-the-copy", "print 5")).await.unwrap();

    let mut recovered = left("none", RecoveredPhase::Accepted, Some("sandbox"));
    recovered.calls.clear();
    recovered.sessions[0].acknowledged = vec![CallId::new("runs").unwrap()];
    let options = Options { recovered, ..durable("set back") };
    let copy = Runner::dial(world.orchestrator.address().port(), world.files.clone(), options);

    refused(&copy.connector, Refusal::StateRolledBack).await;
    within("next", session.bash("next", "print 5")).await.unwrap();
    assert_eq!(world.orchestrator.links(), 1);
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// F-44: a copy that is as new as the original cannot be told from the next process of it. It is when the original comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_runners_with_one_state_are_a_conflict_and_no_call_runs_twice() {
    let (world, session) = first().await;

    let options = Options { recovered: left("runs", RecoveredPhase::Started, Some("not-here")), ..durable("copy") };
    let copy = Runner::dial(world.orchestrator.address().port(), world.files.clone(), options);

    refused(&world.connector, Refusal::RunnerIdConflict).await;
    let finished = within("runs", session.outcome("runs")).await.unwrap();
    assert!(matches!(finished.message.outcome.unwrap().kind, Some(Kind::Indeterminate(_))));
    assert_eq!((world.fakes.executions_of("runs"), copy.fakes.executions_of("runs")), (1, 0));
    assert!(copy.connector.status.borrow().connected);
}

/// F-44: somebody has the key and the certificate, and a state directory of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_with_another_state_under_the_same_name_is_refused_while_the_lease_of_the_first_one_holds() {
    let (world, session) = first().await;

    let options = Options { state: "another", ..durable("thief") };
    let thief = Runner::dial(world.orchestrator.address().port(), world.files.clone(), options);

    refused(&thief.connector, Refusal::RunnerIdConflict).await;
    goes_on(&world, &session).await;
}

/// F-66: the orchestrator does not notice, so the runner does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_sees_by_itself_that_more_was_acknowledged_than_it_has_told() {
    let open = pb::OpenSession { session_id: "s".into(), epoch: 1, ..Default::default() };
    let orders = vec![(13, pb::orchestrator_frame::Body::OpenSession(open))];
    let ahead = pb::Welcome { event_ack_through: 1_000, ..welcome(1) };
    let world = scripted::World::with(durable("set back"), Script::answering([(ahead, orders)])).await;

    refused(&world.runner.connector, Refusal::StateRolledBack).await;

    let problem = world.runner.connector.status.borrow().problem.clone();
    assert!(problem.contains("event 1000 is acknowledged, and 1 is the next"), "{problem}");
    assert_eq!(world.runner.fakes.created.load(Ordering::SeqCst), 0);
}

/// F-58: revoked by name while a call runs and another waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_runner_loses_its_link_at_once_begins_nothing_more_and_leaves_its_sessions_to_the_orphan_time() {
    let link = LinkSettings {
        lease_ttl: Duration::from_secs(1),
        heartbeat_every: Duration::from_millis(100),
        ..LinkSettings::default()
    };
    let world = World::new(Options { link, ..Options::default() }).await;
    let orphan_ttl = Some(prost_types::Duration { seconds: 100, nanos: 0 });
    let request = pb::OpenSession { session_id: "s".into(), orphan_ttl, ..Default::default() };
    let session = within("session", world.orchestrator.open_session(request)).await.unwrap();
    session.send("runs", bash("pause 2500; print 5"));
    session.send("waits", bash("print 5"));
    within("start", session.started("runs")).await.unwrap();

    world.orchestrator.deny(Denied::Name("runner-1".into()));

    refused(&world.connector, Refusal::CertificateRevoked).await;
    let by_then = boottime_ns() + Duration::from_secs(101).as_nanos() as u64;
    within("the end of what runs", async {
        loop {
            let view = world.sessions.view().await.unwrap();
            let mut calls = view.sessions.iter().flat_map(|session| &session.calls);
            if calls.any(|call| matches!(call.stage, CallStage::Finished(_))) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!((world.fakes.executions_of("runs"), world.fakes.executions_of("waits")), (1, 0));
    let deadlines = world.fakes.deadlines.lock().unwrap().clone();
    assert!(deadlines.len() == 1 && deadlines.values().all(|deadline| *deadline < by_then), "{deadlines:?}");
    assert_eq!(world.orchestrator.links(), 1);
    assert_eq!(world.orchestrator.refused_links(), Vec::<String>::new(), "it does not ask again that soon");
}

/// F-58: revoked by serial number; a new certificate of the same name is good, and is tried without delay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_whose_certificate_was_revoked_comes_back_with_the_next_one() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    session.send("runs", bash("print 70000; hang"));
    within("start", session.started("runs")).await.unwrap();
    let certificate_pem = std::fs::read_to_string(&world.files.certificate).unwrap();
    let revoked = Issued { certificate_pem, key_pem: String::new() };

    world.orchestrator.deny(Denied::Serial(revoked.serial().unwrap()));

    refused(&world.connector, Refusal::CertificateRevoked).await;
    let next = world.orchestrator.authority().client("runner-1", Validity::Now).unwrap();
    std::fs::write(&world.files.certificate, &next.certificate_pem).unwrap();
    std::fs::write(&world.files.key, &next.key_pem).unwrap();
    world.connector.reload.notify_one();
    within("runner", world.orchestrator.runner()).await.unwrap();
    session.cancel("runs", pb::CancelMode::Kill);
    within("runs", session.outcome("runs")).await.unwrap();
    assert_eq!(world.fakes.executions_of("runs"), 1);
    assert_eq!(world.connector.status.borrow().refusal, None);
    assert_eq!(world.orchestrator.refused_links(), Vec::<String>::new());
}

/// F-58: who knocks with a revoked certificate hears so at the greeting, and the enrolment service does not renew it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_certificate_gets_neither_a_link_nor_a_successor() {
    let orchestrator = Arc::new(runner::dev::Orchestrator::start(LinkSettings::default()).await.unwrap());
    let service = orchestrator.start_enrollment().await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    service.issue(Validity::Now, Some(std::time::SystemTime::now()));
    let token = service.token("runner-1");
    crate::enrollment::enroll(crate::enrollment::request(&service, token), directory.path()).await.unwrap();
    orchestrator.deny(Denied::Name("runner-1".into()));
    let files = runner::connector::enrollment::files(directory.path());
    let renewal = Some(runner::connector::enrollment::Renewal { directory: directory.path().to_owned(), proxy: None });

    let runner = Runner::dial(orchestrator.address().port(), files, Options { renewal, ..durable("revoked") });

    refused(&runner.connector, Refusal::CertificateRevoked).await;
    let mut status = runner.connector.status.clone();
    let told = status.wait_for(|status| status.certificate.renewal.contains("was revoked"));
    drop(within("refusal of the renewal", told).await.unwrap());
    assert_eq!((orchestrator.links(), service.issued().1), (0, 0));
    assert!(orchestrator.refused_links()[0].starts_with("CERT_REVOKED: every certificate of runner-1 was revoked"));
}

/// Whoever has a good certificate is still nobody else.
#[tokio::test]
async fn runner_that_greets_under_another_name_than_its_certificate_has_is_refused_by_name() {
    let another = pb::RunnerIdentity { runner_id: "runner-2".into(), ..Default::default() };
    let (orchestrator, _sender, mut incoming) =
        within("greeting", greet(pb::Hello { runner: Some(another), ..hello([0, 0]) })).await;

    let status = within("refusal", incoming.message()).await.unwrap_err();

    let refusal = status.metadata().get("refusal").and_then(|name| name.to_str().ok());
    assert_eq!((status.code(), refusal), (tonic::Code::PermissionDenied, Some(Refusal::IdentityMismatch.name())));
    assert_eq!(status.message(), "the certificate is of runner-1, and runner-2 greets with it");
    assert_eq!(orchestrator.links(), 0);
}
