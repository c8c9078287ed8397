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
/// Sandboxes in a row of a burst: what the pool holds.
const BURST: usize = 4;
/// Sandboxes of one creator in one sample of the rate.
const RATE_BATCH: usize = 10;

#[derive(Default)]
struct Times {
    result: Samples,
    gone: Samples,
    bwrap: Samples,
    runc: Samples,
    crun: Samples,
    spawn: Samples,
    floor: Samples,
    beyond: Samples,
}

/// G1 and G3.
pub(super) async fn cycle(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let paced = paced_cycles(bench).await?;
    let burst = bursts(bench).await?;
    let (ms, peers) = (Unit::Milliseconds, &bench.peers);
    let pooled = "create, true, gone; paced, blank from the pool";
    let mut row = Row::new("G1", pooled, ms, paced.gone.summary())
        .peer("bwrap", peers.measured("bwrap", &paced.bwrap), 0.75)
        .peer("runc", peers.measured("runc", &paced.runc), 0.12);
    // It refuses machines with both versions of cgroups; where it works it counts.
    if peers.has("crun") {
        row = row.peer("crun", peers.measured("crun", &paced.crun), 0.3);
    } else {
        row.note = format!("crun is left out: {}", peers.inventory.missing.get("crun").map_or("", String::as_str));
    }
    Ok(vec![
        row.floor("fresh", peers.measured("floor", &paced.floor), 1.5),
        Row::new("G1", "create, true, gone; four in a row, blanks from a pool of four", ms, burst.gone.summary())
            .peer("bwrap", peers.measured("bwrap", &burst.bwrap), 0.75)
            .floor("fresh", peers.measured("floor", &burst.floor), 1.5),
        Row::new("G1", "create, true, gone; the fifth in a row, which waits for a blank", ms, burst.beyond.summary())
            .peer("bwrap", peers.measured("bwrap", &burst.bwrap), None)
            .note("with cgroup version 1 a new blank waits for a grace period of all processors"),
        Row::new("G3", "request to the end of the first true; paced, blank from the pool", ms, paced.result.summary())
            .peer("bwrap", peers.measured("bwrap", &paced.bwrap), 0.25)
            .peer("spawn on the host", peers.measured("spawn", &paced.spawn), 2.2),
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
        bench.peers.sample("spawn", &mut times.spawn)?;
        bench.peers.sample("runc", &mut times.runc)?;
        bench.peers.sample("crun", &mut times.crun)?;
    }
    Ok(times)
}

async fn bursts(bench: &mut Bench) -> Result<Times, BenchError> {
    let mut times = Times::default();
    for _ in 0..bench.rounds {
        for _ in 0..BURST {
            times.gone.push(bench.subject.cycle().await?.gone);
        }
        times.beyond.push(bench.subject.cycle().await?.gone);
        // Ours prepares for the next burst meanwhile, which nobody else should have to run beside.
        tokio::time::sleep(REFILL).await;
        for _ in 0..BURST {
            bench.peers.sample("bwrap", &mut times.bwrap)?;
        }
        for _ in 0..BURST {
            if let Some(floor) = bench.peers.floor("fresh")? {
                times.floor.push(floor.cycle);
            }
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
    let mut row = Row::new("G4", "time to ready, paced; p99", Unit::Milliseconds, ours.summary())
        .floor("fresh", bench.peers.measured("floor", &floor), 2.0)
        .note("a sandbox every 80 ms, the floor in between");
    row.statistic = Statistic::Tail;
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
    let row = Row::new("G5", "create, true, gone with two creators", Unit::PerSecond, ours.summary())
        .peer("bwrap", bench.peers.measured("bwrap", &bwrap), 1.0)
        .floor("fresh", bench.peers.measured("floor", &floor), 0.7)
        .note(format!("{} sandboxes in each sample", 2 * RATE_BATCH));
    Ok(vec![row])
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
