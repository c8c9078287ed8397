//! Faults on the work queue, and what each call does is counted in a file of its session: none runs twice, none stays without
//! its answer while the lease is ours.
//!
//! `wire`: what is lost, delivered twice, refused or cut between daemon and control plane. `kills`: the runner is killed at
//! each step of a call and of a work item. `race`: two workers and one item.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

mod kills;
mod race;
mod wire;

use sandbox_runner_tests::claude::{ControlPlane, Environment, Mock, NewSession, ToolUse};

/// A session of a control plane, and the file in its workspace in which each call leaves a line.
struct Ledger {
    name: String,
    session: String,
}

/// A call that leaves `id` in the file `ledger` and says so after `seconds`.
fn counted(ledger: &str, id: &str, seconds: f64) -> ToolUse {
    ToolUse::bash(&format!("echo {id} >> /workspace/{ledger}; sleep {seconds}; echo said by {id}"))
}

impl Ledger {
    fn new(mock: &Mock, environment: &Environment, name: &str) -> Self {
        let session = mock.lock().create_session(&environment.id, NewSession::default()).expect("a session");
        Self { name: name.to_owned(), session }
    }

    /// Calls with these names, all in one turn. Returns their ids.
    fn call(&self, plane: &mut ControlPlane, names: &[&str]) -> Vec<String> {
        let uses = names.iter().map(|name| counted(&self.name, name, 0.2)).collect();
        plane.call_tools(&self.session, uses)
    }

    /// Waits for the answers; each must be what its call has said.
    async fn assert_answered(&self, what: &str, mock: &Mock, ids: &[String], names: &[&str]) {
        for (id, name) in ids.iter().zip(names) {
            let result = mock.result_of(&self.session, id).await;
            assert_eq!((result.text(), result.is_error), (format!("said by {name}"), false), "{what}");
        }
    }
}

/// A control plane whose environment has an id that belongs to its number.
async fn control_plane(number: usize) -> (Mock, Environment) {
    let mock = Mock::start().await;
    for _ in 0..number {
        mock.lock().next_id("env_");
    }
    let environment = mock.lock().create_environment("test").expect("an environment");
    (mock, environment)
}
