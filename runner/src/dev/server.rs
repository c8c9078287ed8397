//! Accepts runners on a loopback address: TCP, TLS with client certificates, then one stream per runner.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use proto::runner::v1 as pb;
use proto::runner::v1::runner_link_service_server::{RunnerLinkService, RunnerLinkServiceServer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};

use super::revocation::Holder;
use super::state::Shared;
use crate::work::limits::FRAME_BYTES;

const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;

/// A connection whose peer has shown what its listener asks for.
#[derive(Debug)]
pub struct Connection(TlsStream<TcpStream>);

/// The certificate that a peer has shown, DER, if it has shown one.
#[derive(Debug, Clone)]
pub struct PeerCertificate(pub Option<Vec<u8>>);

impl Connected for Connection {
    type ConnectInfo = PeerCertificate;

    fn connect_info(&self) -> PeerCertificate {
        let shown = self.0.get_ref().1.peer_certificates();
        PeerCertificate(shown.and_then(|chain| chain.first()).map(|leaf| leaf.to_vec()))
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Serves until `stop` resolves.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Arc<ArcSwap<rustls::ServerConfig>>,
    shared: Arc<Shared>,
    stop: impl Future<Output = ()> + Send + 'static,
) {
    let (sender, connections) = mpsc::channel(16);
    let accepting = tokio::spawn(accept(listener, tls, sender, Arc::clone(&shared)));
    let service = RunnerLinkServiceServer::new(LinkService(Arc::clone(&shared)))
        .max_decoding_message_size(FRAME_BYTES)
        .max_encoding_message_size(4 * FRAME_BYTES);
    let windows = shared.settings().windows;
    let served = tonic::transport::Server::builder()
        .initial_stream_window_size(windows.then_some(STREAM_WINDOW))
        .initial_connection_window_size(windows.then_some(CONNECTION_WINDOW))
        .serve_with_incoming_shutdown(service, ReceiverStream::new(connections), stop)
        .await;
    accepting.abort();
    if let Err(error) = served {
        shared.complain(format!("serving ended: {error}"));
    }
}

/// Makes connections of what comes, each under the settings of that moment.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Arc<ArcSwap<rustls::ServerConfig>>,
    connections: mpsc::Sender<io::Result<Connection>>,
    shared: Arc<Shared>,
) {
    loop {
        let Ok((stream, peer)) = listener.accept().await else { return };
        let acceptor = TlsAcceptor::from(tls.load_full());
        let (connections, shared) = (connections.clone(), Arc::clone(&shared));
        // Each handshake beside the others: a peer that says nothing must not keep anybody waiting.
        tokio::spawn(async move {
            match handshake(acceptor, stream).await {
                // A closed channel means that the server has ended.
                Ok(stream) => drop(connections.send(Ok(Connection(stream))).await),
                Err(error) => shared.refused_handshake(peer, &error),
            }
        });
    }
}

/// Accepts one connection and checks who is there.
///
/// # Errors
/// What the socket or the handshake says, or that there was none within 10 s.
pub async fn accept_one(listener: &TcpListener, acceptor: TlsAcceptor) -> io::Result<Connection> {
    let (stream, _) = listener.accept().await?;
    handshake(acceptor, stream).await.map(Connection)
}

async fn handshake(acceptor: TlsAcceptor, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    stream.set_nodelay(true)?;
    let accepted = tokio::time::timeout(std::time::Duration::from_secs(10), acceptor.accept(stream));
    accepted.await.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake within 10 s"))?
}

/// A listener on a free port of the loopback address.
///
/// # Errors
/// What the socket says.
pub async fn listen() -> io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind(std::net::SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

struct LinkService(Arc<Shared>);

#[tonic::async_trait]
impl RunnerLinkService for LinkService {
    type ConnectStream = ReceiverStream<Result<pb::OrchestratorFrame, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<pb::RunnerFrame>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (sender, receiver) = mpsc::channel(8192);
        let shown = request.extensions().get::<PeerCertificate>().and_then(|peer| peer.0.as_deref());
        let holder = shown.and_then(Holder::of);
        tokio::spawn(super::intake::serve_link(Arc::clone(&self.0), request.into_inner(), sender, holder));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
