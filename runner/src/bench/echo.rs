//! The floor of the link: one stream over mutual TLS as the connector opens it, and nobody behind it.
//!
//! Messages are those of the real schema, so that what is left is the cost of the transport alone.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hyper_util::rt::TokioIo;
use proto::runner::v1 as pb;
use proto::runner::v1::runner_link_service_client::RunnerLinkServiceClient;
use proto::runner::v1::runner_link_service_server::{RunnerLinkService, RunnerLinkServiceServer};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::BenchError;
use super::delay::Distance;
use super::subject::milliseconds;
use crate::connector::dial::{Target, dial};
use crate::connector::tls::TlsSource;
use crate::dev::pki::{Authority, Validity};
use crate::dev::{Connection, accept_one, listen};
use crate::work::limits::CHUNK_BYTES;

const STREAM_WINDOW: u32 = 4 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 8 * 1024 * 1024;
const TRANSPORT_BYTES: usize = 4 * 1024 * 1024;

/// An open stream and the server that answers it.
pub struct Echo {
    requests: mpsc::Sender<pb::RunnerFrame>,
    answers: Streaming<pb::OrchestratorFrame>,
    _distance: Option<Distance>,
    _stop: oneshot::Sender<()>,
}

fn failed(what: &'static str) -> impl Fn(&dyn std::fmt::Display) -> BenchError {
    move |error| BenchError::Link(format!("{what}: {error}"))
}

impl Echo {
    /// Opens one; `each_way` puts a distance between its two ends. Certificates are put into `directory`.
    ///
    /// # Errors
    /// [`BenchError::Link`].
    pub async fn open(directory: &Path, each_way: Option<Duration>) -> Result<Self, BenchError> {
        let authority = Authority::new("floor of the benchmark").map_err(|e| failed("certificates")(&e))?;
        let server = authority.server("localhost", Validity::Now).map_err(|e| failed("certificates")(&e))?;
        let client = authority.client("floor", Validity::Now).map_err(|e| failed("certificates")(&e))?;
        let config = authority.server_config(&server).map_err(|e| failed("certificates")(&e))?;
        let files = authority.write_client_files(directory, &client).map_err(|e| failed("certificates")(&e))?;
        let source = TlsSource::load(files, SystemTime::now()).map_err(|e| failed("certificates")(&e))?;
        let (listener, mut address) = listen().await.map_err(|e| failed("listening")(&e))?;
        let (stop, stopped) = oneshot::channel::<()>();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (sender, connections) = mpsc::channel::<std::io::Result<Connection>>(1);
        tokio::spawn(async move {
            // One connection is all there will be, but a server whose connections have an end turns new streams away, also
            // those of the connection it has.
            if sender.send(accept_one(&listener, acceptor).await).await.is_ok() {
                sender.closed().await;
            }
        });
        let service = RunnerLinkServiceServer::new(Answering).max_decoding_message_size(TRANSPORT_BYTES);
        let serving = Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .serve_with_incoming_shutdown(service, ReceiverStream::new(connections), async {
                // Dropping the sender stops as well.
                let _ = stopped.await;
            });
        tokio::spawn(serving);
        let distance = match each_way {
            Some(each_way) => Some(Distance::to(address, each_way).await.map_err(|e| failed("listening")(&e))?),
            None => None,
        };
        if let Some(distance) = &distance {
            address = distance.address();
        }
        let target = Target {
            host: address.ip().to_string(),
            port: address.port(),
            server_name: Some("localhost".to_owned()),
            proxy: None,
        };
        let config = Arc::clone(&source.current().config);
        let stream = dial(&target, config).await.map_err(|e| failed("dialling")(&e))?;
        let mut once = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_| {
            let stream = once.take().ok_or_else(|| std::io::Error::other("the link is over"));
            std::future::ready(stream)
        });
        let channel = Endpoint::from_static("http://localhost")
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_with_connector(connector)
            .await
            .map_err(|e| failed("HTTP/2")(&e))?;
        let (requests, outgoing) = mpsc::channel(1024);
        let mut link = RunnerLinkServiceClient::new(channel).max_decoding_message_size(TRANSPORT_BYTES);
        let opened = link.connect(ReceiverStream::new(outgoing)).await.map_err(|e| failed("the stream")(&e))?;
        Ok(Self { requests, answers: opened.into_inner(), _distance: distance, _stop: stop })
    }

    /// One message of `sent` bytes there and one of `received` bytes back; milliseconds.
    ///
    /// # Errors
    /// [`BenchError::Link`].
    pub async fn round(&mut self, sent: usize, received: usize) -> Result<f64, BenchError> {
        let frame = frame(vec![0; sent], received);
        let start = Instant::now();
        self.send(frame).await?;
        self.answer().await?;
        Ok(milliseconds(start))
    }

    /// `bytes` there in pieces as the runner sends them, and a word back; milliseconds.
    ///
    /// # Errors
    /// [`BenchError::Link`].
    pub async fn push(&mut self, bytes: usize) -> Result<f64, BenchError> {
        let start = Instant::now();
        for _ in 0..bytes / CHUNK_BYTES {
            self.send(frame(vec![0; CHUNK_BYTES], 0)).await?;
        }
        self.send(frame(Vec::new(), 1)).await?;
        self.answer().await?;
        Ok(milliseconds(start))
    }

    async fn send(&self, frame: pb::RunnerFrame) -> Result<(), BenchError> {
        self.requests.send(frame).await.map_err(|error| failed("sending")(&error))
    }

    async fn answer(&mut self) -> Result<(), BenchError> {
        match self.answers.message().await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(failed("receiving")(&"the stream has ended")),
            Err(status) => Err(failed("receiving")(&status)),
        }
    }
}

/// `data` for the server, which is to answer with `wanted` bytes; with 0 it does not answer.
fn frame(data: Vec<u8>, wanted: usize) -> pb::RunnerFrame {
    let chunk = pb::OutputChunk { data, skipped_before: wanted as u64, ..Default::default() };
    pb::RunnerFrame { body: Some(pb::runner_frame::Body::Output(chunk)), ..Default::default() }
}

struct Answering;

#[tonic::async_trait]
impl RunnerLinkService for Answering {
    type ConnectStream = ReceiverStream<Result<pb::OrchestratorFrame, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<pb::RunnerFrame>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(frame)) = incoming.message().await {
                let Some(pb::runner_frame::Body::Output(chunk)) = frame.body else { continue };
                let Some(wanted) = usize::try_from(chunk.skipped_before).ok().filter(|wanted| *wanted > 0) else {
                    continue;
                };
                let data = pb::WriteStdin { data: vec![0; wanted], ..Default::default() };
                let body = Some(pb::orchestrator_frame::Body::WriteStdin(data));
                if sender.send(Ok(pb::OrchestratorFrame { body, ..Default::default() })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stream_answers_what_was_asked_for_and_only_that() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut echo = Echo::open(directory.path(), None).await.expect("open");

        let round = echo.round(64, 200_000).await.expect("answered");
        let pushed = echo.push(4 * CHUNK_BYTES).await.expect("answered");

        assert!(round > 0.0 && pushed > 0.0);
    }

    #[tokio::test]
    async fn answer_over_a_distance_takes_both_ways() {
        let directory = tempfile::tempdir().expect("a directory");
        let each_way = Duration::from_millis(15);
        let mut echo = Echo::open(directory.path(), Some(each_way)).await.expect("open");

        let took = echo.round(64, 64).await.expect("answered");

        assert!(took >= 2.0 * each_way.as_secs_f64() * 1e3, "{took}");
    }
}
