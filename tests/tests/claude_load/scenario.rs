//! What the model of each session does, how its worker is driven through it, and what must have come of it.

use std::collections::BTreeSet;
use std::time::Duration;

use prost_types::Timestamp;
use sandbox_runner_tests::claude::{
    ControlPlane, Endpoint, Environment, Expect, Mock, NewSession, Status, Step, ToolUse,
};
use serde_json::{Value, json};

use crate::memory::Memory;

/// Requests after which the driver looks again, so that its patience is for a worker that does nothing at all.
const MANY: usize = 64;
/// Tool uses of a round.
const ROUND: usize = 7;
const TEXT: &str = "one\ntwo\nthree\n";

/// How many sessions do how much.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) sessions: usize,
    /// Times that a session uses each tool.
    pub(crate) rounds: usize,
    /// Whether all are served at once, and stay until their memory is measured. Otherwise one is served after the other.
    pub(crate) at_once: bool,
}

/// What came of a load.
#[derive(Debug)]
pub(crate) struct Measured {
    /// From each tool use to its result.
    pub(crate) latencies: Vec<Duration>,
    /// From the first tool use to the last result.
    pub(crate) took: Duration,
    /// Of all sessions together, when they are served at once.
    pub(crate) memory: Option<Memory>,
}

/// A control plane with one environment.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) mock: Mock,
    pub(crate) environment: Environment,
}

impl Load {
    /// Tool uses of all sessions.
    pub(crate) fn calls(self) -> usize {
        self.sessions * (self.rounds * ROUND + 1)
    }
}

impl Site {
    pub(crate) async fn new() -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("test").unwrap();
        Self { mock, environment }
    }

    /// Makes the sessions, begins each when its worker listens, and returns when all have their results.
    pub(crate) async fn serve(&self, load: Load) -> Vec<String> {
        let sessions: Vec<String> = (0..load.sessions).map(|number| self.session(number, load)).collect();
        let (mut read, mut begun) = (0, BTreeSet::new());
        loop {
            let (opened, over) = self
                .mock
                .until("a request of a worker that serves", |plane| {
                    let news = &plane.record[read..];
                    let streams = news.iter().filter(|request| request.endpoint == Some(Endpoint::StreamEvents));
                    let ids = streams.filter_map(|request| request.incoming.path.split('/').nth(3));
                    let opened: BTreeSet<String> =
                        ids.filter(|id| !begun.contains(*id)).map(ToOwned::to_owned).collect();
                    let posts = news.iter().filter(|request| request.endpoint == Some(Endpoint::SendEvents));
                    let over = begun.len() == sessions.len() && sessions.iter().all(|id| is_over(plane, id));
                    if opened.is_empty() && !over && posts.count() < MANY {
                        return None;
                    }
                    read = plane.record.len();
                    Some((opened, over))
                })
                .await;
            if over {
                return sessions;
            }
            for id in opened {
                self.mock.say(&id, "go");
                begun.insert(id);
            }
        }
    }

    /// Ends sessions that were held, and waits until their workers have given them back.
    pub(crate) async fn end(&self, sessions: &[String]) {
        for id in sessions {
            self.mock.lock().terminate_session(id);
        }
        for id in sessions {
            self.mock.stopped(id).await;
        }
    }

    fn session(&self, number: usize, load: Load) -> String {
        let uses = calls(&format!("s{number}"), load.rounds);
        let mut script: Vec<Step> = uses.into_iter().map(|one| Step::Call(vec![one])).collect();
        if !load.at_once {
            // The worker leaves at once, and nobody's idle time is measured.
            script.push(Step::Terminate);
        }
        let session = NewSession { script: Some(script), ..NewSession::default() };
        self.mock.lock().create_session(&self.environment.id, session).unwrap()
    }

    /// Checks everything that was posted, and takes the times.
    pub(crate) fn measured(&self, sessions: &[String], load: Load) -> Measured {
        let plane = self.mock.lock();
        assert!(plane.breaches.is_empty(), "{:?}", plane.breaches);
        assert_eq!(plane.work.len(), sessions.len(), "a session was served more than once");
        assert!(plane.work.iter().all(|item| item.deliveries == 1), "a lease was lost");
        let (mut latencies, mut first, mut last) = (Vec::new(), i64::MAX, i64::MIN);
        for id in sessions {
            let session = plane.session(id);
            assert!(session.mismatches.is_empty(), "{}", session.mismatches.join("\n"));
            let (uses, results) = (session.events("agent.tool_use"), session.events("user.tool_result"));
            assert_eq!(uses.len(), results.len(), "{id}: one result a tool use");
            for (one, result) in uses.iter().zip(results) {
                assert_eq!(one["id"], result["tool_use_id"], "{id}: answered out of turn");
                let (from, to) = (microseconds(one), microseconds(result));
                latencies.push(Duration::from_micros((to - from).unsigned_abs()));
                (first, last) = (first.min(from), last.max(to));
            }
        }
        assert_eq!(latencies.len(), load.calls());
        Measured { latencies, took: Duration::from_micros((last - first).unsigned_abs()), memory: None }
    }
}

fn is_over(plane: &ControlPlane, id: &str) -> bool {
    let session = plane.session(id);
    session.status != Status::Running && session.waiting().is_empty()
}

/// When an event came, on the clock of the control plane.
fn microseconds(event: &Value) -> i64 {
    let time: Timestamp = event["processed_at"].as_str().unwrap().parse().unwrap();
    time.seconds * 1_000_000 + i64::from(time.nanos) / 1000
}

/// The tool uses of a session. Its files have a directory of their own, because sessions of an official worker share theirs.
fn calls(name: &str, rounds: usize) -> Vec<ToolUse> {
    let (mut uses, mut log) = (Vec::new(), String::new());
    for round in 0..rounds {
        uses.extend(calls_of_round(name, round));
        log.push_str(&format!("{round} first\n{round} second\n"));
    }
    // A command that ran twice has written twice; an edit that was made twice has failed.
    uses.push(ToolUse::bash(&format!("cat {name}/log")).expecting(Expect::Text(log.trim_end().to_owned())));
    uses
}

fn calls_of_round(name: &str, round: usize) -> [ToolUse; ROUND] {
    let directory = format!("{name}/{round}");
    let file = format!("{directory}/a.txt");
    let tool = |tool: &str, input: Value, expect: Expect| ToolUse::new(tool, input).expecting(expect);
    let text = |text: &str| Expect::Text(text.to_owned());
    let wrote = format!("wrote {} bytes to {file}", TEXT.len());
    let edited = format!("edited {file} (1 replacement(s))");
    let first = format!("mkdir -p {directory}; echo {round} first >> {name}/log; echo hello {round}");
    let second = format!("echo {round} second >> {name}/log; seq 100 > {directory}/b.txt; tail -n 1 {directory}/b.txt");
    [
        ToolUse::bash(&first).expecting(Expect::Text(format!("hello {round}"))),
        tool("write", json!({"file_path": file, "content": TEXT}), Expect::Text(wrote)),
        tool("read", json!({"file_path": file}), text(TEXT)),
        tool("edit", json!({"file_path": file, "old_string": "two", "new_string": "TWO"}), Expect::Text(edited)),
        ToolUse::bash(&second).expecting(text("100")),
        tool("glob", json!({"pattern": "a*.txt", "path": directory}), Expect::Has(format!("/{file}"))),
        tool("grep", json!({"pattern": "TWO", "path": directory}), Expect::Has(format!("/{file}:2:TWO"))),
    ]
}
