//! Measures the file tools: searches next to ripgrep on the same tree, in turns, and file operations by themselves.
//!
//! ```text
//! cargo run --profile init -p sandbox-init --example tools -- TREE [ROUNDS]
//! ```
//!
//! The tools run in this process, as they do in the prepared child of a sandbox; the time of ripgrep includes its start,
//! because whoever calls it pays for that. Results are compared as ratios of medians: the two take turns, so that both
//! meet the same machine. File operations use a directory in memory (`/dev/shm`) if there is one.

#![expect(clippy::print_stdout, reason = "the numbers are the product")]

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use sandbox_init::tool::{Context, run};
use serde_json::{Value, json};

const DEFAULT_ROUNDS: usize = 15;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let tree = PathBuf::from(arguments.next().ok_or("usage: tools TREE [ROUNDS]")?);
    let rounds = match arguments.next() {
        Some(text) => text.to_str().ok_or("ROUNDS is not a number")?.parse()?,
        None => DEFAULT_ROUNDS,
    };
    searches(&tree.canonicalize()?, rounds)?;
    file_operations(rounds * 20)
}

fn searches(tree: &Path, rounds: usize) -> Result<(), Box<dyn Error>> {
    let context = Context::new(tree);
    println!("{:<34} {:>10} {:>10} {:>7}", "search", "tool ms", "rg ms", "ratio");
    for pattern in ["**/*.rs", "**/Cargo.toml", "*/src/lib.rs"] {
        let rg: &[&str] = &["--no-config", "-uu", "--files", "-g", pattern];
        compare(&format!("glob {pattern}"), &context, "glob", &json!({"pattern": pattern}), rg, rounds)?;
    }
    let expressions = [
        ("rare literal", "RESOLVE_NO_MAGICLINKS"),
        ("common literal", "unsafe"),
        ("regex", r"fn \w+_\w+\(&mut self"),
        ("case-insensitive", r"(?i)deprecated"),
        ("no match", "zzqqxxzzqq"),
    ];
    for (label, pattern) in expressions {
        let rg: &[&str] = &["--no-config", "-n", "--no-heading", "-e", pattern, "--"];
        compare(&format!("grep {label}"), &context, "grep", &json!({"pattern": pattern}), rg, rounds)?;
    }
    Ok(())
}

fn compare(
    label: &str,
    context: &Context,
    tool: &str,
    input: &Value,
    rg: &[&str],
    rounds: usize,
) -> Result<(), Box<dyn Error>> {
    let input = input.to_string();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..=rounds {
        let started = Instant::now();
        let result = run(tool, input.as_bytes(), context);
        let tool_time = started.elapsed();
        if result.is_error {
            return Err(format!("{label}: {result:?}").into());
        }
        let started = Instant::now();
        let mut command = Command::new("rg");
        command.args(rg).current_dir(&context.working_directory).stdin(Stdio::null()).stdout(Stdio::null());
        if tool == "grep" {
            command.arg(&context.working_directory);
        }
        command.status()?;
        let rg_time = started.elapsed();
        // The first round fills the caches.
        if round > 0 {
            ours.push(tool_time);
            theirs.push(rg_time);
        }
    }
    let (ours, theirs) = (median(ours), median(theirs));
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("{label:<34} {:>10.2} {:>10.2} {ratio:>7.2}", milliseconds(ours), milliseconds(theirs));
    Ok(())
}

fn file_operations(rounds: usize) -> Result<(), Box<dyn Error>> {
    let memory = Path::new("/dev/shm");
    let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let directory = base.join(format!("sandbox-init-tools-{}", std::process::id()));
    fs::create_dir(&directory)?;
    let outcome = in_directory(&directory, rounds);
    fs::remove_dir_all(&directory)?;
    outcome
}

fn in_directory(directory: &Path, rounds: usize) -> Result<(), Box<dyn Error>> {
    let context = Context::new(directory);
    println!("\n{:<34} {:>10} {:>10} {:>7}", "file operation", "tool us", "floor us", "ratio");
    for (label, size) in [("1 KB", 1_024), ("200 KB", 204_800)] {
        let line = "some words of an ordinary line\n";
        let content = line.repeat(size / line.len()) + "the one place\n";
        let write = json!({"file_path": "src/file.txt", "content": content}).to_string();
        let read = json!({"file_path": "src/file.txt"}).to_string();
        let edit = |old: &str, new: &str| {
            json!({"file_path": "src/file.txt", "old_string": old, "new_string": new}).to_string()
        };
        let edits = [edit("one place", "other place"), edit("other place", "one place")];
        for (tool, inputs) in [("write", [&write, &write]), ("read", [&read, &read]), ("edit", [&edits[0], &edits[1]])]
        {
            let (mut times, mut floor) = (Vec::new(), Vec::new());
            for round in 0..rounds - rounds % 2 {
                let started = Instant::now();
                bare(tool, directory, &content)?;
                floor.push(started.elapsed());
                let started = Instant::now();
                let result = run(tool, inputs[round % 2].as_bytes(), &context);
                times.push(started.elapsed());
                if result.is_error {
                    return Err(format!("{tool}: {result:?}").into());
                }
            }
            let (times, floor) = (median(times), median(floor));
            let ratio = times.as_secs_f64() / floor.as_secs_f64();
            let (ours, bare) = (milliseconds(times) * 1000.0, milliseconds(floor) * 1000.0);
            println!("{:<34} {ours:>10.1} {bare:>10.1} {ratio:>7.2}", format!("{tool} {label}"));
        }
    }
    Ok(())
}

/// The least that anybody has to do for the same effect: a read, a draft and a rename.
fn bare(tool: &str, directory: &Path, content: &str) -> std::io::Result<()> {
    let (path, draft) = (directory.join("bare.txt"), directory.join("bare.draft"));
    if tool != "write" {
        if !path.exists() {
            fs::write(&path, content)?;
        }
        let read = fs::read_to_string(&path)?;
        std::hint::black_box(&read);
    }
    if tool != "read" {
        fs::write(&draft, content)?;
        fs::rename(&draft, &path)?;
    }
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
