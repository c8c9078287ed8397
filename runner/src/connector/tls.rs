//! The certificates of the link: read from files, checked as one unit, replaced without a restart.
//!
//! Key, chain and authorities are taken together or not at all. A set that does not fit together is refused and the old
//! one stays in use: half a renewal must not take a runner off the air. System roots are never used.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::ring;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Where the files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Authorities that may sign the orchestrator's certificate, PEM.
    pub authorities: PathBuf,
    /// Our certificate and intermediates, PEM, leaf first.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// What is wrong with a set of files.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// Which of the three.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{what} {} is not usable: {problem}", path.display())]
    Content {
        /// Which of the three.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// The key belongs to another certificate.
    #[error("private key {} does not belong to certificate {}", key.display(), certificate.display())]
    Mismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        certificate: PathBuf,
    },
    /// The certificate is for another time.
    #[error("certificate {} is {problem}", path.display())]
    Time {
        /// The certificate file.
        path: PathBuf,
        /// Expired or not yet valid, and when.
        problem: String,
    },
    /// The certificate is not that of this runner.
    #[error("certificate {} {problem}; {fix}", path.display())]
    Runner {
        /// The certificate file.
        path: PathBuf,
        /// Whom it names.
        problem: String,
        /// What to write.
        fix: String,
    },
    /// The certificate names somebody else than before.
    #[error("certificate {} names {now}, this runner is {before}", path.display())]
    Identity {
        /// The certificate file.
        path: PathBuf,
        /// Who it names.
        now: String,
        /// Who it must name.
        before: String,
    },
}

impl TlsError {
    /// Whether only somebody who changes the configuration or the certificate's name can help. Files that are being replaced, and a
    /// clock that is not set yet, are good a little later.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Runner { .. } | Self::Identity { .. })
    }
}

/// A checked set.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// Ready to use: TLS 1.3 only, HTTP/2 only.
    pub config: Arc<ClientConfig>,
    /// Names in our certificate, the first one being the runner's.
    pub names: Vec<String>,
    /// Seconds since 1970 at which our certificate begins.
    pub not_before: i64,
    /// Seconds since 1970 at which our certificate ends.
    pub not_after: i64,
    /// SHA-256 of the authorities as they stand in their file: while authorities are replaced, it tells who has which.
    pub authorities_sha256: [u8; 32],
    digest: [u8; 32],
}

impl Credentials {
    /// SHA-256 of the whole set; another set has another one.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

/// Result of looking at the files again.
#[derive(Debug)]
pub enum Reload {
    /// The files are as before.
    Unchanged,
    /// A new set is in use for the next connection.
    Replaced,
    /// Files that were refused are gone again: they hold what is in use.
    Restored,
    /// The files have changed and are not usable; the old set stays.
    Kept(TlsError),
}

/// The set in use, and where the next one comes from.
#[derive(Debug)]
pub struct TlsSource {
    files: TlsFiles,
    current: Credentials,
    /// Of the last files that were refused, so that the same fault is reported once.
    refused: Option<[u8; 32]>,
}

impl TlsSource {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// `TlsError` names the file and what is wrong with it.
    pub fn load(files: TlsFiles, now: SystemTime) -> Result<Self, TlsError> {
        Self::load_with_grace(files, now, Duration::ZERO)
    }

    /// The same, and a certificate that has expired less than `grace` ago is taken: it opens no link, and is good for
    /// being renewed.
    ///
    /// # Errors
    /// `TlsError` names the file and what is wrong with it.
    pub fn load_with_grace(files: TlsFiles, now: SystemTime, grace: Duration) -> Result<Self, TlsError> {
        let bytes = read_files(&files)?;
        let current = check(&files, &bytes, now, grace)?;
        Ok(Self { files, current, refused: None })
    }

    /// The set in use.
    #[must_use]
    pub fn current(&self) -> &Credentials {
        &self.current
    }

    /// The runner that our certificate names first: as the last part of a URI, or as a whole host name.
    ///
    /// # Errors
    /// `TlsError::Runner` when it names nobody.
    pub fn runner_id(&self) -> Result<&str, TlsError> {
        let name = self.current.names.first().and_then(|name| name.rsplit('/').next()).filter(|name| !name.is_empty());
        name.ok_or_else(|| TlsError::Runner {
            path: self.files.certificate.clone(),
            problem: "has no subject alternative name, so it names no runner".to_owned(),
            fix: "get one whose name ends in /RUNNER-ID".to_owned(),
        })
    }

    /// Refuses a certificate of another runner: an orchestrator knows a runner by its certificate.
    ///
    /// # Errors
    /// `TlsError::Runner`.
    pub fn check_runner(&self, runner_id: &str) -> Result<(), TlsError> {
        let named = self.runner_id()?;
        if named == runner_id {
            return Ok(());
        }
        Err(TlsError::Runner {
            path: self.files.certificate.clone(),
            problem: format!("names runner {named}, and runner.id is {runner_id}"),
            fix: format!("write id = \"{named}\" into [runner], or name the certificate of {runner_id}"),
        })
    }

    /// Looks at the content of the files again. Links of old certificates are not touched.
    pub fn reload(&mut self, now: SystemTime) -> Reload {
        let bytes = match read_files(&self.files) {
            Ok(bytes) => bytes,
            Err(error) => {
                let digest = Sha256::digest(error.to_string()).into();
                let known = self.refused.replace(digest) == Some(digest);
                return if known { Reload::Unchanged } else { Reload::Kept(error) };
            }
        };
        let digest = digest_of(&bytes);
        if digest == self.current.digest {
            return if self.refused.take().is_some() { Reload::Restored } else { Reload::Unchanged };
        }
        if self.refused == Some(digest) {
            return Reload::Unchanged;
        }
        let checked = check(&self.files, &bytes, now, Duration::ZERO).and_then(|new| self.same_identity(new));
        match checked {
            Ok(credentials) => {
                self.current = credentials;
                self.refused = None;
                Reload::Replaced
            }
            Err(error) => {
                self.refused = Some(digest);
                Reload::Kept(error)
            }
        }
    }

    fn same_identity(&self, new: Credentials) -> Result<Credentials, TlsError> {
        if new.names.first() == self.current.names.first() {
            return Ok(new);
        }
        let name = |names: &[String]| names.first().cloned().unwrap_or_else(|| "nobody".to_owned());
        Err(TlsError::Identity {
            path: self.files.certificate.clone(),
            now: name(&new.names),
            before: name(&self.current.names),
        })
    }
}

/// Content of authorities, certificate and key.
pub(super) type Bytes = [Vec<u8>; 3];

/// Reads until two readings agree, a few times at most: whoever replaces files, or the link to their directory, may do so
/// between two of ours.
fn read_files(files: &TlsFiles) -> Result<Bytes, TlsError> {
    let mut last = read_once(files)?;
    for _ in 0..3 {
        let again = read_once(files)?;
        if again == last {
            break;
        }
        last = again;
    }
    Ok(last)
}

fn read_once(files: &TlsFiles) -> Result<Bytes, TlsError> {
    let one = |what, path: &Path| {
        std::fs::read(path).map_err(|source| TlsError::Read { what, path: path.to_owned(), source })
    };
    Ok([
        one("authorities", &files.authorities)?,
        one("certificate", &files.certificate)?,
        one("private key", &files.key)?,
    ])
}

fn digest_of(bytes: &Bytes) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in bytes {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Checks a set as a whole. `files` says what to call its parts.
///
/// # Errors
/// `TlsError` names the part and what is wrong with it.
pub(super) fn check(
    files: &TlsFiles,
    bytes: &Bytes,
    now: SystemTime,
    grace: Duration,
) -> Result<Credentials, TlsError> {
    let [authorities, certificate, key] = bytes;
    let fault = |what, path: &Path, problem: String| TlsError::Content { what, path: path.to_owned(), problem };
    let provider = Arc::new(ring::default_provider());

    let bad = |problem: String| fault("authorities", &files.authorities, problem);
    let mut roots = RootCertStore::empty();
    for authority in CertificateDer::pem_slice_iter(authorities) {
        roots.add(authority.map_err(|e| bad(e.to_string()))?).map_err(|e| bad(e.to_string()))?;
    }
    if roots.is_empty() {
        return Err(bad("it holds no certificate".to_owned()));
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|e| bad(e.to_string()))?;

    let bad = |problem: String| fault("certificate", &files.certificate, problem);
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(certificate).collect::<Result<_, _>>().map_err(|e| bad(e.to_string()))?;
    let leaf = chain.first().ok_or_else(|| bad("it holds no certificate".to_owned()))?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| bad(e.to_string()))?;
    let names = names_of(&parsed);
    let (not_before, not_after) = check_time(&files.certificate, &parsed, now, grace)?;

    let bad = |problem: String| fault("private key", &files.key, problem);
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| bad(e.to_string()))?;
    let signing = provider.key_provider.load_private_key(key.clone_key()).map_err(|e| bad(e.to_string()))?;
    if CertifiedKey::new(chain.clone(), signing).keys_match().is_err() {
        return Err(TlsError::Mismatch { key: files.key.clone(), certificate: files.certificate.clone() });
    }

    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| bad(e.to_string()))?
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(chain, key)
        .map_err(|e| bad(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let authorities_sha256 = Sha256::digest(authorities).into();
    let config = Arc::new(config);
    Ok(Credentials { config, names, not_before, not_after, authorities_sha256, digest: digest_of(bytes) })
}

/// For servers that know us by a token and not by a certificate: HTTP/1.1 over TLS 1.2 or 1.3. With `authorities` only those
/// are trusted, and without it the public ones that this program was built with.
///
/// # Errors
/// `TlsError` names the file and what is wrong with it.
pub fn public_client(authorities: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    match authorities {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(path) => {
            let what = "authorities";
            let bad = |problem: String| TlsError::Content { what, path: path.to_owned(), problem };
            let bytes = std::fs::read(path).map_err(|source| TlsError::Read { what, path: path.to_owned(), source })?;
            for authority in CertificateDer::pem_slice_iter(&bytes) {
                roots.add(authority.map_err(|e| bad(e.to_string()))?).map_err(|e| bad(e.to_string()))?;
            }
            if roots.is_empty() {
                return Err(bad("it holds no certificate".to_owned()));
            }
        }
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let mut config = config
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .expect("the provider has suites of both versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn names_of(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::URI(text) | GeneralName::DNSName(text) => Some((*text).to_owned()),
        _ => None,
    };
    names.value.general_names.iter().filter_map(text).collect()
}

/// Seconds since 1970.
pub(super) fn seconds_of(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

fn check_time(
    path: &Path,
    certificate: &X509Certificate<'_>,
    now: SystemTime,
    grace: Duration,
) -> Result<(i64, i64), TlsError> {
    let seconds = seconds_of(now);
    let validity = certificate.validity();
    let (not_before, not_after) = (validity.not_before.timestamp(), validity.not_after.timestamp());
    let problem = if seconds < not_before {
        format!("not valid before {}", validity.not_before)
    } else if seconds >= not_after.saturating_add(i64::try_from(grace.as_secs()).unwrap_or(i64::MAX)) {
        format!("expired since {}", validity.not_after)
    } else {
        return Ok((not_before, not_after));
    };
    Err(TlsError::Time { path: path.to_owned(), problem })
}
