//! A certificate is replaced while work goes on: the new link is there before the old one is left, and what is not exactly
//! right changes nothing and is told.

use std::time::Duration;

use proto::runner::v1 as pb;
use runner::connector::enrollment::{self, Renewal};
use runner::connector::expiry::Expiry;
use runner::connector::orchestrator::{CertificateStatus, LinkStatus};
use runner::connector::tls::TlsFiles;
use runner::dev::pki::{Authority, Issued, Validity, server_config};
use runner::dev::{LinkSettings, Orchestrator};
use tokio::sync::watch;

use crate::enrollment::{enroll, request};
use crate::fake::bytes_of;
use crate::world::{Options, Runner, World, within};

fn bash(command: &str) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() })
}

fn put(files: &TlsFiles, issued: &Issued) {
    std::fs::write(&files.certificate, &issued.certificate_pem).unwrap();
    std::fs::write(&files.key, &issued.key_pem).unwrap();
}

fn fast() -> LinkSettings {
    // A small window keeps output under way for longer.
    LinkSettings { window: 64 * 1024, heartbeat_every: Duration::from_millis(100), ..LinkSettings::default() }
}

async fn links(orchestrator: &Orchestrator, wanted: u64) {
    within("links", async {
        while orchestrator.links() < wanted {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    within("runner", orchestrator.runner()).await.unwrap();
}

async fn certificate(status: &mut watch::Receiver<LinkStatus>, wanted: impl Fn(&CertificateStatus) -> bool) {
    within("status", status.wait_for(|status| wanted(&status.certificate))).await.unwrap();
}

async fn heartbeat(orchestrator: &Orchestrator, wanted: impl Fn(&pb::Heartbeat) -> bool) -> pb::Heartbeat {
    within("heartbeat", async {
        loop {
            match orchestrator.heartbeats().1 {
                Some(heartbeat) if wanted(&heartbeat) => return heartbeat,
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    })
    .await
}

/// F-55: certificates are replaced again and again while output streams; calls are waiting, and new ones come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_new_certificate_brings_a_new_link_before_the_old_one_is_left_and_no_byte_or_call_is_lost() {
    const ROTATIONS: u64 = 5;
    let world = World::new(Options { link: fast(), ..Default::default() }).await;
    let mut sessions = Vec::new();
    for name in ["s0", "s1", "s2"] {
        sessions.push(within("session", world.session(name)).await);
    }
    let script = format!("{}exit 0", "print 300000; pause 20; ".repeat(10));
    for (number, session) in sessions.iter().enumerate() {
        session.send(&format!("long-{number}"), bash(&script));
        session.send(&format!("waiting-{number}"), bash("print 100; exit 0"));
    }
    within("started", sessions[0].started("long-0")).await.unwrap();
    for rotation in 1..=ROTATIONS {
        put(&world.files, &world.orchestrator.authority().client("runner-1", Validity::Now).unwrap());
        world.connector.reload.notify_one();
        for (number, session) in sessions.iter().enumerate() {
            session.send(&format!("meanwhile-{number}-{rotation}"), bash("print 70000; exit 0"));
        }
        links(&world.orchestrator, rotation + 1).await;
    }
    for (number, session) in sessions.iter().enumerate() {
        let meanwhile = (1..=ROTATIONS).map(|rotation| (format!("meanwhile-{number}-{rotation}"), 70_000));
        let first = [(format!("long-{number}"), 3_000_000), (format!("waiting-{number}"), 100)];
        for (call_id, size) in first.into_iter().chain(meanwhile) {
            let finished = within("call", session.outcome(&call_id)).await.unwrap();
            assert!(finished.streams[&1].bytes == bytes_of(&call_id, size), "output of {call_id} differs");
            assert_eq!(world.fakes.executions_of(&call_id), 1, "{call_id}");
        }
    }
    let orchestrator = &world.orchestrator;
    assert_eq!((orchestrator.links(), orchestrator.overlaps()), (ROTATIONS + 1, ROTATIONS));
    assert_eq!(orchestrator.refused_handshakes(), Vec::<String>::new());
    assert_eq!(orchestrator.complaints(), Vec::<String>::new());
    let hello = within("runner", orchestrator.runner()).await.unwrap();
    assert_eq!(hello.reason(), pb::HelloReason::CertRotation);
}

/// F-55: what is on the old link when the new one is greeted is taken, and a session that is opened there is not suspended
/// because the greeting did not name it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_are_opened_while_links_change_are_served() {
    let world = World::new(Options { link: fast(), ..Default::default() }).await;
    within("runner", world.orchestrator.runner()).await.unwrap();
    for round in 0..20 {
        put(&world.files, &world.orchestrator.authority().client("runner-1", Validity::Now).unwrap());
        world.connector.reload.notify_one();
        let session = within("session", world.session(&format!("s{round}"))).await;
        let call_id = format!("c{round}");
        let finished = within("call", session.bash(&call_id, "print 100000; exit 0")).await.unwrap();
        assert!(finished.streams[&1].bytes == bytes_of(&call_id, 100_000));
        assert_eq!(world.fakes.executions_of(&call_id), 1);
        within("close", session.close(Duration::ZERO)).await.unwrap();
        links(&world.orchestrator, round + 2).await;
    }
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// F-55, F-59: the orchestrator does not know the authority of the new certificate yet. In TLS 1.3 it says so after the
/// handshake is over on our side.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_certificate_that_the_orchestrator_refuses_leaves_the_old_link_as_it_is() {
    let world = World::new(Options { link: fast(), ..Default::default() }).await;
    let session = within("session", world.session("s")).await;
    session.send("c", bash("print 300000; hang"));
    within("started", session.started("c")).await.unwrap();
    let other = Authority::new("not known there yet").unwrap();
    put(&world.files, &other.client("runner-1", Validity::Now).unwrap());
    world.connector.reload.notify_one();
    within("refusal", async {
        while world.orchestrator.refused_handshakes().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    // The old link still carries everything.
    let (before, _) = world.orchestrator.heartbeats();
    heartbeat(&world.orchestrator, |_| world.orchestrator.heartbeats().0 > before + 3).await;
    session.cancel("c", pb::CancelMode::Kill);
    let finished = within("call", session.outcome("c")).await.unwrap();
    assert!(finished.streams[&1].bytes == bytes_of("c", 300_000));
    assert_eq!((world.orchestrator.links(), world.orchestrator.overlaps()), (1, 0));
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// F-56: a certificate without its key, a file that is half written, one that has expired, one of somebody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_files_that_do_not_fit_keep_the_old_set_and_raise_an_alarm_until_they_are_repaired() {
    let world = World::new(Options { link: fast(), ..Default::default() }).await;
    let mut status = world.connector.status.clone();
    let session = within("session", world.session("s")).await;
    let authority = world.orchestrator.authority();
    let good = |name: &str| std::fs::read_to_string(world.files.certificate.with_file_name(name)).unwrap();
    let old = Issued { certificate_pem: good("certificate.pem"), key_pem: good("key.pem") };
    let other = authority.client("runner-1", Validity::Now).unwrap();
    let half = other.certificate_pem[..other.certificate_pem.len() / 2].to_owned();
    let faults = [
        (Issued { certificate_pem: other.certificate_pem.clone(), ..old.clone() }, "does not belong to certificate"),
        (Issued { certificate_pem: half, key_pem: other.key_pem.clone() }, "is not usable"),
        (Issued { key_pem: String::new(), ..other.clone() }, "is not usable"),
        (authority.client("runner-1", Validity::Expired).unwrap(), "is expired since"),
        (authority.client("runner-1", Validity::NotYet).unwrap(), "is not valid before"),
        (authority.client("runner-2", Validity::Now).unwrap(), "this runner is"),
    ];
    for (number, (fault, expected)) in faults.iter().enumerate() {
        put(&world.files, fault);
        world.connector.reload.notify_one();
        certificate(&mut status, |certificate| certificate.refused.contains(expected)).await;
        let alarm = heartbeat(&world.orchestrator, |heartbeat| heartbeat.reasons.join("").contains(expected)).await;
        assert_eq!(alarm.health(), pb::HealthState::Degraded);
        assert!(alarm.reasons[0].starts_with("new certificate files are refused: "), "{:?}", alarm.reasons);
        within("call", session.bash(&format!("c{number}"), "print 70000; exit 0")).await.unwrap();
    }
    assert_eq!(world.orchestrator.links(), 1);
    put(&world.files, &old);
    world.connector.reload.notify_one();
    certificate(&mut status, |certificate| certificate.alarms().is_empty()).await;
    heartbeat(&world.orchestrator, |heartbeat| heartbeat.health() == pb::HealthState::Ready).await;
    assert_eq!(world.orchestrator.links(), 1);
    put(&world.files, &other);
    world.connector.reload.notify_one();
    links(&world.orchestrator, 2).await;
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// F-59: first both sides trust the old authority and the new one, then certificates are of the new one, and then the old
/// one goes. A call runs all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authorities_are_replaced_by_way_of_both_without_one_failed_handshake() {
    let (world, new) =
        (World::new(Options { link: fast(), ..Default::default() }).await, Authority::new("new").unwrap());
    let (orchestrator, files) = (&world.orchestrator, &world.files);
    let old = orchestrator.authority();
    let session = within("session", world.session("s")).await;
    session.send("c", bash("print 500000; hang"));
    within("started", session.started("c")).await.unwrap();
    let trusted_here = |authorities: &[&Authority]| {
        let text: String = authorities.iter().map(|authority| authority.certificate_pem()).collect();
        std::fs::write(&files.authorities, text).unwrap();
        world.connector.reload.notify_one();
    };
    let hash_of = |hello: &pb::Hello| hello.labels["sandbox-runner.authorities-sha256"].clone();
    let at_first = hash_of(&within("runner", orchestrator.runner()).await.unwrap());

    let server_of_old = old.server("localhost", Validity::Now).unwrap();
    orchestrator.set_tls(server_config(&[old, &new], &server_of_old).unwrap());
    trusted_here(&[old, &new]);
    links(orchestrator, 2).await;
    let with_both = hash_of(&within("runner", orchestrator.runner()).await.unwrap());
    assert_ne!(at_first, with_both, "the operator must see who has both");

    let server_of_new = new.server("localhost", Validity::Now).unwrap();
    orchestrator.set_tls(server_config(&[old, &new], &server_of_new).unwrap());
    put(files, &new.client("runner-1", Validity::Now).unwrap());
    world.connector.reload.notify_one();
    links(orchestrator, 3).await;

    orchestrator.set_tls(server_config(&[&new], &server_of_new).unwrap());
    trusted_here(&[&new]);
    links(orchestrator, 4).await;
    assert_eq!(orchestrator.overlaps(), 3);
    // And a link that is lost is made again with what there is now.
    world.wire.cut();
    links(orchestrator, 5).await;

    session.cancel("c", pb::CancelMode::Kill);
    let finished = within("call", session.outcome("c")).await.unwrap();
    assert!(finished.streams[&1].bytes == bytes_of("c", 500_000));
    assert_eq!(world.fakes.executions_of("c"), 1);
    assert_eq!(orchestrator.refused_handshakes(), Vec::<String>::new());
    assert_eq!(orchestrator.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn certificate_that_ends_soon_is_told_in_status_and_heartbeats_and_is_ill_health_only_at_the_last() {
    let world = World::new(Options { link: fast(), ..Default::default() }).await;
    let mut status = world.connector.status.clone();
    // Of a life of a day and some hours: less than a quarter, less than a tenth.
    for (left, expected, health) in [
        (5 * 3600, Expiry::Soon, pb::HealthState::Ready),
        (7200, Expiry::Urgent, pb::HealthState::Degraded),
        (5 * 3600, Expiry::Soon, pb::HealthState::Ready),
        (1800, Expiry::Urgent, pb::HealthState::Degraded),
    ] {
        put(&world.files, &world.orchestrator.authority().client("runner-1", Validity::Seconds(left)).unwrap());
        world.connector.reload.notify_one();
        certificate(&mut status, |certificate| certificate.expiry == expected).await;
        let text = expected.to_string();
        let alarm = heartbeat(&world.orchestrator, |heartbeat| heartbeat.reasons.join("").contains(&text)).await;
        assert_eq!(alarm.health(), health, "{text}");
        assert!(alarm.cert_not_after.is_some(), "{text}");
    }
    put(&world.files, &world.orchestrator.authority().client("runner-1", Validity::Now).unwrap());
    world.connector.reload.notify_one();
    certificate(&mut status, |certificate| certificate.alarms().is_empty()).await;
    heartbeat(&world.orchestrator, |heartbeat| heartbeat.health() == pb::HealthState::Ready).await;
}

/// F-55: the runner asks for its next certificate itself, and the link follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn enrolled_identity_is_renewed_with_a_new_key_and_the_link_follows() {
    let orchestrator = Orchestrator::start(fast()).await.unwrap();
    let service = orchestrator.start_enrollment().await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let due = std::time::SystemTime::now() + Duration::from_secs(3);
    service.issue(Validity::Now, Some(due));
    enroll(request(&service, service.token("runner-1")), directory.path()).await.unwrap();
    service.issue(Validity::Now, None);
    let files = enrollment::files(directory.path());
    let first_key = std::fs::read(&files.key).unwrap();
    let renewal = Some(Renewal { directory: directory.path().to_owned(), proxy: None });
    let options = Options { renewal, ..Default::default() };
    let runner = Runner::dial(orchestrator.address().port(), files.clone(), options);
    let request = pb::OpenSession { session_id: "s".into(), ..Default::default() };
    let session = within("session", orchestrator.open_session(request)).await.unwrap();
    session.send("c", bash("print 300000; hang"));
    within("started", session.started("c")).await.unwrap();
    // The clock is looked at now and then, and when files are.
    within("renewal", async {
        while orchestrator.links() < 2 {
            runner.connector.reload.notify_one();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    session.cancel("c", pb::CancelMode::Kill);
    let finished = within("call", session.outcome("c")).await.unwrap();
    assert!(finished.streams[&1].bytes == bytes_of("c", 300_000));
    assert_eq!((service.issued(), orchestrator.links(), orchestrator.overlaps()), ((2, 1), 2, 1));
    assert!(runner.connector.status.borrow().certificate.alarms().is_empty());
    assert_ne!(std::fs::read(&files.key).unwrap(), first_key);
    assert_eq!(orchestrator.complaints(), Vec::<String>::new());
}

/// F-57: the certificate has expired while the runner was away. It is good for nothing but its renewal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn identity_that_has_expired_lately_is_renewed_and_makes_a_link_only_then() {
    let orchestrator = Orchestrator::start(fast()).await.unwrap();
    let service = orchestrator.start_enrollment().await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    enroll(request(&service, service.token("runner-1")), directory.path()).await.unwrap();
    let files = enrollment::files(directory.path());
    put(&files, &orchestrator.authority().client("runner-1", Validity::Expired).unwrap());
    // Without a renewal such a set is refused at the start.
    let refused = runner::connector::tls::TlsSource::load(files.clone(), std::time::SystemTime::now()).unwrap_err();
    assert!(refused.to_string().contains("is expired since"), "{refused}");
    let renewal = Some(Renewal { directory: directory.path().to_owned(), proxy: None });
    let runner = Runner::dial(orchestrator.address().port(), files, Options { renewal, ..Default::default() });
    within("runner", orchestrator.runner()).await.unwrap();
    let mut status = runner.connector.status.clone();
    certificate(&mut status, |certificate| certificate.expiry == Expiry::Good).await;
    assert_eq!(service.issued().1, 1);
    assert_eq!(orchestrator.links(), 1);
}
