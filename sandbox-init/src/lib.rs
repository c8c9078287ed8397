//! The small static program inside sandbox-runner. Three roles, one image:
//!
//! - **launcher** (`launcher`): the only privileged process. Parses requests of a closed vocabulary, makes sandboxes.
//! - **process 1** (`init`): pid 1 of one sandbox. Holds pipes and deadlines, runs calls through its spawner.
//! - **tree worker** (`tree`): reads and writes trees that belong to a foreign id range.
//!
//! Single-threaded, no async runtime, no network. `unsafe` lives in [`sys`] only.
#![deny(unsafe_code)]

pub mod boot;
pub mod init;
pub mod launcher;
pub mod policy;
pub mod probe;
pub mod stage;
pub mod sys;
pub mod tool;
pub mod tree;
