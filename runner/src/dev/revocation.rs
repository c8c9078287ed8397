//! Whose a certificate is, and which ones are not good any more although they have not expired: a list of names and serial numbers,
//! looked at when a link is made and, for the link that is there, when the list changes.

use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::state::State;
use crate::connector::orchestrator::Refusal;

/// Whose certificates are refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// All of the runner with this id.
    Name(String),
    /// The one with this serial number, as it is in the certificate.
    Serial(Vec<u8>),
}

/// Whom a certificate names.
#[derive(Debug, Clone)]
pub(super) struct Holder {
    name: Option<String>,
    serial: Vec<u8>,
}

impl Holder {
    /// Of a certificate in DER.
    pub(super) fn of(certificate: &[u8]) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        Some(Self { name: name_in(&parsed), serial: serial_in(&parsed) })
    }
}

/// The last part of the first name of a certificate in DER.
pub(super) fn name_of(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    name_in(&parsed)
}

fn name_in(certificate: &X509Certificate<'_>) -> Option<String> {
    let names = certificate.subject_alternative_name().ok()??;
    let uri = names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    })?;
    uri.rsplit('/').next().map(str::to_owned)
}

/// Without the zero that only says that the number is not negative.
pub(super) fn serial_in(certificate: &X509Certificate<'_>) -> Vec<u8> {
    certificate.raw_serial().iter().copied().skip_while(|byte| *byte == 0).collect()
}

/// Why this certificate is refused to a runner that greets under this name, if it is not its own.
pub(super) fn mismatch(holder: &Holder, runner_id: &str) -> Option<String> {
    let named = holder.name.as_deref();
    (named != Some(runner_id))
        .then(|| format!("the certificate is of {}, and {runner_id} greets with it", named.unwrap_or("nobody")))
}

/// Why this certificate is refused, if it is.
pub(super) fn denial(state: &State, holder: &Holder) -> Option<String> {
    state.denied.iter().find_map(|denied| match denied {
        Denied::Name(name) => {
            (holder.name.as_ref() == Some(name)).then(|| format!("every certificate of {name} was revoked"))
        }
        Denied::Serial(serial) => (holder.serial == *serial).then(|| {
            let digits: String = serial.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("the certificate with serial number {digits} was revoked")
        }),
    })
}

/// Adds to the list, and ends the link that is there when it is of such a certificate.
pub(super) fn deny(state: &mut State, denied: Denied) {
    state.denied.push(denied);
    let holder = state.link.as_ref().and_then(|link| link.holder.clone());
    let Some(problem) = holder.and_then(|holder| denial(state, &holder)) else { return };
    if let Some(link) = state.link.take() {
        state.resumed = false;
        // A link whose queue is full ends as well, only without the reason; the next one hears it.
        let _ = link.sender.try_send(Err(Refusal::CertificateRevoked.status(problem)));
    }
}
