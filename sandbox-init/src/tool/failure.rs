//! Everything a file tool can say when it refuses, in one table.
//!
//! The texts are an interface: the model has learned them, and they are the same as those of the toolset wherever it has
//! a text for the case. Paths appear as the model wrote them.

use nix::errno::Errno;

use crate::tool::path::PathError;

/// Why a tool gave no result. The display form is the text of the result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ToolFailure {
    #[error("unknown tool '{name}'")]
    UnknownTool { name: String },
    #[error("{tool}: input is not valid JSON: {source}")]
    NotJson { tool: &'static str, source: serde_json::Error },
    #[error("{tool}: input must be a JSON object")]
    NotAnObject { tool: &'static str },
    #[error("{tool}: {field} is required")]
    Required { tool: &'static str, field: &'static str },
    #[error("{tool}: {field} must be {expected}")]
    WrongType { tool: &'static str, field: &'static str, expected: &'static str },
    #[error("{tool}: {field} must not contain a NUL character")]
    Nul { tool: &'static str, field: &'static str },

    #[error("{}", path_text(tool, path, source))]
    Path { tool: &'static str, path: String, source: PathError },
    #[error("{tool}: {path} is inside read-only directory {root}")]
    ReadOnly { tool: &'static str, path: String, root: String },

    #[error(
        "read: {path} is {size} bytes, exceeds {limit}-byte limit. Use the view_range parameter to read specific line \
         ranges, e.g. view_range: [1, 500]."
    )]
    ReadTooLarge { path: String, size: u64, limit: u64 },
    #[error(
        "read: view_range [{start}, {end}] of {path} exceeds {limit}-byte limit. Narrow the view_range to read a smaller \
         portion."
    )]
    RangeTooLarge { path: String, start: i64, end: i64, limit: u64 },
    #[error(
        "read: line {line} of {path} alone exceeds {limit}-byte limit. The read tool cannot return part of a line, so \
         view_range cannot narrow this further."
    )]
    LineTooLarge { path: String, line: i64, limit: u64 },
    #[error("read: gave up looking for line {line} of {path} after {milliseconds} ms")]
    ReadTimedOut { path: String, line: i64, milliseconds: u128 },
    #[error("read: view_range must be [start_line, end_line]")]
    RangeShape,
    #[error("read: view_range start_line must not be negative, lines are counted from 1")]
    RangeStart,
    #[error("read: view_range is not supported for image/PDF files")]
    RangeOnMedia,
    #[error("read: {path} is {size} bytes, exceeds {limit}-byte limit for image/PDF files.")]
    MediaTooLarge { path: String, size: u64, limit: u64 },
    #[error("read: {path}: not {expected}, although its name ends in .{extension}")]
    NotMedia { path: String, expected: &'static str, extension: String },
    #[error("read: {path}: not valid UTF-8 text (binary files are only supported for image/PDF extensions)")]
    ReadNotText { path: String },

    #[error("edit: old_string not found in {path}")]
    NotFound { path: String },
    #[error("edit: old_string appears {count} times in {path} (must be unique)")]
    NotUnique { path: String, count: usize },
    #[error(
        "edit: {path} is {size} bytes, exceeds {limit}-byte limit. The edit tool loads the whole file and cannot modify a \
         file this large."
    )]
    EditTooLarge { path: String, size: u64, limit: u64 },
    #[error("edit: {path} would become {size} bytes, exceeds {limit}-byte limit for the result of an edit")]
    EditResultTooLarge { path: String, size: u64, limit: u64 },
    #[error("edit: {path}: not valid UTF-8 text (cannot edit binary files)")]
    EditNotText { path: String },
    #[error("edit: {path}: the file was changed by something else during the edit, nothing was written; read it again")]
    EditConflict { path: String },

    #[error("glob: absolute pattern not permitted; pass a relative pattern (and optionally path)")]
    GlobAbsolute,
    #[error("glob: '..' is not permitted in the pattern")]
    GlobParent,
    #[error("glob: invalid pattern: {reason}")]
    GlobInvalid { reason: String },

    #[error("grep: invalid regex: {reason}")]
    GrepInvalid { reason: String },
}

fn path_text(tool: &str, path: &str, source: &PathError) -> String {
    match source {
        PathError::Outside { other_roots: false } => {
            format!("{tool}: path '{path}' is outside the session's working directory")
        }
        PathError::Outside { other_roots: true } => {
            format!(
                "{tool}: path '{path}' is outside the session's working directory and its other permitted directories"
            )
        }
        PathError::TooManyLinks => format!("{tool}: path '{path}': too many levels of symbolic links"),
        PathError::NotRegular => format!("{tool}: {path}: not a regular file"),
        PathError::System(errno) => format!("{tool}: {path}: {}", reason(*errno)),
    }
}

/// The toolset's words for an error of the file system.
pub(crate) fn reason(errno: Errno) -> String {
    match errno {
        Errno::ENOENT => "no such file or directory".to_owned(),
        Errno::ENOTDIR => "not a directory".to_owned(),
        Errno::EISDIR => "is a directory".to_owned(),
        Errno::EACCES | Errno::EPERM => "permission denied".to_owned(),
        Errno::EEXIST => "file already exists".to_owned(),
        Errno::ELOOP => "too many levels of symbolic links".to_owned(),
        Errno::EIO | Errno::UnknownErrno => "i/o error".to_owned(),
        other => other.desc().to_lowercase(),
    }
}
