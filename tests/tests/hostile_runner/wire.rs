//! How it is asked: by other users, without a greeting, in garbage, or not at all.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use prost::Message;
use proto::launch::v1::{Hello, ListSandboxes, Request, reply, request};
use sandbox_runner_tests::host;
use sandbox_runner_tests::launcher::{Connection, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;

use crate::{Bench, kill, list};

#[test]
fn other_users_are_not_answered() {
    needs_root!();
    let mut bench = Bench::start();
    for uid in [65_534, 1, sandbox_runner_tests::launcher::ID_BASE, sandbox_runner_tests::launcher::RUNNER_UID + 1] {
        // Refused by the file mode of the socket or by the uid of the peer: either is fine, an answer is not.
        let Ok(connection) = Connection::open_as(&bench.socket(), uid) else { continue };
        let answer = connection.ask(request::Body::Hello(Hello { major: 1 }));
        assert!(answer.is_err(), "uid {uid} was answered: {answer:?}");
    }
    // The same with the file mode out of the way, so that only the peer's uid can protect.
    fs::set_permissions(bench.socket(), Permissions::from_mode(0o777)).expect("chmod of the socket");
    let run = bench.socket().parent().expect("a parent").to_owned();
    fs::set_permissions(run, Permissions::from_mode(0o755)).expect("chmod of the run directory");
    let connection = Connection::open_as(&bench.socket(), 65_534).expect("the socket is open to everybody now");
    let answer = connection.ask(request::Body::Hello(Hello { major: 1 }));
    assert!(answer.is_err(), "a foreign uid was answered: {answer:?}");
    bench.assert_serves();
}

#[test]
fn conversation_that_does_not_begin_with_a_greeting_is_refused() {
    needs_root!();
    let mut bench = Bench::start();
    let connection = Connection::open(&bench.socket()).expect("connected");
    let answer = connection.ask(request::Body::CreateSandbox(plain_sandbox("early")));
    assert!(
        !matches!(answer, Ok(ref reply) if matches!(reply.body, Some(reply::Body::SandboxCreated(_)))),
        "{answer:?}"
    );

    let connection = Connection::open(&bench.socket()).expect("connected");
    let answer = connection.ask(request::Body::Hello(Hello { major: 2 }));
    assert!(!matches!(answer, Ok(ref reply) if matches!(reply.body, Some(reply::Body::Welcome(_)))), "{answer:?}");
    bench.assert_serves();
}

#[test]
fn garbage_unknown_fields_and_oversize_packets_do_no_harm() {
    needs_root!();
    let mut bench = Bench::start();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |length: usize| -> Vec<u8> {
        (0..length)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            })
            .collect()
    };
    let valid =
        Request { request_id: 1, body: Some(request::Body::CreateSandbox(plain_sandbox("cut"))) }.encode_to_vec();
    let mut packets: Vec<Vec<u8>> = (0..60).map(|number| random(1 + number * 37)).collect();
    packets.extend((1..valid.len()).step_by(3).map(|length| valid[..length].to_vec()));
    // A request whose only field is unknown, lengths that lie, and nesting.
    packets.push(vec![0xfa, 0x06, 0x03, b'a', b'b', b'c']);
    packets.push(vec![0x5a, 0xff, 0xff, 0xff, 0xff, 0x07]);
    packets.push(vec![0x5a; 4000]);
    packets.push(random(65_536));
    packets.push(random(200_000));
    for packet in packets {
        let Ok(connection) = Connection::greeted(&bench.socket()) else { panic!("no longer served after garbage") };
        // A packet larger than the socket's buffer is refused by the kernel before it is sent.
        if connection.send(&packet).is_ok() {
            let _ = connection.ask(request::Body::ListSandboxes(ListSandboxes::default()));
        }
    }
    let connection = bench.connect();
    let unexpected: Vec<_> = list(&connection).into_iter().filter(|entry| entry.sandbox_id != "cut").collect();
    assert_eq!(unexpected, []);
    for entry in list(&connection) {
        kill(&connection, &entry.sandbox_id);
    }
    drop(connection);
    bench.assert_serves();
}

/// Descriptors travel from launcher to runner only. Those that come the other way must not stay, or a runner could use up the
/// launcher's.
#[test]
fn descriptors_that_come_with_a_request_do_not_stay_in_the_launcher() {
    needs_root!();
    let mut bench = Bench::start();
    let launcher = bench.launcher.pid();
    let hello = Request { request_id: 7, body: Some(request::Body::Hello(Hello { major: 1 })) }.encode_to_vec();
    let listing = Request { request_id: 8, body: Some(request::Body::ListSandboxes(ListSandboxes::default())) };
    bench.assert_serves();
    std::thread::sleep(Duration::from_millis(500));
    let before = host::descriptors(launcher);

    // 253 is the most that the kernel takes in one packet.
    for count in [1, 250, 253] {
        for packet in [&hello, &listing.encode_to_vec()] {
            let connection = Connection::open(&bench.socket()).expect("connected");
            connection.send_with_descriptors(packet, count).expect("the kernel takes them");
            // Answered, refused or hung up on: all are fine.
            let _ = connection.receive();
            let greeted = Connection::greeted(&bench.socket()).expect("others are served");
            greeted.send_with_descriptors(packet, count).expect("the kernel takes them");
            let _ = greeted.receive();
            assert!(host::descriptors(launcher) < before + 16, "{count} descriptors stay in the launcher");
        }
    }

    bench.assert_serves();
    let deadline = Instant::now() + scaled(Duration::from_secs(10));
    while host::descriptors(launcher) > before {
        assert!(Instant::now() < deadline, "{before} descriptors before, {} after", host::descriptors(launcher));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn silent_connections_do_not_stop_the_service() {
    needs_root!();
    let mut bench = Bench::start();
    // A predecessor that hangs may still hold some; the launcher bounds how many.
    let few: Vec<_> = (0..4).map_while(|_| Connection::open(&bench.socket()).ok()).collect();
    bench.assert_serves();
    let many: Vec<_> = (0..64).map_while(|_| Connection::open(&bench.socket()).ok()).collect();
    let before = fs::read_dir(format!("/proc/{}/fd", bench.launcher.pid())).map_or(0, Iterator::count);
    assert!(before < 100, "{before} descriptors: connections are not bounded");

    drop((few, many));

    bench.assert_serves();
}
