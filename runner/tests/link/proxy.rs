//! Through an HTTP proxy, and past one that refuses.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use runner::connector::dial::{DialError, Proxy, Target, dial};
use runner::connector::tls::TlsSource;
use runner::dev::{LinkSettings, Orchestrator};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::world::within;

/// Answers one CONNECT with `answer`, and tunnels to `port` if it begins with 200.
async fn proxy(port: u16, answer: &'static str) -> (u16, Arc<Mutex<String>>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let own = listener.local_addr().unwrap().port();
    let asked = Arc::new(Mutex::new(String::new()));
    let seen = Arc::clone(&asked);
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(near.read_u8().await.unwrap());
        }
        *seen.lock().unwrap() = String::from_utf8(request).unwrap();
        near.write_all(format!("HTTP/1.1 {answer}\r\nVia: test\r\n\r\n").as_bytes()).await.unwrap();
        if answer.starts_with("200") {
            let mut far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        }
    });
    (own, asked)
}

async fn dial_through(answer: &'static str) -> (Result<(), DialError>, String) {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let files = orchestrator.write_client_files(directory.path(), "runner-1").unwrap();
    let source = TlsSource::load(files, SystemTime::now()).unwrap();
    let (port, asked) = proxy(orchestrator.address().port(), answer).await;
    let target = Target {
        host: "orchestrator.example".into(),
        port: 8443,
        server_name: Some("localhost".into()),
        proxy: Some(Proxy { host: "127.0.0.1".into(), port, authorization: Some("Basic dTpw".into()) }),
    };
    let result = within("dial", dial(&target, Arc::clone(&source.current().config))).await.map(drop);
    let asked = asked.lock().unwrap().clone();
    (result, asked)
}

#[tokio::test]
async fn proxy_is_asked_for_the_name_of_the_orchestrator_and_tls_goes_through() {
    let (result, asked) = dial_through("200 Connection established").await;
    result.unwrap();
    assert!(asked.starts_with("CONNECT orchestrator.example:8443 HTTP/1.1\r\n"), "{asked}");
    assert!(asked.contains("Proxy-Authorization: Basic dTpw\r\n"));
}

#[tokio::test]
async fn refusal_of_the_proxy_is_told_with_its_words() {
    let (result, _) = dial_through("407 Proxy Authentication Required").await;
    let error = result.unwrap_err().to_string();
    assert!(error.contains("refused the tunnel: HTTP/1.1 407 Proxy Authentication Required"), "{error}");
}
