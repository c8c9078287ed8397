//! Calls in a living sandbox: the persistent shell, and output too large to keep in memory.

use std::time::Duration;

use super::{Bench, FLOOD_BYTES, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::bash;
use crate::work::Sandbox;

/// A call is short, so more of them cost nothing.
const CALLS_PER_ROUND: usize = 5;

/// G7 and G8, without the network.
pub(super) async fn shell(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let sandbox = bench.subject.create(&bench.subject.spec()).await?;
    let mut ours = [Samples::default(), Samples::default()];
    let mut plain = [Samples::default(), Samples::default()];
    let lines = [("echo", "echo hi"), ("true", "/bin/true")];
    for round in 0..WARM_UP + bench.rounds * CALLS_PER_ROUND {
        for (index, (name, line)) in lines.iter().enumerate() {
            let (_, took) = bench.subject.call(&sandbox, bash(line)).await?;
            let theirs = bench.peers.shell(name)?;
            if round >= WARM_UP {
                ours[index].push(took);
                theirs.into_iter().for_each(|theirs| plain[index].push(theirs));
            }
        }
    }
    sandbox.close(Duration::ZERO).await;
    let row = |goal, what: &str, index: usize, limit| {
        let row = Row {
            ours: ours[index].summary(),
            note: "request to result, no network; floor is a bash of the host on two pipes".to_owned(),
            ..Row::new(goal, format!("bash `{what}`"), Unit::Milliseconds)
        };
        row.floor("bash", plain[index].summary(), limit)
    };
    // The goals for the whole way apply to the sum with the network; only G8 has one that can be used here.
    Ok(vec![row("G7", lines[0].1, 0, None), row("G8", lines[1].1, 1, Some(1.3))])
}

/// G13.
pub(super) async fn flood(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let sandbox = bench.subject.create(&bench.subject.spec()).await?;
    let command = format!("head -c {FLOOD_BYTES} /dev/zero");
    let (mut ours, mut plain, mut kept) = (Samples::default(), Samples::default(), 0);
    let rate = |took: f64| f64::from(u32::try_from(FLOOD_BYTES).unwrap_or(u32::MAX)) / 1000.0 / took;
    for round in 0..WARM_UP + bench.rounds {
        let (bytes, took) = bench.subject.call_with_output(&sandbox, bash(&command)).await?;
        let theirs = bench.peers.run("flood")?;
        if round >= WARM_UP {
            kept = bytes;
            ours.push(rate(took));
            theirs.into_iter().for_each(|theirs| plain.push(rate(theirs)));
        }
    }
    sandbox.close(Duration::ZERO).await;
    let row = Row {
        ours: ours.summary(),
        note: format!("{kept} bytes were kept within the default bounds and read back"),
        ..Row::new("G13", format!("bash `{command}`, bounded and read back"), Unit::MegabytesPerSecond)
    };
    Ok(vec![row.floor("head | cat >/dev/null", plain.summary(), Some(0.5))])
}
