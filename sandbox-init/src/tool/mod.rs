//! The built-in file tools: `read`, `write`, `edit`, `glob`, `grep`.
//!
//! They run inside the sandbox, in a forked child that has already become the workload: its ids, its landlock domain,
//! its seccomp filter, its mounts. One child may run many of them, one after the other, so they keep nothing. So these modules decide nothing about privilege. What they add is the path policy of
//! the toolset (working directory plus the allowed roots), its limits and its literal texts, because the model has
//! learned those.
//!
//! Input is JSON chosen by a model and files chosen by the workload; both are hostile. A tool answers every input with a
//! result, never with a panic, never by waiting on a special file and never with more than its limits allow.

mod failure;
mod input;
mod intent;
mod path;

mod crawl;
mod edit;
mod glob;
mod grep;
mod pattern;
mod read;
mod replace;
mod write;

use std::{fs::File, path::PathBuf, sync::Arc, time::Duration};

use proto::init::v1::{ContentBlock, Media, ToolResult, content_block::Kind};

use crate::tool::{failure::ToolFailure, input::Input, path::Roots};

pub(crate) use intent::{Found, clear as clear_intent, read as read_intent, settle};

/// Where the tools may work, and how much.
#[derive(Clone, Debug)]
pub struct Context {
    /// Relative paths start here; everything below it may be read and written. Absolute.
    pub working_directory: PathBuf,
    /// Further directories that may be read and written, absolute. One that does not exist is skipped.
    pub allowed_roots: Vec<PathBuf>,
    /// Directories that may be read and never written, absolute; they may lie inside the others. When several roots
    /// contain a path, the innermost decides.
    pub read_only_roots: Vec<PathBuf>,
    /// Bounds of one call.
    pub limits: Limits,
    /// Where tools that replace a file write down what they are about to do; `None` where nobody would ask.
    pub intents: Option<Arc<File>>,
}

impl Context {
    /// A context with the default limits and nothing allowed besides the working directory.
    pub fn new(working_directory: impl Into<PathBuf>) -> Self {
        Self {
            working_directory: working_directory.into(),
            allowed_roots: Vec::new(),
            read_only_roots: Vec::new(),
            limits: Limits::default(),
            intents: None,
        }
    }
}

/// Bounds of one call. The defaults are those of the toolset where it has any.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest text that `read` returns, and largest file that `edit` loads.
    pub max_text_bytes: u64,
    /// Largest image that `read` returns, before base64.
    pub max_image_bytes: u64,
    /// Largest PDF document that `read` returns.
    pub max_document_bytes: u64,
    /// Largest file that `edit` produces: replacing every occurrence can multiply a file.
    pub max_edit_result_bytes: u64,
    /// Time after which `read` gives up looking for a line in a very large file.
    pub read_time: Duration,
    /// Paths that `glob` returns.
    pub max_glob_results: usize,
    /// Directory entries after which `glob` stops looking.
    pub max_glob_entries: u64,
    /// Time after which `glob` stops looking.
    pub glob_time: Duration,
    /// Bytes that `grep` returns.
    pub max_grep_output_bytes: usize,
    /// Time after which `grep` stops looking.
    pub grep_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_text_bytes: 262_144,
            max_image_bytes: 3_932_160,
            max_document_bytes: 20 * 1024 * 1024,
            max_edit_result_bytes: 64 * 1024 * 1024,
            read_time: Duration::from_secs(20),
            max_glob_results: 200,
            max_glob_entries: 1_000_000,
            glob_time: Duration::from_secs(60),
            max_grep_output_bytes: 102_400,
            grep_time: Duration::from_secs(60),
        }
    }
}

/// The tools that [`run`] knows.
pub const NAMES: [&str; 5] = ["read", "write", "edit", "glob", "grep"];

/// Runs the tool `name` on `input_json` and returns what the model gets to see.
///
/// Never fails otherwise: an unknown name, an input that is not JSON, a missing field and an error of the file system are
/// all results with `is_error` set. A search that reached its time limit leaves threads behind, so the caller ends its
/// process soon after.
pub fn run(name: &str, input_json: &[u8], context: &Context) -> ToolResult {
    match dispatch(name, input_json, context) {
        Ok(kind) => ToolResult { is_error: false, content: vec![ContentBlock { kind: Some(kind) }] },
        Err(failure) => {
            ToolResult { is_error: true, content: vec![ContentBlock { kind: Some(Kind::Text(failure.to_string())) }] }
        }
    }
}

fn dispatch(name: &str, input_json: &[u8], context: &Context) -> Result<Kind, ToolFailure> {
    let Some(tool) = NAMES.into_iter().find(|known| *known == name) else {
        return Err(ToolFailure::UnknownTool { name: name.to_owned() });
    };
    let mut input = Input::parse(tool, input_json)?;
    let roots = Roots::open(context).map_err(|source| ToolFailure::Path {
        tool,
        path: context.working_directory.to_string_lossy().into_owned(),
        source,
    })?;
    match tool {
        "read" => read::run(&read::Request::from_input(&mut input)?, &roots, &context.limits),
        "write" => write::run(&write::Request::from_input(&mut input)?, &roots, context).map(Kind::Text),
        "edit" => edit::run(&edit::Request::from_input(&mut input)?, &roots, context).map(Kind::Text),
        "glob" => glob::run(&glob::Request::from_input(&mut input)?, &roots, &context.limits).map(Kind::Text),
        _ => grep::run(&grep::Request::from_input(&mut input)?, &roots, &context.limits).map(Kind::Text),
    }
}

fn media(media_type: &str, data: Vec<u8>) -> Media {
    Media { media_type: media_type.to_owned(), data }
}

/// Threads of a search: one per processor, and two on a single one, so that one can wait for the disk.
fn search_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 12))
}

/// Says on a line of its own that a search did not see everything.
fn cut_short(text: &mut String, what: &str) {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&format!("[the search was cut short after {what}]"));
}

#[cfg(test)]
mod parity_tests;
#[cfg(test)]
mod testing;
