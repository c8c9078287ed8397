//! The socket itself: bound privately, put in place at once, and only for its own user and root.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tracing::warn;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody else answers there.
    #[error("another runner answers at {}; stop it first", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("cannot make administration socket {}: {source}", path.display())]
    Make {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Binds under another name, narrows the mode, then renames: nobody can connect before the mode is right, and a socket
/// left by a dead runner is replaced.
pub(super) fn bind(path: &Path) -> Result<UnixListener, SocketError> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(SocketError::Taken { path: path.to_owned() });
    }
    let made = || -> io::Result<UnixListener> {
        let hidden = path.with_extension(format!("{}.new", std::process::id()));
        match std::fs::remove_file(&hidden) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&hidden)?;
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&hidden, path)?;
        Ok(listener)
    };
    made().map_err(|source| SocketError::Make { path: path.to_owned(), source })
}

/// Accepts peers of `own_uid` and root until nobody takes them any more.
pub(super) async fn accept(listener: UnixListener, own_uid: u32, peers: mpsc::Sender<io::Result<UnixStream>>) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to come back rather than spin.
                warn!(%error, "administration socket cannot accept");
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == own_uid || peer.uid() == 0 => {
                if peers.send(Ok(stream)).await.is_err() {
                    return;
                }
            }
            Ok(peer) => warn!(uid = peer.uid(), "administration socket refused a user"),
            Err(error) => warn!(%error, "administration socket cannot tell its peer"),
        }
    }
}
