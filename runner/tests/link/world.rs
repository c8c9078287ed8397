//! A runner without real sandboxes, and an orchestrator that talks to it through a proxy that can cut the wire.

use std::sync::Arc;
use std::time::Duration;

use proto::runner::v1 as pb;
use runner::connector::Ports;
use runner::connector::backoff::Backoff;
use runner::connector::dial::Target;
use runner::connector::enrollment::Renewal;
use runner::connector::orchestrator::{self, Capacity, Handle, Identity, Settings, Stop};
use runner::connector::tls::{TlsError, TlsFiles};
use runner::dev::{LinkSettings, Orchestrator};
use runner::journal::{Journal, JournalMemory, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession, Volatile};
use runner::session::core::Config;
use runner::session::registry::{Registry, Reserve};
use runner::session::{SessionHandle, Sessions};
use runner::work::*;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};

use crate::fake::{FakeSandboxes, Fakes};

pub const RESERVE: Reserve =
    Reserve { max_sessions: 64, memory_bytes: 1 << 40, disk_bytes: 1 << 40, pids: 1 << 20, descriptors: 1 << 16 };
pub const DEFAULTS: ResourceLimits =
    ResourceLimits { cpu_millis: 1000, memory_bytes: 1 << 28, disk_bytes: 1 << 28, pids: 128 };

pub struct World {
    pub orchestrator: Orchestrator,
    pub fakes: Arc<Fakes>,
    pub sessions: SessionHandle,
    pub connector: Handle,
    pub stop: watch::Sender<Stop>,
    pub wire: Wire,
    pub files: TlsFiles,
    _directory: tempfile::TempDir,
}

pub struct Options {
    pub link: LinkSettings,
    pub core: Config,
    pub reserve: Reserve,
    pub journal: Arc<dyn Journal>,
    pub recovered: Recovered,
    pub renewal: Option<Renewal>,
    /// Of the process, and of the state directory.
    pub instance: &'static str,
    pub state: &'static str,
    pub ephemeral: bool,
    pub backoff: Backoff,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            link: LinkSettings::default(),
            core: Config::default(),
            reserve: RESERVE,
            journal: Arc::new(Volatile),
            recovered: Recovered::default(),
            renewal: None,
            instance: "instance",
            state: "state",
            ephemeral: true,
            backoff: Backoff::new(Duration::from_millis(1), Duration::from_millis(20)),
        }
    }
}

impl World {
    pub async fn new(options: Options) -> Self {
        let orchestrator = Orchestrator::start(options.link).await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let files = orchestrator.write_client_files(directory.path(), "runner-1").unwrap();
        let wire = Wire::to(orchestrator.address().port()).await;
        let Runner { fakes, sessions, connector, stop } = Runner::dial(wire.port, files.clone(), options);
        Self { orchestrator, fakes, sessions, connector, stop, wire, files, _directory: directory }
    }

    pub async fn session(&self, session_id: &str) -> runner::dev::Session {
        let request = pb::OpenSession { session_id: session_id.into(), ..Default::default() };
        self.orchestrator.open_session(request).await.unwrap()
    }
}

/// A runner with sandboxes in memory.
pub struct Runner {
    pub fakes: Arc<Fakes>,
    pub sessions: SessionHandle,
    pub connector: Handle,
    pub stop: watch::Sender<Stop>,
}

impl Runner {
    /// Starts one that dials a port of this machine.
    pub fn dial(port: u16, files: TlsFiles, options: Options) -> Self {
        Self::try_dial(port, files, options).unwrap()
    }

    /// The same, with what is wrong with the certificates.
    pub fn try_dial(port: u16, files: TlsFiles, options: Options) -> Result<Self, TlsError> {
        let fakes = Arc::new(Fakes::default());
        let memory = Arc::new(JournalMemory::new(Arc::clone(&options.journal), &options.recovered));
        let (sessions, updates) = Sessions {
            config: options.core,
            registry: Registry::new(options.reserve, DEFAULTS),
            sandboxes: Arc::new(FakeSandboxes(Arc::clone(&fakes))),
            journal: options.journal,
            recovered: options.recovered,
            clock: boottime_ns,
        }
        .start();
        let (stop, stopped) = watch::channel(Stop::Run);
        let ports = Ports {
            work: sessions.work.clone(),
            updates,
            outputs: Arc::new(sessions.outputs.clone()),
            progress: sessions.progress.clone(),
            memory,
            pressure: calm(),
            counters: sessions.counters.clone(),
        };
        let plain = settings(port, files);
        let (instance_id, state_id) = (options.instance.into(), options.state.into());
        let settings = Settings {
            renewal: options.renewal,
            identity: Identity { instance_id, state_id, ..plain.identity },
            ephemeral: options.ephemeral,
            backoff: options.backoff,
            ..plain
        };
        let connector = orchestrator::start(settings, ports, stopped)?;
        Ok(Self { fakes, sessions, connector, stop })
    }
}

/// What an earlier runner has left: session `s` in a sandbox, and this call in it.
pub fn left(call_id: &str, phase: RecoveredPhase, sandbox: Option<&str>) -> Recovered {
    let session_id = SessionId::new("s").unwrap();
    let open = SessionOpen {
        session_id: session_id.clone(),
        epoch: 1,
        digest: RequestDigest([0; 32]),
        environment: EnvironmentRef::default(),
        limits: DEFAULTS,
        network: Network::None,
        variables: Vec::new(),
        min_tier: String::new(),
        orphan_timeout: None,
        idle_timeout: None,
        max_concurrent_calls: 0,
        tenant: String::new(),
    };
    let call = ToolCall {
        call_id: CallId::new(call_id).unwrap(),
        session_id,
        epoch: 1,
        digest: RequestDigest([0; 32]),
        input: ToolInput::Bash(BashInput { command: Some("exit 0".into()), restart: false }),
        limits: CallLimits::default(),
        output_mode: OutputMode::Merged,
        quiet: false,
    };
    let sandbox = sandbox.map(|id| (SandboxId::new(id).unwrap(), Receipt::default()));
    Recovered {
        sessions: vec![RecoveredSession { open, sandbox, acknowledged: Vec::new() }],
        calls: vec![RecoveredCall { call, cancel: None, phase, starts: 0, resumes: Some(0) }],
        same_boot: true,
        events_through: 10_000,
        ..Recovered::default()
    }
}

/// A host that is short of nothing.
pub fn calm() -> watch::Receiver<Arc<Pressure>> {
    watch::channel(Arc::default()).1
}

pub fn settings(port: u16, tls: TlsFiles) -> Settings {
    Settings {
        target: Target { host: "127.0.0.1".into(), port, server_name: Some("localhost".into()), proxy: None },
        tls,
        renewal: None,
        identity: Identity {
            runner_id: RunnerId::new("runner-1").unwrap(),
            state_id: "state".into(),
            instance_id: "instance".into(),
            boot_id: "boot".into(),
            kernel: "test".into(),
        },
        labels: Default::default(),
        capacity: Capacity::default(),
        receipt: Default::default(),
        ephemeral: true,
        backoff: Backoff::new(Duration::from_millis(1), Duration::from_millis(20)),
        clock: boottime_ns,
    }
}

pub fn boottime_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map(|t| (t.tv_sec() as u64) * 1_000_000_000 + t.tv_nsec() as u64)
        .unwrap()
}

/// A TCP proxy whose connections can be cut at any byte.
pub struct Wire {
    pub port: u16,
    cut: broadcast::Sender<()>,
}

impl Wire {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let cut = broadcast::channel(16).0;
        let cuts = cut.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut cut = cuts.subscribe();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let _ = near.set_nodelay(true);
                    let _ = far.set_nodelay(true);
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = cut.recv() => {}
                    }
                });
            }
        });
        Self { port: own, cut }
    }

    /// Cuts everything that is connected now.
    pub fn cut(&self) {
        let _ = self.cut.send(());
    }
}

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let patience = Duration::from_secs(60) * patience();
    tokio::time::timeout(patience, future).await.unwrap_or_else(|_| panic!("{what}: not within {patience:?}"))
}

/// How many times slower than a real one this machine is: `SANDBOX_TEST_PATIENCE`, for emulated ones.
pub fn patience() -> u32 {
    std::env::var("SANDBOX_TEST_PATIENCE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}
