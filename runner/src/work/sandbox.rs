//! The seam between sessions and sandboxes.
//!
//! A sandbox has never heard of a session: it gets a request, runs calls, and reports through an observer. The traits
//! return boxed futures so that tests can put an in-memory sandbox in the place of a real one.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    BoxFuture, CallEnd, CallId, CallLimits, CancelMode, OutputChunk, OutputMode, SandboxId, Stream, StreamLengths,
    ToolFailure, ToolInput,
};

/// What a caller asks a sandbox to be.
#[derive(Clone, PartialEq, Eq)]
pub struct SandboxRequest {
    /// Chosen by us, unique on this host.
    pub sandbox_id: SandboxId,
    /// Which environment.
    pub environment: EnvironmentRef,
    /// How much it may use; already filled with the operator's defaults.
    pub limits: ResourceLimits,
    /// What it may reach.
    pub network: Network,
    /// NAME=value for every process; replaces the environment's own for the names given.
    pub variables: Vec<(String, String)>,
    /// Lowest acceptable isolation tier by name; empty means the operator's floor.
    pub min_tier: String,
    /// How long it may live without a runner; as long as the launcher's policy says when nobody asks for less.
    pub orphan_timeout: Option<Duration>,
}

/// Values of variables may be secrets.
impl fmt::Debug for SandboxRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SandboxRequest")
            .field("sandbox_id", &self.sandbox_id)
            .field("environment", &self.environment)
            .field("limits", &self.limits)
            .field("network", &self.network)
            .finish_non_exhaustive()
    }
}

/// Which environment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvironmentRef {
    /// Name of an environment the operator knows; empty means the default one.
    pub name: String,
    /// Digest it must have; empty means any.
    pub digest: String,
    /// What the root file system is made of, when the caller says so itself and the operator allows it.
    pub rootfs: Option<RootfsChoice>,
}

/// What a root file system is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum RootfsChoice {
    /// The host's /usr, read-only.
    Host,
    /// A directory that the launcher's policy names.
    Directory(String),
}

/// How much a sandbox may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceLimits {
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Memory.
    pub memory_bytes: u64,
    /// Writable disk space.
    pub disk_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Network {
    /// Nothing.
    #[default]
    None,
}

/// One layer of isolation: what was asked for, what is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// What was asked for.
    pub requested: String,
    /// What is in force; empty when nothing is.
    pub enforced: String,
    /// errno of the step that failed; 0 if none.
    pub errno: i32,
}

/// Requested versus enforced, layer by layer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// Name of the tier computed from the layers; empty when it was not measured.
    pub tier: String,
    /// In a fixed order.
    pub layers: Vec<Layer>,
    /// What the operator switched off.
    pub switched_off: Vec<String>,
}

/// Whether a call waits before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Waits for `Sandbox::go`, so that the start can be written to disk first.
    Held,
    /// Begins at once; for runners that keep no journal.
    Open,
}

/// A call as a sandbox needs it.
#[derive(Clone, PartialEq, Eq)]
pub struct PreparedCall {
    /// The call.
    pub call_id: CallId,
    /// What runs.
    pub input: ToolInput,
    /// How long and how much.
    pub limits: CallLimits,
    /// How output is kept.
    pub output_mode: OutputMode,
    /// Whether it waits before it begins.
    pub gate: Gate,
}

impl fmt::Debug for PreparedCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreparedCall")
            .field("call_id", &self.call_id)
            .field("tool", &self.input.name())
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

/// What a sandbox reports about one call, in this order; `Prepared` is the return of `Sandbox::start_call`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallEvent {
    /// From here the call may have effects.
    Started {
        /// CLOCK_BOOTTIME.
        boottime_ns: u64,
        /// Counts shells started in this sandbox.
        shell_generation: u64,
    },
    /// More output can be read. Cumulative, so any but the last may be lost.
    OutputAdvanced(StreamLengths),
    /// The call is over. Nothing follows.
    Finished(Box<CallEnd>),
}

/// Receives the events of one call.
pub trait CallObserver: Send + Sync {
    /// Takes note of `event`. Never blocks and never fails, so it may be called from the loop that reads the socket.
    fn observe(&self, event: CallEvent);
}

/// A call that a sandbox is believed to hold, from the journal of an earlier runner.
#[derive(Clone)]
pub struct ExpectedCall {
    /// The call.
    pub call_id: CallId,
    /// `Open` when its start was written down: then its gate may have been opened, and it may be running or over.
    pub gate: Gate,
    /// When process 1 must have ended it at the latest, counted from its start.
    pub time_limit: Option<Duration>,
    /// Who hears of it from here.
    pub observer: Arc<dyn CallObserver>,
}

impl fmt::Debug for ExpectedCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExpectedCall").field("call_id", &self.call_id).field("gate", &self.gate).finish_non_exhaustive()
    }
}

/// What a sandbox knows of a call that an earlier runner gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundCall {
    /// It waits at its gate and provably has not begun.
    Prepared,
    /// It has begun. Its end, and what it prints until then, comes through its observer.
    Running,
    /// It is over and not acknowledged. Its end comes through its observer.
    Finished,
}

/// What the processes of the workload of a sandbox do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processes {
    /// They run.
    Run,
    /// They stand still, as `Sandbox::freeze` does it.
    Frozen,
    /// There are none, as `Sandbox::stop` does it. Those that come must be let go on first, as after `Frozen`.
    Ended,
}

/// A sandbox of an earlier runner, taken over.
pub struct Attached {
    /// The sandbox.
    pub sandbox: Arc<dyn Sandbox>,
    /// Every expected call that it knows. One that is absent never reached it, or was acknowledged.
    pub found: BTreeMap<CallId, FoundCall>,
    /// What its processes do.
    pub processes: Processes,
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached").field("found", &self.found).finish_non_exhaustive()
    }
}

/// Makes sandboxes.
pub trait Sandboxes: Send + Sync {
    /// Creates a sandbox and waits until it can take calls. On failure nothing is left behind.
    fn create(&self, request: SandboxRequest) -> BoxFuture<'static, Result<Arc<dyn Sandbox>, ToolFailure>>;

    /// Takes over a sandbox that an earlier runner made, with the calls that it may hold. Held calls that have not begun are
    /// dropped there, to be handed over anew. Calls that it holds beyond the expected ones go on until
    /// [`Sandbox::end_unknown_calls`]. Observers may hear of their calls before this returns. On failure the sandbox is one
    /// that nobody counts on: it is ended with the others, now or when [`Sandboxes::end_unknown`] is asked for.
    ///
    /// A held call that the sandbox says has run makes it fail, or ends the sandbox later. Its observer is told first that the
    /// outcome is unknown: a record that was lost looks the same as a lie, so such a call must not be run again.
    fn attach(
        &self,
        sandbox_id: SandboxId,
        receipt: Receipt,
        calls: Vec<ExpectedCall>,
    ) -> BoxFuture<'static, Result<Attached, ToolFailure>>;

    /// Ends the sandboxes of earlier runners that nobody here counts on, and from here on those that will not be at once. What a
    /// journal does not know may be known to a newer one, so this waits until somebody has confirmed that this runner serves.
    fn end_unknown(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Ends a sandbox of an earlier runner without speaking to it, when unknown ones are ended, or leaves that to the next
    /// runner, which wants none that no session has.
    fn discard(&self, sandbox_id: SandboxId) -> BoxFuture<'static, ()> {
        let _ = sandbox_id;
        Box::pin(std::future::ready(()))
    }

    /// Whether sandboxes live on when this process ends.
    fn outlive_us(&self) -> bool {
        false
    }

    /// What a sandbox made here would be protected by.
    fn receipt(&self) -> Receipt;

    /// What has happened how often since the start, by the names of metrics. Never takes long.
    fn counters(&self) -> BoxFuture<'static, BTreeMap<String, u64>> {
        Box::pin(std::future::ready(BTreeMap::new()))
    }

    /// Resolves with a reason when no sandbox can be made here any more, and none that was made lives.
    fn gone(&self) -> BoxFuture<'static, String> {
        Box::pin(std::future::pending())
    }
}

/// The processes that one call has left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The call that started them.
    pub call_id: CallId,
    /// As seen inside the sandbox, at most 64 of them.
    pub pids: Vec<u32>,
}

/// One live sandbox. Dropping the last reference ends it like `close` with no grace.
pub trait Sandbox: Send + Sync {
    /// Its id.
    fn sandbox_id(&self) -> SandboxId;

    /// What protects it.
    fn receipt(&self) -> Receipt;

    /// Ends the calls that it held beyond the expected ones when it was taken over: what has not begun is dropped, what runs is
    /// killed, what is over is forgotten. Until then they go on, and none is prepared after this was asked for but behind it.
    fn end_unknown_calls(&self) -> BoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }

    /// Adds to the end of a call what only its sandbox's holder can find out, within a second or two. Whoever has the end in hand
    /// waits for this: the end of the sandbox must not come between.
    fn explain(&self, end: CallEnd) -> BoxFuture<'static, CallEnd> {
        Box::pin(std::future::ready(end))
    }

    /// Prepares a call. When this returns `Ok` the call is prepared, and with `Gate::Held` it provably has not begun;
    /// later events go to `observer`. When it returns an error the call provably never ran.
    fn start_call(
        &self,
        call: PreparedCall,
        observer: Arc<dyn CallObserver>,
    ) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Opens the gate. An error does not say whether the call began: the observer will, or `lost` resolves.
    fn go(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Drops a prepared call. `Ok` means it provably never ran.
    fn abort(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Ends a running call; the outcome comes through the observer.
    fn cancel(&self, call_id: &CallId, mode: CancelMode) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// The result is stored elsewhere: the call, its output and its spool may be forgotten.
    fn acknowledge(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Reads at most `max_bytes` (and at most 64 KiB) of retained output. Works until `acknowledge`, also after
    /// `close` where the spool files are still there.
    fn read_output(
        &self,
        call_id: &CallId,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<OutputChunk, ToolFailure>>;

    /// Writes to standard input, idempotent by offset. Returns the bytes accepted so far.
    fn stdin(
        &self,
        call_id: &CallId,
        offset: u64,
        data: Vec<u8>,
        eof: bool,
    ) -> BoxFuture<'static, Result<u64, ToolFailure>>;

    /// New size of the terminal of a running call.
    fn resize(&self, call_id: &CallId, columns: u16, rows: u16) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Processes that calls have left behind and that are still there. Sandboxes in which nothing stays say that there are none.
    fn slots(&self) -> BoxFuture<'static, Result<Vec<Slot>, ToolFailure>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    /// Moves the moment, by CLOCK_BOOTTIME, at which the sandbox ends by itself.
    fn deadline(&self, boottime_ns: u64) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Makes every process of the workload stand still, or lets all of them go on. What keeps the sandbox goes on in any case: its calls
    /// can be asked about, and it ends at its deadline. Repeating it changes nothing. An error leaves open which of the two
    /// is the case.
    fn freeze(&self, frozen: bool) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Ends every process of the workload, also where it stands still, while no call is prepared or running. The sandbox, its
    /// files and the output of its calls stay. The next call, before which `freeze(false)` has to be asked for, begins with a
    /// new shell, and its notes say what is gone. After an error some processes may be gone.
    fn stop(&self) -> BoxFuture<'static, Result<(), ToolFailure>>;

    /// Ends the sandbox: politely first when `grace` is not zero. Returns when nothing of it is left but spools of
    /// unacknowledged calls. Running calls report their end through their observers before this returns.
    fn close(&self, grace: Duration) -> BoxFuture<'static, ()>;

    /// Resolves with the reason when the sandbox has ended without `close`. Running calls get no further events.
    fn lost(&self) -> BoxFuture<'static, String>;
}
