//! The contract of the work queue where only the built daemon can keep it: threads, leases over the death of a runner, and the
//! way to the server.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::time::{Duration, Instant};

use sandbox_runner_tests::claude::{Environment, Mock, NewSession, ToolUse, ours};
use sandbox_runner_tests::daemon::{Daemon, Options};
use sandbox_runner_tests::host;
use sandbox_runner_tests::runner::scaled;

mod environments;
mod leases;
mod threads;
mod transport;

/// A daemon and the control plane that it serves.
struct Site {
    daemon: Daemon,
    mock: Mock,
    environment: Environment,
}

impl Site {
    /// Leases last for five minutes: what waits for one to run out does not end in time.
    async fn start() -> Self {
        Self::start_with("").await
    }

    /// With these lines in the section of the queue.
    async fn start_with(lines: &str) -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("test").expect("an environment");
        let mut daemon = ours::install_with(&[(&mock, &environment)], false, Options::default(), lines).await;
        daemon.start_launcher().await;
        daemon.tend_runner();
        Self { daemon, mock, environment }
    }

    fn session(&self) -> String {
        self.mock.lock().create_session(&self.environment.id, NewSession::default()).expect("a session")
    }

    fn use_tools(&self, session: &str, tool_uses: Vec<ToolUse>) -> Vec<String> {
        self.mock.lock().call_tools(session, tool_uses)
    }

    async fn text(&self, session: &str, tool_use: ToolUse) -> String {
        let id = self.use_tools(session, vec![tool_use]).remove(0);
        self.mock.result_of(session, &id).await.text()
    }

    fn end(mut self) {
        self.daemon.end_with_nothing_left();
        let breaches = self.mock.lock().breaches.clone();
        assert!(breaches.is_empty(), "{breaches:?}\n{}", self.daemon.end_of_log());
    }
}

/// Whether a command with this text in its arguments runs anywhere.
fn runs(text: &str) -> bool {
    let has = |pid: u32| {
        std::fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.windows(text.len()).any(|w| w == text.as_bytes()))
    };
    host::pids().any(has)
}

async fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + scaled(Duration::from_secs(60));
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
