//! Sandboxes of an earlier runner, between a scripted launcher and a scripted process 1.

use super::*;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Mutex;

use prost::Message;
use proto::{init::v1 as init, launch::v1 as wire};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, accept, bind, listen, socket};

use crate::sandbox::launch::HostReport;
use crate::sandbox::launch::tests::{ended, launcher, reply};
use crate::work::Sandboxes;

fn id(text: &str) -> SandboxId {
    SandboxId::new(text).expect("valid")
}

fn entry(sandbox_id: &str) -> wire::SandboxEntry {
    wire::SandboxEntry {
        sandbox_id: sandbox_id.into(),
        socket_name: format!("{sandbox_id}.sock"),
        pid: 7,
        id_count: 9,
        ..Default::default()
    }
}

/// Sandboxes below `directory` of a launcher that holds `held`, says `after` behind each list, and notes what it kills.
fn host(
    directory: &Path,
    held: &'static [&'static str],
    after: Vec<wire::Reply>,
) -> (HostSandboxes, Arc<Mutex<Vec<String>>>) {
    let kills = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&kills);
    let launcher = launcher(move |request| match &request.body {
        Some(wire::request::Body::ListSandboxes(asked)) => {
            let wanted = held.iter().filter(|held| asked.sandbox_id.is_empty() || asked.sandbox_id == **held);
            let sandboxes = wanted.map(|held| entry(held)).collect();
            let list = reply(request.request_id, wire::reply::Body::SandboxList(wire::SandboxList { sandboxes }));
            [vec![list], after.clone()].concat()
        }
        Some(wire::request::Body::KillSandbox(kill)) => {
            noted.lock().expect("not poisoned").push(kill.sandbox_id.clone());
            vec![ended(&kill.sandbox_id, 9), reply(request.request_id, wire::reply::Body::Done(wire::Done {}))]
        }
        _ => Vec::new(),
    });
    (HostSandboxes::new(launcher, HostReport::default(), directory.to_path_buf(), 7), kills)
}

/// Process 1 of `sandbox_id` behind `a.sock`, which holds nothing; a mute one takes connections and says nothing.
fn process_1(directory: &Path, sandbox_id: &'static str, is_mute: bool) {
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("socket");
    bind(&listener, &SocketAddrUnix::new(directory.join("a.sock")).expect("a short path")).expect("bind");
    listen(&listener, 4).expect("listen");
    std::thread::spawn(move || {
        let Ok(connection) = accept(&listener) else { return };
        answer(&connection, sandbox_id, is_mute);
    });
}

fn answer(connection: &OwnedFd, sandbox_id: &str, is_mute: bool) {
    let mut buffer = vec![0; 4096];
    while let Ok(length @ 1..) = rustix::io::read(connection, &mut buffer) {
        let request = init::Request::decode(&buffer[..length]).expect("the runner speaks the protocol");
        let body = match request.body {
            Some(init::request::Body::Hello(_)) => init::frame::Body::Welcome(init::Welcome {
                major: 1,
                sandbox_id: sandbox_id.into(),
                shell_generation: 0,
            }),
            Some(init::request::Body::Snapshot(_)) => init::frame::Body::Snapshot(init::SnapshotReply::default()),
            _ => init::frame::Body::Done(init::Done {}),
        };
        let frame = init::Frame { request_id: request.request_id, generation: 7, body: Some(body) };
        if !is_mute && rustix::io::write(connection, &frame.encode_to_vec()).is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn sandbox_is_taken_over_with_its_receipt_and_can_be_closed() {
    let directory = tempfile::tempdir().expect("a directory");
    process_1(directory.path(), "a", false);
    let (host, kills) = host(directory.path(), &["a"], Vec::new());
    let receipt = Receipt { tier: "full".into(), ..Receipt::default() };

    let attached = host.attach(id("a"), receipt, Vec::new()).await.expect("taken over");

    assert_eq!((attached.sandbox.sandbox_id(), attached.sandbox.receipt().tier), (id("a"), "full".to_owned()));
    attached.sandbox.close(Duration::ZERO).await;
    assert_eq!(*kills.lock().expect("not poisoned"), ["a"]);
}

#[tokio::test]
async fn sandbox_that_the_launcher_does_not_hold_is_lost() {
    let directory = tempfile::tempdir().expect("a directory");
    let (host, _kills) = host(directory.path(), &["b"], Vec::new());

    let failure = host.attach(id("a"), Receipt::default(), Vec::new()).await.expect_err("lost");

    assert_eq!(failure.code, Code::SandboxLost);
    assert_eq!(failure.message, "the sandbox ended while no runner was there");
    assert!(!host.launcher.counts_on("a"));
}

#[tokio::test]
async fn ending_right_behind_the_list_is_not_missed() {
    let directory = tempfile::tempdir().expect("a directory");
    process_1(directory.path(), "a", false);
    let (host, _kills) = host(directory.path(), &["a"], vec![ended("a", 9)]);

    let attached = host.attach(id("a"), Receipt::default(), Vec::new()).await.expect("its process 1 answers");

    let lost = tokio::time::timeout(Duration::from_secs(20), attached.sandbox.lost()).await.expect("in time");
    assert_eq!(lost, "its process 1 was killed by SIGKILL; 2 processes of it had been killed for want of memory");
}

#[tokio::test]
async fn sandbox_that_cannot_be_spoken_to_is_ended_in_time() {
    let directory = tempfile::tempdir().expect("a directory");
    let (nobody, kills) = host(directory.path(), &["a"], Vec::new());
    let no_listener = nobody.attach(id("a"), Receipt::default(), Vec::new()).await.expect_err("ended");
    assert_eq!(*kills.lock().expect("not poisoned"), ["a"]);
    let directory = tempfile::tempdir().expect("a directory");
    process_1(directory.path(), "another", false);
    let (wrong, kills_of_wrong) = host(directory.path(), &["a"], Vec::new());
    let wrong_sandbox = wrong.attach(id("a"), Receipt::default(), Vec::new()).await.expect_err("ended");
    let directory = tempfile::tempdir().expect("a directory");
    process_1(directory.path(), "a", true);
    let (mute, kills_of_mute) = host(directory.path(), &["a"], Vec::new());
    let silence = mute.attach(id("a"), Receipt::default(), Vec::new()).await.expect_err("ended");

    for failure in [&no_listener, &wrong_sandbox, &silence] {
        assert_eq!(failure.code, Code::SandboxLost);
        assert!(failure.message.starts_with("the sandbox was given up"), "{}", failure.message);
    }
    assert_eq!(silence.message, "the sandbox was given up, because it did not answer in time");
    assert_eq!(*kills_of_wrong.lock().expect("not poisoned"), ["a"]);
    assert_eq!(*kills_of_mute.lock().expect("not poisoned"), ["a"]);
    assert!(!mute.launcher.counts_on("a"));
}

#[tokio::test]
async fn others_are_ended_and_those_to_be_kept_are_counted_on() {
    let directory = tempfile::tempdir().expect("a directory");
    let (host, kills) = host(directory.path(), &["kept", "x", "y"], Vec::new());

    host.end_others(&[id("kept")]).await.expect("ended");

    let mut killed = kills.lock().expect("not poisoned").clone();
    killed.sort();
    assert_eq!(killed, ["x", "y"]);
    assert!(host.launcher.counts_on("kept") && !host.launcher.counts_on("x"));
}

#[tokio::test]
async fn those_that_no_session_has_are_left_alone_until_somebody_has_confirmed_but_for_measurements() {
    let directory = tempfile::tempdir().expect("a directory");
    process_1(directory.path(), "b", false);
    let (host, kills) = host(directory.path(), &["kept", "x", "a", "doctor-1"], Vec::new());

    host.count_on(&[id("kept"), id("a")]).await.expect("the launcher answers");
    let failure = host.attach(id("a"), Receipt::default(), Vec::new()).await.expect_err("it is another one");
    host.discard(id("kept")).await;

    assert!(failure.message.starts_with("the sandbox was given up"), "{}", failure.message);
    assert_eq!(*kills.lock().expect("not poisoned"), ["doctor-1"]);

    host.end_unknown().await;

    let mut killed = kills.lock().expect("not poisoned").split_off(1);
    killed.sort();
    // The scripted launcher still lists it.
    assert_eq!(killed, ["a", "doctor-1", "kept", "x"]);
}

#[tokio::test]
async fn those_that_were_kept_are_ended_when_nobody_will_take_them_over() {
    let directory = tempfile::tempdir().expect("a directory");
    let (host, kills) = host(directory.path(), &["kept"], Vec::new());
    host.end_others(&[id("kept")]).await.expect("nothing to end");

    host.end_all(&[id("kept")]).await.expect("ended");

    assert_eq!(*kills.lock().expect("not poisoned"), ["kept"]);
}

#[tokio::test]
async fn launcher_that_is_slow_because_it_is_restarted_costs_no_sandbox() {
    let directory = tempfile::tempdir().expect("a directory");
    process_1(directory.path(), "a", false);
    let launcher = launcher(|request| {
        std::thread::sleep(ATTACH_TIME + Duration::from_millis(300));
        let list = wire::SandboxList { sandboxes: vec![entry("a")] };
        vec![reply(request.request_id, wire::reply::Body::SandboxList(list))]
    });
    let host = HostSandboxes::new(launcher, HostReport::default(), directory.path().to_path_buf(), 7);

    let attached = host.attach(id("a"), Receipt::default(), Vec::new()).await;

    assert!(attached.is_ok(), "{attached:?}");
    std::mem::forget(attached);
}
