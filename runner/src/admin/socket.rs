//! The socket itself: bound privately, put in place at once, and only for its own user and root.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc};
use tracing::warn;

use super::peer::Peer;
use crate::telemetry::Counters;

/// Connections at once; each costs a descriptor and what its requests hold.
const MAX_CONNECTIONS: usize = 64;

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

/// Accepts peers of `own_uid` and root until nobody takes them any more. A peer that is one too many is hung up on.
pub(super) async fn accept(
    listener: UnixListener,
    own_uid: u32,
    peers: mpsc::Sender<io::Result<Peer>>,
    counters: Counters,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
            Ok(peer) if may_come_in(own_uid, peer.uid()) => {
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                    counters.add("admin_connections_refused_total", &[]);
                    warn!(limit = MAX_CONNECTIONS, "administration socket has as many connections as it takes");
                    continue;
                };
                if peers.send(Ok(Peer::new(stream, place))).await.is_err() {
                    return;
                }
            }
            Ok(peer) => warn!(uid = peer.uid(), "administration socket refused a user"),
            Err(error) => warn!(%error, "administration socket cannot tell its peer"),
        }
    }
}

fn may_come_in(own_uid: u32, peer: u32) -> bool {
    peer == own_uid || peer == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    #[test]
    fn nobody_comes_in_but_the_runners_own_user_and_root() {
        assert_eq!(
            [1000, 0, 1001, 65534, u32::MAX].map(|peer| may_come_in(1000, peer)),
            [true, true, false, false, false]
        );
    }

    #[tokio::test]
    async fn connection_that_is_one_too_many_is_closed_and_counted_until_another_has_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = bind(&path).unwrap();
        let (sender, mut accepted) = mpsc::channel(MAX_CONNECTIONS + 1);
        let counters = Counters::default();
        let own_uid = nix::unistd::getuid().as_raw();
        let accepting = tokio::spawn(accept(listener, own_uid, sender, counters.clone()));
        let mut served = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            served.push((UnixStream::connect(&path).await.unwrap(), accepted.recv().await.unwrap().unwrap()));
        }

        let mut refused = UnixStream::connect(&path).await.unwrap();
        assert_eq!(refused.read(&mut [0; 1]).await.unwrap(), 0, "it is not closed");
        assert_eq!(counters.all(), [("admin_connections_refused_total".to_owned(), 1)].into());

        served.pop();
        let _next = UnixStream::connect(&path).await.unwrap();
        assert!(accepted.recv().await.unwrap().is_ok());
        accepting.abort();
    }
}
