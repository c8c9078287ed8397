//! How soon a cancel is felt: the first signal by the program itself, the last one by everything that it has started.
//!
//! A cancel goes up a ladder: SIGINT or SIGTERM first, as it asks for, and SIGKILL when that was ignored for a time that is
//! somebody's choice. So the first signal and SIGKILL are measured from a cancel that asks for each, and not through that time.

use std::time::Instant;

use proto::runner::v1 as pb;
use proto::runner::v1::CancelMode;
use proto::runner::v1::call::Input;
use proto::runner::v1::outcome::Kind;
use tokio::sync::broadcast::error::RecvError;

use super::objective::Objective;
use super::{Bench, WARM_UP, settle, stamp};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::bench::whole::{self, Whole};
use crate::dev::{CallOutcome, Link, Session};

/// A 99th percentile of fewer samples is just the largest.
const TAIL_ROUNDS: usize = 100;
/// Processes beside the first one that SIGKILL has to end.
const GROUP: usize = 8;

/// Says when it gets the signal, which is taken at once while it waits.
fn hearing(signal: &str) -> String {
    format!("trap 'echo \"{}\"; kill $!; exit 0' {signal}; sleep 1000 & echo ready; wait", stamp::NOW)
}

/// Hears nothing but SIGKILL, and neither does what it starts.
fn deaf() -> String {
    format!("trap '' INT TERM; for ((i = 0; i < {GROUP}; i++)); do sleep 1000 & done; echo ready; wait")
}

/// S8.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (way, _) = bench.durable().await?;
    let session = way.session().await?;
    let (mut terminated, mut interrupted, mut killed) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds.max(TAIL_ROUNDS) {
        let call_id = |name: &str| format!("{name}-{round}");
        let term = felt(&way, &session, &call_id("term"), exec(&hearing("TERM")), CancelMode::Terminate).await?;
        // A program that the shell runs, because that is what a user starts.
        let command = whole::bash(&format!("bash -c '{}'", hearing("INT").replace('\'', r"'\''")));
        let int = felt(&way, &session, &call_id("int"), command, CancelMode::Interrupt).await?;
        let kill = dead(&way, &session, &call_id("kill")).await?;
        if round >= WARM_UP {
            terminated.push(term);
            interrupted.push(int);
            killed.push(kill);
        }
    }
    way.end().await?;
    let (ms, first) = (Unit::Milliseconds, Objective { p50: None, p99: Some(50.0) });
    let note = "from sending the cancel to the program's own note of the signal; wall clock, with a journal";
    let group = format!("cancel with SIGKILL to the end of {} processes, told", GROUP + 1);
    let last = Objective { p50: None, p99: Some(500.0) };
    let note_of_last = "from sending the cancel to having the result, which counts nothing that was left";
    Ok([
        first.rows("S8", "cancel to SIGTERM in a program", ms, &terminated, note),
        first.rows("S8", "cancel to SIGINT in a program of the shell", ms, &interrupted, note),
        last.rows("S8", &group, ms, &killed, note_of_last),
    ]
    .concat())
}

fn exec(script: &str) -> Input {
    let argv = ["bash", "-c", script].map(|argument| argument.as_bytes().to_vec()).to_vec();
    Input::Exec(pb::ExecInput { argv, ..Default::default() })
}

/// Milliseconds from a cancel to the moment at which the program felt it.
async fn felt(
    way: &Whole,
    session: &Session,
    call_id: &str,
    input: Input,
    mode: CancelMode,
) -> Result<f64, BenchError> {
    start(way, session, call_id, input).await?;
    let begin = stamp::now();
    session.cancel(call_id, mode);
    let outcome = session.outcome(call_id).await?;
    let heard = outcome.streams.values().flat_map(|stream| stamp::moments(&stream.bytes)).next();
    heard.map(|heard| stamp::milliseconds_between(begin, heard)).ok_or_else(|| unexpected(call_id, &outcome))
}

/// Milliseconds from a cancel to the result, when nothing is left of the call.
async fn dead(way: &Whole, session: &Session, call_id: &str) -> Result<f64, BenchError> {
    start(way, session, call_id, exec(&deaf())).await?;
    let begin = Instant::now();
    session.cancel(call_id, CancelMode::Kill);
    let outcome = session.outcome(call_id).await?;
    let took = milliseconds(begin);
    let kind = outcome.message.outcome.as_ref().and_then(|outcome| outcome.kind.as_ref());
    let killed = matches!(kind, Some(Kind::Cancelled(pb::Cancelled { killed: true, .. })));
    if killed && outcome.message.processes_left == 0 { Ok(took) } else { Err(unexpected(call_id, &outcome)) }
}

/// Sends a call and waits until it says that it is ready.
async fn start(way: &Whole, session: &Session, call_id: &str, input: Input) -> Result<(), BenchError> {
    settle().await;
    let mut seen = way.orchestrator().watch();
    session.send(call_id, input);
    loop {
        match seen.recv().await {
            Ok(Link::Output(chunk)) if chunk.call_id == call_id => break,
            Ok(Link::Finished(finished)) if finished == call_id => {
                return Err(unexpected(call_id, &session.outcome(call_id).await?));
            }
            Ok(_) | Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return Err(BenchError::Link("the orchestrator has ended".to_owned())),
        }
    }
    // What it does next is wait.
    settle().await;
    Ok(())
}

fn unexpected(call_id: &str, outcome: &CallOutcome) -> BenchError {
    let (kind, left) = (&outcome.message.outcome, outcome.message.processes_left);
    let said: Vec<_> = outcome.streams.values().map(|stream| String::from_utf8_lossy(&stream.bytes)).collect();
    BenchError::Link(format!("the call {call_id} ended with {kind:?}, {left} processes were left: {}", said.join(" ")))
}
