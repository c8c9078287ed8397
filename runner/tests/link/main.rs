//! The link between runner and orchestrator, with sandboxes in memory: what is promised about calls must hold whatever
//! happens to the wire.
#![allow(missing_docs, unreachable_pub, reason = "tests")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::print_stdout,
    reason = "tests"
)]

mod basics;
mod certificates;
mod cuts;
mod drain;
mod enrollment;
mod fake;
mod gate;
mod greeting;
mod herd;
mod local;
mod mistakes;
mod process;
mod proxy;
mod raw;
mod refusals;
mod replicas;
mod rotation;
mod scripted;
mod slow;
mod suspend;
mod versions;
mod world;
