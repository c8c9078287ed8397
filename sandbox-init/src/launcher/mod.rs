//! Privileged: the only process of sandbox-runner that holds host capabilities.
//!
//! The launcher parses requests of a closed vocabulary (`launch/v1`), makes sandboxes and fences them. It never parses a
//! byte that came from a network, from inside a sandbox only the names of processes that the kernel's log quotes
//! ([`kernel_log`]), and it never opens a path that its policy file does not root.
//!
//! Two processes: the request loop ([`serve`]), which never blocks, and a background process ([`background`]), which makes
//! blanks and removes what ended sandboxes held.

pub mod background;
pub mod cgroup;
pub mod create;
pub mod files;
pub mod forecast;
pub mod host;
pub mod ids;
pub mod kernel_log;
mod listen;
pub mod nested;
mod own_mounts;
pub mod policy_file;
pub mod replace;
mod report;
pub mod rootfs;
pub mod serve;
pub mod shape;
pub mod spawn;
pub mod start;
pub mod state;
pub mod validate;

/// One line for the operator, on standard error: the service manager's journal, or the runner's own.
fn log(message: &str) {
    use std::io::Write;
    // There is nobody left to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "sandbox-init: {message}");
}
