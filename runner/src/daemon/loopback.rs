//! A daemon in the process of its own orchestrator, for the demo and the benchmarks.
//!
//! Configured as any other, only in memory; it has no administration socket, and a journal when it is asked to.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit};

use super::settings::{self, SettingsError};
use super::{Daemon, DaemonError, Parts};
use crate::config::file::{ConfigFile, LimitsSection, OrchestratorSection, RunnerSection};
use crate::config::launcher_policy::HostSize;
use crate::config::resolve::resolve;
use crate::config::resolved::Host;
use crate::connector::tls::TlsFiles;
use crate::journal::{FileJournal, Journal, OpenError, Recovered, Volatile};
use crate::pressure;
use crate::work::{Receipt, Sandboxes};

/// What such a daemon is told.
#[derive(Debug)]
pub struct Loopback<'a> {
    /// Its name.
    pub runner_id: &'a str,
    /// Where it dials.
    pub dialled: SocketAddr,
    /// Its certificates.
    pub files: TlsFiles,
    /// What it keeps is below it.
    pub state_directory: PathBuf,
    /// Its sockets are below it.
    pub run_directory: PathBuf,
    /// What it believes to be the size of its host.
    pub size: HostSize,
    /// What protects its sandboxes.
    pub receipt: Receipt,
    /// Sessions at once; missing means the default.
    pub max_sessions: Option<u64>,
    /// Whether it keeps a journal; then it goes on with what an earlier one has left in the state directory.
    pub durable: bool,
}

/// Why it could not begin.
#[derive(Debug, thiserror::Error)]
pub enum LoopbackError {
    /// The configuration, with every problem.
    #[error("the configuration does not hold: {0}")]
    Config(String),
    /// The configuration describes no runner.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] OpenError),
    /// The parts.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
}

impl Loopback<'_> {
    /// Builds the daemon, which begins to dial.
    ///
    /// # Errors
    /// [`LoopbackError`].
    pub fn start(self, sandboxes: Arc<dyn Sandboxes>) -> Result<Daemon, LoopbackError> {
        let file = ConfigFile {
            orchestrator: Some(OrchestratorSection {
                endpoint: Some(format!("https://{}", self.dialled)),
                ca_file: Some(self.files.authorities),
                certificate_file: Some(self.files.certificate),
                key_file: Some(self.files.key),
                server_name: Some("localhost".to_owned()),
                ..OrchestratorSection::default()
            }),
            runner: RunnerSection {
                id: Some(self.runner_id.to_owned()),
                state_directory: Some(self.state_directory),
                run_directory: Some(self.run_directory),
                ..RunnerSection::default()
            },
            limits: LimitsSection { max_sessions: self.max_sessions, ..LimitsSection::default() },
            ..ConfigFile::default()
        };
        // Admission shall not be what decides here: more disk and processes than any demo or benchmark asks for.
        let host = Host {
            size: self.size,
            free_disk_bytes: 64 << 30,
            pids: 32_768,
            hostname: self.runner_id.to_owned(),
            credentials_directory: None,
        };
        let config = resolve(format!("({})", self.runner_id).as_ref(), &file, &host).map_err(|problems| {
            LoopbackError::Config(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })?;
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(now, _)| now);
        let identity = settings::identity(&config.runner_id, &config.state_directory)?;
        let (journal, recovered): (Arc<dyn Journal>, _) = if self.durable {
            let directory = config.state_directory.join("journal");
            let (journal, recovered) = FileJournal::open(&directory, &identity.state_id, &identity.boot_id)?;
            (Arc::new(journal), recovered)
        } else {
            (Arc::new(Volatile), Recovered::default())
        };
        Ok(Daemon::start(Parts {
            sandboxes,
            journal,
            recovered,
            reserve: settings::reserve(&config, descriptors),
            defaults: settings::defaults(&config),
            idle: settings::idle(&config),
            // What is shown and compared is of this moment, and nobody places work elsewhere.
            pressure: pressure::watch::Settings::default(),
            queues: settings::queues(&config, &identity.instance_id, !self.durable)?,
            link: settings::link(&config, identity, self.receipt, !self.durable)?,
            admin: None,
            drain_time: Duration::from_secs(5),
        })?)
    }
}
