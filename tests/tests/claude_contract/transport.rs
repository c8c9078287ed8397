//! The way from the built daemon to the server: TLS with a private authority, through a proxy, or not at all.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use runner::dev::pki::{Authority, Validity};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sandbox_runner_tests::claude::{Mock, ToolUse, ours};
use sandbox_runner_tests::way::Way;
use sandbox_runner_tests::{host, needs_root};
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use super::{Site, wait_until};

/// TLS with this authority before a server without it.
async fn tls(authority: &Authority, to: u16) -> Way {
    let issued = authority.server("localhost", Validity::Now).expect("a certificate");
    let chain = vec![CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).expect("a certificate")];
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).expect("a key");
    let config = ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a certificate with its key");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    Way::serve(move |stream, _| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(mut near) = acceptor.accept(stream).await else { return };
            let Ok(mut far) = TcpStream::connect(("127.0.0.1", to)).await else { return };
            // It ends with either side.
            let _ = copy_bidirectional(&mut near, &mut far).await;
        }
    })
    .await
}

/// A daemon that is told to use TLS on this port, with `more` lines in its section.
async fn secured(mock: Mock, port: u16, authority: Option<&Authority>, more: &str) -> Site {
    let environment = mock.lock().create_environment("test").expect("an environment");
    let mut daemon = ours::install(&mock, &environment, false).await;
    let mut lines = more.to_owned();
    if let Some(authority) = authority {
        let file = daemon.config().with_file_name("authority.pem");
        fs::write(&file, authority.certificate_pem()).expect("the authority");
        fs::set_permissions(&file, Permissions::from_mode(0o644)).expect("chmod of the authority");
        lines.push_str(&format!("ca_file = {file:?}\n"));
    }
    let written = fs::read_to_string(daemon.config()).expect("the configuration");
    let written = written
        .replace(&mock.base_url(), &format!("https://localhost:{port}"))
        .replace("allow_plain_http = true\n", &lines);
    fs::write(daemon.config(), written).expect("the configuration");
    daemon.start_launcher().await;
    daemon.tend_runner();
    Site { daemon, mock, environment }
}

fn port_of(mock: &Mock) -> u16 {
    mock.base_url().rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_is_served_over_tls_of_a_private_authority_and_through_a_proxy() {
    needs_root!();
    let _host = host::shared();
    let mock = Mock::start().await;
    let authority = Authority::new("private authority").expect("an authority");
    let (front, proxy) = (tls(&authority, port_of(&mock)).await, Way::proxy().await);
    let through = format!("proxy = \"http://u:hunter2@127.0.0.1:{}\"\n", proxy.port());
    let site = secured(mock, front.port(), Some(&authority), &through).await;
    let session = site.session();
    assert_eq!(site.text(&session, ToolUse::bash("echo hi")).await, "hi");
    let asked = format!("CONNECT localhost:{} HTTP/1.1\r\n", front.port());
    assert!(proxy.heads().iter().all(|head| head.starts_with(&asked) && head.contains("Proxy-Authorization: Basic ")));
    assert!(!site.daemon.log().contains("hunter2"));
    site.end();
}

/// It says why, asks again later and later, and no request has left it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_is_not_trusted_hears_nothing_and_the_runner_says_why_and_stays() {
    needs_root!();
    let _host = host::shared();
    let mock = Mock::start().await;
    let authority = Authority::new("private authority").expect("an authority");
    let front = tls(&authority, port_of(&mock)).await;
    let mut site = secured(mock, front.port(), None, "").await;
    let said = |site: &Site| site.daemon.log().matches("UnknownIssuer").count();
    wait_until("it says why", || said(&site) >= 2).await;
    assert!(site.daemon.runner_is_alive());
    assert!(site.daemon.log().contains("TLS with localhost failed"));
    assert_eq!(site.mock.lock().record.len(), 0);
    site.end();
}
