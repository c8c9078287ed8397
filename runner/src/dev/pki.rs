//! Throw-away certificates: an authority, servers and clients, good ones and ones that must be refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::connector::tls::TlsFiles;

/// What can go wrong when certificates are made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The generator refused.
    #[error("cannot make a certificate for {name}: {source}")]
    Generate {
        /// Whose.
        name: String,
        /// Why.
        source: rcgen::Error,
    },
    /// TLS refused what was made.
    #[error("cannot use the certificate of {name}: {problem}")]
    Use {
        /// Whose.
        name: String,
        /// Why.
        problem: String,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// When a certificate is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// From an hour ago, for a day.
    Now,
    /// Until an hour ago.
    Expired,
    /// From tomorrow.
    NotYet,
    /// From a day ago, for as many seconds from now.
    Seconds(u32),
}

/// An authority that signs for this process and nobody else.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// A certificate with its key, PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub certificate_pem: String,
    /// Its key.
    pub key_pem: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").finish_non_exhaustive()
    }
}

impl Issued {
    /// Serial number of the certificate, as a list of revoked ones names it.
    ///
    /// # Errors
    /// `PkiError::Use` when the certificate is none.
    pub fn serial(&self) -> Result<Vec<u8>, PkiError> {
        let failed = |problem: String| PkiError::Use { name: "somebody".to_owned(), problem };
        let der = CertificateDer::from_pem_slice(self.certificate_pem.as_bytes()).map_err(|e| failed(e.to_string()))?;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|e| failed(e.to_string()))?;
        Ok(super::revocation::serial_in(&parsed))
    }
}

impl Authority {
    /// A new authority.
    ///
    /// # Errors
    /// `PkiError::Generate`.
    pub fn new(name: &str) -> Result<Self, PkiError> {
        let failed = |source| PkiError::Generate { name: name.to_owned(), source };
        let mut params = params(name, Validity::Now);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(failed)?;
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(failed)?;
        Ok(Self { issuer })
    }

    /// The authority's own certificate.
    #[must_use]
    pub fn certificate_pem(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for an orchestrator that is reached as `name`.
    ///
    /// # Errors
    /// `PkiError::Generate`.
    pub fn server(&self, name: &str, validity: Validity) -> Result<Issued, PkiError> {
        let failed = |source| PkiError::Generate { name: name.to_owned(), source };
        let alternative = match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.try_into().map_err(failed)?),
        };
        self.issue(name, leaf_params(name, alternative, ExtendedKeyUsagePurpose::ServerAuth, validity))
    }

    /// A certificate for the runner `runner_id`.
    ///
    /// # Errors
    /// `PkiError::Generate`.
    pub fn client(&self, runner_id: &str, validity: Validity) -> Result<Issued, PkiError> {
        self.issue(runner_id, client_params(runner_id, validity)?)
    }

    /// A certificate for a client that names nobody.
    ///
    /// # Errors
    /// `PkiError::Generate`.
    pub fn nameless(&self) -> Result<Issued, PkiError> {
        let mut params = client_params("nobody", Validity::Now)?;
        params.subject_alt_names.clear();
        self.issue("nobody", params)
    }

    fn issue(&self, name: &str, params: CertificateParams) -> Result<Issued, PkiError> {
        let failed = |source| PkiError::Generate { name: name.to_owned(), source };
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Issued { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// Settings for a server that wants a client certificate of this authority: TLS 1.3 and HTTP/2 only.
    ///
    /// # Errors
    /// `PkiError::Use`.
    pub fn server_config(&self, server: &Issued) -> Result<rustls::ServerConfig, PkiError> {
        server_config(&[self], server)
    }

    /// A certificate for the key of a request, which has to prove that its sender has that key.
    ///
    /// # Errors
    /// `PkiError::Use` when the request is not one, `PkiError::Generate`.
    pub fn client_for(&self, csr_der: &[u8], runner_id: &str, validity: Validity) -> Result<Vec<u8>, PkiError> {
        let failed = |source| PkiError::Generate { name: runner_id.to_owned(), source };
        let request = CertificateSigningRequestParams::from_der(&csr_der.into());
        let mut request = request
            .map_err(|error| PkiError::Use { name: runner_id.to_owned(), problem: format!("csr_der: {error}") })?;
        // What the request asks for does not count.
        request.params = client_params(runner_id, validity)?;
        let certificate = request.signed_by(&self.issuer).map_err(failed)?;
        Ok(certificate.der().to_vec())
    }

    /// The authority's own certificate, DER.
    #[must_use]
    pub fn certificate_der(&self) -> Vec<u8> {
        self.issuer.der().to_vec()
    }

    /// Writes what a runner needs into `directory`: this authority, and `client` with its key.
    ///
    /// # Errors
    /// `PkiError::Write`.
    pub fn write_client_files(&self, directory: &Path, client: &Issued) -> Result<TlsFiles, PkiError> {
        let files = TlsFiles {
            authorities: directory.join("authorities.pem"),
            certificate: directory.join("certificate.pem"),
            key: directory.join("key.pem"),
        };
        for (path, text) in [
            (&files.authorities, self.certificate_pem()),
            (&files.certificate, client.certificate_pem.clone()),
            (&files.key, client.key_pem.clone()),
        ] {
            write_private(path, &text).map_err(|source| PkiError::Write { path: path.clone(), source })?;
        }
        Ok(files)
    }
}

/// Settings for a server that wants a client certificate of one of `trusted`: TLS 1.3 and HTTP/2 only.
///
/// # Errors
/// `PkiError::Use`.
pub fn server_config(trusted: &[&Authority], server: &Issued) -> Result<rustls::ServerConfig, PkiError> {
    let failed = |problem: String| PkiError::Use { name: "the orchestrator".to_owned(), problem };
    let verifier = client_verifier(trusted, false)?;
    let chain = CertificateDer::pem_slice_iter(server.certificate_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| failed(e.to_string()))?;
    config_with(verifier, chain, server)
}

/// Checks the certificates of clients; with `optional`, a client may have none.
pub(super) fn client_verifier(trusted: &[&Authority], optional: bool) -> Result<Arc<dyn ClientCertVerifier>, PkiError> {
    let failed = |problem: String| PkiError::Use { name: "the orchestrator".to_owned(), problem };
    let mut roots = RootCertStore::empty();
    for authority in trusted {
        roots.add(authority.issuer.der().clone()).map_err(|e| failed(e.to_string()))?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()));
    let builder = if optional { builder.allow_unauthenticated() } else { builder };
    builder.build().map_err(|e| failed(e.to_string()))
}

/// TLS 1.3 and HTTP/2 only.
pub(super) fn config_with(
    verifier: Arc<dyn ClientCertVerifier>,
    chain: Vec<CertificateDer<'static>>,
    server: &Issued,
) -> Result<rustls::ServerConfig, PkiError> {
    let failed = |problem: String| PkiError::Use { name: "the orchestrator".to_owned(), problem };
    let key = PrivateKeyDer::from_pem_slice(server.key_pem.as_bytes()).map_err(|e| failed(e.to_string()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| failed(e.to_string()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| failed(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)?.write_all(text.as_bytes())
}

fn client_params(runner_id: &str, validity: Validity) -> Result<CertificateParams, PkiError> {
    let failed = |source| PkiError::Generate { name: runner_id.to_owned(), source };
    let uri = format!("spiffe://sandbox-runner.test/runner/dev/{runner_id}");
    let alternative = SanType::URI(uri.as_str().try_into().map_err(failed)?);
    Ok(leaf_params(runner_id, alternative, ExtendedKeyUsagePurpose::ClientAuth, validity))
}

fn leaf_params(
    name: &str,
    alternative: SanType,
    usage: ExtendedKeyUsagePurpose,
    validity: Validity,
) -> CertificateParams {
    let mut params = params(name, validity);
    params.subject_alt_names = vec![alternative];
    params.extended_key_usages = vec![usage];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params
}

fn params(name: &str, validity: Validity) -> CertificateParams {
    const HOUR: Duration = Duration::from_secs(3600);
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    let now = SystemTime::now();
    let (from, until) = match validity {
        Validity::Now => (now - HOUR, now + 24 * HOUR),
        Validity::Expired => (now - 24 * HOUR, now - HOUR),
        Validity::NotYet => (now + 24 * HOUR, now + 48 * HOUR),
        Validity::Seconds(left) => (now - 24 * HOUR, now + Duration::from_secs(left.into())),
    };
    (params.not_before, params.not_after) = (from.into(), until.into());
    params
}
