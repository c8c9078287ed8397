//! Calls of the persistent shell, over the whole way and inside, and output too large to keep in memory.

use std::time::Duration;

use super::sync::Sync;
use super::{Bench, FLOOD_BYTES, MESSAGE_BYTES, WARM_UP, settle};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::bash;
use crate::bench::whole;
use crate::work::Sandbox;

/// A call is short, so more of them cost nothing.
const CALLS_PER_ROUND: usize = 5;

/// One command: its name among the peers, and its text.
const LINES: [(&str, &str); 2] = [("echo", "echo hi"), ("true", "/bin/true")];

#[derive(Default)]
struct Times {
    whole: Samples,
    inside: Samples,
    sdk: Samples,
    floor: Samples,
    shell: Samples,
    /// The whole way with a journal, and what that has to cost: the way without, and two syncs.
    durable: Samples,
    synced: Samples,
}

/// G7 and G8.
pub(super) async fn shell(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let way = bench.whole().await?;
    let session = way.session().await?;
    let (lasting, directory) = bench.durable().await?;
    let lasting_session = lasting.session().await?;
    let disk = |source| BenchError::Machine { path: directory.display().to_string(), source };
    let sync = Sync::beside(&directory).map_err(disk)?;
    let mut echo = bench.echo(None).await?;
    let sandbox = bench.subject.create(&bench.subject.spec()).await?;
    let mut times = [Times::default(), Times::default()];
    for round in 0..WARM_UP + bench.rounds * CALLS_PER_ROUND {
        for (index, (name, line)) in LINES.iter().enumerate() {
            let mut discarded = Times::default();
            let times = if round < WARM_UP { &mut discarded } else { &mut times[index] };
            settle().await;
            let (took, _) = way.call(&session, whole::bash(line)).await?;
            times.whole.push(took);
            let syncs = sync.once().map_err(disk)? + sync.once().map_err(disk)?;
            times.synced.push(took + syncs);
            settle().await;
            let (took, _) = lasting.call(&lasting_session, whole::bash(line)).await?;
            times.durable.push(took);
            settle().await;
            bench.peers.sdk(name, &mut times.sdk)?;
            settle().await;
            let (_, took) = bench.subject.call(&sandbox, bash(line)).await?;
            times.inside.push(took);
            settle().await;
            let transport = echo.round(MESSAGE_BYTES, MESSAGE_BYTES).await?;
            settle().await;
            let (hop, shell) = (bench.peers.hop()?, bench.peers.shell(name)?);
            shell.into_iter().for_each(|shell| times.shell.push(shell));
            if let (Some(hop), Some(shell)) = (hop, shell) {
                times.floor.push(transport + hop + shell);
            }
        }
    }
    sandbox.close(Duration::ZERO).await;
    way.end().await?;
    lasting.end().await?;
    let peers = &bench.peers;
    let rows = |goal, index: usize, to_sdk: f64, to_floor: f64| {
        let (line, times) = (LINES[index].1, &times[index]);
        let ms = Unit::Milliseconds;
        let whole = Row::new(goal, format!("bash `{line}`, whole way"), ms, times.whole.summary())
            .peer("SDK in process", peers.measured("sdk", &times.sdk), to_sdk)
            .floor("message + hop + shell", peers.measured("floor", &times.floor), to_floor)
            .note("orchestrator to sandbox and back over mutual TLS");
        let inside = Row::new(goal, format!("bash `{line}`, no network"), ms, times.inside.summary()).floor(
            "bash of the host on two pipes",
            peers.measured("bash", &times.shell),
            None,
        );
        let durable = Row::new(goal, format!("bash `{line}`, whole way, with a journal"), ms, times.durable.summary())
            .floor("without a journal + 2 syncs", peers.measured("", &times.synced), 1.0)
            .note(format!("a sync makes {} bytes durable on the file system of the journal", Sync::BYTES));
        [whole, inside, durable]
    };
    Ok([rows("G7", 0, 2.0, 2.0), rows("G8", 1, 1.0, 1.3)].concat())
}

/// G13.
pub(super) async fn flood(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let sandbox = bench.subject.create(&bench.subject.spec()).await?;
    let command = format!("head -c {FLOOD_BYTES} /dev/zero");
    let (mut ours, mut plain, mut sdk, mut kept) = (Samples::default(), Samples::default(), Samples::default(), 0);
    for round in 0..WARM_UP + bench.rounds {
        let (bytes, took) = bench.subject.call_with_output(&sandbox, bash(&command)).await?;
        let theirs = bench.peers.run("flood")?;
        let mut discarded = Samples::default();
        bench.peers.sdk("flood", if round < WARM_UP { &mut discarded } else { &mut sdk })?;
        if round >= WARM_UP {
            kept = bytes;
            ours.push(rate(took));
            theirs.into_iter().for_each(|theirs| plain.push(rate(theirs)));
        }
    }
    sandbox.close(Duration::ZERO).await;
    let what = format!("bash `{command}`, bounded and read back");
    let row = Row::new("G13", what, Unit::MegabytesPerSecond, ours.summary())
        .peer("SDK in process", bench.peers.measured("sdk", &sdk.map(rate)), 3.0)
        .floor("head | cat >/dev/null", bench.peers.measured("flood", &plain), 0.5)
        .note(format!("{kept} bytes were kept within the default bounds and read back; the SDK keeps 102400"));
    Ok(vec![row])
}

/// Megabytes in a second, when all of it took so many milliseconds.
fn rate(took: f64) -> f64 {
    f64::from(u32::try_from(FLOOD_BYTES).unwrap_or(u32::MAX)) / 1000.0 / took
}
