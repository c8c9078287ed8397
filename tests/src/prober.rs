//! The attack program of `tests/attack`: built once with the C compiler, run anywhere, read line by line.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, ensure};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// What became of one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was refused.
    Held,
    /// It had an effect, or reached the kernel code it was meant to be kept away from.
    Breached,
    /// The kernel lacks the target.
    Absent,
    /// It could not be made.
    Error,
}

/// One line of the prober.
#[derive(Debug, Clone, Deserialize)]
pub struct Row {
    /// Identifier of the attack; a part after a dot tells variants apart.
    pub id: String,
    /// What was tried, in words.
    pub attack: String,
    /// What became of it.
    pub result: Verdict,
    /// Name of the errno, empty if there was none.
    pub errno: String,
    /// More.
    pub detail: String,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?} {} [{}] {}", self.id, self.result, self.errno, self.attack, self.detail)
    }
}

/// One line of the scan over all system call numbers.
#[derive(Debug, Clone, Deserialize)]
pub struct Scanned {
    /// System call number.
    pub nr: u32,
    /// `returned`, `killed` by a filter, `waited` until it was ended, `ended` otherwise, or `skipped`.
    pub outcome: String,
    /// errno, 0 for success.
    pub errno: i32,
}

/// Path of the prober, built on first use.
///
/// # Panics
/// When there is no C compiler: nothing in this crate can be proven without the prober.
pub fn path() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| build().expect("the prober needs `cc` and a static C library"))
}

/// Reads result lines, leaving out lines that are none.
///
/// # Errors
/// When a line looks like a result and is not one, or when there is none at all: an attack that reports nothing proves
/// nothing.
pub fn rows(stdout: &[u8]) -> anyhow::Result<Vec<Row>> {
    let rows: Vec<Row> = lines(stdout)?;
    ensure!(!rows.is_empty(), "the prober reported nothing");
    Ok(rows)
}

/// Reads the lines of a scan.
///
/// # Errors
/// When a line is malformed.
pub fn scan(stdout: &[u8]) -> anyhow::Result<BTreeMap<u32, Scanned>> {
    let list: Vec<Scanned> = lines(stdout)?;
    Ok(list.into_iter().map(|row| (row.nr, row)).collect())
}

fn lines<T: for<'a> Deserialize<'a>>(stdout: &[u8]) -> anyhow::Result<Vec<T>> {
    String::from_utf8_lossy(stdout)
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).with_context(|| format!("malformed line: {line}")))
        .collect()
}

/// The file is named by what it was made from, so a changed source is never mistaken for a built one and test binaries
/// that build at the same time agree.
fn build() -> anyhow::Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("attack");
    let mut files: Vec<PathBuf> =
        fs::read_dir(&source)?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<_>>()?;
    files.sort();
    let mut digest = Sha256::new();
    for file in &files {
        digest.update(fs::read(file)?);
    }
    let name: String = digest.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let folder = crate::runner::target_directory()?.join("attack");
    fs::create_dir_all(&folder)?;
    let built = folder.join(format!("prober-{name}"));
    if built.exists() {
        return Ok(built);
    }
    let temporary = folder.join(format!(".prober-{name}-{}", std::process::id()));
    let status = Command::new("cc")
        .args(["-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&temporary)
        .args(files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "c")))
        .status()
        .context("running cc")?;
    ensure!(status.success(), "cc failed on {}", source.display());
    fs::rename(&temporary, &built)?;
    Ok(built)
}
