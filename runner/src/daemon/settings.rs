//! What the operator configured, as the settings of the parts.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::config::resolved::{CertificateFiles, Claude, Config, Orchestrator};
use crate::connector::backoff::Backoff;
use crate::connector::claude;
use crate::connector::dial::{Proxy, Target};
use crate::connector::enrollment::{self, Renewal, StoreError};
use crate::connector::orchestrator::{Capacity, Identity, Settings};
use crate::connector::tls::{self, TlsError, TlsFiles, TlsSource};
use crate::pressure::{self, judge::Marks};
use crate::session::core::IdlePolicy;
use crate::session::registry::{DESCRIPTORS_PER_SESSION, Reserve};
use crate::work::{Receipt, ResourceLimits, RunnerId};

/// Why the configuration does not describe a runner.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The name of the runner.
    #[error("runner.id: {0}")]
    RunnerId(#[from] crate::work::IdError),
    /// An address.
    #[error("{field}: {value:?} is not {form}")]
    Address {
        /// The field of the configuration.
        field: &'static str,
        /// What it says.
        value: String,
        /// What it should look like.
        form: &'static str,
    },
    /// No certificates.
    #[error(
        "no identity is stored in {}: get one with sandbox-runner enroll, or set ca_file, certificate_file and key_file in \
         [orchestrator]",
        directory.display()
    )]
    NotEnrolled {
        /// Where it would be.
        directory: PathBuf,
    },
    /// The authorities of a work queue.
    #[error("claude.ca_file: {0}")]
    Authorities(#[from] TlsError),
    /// The certificates of the link.
    #[error("the certificates of the link cannot be used")]
    Certificates(#[source] TlsError),
    /// The stored identity.
    #[error(transparent)]
    Enrollment(#[from] StoreError),
    /// The identity of the state directory.
    #[error("cannot keep the identity of this runner in {}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What is set aside for sandboxes. `descriptors` is what this process may open.
#[must_use]
pub fn reserve(config: &Config, descriptors: u64) -> Reserve {
    Reserve {
        max_sessions: usize::try_from(config.capacity.max_sessions).unwrap_or(usize::MAX),
        memory_bytes: config.capacity.memory_bytes,
        disk_bytes: config.capacity.disk_bytes,
        pids: config.capacity.pids,
        // A quarter, and at least one session's worth, stays with the runner itself.
        descriptors: (descriptors / 4 * 3).max(DESCRIPTORS_PER_SESSION),
    }
}

/// Limits of a session that names none.
#[must_use]
pub fn defaults(config: &Config) -> ResourceLimits {
    let sandbox = &config.sandbox;
    ResourceLimits {
        cpu_millis: sandbox.cpu_millis,
        memory_bytes: sandbox.memory_bytes,
        disk_bytes: sandbox.disk_bytes,
        pids: sandbox.pids,
    }
}

/// What becomes of sessions without calls.
#[must_use]
pub fn idle(config: &Config) -> IdlePolicy {
    IdlePolicy {
        freeze_after: config.idle.freeze_after_seconds.map(Duration::from_secs),
        stop_after: config.idle.stop_after_seconds.map(Duration::from_secs),
        end_after: config.idle.end_after_seconds.map(Duration::from_secs),
    }
}

/// What of the host is looked at, and when it is short of it.
#[must_use]
pub fn pressure(config: &Config) -> pressure::watch::Settings {
    let configured = config.pressure;
    pressure::watch::Settings {
        marks: Marks {
            disk_low_bytes: configured.disk_low_bytes,
            disk_critical_bytes: configured.disk_critical_bytes,
            memory_stall_percent: configured.memory_stall_percent,
            io_stall_percent: configured.io_stall_percent,
            cpu_stall_percent: configured.cpu_stall_percent,
        },
        // The journal is in the first; spools and files of sandboxes are below one of them.
        places: vec![("state", config.state_directory.clone()), ("run", config.run_directory.clone())],
    }
}

/// The link to the configured orchestrator, if there is one.
///
/// # Errors
/// `SettingsError` names the field or the file.
pub fn link(
    config: &Config,
    identity: Identity,
    receipt: Receipt,
    ephemeral: bool,
) -> Result<Option<Settings>, SettingsError> {
    let Some(orchestrator) = &config.orchestrator else { return Ok(None) };
    let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
    let target = target(orchestrator)?;
    let (tls, renewal) = match &orchestrator.files {
        Some(files) => (tls_files(files), None),
        None => {
            let directory = identity_directory(&config.state_directory);
            let renewal = Renewal { directory: directory.clone(), proxy: target.proxy.clone() };
            (enrollment::files(&directory), Some(renewal))
        }
    };
    Ok(Some(Settings {
        target,
        tls,
        renewal,
        identity,
        labels: config.labels.clone(),
        capacity: Capacity {
            max_sessions: count(config.capacity.max_sessions),
            max_running_calls: 512,
            cpu_millis: std::thread::available_parallelism().map_or(1, |n| n.get() as u64) * 1000,
            memory_bytes: config.capacity.memory_bytes,
            disk_bytes: config.capacity.disk_bytes,
            pids: config.capacity.pids,
        },
        receipt,
        ephemeral,
        backoff: Backoff::new(
            Duration::from_millis(orchestrator.reconnect_first_ms),
            Duration::from_millis(orchestrator.reconnect_most_ms),
        ),
        clock: boottime_ns,
    }))
}

/// The configured work queues. `instance_id` tells this process from every other one; one that is `ephemeral` leaves nothing to
/// the next.
///
/// # Errors
/// `SettingsError` names the field or the file.
pub fn queues(config: &Config, instance_id: &str, ephemeral: bool) -> Result<Vec<claude::Settings>, SettingsError> {
    config.claude.iter().map(|claude| queue(config, claude, instance_id, ephemeral)).collect()
}

fn queue(
    config: &Config,
    claude: &Claude,
    instance_id: &str,
    ephemeral: bool,
) -> Result<claude::Settings, SettingsError> {
    let count = |number| usize::try_from(number).unwrap_or(usize::MAX);
    Ok(claude::Settings {
        base: base(claude)?,
        environment_id: claude.environment_id.clone(),
        source: claude::Source::Queue { key_file: claude.key_file.clone() },
        handover: (!ephemeral).then(|| leases_file(&config.state_directory, &claude.environment_id)),
        board: claude::Board::new(&claude.environment_id),
        api_version: claude.api_version.clone(),
        workspace_id: claude.workspace_id.clone(),
        worker_id_header: claude.worker_id_header.clone(),
        worker_id: format!("{}-{instance_id}", config.runner_id),
        max_items: count(claude.max_sessions),
        max_sessions: count(config.capacity.max_sessions),
        max_idle: (claude.max_idle_seconds > 0).then(|| Duration::from_secs(claude.max_idle_seconds)),
        max_wait: (claude.max_wait_seconds > 0).then(|| Duration::from_secs(claude.max_wait_seconds)),
        parallel_threads: claude.parallel_threads,
        keep: Duration::from_secs(claude.keep_seconds),
        longest_command: Duration::from_secs(claude.max_command_seconds),
        clock: boottime_ns,
    })
}

/// Where the server of a queue is, and the way there.
///
/// # Errors
/// `SettingsError` names the field or the file.
pub fn base(claude: &Claude) -> Result<claude::Base, SettingsError> {
    let (is_plain, rest) = match claude.base_url.strip_prefix("http://") {
        Some(rest) => (true, rest),
        None => (false, claude.base_url.strip_prefix("https://").unwrap_or_default()),
    };
    let (authority, prefix) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let wrong = || SettingsError::Address {
        field: "claude.base_url",
        value: claude.base_url.clone(),
        form: "https://HOST:PORT/PREFIX",
    };
    let (host, port) = host_and_port(authority, if is_plain { 80 } else { 443 }).ok_or_else(wrong)?;
    let proxy = checked_proxy("claude.proxy", claude.proxy.as_deref())?;
    let tls = if is_plain { None } else { Some(tls::public_client(claude.ca_file.as_deref())?) };
    let prefix = format!("{prefix}{}", claude.api_path);
    Ok(claude::Base { target: Target { host, port, server_name: None, proxy }, tls, prefix })
}

/// One work item that was claimed by somebody else, in place of a queue. Nobody takes up its lease after it.
///
/// # Errors
/// `SettingsError` names the field or the file.
pub fn claim(config: &Config, claude: &Claude, claim: claude::Claim) -> Result<claude::Settings, SettingsError> {
    // It asks for no work, so nobody sees its name.
    let queue = queue(config, claude, "claim", true)?;
    Ok(claude::Settings { source: claude::Source::Claim(claim), ..queue })
}

/// Where the leases of an environment's work items are: in a directory of the runner's own, which that of the whole state may
/// not be.
fn leases_file(state_directory: &Path, environment_id: &str) -> PathBuf {
    identity_directory(state_directory).join(format!("work-queue-{environment_id}.json"))
}

/// Where the identity of a runner is.
#[must_use]
pub fn identity_directory(state_directory: &Path) -> PathBuf {
    state_directory.join("identity")
}

/// The certificate files that the operator keeps.
#[must_use]
pub fn tls_files(files: &CertificateFiles) -> TlsFiles {
    let CertificateFiles { ca_file, certificate_file, key_file } = files.clone();
    TlsFiles { authorities: ca_file, certificate: certificate_file, key: key_file }
}

/// Name of this runner: as its stored identity has it, where that is what it uses; else the configured one, and without one that
/// of its certificate.
///
/// # Errors
/// `SettingsError::NotEnrolled` where neither certificate files are configured nor an identity is stored,
/// `SettingsError::Certificates` where the configured ones are not usable.
pub fn runner_id(config: &Config) -> Result<String, SettingsError> {
    match &config.orchestrator {
        Some(Orchestrator { files: None, .. }) => {
            let directory = identity_directory(&config.state_directory);
            let about = enrollment::about(&directory)?.ok_or(SettingsError::NotEnrolled { directory })?;
            Ok(about.runner_id)
        }
        Some(Orchestrator { files: Some(files), .. }) if !config.runner_id_is_given => {
            let source = TlsSource::load(tls_files(files), SystemTime::now()).map_err(SettingsError::Certificates)?;
            source.runner_id().map(str::to_owned).map_err(SettingsError::Certificates)
        }
        _ => Ok(config.runner_id.clone()),
    }
}

/// An enrolment service at `endpoint`, on the way that leads to the orchestrator.
///
/// # Errors
/// `SettingsError::Address` names the field.
pub fn enrollment_target(config: &Config, endpoint: &str, server_name: Option<&str>) -> Result<Target, SettingsError> {
    let (host, port) = https(endpoint, "--endpoint")?;
    let proxy = config.orchestrator.as_ref().and_then(|orchestrator| orchestrator.proxy.as_deref());
    Ok(Target {
        host,
        port,
        server_name: server_name.map(str::to_owned),
        proxy: checked_proxy("orchestrator.proxy", proxy)?,
    })
}

fn https(endpoint: &str, field: &'static str) -> Result<(String, u16), SettingsError> {
    let parsed = endpoint.strip_prefix("https://").and_then(|rest| host_and_port(rest, 443));
    parsed.ok_or_else(|| SettingsError::Address { field, value: endpoint.to_owned(), form: "https://HOST:PORT" })
}

fn checked_proxy(field: &'static str, text: Option<&str>) -> Result<Option<Proxy>, SettingsError> {
    // Its text may hold a password, so the error does not repeat it.
    let wrong = || SettingsError::Address { field, value: "...".to_owned(), form: "http://[USER:PASSWORD@]HOST:PORT" };
    text.map(|text| proxy(text).ok_or_else(wrong)).transpose()
}

fn target(orchestrator: &Orchestrator) -> Result<Target, SettingsError> {
    let (host, port) = https(&orchestrator.endpoint, "orchestrator.endpoint")?;
    let proxy = checked_proxy("orchestrator.proxy", orchestrator.proxy.as_deref())?;
    Ok(Target { host, port, server_name: Some(orchestrator.server_name.clone()), proxy })
}

fn proxy(text: &str) -> Option<Proxy> {
    use base64::Engine;
    let rest = text.strip_prefix("http://")?;
    let (credentials, address) = match rest.rsplit_once('@') {
        Some((credentials, address)) => (Some(credentials), address),
        None => (None, rest),
    };
    let (host, port) = host_and_port(address, 3128)?;
    let encode = |text: &str| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(text));
    Some(Proxy { host, port, authorization: credentials.map(encode) })
}

fn host_and_port(text: &str, default: u16) -> Option<(String, u16)> {
    let text = text.strip_suffix('/').unwrap_or(text);
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, "")) => (host, default),
        Some((host, rest)) => (host, rest.strip_prefix(':')?.parse().ok()?),
        None => match text.split_once(':') {
            Some((host, port)) => (host, port.parse().ok()?),
            None => (text, default),
        },
    };
    let is_name = !host.is_empty() && !host.contains(['/', '@', ' ']);
    is_name.then(|| (host.to_owned(), port))
}

/// Who this process is: the name that is configured, the state directory, this process, and this boot of the machine.
///
/// # Errors
/// `SettingsError` names the field or the file.
pub fn identity(runner_id: &str, state_directory: &Path) -> Result<Identity, SettingsError> {
    let path = identity_directory(state_directory).join("state_id");
    let state_id = state_id(&path).map_err(|source| SettingsError::State { path, source })?;
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    Ok(Identity {
        runner_id: RunnerId::new(runner_id)?,
        state_id,
        instance_id: uuid::Uuid::new_v4().to_string(),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        kernel: read("/proc/sys/kernel/osrelease"),
    })
}

/// Written once; a copy of the directory elsewhere carries it along, which is how an orchestrator notices a copied disk.
fn state_id(path: &Path) -> io::Result<String> {
    match fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => return Ok(text.trim().to_owned()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    let state_id = uuid::Uuid::new_v4().to_string();
    let mut file = tempfile::Builder::new().prefix(".state_id").tempfile_in(parent)?;
    writeln!(file, "{state_id}")?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    // The name must survive a power cut as well.
    fs::File::open(parent)?.sync_all()?;
    Ok(state_id)
}

/// A clock that counts while the machine sleeps.
pub(super) fn boottime_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec()).unwrap_or(0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orchestrator(endpoint: &str, proxy: Option<&str>) -> Orchestrator {
        Orchestrator {
            endpoint: endpoint.into(),
            files: None,
            server_name: "o.example".into(),
            proxy: proxy.map(Into::into),
            reconnect_first_ms: 500,
            reconnect_most_ms: 30_000,
        }
    }

    #[test]
    fn endpoints_with_names_addresses_and_without_port_are_understood() {
        for (endpoint, host, port) in [
            ("https://o.example:8443", "o.example", 8443),
            ("https://o.example", "o.example", 443),
            ("https://[::1]:9/", "::1", 9),
            ("https://10.0.0.1", "10.0.0.1", 443),
        ] {
            let target = target(&orchestrator(endpoint, None)).unwrap();
            assert_eq!((target.host.as_str(), target.port), (host, port));
        }
    }

    #[test]
    fn malformed_addresses_are_refused_by_field_and_passwords_are_not_repeated() {
        let text = target(&orchestrator("http://o", None)).unwrap_err().to_string();
        assert_eq!(text, "orchestrator.endpoint: \"http://o\" is not https://HOST:PORT");
        let text = target(&orchestrator("https://o", Some("http://u:hunter2@p:x"))).unwrap_err().to_string();
        assert!(text.starts_with("orchestrator.proxy") && !text.contains("hunter2"), "{text}");
    }

    #[test]
    fn credentials_of_a_proxy_become_a_header_and_stay_out_of_renderings() {
        let target = target(&orchestrator("https://o", Some("http://u:p@proxy:8080"))).unwrap();
        assert!(!format!("{target:?}").contains("dTpw"));
        let proxy = target.proxy.unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy", 8080));
        assert_eq!(proxy.authorization.as_deref(), Some("Basic dTpw"));
    }

    #[test]
    fn name_that_is_not_configured_is_that_of_the_certificate() {
        let directory = tempfile::tempdir().unwrap();
        let authority = crate::dev::pki::Authority::new("ours").unwrap();
        let client = authority.client("runner-7", crate::dev::pki::Validity::Now).unwrap();
        let files = authority.write_client_files(directory.path(), &client).unwrap();
        let name = |id: &str| {
            let text = format!(
                "{id}[orchestrator]\nendpoint = \"https://o\"\nca_file = {:?}\ncertificate_file = {:?}\nkey_file = {:?}\n",
                files.authorities, files.certificate, files.key
            );
            runner_id(&crate::config::resolve::tests::resolved(&text).unwrap())
        };
        assert_eq!(name("").unwrap(), "runner-7");
        assert_eq!(name("[runner]\nid = \"configured\"\n").unwrap(), "configured");

        std::fs::write(&files.key, "").unwrap();
        assert!(matches!(name(""), Err(SettingsError::Certificates(TlsError::Content { .. }))));
    }

    #[test]
    fn identity_of_a_state_directory_is_written_once() {
        let directory = tempfile::tempdir().unwrap();
        let first = identity("runner-1", directory.path()).unwrap();
        let second = identity("runner-1", directory.path()).unwrap();
        assert_eq!(first.state_id, second.state_id);
        assert_ne!(first.instance_id, second.instance_id);
    }
}
