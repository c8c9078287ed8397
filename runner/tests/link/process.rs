//! A daemon as its process runs it: until a signal or a reason of its own ends it. With its orchestrator and one session.

use std::sync::Arc;
use std::time::Duration;

use proto::runner::v1 as pb;
use runner::daemon::{Daemon, End, Parts, Unasked};
use runner::dev::{LinkSettings, Orchestrator, Session};
use runner::journal::Journal;
use runner::shutdown::Signals;
use runner::systemd::{Environment, Notifier};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinHandle;

use crate::fake::{FakeSandboxes, Fakes};
use crate::world::{DEFAULTS, RESERVE, settings, within};

/// All daemons of this process hear the same signals.
static SIGNALS: Mutex<()> = Mutex::const_new(());

pub struct Process {
    pub orchestrator: Orchestrator,
    pub session: Session,
    pub fakes: Arc<Fakes>,
    pub running: JoinHandle<Result<End, Unasked>>,
    _directory: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Process {
    pub async fn start(journal: Arc<dyn Journal>) -> Self {
        let alone = SIGNALS.lock().await;
        let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let files = orchestrator.write_client_files(directory.path(), "runner-1").unwrap();
        let fakes = Arc::new(Fakes::default());
        let daemon = Daemon::start(Parts {
            sandboxes: Arc::new(FakeSandboxes(Arc::clone(&fakes))),
            journal,
            recovered: Default::default(),
            reserve: RESERVE,
            defaults: DEFAULTS,
            link: Some(settings(orchestrator.address().port(), files)),
            queues: Vec::new(),
            admin: None,
            drain_time: Duration::from_secs(3600),
            idle: Default::default(),
            pressure: Default::default(),
        })
        .unwrap();
        let signals = Signals::listen().unwrap();
        let running = tokio::spawn(async move {
            let notifier = Notifier::new(&Environment::default(), 0).unwrap();
            daemon.run(signals, &notifier).await
        });
        let request = pb::OpenSession { session_id: "s".into(), ..Default::default() };
        let session = within("session", orchestrator.open_session(request)).await.unwrap();
        Self { orchestrator, session, fakes, running, _directory: directory, _alone: alone }
    }
}
