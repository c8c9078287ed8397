//! A work item from its delivery to its end, without time, network and sandboxes.

mod calls;
mod claimed;
mod events;
mod leases;
mod order;
mod queue;
mod sessions;
mod threads;

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::*;
use crate::connector::claude::wire::{self, Order};
use crate::work::{
    CallEnd, CallPhase, CancelMode, Code, Outcome, Receipt, Replay, RequestKind, SessionEnd, ToolFailure, ToolResult,
};

const WORK: &str = "work_1";
const SESSION: &str = "sesn_1";
const CORE: &str = "claude:env_1:sesn_1";

fn half() -> f64 {
    0.5
}

fn rules() -> Rules {
    Rules {
        environment_id: "env_1".into(),
        max_items: 2,
        max_sessions: 8,
        max_idle: Some(Duration::from_secs(60)),
        max_wait: None,
        parallel_threads: false,
        keep: Duration::from_secs(600),
        longest_command: Duration::from_secs(600),
    }
}

/// The machine with a clock that a test sets, and all that it has asked for.
struct World {
    machine: Machine,
    now: u64,
    asked: VecDeque<Action>,
}

impl World {
    fn new() -> Self {
        Self::after(Handover::default())
    }

    /// After a runner that has left this.
    fn after(handover: Handover) -> Self {
        Self::with(rules(), handover)
    }

    /// Threads run beside each other.
    fn parallel(history: Vec<Value>) -> Self {
        let mut world = Self::with(Rules { parallel_threads: true, ..rules() }, Handover::default());
        world.serve(history);
        world
    }

    fn with(rules: Rules, handover: Handover) -> Self {
        let machine = Machine::new(rules, half, handover);
        let mut world = Self { machine, now: 1_000 * SECOND, asked: VecDeque::new() };
        world.handle(Event::Update(Update::Restored));
        world
    }

    fn handle(&mut self, event: Event) {
        let actions = self.machine.handle(self.now, event);
        self.asked.extend(actions);
    }

    /// Lets time pass; the machine is looked at whenever it asks for that.
    fn pass(&mut self, seconds: u64) {
        let until = self.now + seconds * SECOND;
        while self.machine.wake() < until {
            let wake = self.machine.wake();
            self.now = self.now.max(wake);
            let before = self.machine.wake();
            self.handle(Event::Tick);
            if self.machine.wake() <= before {
                self.now += 1;
            }
        }
        self.now = until;
        self.handle(Event::Tick);
    }

    /// Takes what was asked for until something is of use.
    fn next<T>(&mut self, what: &str, pick: impl Fn(&Action) -> Option<T>) -> T {
        let seen: Vec<_> = self.asked.iter().map(|action| format!("{action:?}")).collect();
        while let Some(action) = self.asked.pop_front() {
            if let Some(found) = pick(&action) {
                return found;
            }
        }
        panic!("{what} was not asked for, but {seen:#?}");
    }

    fn asked(&self, pick: impl Fn(&Action) -> bool) -> usize {
        self.asked.iter().filter(|action| pick(action)).count()
    }

    fn deliver(&mut self, work_id: &str, order: Order) {
        let delivery = Delivery { work_id: work_id.into(), order, token: None };
        self.handle(Event::Polled(Ok(Some(delivery))));
        self.next("an acknowledgement", |action| matches!(action, Action::Ack(_)).then_some(()));
        self.handle(Event::Acked { work_id: work_id.into(), result: Ok(()) });
    }

    /// The text that the heartbeat under way swaps.
    fn beat_asked(&mut self) -> String {
        self.next("a heartbeat", |action| match action {
            Action::Beat { expected, .. } => Some(expected.clone()),
            _ => None,
        })
    }

    fn beaten(&mut self, result: Result<Beat, Failure>) {
        self.handle(Event::Beaten { work_id: WORK.into(), sent: self.now, result });
    }

    fn good_beat(&self) -> Beat {
        Beat { last_heartbeat: format!("hb-{}", self.now), ttl_seconds: Some(120), goes_on: true }
    }

    /// Beats whenever it is asked for while time passes.
    fn pass_beating(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.pass(1);
            if let Some(at) = self.asked.iter().position(|action| matches!(action, Action::Beat { .. })) {
                self.asked.remove(at);
                let beat = self.good_beat();
                self.beaten(Ok(beat));
            }
        }
    }

    /// A session that is served, with this history.
    fn served(history: Vec<Value>) -> Self {
        let mut world = Self::new();
        world.serve(history);
        world
    }

    fn serve(&mut self, history: Vec<Value>) {
        self.deliver(WORK, Order::Session(SESSION.into()));
        assert_eq!(self.beat_asked(), "NO_HEARTBEAT");
        let beat = self.good_beat();
        self.beaten(Ok(beat));
        self.next("the session", |action| matches!(action, Action::Fetch { .. }).then_some(()));
        self.connect(history);
    }

    /// The stream that was asked for opens, and the history is read.
    fn connect(&mut self, history: Vec<Value>) -> u64 {
        let link = self.next("a stream", |action| match action {
            Action::Stream { link, .. } => Some(*link),
            _ => None,
        });
        self.handle(Event::Connected { work_id: WORK.into(), link });
        self.next("the history", |action| matches!(action, Action::List { .. }).then_some(()));
        let events = history.into_iter().map(wire::event).collect();
        self.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(Page { events, next: None }) });
        link
    }

    fn live(&mut self, event: Value) {
        let link = self.machine.items[WORK].link_number();
        self.handle(Event::Live { work_id: WORK.into(), link, event: wire::event(event) });
    }

    /// The call that was handed on.
    fn call_asked(&mut self) -> String {
        self.next("a call", |action| match action {
            Action::Work(WorkItem::Call(call)) => Some(call.call_id.to_string()),
            _ => None,
        })
    }

    fn calls_asked(&self) -> usize {
        self.asked(|action| matches!(action, Action::Work(WorkItem::Call(_))))
    }

    fn finished(&mut self, call_id: &str, text: &str) {
        self.handle(Event::Update(finished(call_id, text)));
    }

    /// What is posted for a tool use.
    fn post_asked(&mut self) -> (String, String) {
        self.next("a post", |action| match action {
            Action::Post { tool_use_id, answer, .. } => Some((tool_use_id.clone(), shown(answer))),
            _ => None,
        })
    }

    fn posts_asked(&self) -> usize {
        self.asked(|action| matches!(action, Action::Post { .. }))
    }

    fn posted(&mut self, tool_use_id: &str, result: Result<(), Failure>) {
        self.handle(Event::Posted { work_id: WORK.into(), tool_use_id: tool_use_id.into(), result });
    }

    fn cancels_asked(&self) -> Vec<(String, CancelMode)> {
        let cancel = |action: &Action| match action {
            Action::Work(WorkItem::Cancel { call_id, mode, .. }) => Some((call_id.to_string(), *mode)),
            _ => None,
        };
        self.asked.iter().filter_map(cancel).collect()
    }

    fn acknowledged(&self) -> Vec<String> {
        let acknowledge = |action: &Action| match action {
            Action::Work(WorkItem::Acknowledge { call_id }) => Some(call_id.to_string()),
            _ => None,
        };
        self.asked.iter().filter_map(acknowledge).collect()
    }

    fn stops_asked(&self) -> usize {
        self.asked(|action| matches!(action, Action::Stop { .. }))
    }

    fn forgotten(&self) -> usize {
        self.asked(|action| matches!(action, Action::Forget { .. }))
    }
}

fn shown(answer: &Answer) -> String {
    match answer {
        Answer::Text(text) => text.clone(),
        Answer::Result { result, interrupted, .. } => format!("{:?} {interrupted}", text_of(result)),
    }
}

fn text_of(result: &CallResult) -> String {
    match &result.presented.content[..] {
        [crate::work::Content::Text(text)] => text.clone(),
        other => panic!("one text expected, got {other:?}"),
    }
}

fn finished(call_id: &str, text: &str) -> Update {
    let end = CallEnd::without_output(Outcome::Exited { code: 0 });
    let result = Arc::new(CallResult { end, presented: ToolResult::text(false, text), recovered: false });
    Update::CallFinished { call_id: call(call_id), session_id: core(), epoch: 1, result }
}

fn core() -> SessionId {
    SessionId::new(CORE).expect("an id")
}

fn call(id: &str) -> CallId {
    CallId::new(id).expect("an id")
}

fn status(status: u16) -> Failure {
    Failure::Status { status, kind: String::new(), retry_after: None }
}

fn lost() -> Failure {
    Failure::Transport("reset".into())
}

fn bash(id: &str) -> Value {
    json!({"type": "agent.tool_use", "id": id, "name": "bash", "input": {"command": "echo"}, "evaluated_permission": "allow"})
}

/// A tool use that needs no shell.
fn reading(id: &str) -> Value {
    json!({"type": "agent.tool_use", "id": id, "name": "read", "input": {"file_path": "f"}, "evaluated_permission": "allow"})
}

fn asking(id: &str) -> Value {
    json!({"type": "agent.tool_use", "id": id, "name": "bash", "input": {"command": "echo"}, "evaluated_permission": "ask"})
}

fn verdict(id: &str, result: &str) -> Value {
    json!({"type": "user.tool_confirmation", "tool_use_id": id, "result": result})
}

fn result_of(id: &str) -> Value {
    json!({"type": "user.tool_result", "tool_use_id": id, "content": []})
}

fn end_of_turn() -> Value {
    json!({"type": "session.status_idle", "stop_reason": {"type": "end_turn"}})
}

/// The turn waits for somebody.
fn action_required() -> Value {
    json!({"type": "session.status_idle", "stop_reason": {"type": "requires_action", "event_ids": []}})
}

fn interrupt() -> Value {
    json!({"type": "user.interrupt"})
}

fn in_thread(mut event: Value, thread: &str) -> Value {
    event["session_thread_id"] = json!(thread);
    event
}

fn refused(request: RequestKind, call_id: Option<&str>, code: Code) -> Event {
    let (session_id, call_id) = (Some(core()), call_id.map(call));
    let failure = ToolFailure::new(code, "no room", "wait");
    Event::Update(Update::Refused { request, session_id, call_id, epoch: 1, failure })
}
