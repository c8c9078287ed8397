//! Making sandboxes: latency paced and back to back, its tail, and the rate of two creators.

use std::time::{Duration, Instant};

use super::{Bench, REFILL, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Statistic, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::work::Sandbox;

/// One creation in this time is what "paced" means.
const PACE: Duration = Duration::from_millis(40);
/// A 99th percentile of fewer samples is just the largest.
const TAIL_ROUNDS: usize = 100;
/// Sandboxes in a row of a burst. The first may find a filled pool and is not counted.
const BURST: usize = 4;
/// Sandboxes of one creator in one sample of the rate.
const RATE_BATCH: usize = 10;

#[derive(Default)]
struct Times {
    result: Samples,
    gone: Samples,
    bwrap: Samples,
    runc: Samples,
    floor: Samples,
}

/// G1 and G3.
pub(super) async fn cycle(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let paced = paced_cycles(bench).await?;
    let burst = bursts(bench).await?;
    let ms = Unit::Milliseconds;
    let cold = "create, true, gone";
    let row = |what: String, samples: &Samples| Row { ours: samples.summary(), ..Row::new("G1", what, ms) };
    Ok(vec![
        row(format!("{cold}; paced, blank from the pool"), &paced.gone)
            .peer("bwrap", paced.bwrap.summary(), Some(0.75))
            .floor("fresh", paced.floor.summary(), Some(1.5)),
        row(format!("{cold}; paced, blank from the pool"), &paced.gone).peer("runc", paced.runc.summary(), Some(0.12)),
        row(format!("{cold}; back to back, pool empty"), &burst.gone)
            .peer("bwrap", burst.bwrap.summary(), Some(0.75))
            .floor("fresh", burst.floor.summary(), Some(1.5)),
        Row {
            ours: paced.result.summary(),
            ..Row::new("G3", "request to the end of the first true; paced, blank from the pool", ms)
        }
        .peer("bwrap", paced.bwrap.summary(), Some(0.25)),
    ])
}

/// Everybody gets the same pause before his turn; ours uses it to refill the pool.
async fn paced_cycles(bench: &mut Bench) -> Result<Times, BenchError> {
    let mut times = Times::default();
    for round in 0..WARM_UP + bench.rounds {
        let mut discarded = Times::default();
        let times = if round < WARM_UP { &mut discarded } else { &mut times };
        tokio::time::sleep(REFILL).await;
        let cycle = bench.subject.cycle().await?;
        times.result.push(cycle.result);
        times.gone.push(cycle.gone);
        tokio::time::sleep(REFILL).await;
        bench.peers.sample("bwrap", &mut times.bwrap)?;
        tokio::time::sleep(REFILL).await;
        if let Some(floor) = bench.peers.floor("fresh")? {
            times.floor.push(floor.cycle);
        }
        bench.peers.sample("runc", &mut times.runc)?;
    }
    Ok(times)
}

async fn bursts(bench: &mut Bench) -> Result<Times, BenchError> {
    let mut times = Times::default();
    for _ in 0..bench.rounds {
        for number in 0..BURST {
            let cycle = bench.subject.cycle().await?;
            if number > 0 {
                times.gone.push(cycle.gone);
            }
        }
        for number in 0..BURST {
            let took = bench.peers.run("bwrap")?;
            took.filter(|_| number > 0).into_iter().for_each(|took| times.bwrap.push(took));
        }
        for number in 0..BURST {
            let took = bench.peers.floor("fresh")?;
            took.filter(|_| number > 0).into_iter().for_each(|took| times.floor.push(took.cycle));
        }
    }
    Ok(times)
}

/// G4.
pub(super) async fn paced(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds.max(TAIL_ROUNDS) {
        let next = tokio::time::Instant::now() + PACE;
        let took = ready(bench).await?;
        tokio::time::sleep_until(next).await;
        let next = tokio::time::Instant::now() + PACE;
        let theirs = bench.peers.floor("fresh")?;
        tokio::time::sleep_until(next).await;
        if round >= WARM_UP {
            ours.push(took);
            theirs.into_iter().for_each(|theirs| floor.push(theirs.ready));
        }
    }
    let mut row = Row {
        ours: ours.summary(),
        statistic: Statistic::Tail,
        note: "a sandbox every 80 ms, the floor in between".to_owned(),
        ..Row::new("G4", "time to ready, paced; p99", Unit::Milliseconds)
    };
    row = row.floor("fresh", floor.summary(), Some(2.0));
    Ok(vec![row])
}

/// Time until a new sandbox takes calls; it is gone on return.
pub(super) async fn ready(bench: &Bench) -> Result<f64, BenchError> {
    let spec = bench.subject.spec();
    let start = Instant::now();
    let sandbox = bench.subject.create(&spec).await?;
    let took = milliseconds(start);
    sandbox.close(Duration::ZERO).await;
    Ok(took)
}

/// G5.
pub(super) async fn rate(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (mut ours, mut bwrap, mut floor) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..=bench.rounds.div_ceil(RATE_BATCH / 2) {
        let mine = two_creators(bench).await?;
        let theirs = bench.peers.rate("bwrap", RATE_BATCH)?;
        let least = bench.peers.rate("floor", RATE_BATCH)?;
        if round > 0 {
            ours.push(mine);
            theirs.into_iter().for_each(|rate| bwrap.push(rate));
            least.into_iter().for_each(|rate| floor.push(rate));
        }
    }
    let row = Row {
        ours: ours.summary(),
        note: format!("{} sandboxes in each sample", 2 * RATE_BATCH),
        ..Row::new("G5", "create, true, gone with two creators", Unit::PerSecond)
    };
    Ok(vec![row.peer("bwrap", bwrap.summary(), Some(1.0)).floor("fresh", floor.summary(), Some(0.7))])
}

async fn two_creators(bench: &Bench) -> Result<f64, BenchError> {
    let creator = async || {
        for _ in 0..RATE_BATCH {
            bench.subject.cycle().await?;
        }
        Ok::<_, BenchError>(())
    };
    let start = Instant::now();
    let (first, second) = tokio::join!(creator(), creator());
    first?;
    second?;
    let count = u32::try_from(2 * RATE_BATCH).unwrap_or(u32::MAX);
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}
