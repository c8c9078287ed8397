//! Results over a long distance: how fast they arrive when an answer takes 50 ms.

use std::time::Duration;

use super::{Bench, WARM_UP};
use crate::bench::BenchError;
use crate::bench::delay::Distance;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::whole::{self, Whole, link_settings};
use crate::dev::Session;

const EACH_WAY: Duration = Duration::from_millis(25);
const RESULT_BYTES: usize = 16 * 1024 * 1024;

/// G14.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (near, _near_distance) = start(bench, "large", true).await?;
    let (far, _far_distance) = start(bench, "default", false).await?;
    let (ours_in, theirs_in) = (near.session().await?, far.session().await?);
    let mut echo = bench.echo(Some(EACH_WAY)).await?;
    let (mut ours, mut theirs, mut floor) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds {
        let rates =
            [result(&near, &ours_in).await?, result(&far, &theirs_in).await?, rate(echo.push(RESULT_BYTES).await?)];
        if round >= WARM_UP {
            for (samples, rate) in [&mut ours, &mut theirs, &mut floor].into_iter().zip(rates) {
                samples.push(rate);
            }
        }
    }
    near.end().await?;
    far.end().await?;
    let row = Row::new("G14", "result of 16 MiB, round trip 50 ms", Unit::MegabytesPerSecond, ours.summary())
        .peer("server with default windows", bench.peers.measured("", &theirs), 3.0)
        .floor("a bare stream with our windows", bench.peers.measured("", &floor), 0.9)
        .note("from sending the call to having all of its output; the orchestrator checks a hash of it");
    Ok(vec![row])
}

async fn start(bench: &Bench, name: &str, windows: bool) -> Result<(Whole, Option<Distance>), BenchError> {
    let mut kept = None;
    let directory = bench.directory(name)?;
    let whole = Whole::start(bench.subject.sandboxes(), &directory, (link_settings(windows), false), async |address| {
        let distance = Distance::to(address, EACH_WAY)
            .await
            .map_err(|source| BenchError::Machine { path: "a loopback port".to_owned(), source })?;
        let dialled = distance.address();
        kept = Some(distance);
        Ok(dialled)
    })
    .await?;
    Ok((whole, kept))
}

async fn result(whole: &Whole, session: &Session) -> Result<f64, BenchError> {
    let (took, outcome) = whole.call(session, whole::bash(&format!("head -c {RESULT_BYTES} /dev/zero"))).await?;
    let received: u64 = outcome.streams.values().map(|stream| stream.through).sum();
    let holes = outcome.streams.values().map(|stream| stream.holes.len()).sum::<usize>();
    if holes > 0 || received < RESULT_BYTES as u64 {
        return Err(BenchError::Link(format!("{received} bytes of output came, with {holes} holes")));
    }
    Ok(rate(took))
}

/// Megabytes in a second, when all of it took so many milliseconds.
fn rate(took: f64) -> f64 {
    f64::from(u32::try_from(RESULT_BYTES).unwrap_or(u32::MAX)) / 1000.0 / took
}
