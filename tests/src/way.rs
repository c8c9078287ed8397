//! What lies between a daemon and a server that it dials, such as a proxy.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// One side of a way, on a port of its own. It ends with the test.
#[derive(Debug)]
pub struct Way {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
    serving: JoinHandle<()>,
}

impl Drop for Way {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Way {
    /// A proxy that makes every tunnel that it is asked for.
    ///
    /// # Panics
    /// When the host does not let us.
    pub async fn proxy() -> Self {
        Self::serve(|mut near, heads| async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = near.read_u8().await else { return };
                head.push(byte);
            }
            let head = String::from_utf8_lossy(&head).into_owned();
            let port = head.split([' ', ':']).nth(2).and_then(|port| port.parse::<u16>().ok());
            heads.lock().unwrap_or_else(PoisonError::into_inner).push(head);
            let Ok(mut far) = TcpStream::connect(("127.0.0.1", port.expect("a port"))).await else { return };
            if near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.is_ok() {
                // It ends with either side.
                let _ = copy_bidirectional(&mut near, &mut far).await;
            }
        })
        .await
    }

    /// Something that speaks with whoever connects, and may write down what it has heard.
    ///
    /// # Panics
    /// When the host does not let us.
    pub async fn serve<F>(speak: impl Fn(TcpStream, Arc<Mutex<Vec<String>>>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let heads: Arc<Mutex<Vec<String>>> = Arc::default();
        let heard = Arc::clone(&heads);
        let serving = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(speak(stream, Arc::clone(&heard)));
            }
        });
        Self { port, heads, serving }
    }

    /// Where it listens, on the loopback address.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What proxies were asked for, with the headers.
    #[must_use]
    pub fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
