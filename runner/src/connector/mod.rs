//! Connectors bring work from outside and deliver what comes of it. They dial out; nothing here listens.
//!
//! A connector knows the vocabulary in `work` and nothing of sessions or sandboxes. It is joined to them by `Ports`.

pub mod backoff;
pub mod claude;
pub mod dial;
pub mod enrollment;
pub mod expiry;
pub mod orchestrator;
pub mod resolve;
pub mod tls;
mod transport;

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::telemetry::Counters;
use crate::work::{Memory, OutputSource, Pressure, Progress, Update, WorkItem};

/// The joints between a connector and the rest of the runner.
pub struct Ports {
    /// Work goes in here.
    pub work: mpsc::Sender<WorkItem>,
    /// What came of it. Must be drained at all times.
    pub updates: mpsc::Receiver<Update>,
    /// Retained output.
    pub outputs: Arc<dyn OutputSource>,
    /// Ticks while sessions make progress; without it no lease is renewed.
    pub progress: Progress,
    /// What outlives the process.
    pub memory: Arc<dyn Memory>,
    /// How the host stands.
    pub pressure: watch::Receiver<Arc<Pressure>>,
    /// How often a bound was reached.
    pub counters: Counters,
}

impl std::fmt::Debug for Ports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ports").finish_non_exhaustive()
    }
}
