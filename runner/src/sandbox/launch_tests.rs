//! The client against a scripted launcher.

use super::*;

use std::os::fd::AsFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use wire::reply::Body;

/// A launcher as a thread that answers each request by a script.
pub(crate) fn launcher(mut script: impl FnMut(wire::Request) -> Vec<wire::Reply> + Send + 'static) -> Launcher {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("socketpair");
    std::thread::spawn(move || {
        let mut buffer = vec![0; LARGEST_PACKET];
        while let Ok(length @ 1..) = rustix::io::read(&theirs, &mut buffer) {
            let request = wire::Request::decode(&buffer[..length]).expect("the runner speaks the protocol");
            for reply in script(request) {
                if rustix::io::write(theirs.as_fd(), &reply.encode_to_vec()).is_err() {
                    return;
                }
            }
        }
    });
    Launcher::from_connection(ours).expect("connected")
}

pub(crate) fn reply(request_id: u64, body: Body) -> wire::Reply {
    wire::Reply { request_id, body: Some(body) }
}

pub(crate) fn ended(sandbox_id: &str, wait_status: i32) -> wire::Reply {
    reply(0, Body::SandboxEnded(wire::SandboxEnded { sandbox_id: sandbox_id.into(), wait_status, oom_kills: 2 }))
}

pub(crate) fn created(request: &wire::Request, socket_name: &str) -> wire::Reply {
    let sandbox_id = match &request.body {
        Some(wire::request::Body::CreateSandbox(create)) => create.sandbox_id.clone(),
        _ => String::new(),
    };
    let body = wire::SandboxCreated { sandbox_id, socket_name: socket_name.into(), pid: 7, ..Default::default() };
    reply(request.request_id, Body::SandboxCreated(body))
}

fn refusal(request_id: u64, code: &str) -> wire::Reply {
    let failure = wire::Failure {
        code: code.into(),
        message: "profile: \"x\" is not in the policy".into(),
        errno: 0,
        remediation: "add it".into(),
    };
    reply(request_id, Body::Failure(failure))
}

#[tokio::test]
async fn refusal_carries_code_field_and_remedy() {
    let launcher = launcher(|request| vec![refusal(request.request_id, "NOT_ALLOWED")]);

    let error = launcher.create(&Spec::throw_away("a")).await.expect_err("refused");

    assert_eq!(error.to_string(), "the launcher refused: profile: \"x\" is not in the policy (NOT_ALLOWED)");
    assert!(matches!(error, LaunchError::Refused { remediation, .. } if remediation == "add it"));
}

#[tokio::test]
async fn ending_right_behind_the_answer_is_not_missed() {
    let launcher = launcher(|request| vec![created(&request, "a.sock"), ended("a", 9)]);

    let mut created = launcher.create(&Spec::throw_away("a")).await.expect("created");

    let ended = created.ended.wait_for(Option::is_some).await.expect("reported").clone().expect("ended");
    assert_eq!((ended.wait_status, ended.oom_kills), (Some(9), 2));
}

#[tokio::test]
async fn socket_name_that_leaves_the_directory_is_not_used() {
    for name in ["../x.sock", "/etc/x", "..", ""] {
        let launcher = launcher(move |request| vec![created(&request, name)]);

        let error = launcher.create(&Spec::throw_away("a")).await.expect_err(name);

        assert!(matches!(error, LaunchError::WrongAnswer { request: "CreateSandbox" }), "{error}");
    }
}

#[tokio::test]
async fn lost_launcher_ends_every_sandbox_and_every_request() {
    let mut requests = 0;
    let launcher = launcher(move |request| {
        requests += 1;
        assert!(requests < 3, "the script ends the thread, and with it the connection");
        if requests == 1 { vec![created(&request, "a.sock")] } else { vec![reply(4711, Body::Done(wire::Done {}))] }
    });
    let mut created = launcher.create(&Spec::throw_away("a")).await.expect("created");

    let list = launcher.list().await;

    assert!(matches!(&list, Err(LaunchError::Gone { reason }) if reason.contains("4711")), "{list:?}");
    let ended = created.ended.wait_for(Option::is_some).await.expect("reported").clone().expect("ended");
    assert!(ended.reason.contains("the launcher is gone"), "{}", ended.reason);
    assert!(matches!(launcher.list().await, Err(LaunchError::Gone { .. })));
    assert!(launcher.watch_ending("a").borrow().is_some());
}

#[tokio::test]
async fn killing_a_sandbox_that_is_gone_is_no_error() {
    let launcher = launcher(|request| vec![refusal(request.request_id, "SANDBOX_UNKNOWN")]);

    assert!(launcher.kill("a").await.is_ok());
    assert!(launcher.freeze("a", true).await.is_err());
}

#[tokio::test]
async fn dropping_the_last_user_closes_the_connection() {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("socketpair");
    let launcher = Launcher::from_connection(ours).expect("connected");
    let other = launcher.clone();

    drop(launcher);
    drop(other);

    let closed = tokio::task::spawn_blocking(move || rustix::io::read(&theirs, &mut [0; 8])).await.expect("read");
    assert_eq!(closed, Ok(0));
}

#[test]
fn greeting_of_another_version_is_refused_by_number() {
    let welcome = wire::Welcome { major: 2, ..Default::default() };

    let error = decode_welcome(&reply(1, Body::Welcome(welcome)).encode_to_vec()).expect_err("refused");

    assert_eq!(error.to_string(), "the launcher speaks version 2 of the protocol, this runner speaks 1");
}

#[test]
fn request_for_a_sandbox_names_no_path_and_no_network() {
    let spec = Spec { rootfs: Rootfs::Directory("debian".into()), ..Spec::throw_away("a") };

    let request = create_to_wire(&spec);

    assert_eq!(request.network, i32::from(wire::Network::None));
    assert_eq!(request.rootfs, Some(wire::create_sandbox::Rootfs::Directory("debian".into())));
    assert!(request.ephemeral);
}
