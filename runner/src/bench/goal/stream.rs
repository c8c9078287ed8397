//! A flood of output on its way to the orchestrator, and what it does to heartbeats.

use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use tokio::sync::broadcast::error::RecvError;

use super::objective::Objective;
use super::{Bench, WARM_UP, floods};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::whole::{self, Whole, link_settings};
use crate::dev::{Link, LinkSettings, Session};

/// Output of one call; all of it is kept, so all of it goes through the spool.
const OUTPUT_BYTES: usize = 32 * 1024 * 1024;
/// Often enough for a 99th percentile; a usual orchestrator asks for one in ten seconds.
pub(super) const HEARTBEAT_EVERY: Duration = Duration::from_millis(50);
/// A 99th percentile of fewer heartbeats is just the largest. So many are waited for, over so many calls.
const HEARTBEATS: usize = 200;
const FLOODS: usize = 200;

/// S15 and S16.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let directory = bench.fresh_directory("stream")?;
    let settings = LinkSettings { heartbeat_every: HEARTBEAT_EVERY, ..link_settings(true) };
    let way =
        Whole::start(bench.subject.sandboxes(), &directory, (settings, true), async |address| Ok(address)).await?;
    let session = way.session().await?;
    let mut watching = Watching::default();
    for _ in 0..WARM_UP {
        flood(&way, &session).await?;
    }
    let mut rates = Samples::default();
    let mut seen = way.orchestrator().watch();
    let before = way.orchestrator().heartbeats().0;
    let mut floods = 0;
    while floods < bench.rounds || (watching.delays < HEARTBEATS && floods < FLOODS) {
        floods += 1;
        let mut flooding = std::pin::pin!(flood(&way, &session));
        loop {
            tokio::select! {
                biased;
                link = seen.recv() => watching.take(link),
                rate = &mut flooding => break rates.push(rate?),
            }
        }
    }
    let came = way.orchestrator().heartbeats().0 - before;
    way.end().await?;
    let link = Objective { p50: Some(MIB_50), p99: None };
    let note =
        format!("{} MiB a call, from sending it to having all of its output and a hash of it", OUTPUT_BYTES >> 20);
    let mut rows =
        link.rows("S15", "output through the spool to the orchestrator", Unit::MegabytesPerSecond, &rates, &note);
    let note = format!(
        "{came} heartbeats, one each {} ms, {} of them overtaken by what they were watched among; lateness of each, and \
         its way",
        HEARTBEAT_EVERY.as_millis(),
        watching.overtaken
    );
    let heartbeats = Objective { p50: None, p99: Some(2000.0) };
    rows.extend(heartbeats.rows("S16", "heartbeat under that flood", Unit::Milliseconds, &watching.samples, &note));
    rows.extend(floods::measure(bench).await?);
    Ok(rows)
}

/// 50 MiB in a second, in MB.
const MIB_50: f64 = 52.4288;

/// Megabytes in a second.
async fn flood(way: &Whole, session: &Session) -> Result<f64, BenchError> {
    let begin = Instant::now();
    let (_, outcome) = way.call(session, whole::bash(&format!("head -c {OUTPUT_BYTES} /dev/zero"))).await?;
    let took = begin.elapsed().as_secs_f64();
    let received: u64 = outcome.streams.values().map(|stream| stream.through).sum();
    if received < OUTPUT_BYTES as u64 || outcome.streams.values().any(|stream| !stream.holes.is_empty()) {
        return Err(BenchError::Link(format!("{received} bytes of output came of {OUTPUT_BYTES}, or with holes")));
    }
    Ok(f64::from(u32::try_from(OUTPUT_BYTES).unwrap_or(u32::MAX)) / 1e6 / took)
}

/// Heartbeats of one link, as they come.
#[derive(Default)]
pub(super) struct Watching {
    pub(super) samples: Samples,
    delays: usize,
    pub(super) overtaken: u64,
    last_ns: Option<u64>,
}

impl Watching {
    pub(super) fn take(&mut self, link: Result<Link, RecvError>) {
        match link {
            Ok(Link::Heartbeat(heartbeat)) => self.heartbeat(&heartbeat),
            Err(RecvError::Lagged(count)) => {
                // Heartbeats may be among them, and the next one must not be blamed for their time.
                self.overtaken += count;
                self.last_ns = None;
            }
            Ok(_) | Err(RecvError::Closed) => {}
        }
    }

    /// How much later than it should it was sent, and how long it was on its way.
    fn heartbeat(&mut self, heartbeat: &pb::Heartbeat) {
        let Ok(now) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) else { return };
        let (now, sent) = (Duration::from(now), Duration::from_nanos(heartbeat.sent_boottime_ns));
        let due = self.last_ns.map_or(sent, |last| Duration::from_nanos(last) + HEARTBEAT_EVERY);
        let late = sent.saturating_sub(due) + now.saturating_sub(sent);
        self.samples.push(late.as_secs_f64() * 1e3);
        self.delays += 1;
        self.last_ns = Some(heartbeat.sent_boottime_ns);
    }
}
