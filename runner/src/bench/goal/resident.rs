//! A daemon as a process of its own: how soon it is there and gone, and what it and its idle sandboxes take.

use std::time::{Duration, Instant};

use super::Bench;
use super::objective::Objective;
use crate::bench::BenchError;
use crate::bench::machine::free_kib;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::{Samples, Summary};
use crate::bench::subject::milliseconds;
use crate::bench::whole::{bash, check, complaints, link_settings, open};
use crate::dev::{Orchestrator, Session};

/// Idle sandboxes beside each other.
const HELD: usize = 200;
/// What the kernel frees, it frees later: this long at least, and this long at most until nothing changes any more.
const SETTLE: Duration = Duration::from_secs(3);
const SETTLE_MOST: u32 = 30;
/// Free memory of a host where nothing happens moves by less than this within a second.
const STILL_KIB: u64 = 512;
/// A daemon has come by then, or it never will.
const PATIENCE: Duration = Duration::from_secs(60);
/// Times that all of them are made and ended.
const FILLINGS: usize = 3;
/// A start takes a good part of a second, and an import of the SDK one or two.
const STARTS: usize = 10;
/// Memory of the daemon for one sandbox, in KiB.
const SHARE_KIB: f64 = 64.0;

/// Sessions of the objective for a daemon's memory, and that objective in KiB.
const HUNDRED: usize = 100;
const HUNDRED_KIB: f64 = 80.0 * 1024.0;

/// The objective for emptying a daemon whose sessions do nothing.
const DRAINED_MS: f64 = 3000.0;

/// S13 and S14.
pub(super) async fn hundred(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let orchestrator = Orchestrator::start(link_settings(true)).await?;
    orchestrator.write_client_files(&bench.certificates, "bench")?;
    let (mut full, mut drained) = (Samples::default(), Samples::default());
    for round in 0..FILLINGS {
        bench.peers.start_daemon(orchestrator.address().port(), true)?;
        let filled = hold(bench, &orchestrator, &format!("hundred-{round}")).await;
        let begin = Instant::now();
        // The daemon has something to say to the orchestrator meanwhile, which runs here.
        tokio::task::block_in_place(|| bench.peers.stop_daemon())?;
        let took = milliseconds(begin);
        let (memory, sessions) = filled?;
        all_over(&sessions).await?;
        full.push(memory);
        drained.push(took);
    }
    complaints(&orchestrator)?;
    let what = format!("SIGTERM to the end of a daemon with {HUNDRED} idle sessions");
    let objective = Objective { p50: None, p99: Some(DRAINED_MS) };
    let note = "its launcher and all sandboxes have ended, and the orchestrator was told of each session";
    let drained = objective.rows("S13", &what, Unit::Milliseconds, &drained, note);
    let what = format!("resident memory of the daemon with {HUNDRED} sessions");
    let objective = Objective { p50: Some(HUNDRED_KIB), p99: None };
    let full = objective.rows("S14", &what, Unit::Kibibytes, &full, "each with its shell; with a journal");
    Ok([drained, full].concat())
}

/// Memory of the daemon with all its sessions, in KiB, and these.
async fn hold(bench: &mut Bench, orchestrator: &Orchestrator, name: &str) -> Result<(f64, Vec<Session>), BenchError> {
    arrival(orchestrator).await?;
    let mut sessions = Vec::new();
    for number in 0..HUNDRED {
        let session = open(orchestrator, &format!("{name}-{number}")).await?;
        // A shell is started by the first command.
        check(&session.run(&format!("{name}-{number}"), bash(":")).await?)?;
        sessions.push(session);
    }
    let full = bench.peers.daemon_memory()?;
    Ok((full.resident, sessions))
}

/// Whoever ends in order says of each session that it is over.
async fn all_over(sessions: &[Session]) -> Result<(), BenchError> {
    for session in sessions {
        let over = tokio::time::timeout(PATIENCE, session.over()).await;
        over.map_err(|_| BenchError::Link(format!("nobody was told that {} is over", session.session_id)))??;
    }
    Ok(())
}

/// G17, G18 and G19.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let orchestrator = Orchestrator::start(link_settings(true)).await?;
    orchestrator.write_client_files(&bench.certificates, "bench")?;
    let start = starts(bench, &orchestrator).await?;
    let filled = fillings(bench, &orchestrator).await;
    complaints(&orchestrator)?;
    let filled = filled.unwrap_or_else(|error| {
        // The start is known all the same.
        let unmeasured = |goal| Row::unmeasured(goal, "memory of a daemon and its sandboxes", &error.to_string());
        vec![unmeasured("G17"), unmeasured("G18")]
    });
    Ok([start, filled].concat())
}

async fn starts(bench: &mut Bench, orchestrator: &Orchestrator) -> Result<Vec<Row>, BenchError> {
    let (mut ours, mut imports) = (Samples::default(), Samples::default());
    for round in 0..=STARTS.min(bench.rounds) {
        let start = Instant::now();
        bench.peers.start_daemon(orchestrator.address().port(), false)?;
        arrival(orchestrator).await?;
        let took = milliseconds(start);
        bench.peers.stop_daemon()?;
        let import = bench.peers.run("sdk-import")?;
        if round > 0 {
            ours.push(took);
            import.into_iter().for_each(|import| imports.push(import));
        }
    }
    let row = Row::new("G19", "daemon started to ready for work", Unit::Milliseconds, ours.summary())
        .peer("SDK imported", bench.peers.measured("sdk-import", &imports), 0.1)
        .note("with a launcher of its own and the isolation measured by attack before the first word to anybody");
    Ok(vec![row])
}

/// A daemon that cannot start says why on standard error, and never comes.
async fn arrival(orchestrator: &Orchestrator) -> Result<(), BenchError> {
    let come = tokio::time::timeout(PATIENCE, orchestrator.runner()).await;
    come.map_err(|_| BenchError::Link(format!("no daemon came within {} s", PATIENCE.as_secs())))?.map(drop)?;
    Ok(())
}

#[derive(Default)]
struct Memories {
    sandbox: Samples,
    floor: Samples,
    worker: Samples,
    worker_private: Samples,
    idle: Samples,
    full: Samples,
    share: Samples,
}

async fn fillings(bench: &mut Bench, orchestrator: &Orchestrator) -> Result<Vec<Row>, BenchError> {
    let mut memories = Memories::default();
    // Once to warm up: caches of the kernel and pools of everybody grow the first time.
    for round in 0..=FILLINGS {
        let mut discarded = Memories::default();
        let memories = if round == 0 { &mut discarded } else { &mut memories };
        tokio::time::sleep(SETTLE).await;
        // A new one each time: what was resident once stays so, and an idle daemon would look like a full one.
        bench.peers.start_daemon(orchestrator.address().port(), false)?;
        let filled = filling(bench, orchestrator, round, memories).await;
        bench.peers.stop_daemon()?;
        filled?;
        if bench.peers.has("floor") {
            let before = settled().await?;
            let held = bench.peers.hold(HELD);
            let after = settled().await?;
            bench.peers.hold(0)?;
            held?;
            memories.floor.push(each(before, after));
        }
        if let Some(worker) = bench.peers.sdk_memory()? {
            memories.worker.push(worker.resident);
            memories.worker_private.push(worker.private);
        }
    }
    let (peers, kib) = (&bench.peers, Unit::Kibibytes);
    let worker = |samples| peers.measured("sdk", samples);
    let row = |goal: &str, what: String, samples: &Samples| Row::new(goal, what, kib, samples.summary());
    let share = Summary { p50: SHARE_KIB, p99: SHARE_KIB, count: 1 };
    Ok(vec![
        row("G17", "memory of an idle sandbox with its shell, kernel included".to_owned(), &memories.sandbox)
            .peer("SDK worker, private", worker(&memories.worker_private), 0.02)
            .floor("hold", peers.measured("floor", &memories.floor), 1.3)
            .note(format!("free memory lost to {HELD} of them; with what daemon and orchestrator took for them")),
        row("G18", "resident memory of the idle daemon".to_owned(), &memories.idle).peer(
            "SDK worker",
            worker(&memories.worker),
            0.4,
        ),
        row("G18", format!("resident memory of the daemon with {HELD} sandboxes"), &memories.full).peer(
            "SDK worker",
            worker(&memories.worker),
            0.8,
        ),
        row("G18", "resident memory of the daemon for each sandbox".to_owned(), &memories.share).floor(
            "the goal itself",
            Ok(share),
            1.0,
        ),
    ])
}

/// All of them made, looked at, and ended.
async fn filling(
    bench: &mut Bench,
    orchestrator: &Orchestrator,
    round: usize,
    memories: &mut Memories,
) -> Result<(), BenchError> {
    arrival(orchestrator).await?;
    let before = settled().await?;
    let idle = bench.peers.daemon_memory()?;
    let mut sessions = Vec::new();
    for number in 0..HELD {
        let session = open(orchestrator, &format!("held-{round}-{number}")).await?;
        // A shell is started by the first command.
        check(&session.run(&format!("held-{round}-{number}"), bash(":")).await?)?;
        sessions.push(session);
    }
    let after = settled().await?;
    let full = bench.peers.daemon_memory()?;
    for session in &sessions {
        Session::close(session, Duration::ZERO).await?;
    }
    memories.sandbox.push(each(before, after));
    memories.idle.push(idle.resident);
    memories.full.push(full.resident);
    memories.share.push((full.resident - idle.resident) / count(HELD));
    Ok(())
}

/// Memory that nobody uses, in KiB, when what was there before has been given back.
async fn settled() -> Result<u64, BenchError> {
    tokio::time::sleep(SETTLE).await;
    let mut last = free_kib()?;
    for _ in 0..SETTLE_MOST {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = free_kib()?;
        if now.abs_diff(last) < STILL_KIB {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

#[allow(clippy::cast_precision_loss, reason = "sizes of memory in KiB are far below 2^52")]
fn each(before: u64, after: u64) -> f64 {
    (before as f64 - after as f64) / count(HELD)
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}
