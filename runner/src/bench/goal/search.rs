//! Searching a large tree from inside a sandbox, beside the SDK, ripgrep and find on the host, on the same files.

use std::time::Duration;

use super::{Bench, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::sandbox::spec::{Spec, VolumeUse};
use crate::work::{GlobInput, GrepInput, Sandbox, ToolInput};

/// One round in so many has the SDK's own walk, which takes seconds.
const WALK_EVERY: usize = 3;
/// Any peer may take this long to warm up, so the first round is enough.
const WARM_ROUNDS: usize = 1;
const _: () = assert!(WARM_ROUNDS <= WARM_UP);

#[derive(Default)]
struct Times {
    glob: Samples,
    grep: Samples,
    sdk_glob: Samples,
    sdk_grep: Samples,
    sdk_walk: Samples,
    listing: Samples,
    find: Samples,
    rg: Samples,
}

/// G11 and G12.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let Some((volume, files)) = bench.tree.clone() else {
        return Err(BenchError::Missing("there is no tree to search; name one with --tree"));
    };
    let volumes = vec![VolumeUse { name: volume.clone(), read_only: true }];
    // The tools are confined to the working directory, so the tree is that.
    let spec = Spec { volumes, working_directory: format!("/mnt/{volume}"), ..bench.subject.spec() };
    let sandbox = bench.subject.create(&spec).await?;
    let path = None;
    let glob = ToolInput::Glob(GlobInput { pattern: "**/*.rs".to_owned(), path: path.clone() });
    let grep = ToolInput::Grep(GrepInput { pattern: bench.pattern.clone(), path });
    let mut times = Times::default();
    for round in 0..WARM_ROUNDS + bench.rounds {
        let mut discarded = Times::default();
        let times = if round < WARM_ROUNDS { &mut discarded } else { &mut times };
        times.glob.push(bench.subject.call(&sandbox, glob.clone()).await?.1);
        bench.peers.sample("rg-files", &mut times.listing)?;
        bench.peers.sample("find", &mut times.find)?;
        bench.peers.sdk("glob", &mut times.sdk_glob)?;
        times.grep.push(bench.subject.call(&sandbox, grep.clone()).await?.1);
        bench.peers.sample("rg", &mut times.rg)?;
        bench.peers.sdk("grep", &mut times.sdk_grep)?;
        if round % WALK_EVERY == WARM_ROUNDS % WALK_EVERY {
            bench.peers.sdk("walk", &mut times.sdk_walk)?;
        }
    }
    sandbox.close(Duration::ZERO).await;
    let (ms, peers) = (Unit::Milliseconds, &bench.peers);
    let what = format!("glob `**/*.rs` in {files} files, newest first");
    let glob = Row::new("G11", what, ms, times.glob.summary())
        .peer("SDK in process", peers.measured("sdk", &times.sdk_glob), 0.12)
        .floor("find with times", peers.measured("find", &times.find), 1.0)
        .floor("rg --files", peers.measured("rg-files", &times.listing), 1.5);
    let grep = Row::new("G12", format!("grep `{}` in {files} files", bench.pattern), ms, times.grep.summary())
        .peer("SDK with rg", peers.measured("sdk", &times.sdk_grep), 1.05)
        .peer("SDK without rg", peers.measured("sdk", &times.sdk_walk), 0.1)
        .floor("rg", peers.measured("rg", &times.rg), 1.1);
    Ok(vec![glob, grep])
}
