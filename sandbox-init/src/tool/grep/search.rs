//! Searches files and trees, and writes matching lines in ripgrep's form.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::{Arc, mpsc},
    thread,
};

use grep_regex::RegexMatcher;
use grep_searcher::{BinaryDetection, Searcher, SearcherBuilder, Sink, SinkFinish, SinkMatch};
use ignore::{DirEntry, WalkBuilder, WalkState};
use nix::{
    fcntl::{AtFlags, OFlag},
    sys::stat::{fstat, fstatat},
};

use crate::tool::{
    grep::collect::Collector,
    path::{is_regular, open_beneath},
    search_threads,
};

/// Longest line that is searched; a longer one ends its file, which is counted. Without a bound a file without line ends would
/// be read into memory whole.
const MAX_LINE_BYTES: usize = 32 * 1024 * 1024;
/// What the searcher reads at once, as long as no line is longer.
const READ_BYTES: u64 = 64 * 1024;
/// Files with rules about what to leave out, besides `.git/info/exclude`.
const IGNORE_FILES: [&str; 3] = [".gitignore", ".ignore", ".rgignore"];
/// Largest ignore file; a directory with a larger one is passed over and counted. In the search root, which somebody named, all
/// rules are left out instead.
const MAX_IGNORE_FILE_BYTES: i64 = 4 * 1024 * 1024;

/// One search: what to look for and where to put what is found.
pub(crate) struct Search {
    matcher: RegexMatcher,
    collector: Arc<Collector>,
}

impl Search {
    pub(crate) fn new(matcher: RegexMatcher, collector: Arc<Collector>) -> Self {
        Self { matcher, collector }
    }

    /// Searches one file that was named; its lines carry no name, and it is searched even if it is binary.
    pub(crate) fn single(&self, file: &File) {
        let mut worker = self.worker(BinaryDetection::convert(b'\0'));
        // One file, so whatever its length does to the searcher, no other file sees it.
        worker.search(file, 0, None, Path::new(""));
    }

    /// Searches the tree at `path`, which `root` holds open.
    pub(crate) fn tree(&self, path: &Path, root: &OwnedFd) {
        self.walk(path, root, threads_available(search_threads()));
    }

    /// The same with several threads, or with none besides the present one.
    pub(crate) fn walk(&self, path: &Path, root: &OwnedFd, parallel: bool) {
        let mut builder = WalkBuilder::new(path);
        // The global ignore file is the host user's, and nobody inside has one.
        builder.add_custom_ignore_filename(".rgignore").threads(search_threads()).git_global(false);
        if !has_usable_rules(root, Path::new(".")) {
            builder.ignore(false).git_ignore(false).git_exclude(false).parents(false);
        }
        let (collector, base) = (Arc::clone(&self.collector), path.to_owned());
        let directory = root.try_clone().ok();
        builder.filter_entry(move |entry| {
            if !entry.file_type().is_some_and(|kind| kind.is_dir()) {
                return true;
            }
            let rules = entry.path().strip_prefix(&base).ok().zip(directory.as_ref());
            if collector.is_beyond(entry.path()) {
                return false;
            }
            let is_usable = rules.is_none_or(|(relative, root)| has_usable_rules(root, relative));
            if !is_usable {
                collector.add_unsearched(entry.path());
            }
            is_usable
        });
        if parallel {
            builder.build_parallel().run(|| {
                let mut worker = self.worker(BinaryDetection::quit(b'\0'));
                Box::new(move |entry| worker.visit(entry, path, root))
            });
        } else {
            let mut worker = self.worker(BinaryDetection::quit(b'\0'));
            for entry in builder.build() {
                if worker.visit(entry, path, root) == WalkState::Quit {
                    break;
                }
            }
        }
    }

    fn worker(&self, binary: BinaryDetection) -> Worker {
        let searcher =
            SearcherBuilder::new().line_number(true).heap_limit(Some(MAX_LINE_BYTES)).binary_detection(binary).build();
        let (matcher, collector) = (self.matcher.clone(), Arc::clone(&self.collector));
        Worker { searcher, matcher, collector, lines: Vec::new() }
    }
}

fn searcher(binary: BinaryDetection) -> Searcher {
    SearcherBuilder::new().line_number(true).heap_limit(Some(MAX_LINE_BYTES)).binary_detection(binary).build()
}

/// The walk panics when it cannot have its threads, so they are tried first.
fn threads_available(count: usize) -> bool {
    let mut threads = Vec::new();
    for _ in 0..count {
        let (release, wait) = mpsc::channel::<()>();
        let Ok(handle) = thread::Builder::new().spawn(move || wait.recv().is_ok()) else { break };
        threads.push((release, handle));
    }
    let available = threads.len() == count;
    for (release, handle) in threads {
        drop(release);
        // The thread does nothing that can panic.
        let _ = handle.join();
    }
    available
}

/// Whether the ignore files of a directory can be read to their end: regular and of a sane size. A FIFO would block the
/// walk, a device would fill the memory.
fn has_usable_rules(root: &OwnedFd, directory: &Path) -> bool {
    IGNORE_FILES.iter().all(|name| match fstatat(root, &directory.join(name), AtFlags::empty()) {
        Ok(status) => is_regular(&status) && status.st_size <= MAX_IGNORE_FILE_BYTES,
        Err(_) => true,
    })
}

/// One thread of a search.
struct Worker {
    searcher: Searcher,
    matcher: RegexMatcher,
    collector: Arc<Collector>,
    lines: Vec<u8>,
}

impl Worker {
    fn visit(&mut self, entry: Result<DirEntry, ignore::Error>, base: &Path, root: &OwnedFd) -> WalkState {
        if self.collector.is_stopped() {
            return WalkState::Quit;
        }
        // What cannot be read is passed over.
        let Ok(entry) = entry else { return WalkState::Continue };
        if entry.file_type().is_some_and(|kind| kind.is_file())
            && !self.collector.is_beyond(entry.path())
            && let Some((file, length)) = open_regular(root, base, entry.path())
        {
            self.search(&file, length, Some(entry.path()), entry.path());
        }
        WalkState::Continue
    }

    /// Collects the matching lines of `file`, which had `length` bytes when it was opened; `label` goes in front of each,
    /// `key` is its position in the result.
    fn search(&mut self, file: &File, length: u64, label: Option<&Path>, key: &Path) {
        self.lines.clear();
        let mut sink = Lines {
            label: label.map(|path| path.as_os_str().as_bytes()),
            enough: self.collector.enough(),
            matches: 0,
            binary_at: None,
            collector: &self.collector,
            lines: &mut self.lines,
        };
        // A read that fails in the middle and a line that is too long end the file; the lines before it stay.
        let whole = Whole { file, left: (length > 0).then_some(length) };
        if self.searcher.search_reader(&self.matcher, whole, &mut sink).is_err() {
            self.collector.add_unfinished(key);
        }
        if !self.lines.is_empty() {
            self.collector.add(key, &self.lines);
        }
        // A long line makes the searcher read in larger pieces from then on, and a NUL is noticed a piece at a time. With
        // a new searcher the result for a file does not depend on the files before it.
        if length > READ_BYTES {
            self.searcher = searcher(self.searcher.binary_detection().clone());
        }
    }
}

/// A file as long as it was when it was opened: its end is known, so nobody has to read beyond it to find out.
struct Whole<'a> {
    file: &'a File,
    /// Bytes until the end; `None` where the length says nothing, as in /proc.
    left: Option<u64>,
}

impl Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == Some(0) {
            return Ok(0);
        }
        let length = self.file.read(buffer)?;
        self.left = self.left.map(|left| left.saturating_sub(length as u64));
        Ok(length)
    }
}

/// The file and its length.
fn open_regular(root: &OwnedFd, base: &Path, path: &Path) -> Option<(File, u64)> {
    let relative = path.strip_prefix(base).ok()?;
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = open_beneath(root.as_fd(), relative, flags).ok()?;
    let status = fstat(&file).ok()?;
    is_regular(&status).then(|| (File::from(file), u64::try_from(status.st_size).unwrap_or(0)))
}

/// Writes `path:number:line`.
struct Lines<'a> {
    label: Option<&'a [u8]>,
    enough: usize,
    matches: u64,
    binary_at: Option<u64>,
    collector: &'a Collector,
    lines: &'a mut Vec<u8>,
}

impl Lines<'_> {
    fn push(&mut self, bytes: &[u8]) {
        let room = self.enough.saturating_sub(self.lines.len());
        self.lines.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn push_label(&mut self, separator: &[u8]) {
        if let Some(label) = self.label {
            self.push(label);
            self.push(separator);
        }
    }
}

impl Sink for Lines<'_> {
    type Error = io::Error;

    fn matched(&mut self, searcher: &Searcher, found: &SinkMatch<'_>) -> Result<bool, io::Error> {
        self.matches += 1;
        if searcher.binary_detection().convert_byte().is_some() && self.binary_at.is_some() {
            return Ok(false);
        }
        self.push_label(b":");
        let number = found.line_number().unwrap_or_default();
        self.push(format!("{number}:").as_bytes());
        self.push(found.bytes());
        if !found.bytes().ends_with(b"\n") {
            self.push(b"\n");
        }
        Ok(self.lines.len() < self.enough && !self.collector.is_stopped())
    }

    fn binary_data(&mut self, _: &Searcher, offset: u64) -> Result<bool, io::Error> {
        self.binary_at = Some(offset);
        Ok(true)
    }

    fn finish(&mut self, searcher: &Searcher, _: &SinkFinish) -> Result<(), io::Error> {
        let Some(offset) = self.binary_at.filter(|_| self.matches > 0) else { return Ok(()) };
        self.push_label(b": ");
        let text = if searcher.binary_detection().quit_byte().is_some() {
            format!("WARNING: stopped searching binary file after match (found \"\\0\" byte around offset {offset})\n")
        } else {
            format!("binary file matches (found \"\\0\" byte around offset {offset})\n")
        };
        self.push(text.as_bytes());
        Ok(())
    }
}
