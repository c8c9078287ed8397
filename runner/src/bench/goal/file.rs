//! File tools inside a living sandbox, without the network, beside the same work done directly in this process.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Bench, WARM_UP};
use crate::bench::BenchError;
use crate::bench::row::{Row, Unit};
use crate::bench::sample::Samples;
use crate::bench::subject::milliseconds;
use crate::work::{EditInput, ReadInput, Sandbox, ToolInput, WriteInput};

const SIZES: [(&str, usize); 2] = [("1 KB", 1_000), ("200 KB", 200_000)];
const FILE: &str = "/workspace/bench.txt";
/// Occurs once, at the end of the text, so that an edit has to look at all of it.
const OLD: &str = "the last line before";
const NEW: &str = "the last line after!";
/// A call is short, so more of them cost nothing.
const CALLS_PER_ROUND: usize = 3;

/// G9.
pub(super) async fn measure(bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
    let sandbox = bench.subject.create(&bench.subject.spec()).await?;
    let directory = tempfile::tempdir().map_err(|source| failed("a temporary directory", source))?;
    let mut rows = Vec::new();
    for (size, length) in SIZES {
        let content = text(length);
        let tools: [(&str, ToolInput); 3] = [
            ("write", ToolInput::Write(WriteInput { file_path: FILE.into(), content: content.clone() })),
            ("read", ToolInput::Read(ReadInput { file_path: FILE.into(), view_range: None })),
            (
                "edit",
                ToolInput::Edit(EditInput {
                    file_path: FILE.into(),
                    old_string: OLD.into(),
                    new_string: NEW.into(),
                    replace_all: false,
                }),
            ),
        ];
        let mut ours: [Samples; 3] = Default::default();
        let mut direct: [Samples; 3] = Default::default();
        for round in 0..WARM_UP + bench.rounds * CALLS_PER_ROUND {
            // In this order each finds what it needs: the edit of the last round is written over.
            for (index, (name, input)) in tools.iter().enumerate() {
                let (_, took) = bench.subject.call(&sandbox, input.clone()).await?;
                let start = Instant::now();
                directly(name, &directory.path().join("bench.txt"), &content)
                    .map_err(|source| failed("the file of the comparison", source))?;
                let theirs = milliseconds(start);
                if round >= WARM_UP {
                    ours[index].push(took);
                    direct[index].push(theirs);
                }
            }
        }
        for (index, (name, _)) in tools.iter().enumerate() {
            let row = Row {
                ours: ours[index].summary(),
                note: "the goal compares with a library that is not part of this program".to_owned(),
                ..Row::new("G9", format!("{name} {size}, no network"), Unit::Milliseconds)
            };
            rows.push(row.floor("plain calls in this process", direct[index].summary(), None));
        }
    }
    sandbox.close(Duration::ZERO).await;
    Ok(rows)
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

/// What the tool does, without any check, in this process.
fn directly(tool: &str, file: &Path, content: &str) -> std::io::Result<()> {
    match tool {
        "write" => fs::write(file, content),
        "read" => fs::read_to_string(file).map(|text| drop(std::hint::black_box(text))),
        _ => fs::read_to_string(file).and_then(|text| fs::write(file, text.replacen(OLD, NEW, 1))),
    }
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
