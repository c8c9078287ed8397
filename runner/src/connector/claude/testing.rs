//! A server of which a test says, byte by byte, what it answers.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::api::{Api, Presented};
use super::http::{Base, Client};
use super::secret::Secret;
use crate::connector::dial::{Proxy, Target};

/// What a server says to every request.
#[derive(Debug, Clone, Default)]
pub(super) struct Answer {
    /// Said once.
    pub(super) first: Vec<u8>,
    /// Said for as long as somebody listens; nothing is, when it is empty.
    pub(super) ever: Vec<u8>,
}

impl Answer {
    /// An answer as it should be.
    pub(super) fn ok(body: &str) -> Self {
        Self::text(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
    }

    pub(super) fn text(text: impl Into<String>) -> Self {
        Self { first: text.into().into_bytes(), ever: Vec::new() }
    }

    /// `head`, and then `ever` without end.
    pub(super) fn endless(head: &str, ever: Vec<u8>) -> Self {
        Self { first: head.as_bytes().to_vec(), ever }
    }
}

/// Dropping it ends it.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) port: u16,
    heads: Arc<Mutex<Vec<String>>>,
    serving: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Server {
    pub(super) async fn start(answer: Answer, tls: Option<ServerConfig>) -> Self {
        let tls = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        Self::serve(move |stream, heads| {
            let (answer, tls) = (answer.clone(), tls.clone());
            async move {
                let Some(tls) = tls else { return speak(stream, &answer, &heads).await };
                // Whoever refuses us says nothing more.
                if let Ok(stream) = tls.accept(stream).await {
                    speak(stream, &answer, &heads).await;
                }
            }
        })
        .await
    }

    /// An HTTP proxy that answers CONNECT with this status line, and makes the tunnel when that is a success.
    pub(super) async fn proxy(status: &'static str) -> Self {
        Self::serve(move |mut stream, heads| async move {
            let Some(head) = head(&mut stream, &heads).await else { return };
            let _ = stream.write_all(format!("HTTP/1.1 {status}\r\n\r\n").as_bytes()).await;
            let port = head.split([' ', ':']).nth(2).and_then(|port| port.parse::<u16>().ok());
            let (true, Some(port)) = (status.starts_with('2'), port) else { return };
            let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
            // It ends with either side.
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut far).await;
        })
        .await
    }

    async fn serve<F>(speak: impl Fn(TcpStream, Arc<Mutex<Vec<String>>>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = Arc::clone(&heads);
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(speak(stream, Arc::clone(&heard)));
            }
        });
        Self { port, heads, serving }
    }

    /// Heads of all requests so far.
    pub(super) fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn target(&self, proxy: Option<&Self>) -> Target {
        let proxy = proxy.map(|proxy| Proxy {
            host: "127.0.0.1".to_owned(),
            port: proxy.port,
            authorization: Some("Basic dTpw".to_owned()),
        });
        Target { host: "localhost".to_owned(), port: self.port, server_name: None, proxy }
    }

    pub(super) fn plain(&self) -> Base {
        Base { target: self.target(None), tls: None, prefix: String::new() }
    }
}

/// Reads one head, byte by byte, as everything behind it belongs to somebody else.
async fn head(stream: &mut (impl AsyncRead + Unpin), heads: &Mutex<Vec<String>>) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    heads.lock().unwrap_or_else(PoisonError::into_inner).push(head.clone());
    Some(head)
}

async fn speak(mut stream: impl AsyncRead + AsyncWrite + Unpin, answer: &Answer, heads: &Mutex<Vec<String>>) {
    while head(&mut stream, heads).await.is_some() {
        if stream.write_all(&answer.first).await.is_err() {
            return;
        }
        while !answer.ever.is_empty() {
            if stream.write_all(&answer.ever).await.is_err() {
                return;
            }
        }
    }
    // A client that goes on waiting is to find out by itself.
    tokio::time::sleep(Duration::from_secs(60)).await;
}

pub(super) fn secret() -> Secret {
    Secret::new("hunter2").expect("a token")
}

pub(super) fn api(base: Base) -> Api {
    let presented = Presented {
        version: "2023-06-01",
        workspace_id: Some("wrkspc_1"),
        worker_id_header: "worker-id",
        worker_id: "w-1",
    };
    Api::new(Client::new(base), "env_1".to_owned(), secret(), presented).expect("good headers")
}
