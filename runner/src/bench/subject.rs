//! What is measured: sandboxes of one launcher, made, used and ended by the daemon's own code.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::BenchError;
use crate::sandbox::HostSandboxes;
use crate::sandbox::live::LiveSandbox;
use crate::sandbox::spec::Spec;
use crate::work::{
    BashInput, CallEnd, CallEvent, CallId, CallLimits, CallObserver, ExecInput, Gate, Outcome, OutputMode,
    PreparedCall, Sandbox, StreamLengths, ToolInput, limits,
};

/// Where a static program lies, if the machine has one.
const BUSYBOX: &str = "/usr/bin/busybox";

/// A program that does nothing, the cheapest this machine has: static where possible, so that no dynamic loader is
/// measured. Ours and peers run the same.
pub fn true_program() -> Vec<&'static str> {
    applet("true")
}

/// A small program of this machine, static where possible.
pub fn applet(name: &'static str) -> Vec<&'static str> {
    if Path::new(BUSYBOX).exists() { vec![BUSYBOX, name] } else { vec![name] }
}

/// Times of one sandbox from its request on, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Cycle {
    /// Until it takes calls.
    pub ready: f64,
    /// Until the end of its first call is known.
    pub result: f64,
    /// Until it is gone.
    pub gone: f64,
}

/// Makes and uses sandboxes.
pub struct Subject {
    sandboxes: HostSandboxes,
    serial: AtomicU64,
}

/// Milliseconds since `start`.
pub fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

impl Subject {
    /// Uses these.
    pub fn new(sandboxes: HostSandboxes) -> Self {
        Self { sandboxes, serial: AtomicU64::new(0) }
    }

    /// Where they come from.
    pub fn sandboxes(&self) -> HostSandboxes {
        self.sandboxes.clone()
    }

    /// A throw-away sandbox under a new name.
    pub fn spec(&self) -> Spec {
        Spec::throw_away(format!("bench-{}-{}", std::process::id(), self.number()))
    }

    fn number(&self) -> u64 {
        self.serial.fetch_add(1, Ordering::Relaxed)
    }

    /// Makes a sandbox.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn create(&self, spec: &Spec) -> Result<LiveSandbox, BenchError> {
        Ok(self.sandboxes.create_live(spec).await?)
    }

    /// One sandbox from nothing to nothing: made, one call run to its end, killed, gone.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn cycle(&self) -> Result<Cycle, BenchError> {
        let spec = self.spec();
        let input = true_call();
        let start = Instant::now();
        let sandbox = self.create(&spec).await?;
        let ready = milliseconds(start);
        let ended = self.finish(&sandbox, input).await;
        let result = milliseconds(start);
        sandbox.close(Duration::ZERO).await;
        let gone = milliseconds(start);
        ended.map(|_| Cycle { ready, result, gone })
    }

    /// Runs one call to its good end and has it forgotten. Returns the end and the time until it was known.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn call(&self, sandbox: &LiveSandbox, input: ToolInput) -> Result<(CallEnd, f64), BenchError> {
        let start = Instant::now();
        let (call_id, end) = self.finish(sandbox, input).await?;
        let took = milliseconds(start);
        self.forget(sandbox, &call_id).await?;
        Ok((end, took))
    }

    /// Runs one call to its good end and reads everything that was kept of its output. Returns bytes and time.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn call_with_output(&self, sandbox: &LiveSandbox, input: ToolInput) -> Result<(u64, f64), BenchError> {
        let start = Instant::now();
        let call = input.name();
        let (call_id, end) = self.finish(sandbox, input).await?;
        let mut read = 0;
        for summary in &end.streams {
            if let Some(bytes) = &summary.inline {
                read += bytes.len() as u64;
                continue;
            }
            let mut offset = 0;
            while offset < summary.total_bytes {
                let chunk = sandbox
                    .read_output(&call_id, summary.stream, offset, limits::CHUNK_BYTES)
                    .await
                    .map_err(|failure| BenchError::Refused { call: call.to_owned(), failure: Box::new(failure) })?;
                if chunk.bytes.is_empty() {
                    break;
                }
                read += chunk.bytes.len() as u64;
                offset = chunk.offset + chunk.bytes.len() as u64;
            }
        }
        let took = milliseconds(start);
        self.forget(sandbox, &call_id).await?;
        Ok((read, took))
    }

    /// Starts a call and returns as soon as it has printed something.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn start_until_output(&self, sandbox: &LiveSandbox, input: ToolInput) -> Result<(), BenchError> {
        let call = input.name();
        let (_, mut state) = self.start(sandbox, input).await?;
        let lost = || BenchError::Lost("the connection to it has ended".to_owned());
        let found = state.wait_for(|state| state.printed || state.end.is_some()).await.map_err(|_| lost())?;
        match &found.end {
            Some(end) => Err(BenchError::Ended {
                call: call.to_owned(),
                outcome: Box::new(end.outcome.clone()),
                said: said(end),
            }),
            None => Ok(()),
        }
    }

    async fn start(
        &self,
        sandbox: &LiveSandbox,
        input: ToolInput,
    ) -> Result<(CallId, watch::Receiver<State>), BenchError> {
        let name = input.name();
        let refused = |failure| BenchError::Refused { call: name.to_owned(), failure: Box::new(failure) };
        let call_id = CallId::new(format!("bench-{}", self.number())).map_err(|error| refused(error.into()))?;
        let (sender, receiver) = watch::channel(State::default());
        let call = PreparedCall {
            call_id: call_id.clone(),
            input,
            limits: CallLimits::default(),
            output_mode: OutputMode::Merged,
            gate: Gate::Open,
        };
        sandbox.start_call(call, Arc::new(Observer(sender))).await.map_err(refused)?;
        Ok((call_id, receiver))
    }

    async fn finish(&self, sandbox: &LiveSandbox, input: ToolInput) -> Result<(CallId, CallEnd), BenchError> {
        let call = input.name().to_owned();
        let (call_id, mut state) = self.start(sandbox, input).await?;
        let end = tokio::select! {
            found = state.wait_for(|state| state.end.is_some()) => found.ok().and_then(|state| state.end.clone()),
            reason = sandbox.lost() => return Err(BenchError::Lost(reason)),
        };
        let end = *end.ok_or_else(|| BenchError::Lost("the connection to it has ended".to_owned()))?;
        let failed = end.result.as_ref().is_some_and(|result| result.is_error);
        if end.outcome != (Outcome::Exited { code: 0 }) || failed {
            return Err(BenchError::Ended { call, outcome: Box::new(end.outcome.clone()), said: said(&end) });
        }
        Ok((call_id, end))
    }

    async fn forget(&self, sandbox: &LiveSandbox, call_id: &CallId) -> Result<(), BenchError> {
        sandbox
            .acknowledge(call_id)
            .await
            .map_err(|failure| BenchError::Refused { call: call_id.as_str().to_owned(), failure: Box::new(failure) })
    }
}

/// The call that runs [`true_program`].
pub fn true_call() -> ToolInput {
    exec(&true_program())
}

/// A call that runs a program of the sandbox.
pub fn exec(argv: &[&str]) -> ToolInput {
    let argv = argv.iter().map(|argument| argument.as_bytes().to_vec()).collect();
    ToolInput::Exec(ExecInput { argv, ..ExecInput::default() })
}

/// A call of the persistent shell.
pub fn bash(command: &str) -> ToolInput {
    ToolInput::Bash(BashInput { command: Some(command.to_owned()), restart: false })
}

fn said(end: &CallEnd) -> String {
    let text = end.streams.iter().filter_map(|summary| summary.inline.as_deref()).map(String::from_utf8_lossy);
    let result = end.result.iter().map(|result| format!("{:?}", result.content).into());
    let all: Vec<_> = text.chain(result).collect();
    all.join(" ").chars().filter(|character| !character.is_control()).take(200).collect()
}

#[derive(Debug, Default)]
struct State {
    printed: bool,
    end: Option<Box<CallEnd>>,
}

struct Observer(watch::Sender<State>);

impl CallObserver for Observer {
    fn observe(&self, event: CallEvent) {
        self.0.send_modify(|state| match event {
            CallEvent::Started { .. } => {}
            CallEvent::OutputAdvanced(lengths) => state.printed |= lengths != StreamLengths::default(),
            CallEvent::Finished(end) => state.end = Some(end),
        });
    }
}
