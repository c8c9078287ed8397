//! Sandboxes of this host: how a launcher is started or reached, how sandboxes are made by it, and how their process 1 is
//! spoken to.
//!
//! Knows no session and no connector. Holds no privilege: everything that needs some is asked of the launcher, in words it
//! has agreed to before.

mod attach;
pub mod control;
pub mod home;
pub mod host;
pub mod identity;
pub mod image;
pub mod launch;
pub mod live;
pub mod measure;
pub mod packet;
pub mod receipt;
pub mod spec;
pub mod start;
mod victim;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;
use tracing::{debug, error, info};

pub use self::attach::AttachError;
use self::control::{Control, ControlEnd, Patience};
use self::launch::{Created, HostReport, LaunchError, Launcher};
use self::live::{Known, LiveSandbox};
use self::measure::Attempt;
use self::spec::{EnvironmentVariable, Limits, Rootfs, Spec, SpecError};
use crate::config::launcher_policy::PROFILE_DEFAULT;
use crate::work::{
    Attached, BoxFuture, Code, ExpectedCall, Receipt, RootfsChoice, Sandbox, SandboxId, SandboxRequest, Sandboxes,
    ToolFailure,
};

/// How long a new sandbox waits for the room that those without a session take.
const ROOM_PATIENCE: Duration = Duration::from_secs(60);
/// How long somebody who looks at numbers waits for those of the launcher.
const COUNTERS_TIME: Duration = Duration::from_secs(1);

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The request makes no sense.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The launcher did not make it.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// It was made, but its process 1 does not answer as it should; it is removed again.
    #[error("process 1 of the new sandbox cannot be used")]
    Control(#[source] ControlEnd),
    /// The socket leads to another sandbox.
    #[error("the socket of sandbox {expected} leads to sandbox {found}")]
    WrongSandbox {
        /// Which was made.
        expected: String,
        /// Which answered.
        found: String,
    },
}

impl CreateError {
    /// The launcher holds as many as it can.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Launch(LaunchError::Refused { code, .. }) if code == "NO_SLOT")
    }
}

/// Makes sandboxes with one launcher. Cheap to clone.
#[derive(Clone)]
pub struct HostSandboxes {
    launcher: Launcher,
    host: Arc<HostReport>,
    socket_directory: PathBuf,
    generation: u64,
    outlive: bool,
    measured: Arc<OnceLock<Measured>>,
    unknown: Arc<watch::Sender<Unknown>>,
}

/// What becomes of sandboxes of earlier runners that nobody here counts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unknown {
    /// Nobody has confirmed yet that they are nobody's.
    Kept,
    /// They are being ended.
    Ending,
    /// They are ended, and others would be at once.
    Ended,
}

/// The result of the attacks on the first sandbox; every later one is made the same way.
struct Measured {
    attempts: Vec<Attempt>,
    receipt: Receipt,
}

impl HostSandboxes {
    /// Uses `launcher`, whose sockets appear in `socket_directory`. `generation` tells this runner from earlier ones.
    pub fn new(launcher: Launcher, host: HostReport, socket_directory: PathBuf, generation: u64) -> Self {
        Self {
            launcher,
            host: Arc::new(host),
            socket_directory,
            generation,
            outlive: false,
            measured: Arc::default(),
            unknown: Arc::new(watch::Sender::new(Unknown::Ended)),
        }
    }

    /// The same, of a launcher that keeps sandboxes when its runner ends.
    #[must_use]
    pub fn outliving(self) -> Self {
        Self { outlive: true, ..self }
    }

    /// The same for a runner that follows on this one: newer, so that nobody in a sandbox obeys this one any more.
    #[must_use]
    pub fn of_next_runner(&self, generation: u64) -> Self {
        Self { generation, ..self.clone() }
    }

    /// What the launcher found out about the host.
    pub fn host(&self) -> &HostReport {
        &self.host
    }

    /// The launcher.
    pub fn launcher(&self) -> &Launcher {
        &self.launcher
    }

    /// Makes a sandbox and waits until it can take calls.
    ///
    /// # Errors
    /// [`CreateError`]; nothing is left behind then.
    pub async fn create_live(&self, spec: &Spec) -> Result<LiveSandbox, CreateError> {
        spec.validate()?;
        let sandbox_id = SandboxId::new(&spec.sandbox_id)
            .map_err(|error| SpecError { field: "sandbox_id", problem: error.to_string() })?;
        let created = self.launcher.create(spec).await?;
        let reported = receipt::receipt(&created.layers, created.id_count, &self.host);
        let receipt = match self.measured.get() {
            Some(measured) => measure::apply(reported, &measured.attempts, created.id_count, self.host.rootless),
            None => reported,
        };
        match self.greet(&created, &spec.sandbox_id).await {
            Ok(control) => {
                let took_us = u64::try_from(created.took.as_micros()).unwrap_or(u64::MAX);
                info!(%sandbox_id, pid = created.pid, took_us, tier = receipt.tier, "sandbox created");
                let Created { pid, id_count, ended, .. } = created;
                let known = Known { sandbox_id, pid, id_count, ended, frozen: false };
                Ok(LiveSandbox::new(self.launcher.clone(), known, control, receipt))
            }
            Err(error) => {
                // The error that matters is the first one; the launcher ends what it cannot kill now at its own end.
                let _ = self.launcher.kill(&spec.sandbox_id).await;
                Err(error)
            }
        }
    }

    /// The same behind the end of unknown sandboxes, where those take all the room.
    async fn create_in_turn(&self, spec: &Spec) -> Result<LiveSandbox, CreateError> {
        let mut unknown = self.unknown.subscribe();
        let is_over = *unknown.borrow() == Unknown::Ended;
        match self.create_live(spec).await {
            Err(error) if error.is_full() && !is_over => {
                // Nobody may ever confirm, and others wait for their turn.
                let over = unknown.wait_for(|unknown| *unknown == Unknown::Ended);
                drop(tokio::time::timeout(ROOM_PATIENCE, over).await);
                self.create_live(spec).await
            }
            result => result,
        }
    }

    /// Keeps the result of the first measurement.
    fn remember(&self, attempts: &[Attempt], receipt: &Receipt) {
        let _ = self.measured.set(Measured { attempts: attempts.to_vec(), receipt: receipt.clone() });
    }

    async fn greet(&self, created: &Created, sandbox_id: &str) -> Result<Control, CreateError> {
        let path = self.socket_directory.join(&created.socket_name);
        let root = &created.output_directory;
        let (control, greeting) =
            Control::connect(&path, root, self.generation, Patience::default()).await.map_err(CreateError::Control)?;
        if greeting.sandbox_id == sandbox_id {
            Ok(control)
        } else {
            let (expected, found) = (sandbox_id.to_owned(), format!("{:.80?}", greeting.sandbox_id));
            Err(CreateError::WrongSandbox { expected, found })
        }
    }
}

impl Sandboxes for HostSandboxes {
    fn outlive_us(&self) -> bool {
        self.outlive
    }

    fn create(&self, request: SandboxRequest) -> BoxFuture<'static, Result<Arc<dyn Sandbox>, ToolFailure>> {
        let this = self.clone();
        Box::pin(async move {
            let minimum = request.min_tier.clone();
            let sandbox = this.create_in_turn(&spec_of(request)?).await.map_err(create_failure)?;
            if let Err(failure) = check_tier(&sandbox.receipt(), &minimum) {
                sandbox.close(Duration::ZERO).await;
                return Err(failure);
            }
            Ok(Arc::new(sandbox) as Arc<dyn Sandbox>)
        })
    }

    fn attach(
        &self,
        sandbox_id: SandboxId,
        receipt: Receipt,
        calls: Vec<ExpectedCall>,
    ) -> BoxFuture<'static, Result<Attached, ToolFailure>> {
        let this = self.clone();
        Box::pin(async move { this.attach_live(sandbox_id, receipt, calls).await })
    }

    fn end_unknown(&self) -> BoxFuture<'static, ()> {
        let this = self.clone();
        Box::pin(async move {
            if *this.unknown.borrow() == Unknown::Ended {
                return;
            }
            if let Err(error) = this.end_others(&[]).await {
                error!(error = &error as &dyn std::error::Error, "a sandbox of an earlier runner could not be ended");
            }
        })
    }

    fn discard(&self, sandbox_id: SandboxId) -> BoxFuture<'static, ()> {
        let this = self.clone();
        Box::pin(async move { this.give_up(&sandbox_id).await })
    }

    fn receipt(&self) -> Receipt {
        match self.measured.get() {
            Some(measured) => measured.receipt.clone(),
            None => Receipt { tier: String::new(), ..receipt::receipt(&[], 0, &self.host) },
        }
    }

    fn counters(&self) -> BoxFuture<'static, BTreeMap<String, u64>> {
        let launcher = self.launcher.clone();
        Box::pin(async move {
            let mut counters = launcher.counted().all();
            match tokio::time::timeout(COUNTERS_TIME, launcher.counters()).await {
                Ok(Ok(of_launcher)) => counters.extend(of_launcher),
                Ok(Err(error)) => debug!(%error, "the launcher does not say what it has counted"),
                Err(_) => debug!("the launcher has not said in time what it has counted"),
            }
            counters
        })
    }

    fn gone(&self) -> BoxFuture<'static, String> {
        let launcher = self.launcher.clone();
        Box::pin(async move { launcher.gone().await })
    }
}

fn spec_of(request: SandboxRequest) -> Result<Spec, ToolFailure> {
    if !request.environment.name.is_empty() && request.environment.name != "host" {
        let name = &request.environment.name;
        return Err(ToolFailure::new(
            Code::EnvironmentInvalid,
            format!("environment {name:?} is not known here"),
            "leave the name empty for the default environment",
        ));
    }
    let rootfs = match request.environment.rootfs {
        None | Some(RootfsChoice::Host) => Rootfs::Host,
        Some(RootfsChoice::Directory(name)) => Rootfs::Directory(name),
    };
    let variable = |(name, value): (String, String)| EnvironmentVariable { name, value: value.into_bytes() };
    Ok(Spec {
        profile: PROFILE_DEFAULT.to_owned(),
        rootfs,
        limits: Limits {
            memory_bytes: request.limits.memory_bytes,
            cpu_millis: request.limits.cpu_millis,
            pids: request.limits.pids,
            disk_bytes: request.limits.disk_bytes,
        },
        orphan_timeout: request.orphan_timeout.filter(|time| !time.is_zero()),
        environment: request.variables.into_iter().map(variable).collect(),
        ..Spec::throw_away(request.sandbox_id.as_str())
    })
}

fn check_tier(receipt: &Receipt, minimum: &str) -> Result<(), ToolFailure> {
    if minimum.is_empty() {
        return Ok(());
    }
    let wanted: receipt::Tier = minimum
        .parse()
        .map_err(|problem: String| ToolFailure::invalid("min_tier", problem, "name a tier, or leave it empty"))?;
    let reached = receipt.tier.parse().unwrap_or(receipt::Tier::None);
    if reached >= wanted {
        return Ok(());
    }
    let missing = receipt::missing_for(&receipt.layers, wanted).join(", ");
    Err(ToolFailure::new(
        Code::TierUnavailable,
        format!("this host reaches tier {reached}, {wanted} was asked for; missing: {missing}"),
        "run sandbox-runner doctor on the host to see what would change it, or accept a lower tier",
    ))
}

fn create_failure(error: CreateError) -> ToolFailure {
    match error {
        CreateError::Spec(SpecError { field, problem }) => {
            ToolFailure::invalid(field, problem, "correct the named field")
        }
        CreateError::Launch(LaunchError::Refused { code, message, remediation, .. }) => {
            let code = match code.as_str() {
                "INVALID_FIELD" | "NOT_ALLOWED" | "SANDBOX_EXISTS" | "NOT_SUPPORTED" => Code::EnvironmentInvalid,
                "NO_SLOT" => Code::Capacity,
                "LAYER_MISSING" => Code::TierUnavailable,
                _ => Code::SandboxCreateFailed,
            };
            let remediation =
                if remediation.is_empty() { "run sandbox-runner doctor on the host".to_owned() } else { remediation };
            ToolFailure::new(code, message, remediation)
        }
        other => {
            tracing::error!(error = &other as &dyn std::error::Error, "sandbox could not be created");
            ToolFailure::new(
                Code::SandboxCreateFailed,
                "the sandbox could not be created",
                "try again; if it fails again, run sandbox-runner doctor on the host",
            )
        }
    }
}
