//! The client against a scripted launcher.

use super::*;

use std::os::fd::AsFd;

use futures_util::FutureExt;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use wire::reply::Body;

use crate::sandbox::spec::Rootfs;

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
    let sandbox_id = sandbox_id.into();
    reply(0, Body::SandboxEnded(wire::SandboxEnded { sandbox_id, wait_status, oom_kills: 2, ..Default::default() }))
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

    let request = frames::create(&spec);

    assert_eq!(request.network, i32::from(wire::Network::None));
    assert_eq!(request.rootfs, Some(wire::create_sandbox::Rootfs::Directory("debian".into())));
    assert!(request.ephemeral);
}

/// What one connection does with a request; `None` closes it.
type Script = fn(wire::Request) -> Option<Vec<wire::Reply>>;

/// A launcher that listens, and whose connections follow one script each. Says which requests came.
fn service(path: &Path, scripts: Vec<Script>) -> std::sync::mpsc::Receiver<wire::request::Body> {
    use rustix::net::{SocketAddrUnix, accept, bind, listen, socket};
    let (sender, requests) = std::sync::mpsc::channel();
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("socket");
    bind(&listener, &SocketAddrUnix::new(path).expect("a short path")).expect("bind");
    listen(&listener, 4).expect("listen");
    std::thread::spawn(move || {
        let mut buffer = vec![0; LARGEST_PACKET];
        for script in scripts {
            let Ok(connection) = accept(&listener) else { return };
            while let Ok(length @ 1..) = rustix::io::read(&connection, &mut buffer) {
                let request = wire::Request::decode(&buffer[..length]).expect("the runner speaks the protocol");
                let _ = sender.send(request.body.clone().expect("a body"));
                let Some(replies) = script(request) else { break };
                for reply in replies {
                    let _ = rustix::io::write(connection.as_fd(), &reply.encode_to_vec());
                }
            }
        }
    });
    requests
}

/// Greets, makes what it is asked for, and closes the connection when it is asked for a list or for `stubborn`.
fn first_launcher(request: wire::Request) -> Option<Vec<wire::Reply>> {
    match &request.body {
        Some(wire::request::Body::Hello(_)) => Some(vec![welcome(request.request_id)]),
        Some(wire::request::Body::CreateSandbox(create)) if create.sandbox_id != "stubborn" => {
            Some(vec![created(&request, "a.sock")])
        }
        _ => None,
    }
}

/// Holds `kept` and `stranger`.
fn second_launcher(request: wire::Request) -> Option<Vec<wire::Reply>> {
    let entry = |id: &str| wire::SandboxEntry {
        sandbox_id: id.into(),
        socket_name: format!("{id}.sock"),
        adopted: true,
        ..Default::default()
    };
    let body = match &request.body {
        Some(wire::request::Body::Hello(_)) => return Some(vec![welcome(request.request_id)]),
        Some(wire::request::Body::ListSandboxes(_)) => {
            Body::SandboxList(wire::SandboxList { sandboxes: vec![entry("kept"), entry("stranger")] })
        }
        _ => Body::Done(wire::Done {}),
    };
    Some(vec![reply(request.request_id, body)])
}

fn welcome(request_id: u64) -> wire::Reply {
    reply(request_id, Body::Welcome(wire::Welcome { major: 1, ..Default::default() }))
}

#[tokio::test]
async fn launcher_that_comes_back_keeps_what_it_holds_ends_what_it_lost_and_kills_what_nobody_knows() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("launcher.sock");
    let requests = service(&path, vec![first_launcher, second_launcher]);
    let (launcher, _) = Launcher::connect(&path).await.expect("connected");
    launcher.all_are_known();
    let kept = launcher.create(&Spec::throw_away("kept")).await.expect("created");
    let mut lost = launcher.create(&Spec::throw_away("lost")).await.expect("created");

    let interrupted = launcher.list().await;

    assert!(matches!(interrupted, Err(LaunchError::Interrupted)), "{interrupted:?}");
    let list = launcher.list().await.expect("the next launcher answers");
    assert_eq!(list.len(), 2);
    let ended = lost.ended.wait_for(Option::is_some).await.expect("reported").clone().expect("ended");
    assert!(ended.reason.contains("gone when the launcher came back"), "{}", ended.reason);
    assert!(kept.ended.borrow().is_none());
    assert_eq!(killed(&requests), ["stranger"]);
}

fn killed(requests: &std::sync::mpsc::Receiver<wire::request::Body>) -> Vec<String> {
    let kill = |body| match body {
        wire::request::Body::KillSandbox(kill) => Some(kill.sandbox_id),
        _ => None,
    };
    requests.try_iter().filter_map(kill).collect()
}

/// F-12: the launcher is killed while a runner starts, which has yet to read what the one before it has left.
#[tokio::test]
async fn launcher_that_comes_back_before_the_journal_is_read_is_not_told_to_kill_what_an_earlier_runner_left() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("launcher.sock");
    let requests = service(&path, vec![first_launcher, second_launcher]);
    let (launcher, _) = Launcher::connect(&path).await.expect("connected");
    assert!(launcher.list().await.is_err(), "the first launcher goes");

    let list = launcher.list().await.expect("the next launcher answers");

    assert_eq!(list.len(), 2);
    assert_eq!(killed(&requests), Vec::<String>::new());
}

#[tokio::test]
async fn sandbox_that_was_being_made_when_the_launcher_went_is_refused_once_and_not_counted_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("launcher.sock");
    let _requests = service(&path, vec![first_launcher, second_launcher]);
    let (launcher, _) = Launcher::connect(&path).await.expect("connected");

    let error = launcher.create(&Spec::throw_away("stubborn")).await.expect_err("interrupted");

    assert!(matches!(error, LaunchError::Interrupted), "{error}");
    assert!(launcher.kill("stubborn").await.is_ok());
}

#[tokio::test]
async fn late_answer_to_somebody_who_gave_up_is_no_breach_and_its_sandbox_is_killed() {
    let mut late = None;
    let (sender, killed) = std::sync::mpsc::channel();
    let launcher = launcher(move |request| match &request.body {
        Some(wire::request::Body::CreateSandbox(_)) => {
            late = Some(created(&request, "a.sock"));
            Vec::new()
        }
        Some(wire::request::Body::KillSandbox(kill)) => {
            let _ = sender.send(kill.sandbox_id.clone());
            vec![reply(request.request_id, Body::Done(wire::Done {}))]
        }
        _ => late
            .take()
            .into_iter()
            .chain([reply(request.request_id, Body::SandboxList(wire::SandboxList::default()))])
            .collect(),
    });
    let spec = Spec::throw_away("a");
    let gave_up = tokio::time::timeout(Duration::from_millis(50), launcher.create(&spec)).await;
    assert!(gave_up.is_err());

    assert_eq!(launcher.list().await.expect("the connection goes on"), []);

    let killed =
        tokio::task::spawn_blocking(move || killed.recv_timeout(Duration::from_secs(20))).await.expect("joined");
    assert_eq!(killed.as_deref(), Ok("a"));
}

#[tokio::test]
async fn counters_of_the_launcher_have_names_and_one_that_counts_nothing_says_nothing() {
    let counting = launcher(|request| {
        let counters = wire::Counters { connections_refused: 1, creations_refused: 2, creations_given_up: 3 };
        vec![reply(request.request_id, Body::Counters(counters))]
    });
    let expected = [
        ("launcher_connections_refused_total", 1),
        ("launcher_creations_refused_total", 2),
        ("launcher_creations_given_up_total", 3),
    ];
    let expected: BTreeMap<_, _> = expected.map(|(name, count)| (name.to_owned(), count)).into();
    assert_eq!(counting.counters().await.expect("counters"), expected);

    let older = launcher(|request| vec![refusal(request.request_id, "NOT_SUPPORTED")]);
    assert_eq!(older.counters().await.expect("nothing"), BTreeMap::new());
}

#[tokio::test]
async fn requests_beyond_the_bound_are_refused_and_counted() {
    let launcher = launcher(|_| Vec::new());
    let mut asked = Vec::new();
    for _ in 0..MOST_OUTSTANDING {
        let mut request = Box::pin({
            let launcher = launcher.clone();
            async move { launcher.inspect("a").await }
        });
        assert!((&mut request).now_or_never().is_none());
        asked.push(request);
    }
    let refused = launcher.inspect("a").await.expect_err("no room");
    assert!(matches!(refused, LaunchError::Busy), "{refused}");
    assert_eq!(launcher.counted().all().get("launcher_requests_refused_total"), Some(&1));
}
