//! A control plane of Claude Managed Agents for tests: the work queue, sessions, skills and memory stores of self-hosted
//! environments, as a real HTTP server on loopback.
//!
//! ```no_run
//! # async fn test() {
//! use sandbox_runner_tests::claude::{Endpoint, Expect, Fault, How, Mock, NewSession, Step, ToolUse};
//!
//! let mock = Mock::start().await;
//! let environment = mock.lock().create_environment("test").unwrap(); // its `id`, and its key in `keys[0]`
//! // Now start a worker: base URL `mock.base_url()`, the id and the key.
//!
//! // A session queues a work item by itself. The test is the model ...
//! let session = mock.lock().create_session(&environment.id, NewSession::default()).unwrap();
//! let call = mock.lock().call_tools(&session, vec![ToolUse::bash("echo hi")]).remove(0);
//! let result = mock.result_of(&session, &call).await;
//! assert_eq!(result.text(), "hi");
//! mock.lock().end_turn(&session, serde_json::json!({"type": "end_turn"}));
//! mock.stopped(&session).await; // the worker has stopped the work item
//!
//! // ... or a script is, which a message of the user begins.
//! let script = vec![Step::Call(vec![ToolUse::bash("false").expecting(Expect::ErrorHas("1".into()))])];
//! let session = NewSession { script: Some(script), ..NewSession::default() };
//! let session = mock.lock().create_session(&environment.id, session).unwrap();
//! mock.say(&session, "go");
//! mock.turn_over(&session).await; // panics where a result was not the expected one
//!
//! // Faults are told by endpoint, before they happen: this acknowledgement is applied, and its answer is lost.
//! mock.lock().faults.push(Fault::next(Endpoint::Ack, How::LoseResponse));
//! // Leases: `settings.ttl_seconds`, `lapse`, `take_lease_away`, `pass` (moves the clock), `revoke_tokens`, `stop`.
//!
//! // Every request is kept, and what a worker must not do is noticed.
//! assert!(mock.lock().breaches.is_empty(), "{:?}", mock.lock().breaches);
//! let beats = mock.requests(Endpoint::Heartbeat);
//! # }
//! ```
//!
//! [`ControlPlane`] is the state, plain data behind one lock: [`Mock::lock`] gives it, and everything that changes it is a
//! method of it, whether a request or a test calls it. Where the documentation leaves open what the real server does, the
//! choice is in [`Settings`], or named where it is made.

mod api;
pub mod client;
mod error;
mod event;
mod fault;
mod history;
pub mod hunt;
mod memory;
pub mod official;
pub mod ours;
mod plane;
mod queue;
mod request;
mod route;
mod script;
mod serve;
mod session;
mod skill;
mod stream;
mod thread;
mod work;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::runner::scaled;

pub use error::ApiError;
pub use event::{Confirmation, Expect, Posted, PostedResult, ToolUse, Verdict, Wire};
pub use fault::{Fault, How};
pub use memory::{Memory, MemoryStore};
pub use plane::{Breach, ControlPlane, Environment, Interrupt, SecondResult, Settings};
pub use request::{Credential, Fate, Incoming, Recorded};
pub use route::{Access, Endpoint};
pub use script::Step;
pub use serve::Guard;
pub use session::{Call, CallState, Frame, Logged, NewSession, Session, Status};
pub use skill::Skill;
pub use thread::Thread;
pub use work::{NO_HEARTBEAT, Secret, Token, Work, WorkState};

use serve::Shared;

/// How long a test waits for something before it fails. Bounds a broken run; no passing test comes near it.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a wait looks at what only time changes.
const LOOK: Duration = Duration::from_millis(20);

/// A control plane that is served. Dropping it closes everything.
#[derive(Debug)]
pub struct Mock {
    shared: Arc<Shared>,
    port: u16,
    serving: Option<JoinHandle<()>>,
}

impl Mock {
    /// An empty control plane on a free loopback port.
    ///
    /// # Panics
    /// When there is no port.
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free loopback port");
        let port = listener.local_addr().expect("the address of a listener").port();
        let shared = Arc::new(Shared::new());
        let serving = Some(tokio::spawn(serve::accept(listener, Arc::clone(&shared))));
        Self { shared, port, serving }
    }

    /// Where a worker finds it: `http://127.0.0.1:…`.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The state. Do not keep it over an `await`.
    #[must_use]
    pub fn lock(&self) -> Guard<'_> {
        self.shared.lock()
    }

    /// Breaks all connections and refuses new ones. The state stays.
    pub async fn halt(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            // It was aborted, so it ends with that.
            let _ = serving.await;
        }
    }

    /// Serves again, on the same port and with the same state.
    ///
    /// # Panics
    /// When somebody else has taken the port.
    pub async fn resume(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.expect("the port of before");
        self.serving = Some(tokio::spawn(serve::accept(listener, Arc::clone(&self.shared))));
    }

    /// Waits until `find` finds something.
    ///
    /// # Panics
    /// With `what` and the last requests when it does not within a minute.
    pub async fn until<T>(&self, what: &str, mut find: impl FnMut(&ControlPlane) -> Option<T>) -> T {
        let deadline = Instant::now() + scaled(PATIENCE);
        let mut changed = self.shared.changed();
        loop {
            changed.mark_unchanged();
            if let Some(found) = find(&self.shared.lock()) {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "waited in vain for {what}; the last requests:\n{}",
                self.last_requests()
            );
            // Whether it changed or it is time to look, it looks.
            let _ = tokio::time::timeout(LOOK, changed.changed()).await;
        }
    }

    /// Waits for the result of a call.
    ///
    /// # Panics
    /// When none comes.
    pub async fn result_of(&self, session_id: &str, call_id: &str) -> PostedResult {
        let what = format!("the result of {call_id}");
        self.until(&what, |plane| plane.session(session_id).call(call_id).result.clone()).await
    }

    /// Waits until the session has no work item that is not stopped.
    ///
    /// # Panics
    /// When it does not come to that.
    pub async fn stopped(&self, session_id: &str) {
        let what = format!("the stop of the work item of {session_id}");
        self.until(&what, |plane| plane.live_item(session_id).is_none().then_some(())).await;
    }

    /// Waits until the session is idle and nothing of it waits.
    ///
    /// # Panics
    /// When it does not come to that, or when a result was not what the script expects.
    pub async fn turn_over(&self, session_id: &str) {
        let what = format!("the end of the turn of {session_id}");
        let over = |plane: &ControlPlane| {
            let session = plane.session(session_id);
            (session.status != Status::Running && session.waiting().is_empty()).then(|| session.mismatches.clone())
        };
        let mismatches = self.until(&what, over).await;
        assert!(mismatches.is_empty(), "unexpected results:\n{}", mismatches.join("\n"));
    }

    /// The user says something.
    ///
    /// # Panics
    /// When the session takes no message.
    pub fn say(&self, session_id: &str, text: &str) {
        let content = vec![serde_json::json!({"type": "text", "text": text})];
        self.post(session_id, Posted::Message { content });
    }

    /// The user interrupts one thread, or all.
    ///
    /// # Panics
    /// When the session takes no interrupt.
    pub fn interrupt(&self, session_id: &str, thread: Option<&str>) {
        self.post(session_id, Posted::Interrupt { thread: thread.map(ToOwned::to_owned) });
    }

    /// The user decides about a call.
    ///
    /// # Panics
    /// When the session takes no confirmation.
    pub fn confirm(&self, session_id: &str, tool_use_id: &str, result: Verdict) {
        let tool_use_id = tool_use_id.to_owned();
        self.post(session_id, Posted::Confirmation(Confirmation { tool_use_id, result, deny_message: None }));
    }

    /// Requests of an endpoint so far.
    #[must_use]
    pub fn requests(&self, endpoint: Endpoint) -> Vec<Recorded> {
        self.lock().record.iter().filter(|request| request.endpoint == Some(endpoint)).cloned().collect()
    }

    fn post(&self, session_id: &str, event: Posted) {
        let posted = self.lock().post_events(session_id, vec![event], &Credential::ApiKey);
        posted.expect("a session that takes events");
    }

    fn last_requests(&self) -> String {
        let plane = self.lock();
        let lines =
            plane.record.iter().rev().take(20).map(|request| format!("{} -> {:?}", request.line(), request.fate));
        let mut lines: Vec<String> = lines.collect();
        lines.reverse();
        lines.join("\n")
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }
}
