//! What the operator typed, and what it means.
//!
//! `file` is the text as it is written, `resolve` turns it into a checked configuration or a complete list of problems.
//! Nothing here opens a socket or changes the host.

pub mod file;
pub mod launcher_policy;
pub mod resolve;
pub mod units;
