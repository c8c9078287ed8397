//! The tools answer as the official toolset does: the same calls, drawn by a seed, and every difference is in a table with its
//! reason. `files` calls the file tools on equal trees, `bash` has commands run in a sandbox of the daemon.
//!
//! `SEED`, `TOOLSET_CALLS` and `BASH_CALLS` repeat a run or make it larger.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

mod bash;
mod files;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use sandbox_runner_tests::daemon::Random;
use serde_json::{Value, json};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/official/toolset.py");
/// What stands for the working directory in inputs and texts.
const ROOT: &str = "$W";

/// A call and both answers.
#[derive(Debug)]
struct Case {
    tool: &'static str,
    input: Value,
    official: Answer,
    ours: Answer,
    /// The tree of the official tools, after the call.
    root: PathBuf,
}

#[derive(Debug, Clone, PartialEq)]
struct Answer {
    is_error: bool,
    content: Vec<Value>,
}

/// A difference that is meant.
struct Difference {
    name: &'static str,
    reason: &'static str,
    fits: fn(&Case) -> bool,
}

impl Answer {
    fn text(&self) -> String {
        self.content.iter().filter_map(|block| block["text"].as_str()).collect()
    }

    fn ends(&self, with: &str) -> bool {
        self.text().ends_with(with)
    }

    fn begins(&self, tool: &str) -> bool {
        self.text().starts_with(&format!("{tool}: "))
    }

    fn is_invalid_arguments(&self) -> bool {
        self.is_error && self.text().starts_with("ValueError('Invalid arguments")
    }

    fn lines(&self) -> BTreeSet<String> {
        self.text().lines().map(ToOwned::to_owned).collect()
    }

    /// With the placeholder where it names `root`.
    fn of(is_error: bool, content: Vec<Value>, root: &Path) -> Self {
        let text = Value::Array(content).to_string().replace(&root.display().to_string(), ROOT);
        Self { is_error, content: serde_json::from_str(&text).expect("JSON with another name in it") }
    }
}

/// The official toolset as a process.
struct Official {
    child: Child,
    calls: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Official {
    fn start(python: &Path, root: &Path) -> Self {
        let mut child = Command::new(python)
            .arg(PROGRAM)
            .arg(root)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .env("LANG", "C.UTF-8")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let calls = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, calls, answers }
    }

    fn call(&mut self, tool: &str, input: &Value, root: &Path) -> Answer {
        writeln!(self.calls, "{}", json!({"name": tool, "input": input})).unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        let content = answer["content"].as_array().unwrap().clone();
        Answer::of(answer["is_error"].as_bool().unwrap(), content, root)
    }
}

impl Drop for Official {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a run has met, by the names of rows, and what is in no row.
#[derive(Debug, Default)]
struct Verdict {
    same: u64,
    met: BTreeMap<&'static str, u64>,
    unknown: Vec<String>,
}

impl Verdict {
    fn judge(&mut self, case: &Case, differences: &[Difference]) {
        if case.official == case.ours {
            self.same += 1;
            return;
        }
        match differences.iter().find(|difference| (difference.fits)(case)) {
            Some(difference) => *self.met.entry(difference.name).or_default() += 1,
            None => self.unknown.push(format!(
                "{} {}\n  official {} {:.300}\n  ours     {} {:.300}",
                case.tool,
                case.input,
                case.official.is_error,
                case.official.text(),
                case.ours.is_error,
                case.ours.text()
            )),
        }
    }

    /// Every difference must be in a row, and every row must have been met but for those that `need_not`. A run of another
    /// size or seed need not meet them all.
    fn assert(&self, differences: &[Difference], need_not: &[&str], size: &str) {
        assert!(differences.len() <= MOST_CLASSES, "{} classes of difference", differences.len());
        println!("{} the same", self.same);
        for difference in differences {
            println!("{} {}: {}", self.met.get(difference.name).unwrap_or(&0), difference.name, difference.reason);
        }
        assert!(self.unknown.is_empty(), "{} without a reason:\n{}", self.unknown.len(), self.unknown.join("\n"));
        if std::env::var_os("SEED").is_none() && std::env::var_os(size).is_none() {
            let rows = differences.iter().map(|difference| difference.name).filter(|name| !need_not.contains(name));
            let missed: Vec<&str> = rows.filter(|name| !self.met.contains_key(name)).collect();
            assert!(missed.is_empty(), "not met, so no difference any more: {missed:?}");
        }
    }
}

/// More than this, and a worker that takes ours in place of the official one is surprised too often.
const MOST_CLASSES: usize = 15;

fn pick<T: Clone>(random: &mut Random, from: &[T]) -> T {
    let place = random.below(from.len() as u64);
    from[usize::try_from(place).expect("an index")].clone()
}

fn placed(input: &Value, root: &Path) -> Value {
    serde_json::from_str(&input.to_string().replace(ROOT, &root.display().to_string()))
        .expect("JSON with another name in it")
}
