//! Who may talk to whom: every certificate that is not exactly right is refused, with a reason an operator can act on.

use std::sync::Arc;
use std::time::SystemTime;

use runner::connector::dial::{DialError, Target, dial};
use runner::connector::tls::{Reload, TlsError, TlsFiles, TlsSource};
use runner::dev::pki::{Authority, Issued, Validity};
use runner::dev::{LinkSettings, Orchestrator};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::world::{Options, Runner, within};

async fn dial_error(server: impl Fn(&Authority) -> Issued, trusted: Option<&Authority>) -> String {
    let authority = Authority::new("ours").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let client = authority.client("runner-1", Validity::Now).unwrap();
    let files = authority.write_client_files(directory.path(), &client).unwrap();
    if let Some(other) = trusted {
        std::fs::write(&files.authorities, other.certificate_pem()).unwrap();
    }
    let issued = server(&authority);
    let orchestrator = Orchestrator::start_with(authority, &issued, LinkSettings::default()).await.unwrap();
    let error = within("dial", try_dial(&orchestrator, files)).await.unwrap_err();
    assert_eq!(orchestrator.links(), 0);
    error.to_string()
}

async fn try_dial(orchestrator: &Orchestrator, files: TlsFiles) -> Result<(), DialError> {
    let source = TlsSource::load(files, SystemTime::now()).unwrap();
    let port = orchestrator.address().port();
    let target = Target { host: "127.0.0.1".into(), port, server_name: Some("localhost".into()), proxy: None };
    dial(&target, Arc::clone(&source.current().config)).await.map(drop)
}

#[tokio::test]
async fn orchestrator_with_an_expired_certificate_is_refused() {
    let error = dial_error(|ours| ours.server("localhost", Validity::Expired).unwrap(), None).await;
    assert!(error.contains("TLS with localhost failed") && error.contains("certificate expired"), "{error}");
}

#[tokio::test]
async fn orchestrator_with_a_certificate_of_the_future_is_refused() {
    let error = dial_error(|ours| ours.server("localhost", Validity::NotYet).unwrap(), None).await;
    assert!(error.contains("not valid yet"), "{error}");
}

#[tokio::test]
async fn orchestrator_with_another_name_is_refused() {
    let error = dial_error(|ours| ours.server("elsewhere.example", Validity::Now).unwrap(), None).await;
    assert!(error.contains("not valid for name") && error.contains("localhost"), "{error}");
}

#[tokio::test]
async fn orchestrator_of_another_authority_is_refused() {
    let other = Authority::new("theirs").unwrap();
    let error = dial_error(|ours| ours.server("localhost", Validity::Now).unwrap(), Some(&other)).await;
    assert!(error.contains("UnknownIssuer"), "{error}");
}

/// A peer with the right certificate that speaks nothing newer than TLS 1.2, or another protocol than HTTP/2 inside.
#[tokio::test]
async fn orchestrator_that_speaks_only_an_older_tls_or_another_protocol_is_refused() {
    let authority = Authority::new("ours").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let client = authority.client("runner-1", Validity::Now).unwrap();
    let files = authority.write_client_files(directory.path(), &client).unwrap();
    let server = authority.server("localhost", Validity::Now).unwrap();
    let older = {
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let config = config.with_protocol_versions(&[&rustls::version::TLS12]).unwrap().with_no_client_auth();
        let chain =
            CertificateDer::pem_slice_iter(server.certificate_pem.as_bytes()).collect::<Result<_, _>>().unwrap();
        config.with_single_cert(chain, PrivateKeyDer::from_pem_slice(server.key_pem.as_bytes()).unwrap()).unwrap()
    };
    let mut other = authority.server_config(&server).unwrap();
    other.alpn_protocols = vec![b"http/1.1".to_vec()];
    for (config, expected) in [(older, "ProtocolVersion"), (other, "NoApplicationProtocol")] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            // The handshake fails on both sides.
            let _ = acceptor.accept(stream).await;
        });
        let source = TlsSource::load(files.clone(), SystemTime::now()).unwrap();
        let target = Target { host: "127.0.0.1".into(), port, server_name: Some("localhost".into()), proxy: None };

        let error = within("dial", dial(&target, Arc::clone(&source.current().config))).await.unwrap_err().to_string();

        assert!(error.contains("TLS with localhost failed") && error.contains(expected), "{error}");
    }
}

#[tokio::test]
async fn runner_whose_certificate_is_of_another_authority_never_gets_a_link() {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let other = Authority::new("theirs").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let client = other.client("runner-1", Validity::Now).unwrap();
    let files = other.write_client_files(directory.path(), &client).unwrap();
    std::fs::write(&files.authorities, orchestrator.authority().certificate_pem()).unwrap();
    // In TLS 1.3 the client is done before the server has looked; the refusal is on the server's side.
    let _ = try_dial(&orchestrator, files).await;
    within("refusal", async {
        while orchestrator.refused_handshakes().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(orchestrator.refused_handshakes()[0].contains("UnknownIssuer"), "{:?}", orchestrator.refused_handshakes());
    assert_eq!(orchestrator.links(), 0);
}

/// An orchestrator knows a runner by its certificate, so another name would only be refused there.
#[tokio::test]
async fn runner_does_not_dial_with_the_certificate_of_another_runner_or_of_nobody() {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let authority = orchestrator.authority();
    let cases = [
        (
            authority.client("runner-2", Validity::Now),
            "names runner runner-2, and runner.id is runner-1; write id = \"runner-2\"",
        ),
        (authority.nameless(), "has no subject alternative name, so it names no runner; get one"),
    ];
    for (issued, expected) in cases {
        let files = authority.write_client_files(directory.path(), &issued.unwrap()).unwrap();

        let refused = Runner::try_dial(orchestrator.address().port(), files, Options::default());

        let error = refused.err().expect("refused").to_string();
        assert!(error.contains("certificate.pem") && error.contains(expected), "{error}");
    }
    assert_eq!(orchestrator.links(), 0);
}

#[test]
fn own_certificate_that_is_expired_or_not_yet_valid_is_refused_before_dialling() {
    let authority = Authority::new("ours").unwrap();
    let directory = tempfile::tempdir().unwrap();
    for (validity, expected) in [(Validity::Expired, "is expired since"), (Validity::NotYet, "is not valid before")] {
        let client = authority.client("runner-1", validity).unwrap();
        let files = authority.write_client_files(directory.path(), &client).unwrap();
        let error = TlsSource::load(files, SystemTime::now()).unwrap_err().to_string();
        assert!(error.contains("certificate.pem") && error.contains(expected), "{error}");
    }
}

#[test]
fn half_a_renewal_keeps_the_old_set_and_the_other_half_replaces_it() {
    let authority = Authority::new("ours").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let first = authority.client("runner-1", Validity::Now).unwrap();
    let files = authority.write_client_files(directory.path(), &first).unwrap();
    let mut source = TlsSource::load(files.clone(), SystemTime::now()).unwrap();
    let second = authority.client("runner-1", Validity::Now).unwrap();
    std::fs::write(&files.certificate, &second.certificate_pem).unwrap();
    assert!(matches!(source.reload(SystemTime::now()), Reload::Kept(TlsError::Mismatch { .. })));
    // The same fault is told once.
    assert!(matches!(source.reload(SystemTime::now()), Reload::Unchanged));
    std::fs::write(&files.key, &second.key_pem).unwrap();
    assert!(matches!(source.reload(SystemTime::now()), Reload::Replaced));
    // So is that a file is gone; and that it is back.
    std::fs::rename(&files.key, directory.path().join("away")).unwrap();
    assert!(matches!(source.reload(SystemTime::now()), Reload::Kept(TlsError::Read { .. })));
    assert!(matches!(source.reload(SystemTime::now()), Reload::Unchanged));
    std::fs::rename(directory.path().join("away"), &files.key).unwrap();
    assert!(matches!(source.reload(SystemTime::now()), Reload::Restored));
    assert!(matches!(source.reload(SystemTime::now()), Reload::Unchanged));
}

#[test]
fn certificate_of_somebody_else_never_replaces_ours() {
    let authority = Authority::new("ours").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let first = authority.client("runner-1", Validity::Now).unwrap();
    let files = authority.write_client_files(directory.path(), &first).unwrap();
    let mut source = TlsSource::load(files, SystemTime::now()).unwrap();
    let other = authority.client("runner-2", Validity::Now).unwrap();
    authority.write_client_files(directory.path(), &other).unwrap();
    let Reload::Kept(error) = source.reload(SystemTime::now()) else { panic!("must be kept") };
    assert!(error.to_string().contains("runner-2") && error.to_string().contains("runner-1"), "{error}");
}
