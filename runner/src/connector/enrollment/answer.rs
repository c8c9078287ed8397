//! What a service has answered, checked before anything of it is kept.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};

use super::EnrollError;
use super::store::{About, Set, files};
use crate::connector::dial::Target;
use crate::connector::tls::{check, seconds_of};
use crate::work::RunnerId;

/// Certificates in a chain or a bundle.
const MOST_CERTIFICATES: usize = 16;

/// An answer of either kind.
pub(super) struct Answer {
    /// Told at the first contact, known at a renewal.
    pub(super) runner_id: String,
    /// Leaf first, DER.
    pub(super) chain: Vec<Vec<u8>>,
    /// DER.
    pub(super) bundle: Vec<Vec<u8>>,
    pub(super) endpoints: Vec<String>,
    pub(super) renew_after: Option<prost_types::Timestamp>,
}

impl Answer {
    /// Makes a set of it, when all of it fits together: our key, the name, the times, and the authorities. `name` is who
    /// we are already, at a renewal.
    pub(super) fn into_set(
        self,
        key_pem: &str,
        name: Option<&str>,
        target: &Target,
        directory: &Path,
        now: SystemTime,
    ) -> Result<Set, EnrollError> {
        let bad = |problem: String| EnrollError::Answer { problem };
        for (what, list) in [("chain_der", &self.chain), ("trust_bundle_der", &self.bundle)] {
            if list.is_empty() || list.len() > MOST_CERTIFICATES {
                let count = list.len();
                return Err(bad(format!("{what} holds {count} certificates, 1 to {MOST_CERTIFICATES} are expected")));
            }
        }
        if let Err(error) = RunnerId::new(&self.runner_id) {
            return Err(bad(error.to_string()));
        }
        let bytes = [pem(&self.bundle), pem(&self.chain), key_pem.to_owned()];
        let [authorities, certificate, key] = &bytes;
        // The same check that the daemon makes, so that what is stored is what it takes.
        let parts = [authorities.as_bytes().to_vec(), certificate.as_bytes().to_vec(), key.as_bytes().to_vec()];
        let found = check(&files(directory), &parts, now, Duration::ZERO).map_err(|error| bad(error.to_string()))?;
        check_names(&found.names, &self.runner_id)?;
        if let (Some(before), Some(now)) = (name, found.names.first())
            && before != now
        {
            return Err(bad(format!("the certificate names {now}, this runner is {before}")));
        }
        check_chain(&self.chain, &self.bundle, now)?;
        let [authorities_pem, certificate_pem, key_pem] = bytes;
        Ok(Set {
            authorities_pem,
            certificate_pem,
            key_pem,
            about: About {
                host: target.host.clone(),
                port: target.port,
                server_name: target.server_name.clone(),
                endpoints: self.endpoints,
                renew_after: self.renew_after.map(|time| time.seconds),
                ..About::new(self.runner_id)
            },
        })
    }
}

/// The first name is who we are: `spiffe://TRUST-DOMAIN/runner/POOL/RUNNER-ID`.
fn check_names(names: &[String], runner_id: &str) -> Result<(), EnrollError> {
    let bad = |problem: String| Err(EnrollError::Answer { problem });
    let Some(name) = names.first() else {
        return bad("the certificate has no subject alternative name, so it names nobody".to_owned());
    };
    let parts = name.strip_prefix("spiffe://").map(|rest| rest.split('/').collect::<Vec<_>>()).unwrap_or_default();
    match parts.as_slice() {
        [domain, "runner", pool, id] if !domain.is_empty() && !pool.is_empty() && *id == runner_id => Ok(()),
        _ => bad(format!("the certificate names {name}, and not spiffe://TRUST-DOMAIN/runner/POOL/{runner_id}")),
    }
}

fn check_chain(chain: &[Vec<u8>], bundle: &[Vec<u8>], now: SystemTime) -> Result<(), EnrollError> {
    let bad = |problem: String| EnrollError::Answer { problem };
    let mut roots = RootCertStore::empty();
    for authority in bundle {
        roots.add(CertificateDer::from(authority.as_slice()).into_owned()).map_err(|e| bad(e.to_string()))?;
    }
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| bad(error.to_string()))?;
    let mut certificates = chain.iter().map(|der| CertificateDer::from(der.as_slice()));
    let leaf = certificates.next().ok_or_else(|| bad("chain_der is empty".to_owned()))?;
    let rest: Vec<_> = certificates.collect();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(seconds_of(now)).unwrap_or(0)));
    verifier
        .verify_client_cert(&leaf, &rest, now)
        .map(drop)
        .map_err(|error| bad(format!("the certificate is not of an authority in trust_bundle_der: {error}")))
}

fn pem(certificates: &[Vec<u8>]) -> String {
    let mut text = String::new();
    for der in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = base64::engine::general_purpose::STANDARD.encode(der);
        for (position, character) in encoded.chars().enumerate() {
            if position > 0 && position % 64 == 0 {
                text.push('\n');
            }
            text.push(character);
        }
        text.push_str("\n-----END CERTIFICATE-----\n");
    }
    text
}
