//! With a journal that takes its time, calls are held at their gate until their start is written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use proto::runner::v1 as pb;
use runner::dev::LinkSettings;
use runner::journal::{Condition, Journal, JournalError, Record};
use runner::work::BoxFuture;

use crate::world::{Options, World, within};

/// Writes nowhere, slowly; from a given moment on it refuses.
#[derive(Default)]
struct Slow {
    broken: AtomicBool,
    started: AtomicU64,
    trimmed: AtomicU64,
}

impl Journal for Slow {
    fn is_durable(&self) -> bool {
        true
    }

    fn append(&self, record: Record) -> BoxFuture<'static, Result<(), JournalError>> {
        match record {
            Record::Started { .. } => drop(self.started.fetch_add(1, Ordering::SeqCst)),
            Record::Acknowledged { .. } => drop(self.trimmed.fetch_add(1, Ordering::SeqCst)),
            _ => {}
        }
        let broken = self.broken.load(Ordering::SeqCst);
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(2)).await;
            if broken {
                Err(JournalError { record: "some", reason: "disk full".into(), is_final: true })
            } else {
                Ok(())
            }
        })
    }

    fn condition(&self) -> (Condition, Duration) {
        let broken = self.broken.load(Ordering::SeqCst);
        (if broken { Condition::Broken("disk full".into()) } else { Condition::Good }, Duration::ZERO)
    }
}

#[tokio::test]
async fn every_call_passes_its_gate_once_and_is_trimmed_when_it_is_acknowledged() {
    let journal = Arc::new(Slow::default());
    let world = World::new(Options { journal: Arc::clone(&journal) as Arc<dyn Journal>, ..Default::default() }).await;
    let session = within("session", world.session("s")).await;
    for number in 0..10 {
        within("call", session.bash(&format!("c{number}"), "print 10")).await.unwrap();
    }
    assert_eq!(world.fakes.gated.load(Ordering::SeqCst), 10);
    assert_eq!(journal.started.load(Ordering::SeqCst), 10);
    within("trim", async {
        while journal.trimmed.load(Ordering::SeqCst) < 10 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn broken_journal_accepts_nothing_and_runs_nothing() {
    let journal = Arc::new(Slow::default());
    let link = LinkSettings { heartbeat_every: Duration::from_millis(50), ..LinkSettings::default() };
    let journal_of_world = Arc::clone(&journal) as Arc<dyn Journal>;
    let world = World::new(Options { journal: journal_of_world, link, ..Default::default() }).await;
    let session = within("session", world.session("s")).await;
    journal.broken.store(true, Ordering::SeqCst);
    let finished = within("first", session.bash("c0", "print 10")).await.unwrap();
    let text = format!("{:?}", finished.message.outcome);
    assert!(text.contains("NeverStarted") && text.contains("JOURNAL_READ_ONLY"), "{text}");
    let error = within("second", session.bash("c1", "print 10")).await.unwrap_err();
    assert!(error.to_string().contains("JOURNAL_READ_ONLY"), "{error}");
    assert_eq!(world.fakes.executions_of("c0") + world.fakes.executions_of("c1"), 0);
    within("heartbeat", async {
        loop {
            let health = world.orchestrator.heartbeats().1.map(|heartbeat| (heartbeat.health(), heartbeat.reasons));
            if let Some((pb::HealthState::ReadOnly, reasons)) = health {
                return assert_eq!(reasons, ["the journal refuses writes: disk full"]);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
