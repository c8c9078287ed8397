//! The worker of the official SDK serves the control plane of the tests as it serves the real one.
//!
//! This is the proof that the control plane keeps the contract: whoever else works with it is measured by the same one. What
//! the official worker does although the documentation says otherwise is a test here too, so that a newer SDK shows it.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod gates;
mod leases;
mod serving;
mod wire;

use std::path::Path;

use sandbox_runner_tests::claude::official::Worker;
use sandbox_runner_tests::claude::{Endpoint, Environment, Expect, Mock, NewSession, ToolUse};
use serde_json::json;

/// How long a session may be idle before the worker leaves it.
const MAX_IDLE: f64 = 1.0;

/// A control plane, an environment, and a worker of it.
struct World {
    mock: Mock,
    environment: Environment,
    worker: Worker,
}

impl World {
    async fn new(python: &Path) -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("official").unwrap();
        let worker = Worker::start(python, &mock, &environment, MAX_IDLE);
        Self { mock, environment, worker }
    }

    fn session(&self, new: NewSession) -> String {
        self.mock.lock().create_session(&self.environment.id, new).unwrap()
    }

    /// A session without a script, and the calls with which it begins.
    fn calls(&self, uses: Vec<ToolUse>) -> (String, Vec<String>) {
        let session = self.session(NewSession::default());
        let ids = self.mock.lock().call_tools(&session, uses);
        (session, ids)
    }

    async fn text(&self, session: &str, id: &str) -> String {
        self.mock.result_of(session, id).await.text()
    }

    /// Ends the turn, and waits until the worker has left.
    async fn end(&self, session: &str) {
        self.mock.lock().end_turn(session, json!({"type": "end_turn"}));
        self.mock.stopped(session).await;
    }

    /// Waits until a command of the worker has made this file.
    async fn file(&self, name: &str) {
        let path = self.worker.workdir().join(name);
        self.mock.until(name, |_| path.exists().then_some(())).await;
    }

    fn assert_no_breach(&self) {
        let breaches = self.mock.lock().breaches.clone();
        assert!(breaches.is_empty(), "{breaches:?}");
    }

    /// Requests for this work item, each as its endpoint.
    fn endpoints(&self, session: &str) -> Vec<Endpoint> {
        let plane = self.mock.lock();
        let work: Vec<&str> =
            plane.work.iter().filter(|work| work.data_id == session).map(|work| work.id.as_str()).collect();
        let about = |path: &str| path.contains(session) || work.iter().any(|id| path.contains(id));
        let requests = plane.record.iter().filter(|request| about(&request.incoming.path));
        requests.filter_map(|request| request.endpoint).collect()
    }
}

fn plain(text: &str) -> Expect {
    Expect::Text(text.to_owned())
}
