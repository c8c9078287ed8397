//! Refusals of a link that another attempt does not change: an operator has to. A trailer names them, so that nobody reads
//! a sentence to find out which one it is.

use std::fmt;

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// The trailer of the status that ends a link.
const TRAILER: &str = "refusal";

/// Why an orchestrator does not serve a runner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its certificate was revoked, by its name or by its serial number.
    CertificateRevoked,
    /// It greets under another name than its certificate has.
    IdentityMismatch,
    /// Another runner serves under this name.
    RunnerIdConflict,
    /// What it has on its disk is older than what it has told.
    StateRolledBack,
    /// It speaks no version of the protocol that the orchestrator speaks.
    VersionUnsupported,
}

impl Refusal {
    const ALL: [Self; 5] = [
        Self::CertificateRevoked,
        Self::IdentityMismatch,
        Self::RunnerIdConflict,
        Self::StateRolledBack,
        Self::VersionUnsupported,
    ];

    /// As it is written in the trailer and in logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CertificateRevoked => "CERT_REVOKED",
            Self::IdentityMismatch => "IDENTITY_MISMATCH",
            Self::RunnerIdConflict => "RUNNER_ID_CONFLICT",
            Self::StateRolledBack => "STATE_ROLLED_BACK",
            Self::VersionUnsupported => "PROTOCOL_VERSION_UNSUPPORTED",
        }
    }

    /// What an operator can do about it.
    #[must_use]
    pub fn remediation(self) -> &'static str {
        match self {
            Self::CertificateRevoked => {
                "ask whoever runs the orchestrator why; if it may serve again, get a new certificate with `sandbox-runner enroll`"
            }
            Self::IdentityMismatch => {
                "write the name that its certificate has as id into [runner], or give it a certificate of its own name"
            }
            Self::RunnerIdConflict => {
                "stop the runner that should not have this identity, and enrol it under a name and with a state directory of its own"
            }
            Self::StateRolledBack => {
                "put the newest state directory back and restart this runner, which leaves alone what runs (stopping it ends that); \
                 or, if that is gone, stop it and remove the journal and identity/state_id: then it begins anew, and what it held \
                 counts as lost"
            }
            Self::VersionUnsupported => "upgrade the older of runner and orchestrator",
        }
    }

    fn code(self) -> Code {
        match self {
            Self::CertificateRevoked | Self::IdentityMismatch => Code::PermissionDenied,
            Self::RunnerIdConflict => Code::AlreadyExists,
            Self::StateRolledBack | Self::VersionUnsupported => Code::FailedPrecondition,
        }
    }

    /// What ends a link with this refusal.
    pub(crate) fn status(self, message: impl Into<String>) -> Status {
        let mut metadata = MetadataMap::new();
        metadata.insert(TRAILER, MetadataValue::from_static(self.name()));
        Status::with_metadata(self.code(), message, metadata)
    }

    /// The refusal in a status, if it is one.
    pub(crate) fn of(status: &Status) -> Option<Self> {
        let name = status.metadata().get(TRAILER)?.to_str().ok()?;
        Self::ALL.into_iter().find(|refusal| refusal.name() == name)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "the orchestrator refuses this runner ({}): {}", self.name(), self.remediation())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_is_found_in_its_own_status_and_says_what_to_do() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::of(&refusal.status("no")), Some(refusal));
            assert!(refusal.to_string().contains(refusal.name()) && !refusal.remediation().is_empty());
        }
        assert_eq!(Refusal::of(&Status::permission_denied("CERT_REVOKED")), None);
    }
}
