//! What durability costs: a start that is written down before it happens, one record, and a journal that is read back.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::objective::Objective;
use super::sync::Sync;
use super::{Bench, WARM_UP, settle};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::bench::whole;
use crate::dev::Session;
use crate::journal::{FileJournal, Journal, Record};
use crate::work::{
    BashInput, CallEnd, CallId, CallLimits, CallResult, Content, EnvironmentRef, Network, Outcome, OutputMode, Receipt,
    RequestDigest, ResourceLimits, SandboxId, SessionId, SessionOpen, ToolCall, ToolInput, ToolResult,
};

/// A 99th percentile of fewer samples is just the largest.
const TAIL_ROUNDS: usize = 300;
/// Longer than process 1 waits for an end before it tells a start by itself.
const LONG_ENOUGH: &str = "sleep 0.02";
/// Records of the journal that is read back, and the sessions they are about.
const RECORDS: usize = 10_000;
const SESSIONS: usize = 100;
/// Records that are made durable together while that journal is made; nothing of it is measured.
const TOGETHER: usize = 500;
/// Bytes of one result in it: what a model reads of a usual call.
const RESULT_BYTES: usize = 1024;
/// Reading takes a good part of a second.
const OPENINGS: usize = 10;

/// S6.
pub(super) async fn started(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let way = bench.whole().await?;
    let session = way.session().await?;
    let (lasting, directory) = bench.durable().await?;
    let lasting_session = lasting.session().await?;
    let sync = Sync::beside(&directory).map_err(disk(&directory))?;
    let (mut off, mut on, mut floor) = (Samples::default(), Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds.max(TAIL_ROUNDS) {
        let without = start(&session, round).await?;
        settle().await;
        let syncs = sync.once().map_err(disk(&directory))? + sync.once().map_err(disk(&directory))?;
        settle().await;
        let with = start(&lasting_session, round).await?;
        settle().await;
        if round >= WARM_UP {
            off.push(without);
            on.push(with);
            floor.push(without + syncs);
        }
    }
    way.end().await?;
    lasting.end().await?;
    let (objective, ms) = (Objective { p50: Some(8.0), p99: Some(30.0) }, Unit::Milliseconds);
    let note = "from sending a call of a warm session to being told that it has begun, over mutual TLS";
    let with = objective.rows("S6", "dispatch to started with a journal", ms, &on, note);
    let with = with.into_iter().map(|row| row.floor("without + 2 syncs", bench.peers.measured("", &floor), None));
    let without = objective.rows("S6", "dispatch to started without a journal", ms, &off, note);
    Ok(with.chain(without).collect())
}

async fn start(session: &Session, round: usize) -> Result<f64, BenchError> {
    let call_id = format!("start-{round}");
    let begin = Instant::now();
    session.send(&call_id, whole::bash(LONG_ENOUGH));
    session.started(&call_id).await?;
    let took = milliseconds(begin);
    whole::check(&session.outcome(&call_id).await?)?;
    Ok(took)
}

/// S21.
pub(super) async fn record(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let directory = bench.fresh_directory("record")?;
    let (journal, _) = open(&directory)?;
    let sync = Sync::beside(&directory).map_err(disk(&directory))?;
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds.max(TAIL_ROUNDS) {
        let begin = Instant::now();
        let call_id = call_id(round)?;
        journal.append(Record::Started { call_id }).await.map_err(|error| BenchError::Link(error.to_string()))?;
        let took = milliseconds(begin);
        let synced = sync.once().map_err(disk(&directory))?;
        if round >= WARM_UP {
            ours.push(took);
            floor.push(synced);
        }
    }
    drop(journal);
    let what = "one record made durable";
    let rows = Objective { p50: None, p99: Some(20.0) }.rows("S21", what, Unit::Milliseconds, &ours, "");
    let floor = bench.peers.measured("", &floor);
    let rows = rows.into_iter().map(|row| row.floor("a write and fdatasync", floor.clone(), None));
    let median = Row::new("S21", format!("{what}, p50"), Unit::Milliseconds, ours.summary());
    Ok(rows.chain([median.floor("a write and fdatasync", floor.clone(), None)]).collect())
}

/// S5.
pub(super) async fn recovery(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let written = bench.fresh_directory("written")?;
    let bytes = write(&written).await?;
    let (mut ours, mut floor) = (Samples::default(), Samples::default());
    let mut found = (0, 0);
    for round in 0..=OPENINGS.min(bench.rounds) {
        // Opening leaves another journal behind than it has found, so each time it finds a copy.
        let copy = bench.fresh_directory("recovered")?;
        let read = copy_files(&written, &copy)?;
        let begin = Instant::now();
        let (journal, recovered) = open(&copy)?;
        let took = milliseconds(begin);
        drop(journal);
        found = (recovered.sessions.len(), recovered.calls.len());
        if round > 0 {
            ours.push(took);
            floor.push(read);
        }
    }
    if found.0 != SESSIONS {
        return Err(BenchError::Link(format!("{} sessions were recovered of {SESSIONS}", found.0)));
    }
    let note = format!(
        "{SESSIONS} sessions, {} results without acknowledgement, {bytes} bytes of records; with what is live copied and \
         synced",
        found.1
    );
    let objective = Objective { p50: Some(1000.0), p99: None };
    let rows = objective.rows("S5", "journal of 10,000 records opened", Unit::Milliseconds, &ours, &note);
    let floor = bench.peers.measured("", &floor);
    Ok(rows.into_iter().map(|row| row.floor("its files copied and synced", floor.clone(), None)).collect())
}

fn open(directory: &Path) -> Result<(FileJournal, crate::journal::Recovered), BenchError> {
    FileJournal::open(directory, "bench", "bench").map_err(|error| BenchError::Link(error.to_string()))
}

fn disk(directory: &Path) -> impl Fn(std::io::Error) -> BenchError {
    let path = directory.display().to_string();
    move |source| BenchError::Machine { path: path.clone(), source }
}

/// Milliseconds until all files of `from` are durable in `to`.
fn copy_files(from: &Path, to: &Path) -> Result<f64, BenchError> {
    let begin = Instant::now();
    for entry in std::fs::read_dir(from).map_err(disk(from))? {
        let entry = entry.map_err(disk(from))?;
        let copy = to.join(entry.file_name());
        std::fs::copy(entry.path(), &copy).map_err(disk(&copy))?;
        std::fs::File::open(&copy).and_then(|file| file.sync_all()).map_err(disk(&copy))?;
    }
    Ok(milliseconds(begin))
}

/// Calls of all sessions in turn, each with the four records of a usual call. Returns the length of their payloads.
async fn write(directory: &Path) -> Result<usize, BenchError> {
    let mut records = Vec::with_capacity(RECORDS);
    for number in 0..SESSIONS {
        records.push(Record::SessionOpening(Box::new(opening(number)?)));
        let sandbox_id = SandboxId::new(format!("sandbox-{number}")).map_err(id)?;
        records.push(Record::SessionReady { session_id: session_id(number)?, sandbox_id, receipt: Receipt::default() });
    }
    let result = Arc::new(CallResult {
        end: CallEnd::without_output(Outcome::Exited { code: 0 }),
        presented: ToolResult { is_error: false, content: vec![Content::Text("x".repeat(RESULT_BYTES))] },
        recovered: false,
    });
    for number in 0.. {
        if records.len() >= RECORDS {
            break;
        }
        let call_id = call_id(number)?;
        records.push(Record::Accepted(Box::new(call(number)?)));
        records.push(Record::Started { call_id: call_id.clone() });
        records.push(Record::Finished { call_id: call_id.clone(), result: Arc::clone(&result) });
        // The last of each session is not acknowledged.
        if records.len() + 4 * SESSIONS < RECORDS {
            records.push(Record::Acknowledged { call_id });
        }
    }
    records.truncate(RECORDS);
    let (journal, _) = open(directory)?;
    let mut bytes = 0;
    while !records.is_empty() {
        let rest = records.split_off(records.len().min(TOGETHER));
        let mut written = Vec::new();
        for record in std::mem::replace(&mut records, rest) {
            bytes += if let Record::Finished { .. } = &record { RESULT_BYTES } else { 0 };
            written.push(journal.append(record));
        }
        for written in written {
            written.await.map_err(|error| BenchError::Link(error.to_string()))?;
        }
    }
    Ok(bytes)
}

fn id(error: crate::work::IdError) -> BenchError {
    BenchError::Link(error.to_string())
}

fn session_id(number: usize) -> Result<SessionId, BenchError> {
    SessionId::new(format!("session-{number}")).map_err(id)
}

fn call_id(number: usize) -> Result<CallId, BenchError> {
    CallId::new(format!("call-{number}")).map_err(id)
}

fn opening(number: usize) -> Result<SessionOpen, BenchError> {
    Ok(SessionOpen {
        session_id: session_id(number)?,
        epoch: number as u64 + 1,
        digest: RequestDigest([0; 32]),
        environment: EnvironmentRef::default(),
        limits: ResourceLimits::default(),
        network: Network::None,
        variables: Vec::new(),
        min_tier: String::new(),
        orphan_timeout: Some(Duration::from_secs(3600)),
        idle_timeout: None,
        max_concurrent_calls: 1,
        tenant: String::new(),
    })
}

fn call(number: usize) -> Result<ToolCall, BenchError> {
    let session = number % SESSIONS;
    Ok(ToolCall {
        call_id: call_id(number)?,
        session_id: session_id(session)?,
        epoch: session as u64 + 1,
        digest: RequestDigest([1; 32]),
        input: ToolInput::Bash(BashInput { command: Some("cargo check --workspace".to_owned()), restart: false }),
        limits: CallLimits::default(),
        output_mode: OutputMode::Merged,
        quiet: false,
    })
}
