//! Life cycle of one sandbox between a scripted launcher and a scripted process 1.

use super::*;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt;
use prost::Message;
use proto::{init::v1 as init, launch::v1 as wire};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::sandbox::control::{LARGEST_PACKET, Patience};
use crate::sandbox::launch::Created;
use crate::sandbox::launch::tests::{created, ended, launcher, reply};
use crate::sandbox::spec::Spec;

/// A launcher that counts kills; each kill ends the sandbox.
async fn made(kills: Arc<AtomicUsize>) -> (Launcher, Created) {
    let launcher = launcher(move |request| match &request.body {
        Some(wire::request::Body::CreateSandbox(_)) => vec![created(&request, "a.sock")],
        Some(wire::request::Body::KillSandbox(_)) => {
            kills.fetch_add(1, Ordering::SeqCst);
            vec![ended("a", 9), reply(request.request_id, wire::reply::Body::Done(wire::Done {}))]
        }
        _ => Vec::new(),
    });
    let created = launcher.create(&Spec::throw_away("a")).await.expect("created");
    (launcher, created)
}

/// A process 1 that greets, answers most with `Done`, says rubbish when told to go, and too much when told to drop a call.
fn process_1() -> OwnedFd {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("socketpair");
    std::thread::spawn(move || {
        let mut buffer = vec![0; 4096];
        while let Ok(length @ 1..) = rustix::io::read(&theirs, &mut buffer) {
            let request = init::Request::decode(&buffer[..length]).expect("the runner speaks the protocol");
            let body = match request.body {
                Some(init::request::Body::Hello(_)) => {
                    init::frame::Body::Welcome(init::Welcome { major: 1, sandbox_id: "a".into(), shell_generation: 0 })
                }
                _ => init::frame::Body::Done(init::Done {}),
            };
            let request_id = match request.body {
                Some(init::request::Body::Go(_)) => 4711,
                _ => request.request_id,
            };
            let mut packet = init::Frame { request_id, generation: 1, body: Some(body) }.encode_to_vec();
            match request.body {
                // Nobody ever answers these.
                Some(init::request::Body::StartCall(_) | init::request::Body::Resize(_)) => continue,
                Some(init::request::Body::Abort(_)) => packet.resize(LARGEST_PACKET + 1, 0),
                _ => {}
            }
            if rustix::io::write(&theirs, &packet).is_err() {
                return;
            }
        }
    });
    ours
}

async fn live(kills: &Arc<AtomicUsize>) -> LiveSandbox {
    let (launcher, created) = made(Arc::clone(kills)).await;
    let (control, _) = Control::from_connection(process_1(), 1, Patience::default()).await.expect("greeted");
    let sandbox_id = SandboxId::new("a").expect("valid");
    let known =
        Known { sandbox_id, pid: created.pid, id_count: created.id_count, ended: created.ended.clone(), frozen: false };
    LiveSandbox::new(launcher, known, control, Receipt::default())
}

#[tokio::test]
async fn process_1_that_breaks_the_protocol_is_killed_and_the_caller_is_told() {
    let kills = Arc::new(AtomicUsize::new(0));
    let sandbox = live(&kills).await;

    let error = sandbox.go(&CallId::new("c").expect("valid")).await.expect_err("refused");
    let reason = sandbox.lost().await;
    sandbox.close(Duration::ZERO).await;

    assert_eq!(error.code, Code::SandboxLost);
    assert!(reason.contains("request 4711"), "{reason}");
    assert!(kills.load(Ordering::SeqCst) >= 1);
}

#[tokio::test]
async fn packet_that_is_too_long_is_counted_by_its_kind() {
    let sandbox = live(&Arc::default()).await;
    sandbox.abort(&CallId::new("c").expect("valid")).await.expect_err("the connection is over");
    sandbox.lost().await;
    let counted = sandbox.parts.launcher.counted().all();
    assert_eq!(counted.get("sandbox_violations_total{kind=\"oversize\"}"), Some(&1), "{counted:?}");
}

/// An observer of calls about which nothing is ever said.
struct Nobody;

impl CallObserver for Nobody {
    fn observe(&self, _event: crate::work::CallEvent) {}
}

#[tokio::test]
async fn calls_and_requests_beyond_the_bounds_of_one_sandbox_are_refused_and_counted() {
    let sandbox = live(&Arc::default()).await;
    let call = |number: usize| PreparedCall {
        call_id: CallId::new(format!("c{number}")).expect("valid"),
        input: crate::work::ToolInput::Bash(crate::work::BashInput { command: Some("true".into()), restart: false }),
        limits: Default::default(),
        output_mode: crate::work::OutputMode::Merged,
        gate: crate::work::Gate::Held,
    };
    let mut asked = Vec::new();
    let refused = loop {
        let mut start = sandbox.start_call(call(asked.len()), Arc::new(Nobody));
        match (&mut start).now_or_never() {
            Some(result) => break result.expect_err("nobody answers"),
            None => asked.push(start),
        }
    };
    assert_eq!((refused.code, asked.len()), (Code::QueueFull, 256));
    let mut resized = Vec::new();
    let refused = loop {
        let mut resize = sandbox.resize(&CallId::new("c0").expect("valid"), 80, 25);
        match (&mut resize).now_or_never() {
            Some(result) => break result.expect_err("nobody answers"),
            None => resized.push(resize),
        }
    };
    assert_eq!((refused.code, asked.len() + resized.len()), (Code::QueueFull, 512));
    let counted = sandbox.parts.launcher.counted().all();
    let of = |what: &str| counted.get(&format!("sandbox_requests_refused_total{{what=\"{what}\"}}")).copied();
    assert_eq!((of("calls"), of("requests")), (Some(1), Some(1)), "{counted:?}");
}

#[tokio::test]
async fn closing_kills_once_and_is_no_loss() {
    let kills = Arc::new(AtomicUsize::new(0));
    let sandbox = live(&kills).await;

    sandbox.close(Duration::ZERO).await;

    assert_eq!(kills.load(Ordering::SeqCst), 1);
    // The phase is final now, so one look is enough.
    tokio::select! {
        biased;
        reason = sandbox.lost() => panic!("a closed sandbox cannot be lost: {reason}"),
        () = std::future::ready(()) => {}
    }
}

#[tokio::test]
async fn work_is_ended_without_the_sandbox_and_not_any_more_when_that_is_closed() {
    let kills = Arc::new(AtomicUsize::new(0));
    let sandbox = live(&kills).await;

    sandbox.stop().await.expect("process 1 has done it");
    assert_eq!(kills.load(Ordering::SeqCst), 0, "the sandbox was ended with its work");
    sandbox.close(Duration::ZERO).await;

    assert_eq!(sandbox.stop().await.expect_err("it is over").code, Code::SandboxLost);
}

#[tokio::test]
async fn dropping_the_last_reference_removes_the_sandbox() {
    let kills = Arc::new(AtomicUsize::new(0));
    let sandbox = live(&kills).await;
    let mut ended = sandbox.parts.ended.clone();

    drop(sandbox);
    ended.wait_for(Option::is_some).await.expect("killed");

    assert_eq!(kills.load(Ordering::SeqCst), 1);
}

#[test]
fn internal_details_of_a_lost_sandbox_do_not_reach_the_caller() {
    let failure = failure(ControlError::Ended(ControlEnd::Failed("recvmsg: EIO on /run/x".into())));

    assert_eq!(failure.message, "the sandbox has ended");
    assert!(!failure.remediation.is_empty());
}
