//! With a journal that takes its time, calls are held at their gate until their start is written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use proto::runner::v1 as pb;
use runner::daemon::Unasked;
use runner::dev::LinkSettings;
use runner::journal::{Condition, Journal, JournalError, Record};
use runner::work::BoxFuture;

use crate::process::Process;
use crate::world::{Options, World, within};

/// Writes nowhere, slowly; from a given moment on it refuses.
#[derive(Default)]
struct Slow {
    broken: AtomicBool,
    full: AtomicBool,
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
        let condition = if self.broken.load(Ordering::SeqCst) {
            Condition::Broken("disk full".into())
        } else if self.full.load(Ordering::SeqCst) {
            Condition::OutOfSpace
        } else {
            Condition::Good
        };
        (condition, Duration::ZERO)
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

fn bash(command: &str) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() })
}

#[tokio::test]
async fn broken_journal_accepts_nothing_and_runs_nothing() {
    let journal = Arc::new(Slow::default());
    let link = LinkSettings { heartbeat_every: Duration::from_millis(50), ..LinkSettings::default() };
    let journal_of_world = Arc::clone(&journal) as Arc<dyn Journal>;
    let world = World::new(Options { journal: journal_of_world, link, ..Default::default() }).await;
    let session = within("session", world.session("s")).await;
    journal.broken.store(true, Ordering::SeqCst);
    let refused = within("refusal", async {
        let mut number = 0;
        loop {
            session.send(&format!("c{number}"), bash("print 10"));
            number += 1;
            if let Ok(refused) = tokio::time::timeout(Duration::from_millis(20), world.orchestrator.refusal()).await {
                return refused.unwrap();
            }
        }
    })
    .await;
    assert_eq!(refused.failure.unwrap().code, "JOURNAL_READ_ONLY");
    assert!(world.fakes.executions.lock().unwrap().is_empty());
    // What a failed write has left of the first may be there for the next runner, so nobody says that it did not run.
    let [waiting, running, over] = world.orchestrator.phases();
    assert!(waiting > 0 && (running, over) == (0, 0), "{waiting}, {running}, {over}");
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

/// F-35
#[tokio::test]
async fn runner_whose_journal_has_a_full_disk_says_that_it_is_saturated_and_that_it_is_ready_when_there_is_room() {
    let journal = Arc::new(Slow::default());
    let link = LinkSettings { heartbeat_every: Duration::from_millis(50), ..LinkSettings::default() };
    let journal_of_world = Arc::clone(&journal) as Arc<dyn Journal>;
    let world = World::new(Options { journal: journal_of_world, link, ..Default::default() }).await;
    for (full, expected) in [
        (true, (pb::HealthState::Saturated, vec!["the disk of the journal is full".to_owned()])),
        (false, (pb::HealthState::Ready, Vec::new())),
    ] {
        journal.full.store(full, Ordering::SeqCst);
        within("heartbeat", async {
            loop {
                let last = world.orchestrator.heartbeats().1;
                if last.is_some_and(|last| (last.health(), last.reasons) == expected) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// F-33: a broken journal stays so in this process, and another one reads it again. So it ends when nobody needs it any more.
#[tokio::test]
async fn runner_with_a_broken_journal_serves_its_session_to_the_end_and_then_ends() {
    let journal = Arc::new(Slow::default());
    let process = Process::start(Arc::clone(&journal) as Arc<dyn Journal>).await;
    let session = &process.session;
    let command = pb::BashInput { command: Some("print 10; hang".into()), ..Default::default() };
    session.send("c", pb::call::Input::Bash(command));
    within("started", session.started("c")).await.unwrap();

    journal.broken.store(true, Ordering::SeqCst);
    within("end of input", session.stdin("c", 0, b"", true)).await.unwrap();
    let finished = within("c", session.outcome("c")).await.unwrap();
    assert!(matches!(finished.message.outcome.unwrap().kind, Some(pb::outcome::Kind::Exited(_))));
    assert!(!process.running.is_finished(), "its session is open");
    within("close", session.close(Duration::ZERO)).await.unwrap();

    let ended = within("end", process.running).await.unwrap();
    assert!(matches!(ended, Err(Unasked::JournalBroken(reason)) if reason == "disk full"));
    within("goodbye", process.orchestrator.goodbye()).await.unwrap();
}
