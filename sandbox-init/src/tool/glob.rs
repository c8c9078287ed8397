//! The `glob` tool: the newest files whose path matches a pattern.
//!
//! Regular files, and links to regular files inside the search root; hidden files too, nothing of `.gitignore`. Links to
//! directories are not entered. Only files that match are asked for their time.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    ffi::OsStr,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::Path,
    time::Instant,
};

use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::stat::{FileStat, fstat, fstatat},
};

use crate::tool::{
    Limits,
    crawl::{Bounds, Cut, Found, Kind, Visitor, crawl},
    cut_short,
    failure::ToolFailure,
    input::Input,
    path::{PathError, RequestedPath, Roots, is_directory, is_regular, lossy},
    pattern::Pattern,
    search_threads,
};

/// The input of `glob`.
pub(crate) struct Request {
    pattern: Pattern,
    path: RequestedPath,
}

impl Request {
    pub(crate) fn from_input(input: &mut Input) -> Result<Self, ToolFailure> {
        let pattern = input.required_nonempty("pattern")?;
        let path = input.optional_path("path")?;
        Ok(Self { pattern: Pattern::parse(&pattern)?, path })
    }
}

pub(crate) fn run(request: &Request, roots: &Roots, limits: &Limits) -> Result<String, ToolFailure> {
    let failure =
        |source: PathError| ToolFailure::Path { tool: "glob", path: request.path.as_str().to_owned(), source };
    let place = roots.resolve(&request.path).map_err(failure)?;
    let root = place.entry.as_ref().ok_or_else(|| failure(Errno::ENOENT.into()))?;
    if !is_directory(&fstat(root).map_err(|error| failure(error.into()))?) {
        return Err(failure(Errno::ENOTDIR.into()));
    }
    let search = Search { pattern: &request.pattern, root: &place.canonical, roots, limit: limits.max_glob_results };
    let mut newest: Vec<_> =
        (0..search_threads()).map(|_| Newest { search: &search, heap: BinaryHeap::new() }).collect();
    let bounds = Bounds { max_entries: limits.max_glob_entries, deadline: Instant::now() + limits.glob_time };
    let cut = crawl(root.as_fd(), &request.pattern.start(), &mut newest, &bounds);
    let mut text = search.listing(newest);
    match cut {
        Some(Cut::Entries) => cut_short(&mut text, &format!("{} directory entries", limits.max_glob_entries)),
        Some(Cut::Time) => cut_short(&mut text, &format!("{} ms", limits.glob_time.as_millis())),
        None => {}
    }
    Ok(text)
}

/// What all threads share.
struct Search<'a> {
    pattern: &'a Pattern,
    root: &'a Path,
    roots: &'a Roots,
    limit: usize,
}

impl Search<'_> {
    fn listing(&self, newest: Vec<Newest<'_>>) -> String {
        let mut all: Vec<Match> = newest.into_iter().flat_map(|part| part.heap).map(|Reverse(found)| found).collect();
        all.sort_unstable_by(|one, other| other.cmp(one));
        all.truncate(self.limit);
        if all.is_empty() {
            return "no matches".to_owned();
        }
        let path = |found: &Match| lossy(self.root.join(OsStr::from_bytes(&found.relative.0)).as_os_str());
        all.iter().map(path).collect::<Vec<_>>().join("\n")
    }

    /// The file that a link leads to, if it is a regular one inside the search root.
    fn target(&self, relative: &[u8]) -> Option<FileStat> {
        let place = self.roots.resolve_path(&self.root.join(OsStr::from_bytes(relative))).ok()?;
        let status = fstat(place.entry?).ok()?;
        (is_regular(&status) && place.canonical.starts_with(self.root)).then_some(status)
    }
}

/// A file that matches; the greater, the earlier in the result: newer, then first by name.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Match {
    modified: (i64, i64),
    relative: Reverse<Vec<u8>>,
}

/// The newest matches that one thread has met, never more than the result can hold.
struct Newest<'a> {
    search: &'a Search<'a>,
    heap: BinaryHeap<Reverse<Match>>,
}

impl Visitor for Newest<'_> {
    fn enters(&self, relative: &[u8], depth: usize) -> bool {
        self.search.pattern.can_match_below(relative, depth)
    }

    fn visit(&mut self, found: &Found<'_>) {
        if !self.search.pattern.matches(found.relative) {
            return;
        }
        let status = match found.kind {
            Kind::File => fstatat(found.directory, found.name, AtFlags::AT_SYMLINK_NOFOLLOW).ok(),
            Kind::Link => self.search.target(found.relative),
        };
        if let Some(status) = status.filter(is_regular) {
            self.keep((status.st_mtime, status.st_mtime_nsec), found.relative);
        }
    }
}

impl Newest<'_> {
    fn keep(&mut self, modified: (i64, i64), relative: &[u8]) {
        let full = self.heap.len() >= self.search.limit;
        if full && self.heap.peek().is_none_or(|Reverse(oldest)| modified < oldest.modified) {
            return;
        }
        self.heap.push(Reverse(Match { modified, relative: Reverse(relative.to_vec()) }));
        if full {
            self.heap.pop();
        }
    }
}

#[cfg(test)]
#[path = "glob_tests.rs"]
mod tests;
