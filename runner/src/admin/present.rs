//! Sessions and calls as messages of the administration protocol.

use std::time::Duration;

use proto::admin::v1 as pb;

use crate::connector::claude::{Board, ItemView};
use crate::session::core::{CallStage, SessionStage};
use crate::session::{ViewCall, ViewSession};
use crate::work::{Outcome, Receipt, Slot};

/// One session.
pub(super) fn session(session: &ViewSession, sandbox_id: Option<String>) -> pb::Session {
    let limits = session.request.limits;
    let phase = match session.stage {
        SessionStage::Opening => "opening",
        SessionStage::Ready => "ready",
        SessionStage::Frozen => "frozen",
        SessionStage::Stopped => "stopped",
        SessionStage::Closing => "closing",
    };
    pb::Session {
        session_id: session.request.session_id.to_string(),
        epoch: session.epoch,
        phase: phase.to_owned(),
        sandbox_id: sandbox_id.unwrap_or_default(),
        environment: session.request.environment.name.clone(),
        tenant: session.request.tenant.clone(),
        limits: Some(pb::Limits {
            cpu_millis: limits.cpu_millis,
            memory_bytes: limits.memory_bytes,
            disk_bytes: limits.disk_bytes,
            pids: limits.pids,
        }),
        calls: session.calls.iter().map(call).collect(),
    }
}

/// The work items of all queues; `now` is of the clock of leases.
pub(super) fn work_items(queues: &[Board], now: u64) -> Vec<pb::WorkItem> {
    let of_queue = |queue: &Board| {
        let environment_id = queue.environment_id().to_owned();
        let item = move |item: ItemView| pb::WorkItem {
            work_id: item.work_id,
            environment_id: environment_id.clone(),
            server_session_id: item.session_id,
            session_id: item.core,
            state: item.stage.to_owned(),
            lease_left_ms: Duration::from_nanos(item.lease_until.saturating_sub(now))
                .as_millis()
                .try_into()
                .unwrap_or(u64::MAX),
        };
        queue.items().into_iter().map(item)
    };
    queues.iter().flat_map(of_queue).collect()
}

/// How a queue stands.
pub(super) fn queue(queue: &Board) -> pb::Queue {
    pb::Queue {
        environment_id: queue.environment_id().to_owned(),
        work_items: u32::try_from(queue.items().len()).unwrap_or(u32::MAX),
        problem: queue.problem(),
    }
}

/// One call.
pub(super) fn call(call: &ViewCall) -> pb::Call {
    let (phase, outcome, output_bytes) = match &call.stage {
        CallStage::Queued => ("queued", String::new(), 0),
        CallStage::Starting => ("starting", String::new(), 0),
        CallStage::Running => ("running", String::new(), 0),
        CallStage::Finished(result) => {
            let bytes = result.end.streams.iter().map(|stream| stream.total_bytes).sum();
            ("finished", words(&result.end.outcome), bytes)
        }
    };
    pb::Call {
        call_id: call.request.call_id.to_string(),
        tool: call.request.input.name().to_owned(),
        phase: phase.to_owned(),
        outcome,
        output_bytes,
    }
}

fn words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Exited { code } => format!("exited {code}"),
        Outcome::Signaled { signal, .. } => format!("signal {signal}"),
        Outcome::TimedOut { after, .. } => format!("timed out after {} ms", after.as_millis()),
        Outcome::Cancelled { before_start: true, .. } => "cancelled before start".to_owned(),
        Outcome::Cancelled { .. } => "cancelled".to_owned(),
        Outcome::OutOfMemory { .. } => "out of memory".to_owned(),
        Outcome::ForbiddenSystemCall { .. } => "forbidden system call".to_owned(),
        Outcome::NeverStarted { failure, .. } => format!("never started: {}", failure.code),
        Outcome::Indeterminate { failure } => format!("indeterminate: {}", failure.code),
    }
}

/// A receipt.
/// What calls have left running.
pub(super) fn slots(slots: Vec<Slot>) -> pb::SlotList {
    let slot = |slot: Slot| pb::Slot { call_id: slot.call_id.to_string(), pids: slot.pids };
    pb::SlotList { slots: slots.into_iter().map(slot).collect() }
}

pub(super) fn receipt(receipt: &Receipt) -> pb::Receipt {
    let layer = |layer: &crate::work::Layer| pb::Layer {
        name: layer.name.clone(),
        requested: layer.requested.clone(),
        enforced: layer.enforced.clone(),
        errno: layer.errno,
    };
    pb::Receipt {
        tier: receipt.tier.clone(),
        layers: receipt.layers.iter().map(layer).collect(),
        switched_off: receipt.switched_off.clone(),
    }
}
