//! The pattern language of `glob`: `*`, `?`, `[...]`, `{a,b}` and `**`, on paths from the search root.
//!
//! Besides the answer to "does this path match", a pattern knows which directories cannot contain a match. That is what
//! makes `crates/*/src/lib.rs` cheap in a large tree.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};

use crate::tool::failure::ToolFailure;

/// Directories that are not searched unless the pattern names them before any `**`: large, and never what is meant.
const SKIPPED: [&[u8]; 2] = [b".git", b"node_modules"];

/// Longest pattern, in bytes: as long as the longest path.
const MAX_BYTES: usize = 4096;
/// Opening braces. The compiler of patterns recurses for braces inside braces, and the stack is finite.
const MAX_BRACES: usize = 256;

/// A checked pattern.
pub(crate) struct Pattern {
    whole: GlobSet,
    /// What each of the leading names must match.
    leading: Vec<Segment>,
    /// Whether `leading` is the whole pattern, so that nothing deeper can match.
    bounded: bool,
}

enum Segment {
    Literal(Vec<u8>),
    Wild(GlobSet),
}

impl Pattern {
    pub(crate) fn parse(text: &str) -> Result<Self, ToolFailure> {
        if text.starts_with('/') {
            return Err(ToolFailure::GlobAbsolute);
        }
        if text.split(['/', '{', '}', ',']).any(|part| part == "..") {
            return Err(ToolFailure::GlobParent);
        }
        if text.len() > MAX_BYTES {
            return Err(invalid(format!("longer than {MAX_BYTES} bytes")));
        }
        if text.matches('{').count() > MAX_BRACES {
            return Err(invalid(format!("more than {MAX_BRACES} braces")));
        }
        let segments = split(text);
        let normal = segments.join("/");
        // A pattern for a directory ("src/") matches no file.
        let normal = if text.ends_with('/') { format!("{normal}/") } else { normal };
        let whole = compile(&normal).map_err(|error| invalid(error.to_string()))?;
        let leading: Vec<Segment> = segments.iter().map_while(|segment| Segment::parse(segment)).collect();
        Ok(Self { whole, bounded: leading.len() == segments.len(), leading })
    }

    /// Whether the path from the search root matches.
    pub(crate) fn matches(&self, relative: &[u8]) -> bool {
        self.whole.is_match(Path::new(OsStr::from_bytes(relative)))
    }

    /// The directory, from the search root, outside of which nothing can match.
    pub(crate) fn start(&self) -> Vec<u8> {
        let directories = if self.bounded { self.leading.len().saturating_sub(1) } else { self.leading.len() };
        let literal = self.leading[..directories].iter().map_while(|segment| match segment {
            Segment::Literal(name) => Some(name.as_slice()),
            Segment::Wild(_) => None,
        });
        literal.collect::<Vec<_>>().join(&b'/')
    }

    /// Whether something below the directory `relative`, `depth` names below the search root, can match.
    pub(crate) fn can_match_below(&self, relative: &[u8], depth: usize) -> bool {
        let name = relative.rsplit(|byte| *byte == b'/').next().unwrap_or(relative);
        let skipped = SKIPPED.contains(&name);
        match depth.checked_sub(1).and_then(|index| self.leading.get(index)) {
            Some(_) if self.bounded && depth >= self.leading.len() => false,
            Some(Segment::Literal(wanted)) => wanted == name,
            Some(Segment::Wild(set)) => !skipped && set.is_match(Path::new(OsStr::from_bytes(name))),
            None => !skipped && !self.bounded,
        }
    }
}

impl Segment {
    /// `None` when one name of the path is not decided by `text` alone.
    fn parse(text: &str) -> Option<Self> {
        if !text.contains(['*', '?', '[', ']', '{', '}', '\\']) {
            return Some(Self::Literal(text.as_bytes().to_vec()));
        }
        // "**" stands for any number of names, braces may hold slashes, a class or an escape may swallow one.
        if text.contains("**") || text.contains(['/', '[', '\\']) {
            return None;
        }
        compile(text).ok().map(Self::Wild)
    }
}

fn invalid(reason: String) -> ToolFailure {
    ToolFailure::GlobInvalid { reason }
}

/// Cuts at the slashes that are not inside braces; leaves out empty and `.` segments.
fn split(text: &str) -> Vec<&str> {
    let mut depth = 0_usize;
    let outer = |character: char| {
        match character {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        character == '/' && depth == 0
    };
    text.split(outer).filter(|segment| !matches!(*segment, "" | ".")).collect()
}

/// A set, because a set has fast ways for the usual patterns (`**/*.rs`, `**/Cargo.toml`) and a single glob has not.
fn compile(text: &str) -> Result<GlobSet, globset::Error> {
    let glob: Glob = GlobBuilder::new(text).literal_separator(true).empty_alternates(true).build()?;
    GlobSetBuilder::new().add(glob).build()
}

#[cfg(test)]
#[path = "pattern_tests.rs"]
mod tests;
