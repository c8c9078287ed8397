//! Searching a large tree from inside a sandbox, beside ripgrep and find on the host, on the same files.

use std::time::Duration;

use super::{Bench, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::sandbox::spec::{Spec, VolumeUse};
use crate::work::{GlobInput, GrepInput, Sandbox, ToolInput};

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
    let (mut globs, mut listings, mut finds) = (Samples::default(), Samples::default(), Samples::default());
    let (mut greps, mut rgs) = (Samples::default(), Samples::default());
    for round in 0..WARM_UP + bench.rounds {
        let (_, glob_took) = bench.subject.call(&sandbox, glob.clone()).await?;
        let (listing, find) = (bench.peers.run("rg-files")?, bench.peers.run("find")?);
        let (_, grep_took) = bench.subject.call(&sandbox, grep.clone()).await?;
        let rg = bench.peers.run("rg")?;
        if round >= WARM_UP {
            globs.push(glob_took);
            greps.push(grep_took);
            for (samples, value) in [(&mut listings, listing), (&mut finds, find), (&mut rgs, rg)] {
                value.into_iter().for_each(|value| samples.push(value));
            }
        }
    }
    sandbox.close(Duration::ZERO).await;
    let ms = Unit::Milliseconds;
    Ok(vec![
        Row { ours: globs.summary(), ..Row::new("G11", format!("glob `**/*.rs` in {files} files, newest first"), ms) }
            .peer("rg --files", listings.summary(), Some(1.5))
            .floor("find with times", finds.summary(), Some(1.0)),
        Row { ours: greps.summary(), ..Row::new("G12", format!("grep `{}` in {files} files", bench.pattern), ms) }
            .peer("rg", rgs.summary(), Some(1.1)),
    ])
}
