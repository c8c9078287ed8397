//! Runners that follow one another on the sandboxes of one launcher, without the daemon around them: what a runner that was
//! killed leaves, and what the next one makes of it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use runner::sandbox::HostSandboxes;
use runner::sandbox::control::{Control, Patience};
use runner::sandbox::launch::{Created, HostReport, Launcher};
use runner::sandbox::spec::Spec;
use runner::work::{
    BashInput, CallEnd, CallEvent, CallId, CallLimits, CallObserver, ExecInput, ExpectedCall, Gate, OutputMode,
    PreparedCall, SandboxId, Stream, StreamLengths, ToolInput,
};
use tokio::sync::Notify;

use crate::launcher::{self, Connection, Setup};
use crate::rootfs::Rootfs;
use crate::runner::scaled;

/// Nothing here takes longer on a machine that is not broken.
const PATIENCE: Duration = Duration::from_secs(30);

/// A launcher as a service of its own.
#[derive(Debug)]
pub struct Host {
    launcher: launcher::Launcher,
    _rootfs: Rootfs,
}

impl Host {
    /// Starts a launcher with room for `slots` sandboxes.
    ///
    /// # Panics
    /// When it does not start; with what it said.
    #[must_use]
    pub fn start(slots: u32) -> Self {
        let rootfs = Rootfs::with_prober();
        let launcher = Setup::new(slots, rootfs.path()).start().expect("the launcher starts");
        Self { launcher, _rootfs: rootfs }
    }

    /// What a runner of this generation has. Dropping it is what the end of its process is to the others. Must be called
    /// inside a tokio runtime.
    ///
    /// # Panics
    /// When the launcher does not welcome it.
    #[must_use]
    pub fn runner(&self, generation: u64) -> HostSandboxes {
        let connection = Connection::greeted(&self.launcher.setup().socket()).expect("the launcher answers");
        let launcher = Launcher::from_connection(connection.into_descriptor()).expect("a connection");
        HostSandboxes::new(launcher, HostReport::default(), self.sockets(), generation)
    }

    /// Where the control sockets of sandboxes are.
    #[must_use]
    pub fn sockets(&self) -> PathBuf {
        let [_, run] = self.launcher.setup().directories();
        run.join("sandboxes")
    }

    /// Makes a sandbox that lives on when `runner` is dropped.
    ///
    /// # Panics
    /// When it cannot be made.
    pub async fn make(&self, runner: &HostSandboxes, generation: u64, sandbox_id: &str) -> (Created, Control) {
        let created = runner.launcher().create(&Spec::throw_away(sandbox_id)).await.expect("a sandbox");
        let path = self.sockets().join(&created.socket_name);
        let (control, greeting) =
            Control::connect(&path, "", generation, Patience::default()).await.expect("process 1 answers");
        assert_eq!(greeting.sandbox_id, sandbox_id);
        (created, control)
    }
}

/// Hears of one call.
#[derive(Debug, Default)]
pub struct Listener {
    events: Mutex<Vec<CallEvent>>,
    news: Notify,
}

impl CallObserver for Listener {
    fn observe(&self, event: CallEvent) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        self.news.notify_one();
    }
}

impl Listener {
    /// What was heard so far.
    #[must_use]
    pub fn events(&self) -> Vec<CallEvent> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The end of the call.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn end(&self) -> CallEnd {
        self.wait("the end of the call", |event| match event {
            CallEvent::Finished(end) => Some((**end).clone()),
            _ => None,
        })
        .await
    }

    /// The first report of output.
    ///
    /// # Panics
    /// When it does not come.
    pub async fn output(&self) -> StreamLengths {
        self.wait("output", |event| match event {
            CallEvent::OutputAdvanced(lengths) => Some(*lengths),
            _ => None,
        })
        .await
    }

    async fn wait<T>(&self, what: &str, find: impl Fn(&CallEvent) -> Option<T>) -> T {
        let found = async {
            loop {
                if let Some(found) = self.events().iter().find_map(&find) {
                    return found;
                }
                self.news.notified().await;
            }
        };
        let found = tokio::time::timeout(scaled(PATIENCE), found).await;
        found.unwrap_or_else(|_| panic!("{what} did not come: {:?}", self.events()))
    }
}

/// A call id.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn call_id(text: &str) -> CallId {
    CallId::new(text).expect("an id")
}

/// A sandbox id.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn sandbox_id(text: &str) -> SandboxId {
    SandboxId::new(text).expect("an id")
}

/// A command for the persistent shell.
#[must_use]
pub fn bash(id: &str, command: &str, gate: Gate) -> PreparedCall {
    call(id, ToolInput::Bash(BashInput { command: Some(command.to_owned()), restart: false }), gate)
}

/// A program of its own.
#[must_use]
pub fn exec(id: &str, argv: &[&str], gate: Gate) -> PreparedCall {
    let argv = argv.iter().map(|argument| argument.as_bytes().to_vec()).collect();
    call(id, ToolInput::Exec(ExecInput { argv, ..ExecInput::default() }), gate)
}

fn call(id: &str, input: ToolInput, gate: Gate) -> PreparedCall {
    let limits = CallLimits { grace: Duration::from_millis(200), ..CallLimits::default() };
    PreparedCall { call_id: call_id(id), input, limits, output_mode: OutputMode::Merged, gate }
}

/// What the next runner expects of a call.
#[must_use]
pub fn expected(id: &str, gate: Gate) -> (ExpectedCall, Arc<Listener>) {
    let listener = Arc::new(Listener::default());
    let observer = Arc::clone(&listener) as Arc<dyn CallObserver>;
    (ExpectedCall { call_id: call_id(id), gate, time_limit: Some(Duration::from_secs(120)), observer }, listener)
}

/// Reads standard output from its beginning to its present end.
///
/// # Panics
/// When it has a gap, or cannot be read.
pub async fn read(control: &Control, id: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let chunk = control.read_output(id, Stream::Stdout, bytes.len() as u64, 65_536).await.expect("output");
        assert_eq!(chunk.offset, bytes.len() as u64, "bytes are missing");
        if chunk.bytes.is_empty() {
            return bytes;
        }
        bytes.extend(chunk.bytes);
    }
}
