//! How soon output is at the orchestrator while the call that prints it goes on.

use std::time::Duration;

use proto::runner::v1 as pb;
use tokio::sync::broadcast::error::RecvError;

use super::objective::Objective;
use super::{Bench, stamp};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::whole::{self, Whole};
use crate::dev::{Link, Session};

/// Lines of one call, and the pause after each: far from what the link can take, and longer than anybody collects output.
const LINES: usize = 20;
const PAUSE: &str = "0.05";
/// A 99th percentile of fewer lines is just the largest.
const TAIL_LINES: usize = 300;

/// S7.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (way, _) = bench.durable().await?;
    let session = way.session().await?;
    let mut discarded = Samples::default();
    call(&way, &session, 0, &mut discarded).await?;
    let mut samples = Samples::default();
    for number in 1..=TAIL_LINES.max(bench.rounds).div_ceil(LINES) {
        call(&way, &session, number, &mut samples).await?;
    }
    way.end().await?;
    let objective = Objective { p50: Some(30.0), p99: Some(100.0) };
    let note = format!(
        "a line that says when it was printed each {PAUSE} s, from there to the frame at the orchestrator; wall clock, over \
         mutual TLS, with a journal"
    );
    Ok(objective.rows("S7", "output produced to its frame", Unit::Milliseconds, &samples, &note))
}

/// One call; how late each of its lines was.
async fn call(way: &Whole, session: &Session, number: usize, samples: &mut Samples) -> Result<(), BenchError> {
    let call_id = format!("line-{number}");
    let command = format!("for ((i = 0; i < {LINES}; i++)); do echo \"{}\"; sleep {PAUSE}; done", stamp::NOW);
    let mut seen = way.orchestrator().watch();
    session.send(&call_id, whole::bash(&command));
    let mut arrivals = Arrivals::default();
    loop {
        match seen.recv().await {
            Ok(Link::Output(chunk)) if chunk.call_id == call_id => arrivals.take(&chunk, stamp::now()),
            Ok(Link::Finished(finished)) if finished == call_id => break,
            Ok(_) => {}
            Err(RecvError::Lagged(count)) => {
                return Err(BenchError::Link(format!("{count} events overtook whoever watched them")));
            }
            Err(RecvError::Closed) => return Err(BenchError::Link("the orchestrator has ended".to_owned())),
        }
    }
    let end = stamp::now();
    let outcome = session.outcome(&call_id).await?;
    whole::check(&outcome)?;
    let printed: Vec<Duration> = outcome.streams.values().flat_map(|stream| stamp::moments(&stream.bytes)).collect();
    if printed.len() != LINES {
        return Err(BenchError::Link(format!("{} lines came of {LINES}", printed.len())));
    }
    // What came with no frame of its own came with the end of the call.
    let arrived = arrivals.moments.into_iter().chain(std::iter::repeat(end));
    for (printed, arrived) in printed.into_iter().zip(arrived) {
        samples.push(stamp::milliseconds_between(printed, arrived));
    }
    Ok(())
}

/// When the lines of one call were complete.
#[derive(Default)]
struct Arrivals {
    through: u64,
    moments: Vec<Duration>,
}

impl Arrivals {
    fn take(&mut self, chunk: &pb::OutputChunk, now: Duration) {
        // Frames of a link come in order; what comes again was there before.
        let known = usize::try_from(self.through.saturating_sub(chunk.offset)).unwrap_or(usize::MAX);
        let new = chunk.data.get(known..).unwrap_or_default();
        self.through += new.len() as u64;
        let lines = new.iter().filter(|byte| **byte == b'\n').count();
        self.moments.extend(std::iter::repeat_n(now, lines));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_arrives_with_the_frame_that_ends_it_and_only_once() {
        let chunk = |offset, data: &str| pb::OutputChunk { offset, data: data.into(), ..Default::default() };
        let at = Duration::from_secs;
        let mut arrivals = Arrivals::default();

        arrivals.take(&chunk(0, "one\ntw"), at(1));
        arrivals.take(&chunk(4, "two\nthree\n"), at(2));
        arrivals.take(&chunk(0, "one\ntwo\n"), at(3));

        assert_eq!(arrivals.moments, [at(1), at(2), at(2)]);
    }
}
