//! How a runner gets its certificate, and the next one.
//!
//! The first contact is made with a token that is good for one runner, over TLS that trusts one authority and nobody else.
//! The key is made here and never leaves this host. Work is done in steps, of which each leaves a state from which the
//! same command goes on: until the identity is stored the key stays, and the service gives the same key the same identity
//! as long as the token lives. So an interruption costs neither the token nor an identity.

mod answer;
mod pin;
mod renew;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::runner::v1 as pb;
use proto::runner::v1::runner_enrollment_service_client::RunnerEnrollmentServiceClient;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::ClientConfig;
use tonic::transport::Channel;

use super::dial::Target;
use super::transport::{TransportError, connect};
use crate::work::limits;
use answer::Answer;
pub use pin::{Pin, PinError};
pub use renew::Renewal;
pub use store::{About, StoreError, about, files};
use store::{Set, Store};

/// Time for one request, with everything that belongs to it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long after its end a certificate is still good for being renewed, where the service agrees. Later a new token is
/// needed.
pub const RENEWAL_GRACE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Longest token that is taken, in bytes.
pub const LONGEST_TOKEN: usize = 4096;

/// A token that is good for one runner. It is shown nowhere.
#[derive(Clone)]
pub struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({} bytes)", self.0.len())
    }
}

impl Token {
    /// Reads a token from the content of a file: one line of printable ASCII.
    ///
    /// # Errors
    /// `EnrollError::Token`, which does not repeat what was read.
    pub fn parse(bytes: &[u8]) -> Result<Self, EnrollError> {
        let wrong = |problem| Err(EnrollError::Token { problem });
        let text = bytes.trim_ascii();
        if text.is_empty() {
            return wrong("it is empty");
        }
        if text.len() > LONGEST_TOKEN {
            return wrong("it is longer than 4096 bytes");
        }
        if !text.iter().all(u8::is_ascii_graphic) {
            return wrong("it is not one word of printable ASCII");
        }
        Ok(Self(String::from_utf8_lossy(text).into_owned()))
    }
}

/// Why there is no identity. The one there was before stays.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The token.
    #[error("the token is not usable: {problem}; it is one line, as the service printed it")]
    Token {
        /// Why.
        problem: &'static str,
    },
    /// The pinned authority.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The service cannot be reached, or is not who it should be.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The service did not answer in time.
    #[error("the enrolment service {host} did not answer within {seconds} s; the same command may be given again")]
    Timeout {
        /// The service.
        host: String,
        /// The bound.
        seconds: u64,
    },
    /// The service refused.
    #[error("the enrolment service refused: {code:?}: {message}{}", fix_for(*code))]
    Refused {
        /// Its code.
        code: tonic::Code,
        /// Its words.
        message: String,
    },
    /// The answer does not hold together.
    #[error("the answer of the enrolment service is not usable, nothing of it was kept: {problem}")]
    Answer {
        /// Which part, and why.
        problem: String,
    },
    /// There is an identity already.
    #[error("this runner is enrolled already, as {runner_id}, in {}; --replace asks for another identity", directory.display())]
    Enrolled {
        /// Whose it is.
        runner_id: String,
        /// Where.
        directory: PathBuf,
    },
    /// The key could not be made or used.
    #[error("cannot use the key in {}: {problem}; remove it to begin with another one", path.display())]
    Key {
        /// Where it is or was to be.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// Writing it down.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn fix_for(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => "; ask for a new token",
        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::DeadlineExceeded | tonic::Code::Internal => {
            "; the same command may be given again"
        }
        _ => "",
    }
}

/// What is asked of a service at the first contact.
#[derive(Debug, Clone)]
pub struct Request {
    /// Where it is.
    pub target: Target,
    /// Whom to trust there.
    pub pin: Pin,
    /// The token.
    pub token: Token,
    /// Set by the operator.
    pub labels: BTreeMap<String, String>,
    /// Of the state directory.
    pub state_id: String,
    /// Ask although there is an identity.
    pub replace: bool,
}

/// How far an enrolment is.
enum Stage {
    /// A key must be found or made.
    Key,
    /// The service must be asked.
    Ask {
        key: Box<KeyPair>,
        key_pem: String,
    },
    /// The set must be written.
    Write {
        set: Box<Set>,
    },
    /// It must be put into use.
    Switch {
        name: String,
        runner_id: String,
    },
    /// What it replaces must be removed.
    Clean {
        runner_id: String,
    },
    Done {
        runner_id: String,
    },
}

/// An enrolment, one step after the other. Dropping it between or within steps is what a crash does.
pub struct Enrollment {
    request: Request,
    store: Store,
    stage: Stage,
}

impl std::fmt::Debug for Enrollment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enrollment").field("request", &self.request).finish_non_exhaustive()
    }
}

impl Enrollment {
    /// Begins, or goes on with what was interrupted.
    ///
    /// # Errors
    /// `EnrollError::Enrolled` where nothing is to be done, `EnrollError::Store` where nothing can be.
    pub fn begin(request: Request, directory: &Path) -> Result<Self, EnrollError> {
        let store = Store::open(directory)?;
        let mut stage = Stage::Key;
        if let Some(about) = about(directory)? {
            let runner_id = about.runner_id;
            let pending = store.pending_key()?;
            if pending.is_some() && pending == store.current_key()? {
                // Only the tidying was interrupted.
                stage = Stage::Clean { runner_id };
            } else if !request.replace {
                return Err(EnrollError::Enrolled { runner_id, directory: directory.to_owned() });
            }
        }
        if let (Stage::Key, Some((name, about))) = (&stage, store.pending_set(SystemTime::now())?) {
            stage = Stage::Switch { name, runner_id: about.runner_id };
        }
        Ok(Self { request, store, stage })
    }

    /// Takes the next step; returns the name of the runner when that was the last one.
    ///
    /// # Errors
    /// `EnrollError`; what was stored before is as it was, and the same step may be tried again.
    pub async fn step(&mut self) -> Result<Option<String>, EnrollError> {
        let next = match &self.stage {
            Stage::Key => {
                let (key, key_pem) = self.key()?;
                Stage::Ask { key: Box::new(key), key_pem }
            }
            Stage::Ask { key, key_pem } => {
                let answer = ask(&self.request, &signing_request(key, self.store.directory())?).await?;
                let set =
                    answer.into_set(key_pem, None, &self.request.target, self.store.directory(), SystemTime::now())?;
                Stage::Write { set: Box::new(set) }
            }
            Stage::Write { set } => {
                Stage::Switch { name: self.store.write(set)?, runner_id: set.about.runner_id.clone() }
            }
            Stage::Switch { name, runner_id } => {
                self.store.switch(name)?;
                Stage::Clean { runner_id: runner_id.clone() }
            }
            Stage::Clean { runner_id } => {
                self.store.clean()?;
                Stage::Done { runner_id: runner_id.clone() }
            }
            Stage::Done { runner_id } => return Ok(Some(runner_id.clone())),
        };
        self.stage = next;
        Ok(match &self.stage {
            Stage::Done { runner_id } => Some(runner_id.clone()),
            _ => None,
        })
    }

    /// Takes all steps.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub async fn run(mut self) -> Result<String, EnrollError> {
        loop {
            if let Some(runner_id) = self.step().await? {
                return Ok(runner_id);
            }
        }
    }

    /// The key of an interrupted enrolment, because the service knows the token by it; else a new one.
    fn key(&self) -> Result<(KeyPair, String), EnrollError> {
        if let Some(text) = self.store.pending_key()? {
            let path = self.store.directory().join("pending.pem");
            let key =
                KeyPair::from_pem(&text).map_err(|error| EnrollError::Key { path, problem: error.to_string() })?;
            return Ok((key, text));
        }
        let key = new_key(self.store.directory())?;
        let text = key.serialize_pem();
        self.store.keep_pending_key(&text)?;
        Ok((key, text))
    }
}

fn new_key(directory: &Path) -> Result<KeyPair, EnrollError> {
    KeyPair::generate().map_err(|error| EnrollError::Key { path: directory.to_owned(), problem: error.to_string() })
}

/// It proves that we have the key and asks for no name: the service decides who we are.
fn signing_request(key: &KeyPair, directory: &Path) -> Result<Vec<u8>, EnrollError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let made = params.serialize_request(key);
    let made = made.map_err(|error| EnrollError::Key { path: directory.to_owned(), problem: error.to_string() })?;
    Ok(made.der().to_vec())
}

async fn ask(request: &Request, csr_der: &[u8]) -> Result<Answer, EnrollError> {
    let message = pb::EnrollRequest {
        token: request.token.0.clone(),
        csr_der: csr_der.to_vec(),
        labels: request.labels.clone().into_iter().collect(),
        state_id: request.state_id.clone(),
    };
    let config = request.pin.client_config()?;
    let answer = in_time(&request.target, async {
        let mut service = service(&request.target, config).await?;
        Ok(service.enroll(message).await.map_err(|status| refused(&status))?.into_inner())
    })
    .await?;
    Ok(Answer {
        runner_id: answer.runner_id,
        chain: answer.chain_der,
        bundle: answer.trust_bundle_der,
        endpoints: answer.endpoints,
        renew_after: answer.renew_after,
    })
}

async fn service(
    target: &Target,
    config: Arc<ClientConfig>,
) -> Result<RunnerEnrollmentServiceClient<Channel>, EnrollError> {
    let channel = connect(target, config).await?;
    Ok(RunnerEnrollmentServiceClient::new(channel).max_decoding_message_size(limits::FRAME_BYTES))
}

async fn in_time<T>(target: &Target, work: impl Future<Output = Result<T, EnrollError>>) -> Result<T, EnrollError> {
    let late = || EnrollError::Timeout { host: target.host.clone(), seconds: REQUEST_TIMEOUT.as_secs() };
    tokio::time::timeout(REQUEST_TIMEOUT, work).await.map_err(|_| late())?
}

fn refused(status: &tonic::Status) -> EnrollError {
    let cause = std::error::Error::source(status).map(super::transport::chain);
    let message = cause.map_or_else(|| status.message().to_owned(), |cause| format!("{}: {cause}", status.message()));
    EnrollError::Refused { code: status.code(), message }
}
