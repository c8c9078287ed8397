//! Ending a sandbox that is full of processes.

use std::time::{Duration, Instant};

use super::{Bench, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::{applet, exec, milliseconds};
use crate::sandbox::spec::{Limits, Spec};
use crate::work::Sandbox;

/// Starts 200 sleeping processes and says when the last one was started. As those of the floor they are static where that is
/// possible: the libraries of a process cost more to take down than the process.
fn fill() -> String {
    format!("i=0; while [ $i -lt 200 ]; do {} 1000 & i=$((i+1)); done; echo full; wait", applet("sleep").join(" "))
}
/// Room for them and for process 1.
const PIDS: u64 = 512;

/// G20.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds {
        let limits = Limits { pids: PIDS, ..Limits::default() };
        let sandbox = bench.subject.create(&Spec { limits, ..bench.subject.spec() }).await?;
        bench.subject.start_until_output(&sandbox, exec(&["/bin/sh", "-c", &fill()])).await?;
        let start = Instant::now();
        sandbox.close(Duration::ZERO).await;
        let took = milliseconds(start);
        let theirs = bench.peers.floor("kill")?;
        if round >= WARM_UP {
            ours.push(took);
            theirs.into_iter().for_each(|theirs| floor.push(theirs.reap));
        }
    }
    let row = Row::new("G20", "kill a sandbox with 200 processes", Unit::Milliseconds, ours.summary());
    Ok(vec![row.floor("kill", bench.peers.measured("floor", &floor), 1.3)])
}
