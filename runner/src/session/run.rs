//! The loop that feeds the core and carries out what it decides.
//!
//! One task, one closed set of events. Nothing in it waits for a sandbox, a disk or a network: whatever takes time runs
//! beside it and reports back. Events of calls arrive through a board with one line per call, so a flood of output
//! reports costs nothing and a sandbox is never held up by this loop.

mod act;
mod board;
mod result;
mod view;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Outputs;
use super::core::{Config, Core, Input};
use super::present;
use super::registry::Registry;
use crate::crash_point::{self, Point};
use crate::journal::{Journal, Recovered};
use crate::telemetry::Counters;
use crate::work::{
    Attached, BoxFuture, CallEnd, CallId, CallResult, Outcome, Progress, Sandbox, SandboxId, Sandboxes, SessionId,
    ToolFailure, Update, WorkItem,
};
use board::{Board, Line};
use result::presented;
pub use view::{View, ViewCall, ViewSession};

/// What connectors have put in and the loop has not taken.
const QUEUED_WORK: usize = 256;
/// What the loop has said and connectors have not taken.
const QUEUED_UPDATES: usize = 1024;
/// Questions of people about what is open.
const QUEUED_VIEWS: usize = 16;
/// Answers of journal and sandboxes that the loop has not taken.
const QUEUED_DONE: usize = 1024;
/// Sandboxes that are made at the same time.
const PARALLEL_CREATES: usize = 4;
/// A call that runs from one of these moments to the next is none that runners die of.
const MINUTE: Duration = Duration::from_secs(60);

/// What the session loop is made of.
pub struct Sessions {
    /// Bounds and habits of the core. `gated` is set from the journal.
    pub config: Config,
    /// Admission.
    pub registry: Registry,
    /// Where sandboxes come from.
    pub sandboxes: Arc<dyn Sandboxes>,
    /// Where calls are written down.
    pub journal: Arc<dyn Journal>,
    /// What an earlier runner left there.
    pub recovered: Recovered,
    /// The clock of the lease: nanoseconds, counted while the machine sleeps as well.
    pub clock: fn() -> u64,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The ends of the channels that lead to the session loop.
#[derive(Debug, Clone)]
pub struct SessionHandle {
    /// For connectors and the administration socket.
    pub work: mpsc::Sender<WorkItem>,
    /// Retained output.
    pub outputs: Outputs,
    /// Ticks while the loop goes round.
    pub progress: Progress,
    /// What has happened how often.
    pub counters: Counters,
    views: mpsc::Sender<oneshot::Sender<View>>,
}

impl SessionHandle {
    /// What is open at this moment; `None` when the loop has ended.
    pub async fn view(&self) -> Option<View> {
        let (reply, answer) = oneshot::channel();
        self.views.send(reply).await.ok()?;
        answer.await.ok()
    }
}

impl Sessions {
    /// Starts the loop. It ends when every sender of work is gone and no session is left.
    ///
    /// The receiver must be drained without waiting for anything that waits for this loop.
    #[must_use]
    pub fn start(self) -> (SessionHandle, mpsc::Receiver<Update>) {
        let (work_sender, work) = mpsc::channel(QUEUED_WORK);
        let (update_sender, updates) = mpsc::channel(QUEUED_UPDATES);
        let (view_sender, views) = mpsc::channel(QUEUED_VIEWS);
        let (done_sender, done) = mpsc::channel(QUEUED_DONE);
        let config = Config { gated: self.journal.is_durable(), ..self.config };
        let state = Loop {
            core: Core::new(config, self.registry),
            sandboxes: self.sandboxes,
            journal: self.journal,
            clock: self.clock,
            outputs: Outputs::default(),
            board: Arc::new(Board::default()),
            updates: update_sender,
            done: done_sender,
            creates: Arc::new(Semaphore::new(PARALLEL_CREATES)),
            inputs: VecDeque::from([Input::Recovered(Box::new(self.recovered))]),
            deadlines: HashMap::new(),
            idle: HashMap::new(),
            attaching: HashSet::new(),
            watches: HashMap::new(),
            presenting: HashMap::new(),
            held_back: HashMap::new(),
            progress: Progress::default(),
            counters: Counters::default(),
        };
        let handle = SessionHandle {
            work: work_sender,
            outputs: state.outputs.clone(),
            progress: state.progress.clone(),
            counters: state.counters.clone(),
            views: view_sender,
        };
        tokio::spawn(state.run(work, views, done));
        (handle, updates)
    }
}

/// What runs beside the loop reports one of these.
enum Done {
    Input(Input),
    /// A sandbox has ended: by itself with a reason, or because it was closed.
    Gone(SessionId, SandboxId, Option<String>),
    Created(SessionId, Result<Arc<dyn Sandbox>, ToolFailure>),
    Attached(SessionId, Result<Attached, ToolFailure>),
    Presented(SessionId, Input),
    Update(Update),
    Nothing,
}

/// Everything that can wake the loop.
enum Event {
    Work(Option<WorkItem>),
    View(oneshot::Sender<View>),
    Done(Done),
    Board,
    Tick,
    Minute,
}

struct Loop {
    core: Core,
    sandboxes: Arc<dyn Sandboxes>,
    journal: Arc<dyn Journal>,
    clock: fn() -> u64,
    outputs: Outputs,
    board: Arc<Board>,
    updates: mpsc::Sender<Update>,
    done: mpsc::Sender<Done>,
    creates: Arc<Semaphore>,
    inputs: VecDeque<Input>,
    /// Start deadlines of waiting calls.
    deadlines: HashMap<CallId, Instant>,
    /// When sessions will have had nothing to do for long enough.
    idle: HashMap<SessionId, Instant>,
    /// Sessions whose sandbox is being taken over: what it reports meanwhile waits on the board.
    attaching: HashSet<SessionId>,
    /// Tasks that wait for a sandbox to end by itself.
    watches: HashMap<SessionId, AbortHandle>,
    /// Ends whose text is being read, per session; the end of the sandbox waits for them.
    presenting: HashMap<SessionId, usize>,
    held_back: HashMap<SessionId, Input>,
    progress: Progress,
    counters: Counters,
}

impl Loop {
    async fn run(
        mut self,
        mut work: mpsc::Receiver<WorkItem>,
        mut views: mpsc::Receiver<oneshot::Sender<View>>,
        mut done: mpsc::Receiver<Done>,
    ) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut minute = tokio::time::interval_at(Instant::now() + MINUTE, MINUTE);
        minute.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut work_open = true;
        let board = Arc::clone(&self.board);
        self.settle().await;
        crash_point::pass(Point::Restored, "");
        loop {
            let deadline = self.deadlines.values().chain(self.idle.values()).min().copied();
            let event = tokio::select! {
                item = work.recv(), if work_open => Event::Work(item),
                Some(result) = done.recv() => Event::Done(result),
                () = board.changed() => Event::Board,
                Some(reply) = views.recv() => Event::View(reply),
                _ = tick.tick() => Event::Tick,
                _ = minute.tick() => Event::Minute,
                () = sleep_until(deadline), if deadline.is_some() => Event::Tick,
            };
            self.progress.tick();
            match event {
                Event::Work(Some(item)) => self.inputs.push_back(Input::Work(item)),
                Event::Work(None) => work_open = false,
                Event::View(reply) => {
                    // Whoever asked may have gone; then nobody misses the answer.
                    let _ = reply.send(View::of(&self.core));
                }
                Event::Done(result) => self.done(result).await,
                Event::Board => self.take_board().await,
                Event::Tick => self.pass_deadlines(),
                Event::Minute => self.inputs.push_back(Input::MinutePassed),
            }
            self.settle().await;
            if !work_open && self.core.sessions().next().is_none() {
                return;
            }
        }
    }

    async fn settle(&mut self) {
        while let Some(input) = self.inputs.pop_front() {
            for action in self.core.handle(input) {
                self.execute(action).await;
            }
        }
    }

    async fn done(&mut self, result: Done) {
        match result {
            Done::Input(input) => self.inputs.push_back(input),
            Done::Gone(session_id, sandbox_id, lost) => self.sandbox_gone(session_id, &sandbox_id, lost).await,
            Done::Created(session_id, Ok(sandbox)) => {
                let (sandbox_id, receipt) = (sandbox.sandbox_id(), sandbox.receipt());
                info!(%session_id, %sandbox_id, "sandbox created");
                self.keep(session_id.clone(), sandbox);
                self.inputs.push_back(Input::SandboxReady { session_id, sandbox_id, receipt });
            }
            Done::Created(session_id, Err(failure)) => {
                warn!(%session_id, error = %failure, "sandbox could not be created");
                self.inputs.push_back(Input::SandboxFailed { session_id, failure });
            }
            Done::Attached(session_id, Ok(Attached { sandbox, found, processes })) => {
                let (sandbox_id, calls) = (sandbox.sandbox_id(), found.len());
                info!(%session_id, %sandbox_id, calls, ?processes, "sandbox taken over");
                crash_point::pass(Point::Attached, session_id.as_str());
                for call_id in found.keys() {
                    self.outputs.insert_call(call_id.clone(), Arc::clone(&sandbox));
                }
                self.keep(session_id.clone(), sandbox);
                self.attaching.remove(&session_id);
                self.inputs.push_back(Input::SandboxAttached { session_id, found, processes });
                self.settle().await;
                self.take_board().await;
            }
            Done::Attached(session_id, Err(failure)) => {
                warn!(%session_id, error = %failure, "sandbox of an earlier runner could not be taken over");
                self.attaching.remove(&session_id);
                self.take_board().await;
                self.settle().await;
                self.inputs.push_back(Input::SandboxLost { session_id, reason: failure.message });
            }
            Done::Presented(session_id, input) => {
                self.inputs.push_back(input);
                if let Some(count) = self.presenting.get_mut(&session_id) {
                    *count -= 1;
                    if *count == 0 {
                        self.presenting.remove(&session_id);
                        self.inputs.extend(self.held_back.remove(&session_id));
                    }
                }
            }
            Done::Update(update) => self.tell(update).await,
            Done::Nothing => {}
        }
    }

    /// From here the sandbox serves its session, and its end is noticed.
    fn keep(&mut self, session_id: SessionId, sandbox: Arc<dyn Sandbox>) {
        let (done, lost, watched) = (self.done.clone(), sandbox.lost(), session_id.clone());
        let sandbox_id = sandbox.sandbox_id();
        let watch = tokio::spawn(async move {
            let reason = lost.await;
            // A closed channel means that the loop has ended, and with it everybody who cares.
            let _ = done.send(Done::Gone(watched, sandbox_id, Some(reason))).await;
        });
        self.watches.insert(session_id.clone(), watch.abort_handle());
        self.outputs.insert_session(session_id, sandbox);
    }

    /// A sandbox may be reported as lost and as closed, and by then its session may have another one.
    async fn sandbox_gone(&mut self, session_id: SessionId, sandbox_id: &SandboxId, lost: Option<String>) {
        if self.outputs.sandbox_id(&session_id).as_ref() != Some(sandbox_id) {
            return;
        }
        // Ends that were reported before the sandbox went must be heard before.
        self.take_board().await;
        self.settle().await;
        if let Some(watch) = self.watches.remove(&session_id) {
            watch.abort();
        }
        let input = match lost {
            Some(reason) => Input::SandboxLost { session_id: session_id.clone(), reason },
            None => Input::SandboxClosed { session_id: session_id.clone() },
        };
        if self.presenting.contains_key(&session_id) {
            self.held_back.insert(session_id, input);
        } else {
            self.inputs.push_back(input);
        }
    }

    async fn tell(&mut self, update: Update) {
        if let Update::Refused { request, failure, .. } = &update {
            let labels = [("request", request.as_str()), ("code", failure.code.as_str())];
            self.counters.add("refused_total", &labels);
        }
        if self.updates.send(update).await.is_err() {
            // Without a connector results are kept until somebody asks again; that is what the journal is for.
            tracing::debug!("no connector takes updates");
        }
    }

    async fn take_board(&mut self) {
        for (call_id, line) in self.board.take(&self.attaching) {
            let Line { session_id, started, lengths, finished } = line;
            if let Some((boottime_ns, shell_generation)) = started {
                self.inputs.push_back(Input::Started { call_id: call_id.clone(), boottime_ns, shell_generation });
            }
            if let Some(lengths) = lengths {
                self.outputs.advanced(&call_id, &lengths);
                self.settle().await;
                let (call_id, session_id) = (call_id.clone(), session_id.clone());
                self.tell(Update::OutputAdvanced { call_id, session_id, lengths }).await;
            }
            if let Some(end) = finished {
                self.present(session_id, call_id, *end);
            }
        }
    }

    /// Adds the text a model reads; where output is long, its tail is read beside the loop.
    fn present(&mut self, session_id: SessionId, call_id: CallId, end: CallEnd) {
        let Some(input) = self.core.request(&call_id).map(|request| request.input.clone()) else { return };
        let Some(sandbox) = self.outputs.call(&call_id) else {
            // Of a sandbox that was not taken over; all that it has said of the call is that it cannot be known.
            if matches!(end.outcome, Outcome::Indeterminate { .. }) {
                let presented = present::failure_text(&end.outcome);
                let result = Arc::new(CallResult { end, presented, recovered: true });
                self.inputs.push_back(Input::Ended { call_id, result });
            }
            return;
        };
        let (owner, recovered) = (session_id.clone(), self.core.is_restored(&call_id));
        let mut future: BoxFuture<'static, Done> = Box::pin(async move {
            let end = sandbox.explain(end).await;
            let presented = presented(&input, &end, &call_id, sandbox.as_ref()).await;
            let result = Arc::new(CallResult { end, presented, recovered });
            Done::Presented(session_id, Input::Ended { call_id, result })
        });
        match (&mut future).now_or_never() {
            Some(Done::Presented(_, input)) => self.inputs.push_back(input),
            Some(_) => {}
            None => {
                *self.presenting.entry(owner).or_default() += 1;
                let done = self.done.clone();
                tokio::spawn(async move {
                    // A closed channel means that the loop has ended, and with it everybody who cares.
                    let _ = done.send(future.await).await;
                });
            }
        }
    }

    fn pass_deadlines(&mut self) {
        let now = Instant::now();
        let passed: Vec<_> = self.deadlines.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()).collect();
        for call_id in passed {
            self.deadlines.remove(&call_id);
            self.inputs.push_back(Input::StartDeadline { call_id });
        }
        let idle: Vec<_> = self.idle.extract_if(|_, at| *at <= now).collect();
        self.inputs.extend(idle.into_iter().map(|(session_id, _)| Input::IdlePassed { session_id }));
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
