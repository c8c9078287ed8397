//! Creation must depend neither on how many processes the host has nor on how large the runner is.

use super::creation::ready;
use super::{Bench, REFILL, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;

/// Foreign processes of a busy host.
const CROWD: usize = 4000;
const SMALL_BALLAST: usize = 64 << 20;
const LARGE_BALLAST: usize = 1 << 30;
const LIMIT: f64 = 1.15;

/// G6. Idle and crowded take turns, half of the rounds each time, so that drift hits both.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (mut idle, mut crowded) = (Times::default(), Times::default());
    let half = bench.rounds.div_ceil(2);
    for _ in 0..2 {
        rounds(bench, half, &mut idle).await?;
        bench.peers.crowd(CROWD)?;
        let measured = rounds(bench, half, &mut crowded).await;
        bench.peers.crowd(0)?;
        measured?;
    }
    let (mut small, mut large) = (Times::default(), Times::default());
    for _ in 0..2 {
        for (size, times) in [(SMALL_BALLAST, &mut small), (LARGE_BALLAST, &mut large)] {
            // Written, because memory that was only reserved has no page tables to copy.
            let ballast = vec![1_u8; size];
            rounds(bench, half, times).await?;
            std::hint::black_box(&ballast);
        }
    }
    let (ms, peers) = (Unit::Milliseconds, &bench.peers);
    let what = format!("time to ready among {CROWD} idle processes");
    let mut crowd_row = Row::new("G6", what, ms, crowded.ours.summary()).floor(
        "ours on the idle host",
        peers.measured("", &idle.ours),
        LIMIT,
    );
    if let (Some(alone), Some(among)) = (idle.floor.summary(), crowded.floor.summary()) {
        crowd_row.note = format!("the floor itself: {:.2}x", among.p50 / alone.p50);
    }
    let ballast_row = Row::new("G6", "time to ready with 1 GiB of memory in the runner", ms, large.ours.summary())
        .floor("ours with 64 MiB", peers.measured("", &small.ours), LIMIT);
    Ok(vec![crowd_row, ballast_row])
}

#[derive(Default)]
struct Times {
    ours: Samples,
    floor: Samples,
}

async fn rounds(bench: &mut Bench, count: usize, times: &mut Times) -> Result<(), BenchError> {
    for round in 0..WARM_UP + count {
        tokio::time::sleep(REFILL).await;
        let ours = ready(bench).await?;
        let floor = bench.peers.floor("fresh")?;
        if round >= WARM_UP {
            times.ours.push(ours);
            floor.into_iter().for_each(|floor| times.floor.push(floor.ready));
        }
    }
    Ok(())
}
