//! The worker of the official SDK serves the control plane of the tests as it serves the real one, and our daemon serves it in
//! the same way.
//!
//! The first is the proof that the control plane keeps the contract: whoever else works with it is measured by the same one.
//! What the official worker does although the documentation says otherwise is a test here too, so that a newer SDK shows it.
//! The second is `compare`: each scenario with either worker, everything that they change side by side, and every difference in
//! the table of `classes` with its reason.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]

mod classes;
mod compare;
mod gates;
mod leases;
mod serving;
mod transcript;
mod wire;
mod world;
