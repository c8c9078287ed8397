//! The floor of everything that is durable: one small write made so.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use crate::bench::subject::milliseconds;

/// What a sync costs where the journal is: a record's worth of bytes written over, and made durable.
pub(super) struct Sync(File);

impl Sync {
    pub(super) const BYTES: usize = 256;

    pub(super) fn beside(directory: &Path) -> std::io::Result<Self> {
        let path = directory.join("sync");
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
        file.write_all_at(&[0; 1 << 16], 0)?;
        file.sync_all()?;
        Ok(Self(file))
    }

    /// Milliseconds.
    pub(super) fn once(&self) -> std::io::Result<f64> {
        let start = Instant::now();
        self.0.write_all_at(&[1; Self::BYTES], 0)?;
        self.0.sync_data()?;
        Ok(milliseconds(start))
    }
}
