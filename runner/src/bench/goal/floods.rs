//! Sessions that never stop printing, beside one that wants to be served.

use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Bench;
use super::objective::Objective;
use super::stream::{HEARTBEAT_EVERY, Watching};
use crate::bench::BenchError;
use crate::bench::machine::available_kib;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::bench::whole::{self, Whole, check, link_settings};
use crate::dev::{LinkSettings, Orchestrator, Session};

/// Sessions of the objective.
const FLOODING: usize = 50;
/// What they print, in turn, and for how long one call does.
const SOURCES: [&str; 2] = ["yes", "cat /dev/urandom"];
const CALL_SECONDS: u32 = 2;
/// How long they do so together. A 99th percentile needs a hundred heartbeats, and this is four times as many.
const TIME: Duration = Duration::from_secs(20);
/// Between two calls of the session beside them.
const PAUSE: Duration = Duration::from_millis(50);
/// Kept of one call: from its beginning, which is sent while it runs, and from its end.
const KEPT_BYTES: u64 = 4 << 20;
/// What one of them may take: the limit of its memory, and what this process keeps of its output.
const EACH_KIB: u64 = (64 << 10) + (KEPT_BYTES >> 10) * 2;

/// S16, as the objective has it.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let directory = bench.fresh_directory("floods")?;
    let settings = LinkSettings { heartbeat_every: HEARTBEAT_EVERY, ..link_settings(true) };
    let way =
        Whole::start(bench.subject.sandboxes(), &directory, (settings, true), async |address| Ok(address)).await?;
    let beside = way.session().await?;
    // Fewer where the memory of this machine forbids so many.
    let room = usize::try_from(available_kib()? / EACH_KIB).unwrap_or(FLOODING);
    let count = FLOODING.min(room);
    let over = watch::channel(false).0;
    let mut floods = JoinSet::new();
    for number in 0..count {
        let session = open(way.orchestrator(), number).await?;
        let source = SOURCES[number % SOURCES.len()];
        floods.spawn(flood(session, source, over.subscribe()));
    }
    let mut watching = Watching::default();
    let mut seen = way.orchestrator().watch();
    let before = way.orchestrator().heartbeats().0;
    let end = tokio::time::Instant::now() + TIME;
    let mut served = tokio::spawn(serve(beside, end));
    let answers = loop {
        tokio::select! {
            biased;
            link = seen.recv() => watching.take(link),
            answers = &mut served => break answers,
        }
    };
    let answers = answers.map_err(|error| BenchError::Link(format!("a session failed: {error}")))??;
    let came = way.orchestrator().heartbeats().0 - before;
    over.send_replace(true);
    let mut bytes = 0;
    while let Some(flooded) = floods.join_next().await {
        bytes += flooded.map_err(|error| BenchError::Link(format!("a flood failed: {error}")))??;
    }
    way.end().await?;
    let note = format!(
        "{} MiB printed; {came} heartbeats, one each {} ms, {} events overtook whoever watched; lateness of each, and its way",
        bytes >> 20,
        HEARTBEAT_EVERY.as_millis(),
        watching.overtaken
    );
    let (ms, objective) = (Unit::Milliseconds, Objective { p50: None, p99: Some(2000.0) });
    let what = format!("heartbeat beside {count} sessions that flood");
    let mut rows = objective.rows("S16", &what, ms, &watching.samples, &note);
    rows.push(Row::new("S16", format!("bash `:` beside {count} sessions that flood"), ms, answers.summary()));
    Ok(rows)
}

async fn open(orchestrator: &Orchestrator, number: usize) -> Result<Session, BenchError> {
    let limits = pb::ResourceLimits {
        cpu_millis: 0,
        memory_bytes: 64 << 20,
        disk_bytes: 64 << 20,
        pids: 32,
        ..Default::default()
    };
    let session_id = format!("flood-{number}");
    let request = pb::OpenSession { session_id, limits: Some(limits), ..Default::default() };
    Ok(orchestrator.open_session(request).await?)
}

/// Calls that print, one after the other. The number of bytes that they have printed.
async fn flood(session: Session, source: &'static str, over: watch::Receiver<bool>) -> Result<u64, BenchError> {
    let mut bytes = 0;
    let mut number = 0;
    while !*over.borrow() {
        let call_id = format!("{}-{number}", session.session_id);
        let input = whole::bash(&format!("timeout {CALL_SECONDS} {source}; [ $? = 124 ]"));
        let output = pb::OutputPolicy { head_bytes: KEPT_BYTES, tail_bytes: KEPT_BYTES, ..Default::default() };
        let request =
            pb::Call { call_id: call_id.clone(), input: Some(input), output: Some(output), ..Default::default() };
        session.send_call(request);
        let outcome = session.outcome(&call_id).await?;
        check(&outcome)?;
        bytes += outcome.message.streams.iter().map(|stream| stream.total_bytes).sum::<u64>();
        // Nobody looks at it again, and there is more to come.
        session.shed(&call_id);
        number += 1;
    }
    Ok(bytes)
}

/// Calls of the session that wants to be served, until the end; how long each took.
async fn serve(session: Session, end: tokio::time::Instant) -> Result<Samples, BenchError> {
    let mut samples = Samples::default();
    for number in 0.. {
        if tokio::time::Instant::now() >= end {
            break;
        }
        let begin = Instant::now();
        check(&session.run(&format!("beside-{number}"), whole::bash(":")).await?)?;
        samples.push(milliseconds(begin));
        tokio::time::sleep(PAUSE).await;
    }
    Ok(samples)
}
