//! The reference orchestrator: loopback, throw-away certificates, everything in memory.
//!
//! It serves `demo`, the tests, and anybody who writes an orchestrator and wants to see the protocol obeyed: it checks
//! what a runner sends (numbers without gaps, output without undeclared holes, one end per call, hashes) and keeps a
//! list of what it found wrong. It is not meant to place work for anybody.

mod enrollment;
mod greeting;
mod intake;
mod loss;
mod orchestrator;
pub mod pki;
mod revocation;
mod server;
mod session;
#[cfg(test)]
pub(crate) mod simulated;
mod state;
mod transcript;

pub use enrollment::{Altered, Enrollment};
pub use loss::Backup;
pub use orchestrator::{DevError, Link, LinkSettings, Orchestrator};
pub use revocation::Denied;
pub use server::{Connection, accept_one, listen};
pub use session::{CallOutcome, Session};
pub use transcript::{Finished, StreamText};
