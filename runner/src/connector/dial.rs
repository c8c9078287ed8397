//! One connection to whoever sends work: TCP, through an HTTP proxy when one is configured, then TLS.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::resolve::resolve;

/// Time for all of it: name, TCP, proxy, TLS.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Where to dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Name or address of the orchestrator.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Name its certificate must carry; the host when missing.
    pub server_name: Option<String>,
    /// HTTP proxy to ask for a tunnel.
    pub proxy: Option<Proxy>,
}

/// An HTTP proxy that understands CONNECT.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Name or address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Value of Proxy-Authorization, if the proxy wants one.
    pub authorization: Option<String>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Proxy({}:{})", self.host, self.port)
    }
}

/// Why no connection could be made.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// All of it took too long.
    #[error("no connection to {host}:{port} within {seconds} s")]
    Timeout {
        /// The orchestrator.
        host: String,
        /// Its port.
        port: u16,
        /// The bound.
        seconds: u64,
    },
    /// Name or TCP.
    #[error("cannot connect to {host}:{port}: {source}")]
    Connect {
        /// Whom we dialled: the orchestrator or the proxy.
        host: String,
        /// The port.
        port: u16,
        /// What the system said.
        source: io::Error,
    },
    /// The proxy refused.
    #[error("proxy {host}:{port} refused the tunnel: {answer}")]
    Proxy {
        /// The proxy.
        host: String,
        /// Its port.
        port: u16,
        /// Its status line.
        answer: String,
    },
    /// The name to check is not a name.
    #[error("server name {0:?} is neither a DNS name nor an address")]
    ServerName(String),
    /// The handshake failed.
    #[error("TLS with {name} failed: {source}")]
    Tls {
        /// The name that was checked.
        name: String,
        /// Which check.
        source: io::Error,
    },
}

/// Connects and checks who is there.
///
/// # Errors
/// `DialError` names the step and the party.
pub async fn dial(target: &Target, tls: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, DialError> {
    let timeout =
        || DialError::Timeout { host: target.host.clone(), port: target.port, seconds: DIAL_TIMEOUT.as_secs() };
    tokio::time::timeout(DIAL_TIMEOUT, dial_unbounded(target, tls)).await.map_err(|_| timeout())?
}

/// Connects, and checks nothing: for peers that the operator has allowed without encryption.
///
/// # Errors
/// `DialError` names the step and the party.
pub async fn dial_plain(target: &Target) -> Result<TcpStream, DialError> {
    let timeout =
        || DialError::Timeout { host: target.host.clone(), port: target.port, seconds: DIAL_TIMEOUT.as_secs() };
    tokio::time::timeout(DIAL_TIMEOUT, reach(target)).await.map_err(|_| timeout())?
}

async fn reach(target: &Target) -> Result<TcpStream, DialError> {
    match &target.proxy {
        None => tcp(&target.host, target.port).await,
        Some(proxy) => tunnel(proxy, tcp(&proxy.host, proxy.port).await?, target).await,
    }
}

async fn dial_unbounded(target: &Target, tls: Arc<ClientConfig>) -> Result<TlsStream<TcpStream>, DialError> {
    let name = target.server_name.as_ref().unwrap_or(&target.host);
    let server = ServerName::try_from(name.clone()).map_err(|_| DialError::ServerName(name.clone()))?;
    let stream = reach(target).await?;
    let tls = TlsConnector::from(tls).connect(server, stream).await;
    tls.map_err(|source| DialError::Tls { name: name.clone(), source })
}

async fn tcp(host: &str, port: u16) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { host: host.to_owned(), port, source };
    let addresses = resolve(host).await.map_err(failed)?;
    let addresses: Vec<_> = addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect();
    let stream = connect(&addresses, DIAL_TIMEOUT).await.map_err(failed)?;
    // Small frames must not wait for each other.
    stream.set_nodelay(true).map_err(failed)?;
    Ok(stream)
}

/// Tries one address after the other. One that drops what is sent to it has an equal share of the `time` that is left, so that it
/// does not hide the others; the last one has as long as the caller waits.
async fn connect(addresses: &[SocketAddr], time: Duration) -> io::Result<TcpStream> {
    let begun = Instant::now();
    let mut problem = io::Error::new(io::ErrorKind::NotFound, "no address");
    for (address, others) in addresses.iter().zip((0..u32::try_from(addresses.len()).unwrap_or(u32::MAX)).rev()) {
        let connecting = TcpStream::connect(address);
        let connected = if others == 0 {
            connecting.await
        } else {
            let share = time.saturating_sub(begun.elapsed()) / (others + 1);
            let silent = |_| Err(io::Error::new(io::ErrorKind::TimedOut, format!("{address} does not answer")));
            tokio::time::timeout(share, connecting).await.unwrap_or_else(silent)
        };
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

async fn tunnel(proxy: &Proxy, mut stream: TcpStream, target: &Target) -> Result<TcpStream, DialError> {
    let failed = |source| DialError::Connect { host: proxy.host.clone(), port: proxy.port, source };
    let refused = |answer: String| DialError::Proxy { host: proxy.host.clone(), port: proxy.port, answer };
    let Target { host, port, .. } = target;
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let mut request = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n");
    if let Some(value) = &proxy.authorization {
        request.push_str(&format!("Proxy-Authorization: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await.map_err(failed)?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= 16 * 1024 {
            return Err(refused("its answer is longer than 16 KiB".to_owned()));
        }
        // Byte by byte: whatever follows the answer belongs to TLS.
        answer.push(stream.read_u8().await.map_err(failed)?);
    }
    let text = String::from_utf8_lossy(&answer);
    let status = text.lines().next().unwrap_or_default();
    let code = status.split_whitespace().nth(1).unwrap_or_default();
    if code.starts_with('2') {
        Ok(stream)
    } else {
        Err(refused(status.chars().filter(|c| !c.is_control()).take(120).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, TcpSocket};

    /// An address that answers nothing: whoever listens there has as many connections as it takes.
    async fn silent() -> (TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(0).unwrap();
        let mut held = Vec::new();
        while let Ok(stream) =
            tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(listener.local_addr().unwrap())).await
        {
            held.push(stream.unwrap());
        }
        (listener, held)
    }

    #[tokio::test]
    async fn address_that_does_not_answer_hides_no_other_one() {
        let (silent, _held) = silent().await;
        let answers = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [&silent, &silent, &answers].map(|listener| listener.local_addr().unwrap());

        let connected =
            tokio::time::timeout(Duration::from_secs(60), connect(&addresses, Duration::from_secs(3))).await;

        assert_eq!(connected.expect("in time").unwrap().peer_addr().unwrap(), addresses[2]);
    }

    #[tokio::test]
    async fn what_the_last_address_said_is_told() {
        let refuses = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = connect(&[refuses], Duration::from_secs(3)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect(&[], Duration::from_secs(3)).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
