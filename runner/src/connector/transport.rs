//! One HTTP/2 connection over one TLS connection. It is never made again behind the back of whoever asked for it.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use tonic::transport::{Channel, Endpoint};

use super::dial::{DialError, Target, dial};

const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Name, TCP, proxy or TLS.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// What is there does not speak HTTP/2.
    #[error("cannot speak HTTP/2 with {host}: {problem}")]
    Http {
        /// Whom we dialled.
        host: String,
        /// What it did.
        problem: String,
    },
}

/// Dials, checks who is there, and begins HTTP/2.
///
/// # Errors
/// `TransportError` names the step and the party. In TLS 1.3 a peer that refuses our certificate says so only later.
pub(super) async fn connect(target: &Target, tls: Arc<ClientConfig>) -> Result<Channel, TransportError> {
    let host = target.host.clone();
    let transport = |problem: String| TransportError::Http { host: host.clone(), problem };
    let stream = dial(target, tls).await?;
    let authority = format!("{}:{}", target.host, target.port);
    // TLS is ours, so the transport is told plain HTTP; the scheme on the wire is what it is.
    let endpoint = Endpoint::from_shared(format!("http://{authority}")).map_err(|e| transport(e.to_string()))?;
    let origin = format!("https://{authority}").parse().map_err(|_| transport("malformed host".to_owned()))?;
    let endpoint = endpoint
        .origin(origin)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true);
    // One connection, one use: the transport must not dial again behind our back.
    let mut once = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_| {
        let stream = once.take().ok_or_else(|| std::io::Error::other("the connection is over"));
        std::future::ready(stream)
    });
    endpoint.connect_with_connector(connector).await.map_err(|e| transport(chain(&e)))
}

/// An error with its causes on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
