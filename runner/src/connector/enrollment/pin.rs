//! Whom the first contact trusts: the authorities in a file, or the one authority that has a given fingerprint.
//!
//! System roots are never used: whoever answers gets the token.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};

/// What is known of the authority before anything was said.
#[derive(Debug, Clone)]
pub enum Pin {
    /// Its certificate.
    Authorities(Vec<CertificateDer<'static>>),
    /// SHA-256 of its certificate, DER, as `openssl x509 -fingerprint -sha256` prints it. The service has to send that
    /// certificate in its chain.
    Fingerprint([u8; 32]),
}

/// Why there is no pin.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The file cannot be read.
    #[error("cannot read the authority in {}: {source}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file does not hold what it should.
    #[error("{} is not usable as authority: {problem}; it must be a PEM file with the certificate of an authority", path.display())]
    Content {
        /// Where.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// The text is no fingerprint.
    #[error("{0:?} is no SHA-256 fingerprint: write 64 hexadecimal digits, with or without colons")]
    Fingerprint(String),
    /// TLS refuses what it was given.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
}

impl Pin {
    /// The authorities in a PEM file.
    ///
    /// # Errors
    /// `PinError` names the file.
    pub fn from_file(path: &Path) -> Result<Self, PinError> {
        let bad = |problem: String| PinError::Content { path: path.to_owned(), problem };
        let text = std::fs::read(path).map_err(|source| PinError::Read { path: path.to_owned(), source })?;
        let found = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
        let found = found.map_err(|error| bad(error.to_string()))?;
        if found.is_empty() {
            return Err(bad("it holds no certificate".to_owned()));
        }
        roots(&found).map_err(|error| bad(error.to_string()))?;
        Ok(Self::Authorities(found))
    }

    /// A fingerprint as people write it.
    ///
    /// # Errors
    /// `PinError::Fingerprint`.
    pub fn from_hex(text: &str) -> Result<Self, PinError> {
        let wrong = || PinError::Fingerprint(text.to_owned());
        let digits: String = text.trim().chars().filter(|c| *c != ':').collect();
        if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut print = [0; 32];
        for (byte, position) in print.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&digits[position..position + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self::Fingerprint(print))
    }

    /// TLS 1.3 and HTTP/2 only, with nobody but the pinned authority trusted, and without a certificate of ours.
    pub(super) fn client_config(&self) -> Result<Arc<ClientConfig>, PinError> {
        let provider = Arc::new(ring::default_provider());
        let verifier: Arc<dyn ServerCertVerifier> = match self {
            Self::Authorities(found) => verifier(roots(found)?, &provider)?,
            Self::Fingerprint(print) => Arc::new(Fingerprint { print: *print, provider: Arc::clone(&provider) }),
        };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

fn roots(certificates: &[CertificateDer<'static>]) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    certificates.iter().try_for_each(|certificate| roots.add(certificate.clone()))?;
    Ok(roots)
}

fn verifier(roots: RootCertStore, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))
}

/// Trusts the one certificate of the chain that has the fingerprint, and then checks everything as usual: names, times,
/// signatures, and that the chain ends there.
#[derive(Debug)]
struct Fingerprint {
    print: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Fingerprint {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = intermediates.iter().find(|certificate| Sha256::digest(certificate).as_slice() == self.print);
        let pinned = pinned.ok_or_else(|| {
            rustls::Error::General("no authority in the chain of the peer has the pinned fingerprint".to_owned())
        })?;
        let roots = roots(&[pinned.clone().into_owned()])?;
        let usual = verifier(roots, &self.provider)?;
        usual.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken here".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_are_read_with_and_without_colons_and_nothing_else_is() {
        let colons = (0..32).map(|_| "0A").collect::<Vec<_>>().join(":");
        for text in [colons.as_str(), &"0a".repeat(32)] {
            assert!(matches!(Pin::from_hex(text), Ok(Pin::Fingerprint(print)) if print == [10; 32]), "{text}");
        }
        for text in ["", "0a", &"0g".repeat(32), &"0a".repeat(33), &"é".repeat(32), &"+a".repeat(32)] {
            let error = Pin::from_hex(text).unwrap_err().to_string();
            assert!(error.contains("write 64 hexadecimal digits"), "{error}");
        }
    }
}
