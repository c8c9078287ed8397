//! The tree worker: reads and writes trees owned by a foreign id range.
//!
//! Started by the launcher's background process inside the range of one tree: own user, mount, network and pid namespaces,
//! resource limits, and a landlock ruleset with that tree alone. So the launcher never walks a tree, and a tree that was
//! built to confuse a walker can hurt only itself. Every step is relative to an open directory and follows no link.

mod remove;
mod worker;

pub use remove::{Tally, measure, remove_contents};
pub use worker::{remove_below, remove_owned};
