//! What a runner that panics leaves for the next one, which cannot learn in any other way that it was not killed.
//!
//! A panic ends the process: with one of its tasks gone it would serve half of what it is trusted with, and the next
//! runner goes on with everything that is in the journal. The word is left before anything else, in a file without
//! content; whoever is killed, stopped or replaced leaves none.

use std::io;
use std::path::{Path, PathBuf};

use tracing::warn;

/// Name of the file, in a directory of the runner's own: that of the whole state may be the launcher's.
const FILE: &str = "panicked";

/// From here on a panic leaves word in `directory` and ends the process.
pub(crate) fn leave_in(directory: &Path) {
    let (path, before) = (path(directory), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |panic| {
        // Without it the next runner blames nobody.
        let _ = std::fs::write(&path, b"");
        before(panic);
        std::process::abort();
    }));
}

/// Whether the runner before this one panicked. Said once: the word is taken away.
pub(crate) fn hear_in(directory: &Path) -> bool {
    match std::fs::remove_file(path(directory)) {
        Ok(()) => {
            warn!("the last runner panicked; a call that it ran may be to blame");
            true
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            warn!(%error, "it cannot be seen whether the last runner panicked, so no call is blamed for it");
            false
        }
    }
}

fn path(directory: &Path) -> PathBuf {
    directory.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_of_a_panic_is_heard_once_and_its_absence_or_what_is_no_file_is_none() {
        let state = tempfile::tempdir().unwrap();
        assert!(!hear_in(state.path()));
        std::fs::write(path(state.path()), b"").unwrap();
        assert!(hear_in(state.path()));
        assert!(!hear_in(state.path()));
        std::fs::create_dir(path(state.path())).unwrap();
        assert!(!hear_in(state.path()));
    }
}
