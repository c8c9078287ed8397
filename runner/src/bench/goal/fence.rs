//! A session that was placed elsewhere: how soon nothing of it lives here any more.

use std::time::{Duration, Instant};

use proto::runner::v1 as pb;

use super::objective::Objective;
use super::{Bench, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::bench::whole::{self, Whole, link_settings};
use crate::dev::Link;

/// What is placed elsewhere is gone here by then, or never.
const PATIENCE: Duration = Duration::from_secs(60);

/// S10.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (mut whole, mut decided) = (Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds {
        let (took, since) = fenced(bench, round).await?;
        if round >= WARM_UP {
            whole.push(took);
            decided.push(since);
        }
    }
    let objective = Objective { p50: None, p99: Some(2000.0) };
    let note = "a session with a running call; with the end of the link and the pause before it is made again, from 0 to 500 ms";
    let (what, ms) = ("placed elsewhere to link up and sandbox gone, told", Unit::Milliseconds);
    let rows = objective.rows("S10", what, ms, &whole, note);
    let since = Row::new("S10", "of that from the decision on the new link", ms, decided.summary());
    Ok(rows.into_iter().chain([since]).collect())
}

/// Milliseconds until the runner has told the end of the session, from the placement and from its decision on the link.
async fn fenced(bench: &Bench, round: usize) -> Result<(f64, f64), BenchError> {
    // A runner of its own each time: the pause before a link is made again grows with links that were short.
    let directory = bench.fresh_directory("fence")?;
    let settings = (link_settings(true), true);
    let way = Whole::start(bench.subject.sandboxes(), &directory, settings, async |address| Ok(address)).await?;
    let session = way.session().await?;
    let call_id = format!("running-{round}");
    session.send(&call_id, whole::bash("sleep 1000"));
    session.started(&call_id).await?;
    let mut seen = way.orchestrator().watch();
    let begin = Instant::now();
    way.orchestrator().place_elsewhere(&session.session_id);
    let ended = async {
        while !matches!(seen.recv().await, Ok(Link::Resumed(_)) | Err(_)) {}
        let decided = Instant::now();
        session.over().await.map(|ended| (ended, decided))
    };
    let ended = tokio::time::timeout(PATIENCE, ended).await;
    let (ended, decided) = ended.map_err(|_| {
        BenchError::Link(format!("a session that was placed elsewhere was not ended within {} s", PATIENCE.as_secs()))
    })??;
    let times = (milliseconds(begin), milliseconds(decided));
    if ended.reason() != pb::SessionEndReason::Fenced {
        return Err(BenchError::Link(format!("the session ended with {}", ended.reason().as_str_name())));
    }
    way.end().await?;
    Ok(times)
}
