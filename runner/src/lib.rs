//! The runner: receives tool calls and runs them in isolated sandboxes of this host.
//!
//! ```text
//! connector --WorkItem--> session --ToolCall--> sandbox --control frame--> process 1 --> tool
//!     ^                      |                     ^                          |
//!     +------ToolOutput------+----- offsets into a spool file, explicit end --+
//! ```
#![forbid(unsafe_code)]

pub mod admin;
pub mod bench;
pub mod cli;
pub mod config;
pub mod connector;
mod crash_point;
pub mod daemon;
pub mod dev;
pub mod journal;
mod last_words;
pub mod pressure;
pub mod sandbox;
pub mod session;
pub mod shutdown;
#[cfg(test)]
mod simulation;
pub mod systemd;
pub mod telemetry;
pub mod work;
