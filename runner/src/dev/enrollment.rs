//! Gives runners their certificates: with a token the first one, with the present one the next.
//!
//! A port of its own, because whoever comes for a first certificate has none, and whoever comes for the next one may be a
//! little late. A token is kept as its hash, is good once, and a repeat with the same key gets the same answer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use proto::runner::v1 as pb;
use proto::runner::v1::runner_enrollment_service_server::{RunnerEnrollmentService, RunnerEnrollmentServiceServer};
use rustls::DistinguishedName;
use rustls::SignatureScheme;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::orchestrator::DevError;
use super::pki::{Authority, PkiError, Validity, client_verifier, config_with};
use super::revocation::{Holder, denial, name_of};
use super::server::{PeerCertificate, accept, listen};
use super::state::Shared;
use crate::connector::enrollment::RENEWAL_GRACE;
use crate::connector::orchestrator::Refusal;

/// How long a token is good.
const TOKEN_LIFE: Duration = Duration::from_secs(3600);

/// What becomes of an answer on its way, for tests of what a runner makes of it.
pub type Altered = Box<dyn Fn(pb::EnrollResponse) -> Result<pb::EnrollResponse, Status> + Send>;

/// The service.
#[derive(Debug)]
pub struct Enrollment {
    issuing: Arc<Issuing>,
    address: SocketAddr,
    // Dropping it stops the service.
    _stop: oneshot::Sender<()>,
}

struct Issuing {
    authority: Arc<Authority>,
    shared: Arc<Shared>,
    records: Mutex<Records>,
}

impl std::fmt::Debug for Issuing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuing").finish_non_exhaustive()
    }
}

struct Records {
    tokens: BTreeMap<[u8; 32], TokenRecord>,
    validity: Validity,
    renew_after: Option<SystemTime>,
    alter: Option<Altered>,
    /// Public keys that certificates were made for.
    keys: BTreeSet<Vec<u8>>,
    renewals: u64,
}

struct TokenRecord {
    runner_id: String,
    expires: SystemTime,
    /// The key it was used with, and what it got.
    used: Option<(Vec<u8>, pb::EnrollResponse)>,
}

impl Enrollment {
    pub(super) async fn start(authority: Arc<Authority>, shared: Arc<Shared>) -> Result<Self, DevError> {
        let tls = Arc::new(ArcSwap::from_pointee(tls(&authority)?));
        let (listener, address) = listen().await.map_err(DevError::Listen)?;
        let records = Records {
            tokens: BTreeMap::new(),
            validity: Validity::Now,
            renew_after: None,
            alter: None,
            keys: BTreeSet::new(),
            renewals: 0,
        };
        let issuing = Arc::new(Issuing { authority, shared: Arc::clone(&shared), records: Mutex::new(records) });
        let (stop, stopped) = oneshot::channel::<()>();
        let (sender, connections) = mpsc::channel(16);
        let accepting = tokio::spawn(accept(listener, tls, sender, Arc::clone(&shared)));
        let service = RunnerEnrollmentServiceServer::from_arc(Arc::clone(&issuing));
        tokio::spawn(async move {
            let served = tonic::transport::Server::builder()
                .serve_with_incoming_shutdown(service, ReceiverStream::new(connections), async {
                    // Dropping the sender stops as well.
                    let _ = stopped.await;
                })
                .await;
            accepting.abort();
            if let Err(error) = served {
                shared.complain(format!("serving enrolment ended: {error}"));
            }
        });
        Ok(Self { issuing, address, _stop: stop })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// SHA-256 of the authority, as people write it.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let digest = Sha256::digest(self.issuing.authority.certificate_der());
        digest.iter().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().join(":")
    }

    /// A token for the runner `runner_id`; it is told once.
    #[must_use]
    pub fn token(&self, runner_id: &str) -> String {
        // Two random UUIDs: 244 random bits.
        let token = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        let record =
            TokenRecord { runner_id: runner_id.to_owned(), expires: SystemTime::now() + TOKEN_LIFE, used: None };
        self.issuing.records().tokens.insert(hash(&token), record);
        token
    }

    /// Ends the life of a token.
    pub fn expire(&self, token: &str) {
        if let Some(record) = self.issuing.records().tokens.get_mut(&hash(token)) {
            record.expires = UNIX_EPOCH;
        }
    }

    /// How long certificates are good from now on, and when they are to be renewed.
    pub fn issue(&self, validity: Validity, renew_after: Option<SystemTime>) {
        let mut records = self.issuing.records();
        (records.validity, records.renew_after) = (validity, renew_after);
    }

    /// Changes answers on their way, or loses them.
    pub fn alter(&self, alter: Option<Altered>) {
        self.issuing.records().alter = alter;
    }

    /// How many keys have got a certificate, and how many certificates were renewed.
    #[must_use]
    pub fn issued(&self) -> (usize, u64) {
        let records = self.issuing.records();
        (records.keys.len(), records.renewals)
    }
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// Whoever has a certificate must show a good one; the authority is in the chain, for those who know only its fingerprint.
fn tls(authority: &Authority) -> Result<rustls::ServerConfig, PkiError> {
    let server = authority.server("localhost", Validity::Now)?;
    let leaf = CertificateDer::from_pem_slice(server.certificate_pem.as_bytes())
        .map_err(|error| PkiError::Use { name: "the enrolment service".to_owned(), problem: error.to_string() })?;
    let chain = vec![leaf, CertificateDer::from(authority.certificate_der())];
    config_with(Arc::new(LateClients(client_verifier(&[authority], true)?)), chain, &server)
}

impl Issuing {
    fn records(&self) -> MutexGuard<'_, Records> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn issue(&self, records: &mut Records, csr_der: &[u8], runner_id: &str) -> Result<Vec<u8>, Status> {
        let made = self.authority.client_for(csr_der, runner_id, records.validity);
        let leaf = made.map_err(|error| Status::invalid_argument(error.to_string()))?;
        records.keys.insert(key_of(csr_der)?);
        Ok(leaf)
    }
}

#[tonic::async_trait]
impl RunnerEnrollmentService for Issuing {
    async fn enroll(&self, request: Request<pb::EnrollRequest>) -> Result<Response<pb::EnrollResponse>, Status> {
        let request = request.into_inner();
        let key = key_of(&request.csr_der)?;
        let mut records = self.records();
        let record = records.tokens.get(&hash(&request.token));
        let record = record.ok_or_else(|| Status::unauthenticated("token: is not known"))?;
        if record.expires <= SystemTime::now() {
            return Err(Status::unauthenticated("token: has expired"));
        }
        let answer = match &record.used {
            Some((before, answer)) if *before == key => answer.clone(),
            Some(_) => return Err(Status::unauthenticated("token: was used, with another key")),
            None => {
                let runner_id = record.runner_id.clone();
                let leaf = self.issue(&mut records, &request.csr_der, &runner_id)?;
                pb::EnrollResponse {
                    runner_id,
                    chain_der: vec![leaf],
                    trust_bundle_der: vec![self.authority.certificate_der()],
                    endpoints: Vec::new(),
                    renew_after: records.renew_after.map(Into::into),
                }
            }
        };
        if let Some(record) = records.tokens.get_mut(&hash(&request.token)) {
            record.used = Some((key, answer.clone()));
        }
        let answer = match &records.alter {
            Some(alter) => alter(answer)?,
            None => answer,
        };
        Ok(Response::new(answer))
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let shown = request.extensions().get::<PeerCertificate>().and_then(|peer| peer.0.clone());
        let shown = shown.ok_or_else(|| Status::unauthenticated("a certificate is needed to get the next one"))?;
        let denied = Holder::of(&shown).and_then(|holder| denial(&self.shared.state(), &holder));
        if let Some(problem) = denied {
            return Err(Refusal::CertificateRevoked.status(problem));
        }
        let runner_id = name_of(&shown).ok_or_else(|| Status::permission_denied("the certificate names no runner"))?;
        let csr_der = request.into_inner().csr_der;
        let mut records = self.records();
        let leaf = self.issue(&mut records, &csr_der, &runner_id)?;
        records.renewals += 1;
        Ok(Response::new(pb::RenewResponse {
            chain_der: vec![leaf],
            trust_bundle_der: vec![self.authority.certificate_der()],
            renew_after: records.renew_after.map(Into::into),
        }))
    }
}

fn key_of(csr_der: &[u8]) -> Result<Vec<u8>, Status> {
    let wrong = || Status::invalid_argument("csr_der: is not a certificate request");
    let (_, request) = X509CertificationRequest::from_der(csr_der).map_err(|_| wrong())?;
    Ok(request.certification_request_info.subject_pki.raw.to_vec())
}

/// Takes a certificate also for some days after its end: a runner that was cut off must be able to come back.
#[derive(Debug)]
struct LateClients(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for LateClients {
    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let end = X509Certificate::from_der(end_entity).ok().map(|(_, parsed)| parsed.validity().not_after.timestamp());
        let end = end.and_then(|end| u64::try_from(end).ok()).unwrap_or(u64::MAX);
        let late = now.as_secs() > end && now.as_secs() - end <= RENEWAL_GRACE.as_secs();
        let at = if late { UnixTime::since_unix_epoch(Duration::from_secs(end)) } else { now };
        self.0.verify_client_cert(end_entity, intermediates, at)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
