//! A sandbox in memory: it runs scripted calls, counts them, and keeps their output like a real one.
//!
//! A bash command is a script: `print N` writes N bytes that are a function of the call id, `pause MS` waits, `exit N`
//! ends, `hang` waits until it is cancelled, `die` ends the whole sandbox. Steps are separated by `;`.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use runner::work::*;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, watch};

/// Makes sandboxes and remembers what ran in them.
#[derive(Default)]
pub struct Fakes {
    pub executions: Mutex<HashMap<String, u64>>,
    pub created: AtomicU64,
    pub closed: AtomicU64,
    pub fail_create: AtomicBool,
    /// When each sandbox would end by itself.
    pub deadlines: Mutex<HashMap<String, u64>>,
    /// Calls whose gate is held.
    pub gated: AtomicU64,
}

impl Fakes {
    pub fn executions_of(&self, call_id: &str) -> u64 {
        self.executions.lock().unwrap().get(call_id).copied().unwrap_or(0)
    }
}

/// Byte `offset` of the output of `call_id`.
pub fn byte_at(call_id: &str, offset: u64) -> u8 {
    let seed = call_id.bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    (seed.wrapping_add(offset.wrapping_mul(2_654_435_761)) >> 7) as u8
}

pub fn bytes_of(call_id: &str, length: u64) -> Vec<u8> {
    (0..length).map(|offset| byte_at(call_id, offset)).collect()
}

pub struct FakeSandboxes(pub Arc<Fakes>);

impl Sandboxes for FakeSandboxes {
    fn create(&self, request: SandboxRequest) -> BoxFuture<'static, Result<Arc<dyn Sandbox>, ToolFailure>> {
        let fakes = Arc::clone(&self.0);
        Box::pin(async move {
            if fakes.fail_create.load(Ordering::SeqCst) {
                return Err(ToolFailure::new(Code::SandboxCreateFailed, "no room in memory", "ask for less"));
            }
            fakes.created.fetch_add(1, Ordering::SeqCst);
            let sandbox: Arc<dyn Sandbox> =
                Arc::new(Fake { id: request.sandbox_id, fakes, calls: Mutex::default(), lost: watch::channel(None).0 });
            Ok(sandbox)
        })
    }

    fn attach(
        &self,
        _sandbox_id: SandboxId,
        _receipt: Receipt,
        _calls: Vec<ExpectedCall>,
    ) -> BoxFuture<'static, Result<Attached, ToolFailure>> {
        ready(Err(ToolFailure::new(Code::SandboxLost, "no sandbox of this name", "none")))
    }

    fn counters(&self) -> BoxFuture<'static, BTreeMap<String, u64>> {
        let created = self.0.created.load(Ordering::SeqCst);
        ready([("fakes_created_total".to_owned(), created)].into())
    }

    fn receipt(&self) -> Receipt {
        Receipt { tier: "fake".into(), ..Default::default() }
    }
}

struct Fake {
    id: SandboxId,
    fakes: Arc<Fakes>,
    calls: Mutex<HashMap<String, Arc<FakeCall>>>,
    lost: watch::Sender<Option<String>>,
}

struct FakeCall {
    id: String,
    command: String,
    observer: Arc<dyn CallObserver>,
    written: AtomicU64,
    over: AtomicBool,
    cancelled: Mutex<Option<CancelMode>>,
    wake: Notify,
    stdin: Mutex<Vec<u8>>,
}

fn unknown(call_id: &CallId) -> ToolFailure {
    ToolFailure::new(Code::CallUnknown, format!("call {call_id} is unknown"), "none")
}

fn ready<T: Send + 'static>(value: T) -> BoxFuture<'static, T> {
    Box::pin(async move {
        tokio::task::yield_now().await;
        value
    })
}

impl Fake {
    fn call(&self, call_id: &CallId) -> Result<Arc<FakeCall>, ToolFailure> {
        self.calls.lock().unwrap().get(call_id.as_str()).cloned().ok_or_else(|| unknown(call_id))
    }

    fn run(&self, call: Arc<FakeCall>) {
        *self.fakes.executions.lock().unwrap().entry(call.id.clone()).or_default() += 1;
        let lost = self.lost.clone();
        tokio::spawn(async move { call.script(lost).await });
    }
}

impl FakeCall {
    async fn script(&self, lost: watch::Sender<Option<String>>) {
        self.observer.observe(CallEvent::Started { boottime_ns: 1, shell_generation: 1 });
        let mut code = 0;
        for step in self.command.split(';').map(str::trim) {
            let (verb, number) = step.split_once(' ').unwrap_or((step, "0"));
            let number: u64 = number.parse().unwrap_or(0);
            match verb {
                "print" => {
                    let mut left = number;
                    while left > 0 {
                        let piece = left.min(8192);
                        left -= piece;
                        let mut lengths = StreamLengths::default();
                        lengths.advance(Stream::Stdout, self.written.fetch_add(piece, Ordering::SeqCst) + piece);
                        self.observer.observe(CallEvent::OutputAdvanced(lengths));
                        tokio::task::yield_now().await;
                    }
                }
                "pause" => {
                    tokio::select! {
                        () = tokio::time::sleep(Duration::from_millis(number)) => {}
                        () = self.wake.notified() => {}
                    }
                }
                "hang" => self.wake.notified().await,
                "exit" => code = i32::try_from(number).unwrap(),
                "die" => {
                    lost.send_replace(Some("killed by the test".into()));
                    return;
                }
                other => panic!("unknown step {other}"),
            }
            if self.cancelled.lock().unwrap().is_some() {
                break;
            }
        }
        let cancelled = *self.cancelled.lock().unwrap();
        let outcome = match cancelled {
            Some(mode) => Outcome::Cancelled { mode, before_start: false, killed: false, code: 130 },
            None => Outcome::Exited { code },
        };
        let total = self.written.load(Ordering::SeqCst);
        let bytes = bytes_of(&self.id, total);
        let mut end = CallEnd::without_output(outcome);
        end.streams.push(StreamSummary {
            stream: Stream::Stdout,
            total_bytes: total,
            head_bytes: total,
            tail_bytes: 0,
            sha256: Sha256::digest(&bytes).into(),
            inline: (bytes.len() <= 65_536).then_some(bytes),
            spool_path: String::new(),
        });
        self.over.store(true, Ordering::SeqCst);
        self.observer.observe(CallEvent::Finished(Box::new(end)));
    }
}

impl Sandbox for Fake {
    fn sandbox_id(&self) -> SandboxId {
        self.id.clone()
    }

    fn receipt(&self) -> Receipt {
        Receipt { tier: "fake".into(), ..Default::default() }
    }

    fn start_call(
        &self,
        call: PreparedCall,
        observer: Arc<dyn CallObserver>,
    ) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let command = match call.input {
            ToolInput::Bash(bash) => bash.command.unwrap_or_default(),
            other => format!("print {}", other.name().len()),
        };
        let fake = Arc::new(FakeCall {
            id: call.call_id.to_string(),
            command,
            observer,
            written: AtomicU64::new(0),
            over: AtomicBool::new(false),
            cancelled: Mutex::new(None),
            wake: Notify::new(),
            stdin: Mutex::default(),
        });
        self.calls.lock().unwrap().insert(fake.id.clone(), Arc::clone(&fake));
        match call.gate {
            Gate::Open => self.run(fake),
            Gate::Held => drop(self.fakes.gated.fetch_add(1, Ordering::SeqCst)),
        }
        ready(Ok(()))
    }

    fn go(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let result = self.call(call_id).map(|call| self.run(call));
        ready(result)
    }

    fn abort(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>> {
        self.calls.lock().unwrap().remove(call_id.as_str());
        ready(Ok(()))
    }

    fn cancel(&self, call_id: &CallId, mode: CancelMode) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let result = self.call(call_id).map(|call| {
            *call.cancelled.lock().unwrap() = Some(mode);
            call.wake.notify_one();
        });
        ready(result)
    }

    fn acknowledge(&self, call_id: &CallId) -> BoxFuture<'static, Result<(), ToolFailure>> {
        let known = self.calls.lock().unwrap().remove(call_id.as_str());
        ready(known.map(|_| ()).ok_or_else(|| unknown(call_id)))
    }

    fn read_output(
        &self,
        call_id: &CallId,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<OutputChunk, ToolFailure>> {
        let result = self.call(call_id).map(|call| {
            let total = call.written.load(Ordering::SeqCst);
            let end = total.min(offset + max_bytes as u64);
            let bytes: Vec<u8> = (offset..end.max(offset)).map(|at| byte_at(&call.id, at)).collect();
            let over = call.over.load(Ordering::SeqCst) && offset + bytes.len() as u64 >= total;
            OutputChunk { stream, offset, bytes, end: over }
        });
        ready(result)
    }

    fn stdin(
        &self,
        call_id: &CallId,
        offset: u64,
        data: Vec<u8>,
        eof: bool,
    ) -> BoxFuture<'static, Result<u64, ToolFailure>> {
        let result = self.call(call_id).map(|call| {
            let mut input = call.stdin.lock().unwrap();
            let known = (input.len() as u64).saturating_sub(offset) as usize;
            input.extend(data.get(known..).unwrap_or_default());
            if eof {
                call.wake.notify_one();
            }
            input.len() as u64
        });
        ready(result)
    }

    fn resize(&self, call_id: &CallId, _columns: u16, _rows: u16) -> BoxFuture<'static, Result<(), ToolFailure>> {
        ready(self.call(call_id).map(|_| ()))
    }

    fn deadline(&self, boottime_ns: u64) -> BoxFuture<'static, Result<(), ToolFailure>> {
        self.fakes.deadlines.lock().unwrap().insert(self.id.to_string(), boottime_ns);
        ready(Ok(()))
    }

    fn freeze(&self, _frozen: bool) -> BoxFuture<'static, Result<(), ToolFailure>> {
        ready(Ok(()))
    }

    fn stop(&self) -> BoxFuture<'static, Result<(), ToolFailure>> {
        ready(Ok(()))
    }

    fn close(&self, _grace: Duration) -> BoxFuture<'static, ()> {
        self.fakes.closed.fetch_add(1, Ordering::SeqCst);
        let calls: Vec<_> = self.calls.lock().unwrap().values().cloned().collect();
        Box::pin(async move {
            for call in calls.iter().filter(|call| !call.over.load(Ordering::SeqCst)) {
                call.cancelled.lock().unwrap().get_or_insert(CancelMode::Kill);
                call.wake.notify_one();
                while !call.over.load(Ordering::SeqCst) && Arc::strong_count(call) > 2 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        })
    }

    fn lost(&self) -> BoxFuture<'static, String> {
        let mut lost = self.lost.subscribe();
        Box::pin(async move {
            let reason = lost.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
            match reason {
                Some(reason) => reason,
                None => std::future::pending().await,
            }
        })
    }
}
