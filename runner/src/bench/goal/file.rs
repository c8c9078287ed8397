//! File tools: inside a living sandbox without the network, and over the whole way, beside the SDK's and the same work
//! done directly in this process.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::call::Input;

use super::{Bench, MESSAGE_BYTES, WARM_UP, settle};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::work::{EditInput, ReadInput, Sandbox, ToolInput, WriteInput};

const SIZES: [(&str, usize); 2] = [("1 KB", 1_000), ("200 KB", 200_000)];
/// In this order each finds what it needs: the edit of the last round is written over.
const TOOLS: [&str; 3] = ["write", "read", "edit"];
const FILE: &str = "/workspace/bench.txt";
/// Occurs once, at the end of the text, so that an edit has to look at all of it.
const OLD: &str = "the last line before";
const NEW: &str = "the last line after!";
/// A call is short, so more of them cost nothing.
const CALLS_PER_ROUND: usize = 3;

#[derive(Default)]
struct Times {
    ours: Samples,
    sdk: Samples,
    floor: Samples,
}

/// G9.
pub(super) async fn inside(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let sandbox = bench.subject.create(&bench.subject.spec()).await?;
    let directory = tempfile::tempdir().map_err(|source| failed("a temporary directory", source))?;
    let mut rows = Vec::new();
    for (size, length) in SIZES {
        let content = text(length);
        let mut times: [Times; 3] = Default::default();
        for round in 0..WARM_UP + bench.rounds * CALLS_PER_ROUND {
            for (index, tool) in TOOLS.into_iter().enumerate() {
                let mut discarded = Times::default();
                let times = if round < WARM_UP { &mut discarded } else { &mut times[index] };
                settle().await;
                let (_, took) = bench.subject.call(&sandbox, input(tool, &content)).await?;
                times.ours.push(took);
                settle().await;
                bench.peers.sdk(&format!("{tool}-{length}"), &mut times.sdk)?;
                times.floor.push(directly(tool, directory.path(), &content)?);
            }
        }
        for (tool, times) in TOOLS.into_iter().zip(&times) {
            let row = Row::new("G9", format!("{tool} {size}, no network"), Unit::Milliseconds, times.ours.summary());
            rows.push(
                row.peer("SDK in process", bench.peers.measured("sdk", &times.sdk), limit_inside(tool, length)).floor(
                    "plain calls in this process",
                    bench.peers.measured("", &times.floor),
                    None,
                ),
            );
        }
    }
    sandbox.close(Duration::ZERO).await;
    Ok(rows)
}

/// At 200 KB only an edit has a goal.
fn limit_inside(tool: &str, length: usize) -> Option<f64> {
    match (tool, length) {
        (_, 1_000) => Some(1.0),
        ("edit", _) => Some(0.5),
        _ => None,
    }
}

/// G10.
pub(super) async fn whole(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let way = bench.whole().await?;
    let session = way.session().await?;
    let mut echo = bench.echo(None).await?;
    let directory = tempfile::tempdir().map_err(|source| failed("a temporary directory", source))?;
    let mut rows = Vec::new();
    for (size, length) in SIZES {
        let content = text(length);
        let mut times: [Times; 3] = Default::default();
        for round in 0..WARM_UP + bench.rounds * CALLS_PER_ROUND {
            for (index, tool) in TOOLS.into_iter().enumerate() {
                let mut discarded = Times::default();
                let times = if round < WARM_UP { &mut discarded } else { &mut times[index] };
                settle().await;
                let (took, _) = way.call(&session, sent(tool, &content)).await?;
                times.ours.push(took);
                settle().await;
                bench.peers.sdk(&format!("{tool}-{length}"), &mut times.sdk)?;
                settle().await;
                // The stream is symmetric, so it does not matter who begins.
                let (there, back) = match tool {
                    "write" => (length, MESSAGE_BYTES),
                    "read" => (MESSAGE_BYTES, length),
                    _ => (MESSAGE_BYTES, MESSAGE_BYTES),
                };
                let transport = echo.round(there, back).await?;
                let work = directly(tool, directory.path(), &content)?;
                bench.peers.hop()?.into_iter().for_each(|hop| times.floor.push(transport + hop + work));
            }
        }
        for (tool, times) in TOOLS.into_iter().zip(&times) {
            let row = Row::new("G10", format!("{tool} {size}, whole way"), Unit::Milliseconds, times.ours.summary());
            let to_sdk = if length > 1_000 { 3.0 } else { 2.0 };
            rows.push(row.peer("SDK in process", bench.peers.measured("sdk", &times.sdk), to_sdk).floor(
                "message + hop + plain calls",
                bench.peers.measured("floor", &times.floor),
                1.5,
            ));
        }
    }
    way.end().await?;
    Ok(rows)
}

fn input(tool: &str, content: &str) -> ToolInput {
    match tool {
        "write" => ToolInput::Write(WriteInput { file_path: FILE.into(), content: content.to_owned() }),
        "read" => ToolInput::Read(ReadInput { file_path: FILE.into(), view_range: None }),
        _ => ToolInput::Edit(EditInput {
            file_path: FILE.into(),
            old_string: OLD.into(),
            new_string: NEW.into(),
            replace_all: false,
        }),
    }
}

/// The same, as it is sent.
fn sent(tool: &str, content: &str) -> Input {
    let file_path = FILE.to_owned();
    match tool {
        "write" => Input::Write(pb::WriteInput { file_path, content: content.to_owned() }),
        "read" => Input::Read(pb::ReadInput { file_path, view_range: Vec::new() }),
        _ => Input::Edit(pb::EditInput {
            file_path,
            old_string: OLD.to_owned(),
            new_string: NEW.to_owned(),
            replace_all: false,
        }),
    }
}

fn failed(what: &str, source: std::io::Error) -> BenchError {
    BenchError::Machine { path: what.to_owned(), source }
}

fn text(length: usize) -> String {
    let line = "a line of an ordinary source file, neither short nor very long\n";
    let mut text: String = line.chars().cycle().take(length.saturating_sub(OLD.len() + 1)).collect();
    text.push_str(OLD);
    text.push('\n');
    text
}

/// What the tool does, without any check, in this process; milliseconds.
fn directly(tool: &str, directory: &Path, content: &str) -> Result<f64, BenchError> {
    let file = &directory.join("bench.txt");
    let start = Instant::now();
    let done = match tool {
        "write" => fs::write(file, content),
        "read" => fs::read_to_string(file).map(|text| drop(std::hint::black_box(text))),
        _ => fs::read_to_string(file).and_then(|text| fs::write(file, text.replacen(OLD, NEW, 1))),
    };
    let took = milliseconds(start);
    done.map(|()| took).map_err(|source| failed("the file of the comparison", source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_its_length_and_can_be_edited_once() {
        let text = text(1_000);

        assert_eq!((text.len(), text.matches(OLD).count()), (1_000, 1));
    }
}
