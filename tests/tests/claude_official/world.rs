//! A control plane with a worker of either kind, and what a scenario needs of them.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sandbox_runner_tests::claude::official::Worker;
use sandbox_runner_tests::claude::{Endpoint, Environment, Mock, NewSession, ToolUse, ours};
use sandbox_runner_tests::daemon::{Daemon, PATIENCE};
use serde_json::json;

/// How long a session may be idle before the worker leaves it, in seconds. Both kinds are told so.
pub(crate) const MAX_IDLE: f64 = 1.0;

/// Whose worker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whose<'a> {
    /// That of the official SDK, by the Python that has it.
    Official(&'a Path),
    /// The built daemon.
    Ours,
}

#[derive(Debug)]
enum Process {
    Official(Worker),
    Ours(Box<Daemon>),
}

/// A control plane, an environment, and workers of it.
#[derive(Debug)]
pub(crate) struct World<'a> {
    pub(crate) mock: Mock,
    pub(crate) environment: Environment,
    whose: Whose<'a>,
    workers: Vec<Process>,
}

/// What became of a scenario, for those who look closer.
#[derive(Debug, Default)]
pub(crate) struct Served {
    /// Its session.
    pub(crate) session: String,
    /// Calls of the model, in the order of their use in the scenario.
    pub(crate) ids: Vec<String>,
    /// What its commands have left in a file: each line is an effect.
    pub(crate) effects: String,
    /// A directory that its calls name.
    pub(crate) home: Option<PathBuf>,
}

impl<'a> World<'a> {
    pub(crate) async fn new(whose: Whose<'a>) -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("test").unwrap();
        let mut world = Self { mock, environment, whose, workers: Vec::new() };
        world.add_worker().await;
        world
    }

    /// Starts another worker of the same kind.
    pub(crate) async fn add_worker(&mut self) {
        let process = match self.whose {
            Whose::Official(python) => {
                Process::Official(Worker::start(python, &self.mock, &self.environment, MAX_IDLE))
            }
            Whose::Ours => Process::Ours(Box::new(ours::start(&self.mock, &self.environment).await)),
        };
        self.workers.push(process);
    }

    /// The working directory, as the tools of the first worker see it.
    pub(crate) fn root(&self) -> PathBuf {
        match &self.workers[0] {
            Process::Official(worker) => worker.workdir(),
            Process::Ours(_) => PathBuf::from("/workspace"),
        }
    }

    /// What a file in a working directory says, empty when there is none.
    pub(crate) fn read(&self, name: &str) -> String {
        let one = |worker: &Process| match worker {
            Process::Official(worker) => std::fs::read_to_string(worker.workdir().join(name)).unwrap_or_default(),
            Process::Ours(daemon) => ours::read(daemon, name),
        };
        self.workers.iter().map(one).collect()
    }

    /// Asks the first worker to end, and waits for nothing.
    pub(crate) fn terminate(&self) {
        match &self.workers[0] {
            Process::Official(worker) => worker.terminate(),
            Process::Ours(daemon) => {
                let pid = daemon.runner_pid().and_then(|pid| i32::try_from(pid).ok()).unwrap();
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
            }
        }
    }

    pub(crate) fn session(&self, new: NewSession) -> String {
        self.mock.lock().create_session(&self.environment.id, new).unwrap()
    }

    /// A session without a script, and the calls with which it begins.
    pub(crate) fn calls(&self, uses: Vec<ToolUse>) -> (String, Vec<String>) {
        let session = self.session(NewSession::default());
        let ids = self.mock.lock().call_tools(&session, uses);
        (session, ids)
    }

    /// One more call of a session.
    pub(crate) fn call(&self, session: &str, tool_use: ToolUse) -> String {
        self.mock.lock().call_tools(session, vec![tool_use]).remove(0)
    }

    pub(crate) async fn text(&self, session: &str, id: &str) -> String {
        self.mock.result_of(session, id).await.text()
    }

    /// Ends the turn, and waits until the worker has left.
    pub(crate) async fn end(&self, session: &str) {
        self.mock.lock().end_turn(session, json!({"type": "end_turn"}));
        self.mock.stopped(session).await;
    }

    /// Waits until a command has written to this file.
    pub(crate) async fn file(&self, name: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.read(name).is_empty() {
            assert!(Instant::now() < deadline, "no command has made {name}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub(crate) fn assert_no_breach(&self) {
        let breaches = self.mock.lock().breaches.clone();
        assert!(breaches.is_empty(), "{breaches:?}");
    }

    /// Requests for the work items of this session, each as its endpoint.
    pub(crate) fn endpoints(&self, session: &str) -> Vec<Endpoint> {
        let plane = self.mock.lock();
        let work: Vec<&str> =
            plane.work.iter().filter(|work| work.data_id == session).map(|work| work.id.as_str()).collect();
        let about = |path: &str| path.contains(session) || work.iter().any(|id| path.contains(id));
        let requests = plane.record.iter().filter(|request| about(&request.incoming.path));
        requests.filter_map(|request| request.endpoint).collect()
    }

    /// What the workers have logged, for messages.
    pub(crate) fn log(&self) -> String {
        let one = |worker: &Process| match worker {
            Process::Official(worker) => worker.log(),
            Process::Ours(daemon) => daemon.end_of_log(),
        };
        self.workers.iter().map(one).collect::<Vec<_>>().join("\n")
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() && self.whose == Whose::Ours {
            #[allow(clippy::print_stderr, reason = "the test runner shows it")]
            {
                eprintln!("our worker logged:\n{}", self.log());
            }
        }
    }
}
