//! How `status`, `ps`, `inspect`, `kill` and `logs` reach the running daemon: its admin socket on this host, and nothing else.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use hyper_util::rt::TokioIo;
use proto::admin::v1::admin_service_client::AdminServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::{complain, embedded};

/// Where the daemon is.
#[derive(Debug, Clone, Args)]
pub(super) struct AdminArguments {
    /// State directory of the daemon [default: /var/lib/sandbox-runner for root, else below the home]
    #[arg(long, value_name = "DIR", conflicts_with = "socket")]
    state_dir: Option<PathBuf>,
    /// Admin socket of the daemon [default: admin.sock in its run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Why the daemon did not do it.
#[derive(Debug, thiserror::Error)]
pub(super) enum AdminError {
    #[error("no daemon answers at {}; start one with sandbox-runner run, or name its --socket", path.display())]
    Connect { path: PathBuf, source: tonic::transport::Error },
    #[error("{}", .0.message())]
    Refused(Box<tonic::Status>),
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
}

impl From<tonic::Status> for AdminError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// A client of the daemon.
pub(super) type AdminClient = AdminServiceClient<Channel>;

/// Connects and runs `work`; a failure is printed and becomes exit code 1.
pub(super) fn with_daemon<F>(arguments: &AdminArguments, work: impl FnOnce(AdminClient) -> F) -> ExitCode
where
    F: Future<Output = Result<(), AdminError>>,
{
    let path = arguments.socket.clone().unwrap_or_else(|| default_socket(arguments.state_dir.as_deref()));
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&AdminError::Runtime(error));
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(async { work(connect(path).await?).await }) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has seen enough.
        Err(AdminError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn default_socket(state_directory: Option<&Path>) -> PathBuf {
    let absolute = state_directory.and_then(|path| std::path::absolute(path).ok());
    embedded::home(absolute.as_deref()).run.join("admin.sock")
}

async fn connect(path: PathBuf) -> Result<AdminClient, AdminError> {
    let socket = path.clone();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The name is required by the protocol and used by nobody: the connector knows where to go.
    let channel = Endpoint::from_static("http://sandbox-runner.local")
        .connect_with_connector(connector)
        .await
        .map_err(|source| AdminError::Connect { path, source })?;
    Ok(AdminServiceClient::new(channel))
}
