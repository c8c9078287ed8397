//! Work queues of Claude Managed Agents: environments whose tools run on the customer's machines.
//!
//! One task for each environment. It asks the queue for work while there is room for it, keeps the lease of every work item,
//! reads the events of its session, and hands tool uses on as calls; results go back as events. It is to the sessions of this
//! runner what an orchestrator is, so what holds for calls holds here: each begins once or never, over any number of runners,
//! and its result is posted until the server has it. `machine` decides all of it and is pure; `task` carries it out. Credentials
//! stay in this process.

mod answer;
mod api;
mod board;
mod check;
mod claim;
mod content;
mod conversation;
mod handover;
mod history;
mod http;
mod input;
mod lease;
mod machine;
mod remedy;
mod secret;
mod sse;
mod stream;
mod task;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod transport_tests;
mod wire;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

pub use board::{Board, ItemView, Reason};
pub use check::{Checked, Question, check};
pub use claim::{Claim, ClaimError, Handed};
pub use http::Base;
pub use secret::SecretError;

use super::Ports;
use super::backoff::draw;
use super::orchestrator::Stop;
use handover::Handover;
use machine::{Machine, Rules};

/// What one environment needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the server is.
    pub base: Base,
    /// The environment whose queue is served.
    pub environment_id: String,
    /// File with the leases that the next runner takes up; `None`: they run out.
    pub handover: Option<PathBuf>,
    /// Where work items come from.
    pub source: Source,
    /// Who is told how the queue stands.
    pub board: Board,
    /// Value of the header `anthropic-version`.
    pub api_version: String,
    /// Value of the header `anthropic-workspace-id`; `None`: not sent.
    pub workspace_id: Option<String>,
    /// Name of the header that says who asks for work.
    pub worker_id_header: String,
    /// Who asks for work; unique among all workers of the environment.
    pub worker_id: String,
    /// Work items at once.
    pub max_items: usize,
    /// Sessions at once in this runner, whoever has placed them.
    pub max_sessions: usize,
    /// From the end of a turn until a work item is given back; `None`: never.
    pub max_idle: Option<Duration>,
    /// How long a work item is held whose session waits for somebody else; `None`: for ever.
    pub max_wait: Option<Duration>,
    /// Whether tool uses of different threads of a session run beside each other.
    pub parallel_threads: bool,
    /// How long the sandbox of a session is kept after its work item.
    pub keep: Duration,
    /// Longest time that a command may ask for.
    pub longest_command: Duration,
    /// A clock that counts while the machine sleeps, in nanoseconds.
    pub clock: fn() -> u64,
}

/// Where work items come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// From the queue of the environment.
    Queue {
        /// File with the key of the environment.
        key_file: PathBuf,
    },
    /// One was claimed by somebody else; the connector ends with it.
    Claim(Claim),
}

/// Why a queue cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The key.
    #[error(transparent)]
    Key(#[from] SecretError),
    /// A text that has no place in a header.
    #[error(
        "claude.api_version, claude.workspace_id, claude.worker_id_header or the id of this runner cannot stand in a header"
    )]
    Header,
}

/// A running connector.
#[derive(Debug)]
pub struct Handle {
    /// Read the key again.
    pub reload: Arc<Notify>,
    /// The process was told to end: nothing new is taken, and what runs may go on for a little.
    pub ending: Arc<Notify>,
    /// Told when the one item that was to be served is over.
    pub over: Option<Arc<Notify>>,
    /// How the queue stands.
    pub board: Board,
    /// Ends after a stop.
    pub task: JoinHandle<()>,
}

/// What begins the ids of all sessions and calls of an environment in this runner.
#[must_use]
pub fn scope(environment_id: &str) -> String {
    machine::scope(environment_id)
}

/// Whom a queue shares the runner with.
#[derive(Debug, Clone)]
pub struct Neighbours {
    /// Sessions of the orchestrator.
    pub sessions: watch::Receiver<usize>,
    /// What all queues claim together.
    pub claims: Arc<Mutex<Claims>>,
}

/// What queues claim of the places for sessions.
#[derive(Debug, Default)]
pub struct Claims {
    /// Work items of all queues together, and one for each that is being asked for.
    items: usize,
    /// Until then a queue has a session for which there is no place: whoever keeps one that nobody wants now ends it. A queue says so
    /// each time that it finds none, so the wish does not outlive the need for more than some seconds.
    room_wanted_until: u64,
}

/// Reads the key and begins to ask for work.
///
/// # Errors
/// `QueueError`; then nothing was started.
pub fn start(
    settings: Settings,
    ports: Ports,
    neighbours: Neighbours,
    stop: watch::Receiver<Stop>,
) -> Result<Handle, QueueError> {
    let is_single = matches!(settings.source, Source::Claim(_));
    let (key, key_file, claimed) = match settings.source {
        Source::Queue { key_file } => (secret::Secret::read(&key_file)?, Some(key_file), None),
        Source::Claim(claim) => (claim.key, None, Some(claim.delivery)),
    };
    let client = http::Client::new(settings.base);
    let environment_id = settings.environment_id;
    let presented = api::Presented {
        version: &settings.api_version,
        workspace_id: settings.workspace_id.as_deref(),
        worker_id_header: &settings.worker_id_header,
        worker_id: &settings.worker_id,
    };
    let api = api::Api::new(client, environment_id.clone(), key, presented);
    let api = Arc::new(api.ok_or(QueueError::Header)?);
    let rules = Rules {
        environment_id,
        // Whoever serves one item asks for no other.
        max_items: if is_single { 0 } else { settings.max_items },
        max_sessions: settings.max_sessions,
        max_idle: settings.max_idle,
        max_wait: settings.max_wait,
        parallel_threads: settings.parallel_threads,
        keep: settings.keep,
        longest_command: settings.longest_command,
    };
    let (reload, ending) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let left = settings.handover.as_deref().map(Handover::read).unwrap_or_default();
    let mut machine = Machine::new(rules, draw, left);
    if let Some(delivery) = claimed {
        machine.serve_only(delivery);
    }
    let task = task::Task {
        api,
        key_file,
        handover: settings.handover,
        board: settings.board.clone(),
        machine,
        ports,
        neighbours,
        stop,
        reload: Arc::clone(&reload),
        ending: Arc::clone(&ending),
        clock: settings.clock,
    };
    let over = is_single.then(Arc::<Notify>::default);
    let told = over.clone();
    let task = tokio::spawn(async move {
        task.run().await;
        if let Some(over) = told {
            over.notify_one();
        }
    });
    Ok(Handle { reload, ending, over, board: settings.board, task })
}
