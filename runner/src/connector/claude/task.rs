//! The loop of one environment: it feeds the machine and carries out what that decides. Nothing in it waits for the network:
//! each request is a task of its own, which reports back, and ends with its work item.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::Neighbours;
use super::answer::blocks;
use super::api::Api;
use super::board::Board;
use super::handover::Writer;
use super::http::Failure;
use super::machine::{Action, Event, Finish, Machine, Room};
use super::secret::Secret;
use super::stream::read_stream;
use super::wire::Delivery;
use crate::connector::Ports;
use crate::connector::orchestrator::Stop;
use crate::crash_point::{self, Point};
use crate::work::{OutputSource, Progress, WorkItem};

/// Reports of requests that wait for the loop. When it is full, streams are not read on.
const QUEUED_REPORTS: usize = 256;
/// Work that waits for the sessions. When there is so much, no more reports are taken.
const QUEUED_WORK: usize = 1024;
/// The clock of a lease goes on while the machine sleeps, and timers do not.
const SLEEP_CEILING: Duration = Duration::from_secs(1);
/// Whoever finds no place tries again within this time, in nanoseconds, and every loop looks once in [`SLEEP_CEILING`].
const ROOM_WISH: u64 = 3_000_000_000;
/// A machine that wants to be looked at again at once has nothing to say.
const SLEEP_FLOOR: Duration = Duration::from_millis(5);

/// What an environment's loop is made of.
pub(super) struct Task {
    pub(super) api: Arc<Api>,
    /// Where the key can be read again.
    pub(super) key_file: Option<PathBuf>,
    /// Where the leases are written down; `None`: nowhere.
    pub(super) handover: Option<PathBuf>,
    pub(super) board: Board,
    pub(super) machine: Machine,
    pub(super) ports: Ports,
    pub(super) neighbours: Neighbours,
    pub(super) stop: watch::Receiver<Stop>,
    pub(super) reload: Arc<Notify>,
    /// The process was told to end.
    pub(super) ending: Arc<Notify>,
    pub(super) clock: fn() -> u64,
}

/// What is under way for a work item.
struct Under {
    /// Its own; without one it is the environment's key.
    token: Option<Secret>,
    /// How far the sessions had come at the last heartbeat.
    progress: Option<u64>,
    requests: JoinSet<()>,
    stream: Option<tokio::task::AbortHandle>,
}

impl Under {
    fn new(token: Option<Secret>) -> Self {
        Self { token, progress: None, requests: JoinSet::new(), stream: None }
    }
}

struct Loop {
    api: Arc<Api>,
    board: Board,
    machine: Machine,
    outputs: Arc<dyn OutputSource>,
    progress: Progress,
    clock: fn() -> u64,
    items: HashMap<String, Under>,
    /// Work that waits for the sessions.
    pending: VecDeque<WorkItem>,
    reports: mpsc::Sender<Event>,
    polls: JoinSet<()>,
    handover: Writer,
    /// Changes that were handed to it.
    told: u64,
}

impl Task {
    pub(super) async fn run(self) {
        let Self { api, key_file, handover, board, machine, ports, neighbours, mut stop, reload, ending, clock } = self;
        let Neighbours { sessions: mut others, claims } = neighbours;
        let mut own = 0;
        let Ports { work, mut updates, outputs, progress, pressure, .. } = ports;
        let (reports, mut done) = mpsc::channel(QUEUED_REPORTS);
        let mut state = Loop {
            api,
            board,
            machine,
            outputs,
            progress,
            clock,
            items: HashMap::new(),
            pending: VecDeque::new(),
            reports,
            polls: JoinSet::new(),
            handover: Writer::start(handover),
            told: 0,
        };
        let mut updates_open = true;
        loop {
            let event = tokio::select! {
                update = updates.recv(), if updates_open => match update {
                    Some(update) => Event::Update(update),
                    None => {
                        updates_open = false;
                        Event::Tick
                    }
                },
                Some(report) = done.recv(), if state.pending.len() < QUEUED_WORK => report,
                permit = work.reserve(), if !state.pending.is_empty() => {
                    if let (Ok(permit), Some(item)) = (permit, state.pending.pop_front()) {
                        permit.send(item);
                    }
                    Event::Tick
                }
                () = tokio::time::sleep(state.sleep()) => Event::Tick,
                Ok(()) = stop.changed() => {
                    let now = *stop.borrow();
                    match now {
                        Stop::Run => Event::Tick,
                        // The next runner goes on: nothing is given back, and it takes the leases up.
                        Stop::Leave => return state.handover.end().await,
                        Stop::WhenDelivered => Event::Finish(Finish::Patient),
                        Stop::Now => Event::Finish(Finish::AtOnce),
                    }
                }
                () = reload.notified() => {
                    key_file.as_deref().map_or(Event::Tick, |key_file| state.read_key(key_file))
                }
                () = ending.notified() => Event::Ending,
                Ok(()) = others.changed() => Event::Tick,
            };
            let closed = pressure.borrow().session_refusal().is_some();
            {
                // Deciding and claiming are one step, so that two queues never ask for the one place that is left.
                let mut claims = claims.lock().unwrap_or_else(PoisonError::into_inner);
                let of_others = claims.items.saturating_sub(own);
                state.machine.set_room(Room { others: of_others + *others.borrow(), closed });
                let now = (state.clock)();
                if now < claims.room_wanted_until && state.machine.make_room() {
                    claims.room_wanted_until = 0;
                }
                state.take(event);
                if state.machine.wants_room() {
                    claims.room_wanted_until = now.saturating_add(ROOM_WISH);
                }
                own = state.machine.claims();
                claims.items = of_others + own;
            }
            let nobody_works = work.is_closed();
            if state.machine.is_done() && (state.pending.is_empty() || nobody_works) {
                return state.handover.end().await;
            }
        }
    }
}

impl Loop {
    fn sleep(&self) -> Duration {
        let now = (self.clock)();
        Duration::from_nanos(self.machine.wake().saturating_sub(now)).clamp(SLEEP_FLOOR, SLEEP_CEILING)
    }

    fn read_key(&self, key_file: &std::path::Path) -> Event {
        match Secret::read(key_file) {
            Ok(key) => {
                self.api.set_key(key);
                info!("the key of an environment was read again");
                Event::KeyReplaced
            }
            Err(error) => {
                warn!(error = &error as &dyn std::error::Error, "the key of an environment stays as it was");
                Event::Tick
            }
        }
    }

    fn take(&mut self, event: Event) {
        let actions = self.machine.handle((self.clock)(), event);
        for action in actions {
            self.carry_out(action);
        }
        if std::mem::replace(&mut self.told, self.machine.changes()) != self.told {
            self.handover.write(self.machine.handover());
        }
        self.board.show(self.machine.views(), self.machine.owed());
        // Requests that have reported are over.
        while self.polls.try_join_next().is_some() {}
        for under in self.items.values_mut() {
            while under.requests.try_join_next().is_some() {}
        }
    }

    fn carry_out(&mut self, action: Action) {
        let (api, reports) = (Arc::clone(&self.api), self.reports.clone());
        match action {
            Action::Work(item) => self.pending.push_back(item),
            Action::Count(happening) => self.board.count(happening),
            Action::Poll => {
                self.polls.spawn(async move {
                    let result = api.poll().await;
                    if let Ok(Some(delivery)) = &result {
                        crash_point::pass(Point::Delivered, &delivery.work_id);
                    }
                    report(&reports, Event::Polled(result)).await;
                });
            }
            Action::Ack(delivery) => {
                let work_id = self.hold(delivery);
                self.acknowledge(work_id);
            }
            Action::Take(delivery) => drop(self.hold(delivery)),
            // Its token was in the memory of the runner that had it, and nowhere else.
            Action::TakeUp { work_id } => drop(self.items.insert(work_id, Under::new(None))),
            Action::AckAgain { work_id } => self.acknowledge(work_id),
            Action::Beat { work_id, expected, within } => {
                let (sent, progress) = ((self.clock)(), self.progress.count());
                let before = self.items.get_mut(&work_id).and_then(|under| under.progress.replace(progress));
                if before == Some(progress) {
                    // Whoever wedges must lose the lease, not renew it.
                    let failure = Failure::Transport("the sessions of this runner stand still".to_owned());
                    let beaten = Event::Beaten { work_id: work_id.clone(), sent, result: Err(failure) };
                    return self.request(work_id, |_| std::future::ready(beaten));
                }
                self.request(work_id.clone(), |secret| async move {
                    let result = api.beat(&secret, &work_id, &expected, within).await;
                    crash_point::pass(Point::Leased, &work_id);
                    Event::Beaten { work_id, sent, result }
                });
            }
            Action::Fetch { work_id, session_id } => self.request(work_id.clone(), |secret| async move {
                let result = api.is_over(&secret, &session_id).await;
                Event::Fetched { work_id, result }
            }),
            Action::List { work_id, session_id, link, page } => self.request(work_id.clone(), |secret| async move {
                let result = api.list(&secret, &session_id, page.as_deref()).await;
                Event::Listed { work_id, link, result }
            }),
            Action::Post { work_id, session_id, tool_use_id, answer } => {
                let outputs = Arc::clone(&self.outputs);
                self.request(work_id.clone(), |secret| async move {
                    let blocks = blocks(answer, outputs.as_ref()).await;
                    crash_point::pass(Point::Post, &tool_use_id);
                    let result = api.answer(&secret, &session_id, &tool_use_id, blocks).await;
                    crash_point::pass(Point::Posted, &tool_use_id);
                    Event::Posted { work_id, tool_use_id, result }
                });
            }
            Action::Stop { work_id } => self.request(work_id.clone(), |secret| async move {
                crash_point::pass(Point::GiveBack, &work_id);
                let result = api.stop(&secret, &work_id).await;
                crash_point::pass(Point::GivenBack, &work_id);
                Event::Stopped { work_id, result }
            }),
            Action::Stream { work_id, session_id, link } => {
                let Some(under) = self.items.get_mut(&work_id) else { return };
                let secret = under.token.clone().unwrap_or_else(|| api.key());
                let reading = async move {
                    let failure = read_stream(&api, &secret, &work_id, &session_id, link, &reports).await.err();
                    report(&reports, Event::Disconnected { work_id, link, failure }).await;
                };
                under.stream = Some(under.requests.spawn(reading));
            }
            Action::Unstream { work_id } => {
                if let Some(stream) = self.items.get_mut(&work_id).and_then(|under| under.stream.take()) {
                    stream.abort();
                }
            }
            // Dropping what is under way ends it: of a lost lease nothing more is posted.
            Action::Forget { work_id } => drop(self.items.remove(&work_id)),
        }
    }

    /// Takes note of a delivery, and returns its id.
    fn hold(&mut self, delivery: Delivery) -> String {
        self.items.insert(delivery.work_id.clone(), Under::new(delivery.token));
        delivery.work_id
    }

    fn acknowledge(&mut self, work_id: String) {
        let api = Arc::clone(&self.api);
        self.request(work_id.clone(), |_| async move {
            let result = api.ack(&work_id).await;
            crash_point::pass(Point::Claimed, &work_id);
            Event::Acked { work_id, result }
        });
    }

    /// Has something asked for an item with its own credential.
    fn request<F>(&mut self, work_id: String, ask: impl FnOnce(Secret) -> F)
    where
        F: Future<Output = Event> + Send + 'static,
    {
        let Some(under) = self.items.get_mut(&work_id) else { return };
        let secret = under.token.clone().unwrap_or_else(|| self.api.key());
        let (asking, reports) = (ask(secret), self.reports.clone());
        under.requests.spawn(async move { report(&reports, asking.await).await });
    }
}

pub(super) async fn report(reports: &mpsc::Sender<Event>, event: Event) {
    // A closed channel means that the loop has ended, and with it everybody who cares.
    let _ = reports.send(event).await;
}
