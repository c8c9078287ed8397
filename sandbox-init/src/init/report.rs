//! What the runner is told without asking. Computed from the state of the calls at the moment when the socket can take
//! it, so nothing queues up for a slow runner and nothing is lost by a reconnect.

use proto::init::v1::{CallPrepared, CallStarted, Frame, OutputAdvanced, OutputData, Stream, StreamLength, frame};

use super::call::{Call, Phase, Running};
use super::clock::{MILLISECOND, Moment, now};
use super::connection::Connection;
use super::serve::Engine;
use super::stream::{INLINE_LIMIT, OutputStream};

/// Time between two reports of more output of one call.
pub(crate) const ANNOUNCE_INTERVAL: u64 = 25 * MILLISECOND;
/// The same where somebody types and waits for the echo.
const TERMINAL_ANNOUNCE_INTERVAL: u64 = 2 * MILLISECOND;
/// A call that is over sooner is not reported as started: its end says it all, at half the cost.
pub(crate) const STARTED_AFTER: u64 = 2 * MILLISECOND;
/// More output than this is reported earlier, but not more often than every millisecond.
const ANNOUNCE_BYTES: u64 = 32 * 1024;

impl Engine {
    /// Sends what the runner does not know yet. True when that was the end of a call.
    pub(super) fn tell_runner(&mut self) -> bool {
        let now = now();
        let generation = self.generation;
        let Some(connection) = &mut self.connection else { return false };
        if connection.generation.is_none() {
            return false;
        }
        let mut told_end = false;
        let mut told = connection.flush().map(|()| connection.is_clear());
        for call in self.calls.values_mut() {
            if !matches!(told, Ok(true)) {
                break;
            }
            let was_sent = is_sent(call);
            told = tell(call, connection, generation, now);
            told_end |= !was_sent && is_sent(call);
        }
        match told {
            Ok(clear) => self.update_interest(!clear),
            Err(_) => self.disconnect(),
        }
        told_end
    }

    fn update_interest(&mut self, wants_to_write: bool) {
        if self.waits_for_socket != wants_to_write {
            self.waits_for_socket = wants_to_write;
            self.watch_connection(wants_to_write);
        }
    }
}

/// Tells what is to be told of one call; `false` when the socket is full.
fn tell(
    call: &mut Call,
    connection: &mut Connection,
    generation: u64,
    now: Moment,
) -> Result<bool, super::connection::Gone> {
    let call_id = &call.plan.call_id;
    let answer_to = &mut call.answer_to;
    let mut send = |request_id, body| connection.event(&Frame { request_id, generation, body: Some(body) });
    match &mut call.phase {
        Phase::Prepared => Ok(true),
        Phase::Running(running) => {
            let total = running.total_output();
            let fresh = total.saturating_sub(running.announced.output);
            let interval = announce_interval(running);
            let soon = running.announced.next_output.saturating_sub(interval).saturating_add(MILLISECOND);
            let is_output_due =
                fresh != 0 && (running.announced.next_output <= now || (fresh >= ANNOUNCE_BYTES && soon <= now));
            // The beginning is told before any output, and without output only when the call is not over at once.
            let is_due = is_output_due || running.started.saturating_add(STARTED_AFTER) <= now;
            if let Some(request_id) = answer_to.filter(|_| is_due) {
                if !send(request_id, frame::Body::CallPrepared(CallPrepared { call_id: call_id.clone() }))? {
                    return Ok(false);
                }
                *answer_to = None;
            }
            if running.announced.has_begun && !running.announced.started && is_due {
                let started = CallStarted { call_id: call_id.clone(), boottime_ns: running.started };
                if !send(0, frame::Body::CallStarted(started))? {
                    return Ok(false);
                }
                running.announced.started = true;
            }
            let result = running.outputs.iter().map(|output| &output.stream).find(|stream| is_result(stream));
            if let Some(result) = result
                && !send_ahead(call_id, result, &mut running.announced.ahead, false, |body| send(0, body))?
            {
                return Ok(false);
            }
            if !is_output_due || !running.announced.started {
                return Ok(true);
            }
            let length = |output: &super::call::Output| StreamLength {
                stream: output.stream.stream().into(),
                total_bytes: output.stream.total(),
            };
            let streams = running.outputs.iter().map(length).collect();
            if !send(0, frame::Body::OutputAdvanced(OutputAdvanced { call_id: call_id.clone(), streams }))? {
                return Ok(false);
            }
            running.announced.output = total;
            running.announced.next_output = now.saturating_add(interval);
            Ok(true)
        }
        Phase::Finished(finished) => {
            if !finished.sent {
                // The end of a call that was over at once is also the answer to its start.
                let request_id = answer_to.unwrap_or(0);
                let result = finished.outputs.iter().find(|stream| is_result(stream));
                if let Some(result) = result
                    && !send_ahead(call_id, result, &mut finished.ahead, true, |body| send(0, body))?
                {
                    return Ok(false);
                }
                finished.sent = send(request_id, frame::Body::CallFinished(finished.message.clone()))?;
                if finished.sent {
                    *answer_to = None;
                }
            }
            Ok(finished.sent)
        }
    }
}

fn announce_interval(running: &Running) -> u64 {
    let is_terminal = running.outputs.iter().any(|output| output.stream.stream() == Stream::Pty);
    if is_terminal { TERMINAL_ANNOUNCE_INTERVAL } else { ANNOUNCE_INTERVAL }
}

fn is_sent(call: &Call) -> bool {
    matches!(&call.phase, Phase::Finished(finished) if finished.sent)
}

fn is_result(stream: &OutputStream) -> bool {
    stream.stream() == Stream::Result
}

/// Sends what is there of a result that is too long to travel with the end of its call, so that nobody has to ask for it.
/// `false` when the socket is full.
fn send_ahead(
    call_id: &str,
    result: &OutputStream,
    ahead: &mut u64,
    is_over: bool,
    mut send: impl FnMut(frame::Body) -> Result<bool, super::connection::Gone>,
) -> Result<bool, super::connection::Gone> {
    if is_over && *ahead == 0 && result.total() <= INLINE_LIMIT as u64 {
        return Ok(true);
    }
    while let Some(rest) = result.in_memory(*ahead) {
        let piece = rest.get(..INLINE_LIMIT).unwrap_or(rest);
        if piece.is_empty() || (!is_over && piece.len() < INLINE_LIMIT) {
            break;
        }
        let data = OutputData {
            call_id: call_id.to_owned(),
            stream: Stream::Result.into(),
            offset: *ahead,
            data: piece.to_vec(),
            end: false,
        };
        if !send(frame::Body::OutputData(data))? {
            return Ok(false);
        }
        *ahead = ahead.saturating_add(piece.len() as u64);
    }
    Ok(true)
}
