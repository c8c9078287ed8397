//! A work item from its delivery to its end, without time, network and sandboxes.

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
        let mut world = Self { machine: Machine::new(rules(), half), now: 1_000 * SECOND, asked: VecDeque::new() };
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

fn interrupt() -> Value {
    json!({"type": "user.interrupt"})
}

fn in_thread(mut event: Value, thread: &str) -> Value {
    event["session_thread_id"] = json!(thread);
    event
}

#[test]
fn nothing_is_polled_before_what_an_earlier_runner_left_is_known() {
    let mut machine = Machine::new(rules(), half);
    assert!(machine.handle(SECOND, Event::Tick).is_empty());
    assert!(matches!(machine.handle(SECOND, Event::Update(Update::Restored))[..], [Action::Poll]));
}

#[test]
fn polling_stops_without_room_and_goes_on_with_it() {
    let mut world = World::new();
    world.deliver("work_1", Order::Session("sesn_1".into()));
    world.deliver("work_2", Order::Session("sesn_2".into()));
    world.asked.clear();
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0, "two items are the most");

    let mut world = World::new();
    world.machine.set_room(Room { others: 8, closed: false });
    world.handle(Event::Polled(Ok(None)));
    world.asked.clear();
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0, "others have all of it");
    world.machine.set_room(Room { others: 7, closed: true });
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 0, "the host is short of something");
    world.machine.set_room(Room { others: 7, closed: false });
    world.pass(10);
    assert_eq!(world.asked(|action| matches!(action, Action::Poll)), 1, "one at a time");
}

#[test]
fn failed_polls_come_slower_and_refused_ones_slowest() {
    let mut world = World::new();
    let mut waits = Vec::new();
    for _ in 0..8 {
        world.handle(Event::Polled(Err(lost())));
        waits.push((world.machine.wake() - world.now) / SECOND);
        world.now = world.machine.wake();
        world.handle(Event::Tick);
    }
    assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
    world.handle(Event::Polled(Err(status(401))));
    assert_eq!((world.machine.wake() - world.now) / SECOND, 90);
}

#[test]
fn heartbeats_begin_with_the_acknowledgement_and_nothing_else_before_the_first_is_taken() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    assert_eq!(world.asked(|action| matches!(action, Action::Stream { .. } | Action::Fetch { .. })), 0);
    assert_eq!(world.beat_asked(), "NO_HEARTBEAT");
    let beat = world.good_beat();
    world.beaten(Ok(beat.clone()));
    assert_eq!(world.asked(|action| matches!(action, Action::Stream { .. })), 1);
    world.asked.clear();
    world.pass(40);
    assert_eq!(world.beat_asked(), beat.last_heartbeat);
}

#[test]
fn items_that_ask_for_nothing_are_acknowledged_and_given_back() {
    let mut world = World::new();
    world.deliver(WORK, Order::Nothing("healthcheck".into()));
    assert_eq!((world.stops_asked(), world.asked(|action| matches!(action, Action::Beat { .. }))), (1, 0));
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    assert_eq!(world.forgotten(), 1);
}

#[test]
fn delivery_that_cannot_be_acknowledged_in_time_is_left_and_a_conflict_is_decided_by_the_first_beat() {
    let mut world = World::new();
    world.next("a poll", |action| matches!(action, Action::Poll).then_some(()));
    let delivery = Delivery { work_id: WORK.into(), order: Order::Session(SESSION.into()), token: None };
    world.handle(Event::Polled(Ok(Some(delivery.clone()))));
    world.handle(Event::Acked { work_id: WORK.into(), result: Err(lost()) });
    world.pass(2);
    assert_eq!(world.asked(|action| matches!(action, Action::AckAgain { .. })), 1);
    world.handle(Event::Acked { work_id: WORK.into(), result: Err(status(409)) });
    assert_eq!(world.beat_asked(), "NO_HEARTBEAT");

    let mut world = World::new();
    world.handle(Event::Polled(Ok(Some(delivery.clone()))));
    world.pass(6);
    assert_eq!((world.forgotten(), world.stops_asked()), (1, 0));

    let mut world = World::new();
    world.handle(Event::Polled(Ok(Some(delivery))));
    world.handle(Event::Acked { work_id: WORK.into(), result: Err(status(403)) });
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn delivery_of_what_is_served_already_is_not_acknowledged() {
    let mut world = World::served(vec![]);
    for work_id in [WORK, "work_2"] {
        world.asked.clear();
        let delivery = Delivery { work_id: work_id.into(), order: Order::Session(SESSION.into()), token: None };
        world.handle(Event::Polled(Ok(Some(delivery))));
        assert_eq!(world.asked(|action| matches!(action, Action::Ack(_))), 0, "{work_id}");
        world.pass(3);
    }
}

#[test]
fn call_is_run_in_a_session_of_its_own_and_acknowledged_when_its_result_is_posted() {
    let mut world = World::served(vec![]);
    world.live(bash("t1"));
    let opened = world.next("a session", |action| match action {
        Action::Work(WorkItem::Open(open)) => Some((open.session_id.to_string(), open.epoch)),
        _ => None,
    });
    assert_eq!(opened, (CORE.to_owned(), 1));
    let lease = world.next("a lease", |action| match action {
        Action::Work(WorkItem::Lease { session_id, until_ns, .. }) => Some((session_id.clone(), *until_ns)),
        _ => None,
    });
    assert_eq!(lease, (Some(core()), world.now + 120 * SECOND));
    assert_eq!(world.call_asked(), "claude:env_1:t1");
    world.finished("claude:env_1:t1", "hi");
    assert_eq!(world.post_asked(), ("t1".to_owned(), "\"hi\" false".to_owned()));
    assert_eq!(world.acknowledged(), Vec::<String>::new(), "the server does not have it yet");
    world.posted("t1", Ok(()));
    assert_eq!(world.acknowledged(), ["claude:env_1:t1"]);
    world.live(result_of("t1"));
    world.live(bash("t1"));
    assert_eq!(world.calls_asked(), 0);
}

#[test]
fn call_of_history_and_stream_runs_once_and_answered_ones_do_not_run() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    world.beat_asked();
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    let link = world.next("a stream", |action| match action {
        Action::Stream { link, .. } => Some(*link),
        _ => None,
    });
    world.handle(Event::Connected { work_id: WORK.into(), link });
    for event in [bash("t2"), bash("t3")] {
        world.handle(Event::Live { work_id: WORK.into(), link, event: wire::event(event) });
    }
    assert_eq!(world.calls_asked(), 0, "the history may say that they are answered");
    let first = Page { events: [bash("t1"), bash("t2")].map(wire::event).into(), next: Some("p2".into()) };
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(first) });
    let page = world.next("the next page", |action| match action {
        Action::List { page: Some(page), .. } => Some(page.clone()),
        _ => None,
    });
    assert_eq!(page, "p2");
    let second = Page { events: [result_of("t1")].map(wire::event).into(), next: None };
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(second) });
    let ids = [world.call_asked(), world.call_asked()];
    assert_eq!((ids, world.calls_asked()), (["claude:env_1:t2".to_owned(), "claude:env_1:t3".to_owned()], 0));
}

#[test]
fn history_that_cannot_be_read_whole_is_read_again_with_a_new_stream() {
    let mut world = World::new();
    world.deliver(WORK, Order::Session(SESSION.into()));
    world.beat_asked();
    let beat = world.good_beat();
    world.beaten(Ok(beat));
    let link = world.next("a stream", |action| match action {
        Action::Stream { link, .. } => Some(*link),
        _ => None,
    });
    world.handle(Event::Connected { work_id: WORK.into(), link });
    let page = Page { events: [bash("t1")].map(wire::event).into(), next: Some("p2".into()) };
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Ok(page) });
    world.handle(Event::Listed { work_id: WORK.into(), link, result: Err(status(503)) });
    assert_eq!(world.calls_asked(), 0);
    world.pass(1);
    world.connect(vec![bash("t1"), result_of("t1")]);
    assert_eq!(world.calls_asked(), 0);
}

#[test]
fn stream_that_breaks_is_made_again_later_each_time_and_a_refusal_ends_the_item() {
    let mut world = World::served(vec![]);
    let mut waits = Vec::new();
    for _ in 0..6 {
        let link = world.machine.items[WORK].link_number();
        world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: None });
        let before = world.now;
        while world.machine.items[WORK].link_number() == link {
            world.now += SECOND / 8;
            world.handle(Event::Tick);
        }
        waits.push((world.now - before) * 8 / SECOND);
    }
    assert_eq!(waits, [3, 6, 12, 24, 48, 60]);
    let link = world.machine.items[WORK].link_number();
    world.asked.clear();
    world.handle(Event::Disconnected { work_id: WORK.into(), link, failure: Some(status(404)) });
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn gate_fails_closed() {
    let novel = json!({"type": "agent.tool_use", "id": "t3", "name": "bash", "input": {"command": "x"}, "evaluated_permission": "novel"});
    let denied = json!({"type": "agent.tool_use", "id": "t4", "name": "bash", "input": {"command": "x"}, "evaluated_permission": "deny"});
    let mut world = World::served(vec![
        verdict("t1", "allow"),
        asking("t1"),
        verdict("t2", "allow "),
        asking("t2"),
        novel,
        verdict("t4", "allow"),
        denied,
        verdict("t6", "deny"),
        bash("t6"),
    ]);
    assert_eq!(world.call_asked(), "claude:env_1:t1");
    assert_eq!((world.calls_asked(), world.posts_asked()), (0, 0), "denied ones are answered by the server itself");
    world.live(verdict("t3", "allow"));
    assert_eq!(world.call_asked(), "claude:env_1:t3");
    world.live(asking("t5"));
    world.live(verdict("t5", "deny"));
    world.live(verdict("t5", "allow"));
    assert_eq!((world.calls_asked(), world.posts_asked()), (0, 0));
}

#[test]
fn tools_of_others_are_left_to_them_and_keep_the_item() {
    let custom = json!({"type": "agent.custom_tool_use", "id": "t1", "name": "bash", "input": {}});
    let unknown = json!({"type": "agent.tool_use", "id": "t2", "name": "nosuch", "input": {}});
    let mut world = World::served(vec![custom, unknown, end_of_turn()]);
    world.pass_beating(300);
    assert_eq!((world.calls_asked(), world.posts_asked(), world.stops_asked()), (0, 0, 0));
    world.live(json!({"type": "user.custom_tool_result", "custom_tool_use_id": "t1"}));
    world.live(result_of("t2"));
    world.live(end_of_turn());
    world.pass_beating(61);
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn bad_input_is_answered_to_the_model_and_runs_nothing() {
    let mut world = World::served(vec![json!({"type": "agent.tool_use", "id": "t1", "name": "read", "input": {}})]);
    assert_eq!(world.post_asked(), ("t1".to_owned(), "read: file_path is required".to_owned()));
    assert_eq!(world.calls_asked(), 0);
}

/// F-16: whoever has lost the lease ends what runs at once, and posts nothing more.
#[test]
fn lost_lease_ends_everything_and_posts_nothing() {
    for is_assumed in [false, true] {
        let mut world = World::served(vec![bash("t1"), bash("t2")]);
        world.call_asked();
        world.finished("claude:env_1:t2", "done");
        world.asked.clear();
        if is_assumed {
            for _ in 0..125 {
                world.pass(1);
                if world.asked(|action| matches!(action, Action::Beat { .. })) > 0 && world.forgotten() == 0 {
                    world.asked.retain(|action| !matches!(action, Action::Beat { .. }));
                    world.beaten(Err(lost()));
                }
            }
        } else {
            world.pass(40);
            world.beaten(Err(status(412)));
        }
        assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Kill)], "{is_assumed}");
        assert_eq!((world.forgotten(), world.stops_asked()), (1, 0), "{is_assumed}");
        let suspended = world.asked(|action| matches!(action, Action::Work(WorkItem::Suspend { session_id: Some(_) })));
        assert!(suspended > 0, "something could still begin");
        world.asked.clear();
        world.finished("claude:env_1:t1", "killed");
        world.posted("t2", Err(lost()));
        world.pass(100);
        assert_eq!((world.posts_asked(), world.acknowledged()), (0, vec![]), "{is_assumed}");
    }
}

#[test]
fn item_that_is_taken_back_is_answered_with_errors_and_then_given_back() {
    let mut world = World::served(vec![bash("t1")]);
    world.call_asked();
    world.pass(40);
    let beat = Beat { goes_on: false, ..world.good_beat() };
    world.beaten(Ok(beat));
    assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Kill)]);
    assert_eq!(world.stops_asked(), 0, "its answer comes first");
    world.finished("claude:env_1:t1", "killed");
    assert_eq!(world.post_asked().0, "t1");
    world.posted("t1", Ok(()));
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn item_is_given_back_in_the_end_although_nothing_answers() {
    let mut world = World::served(vec![bash("t1")]);
    world.pass(40);
    world.beaten(Ok(Beat { goes_on: false, last_heartbeat: "x".into(), ttl_seconds: Some(120) }));
    world.asked.clear();
    world.pass(11);
    assert_eq!(world.stops_asked(), 1);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Err(status(500)) });
    world.pass(10);
    assert_eq!(world.stops_asked(), 2);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Err(status(409)) });
    assert_eq!(world.forgotten(), 1);
}

#[test]
fn interrupt_ends_what_runs_and_what_waits_in_its_thread_and_nothing_else() {
    let mut world = World::served(vec![
        in_thread(bash("a1"), "th_a"),
        in_thread(bash("b1"), "th_b"),
        in_thread(asking("a2"), "th_a"),
    ]);
    world.asked.clear();
    world.live(in_thread(interrupt(), "th_a"));
    assert_eq!(world.cancels_asked(), [("claude:env_1:a1".to_owned(), CancelMode::Interrupt)]);
    assert_eq!(world.post_asked(), ("a2".to_owned(), "interrupted by user".to_owned()));
    world.finished("claude:env_1:a1", "part");
    assert_eq!(world.post_asked(), ("a1".to_owned(), "\"part\" true".to_owned()));
    world.live(interrupt());
    assert_eq!(world.cancels_asked(), [("claude:env_1:b1".to_owned(), CancelMode::Interrupt)]);
}

#[test]
fn interrupt_in_the_history_concerns_what_came_before_it_only() {
    let mut world = World::served(vec![bash("t1"), interrupt(), bash("t2")]);
    assert_eq!(world.call_asked(), "claude:env_1:t2");
    assert_eq!((world.post_asked().1.as_str(), world.calls_asked()), ("interrupted by user", 0));
}

#[test]
fn end_of_a_thread_drops_its_calls_without_an_answer() {
    let ended = |thread: &str| in_thread(json!({"type": "session.thread_status_terminated"}), thread);
    let mut world = World::served(vec![in_thread(bash("t1"), "th"), in_thread(asking("t2"), "th")]);
    world.asked.clear();
    world.live(ended("th"));
    world.live(verdict("t2", "allow"));
    world.live(in_thread(bash("t3"), "th"));
    assert_eq!(world.cancels_asked(), [("claude:env_1:t1".to_owned(), CancelMode::Interrupt)]);
    world.finished("claude:env_1:t1", "ended");
    assert_eq!((world.posts_asked(), world.calls_asked()), (0, 0));
    assert_eq!(world.acknowledged(), ["claude:env_1:t1"], "nobody will ask for it");
}

#[test]
fn idle_clock_runs_only_while_nothing_is_left_to_do() {
    let mut world = World::served(vec![bash("t1")]);
    world.live(end_of_turn());
    world.pass_beating(200);
    assert_eq!(world.stops_asked(), 0, "a call runs");
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Ok(()));
    world.pass_beating(59);
    assert_eq!(world.stops_asked(), 0, "it counts from the end of the call");
    world.live(json!({"type": "user.message"}));
    world.pass_beating(200);
    assert_eq!(world.stops_asked(), 0, "somebody has said something");
    world.live(end_of_turn());
    world.live(verdict("other", "allow"));
    world.pass_beating(59);
    assert_eq!(world.stops_asked(), 0);
    world.pass_beating(2);
    assert_eq!(world.stops_asked(), 1, "a verdict is no sign of life");
}

#[test]
fn session_outlives_its_items_and_is_closed_when_nobody_has_wanted_it_for_long() {
    let mut world = World::served(vec![bash("t1"), end_of_turn()]);
    let session_id = core();
    world.handle(Event::Update(Update::SessionOpened {
        session_id,
        epoch: 1,
        receipt: Receipt::default(),
        replay: Replay::First,
    }));
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Ok(()));
    world.live(end_of_turn());
    world.pass_beating(61);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    let closes = |action: &Action| matches!(action, Action::Work(WorkItem::Close(_)));
    world.asked.retain(|action| matches!(action, Action::Poll));
    world.pass(300);
    assert_eq!(world.asked(closes), 0);
    assert!(world.asked(|action| matches!(action, Action::Work(WorkItem::Lease { .. }))) >= 9, "its sandbox would end");

    world.asked.retain(|action| matches!(action, Action::Poll));
    world.serve(vec![bash("t1"), result_of("t1"), bash("t2")]);
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 0, "it is there");
    assert_eq!(world.call_asked(), "claude:env_1:t2");
    world.finished("claude:env_1:t2", "x");
    world.posted("t2", Ok(()));
    world.live(end_of_turn());
    world.pass_beating(61);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    world.pass(640);
    assert_eq!(world.asked(closes), 1);
}

#[test]
fn session_that_is_over_is_closed_and_its_results_are_dropped() {
    let mut world = World::served(vec![bash("t1"), bash("t2")]);
    world.finished("claude:env_1:t1", "x");
    world.asked.clear();
    world.live(json!({"type": "session.status_terminated"}));
    assert_eq!(world.cancels_asked(), [("claude:env_1:t2".to_owned(), CancelMode::Kill)]);
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Close(_)))), 1);
    assert_eq!((world.stops_asked(), world.posts_asked()), (1, 0));
    world.finished("claude:env_1:t2", "killed");
    assert_eq!(world.acknowledged(), ["claude:env_1:t1", "claude:env_1:t2"]);
}

/// F-02: what an earlier runner has begun is not run again, and its result is posted.
#[test]
fn calls_of_an_earlier_runner_are_found_by_their_ids() {
    let mut world = World::new();
    let restored = |id: &str, phase| Update::CallRestored {
        call_id: call(id),
        session_id: core(),
        digest: crate::work::RequestDigest([0; 32]),
        quiet: true,
        phase,
    };
    world.handle(Event::Update(Update::SessionRestored { session_id: core(), epoch: 1, ready: true }));
    assert_eq!(
        world.asked(|action| matches!(action, Action::Work(WorkItem::Suspend { .. }))),
        1,
        "nobody has a lease yet"
    );
    world.handle(Event::Update(restored("claude:env_1:t1", CallPhase::Finished)));
    world.finished("claude:env_1:t1", "stored");
    world.handle(Event::Update(restored("claude:env_1:t2", CallPhase::Started)));
    for (id, phase) in [("claude:env_1:t4", CallPhase::Finished), ("claude:env_1:t5", CallPhase::Started)] {
        world.handle(Event::Update(restored(id, phase)));
    }
    world.finished("claude:env_1:t4", "posted by the earlier one");
    world.asked.clear();
    world.serve(vec![bash("t1"), bash("t2"), bash("t3"), bash("t4"), result_of("t4"), bash("t5"), result_of("t5")]);
    assert_eq!(world.acknowledged(), ["claude:env_1:t4"], "the server has it");
    assert_eq!(
        world.cancels_asked(),
        [("claude:env_1:t5".to_owned(), CancelMode::Interrupt)],
        "somebody has answered it"
    );
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 0);
    assert_eq!((world.call_asked(), world.calls_asked()), ("claude:env_1:t3".to_owned(), 0));
    assert_eq!(world.post_asked(), ("t1".to_owned(), "\"stored\" false".to_owned()));
    world.finished("claude:env_1:t5", "ended");
    assert_eq!(world.acknowledged(), ["claude:env_1:t5"]);
    world.finished("claude:env_1:t2", "went on");
    assert_eq!(world.post_asked(), ("t2".to_owned(), "\"went on\" false".to_owned()));
}

#[test]
fn posts_are_repeated_for_as_long_as_the_lease_lasts_and_refused_ones_are_given_up() {
    let mut world = World::served(vec![bash("t1")]);
    world.finished("claude:env_1:t1", "x");
    let mut tries = 0;
    for _ in 0..400 {
        world.pass_beating(1);
        if world.posts_asked() > 0 {
            tries += world.posts_asked();
            world.asked.retain(|action| !matches!(action, Action::Post { .. }));
            world.posted("t1", Err(status(503)));
        }
    }
    assert!((5..30).contains(&tries), "{tries}");
    assert_eq!(world.acknowledged(), Vec::<String>::new(), "a later item may still get it");

    let mut world = World::served(vec![bash("t1")]);
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Err(status(400)));
    world.pass_beating(100);
    assert_eq!(world.posts_asked(), 1, "only the first");
}

#[test]
fn result_that_is_too_large_for_the_server_is_answered_as_such() {
    let mut world = World::served(vec![bash("t1")]);
    world.finished("claude:env_1:t1", "x");
    world.asked.clear();
    world.posted("t1", Err(status(413)));
    assert!(world.post_asked().1.starts_with("the result was refused by the control plane as too large"));
}

fn refused(request: RequestKind, call_id: Option<&str>, code: Code) -> Event {
    let (session_id, call_id) = (Some(core()), call_id.map(call));
    let failure = ToolFailure::new(code, "no room", "wait");
    Event::Update(Update::Refused { request, session_id, call_id, epoch: 1, failure })
}

#[test]
fn session_without_room_is_opened_later_and_its_calls_with_it() {
    let mut world = World::served(vec![bash("t1")]);
    world.asked.clear();
    world.handle(refused(RequestKind::Open, None, Code::Capacity));
    world.handle(refused(RequestKind::Call, Some("claude:env_1:t1"), Code::SessionUnknown));
    assert_eq!((world.calls_asked(), world.posts_asked()), (0, 0));
    world.pass_beating(3);
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 1);
    assert_eq!(world.call_asked(), "claude:env_1:t1");
    for _ in 0..40 {
        world.handle(refused(RequestKind::Open, None, Code::Capacity));
        world.handle(refused(RequestKind::Call, Some("claude:env_1:t1"), Code::SessionUnknown));
        world.pass_beating(3);
    }
    assert_eq!(world.post_asked().1, "the call did not run: no room");
}

#[test]
fn session_that_is_still_ending_is_opened_again_when_it_has_ended() {
    let mut world = World::served(vec![bash("t1")]);
    world.asked.clear();
    world.handle(refused(RequestKind::Open, None, Code::SessionClosed));
    world.handle(refused(RequestKind::Call, Some("claude:env_1:t1"), Code::SessionClosed));
    world.pass_beating(10);
    assert_eq!(world.calls_asked(), 0);
    let ended = Update::SessionEnded { session_id: core(), epoch: 1, end: SessionEnd::Closed };
    world.handle(Event::Update(ended));
    assert_eq!(world.asked(|action| matches!(action, Action::Work(WorkItem::Open(_)))), 1);
    assert_eq!(world.call_asked(), "claude:env_1:t1");
}

#[test]
fn runner_that_is_emptied_answers_polls_no_more_and_gives_items_back() {
    let mut world = World::served(vec![bash("t1")]);
    world.handle(Event::Update(Update::Drained { draining: true, sessions_left: 1, calls_left: 1 }));
    world.handle(Event::Polled(Ok(None)));
    world.asked.clear();
    world.pass_beating(30);
    assert_eq!((world.stops_asked(), world.asked(|action| matches!(action, Action::Poll))), (0, 0));
    world.finished("claude:env_1:t1", "x");
    world.posted("t1", Ok(()));
    assert_eq!(world.stops_asked(), 1);
}

#[test]
fn end_of_the_runner_gives_every_item_back() {
    let mut world = World::served(vec![bash("t1")]);
    world.handle(Event::Finish(Finish::Patient));
    assert_eq!(world.cancels_asked().len(), 1);
    assert!(!world.machine.is_done());
    world.handle(Event::Finish(Finish::AtOnce));
    assert_eq!(world.stops_asked(), 1);
    world.handle(Event::Stopped { work_id: WORK.into(), result: Ok(()) });
    assert!(world.machine.is_done());
}

#[test]
fn ids_of_the_server_become_ids_of_the_runner_and_no_two_the_same() {
    let long = "x".repeat(128);
    let scoped =
        [scoped("env_1", "s"), scoped("env_1", &long), scoped("env_2", &long), scoped("env_1", &format!("{long}y"))];
    assert_eq!(scoped[0], "claude:env_1:s");
    for (at, id) in scoped.iter().enumerate() {
        assert!(SessionId::new(id).is_ok_and(|id| id.is_of_queue()), "{id}");
        assert!(!scoped[..at].contains(id), "{id}");
    }
}

/// One of the things that can happen, in an order that nobody has thought of.
fn anything(step: u8, which: u8, link: u64) -> Event {
    let id = format!("t{}", which % 4);
    let call_id = format!("claude:env_1:{id}");
    let work_id = || WORK.to_owned();
    let beat = |goes_on| Beat { last_heartbeat: "x".into(), ttl_seconds: Some(u64::from(which % 8)), goes_on };
    let live = |event: Value| Event::Live { work_id: WORK.into(), link, event: wire::event(event) };
    let page = |events: Vec<Value>| Page { events: events.into_iter().map(wire::event).collect(), next: None };
    let delivery = |order| Delivery { work_id: WORK.into(), order, token: None };
    match step % 28 {
        0 => Event::Polled(Ok(Some(delivery(Order::Session(SESSION.into()))))),
        1 => Event::Polled(Ok(Some(delivery(Order::Nothing("healthcheck".into()))))),
        2 => Event::Polled(Err(status(if which.is_multiple_of(2) { 401 } else { 503 }))),
        3 | 4 => Event::Acked { work_id: work_id(), result: Ok(()) },
        5 => Event::Acked { work_id: work_id(), result: Err(status([403, 409, 500][usize::from(which % 3)])) },
        6 | 7 => Event::Beaten { work_id: work_id(), sent: u64::from(which) * SECOND, result: Ok(beat(true)) },
        8 => Event::Beaten { work_id: work_id(), sent: 0, result: Ok(beat(false)) },
        9 => {
            Event::Beaten { work_id: work_id(), sent: 0, result: Err(status([412, 401, 500][usize::from(which % 3)])) }
        }
        10 => Event::Fetched { work_id: work_id(), result: Ok(which.is_multiple_of(8)) },
        11 | 12 => Event::Connected { work_id: work_id(), link },
        13 => Event::Listed { work_id: work_id(), link, result: Ok(page(vec![bash(&id), interrupt(), asking("t9")])) },
        14 => Event::Listed { work_id: work_id(), link, result: Ok(page(vec![bash(&id), end_of_turn()])) },
        15 => Event::Listed { work_id: work_id(), link, result: Err(status(500)) },
        16 => Event::Disconnected { work_id: work_id(), link, failure: (which.is_multiple_of(3)).then(lost) },
        17 => live(bash(&id)),
        18 => live(result_of(&id)),
        19 => live(interrupt()),
        20 => live(end_of_turn()),
        21 => live(verdict("t9", "allow")),
        22 => Event::Posted { work_id: work_id(), tool_use_id: id, result: Ok(()) },
        23 => Event::Posted {
            work_id: work_id(),
            tool_use_id: id,
            result: Err(status([400, 413, 503][usize::from(which % 3)])),
        },
        24 => Event::Update(finished(&call_id, "x")),
        25 => refused([RequestKind::Open, RequestKind::Call][usize::from(which % 2)], Some(&call_id), Code::Capacity),
        26 => Event::Update(Update::SessionEnded { session_id: core(), epoch: 1, end: SessionEnd::Closed }),
        _ => Event::Stopped {
            work_id: work_id(),
            result: if which.is_multiple_of(2) { Ok(()) } else { Err(status(500)) },
        },
    }
}

proptest::proptest! {
    #[test]
    fn nothing_is_asked_for_an_item_that_is_not_ours(steps in proptest::collection::vec((0_u8..28, 0_u8..255, 0_u64..20), 1..200)) {
        let mut machine = Machine::new(rules(), half);
        let mut now = 1_000 * SECOND;
        let mut is_ours = false;
        let mut is_leased = false;
        machine.handle(now, Event::Update(Update::Restored));
        for (step, which, seconds) in steps {
            now += seconds * SECOND / 4;
            let link = machine.items.get(WORK).map_or(0, Item::link_number);
            let event = anything(step, which, link);
            is_leased |= matches!(event, Event::Beaten { result: Ok(_), .. });
            for action in machine.handle(now, event) {
                match action {
                    Action::Ack(_) => {
                        proptest::prop_assert!(!is_ours, "it was taken twice");
                        (is_ours, is_leased) = (true, false);
                    }
                    Action::Forget { .. } => is_ours = false,
                    Action::Post { .. } => proptest::prop_assert!(is_ours && is_leased),
                    Action::Beat { .. } | Action::Stop { .. } | Action::AckAgain { .. } | Action::Stream { .. } => {
                        proptest::prop_assert!(is_ours);
                    }
                    _ => {}
                }
            }
            // Looking again brings nothing new at the same moment: what is due was done.
            let again = machine.handle(now, Event::Tick);
            proptest::prop_assert!(again.is_empty(), "{:?} was not done at once", again);
        }
    }
}
