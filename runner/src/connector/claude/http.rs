//! HTTP/1.1 to one server: a few connections that are used again, every answer bounded in size and time.
//!
//! No redirect is followed, so a credential never goes to anybody else. A request is sent again by itself only when the
//! connection was over before a byte of it had left.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, DATE, HOST, HeaderMap, HeaderValue, RETRY_AFTER, USER_AGENT,
};
use hyper::{Method, Response};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use zeroize::Zeroizing;

use super::secret::Secret;
use super::wire::printable;
use crate::connector::dial::{DialError, Target, dial, dial_plain};
use crate::connector::transport::chain;

/// Largest answer that says what was wrong, or that nobody reads.
const MOST_ERROR_BYTES: usize = 64 * 1024;
/// Time for the rest of an answer whose status says all that counts.
const SPARE_TIME: Duration = Duration::from_secs(2);
/// Connections that wait for the next request.
const MOST_IDLE: usize = 8;
/// A stream on which nothing comes for so long is made again: what was missed is in the history.
const SILENCE: Duration = Duration::from_secs(300);

/// Where a server is.
#[derive(Debug, Clone)]
pub struct Base {
    /// Host, port and proxy.
    pub target: Target,
    /// `None`: without encryption.
    pub tls: Option<Arc<ClientConfig>>,
    /// Stands before every path; empty, or begins with a slash.
    pub prefix: String,
}

/// Why a request has no answer of use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the connection failed: {0}")]
    Transport(String),
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("the server answered {status} ({kind}){}", not_followed(*status))]
    Status { status: u16, kind: String, retry_after: Option<Duration> },
    #[error("the answer is not understood")]
    Malformed,
    #[error("a work item was delivered whose id does not belong into a path")]
    BadId,
    #[error("a work item of another environment was delivered")]
    Foreign,
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}

/// What an operator makes of a redirect: the credential is for the configured server and for no other.
fn not_followed(status: u16) -> &'static str {
    if (300..400).contains(&status) { "; redirects are not followed, set base_url to where the API is" } else { "" }
}

impl Failure {
    /// Whether the same request will fail again: a refusal that is neither a conflict nor a matter of time.
    pub(super) fn is_fatal(&self) -> bool {
        matches!(self, Self::Status { status: 400..=499, .. }) && !matches!(self.status(), Some(408 | 409 | 429))
    }

    pub(super) fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// One request.
pub(super) struct Request<'r> {
    pub(super) method: Method,
    /// Below the prefix, with the query.
    pub(super) path: String,
    pub(super) secret: &'r Secret,
    pub(super) headers: &'r HeaderMap,
    pub(super) body: Option<Vec<u8>>,
    /// For the whole answer; for a stream until it begins.
    pub(super) within: Duration,
    /// Largest answer in bytes.
    pub(super) most: usize,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

type Sender = SendRequest<Full<Bytes>>;

/// The connections to one server.
#[derive(Debug)]
pub(super) struct Client {
    base: Base,
    idle: Arc<Mutex<Vec<Sender>>>,
}

impl Client {
    pub(super) fn new(base: Base) -> Self {
        Self { base, idle: Arc::default() }
    }

    /// Sends a request and reads the whole answer.
    pub(super) async fn send(&self, request: Request<'_>) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let within = request.within;
        let exchange = async {
            let (response, sender) = self.exchange(&request).await?;
            let response = accepted(response).await?;
            let body = read(response.into_body(), request.most).await?;
            keep(&self.idle, sender);
            Ok(body)
        };
        tokio::time::timeout(within, exchange).await.map_err(|_| Failure::Timeout(within))?
    }

    /// Sends a request whose answer is its status. What else it says is read later, only to use the connection again.
    pub(super) async fn tell(&self, request: Request<'_>) -> Result<(), Failure> {
        let within = request.within;
        let exchange = async {
            let (response, sender) = self.exchange(&request).await?;
            Ok::<_, Failure>((accepted(response).await?, sender))
        };
        let (response, sender) =
            tokio::time::timeout(within, exchange).await.map_err(|_| Failure::Timeout(within))??;
        let (idle, most) = (Arc::clone(&self.idle), request.most);
        tokio::spawn(async move {
            if let Ok(Ok(_)) = tokio::time::timeout(SPARE_TIME, read(response.into_body(), most)).await {
                keep(&idle, sender);
            }
        });
        Ok(())
    }

    /// Sends a request and reads the whole answer, with its date, also where that is a refusal.
    pub(super) async fn send_dated(
        &self,
        request: Request<'_>,
    ) -> (Option<String>, Result<Zeroizing<Vec<u8>>, Failure>) {
        let (within, mut date) = (request.within, None);
        let exchange = async {
            let (response, _) = self.exchange(&request).await?;
            date = response.headers().get(DATE).and_then(|date| date.to_str().ok()).map(str::to_owned);
            read(accepted(response).await?.into_body(), request.most).await
        };
        let result = tokio::time::timeout(within, exchange).await;
        let result = result.map_err(|_| Failure::Timeout(within)).and_then(|result| result);
        (date, result)
    }

    /// Sends a request whose answer goes on.
    pub(super) async fn stream(&self, request: Request<'_>) -> Result<Pieces, Failure> {
        let within = request.within;
        let exchange = async {
            let (response, sender) = self.exchange(&request).await?;
            Ok(Pieces { body: accepted(response).await?.into_body(), _sender: sender })
        };
        tokio::time::timeout(within, exchange).await.map_err(|_| Failure::Timeout(within))?
    }

    async fn exchange(&self, request: &Request<'_>) -> Result<(Response<Incoming>, Sender), Failure> {
        let mut message = self.message(request)?;
        loop {
            let waiting = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let (mut sender, was_used) = match waiting {
                Some(sender) if sender.is_closed() => continue,
                Some(sender) => (sender, true),
                None => (self.connect().await?, false),
            };
            if sender.ready().await.is_err() {
                if was_used {
                    continue;
                }
                return Err(Failure::Transport("the connection was closed before it could be used".to_owned()));
            }
            match sender.try_send_request(message).await {
                Ok(response) => return Ok((response, sender)),
                Err(mut error) => match error.take_message() {
                    // Not a byte of it has left.
                    Some(unsent) if was_used => message = unsent,
                    _ => return Err(Failure::Transport(chain(error.error()))),
                },
            }
        }
    }

    fn message(&self, request: &Request<'_>) -> Result<hyper::Request<Full<Bytes>>, Failure> {
        let Target { host, port, .. } = &self.base.target;
        let bracketed = if host.contains(':') { format!("[{host}]") } else { host.clone() };
        let standard = if self.base.tls.is_some() { 443 } else { 80 };
        let authority = if *port == standard { bracketed } else { format!("{bracketed}:{port}") };
        let body = request.body.clone().unwrap_or_default();
        let mut message = hyper::Request::builder()
            .method(request.method.clone())
            .uri(format!("{}{}", self.base.prefix, request.path))
            .header(HOST, authority)
            .header(USER_AGENT, concat!("sandbox-runner/", env!("CARGO_PKG_VERSION")))
            .header(AUTHORIZATION, request.secret.header());
        if request.method != Method::GET {
            message = message.header(CONTENT_TYPE, "application/json").header(CONTENT_LENGTH, body.len());
        }
        let mut message =
            message.body(Full::new(Bytes::from(body))).map_err(|error| Failure::Transport(error.to_string()))?;
        for (name, value) in request.headers {
            message.headers_mut().insert(name, value.clone());
        }
        message.headers_mut().entry(ACCEPT).or_insert(HeaderValue::from_static("application/json"));
        Ok(message)
    }

    async fn connect(&self) -> Result<Sender, Failure> {
        let stream: Box<dyn Stream> = match &self.base.tls {
            Some(tls) => Box::new(dial(&self.base.target, Arc::clone(tls)).await?),
            None => Box::new(dial_plain(&self.base.target).await?),
        };
        let (sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(|error| Failure::Transport(chain(&error)))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = %chain(&error), "a connection to the work queue ended");
            }
        });
        Ok(sender)
    }
}

fn keep(idle: &Mutex<Vec<Sender>>, sender: Sender) {
    let mut idle = idle.lock().unwrap_or_else(PoisonError::into_inner);
    if idle.len() < MOST_IDLE && !sender.is_closed() {
        idle.push(sender);
    }
}

/// An answer that goes on. Dropping it ends the connection.
#[derive(Debug)]
pub(super) struct Pieces {
    body: Incoming,
    _sender: Sender,
}

impl Pieces {
    /// The next bytes; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            let frame =
                tokio::time::timeout(SILENCE, self.body.frame()).await.map_err(|_| Failure::Timeout(SILENCE))?;
            match frame {
                None => return Ok(None),
                Some(Err(error)) => return Err(Failure::Transport(chain(&error))),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

/// The answer, if it is not a refusal. What a refusal says is for people; its kind is all that is kept.
async fn accepted(response: Response<Incoming>) -> Result<Response<Incoming>, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let retry_after = retry_after(response.headers());
    // A refusal counts although its reason never ends.
    let body = tokio::time::timeout(SPARE_TIME, read(response.into_body(), MOST_ERROR_BYTES)).await;
    let body = body.unwrap_or(Ok(Zeroizing::default())).unwrap_or_default();
    let kind = kind_of(&body);
    Err(Failure::Status { status: status.as_u16(), kind, retry_after })
}

fn kind_of(body: &[u8]) -> String {
    let envelope: Value = serde_json::from_slice(body).unwrap_or_default();
    envelope["error"]["type"].as_str().map_or_else(|| "without a reason".to_owned(), printable)
}

/// In seconds, or in milliseconds by a header of its own; a date is not understood.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |value: &HeaderValue| value.to_str().ok()?.trim().parse::<u64>().ok();
    let milliseconds = headers.get("retry-after-ms").and_then(number).map(Duration::from_millis);
    milliseconds.or_else(|| headers.get(RETRY_AFTER).and_then(number).map(Duration::from_secs))
}

async fn read(mut body: Incoming, most: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut bytes = Zeroizing::new(Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure::Transport(chain(&error)))?;
        let Some(data) = frame.data_ref() else { continue };
        if bytes.len() + data.len() > most {
            return Err(Failure::TooLarge(most));
        }
        bytes.extend_from_slice(data);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16) -> Failure {
        Failure::Status { status, kind: String::new(), retry_after: None }
    }

    #[test]
    fn refusals_are_final_but_for_conflicts_and_matters_of_time() {
        for fatal in [400, 401, 403, 404, 410, 412, 413, 422, 499] {
            assert!(status(fatal).is_fatal(), "{fatal}");
        }
        for transient in [302, 408, 409, 429, 500, 503, 529] {
            assert!(!status(transient).is_fatal(), "{transient}");
        }
        assert!(!Failure::TooLarge(1).is_fatal() && !Failure::Transport(String::new()).is_fatal());
    }

    #[test]
    fn redirect_says_what_to_set() {
        assert!(status(301).to_string().ends_with("set base_url to where the API is"));
        assert_eq!(status(503).to_string(), "the server answered 503 ()");
    }

    #[test]
    fn only_the_kind_of_a_refusal_is_kept() {
        let body = br#"{"type":"error","error":{"type":"rate_limit_error","message":"hunter2"}}"#;
        assert_eq!(kind_of(body), "rate_limit_error");
        assert_eq!(kind_of(b"<html>"), "without a reason");
        assert_eq!(kind_of(br#"{"error":{"type":"a\nb hunter 2"}}"#), "abhunter2");
    }

    #[test]
    fn delays_that_the_server_asks_for_are_read_in_both_forms() {
        let headers = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            retry_after(&headers)
        };
        assert_eq!(headers("retry-after", "7"), Some(Duration::from_secs(7)));
        assert_eq!(headers("retry-after-ms", "250"), Some(Duration::from_millis(250)));
        assert_eq!(headers("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT"), None);
    }
}
