//! The two systemd units as an operator installs them: what a restart, a crash, a reload and a stop of either leaves behind,
//! and what is not tried again.
//!
//! Every test is ignored: it needs a machine that may be spoiled, with systemd as process 1, both units installed and nobody
//! else using them. `tests/guest/suite` has one, and runs these one after the other.
#![forbid(unsafe_code)]

mod daemon;
mod installed;
mod launcher;
mod refusals;
