//! A runner that was taken over speaks to the launcher. It holds the right uid and the protocol; it must not get anything
//! the policy file does not name, and must not be able to stop the launcher from serving.
#![forbid(unsafe_code)]

mod policy;
mod requests;
mod successors;
mod traces;
mod volumes;
mod wire;

use std::path::PathBuf;

use proto::launch::v1::{
    CreateSandbox, Failure, KillSandbox, ListSandboxes, SandboxCreated, SandboxEntry, reply, request,
};
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, plain_sandbox};
use sandbox_runner_tests::rootfs::Rootfs;

const MIB: u64 = 1 << 20;
/// Id ranges of the launcher.
const SLOTS: u32 = 3;

/// A launcher with three slots, and the directory that its policy allows.
struct Bench {
    launcher: Launcher,
    rootfs: Rootfs,
}

impl Bench {
    fn start() -> Self {
        let rootfs = Rootfs::with_prober();
        let launcher = Setup::new(SLOTS, rootfs.path()).start().expect("the launcher starts");
        Self { launcher, rootfs }
    }

    fn socket(&self) -> PathBuf {
        self.launcher.setup().socket()
    }

    fn connect(&self) -> Connection {
        Connection::greeted(&self.socket()).expect("the launcher serves its runner")
    }

    /// The launcher still runs and makes sandboxes.
    fn assert_serves(&mut self) {
        assert!(self.launcher.is_alive(), "the launcher has ended");
        let connection = self.connect();
        create(&connection, plain_sandbox("alive"));
        kill(&connection, "alive");
    }
}

fn create(connection: &Connection, sandbox: CreateSandbox) -> SandboxCreated {
    connection.create(sandbox).expect("a sandbox")
}

fn kill(connection: &Connection, id: &str) {
    let body = request::Body::KillSandbox(KillSandbox { sandbox_id: id.to_owned() });
    let answer = connection.ask(body).expect("an answer");
    assert!(matches!(answer.body, Some(reply::Body::Done(_))), "{answer:?}");
}

fn list(connection: &Connection) -> Vec<SandboxEntry> {
    match connection.ask(request::Body::ListSandboxes(ListSandboxes::default())).expect("an answer").body {
        Some(reply::Body::SandboxList(list)) => list.sandboxes,
        other => panic!("no list: {other:?}"),
    }
}

fn refused(connection: &Connection, sandbox: CreateSandbox) -> Failure {
    let asked = format!("{sandbox:?}");
    connection
        .refusal(request::Body::CreateSandbox(sandbox))
        .unwrap_or_else(|error| panic!("{asked} was not refused: {error}"))
}

/// Refused with one of these codes, a message that names the field, and a way out.
fn assert_refusal(failure: &Failure, codes: &[&str], field: &str) {
    assert!(codes.contains(&failure.code.as_str()), "{failure:?}");
    assert!(failure.message.contains(field), "the message does not name {field}: {failure:?}");
    assert!(!failure.remediation.is_empty(), "no remediation: {failure:?}");
}
