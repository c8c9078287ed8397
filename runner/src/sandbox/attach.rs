//! A new runner takes over the sandboxes of an earlier one, and ends those that nobody wants.
//!
//! Bounded in time, because a sandbox that does not answer would delay everything a runner has to do at its start. What
//! cannot be taken over is ended: a sandbox that lives without anybody who reads it is of no use to its session. But not before
//! somebody has confirmed that this runner serves: where its state was set back, a newer one knows what this one does not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{error, info, warn};

use super::control::{Control, ControlEnd, ControlError, Patience, Resumed};
use super::launch::{Ended, LaunchError, ListedSandbox};
use super::live::{Known, LiveSandbox};
use super::measure::THROW_AWAY;
use super::{HostSandboxes, Unknown};
use crate::work::{Attached, CallId, Code, ExpectedCall, FoundCall, Gate, Processes, Receipt, SandboxId, ToolFailure};

/// How long the launcher may take to say where a sandbox is. It may be restarted at the same time, as an upgrade of both does.
const FIND_TIME: Duration = Duration::from_secs(15);
/// How long everything from there up to a usable sandbox may take.
const ATTACH_TIME: Duration = Duration::from_secs(2);
/// How long is waited for the end of a sandbox that could not be taken over; it goes on behind our back.
const KILL_TIME: Duration = Duration::from_secs(1);
/// Sandboxes that are ended side by side.
const KILLS_AT_ONCE: usize = 32;

/// Why a sandbox was not taken over.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It ended while no runner was there.
    #[error("the launcher holds no such sandbox")]
    Unknown,
    /// The launcher does not say.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Its process 1 does not answer as it should.
    #[error("process 1 of the sandbox cannot be used")]
    Control(#[from] ControlError),
    /// The socket leads to another sandbox.
    #[error("the socket of the sandbox leads to sandbox {found}")]
    WrongSandbox {
        /// Which answered.
        found: String,
    },
    /// It took too long.
    #[error("the launcher or the sandbox did not answer in time")]
    Late,
}

impl HostSandboxes {
    /// Takes over a sandbox of an earlier runner, or ends it.
    pub(super) async fn attach_live(
        &self,
        sandbox_id: SandboxId,
        receipt: Receipt,
        calls: Vec<ExpectedCall>,
    ) -> Result<Attached, ToolFailure> {
        // First, so that an ending behind the look at the list is noticed; one before it is an absence from the list.
        let ended = self.launcher.watch_ending(sandbox_id.as_str());
        let found = tokio::time::timeout(FIND_TIME, self.find(&sandbox_id)).await.unwrap_or(Err(AttachError::Late));
        let result = match found {
            Ok(listed) => {
                let attempt = self.take_over(&sandbox_id, listed, ended, receipt, calls);
                tokio::time::timeout(ATTACH_TIME, attempt).await.unwrap_or(Err(AttachError::Late))
            }
            Err(error) => Err(error),
        };
        let error = match result {
            Ok(TakenOver { sandbox, found, processes }) => {
                info!(%sandbox_id, pid = sandbox.pid(), calls = found.len(), "sandbox taken over");
                return Ok(Attached { sandbox: Arc::new(sandbox), found, processes });
            }
            Err(error) => error,
        };
        warn!(%sandbox_id, error = &error as &dyn std::error::Error, "sandbox was not taken over");
        let this = self.clone();
        let ending = tokio::spawn(async move { this.give_up(&sandbox_id).await });
        let _ = tokio::time::timeout(KILL_TIME, ending).await;
        Err(failure(&error))
    }

    /// Nobody counts on a sandbox of an earlier runner any more. It is ended, now or with the other unknown ones.
    pub(super) async fn give_up(&self, sandbox_id: &SandboxId) {
        // First, so that whoever ends the unknown ones from here on finds it among them.
        self.launcher.stop_watching(sandbox_id.as_str());
        if *self.unknown.borrow() == Unknown::Kept {
            return info!(%sandbox_id, "sandbox is left alone until somebody confirms that this runner serves");
        }
        if let Err(error) = self.launcher.kill(sandbox_id.as_str()).await {
            error!(%sandbox_id, error = &error as &dyn std::error::Error, "sandbox could not be ended");
        }
    }

    async fn find(&self, sandbox_id: &SandboxId) -> Result<ListedSandbox, AttachError> {
        loop {
            match self.launcher.find(sandbox_id.as_str()).await {
                // It went before it answered; its successor is asked again.
                Err(LaunchError::Interrupted) => tokio::task::yield_now().await,
                found => return found?.ok_or(AttachError::Unknown),
            }
        }
    }

    async fn take_over(
        &self,
        sandbox_id: &SandboxId,
        listed: ListedSandbox,
        ended: watch::Receiver<Option<Ended>>,
        receipt: Receipt,
        calls: Vec<ExpectedCall>,
    ) -> Result<TakenOver, AttachError> {
        let ListedSandbox { socket_name, pid, id_count, output_directory, frozen, .. } = listed;
        let path = self.socket_directory.join(socket_name);
        let held: Vec<CallId> =
            calls.iter().filter(|call| call.gate == Gate::Held).map(|call| call.call_id.clone()).collect();
        let patience = Patience::default();
        let Resumed { control, greeting, mut found, stopped } =
            Control::attach(&path, &output_directory, self.generation, patience, calls).await?;
        if greeting.sandbox_id != sandbox_id.as_str() {
            return Err(AttachError::WrongSandbox { found: format!("{:.80?}", greeting.sandbox_id) });
        }
        // What has not begun is handed over anew, in the turn that it has now.
        for call_id in held {
            if found.get(&call_id) == Some(&FoundCall::Prepared) {
                control.abort(call_id.as_str()).await?;
                found.remove(&call_id);
            }
        }
        let known = Known { sandbox_id: sandbox_id.clone(), pid, id_count, ended, frozen };
        let processes = match (stopped, frozen) {
            (true, _) => Processes::Ended,
            (false, true) => Processes::Frozen,
            (false, false) => Processes::Run,
        };
        Ok(TakenOver { sandbox: LiveSandbox::new(self.launcher.clone(), known, control, receipt), found, processes })
    }

    /// Counts on the sandboxes in `keep` and leaves all others alone until [`Sandboxes::end_unknown`], but for those of a
    /// measurement, in which nobody ever runs anything.
    ///
    /// # Errors
    /// The first [`LaunchError`]; the others are ended all the same.
    pub async fn count_on(&self, keep: &[SandboxId]) -> Result<(), LaunchError> {
        self.unknown.send_replace(Unknown::Kept);
        for sandbox_id in keep {
            drop(self.launcher.watch_ending(sandbox_id.as_str()));
        }
        self.end_uncounted(|entry| entry.sandbox_id.starts_with(THROW_AWAY)).await
    }

    /// Ends every sandbox that the launcher holds, also those that were `kept` until now and not taken over.
    ///
    /// # Errors
    /// As [`HostSandboxes::end_others`].
    pub async fn end_all(&self, kept: &[SandboxId]) -> Result<(), LaunchError> {
        for sandbox_id in kept {
            self.launcher.stop_watching(sandbox_id.as_str());
        }
        self.end_others(&[]).await
    }

    /// Ends every sandbox that the launcher holds, except for those in `keep` and those that somebody here counts on. From
    /// here those in `keep` are counted on, also when the launcher is restarted before they are taken over.
    ///
    /// # Errors
    /// The first [`LaunchError`]; the others are ended all the same.
    pub async fn end_others(&self, keep: &[SandboxId]) -> Result<(), LaunchError> {
        for sandbox_id in keep {
            drop(self.launcher.watch_ending(sandbox_id.as_str()));
        }
        self.unknown.send_replace(Unknown::Ending);
        self.launcher.all_are_known();
        let result = self.end_uncounted(|_| true).await;
        // What could not be ended is tried again with the next confirmation.
        self.unknown.send_replace(if result.is_ok() { Unknown::Ended } else { Unknown::Kept });
        result
    }

    async fn end_uncounted(&self, is_meant: impl Fn(&ListedSandbox) -> bool) -> Result<(), LaunchError> {
        let listed = self.launcher.list().await?;
        let is_other = |entry: &ListedSandbox| !self.launcher.counts_on(&entry.sandbox_id) && is_meant(entry);
        let mut others = listed.into_iter().filter(is_other);
        let mut result = Ok(());
        let mut kills = JoinSet::new();
        loop {
            for ListedSandbox { sandbox_id, .. } in others.by_ref().take(KILLS_AT_ONCE - kills.len()) {
                warn!(sandbox_id, "ending a sandbox that an earlier runner left");
                let launcher = self.launcher.clone();
                kills.spawn(async move { launcher.kill(&sandbox_id).await });
            }
            match kills.join_next().await {
                None => return result,
                Some(Ok(Err(error))) => result = result.and(Err(error)),
                Some(Ok(Ok(())) | Err(_)) => {}
            }
        }
    }
}

/// A sandbox that was taken over, and how it was found.
struct TakenOver {
    sandbox: LiveSandbox,
    found: BTreeMap<CallId, FoundCall>,
    processes: Processes,
}

/// What a caller is told; the rest is in the log.
fn failure(error: &AttachError) -> ToolFailure {
    let message = match error {
        AttachError::Unknown => "the sandbox ended while no runner was there".to_owned(),
        AttachError::Launch(_) => "the sandbox was given up, because the launcher did not say where it is".to_owned(),
        AttachError::Control(ControlError::Ended(ControlEnd::Violated(violation))) => {
            format!("the sandbox was given up, because it broke the protocol: {violation}")
        }
        AttachError::Control(_) | AttachError::WrongSandbox { .. } => {
            "the sandbox was given up, because it could not be spoken to".to_owned()
        }
        AttachError::Late => "the sandbox was given up, because it did not answer in time".to_owned(),
    };
    ToolFailure::new(Code::SandboxLost, message, "open a new session; what was changed in this one is gone")
}

#[cfg(test)]
#[path = "attach_tests.rs"]
mod tests;
