//! Sessions: which calls run, in which order, and what is known about each of them until its result is stored elsewhere.
//!
//! `core` decides and is a pure state machine; `registry` decides what is admitted; `present` turns an end into the text
//! a model reads; `run` is the one loop that feeds the core and carries out what it decides. Nothing here knows a wire
//! format, and nothing here knows how a sandbox is made.

pub mod core;
pub mod present;
pub mod registry;
pub mod run;

mod outputs;

#[cfg(test)]
mod core_crash_tests;
#[cfg(test)]
mod core_idle_tests;
#[cfg(test)]
mod core_machine_tests;
#[cfg(test)]
mod core_model_tests;
#[cfg(test)]
mod core_placement_tests;
#[cfg(test)]
mod core_queue_tests;
#[cfg(test)]
mod core_restore_tests;
#[cfg(test)]
mod core_settle_tests;
#[cfg(test)]
mod core_tests;

pub use outputs::Outputs;
pub use run::{SessionHandle, Sessions, View, ViewCall, ViewSession};
