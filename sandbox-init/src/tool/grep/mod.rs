//! The `grep` tool: the lines that match a regular expression, with ripgrep's own engine.
//!
//! Dialect, ignore files, treatment of hidden and binary files and the form of a line are those of
//! `rg --no-config -n --no-heading -e PATTERN -- PATH`. The order is not: files are sorted by path, so that the same call
//! gives the same text. When there is more than the output can hold, exactly its beginning in that order is returned, and
//! files that sort behind it are not opened any more.
//!
//! Files are opened beneath the descriptor of the search root and never through a link. They are read and not mapped into
//! memory: a program that truncates a mapped file would kill the tool with SIGBUS.

mod collect;
mod search;

use std::{
    sync::{Arc, mpsc},
    thread,
};

use grep_regex::{RegexMatcher, RegexMatcherBuilder};
use nix::{errno::Errno, sys::stat::fstat};

use crate::tool::{
    Limits, cut_short,
    failure::ToolFailure,
    grep::{collect::Collector, search::Search},
    input::Input,
    path::{PathError, RequestedPath, Roots, is_directory, is_regular},
};

/// Bounds of a compiled expression and of its lazily built automaton, for each thread.
const MAX_REGEX_BYTES: usize = 64 * 1024 * 1024;

/// The input of `grep`.
pub(crate) struct Request {
    matcher: RegexMatcher,
    path: RequestedPath,
}

impl Request {
    pub(crate) fn from_input(input: &mut Input) -> Result<Self, ToolFailure> {
        let pattern = input.required_nonempty("pattern")?;
        let path = input.optional_path("path")?;
        let matcher = RegexMatcherBuilder::new()
            .multi_line(true)
            .line_terminator(Some(b'\n'))
            .size_limit(MAX_REGEX_BYTES)
            .dfa_size_limit(MAX_REGEX_BYTES)
            .build(&pattern)
            .map_err(|error| ToolFailure::GrepInvalid { reason: error.to_string() })?;
        Ok(Self { matcher, path })
    }
}

pub(crate) fn run(request: &Request, roots: &Roots, limits: &Limits) -> Result<String, ToolFailure> {
    let failure =
        |source: PathError| ToolFailure::Path { tool: "grep", path: request.path.as_str().to_owned(), source };
    let place = roots.resolve(&request.path).map_err(failure)?;
    let entry = place.entry.as_ref().ok_or_else(|| failure(Errno::ENOENT.into()))?;
    let status = fstat(entry).map_err(|error| failure(error.into()))?;
    let collector = Arc::new(Collector::new(limits.max_grep_output_bytes));
    let search = Search::new(request.matcher.clone(), Arc::clone(&collector));
    let in_time = if is_directory(&status) {
        let root = entry.try_clone().map_err(|_| failure(Errno::EMFILE.into()))?;
        let path = place.canonical.clone();
        within(limits, move || search.tree(&path, &root))
    } else if is_regular(&status) {
        let file = place.open_file().map_err(failure)?.file;
        within(limits, move || search.single(&file))
    } else {
        return Err(failure(PathError::NotRegular));
    };
    let mut text = collector.finish();
    if !in_time {
        cut_short(&mut text, &format!("{} ms", limits.grep_time.as_millis()));
    }
    Ok(text)
}

/// Runs `work` on a thread of its own and stops waiting when its time is over. False if it was not done by then.
///
/// The thread is needed because a single read can take any time: the workload may have put a FIFO where an ignore file is
/// expected. If no thread can be had, the work is done here, without a limit of time.
fn within(limits: &Limits, work: impl FnOnce() + Send + 'static) -> bool {
    let (done, finished) = mpsc::channel();
    let (hand_over, take) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
    let worker = thread::Builder::new().name("grep".to_owned()).spawn(move || {
        if let Ok(work) = take.recv() {
            work();
            // Nobody listens when the time was over before.
            let _ = done.send(());
        }
    });
    if worker.is_err() {
        work();
        return true;
    }
    match hand_over.send(Box::new(work)) {
        Ok(()) => finished.recv_timeout(limits.grep_time).is_ok(),
        Err(returned) => {
            (returned.0)();
            true
        }
    }
}

#[cfg(test)]
mod tests;
