//! What process 1 says: answers for those who wait, events for the observers of calls. The first thing that cannot be ends the
//! connection.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use proto::init::v1 as wire;
use sha2::{Digest as _, Sha256};
use tracing::{debug, warn};

use super::calls::{Begun, Ended, LARGEST_RESULT};
use super::exchange::{Shared, end_of, shorten};
use super::violation::Violation;
use super::{ControlEnd, decode};
use crate::work::{CallEnd, CallEvent, CallObserver, Stream, limits};

impl Shared {
    fn deliver(self: &Arc<Self>, bytes: &[u8]) -> Result<(), Violation> {
        let frame = wire::Frame::decode(bytes).map_err(|error| Violation::Undecodable(shorten(&error.to_string())))?;
        if frame.generation != self.generation {
            // Written for our predecessor, which is no fault; written for a successor, which cannot be.
            return if frame.generation < self.generation {
                Ok(())
            } else {
                Err(Violation::Malformed("for a later runner"))
            };
        }
        let body = frame.body.ok_or(Violation::Malformed("without content"))?;
        if frame.request_id == 0 {
            return self.event(body);
        }
        let waiting = self.state().outstanding.remove(&frame.request_id);
        let waiting = waiting.ok_or(Violation::UnknownRequest(frame.request_id))?;
        let body = match body {
            // A call that was over at once: its end says that it was prepared.
            wire::frame::Body::CallFinished(finished) => {
                let prepared = wire::CallPrepared { call_id: finished.call_id.clone() };
                self.event(wire::frame::Body::CallFinished(finished))?;
                wire::frame::Body::CallPrepared(prepared)
            }
            wire::frame::Body::Welcome(welcome) => {
                self.state().shell_generation = welcome.shell_generation;
                wire::frame::Body::Welcome(welcome)
            }
            // Settled here and not by who asked: what comes behind it is judged by it.
            wire::frame::Body::Snapshot(snapshot) if waiting.kind == "snapshot" => {
                self.settle(&snapshot)?;
                wire::frame::Body::Snapshot(snapshot)
            }
            body => body,
        };
        // Who asked may have given up meanwhile.
        drop(waiting.answer.send(body));
        Ok(())
    }

    fn event(self: &Arc<Self>, body: wire::frame::Body) -> Result<(), Violation> {
        match body {
            wire::frame::Body::CallStarted(started) => {
                let (Begun { observer, time_limit, earlier }, shell_generation) = {
                    let mut state = self.state();
                    (state.calls.started(&started.call_id)?, state.shell_generation)
                };
                if let Some(limit) = time_limit {
                    // Counted from the start, which process 1 can only claim to be earlier than it was.
                    let passed = if earlier { since(started.boottime_ns) } else { Duration::ZERO };
                    self.watch_overdue(started.call_id, limit.saturating_sub(passed));
                }
                if let Some(observer) = observer {
                    observer.observe(CallEvent::Started { boottime_ns: started.boottime_ns, shell_generation });
                }
            }
            wire::frame::Body::OutputAdvanced(advanced) => {
                let lengths = decode::lengths(&advanced.streams)?;
                let (observer, lengths) = self.state().calls.advanced(&advanced.call_id, lengths)?;
                if let Some(observer) = observer {
                    observer.observe(CallEvent::OutputAdvanced(lengths));
                }
            }
            wire::frame::Body::CallFinished(finished) => {
                let (call_id, started) = (finished.call_id.clone(), finished.started_boottime_ns);
                let end = decode::call_end(finished, &self.output_root)?;
                let (Ended { observer, unannounced, ahead }, shell_generation) = {
                    let mut state = self.state();
                    state.shell_generation = end.shell_generation.max(state.shell_generation);
                    (state.calls.finished(&call_id, &end)?, state.shell_generation)
                };
                let Some(observer) = observer else {
                    self.discard_if_unwanted(call_id);
                    return Ok(());
                };
                if unannounced {
                    // A process 1 of an earlier version does not say.
                    let boottime_ns = if started == 0 { started_before(end.duration) } else { started };
                    observer.observe(CallEvent::Started { boottime_ns, shell_generation });
                }
                self.report_end(call_id, end, ahead, observer);
            }
            wire::frame::Body::OutputData(data) if data.stream == i32::from(wire::Stream::Result) => {
                self.state().calls.sent_ahead(&data.call_id, data.offset, &data.data)?;
            }
            _ => return Err(Violation::Malformed("is an answer without a request")),
        }
        Ok(())
    }

    /// Tells the observer; the result of a tool that did not travel along is fetched first.
    fn report_end(
        self: &Arc<Self>,
        call_id: String,
        mut end: CallEnd,
        ahead: Vec<u8>,
        observer: Arc<dyn CallObserver>,
    ) {
        let result = end.streams.iter().find(|summary| summary.stream == Stream::Result);
        let fetch = match result {
            Some(summary) => match &summary.inline {
                Some(bytes) => {
                    end.result = decode::tool_result(bytes);
                    None
                }
                None if !ahead.is_empty() && summary.total_bytes == ahead.len() as u64 => {
                    end.result = decode::tool_result(&ahead);
                    None
                }
                None if summary.total_bytes <= LARGEST_RESULT as u64 => Some((summary.total_bytes, summary.sha256)),
                None => None,
            },
            None => None,
        };
        let Some((total, sha256)) = fetch else {
            observer.observe(CallEvent::Finished(Box::new(end)));
            return;
        };
        let shared = Arc::downgrade(self);
        tokio::spawn(async move {
            if let Some(shared) = shared.upgrade() {
                let fetched = fetch_result(&shared, &call_id, total).await.filter(|bytes| {
                    let is_whole = <[u8; 32]>::from(Sha256::digest(bytes)) == sha256;
                    if !is_whole {
                        warn!(tool_call_id = %call_id, "a spool is not what was written to it, its result is not believed");
                    }
                    is_whole
                });
                end.result = fetched.and_then(|bytes| decode::tool_result(&bytes));
            }
            observer.observe(CallEvent::Finished(Box::new(end)));
        });
    }

    /// Process 1 enforces time limits; that it does so is not taken on trust.
    pub(super) fn watch_overdue(self: &Arc<Self>, call_id: String, limit: Duration) {
        let shared = Arc::downgrade(self);
        let wait = limit.saturating_add(self.patience.overdue_margin);
        let mut end = self.end.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = end.wait_for(Option::is_some) => return,
            }
            if let Some(shared) = shared.upgrade()
                && shared.state().calls.is_open(&call_id)
            {
                shared.finish(Violation::Overdue.into());
            }
        });
    }
}

/// Reads until the connection is of no use any more, and says why.
pub(super) async fn read_loop(shared: Arc<Shared>) {
    let mut buffer = shared.socket.buffer();
    let mut end = shared.end.subscribe();
    // One clock for all requests: setting one for each would cost more than the request.
    let silence = tokio::time::sleep(shared.patience.answer);
    tokio::pin!(silence);
    let reason = loop {
        let packet = tokio::select! {
            packet = shared.socket.receive(&mut buffer) => packet,
            _ = end.wait_for(Option::is_some) => return,
            () = &mut silence => {
                match shared.next_silence() {
                    Ok(next) => silence.as_mut().reset(next),
                    Err(violation) => break violation.into(),
                }
                continue;
            }
        };
        match packet {
            Err(error) => break end_of(error),
            Ok(packet) => {
                if let Err(violation) = shared.deliver(packet.bytes) {
                    shared.tell_unrecorded(&violation);
                    break violation.into();
                }
            }
        }
    };
    match &reason {
        ControlEnd::Closed => debug!("process 1 closed its connection"),
        _ => warn!(reason = %reason, "connection to process 1 was given up"),
    }
    shared.finish(reason);
}

async fn fetch_result(shared: &Shared, call_id: &str, total: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < total {
        let chunk = shared
            .read_output(call_id, Stream::Result, bytes.len() as u64, limits::CHUNK_BYTES)
            .await
            .inspect_err(|error| debug!(%error, "result of a tool could not be read"))
            .ok()?;
        if chunk.bytes.is_empty() || chunk.offset != bytes.len() as u64 {
            return None;
        }
        bytes.extend_from_slice(&chunk.bytes);
    }
    (bytes.len() as u64 == total).then_some(bytes)
}

/// CLOCK_BOOTTIME that long ago, for a call whose start was not announced because its end came first.
fn started_before(duration: Duration) -> u64 {
    u64::try_from(boottime().saturating_sub(duration).as_nanos()).unwrap_or(u64::MAX)
}

/// How long ago that was; nothing when it is still to come.
fn since(boottime_ns: u64) -> Duration {
    boottime().saturating_sub(Duration::from_nanos(boottime_ns))
}

fn boottime() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
}
