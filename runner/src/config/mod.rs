//! What the operator typed, and what it means.
//!
//! `file` is the text as it is written, read by `reader`; `resolve` turns it into a checked configuration (`resolved`) or a
//! complete list of problems (`problem`).
//! Nothing here opens a socket or changes the host.

pub mod file;
pub mod launcher_policy;
pub mod problem;
mod reader;
pub mod resolve;
pub mod resolved;
pub mod units;
