//! What is asked for: anything that the policy does not name, is no name, or is above a maximum is refused by field.

use std::collections::BTreeSet;

use proto::launch::v1::{
    CreateSandbox, FreezeSandbox, InspectSandbox, KillSandbox, LayerList, Limits, Volume, create_sandbox, reply,
    request,
};
use sandbox_runner_tests::keeper::Keeper;
use sandbox_runner_tests::launcher::{Connection, plain_sandbox};
use sandbox_runner_tests::needs_root;

use crate::{Bench, MIB, assert_refusal, create, kill, list, refused};

#[test]
fn unknown_profile_is_refused_by_name() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for profile in ["", "admin", "../default", "default\0", "default/../default", &"x".repeat(10_000)] {
        let failure = refused(&connection, CreateSandbox { profile: profile.to_owned(), ..plain_sandbox("p") });
        assert_refusal(&failure, &["INVALID_FIELD", "NOT_ALLOWED"], "profile");
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn host_paths_in_place_of_names_are_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let own = bench.rootfs.path().display().to_string();
    for name in
        ["", ".", "..", "/", "/etc", "../../etc", "allowed/../../etc", "allowed/", "./allowed", "allowed\0", &own]
    {
        let rootfs = Some(create_sandbox::Rootfs::Directory(name.to_owned()));
        let failure = refused(&connection, CreateSandbox { rootfs, ..plain_sandbox("r") });
        assert_refusal(&failure, &["INVALID_FIELD", "NOT_ALLOWED"], "directory");

        let volumes = vec![Volume { name: name.to_owned(), read_only: true }];
        let failure = refused(&connection, CreateSandbox { volumes, ..plain_sandbox("v") });
        assert_refusal(&failure, &["INVALID_FIELD", "NOT_ALLOWED"], "volume");
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn missing_or_unsupported_root_is_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let failure = refused(&connection, CreateSandbox { rootfs: None, ..plain_sandbox("none") });
    assert_refusal(&failure, &["INVALID_FIELD"], "rootfs");
    for digest in ["sha256:".to_owned() + &"0".repeat(64), "../../etc".to_owned(), String::new()] {
        let rootfs = Some(create_sandbox::Rootfs::Layers(LayerList { digest: vec![digest] }));
        let failure = refused(&connection, CreateSandbox { rootfs, ..plain_sandbox("layers") });
        assert_refusal(&failure, &["NOT_SUPPORTED", "INVALID_FIELD", "LAYER_MISSING"], "layers");
    }
}

#[test]
fn sandbox_ids_that_could_be_paths_are_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for id in ["", ".", "..", "/", "a/b", "../x", "a b", "a\0b", "ä", "a\n", &"x".repeat(65), &"x".repeat(60_000)] {
        let failure = refused(&connection, plain_sandbox(id));
        assert_refusal(&failure, &["INVALID_FIELD"], "sandbox_id");
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn limits_above_the_maximum_are_refused_by_field() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    let cases = [
        ("memory_bytes", Limits { memory_bytes: 513 * MIB, ..Limits::default() }),
        ("memory_bytes", Limits { memory_bytes: u64::MAX, ..Limits::default() }),
        ("cpu_millis", Limits { cpu_millis: 2001, ..Limits::default() }),
        ("pids", Limits { pids: 129, ..Limits::default() }),
        ("pids", Limits { pids: u64::MAX, ..Limits::default() }),
        ("disk_bytes", Limits { disk_bytes: 129 * MIB, ..Limits::default() }),
    ];
    for (field, limits) in cases {
        let failure = refused(&connection, CreateSandbox { limits: Some(limits), ..plain_sandbox("big") });
        assert_refusal(&failure, &["NOT_ALLOWED", "INVALID_FIELD"], field);
    }
    assert_eq!(list(&connection), []);
}

#[test]
fn malformed_environment_names_and_directories_are_refused() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for entry in [&b"no equals sign"[..], b"=value", b"NUL\0=x", b"A=\0", b""] {
        let environment = vec![entry.to_vec()];
        let failure = refused(&connection, CreateSandbox { environment, ..plain_sandbox("env") });
        assert_refusal(&failure, &["INVALID_FIELD"], "environment");
    }
    for directory in ["relative", "../..", "/a\0b", "/../../etc"] {
        let working_directory = directory.to_owned();
        let failure = refused(&connection, CreateSandbox { working_directory, ..plain_sandbox("wd") });
        assert_refusal(&failure, &["INVALID_FIELD"], "working_directory");
    }
    for name in ["a/b", "a\0b", "a b", "-\n", &"x".repeat(65)] {
        let hostname = name.to_owned();
        let failure = refused(&connection, CreateSandbox { hostname, ..plain_sandbox("host") });
        assert_refusal(&failure, &["INVALID_FIELD"], "hostname");
    }
}

/// That nothing can be done to a sandbox by this name.
fn assert_unknown(connection: &Connection, id: &str, codes: &[&str]) {
    let sandbox_id = || id.to_owned();
    for body in [
        request::Body::KillSandbox(KillSandbox { sandbox_id: sandbox_id() }),
        request::Body::FreezeSandbox(FreezeSandbox { sandbox_id: sandbox_id(), frozen: true }),
        request::Body::InspectSandbox(InspectSandbox { sandbox_id: sandbox_id() }),
    ] {
        let failure = connection.refusal(body).expect("refused");
        assert_refusal(&failure, codes, "sandbox");
    }
}

#[test]
fn foreign_sandboxes_cannot_be_named() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    for id in ["other", "../other", "0", "1", "", "/sys/fs/cgroup"] {
        assert_unknown(&connection, id, &["SANDBOX_UNKNOWN", "INVALID_FIELD"]);
    }
}

/// Another launcher of the same host has a sandbox that lives. Neither its id nor the names of its files mean anything here.
#[test]
fn live_sandbox_of_another_launcher_cannot_be_named() {
    needs_root!();
    let (bench, other) = (Bench::start(), Bench::start());
    let (connection, owner) = (bench.connect(), other.connect());
    let created = create(&owner, plain_sandbox("of-another"));
    let socket = created.socket_name.trim_end_matches(".sock");
    for id in ["of-another", socket, &created.pid.to_string(), &created.id_base.to_string()] {
        assert_unknown(&connection, id, &["SANDBOX_UNKNOWN"]);
    }
    assert_eq!(list(&connection), []);
    assert_eq!(list(&owner).len(), 1);
    // Neither ended nor frozen: it does what it is asked.
    let [_, run] = other.launcher.setup().directories();
    let mut keeper = Keeper::connect(&run.join("sandboxes").join(created.socket_name)).expect("process 1 answers");
    let lives = keeper.bash("echo lives");
    assert_eq!((lives.code(), lives.text().as_str()), (Some(0), "lives\n"), "{lives:?}");
    drop(keeper);
    kill(&owner, "of-another");
}

#[test]
fn same_sandbox_is_never_made_twice() {
    needs_root!();
    let bench = Bench::start();
    let connection = bench.connect();
    create(&connection, plain_sandbox("twin"));

    let failure = refused(&connection, plain_sandbox("twin"));

    assert_refusal(&failure, &["SANDBOX_EXISTS"], "twin");
    assert_eq!(list(&connection).len(), 1);
}

#[test]
fn thousand_creations_end_at_the_slots_and_nothing_is_lost() {
    needs_root!();
    let mut bench = Bench::start();
    let connection = bench.connect();
    let mut made = Vec::new();
    let mut refusals = 0;
    for number in 0..1000 {
        let id = format!("flood-{number}");
        match connection.ask(request::Body::CreateSandbox(plain_sandbox(&id))).expect("an answer").body {
            Some(reply::Body::SandboxCreated(created)) => made.push(created),
            Some(reply::Body::Failure(failure)) => {
                assert_refusal(&failure, &["NO_SLOT"], "in use");
                refusals += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((made.len(), refusals), (3, 997));
    let bases: BTreeSet<u32> = made.iter().map(|created| created.id_base).collect();
    assert_eq!(bases.len(), 3, "two sandboxes share their ids: {made:?}");
    for created in &made {
        let beyond = sandbox_runner_tests::launcher::ID_BASE + 3 * 65_536;
        assert!(
            created.id_base >= sandbox_runner_tests::launcher::ID_BASE && created.id_base + created.id_count <= beyond
        );
        kill(&connection, &created.sandbox_id);
    }
    drop(connection);
    bench.assert_serves();
}
