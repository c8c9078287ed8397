//! A network that goes away: how soon both sides know, and how soon they have each other again when it is back.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use tokio::sync::watch;

use super::objective::Objective;
use super::{Bench, stamp};
use crate::bench::BenchError;
use crate::bench::network::{Network, State};
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::bench::whole::{self, Whole, link_settings};
use crate::dev::{Link, Session};

/// Runners with work that lose their orchestrators together, and the pause between their starts: as their heartbeats are ten
/// seconds apart, each loses its own at another time since the last one.
const WORKING: usize = 10;
const APART: Duration = Duration::from_secs(1);
/// Calls of each: one that runs, and as many as may wait. Together they take longer than the lease.
const CALLS: usize = 33;
const CALL_SECONDS: &str = "1.2";
/// Beyond the lease of 30 s and the margin of 5 s.
const SILENCE: Duration = Duration::from_secs(38);

/// Runners that find their orchestrators again. Each holds twenty descriptors, and a process may have a thousand.
const WAITING: usize = 30;
/// So long that nobody's pause before the next attempt can grow any more: those before are 31.5 s together at most.
const OUTAGE: Duration = Duration::from_secs(40);
/// Whoever has not come back by then never will.
const PATIENCE: Duration = Duration::from_secs(90);

/// A runner and its orchestrator, on a network.
struct Site {
    way: Whole,
    _network: Network,
}

impl Site {
    async fn start(bench: &Bench, name: &str, state: watch::Receiver<State>) -> Result<Self, BenchError> {
        let directory = bench.fresh_directory(name)?;
        let mut kept = None;
        let settings = (link_settings(true), false);
        let way = Whole::start(bench.subject.sandboxes(), &directory, settings, async |target| {
            let failed = |source| BenchError::Machine { path: "a loopback port".to_owned(), source };
            let network = Network::to(target, state).await.map_err(failed)?;
            let address = network.address();
            kept = Some(network);
            Ok(address)
        });
        let way = way.await?;
        let network = kept.ok_or_else(|| BenchError::Link("there is no network".to_owned()))?;
        Ok(Self { way, _network: network })
    }
}

/// S9.
pub(super) async fn detected(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (network, state) = watch::channel(State::Up);
    let mut sites = Vec::new();
    for number in 0..WORKING {
        let site = Site::start(bench, &format!("loss-{number}"), state.clone()).await?;
        let session = site.way.session().await?;
        sites.push((site, session));
        tokio::time::sleep(APART).await;
    }
    let filling: Vec<_> = sites.iter().map(|(site, session)| fill(site, session)).collect();
    try_join_all(filling).await?;
    let (lost_at, began) = (stamp::now(), Instant::now());
    network.send_replace(State::Silent);
    let waiting: Vec<_> = sites.iter().map(|(site, _)| unreachable(site, began)).collect();
    let marked: Samples = try_join_all(waiting).await?.into_iter().collect();
    tokio::time::sleep_until((began + SILENCE).into()).await;
    let back_at = stamp::now();
    network.send_replace(State::Up);
    let closing: Vec<_> = sites.iter().map(|(_, session)| last_begin(session, (lost_at, back_at))).collect();
    let last: Samples = try_join_all(closing).await?.into_iter().collect();
    for (site, _) in sites {
        site.way.end().await?;
    }
    let ms = Unit::Milliseconds;
    let [begin, mark] = [30_000.0, 35_000.0].map(|limit| Objective { p50: None, p99: Some(limit) });
    let note = format!("{WORKING} runners; a call of {CALL_SECONDS} s after the other, so it may be less by that much");
    let lease = "from its last heartbeat a lease of 30 s and a margin of 5 s";
    Ok([
        begin.rows("S9", "silence to the last call that a runner begins", ms, &last, &note),
        mark.rows("S9", "silence to a runner that counts as unreachable", ms, &marked, lease),
    ]
    .concat())
}

/// Milliseconds from the loss until the orchestrator may place elsewhere what the runner holds.
async fn unreachable(site: &Site, lost: Instant) -> Result<f64, BenchError> {
    site.way.orchestrator().lease_over().await?;
    Ok(milliseconds(lost))
}

/// Gives a session as many calls as it takes, each of which says when it begins.
async fn fill(site: &Site, session: &Session) -> Result<(), BenchError> {
    let command = format!("echo \"{}\"; sleep {CALL_SECONDS}", stamp::NOW);
    session.send(&call_id(0), whole::bash(&command));
    session.started(&call_id(0)).await?;
    (1..CALLS).for_each(|number| session.send(&call_id(number), whole::bash(&command)));
    let accepted = async {
        while site.way.orchestrator().waiting().get(&session.session_id).is_none_or(|waiting| *waiting + 5 < CALLS) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, accepted)
        .await
        .map_err(|_| BenchError::Link(format!("{CALLS} calls were not accepted within {} s", PATIENCE.as_secs())))
}

fn call_id(number: usize) -> String {
    format!("queued-{number}")
}

/// Milliseconds from the loss to the last call that began while it lasted. The session is over on return.
async fn last_begin(session: &Session, (lost_at, back_at): (Duration, Duration)) -> Result<f64, BenchError> {
    let ended = async {
        session.close(Duration::ZERO).await?;
        let mut begun = Vec::new();
        for number in 0..CALLS {
            let outcome = session.outcome(&call_id(number)).await?;
            begun.extend(outcome.streams.values().flat_map(|stream| stamp::moments(&stream.bytes)));
        }
        Ok::<_, BenchError>(begun)
    };
    let begun = tokio::time::timeout(PATIENCE, ended)
        .await
        .map_err(|_| BenchError::Link(format!("a runner did not come back within {} s", PATIENCE.as_secs())))??;
    let meanwhile = begun.into_iter().filter(|begun| (lost_at..back_at).contains(begun));
    // Work that had run out would say nothing about the lease.
    let last = meanwhile.max().ok_or_else(|| BenchError::Link("no call began in the silence".to_owned()))?;
    Ok(stamp::milliseconds_between(lost_at, last))
}

/// S11.
pub(super) async fn reconnected(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let (network, state) = watch::channel(State::Up);
    let mut sites = Vec::new();
    for number in 0..WAITING {
        sites.push(Site::start(bench, &format!("outage-{number}"), state.clone()).await?);
    }
    network.send_replace(State::Refusing);
    tokio::time::sleep(OUTAGE).await;
    let seen: Vec<_> = sites.iter().map(|site| site.way.orchestrator().watch()).collect();
    let back = Instant::now();
    network.send_replace(State::Up);
    let resumed = seen.into_iter().map(|mut seen| async move {
        while !matches!(seen.recv().await, Ok(Link::Resumed(_)) | Err(_)) {}
        milliseconds(back)
    });
    let resumed = tokio::time::timeout(PATIENCE, futures_util::future::join_all(resumed)).await;
    let samples: Samples = resumed
        .map_err(|_| BenchError::Link(format!("a runner did not come back within {} s", PATIENCE.as_secs())))?
        .into_iter()
        .collect();
    for site in sites {
        site.way.end().await?;
    }
    let objective = Objective { p50: None, p99: Some(35_000.0) };
    let note = format!(
        "{WAITING} runners after {} s without network, when the pause before an attempt is up to 30 s and grows no more, \
         however long the outage",
        OUTAGE.as_secs()
    );
    Ok(objective.rows("S11", "network back to link resumed", Unit::Milliseconds, &samples, &note))
}
