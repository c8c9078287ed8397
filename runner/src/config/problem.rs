//! What is wrong with a configuration, said so that its operator can put it right.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// One thing that is wrong, and how to put it right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// The key, with its section; empty when the file as a whole is meant.
    pub key: String,
    /// What is wrong.
    pub what: String,
    /// What to write.
    pub fix: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, key, what, fix } = self;
        if key.is_empty() {
            write!(formatter, "{}: {what}; {fix}", file.display())
        } else {
            write!(formatter, "{}: {key}: {what}; {fix}", file.display())
        }
    }
}
