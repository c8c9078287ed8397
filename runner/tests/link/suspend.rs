//! F-47: a machine that sleeps. Whatever was decided before, nothing begins after it until the lease is renewed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use runner::journal::{Journal, JournalError, Record, Recovered, Volatile};
use runner::session::core::Config;
use runner::session::registry::Registry;
use runner::session::{SessionHandle, Sessions};
use runner::work::*;
use tokio::sync::{Notify, mpsc};

use crate::fake::{FakeSandboxes, Fakes};
use crate::world::{DEFAULTS, RESERVE, within};

/// The start of a call is durable when the test says so, and its acceptance with it.
#[derive(Default)]
struct Held(Arc<Notify>);

impl Journal for Held {
    fn is_durable(&self) -> bool {
        true
    }

    fn append(&self, record: Record) -> BoxFuture<'static, Result<(), JournalError>> {
        let release = Arc::clone(&self.0);
        Box::pin(async move {
            match record {
                Record::Accepted(_) => std::future::pending().await,
                Record::Started { .. } => release.notified().await,
                _ => {}
            }
            Ok(())
        })
    }
}

struct Machine {
    fakes: Arc<Fakes>,
    sessions: SessionHandle,
    updates: mpsc::Receiver<Update>,
}

impl Machine {
    /// One with an open session, and a lease up to 2000.
    async fn new(journal: Arc<dyn Journal>, clock: fn() -> u64) -> Self {
        let fakes = Arc::new(Fakes::default());
        let (sessions, updates) = Sessions {
            config: Config::default(),
            registry: Registry::new(RESERVE, DEFAULTS),
            sandboxes: Arc::new(FakeSandboxes(Arc::clone(&fakes))),
            journal,
            recovered: Recovered::default(),
            clock,
        }
        .start();
        let mut machine = Self { fakes, sessions, updates };
        machine.lease(2_000).await;
        let open = SessionOpen {
            session_id: SessionId::new("s").unwrap(),
            epoch: 1,
            digest: RequestDigest([0; 32]),
            environment: EnvironmentRef::default(),
            limits: ResourceLimits::default(),
            network: Network::None,
            variables: Vec::new(),
            min_tier: String::new(),
            orphan_timeout: None,
            idle_timeout: None,
            max_concurrent_calls: 1,
            tenant: String::new(),
        };
        machine.sessions.work.send(WorkItem::Open(open)).await.unwrap();
        machine.told(|update| matches!(update, Update::SessionOpened { .. })).await;
        machine
    }

    async fn lease(&self, until_ns: u64) {
        self.sessions
            .work
            .send(WorkItem::Lease { session_id: None, until_ns, orphan_time: Duration::ZERO })
            .await
            .unwrap();
    }

    async fn call(&self) {
        let call = ToolCall {
            call_id: CallId::new("c").unwrap(),
            session_id: SessionId::new("s").unwrap(),
            epoch: 1,
            digest: RequestDigest([0; 32]),
            input: ToolInput::Bash(BashInput { command: Some("print 10".into()), restart: false }),
            limits: CallLimits::default(),
            output_mode: OutputMode::Merged,
            quiet: false,
        };
        self.sessions.work.send(WorkItem::Call(call)).await.unwrap();
    }

    async fn told(&mut self, wanted: impl Fn(&Update) -> bool) {
        within("update", async { while !wanted(&self.updates.recv().await.expect("the sessions go on")) {} }).await;
    }

    /// Everything that was sent so far is carried out: this comes after it, and is answered.
    async fn settled(&mut self) {
        let (session_id, call_id) = (SessionId::new("s").unwrap(), CallId::new("unseen").unwrap());
        let cancel = WorkItem::Cancel { session_id, epoch: 1, call_id, mode: CancelMode::Kill };
        self.sessions.work.send(cancel).await.unwrap();
        self.told(|update| matches!(update, Update::CancelNoted { .. })).await;
    }

    /// The lease is renewed too late, and then for good.
    async fn renewed_begins_it_once(mut self) {
        self.settled().await;
        assert_eq!(self.fakes.executions_of("c"), 0, "the lease had lapsed at the gate");
        self.lease(4_000).await;
        self.settled().await;
        assert_eq!(self.fakes.executions_of("c"), 0, "an answer from before the sleep renews nothing");

        self.lease(9_000).await;

        self.told(|update| matches!(update, Update::CallFinished { .. })).await;
        assert_eq!(self.fakes.executions_of("c"), 1);
    }
}

#[tokio::test]
async fn gate_stays_shut_when_the_machine_has_slept_since_its_call_was_prepared() {
    static NOW: AtomicU64 = AtomicU64::new(1_000);
    let journal = Held::default();
    let release = Arc::clone(&journal.0);
    let mut machine = Machine::new(Arc::new(journal), || NOW.load(Ordering::SeqCst)).await;
    machine.call().await;
    within("prepared", async {
        while machine.fakes.gated.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;

    NOW.store(5_000, Ordering::SeqCst);
    release.notify_one();

    // Told in the step that opens the gate.
    machine.told(|update| matches!(update, Update::CallAccepted { .. })).await;
    machine.renewed_begins_it_once().await;
}

#[tokio::test]
async fn call_without_a_gate_waits_as_well_when_the_machine_has_slept() {
    static NOW: AtomicU64 = AtomicU64::new(1_000);
    let mut machine = Machine::new(Arc::new(Volatile), || NOW.load(Ordering::SeqCst)).await;

    NOW.store(5_000, Ordering::SeqCst);
    machine.call().await;

    // Told in the step that hands it over.
    machine.told(|update| matches!(update, Update::CallAccepted { .. })).await;
    machine.renewed_begins_it_once().await;
}
