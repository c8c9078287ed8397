//! Keeps the beginning of a result that arrives in any order.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Matching lines by file, in the order of paths, up to a number of bytes.
///
/// Holds at most one file more than the output can show.
pub(crate) struct Collector {
    limit: usize,
    kept: Mutex<Kept>,
    /// There is more than the output can show; from now on the last path is a bound.
    full: AtomicBool,
    stopped: AtomicBool,
}

#[derive(Default)]
struct Kept {
    files: BTreeMap<PathBuf, Vec<u8>>,
    bytes: usize,
    unfinished: LeftOut,
    unsearched: LeftOut,
}

/// What a search has passed over: how many, and the first in the order of paths, so that the same call gives the same text.
#[derive(Default)]
struct LeftOut {
    count: usize,
    first: Option<PathBuf>,
}

impl LeftOut {
    fn add(&mut self, path: &Path) {
        self.count += 1;
        if self.first.as_deref().is_none_or(|first| path < first) {
            self.first = Some(path.to_owned());
        }
    }

    /// A line that says so; `one` and `more` are what is said of one and of several.
    fn line(&self, one: &str, more: &str, why: &str) -> Option<String> {
        let first = self.first.as_ref()?.to_string_lossy();
        Some(match self.count {
            // A file that was named itself has no name here.
            1 if first.is_empty() => format!("[1 {one}, because {why}]"),
            1 => format!("[1 {one}, because {why}: {first}]"),
            count => format!("[{count} {more}, because {why}; the first is {first}]"),
        })
    }
}

impl Collector {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, kept: Mutex::default(), full: AtomicBool::new(false), stopped: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of one file worth collecting: one more than the output shows, so that the cut is noticed.
    pub(crate) fn enough(&self) -> usize {
        self.limit + 1
    }

    /// Adds the matching lines of one file.
    pub(crate) fn add(&self, path: &Path, lines: &[u8]) {
        let mut kept = self.lock();
        kept.bytes += lines.len();
        kept.files.insert(path.to_owned(), lines.to_vec());
        loop {
            let bytes = kept.bytes;
            let Some(length) = kept.files.last_key_value().map(|(_, lines)| lines.len()) else { break };
            if bytes - length < self.enough() {
                break;
            }
            kept.files.pop_last();
            kept.bytes -= length;
        }
        if kept.bytes >= self.enough() {
            self.full.store(true, Ordering::Release);
        }
    }

    /// The search of a file has ended before its end.
    pub(crate) fn add_unfinished(&self, path: &Path) {
        self.lock().unfinished.add(path);
    }

    /// A directory was passed over.
    pub(crate) fn add_unsearched(&self, path: &Path) {
        self.lock().unsearched.add(path);
    }

    /// Whether nothing at or below `path` can appear in the output.
    pub(crate) fn is_beyond(&self, path: &Path) -> bool {
        self.is_full() && self.lock().files.last_key_value().is_some_and(|(last, _)| path > last.as_path())
    }

    fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    /// Whether somebody has taken the result already.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// The text of the result so far; what arrives later is lost.
    pub(crate) fn finish(&self) -> String {
        self.stopped.store(true, Ordering::Relaxed);
        let kept = std::mem::take(&mut *self.lock());
        let unfinished = kept.unfinished.line(
            "file was not searched to its end",
            "files were not searched to their end",
            "a line is too long or reading failed",
        );
        let unsearched = kept.unsearched.line(
            "directory was not searched",
            "directories were not searched",
            "an ignore file in it cannot be read or is too large",
        );
        let mut text = self.shown(kept.files);
        for line in unfinished.into_iter().chain(unsearched) {
            if !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(&line);
        }
        text
    }

    fn shown(&self, files: BTreeMap<PathBuf, Vec<u8>>) -> String {
        if files.is_empty() {
            return "no matches".to_owned();
        }
        let all: Vec<u8> = files.into_values().flatten().collect();
        let mut text = String::from_utf8_lossy(&all).into_owned();
        if text.len() > self.limit {
            let end = (0..=self.limit).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            text.truncate(end);
            text.push_str(&format!("\n[output truncated at {} bytes]", self.limit));
        }
        text
    }
}
