//! How long calls take from request to result, over the whole way: orchestrator, TLS, runner, process 1, tool and back.

use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::call::Input;
use serde::Serialize;

use super::call::bash;
use crate::dev::{DevError, Session};

/// Times of one kind of call.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Latency {
    /// What was called.
    pub(super) what: &'static str,
    /// How often.
    pub(super) calls: usize,
    /// Half of them took at most this.
    pub(super) p50_ms: f64,
    /// All but one in a hundred took at most this.
    pub(super) p99_ms: f64,
}

/// Measures one call after another.
pub(super) async fn measure(session: &Session, file: &str) -> Result<Vec<Latency>, DevError> {
    let read = Input::Read(pb::ReadInput { file_path: file.to_owned(), view_range: Vec::new() });
    Ok(vec![
        repeat(session, "bash: echo hi", 50, &bash("echo hi")).await?,
        repeat(session, "read: a small file", 20, &read).await?,
    ])
}

async fn repeat(session: &Session, what: &'static str, calls: usize, input: &Input) -> Result<Latency, DevError> {
    let mut times = Vec::with_capacity(calls);
    for number in 0..calls {
        let begin = Instant::now();
        session.run(&format!("latency-{number}-{}", what.replace([' ', ':'], "-")), input.clone()).await?;
        times.push(begin.elapsed());
    }
    times.sort();
    Ok(Latency { what, calls, p50_ms: percentile(&times, 50), p99_ms: percentile(&times, 99) })
}

/// Nearest rank: the smallest time that at least `percent` of all do not exceed.
fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let times: Vec<_> = (1..=50).map(Duration::from_millis).collect();

        assert!((percentile(&times, 50) - 25.0).abs() < 1e-9);
        assert!((percentile(&times, 99) - 50.0).abs() < 1e-9);
        assert!((percentile(&times[..1], 50) - 1.0).abs() < 1e-9);
        assert!(percentile(&[], 50).abs() < 1e-9);
    }
}
