//! The way to the server over real sockets: who is trusted, where a credential goes, and what a hostile answer can do.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::content;
use super::http::{Base, Failure};
use super::testing::{Answer, Server, api, secret};
use super::wire::Beat;
use crate::connector::tls::public_client;
use crate::dev::pki::{Authority, Validity};

const WITHIN: Duration = Duration::from_secs(20);

/// A server with a certificate for `name`, and the file of the authority that has signed it.
async fn tls_server(directory: &Path, name: &str, validity: Validity) -> (Server, PathBuf) {
    let authority = Authority::new("private authority").expect("an authority");
    let issued = authority.server(name, validity).expect("a certificate");
    let chain = vec![CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).expect("a certificate")];
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).expect("a key");
    let config = ServerConfig::builder_with_provider(ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .expect("a certificate with its key");
    let file = directory.join("ca.pem");
    std::fs::write(&file, authority.certificate_pem()).expect("written");
    (Server::start(Answer::ok("null"), Some(config)).await, file)
}

fn secured(server: &Server, proxy: Option<&Server>, authorities: Option<&Path>) -> Base {
    let tls = Some(public_client(authorities).expect("a client"));
    Base { target: server.target(proxy), tls, prefix: String::new() }
}

async fn poll(base: Base) -> Result<(), String> {
    match api(base).poll().await {
        Ok(None) => Ok(()),
        Ok(Some(delivery)) => panic!("{delivery:?}"),
        Err(failure) => Err(failure.to_string()),
    }
}

async fn beat(server: &Server, within: Duration) -> Result<Beat, Failure> {
    api(server.plain()).beat(&secret(), "work_1", "NO_HEARTBEAT", within).await
}

#[tokio::test]
async fn private_authority_is_trusted_where_it_is_configured_and_nowhere_else() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let (server, authority) = tls_server(directory.path(), "localhost", Validity::Now).await;
    assert_eq!(poll(secured(&server, None, Some(&authority))).await, Ok(()));
    assert_eq!(server.heads().len(), 1);

    let other = directory.path().join("other.pem");
    std::fs::write(&other, Authority::new("another").expect("an authority").certificate_pem()).expect("written");
    for authorities in [None, Some(other.as_path())] {
        let text = poll(secured(&server, None, authorities)).await.expect_err("refused");
        assert!(text.starts_with("TLS with localhost failed: ") && text.contains("UnknownIssuer"), "{text}");
    }
    assert_eq!(server.heads().len(), 1, "the key went to somebody who is not trusted");
}

#[tokio::test]
async fn server_of_another_name_and_one_whose_certificate_has_expired_get_no_credential() {
    let directory = tempfile::tempdir().expect("temporary directory");
    for (name, validity, why) in [
        ("other.example", Validity::Now, "not valid for name"),
        ("localhost", Validity::Expired, "expired"),
        ("localhost", Validity::NotYet, "not valid yet"),
    ] {
        let (server, authority) = tls_server(directory.path(), name, validity).await;
        let text = poll(secured(&server, None, Some(&authority))).await.expect_err("refused");
        assert!(text.starts_with("TLS with localhost failed: ") && text.contains(why), "{why}: {text}");
        assert_eq!(server.heads(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn proxy_is_asked_for_a_tunnel_and_sees_neither_key_nor_request() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let (server, authority) = tls_server(directory.path(), "localhost", Validity::Now).await;
    let proxy = Server::proxy("200 Connection established").await;
    assert_eq!(poll(secured(&server, Some(&proxy), Some(&authority))).await, Ok(()));
    let port = server.port;
    let asked = format!(
        "CONNECT localhost:{port} HTTP/1.1\r\nHost: localhost:{port}\r\nProxy-Authorization: Basic dTpw\r\n\r\n"
    );
    assert_eq!(proxy.heads(), [asked]);
    assert!(server.heads()[0].contains("authorization: Bearer hunter2"));
    assert!(!server.heads()[0].to_ascii_lowercase().contains("proxy-authorization"));
}

#[tokio::test]
async fn refusal_of_a_proxy_is_told_with_its_address_and_status() {
    let server = Server::start(Answer::ok("null"), None).await;
    for status in ["407 Proxy Authentication Required", "502 Bad Gateway", "403 \u{1b}[2JForbidden"] {
        let proxy = Server::proxy(status).await;
        let text = poll(secured(&server, Some(&proxy), None)).await.expect_err("refused");
        let said = status.replace('\u{1b}', "");
        assert_eq!(text, format!("proxy 127.0.0.1:{} refused the tunnel: HTTP/1.1 {said}", proxy.port));
        assert!(!text.contains("dTpw"));
    }
    assert_eq!(server.heads(), Vec::<String>::new(), "nothing goes past the proxy");
}

#[tokio::test]
async fn address_of_version_6_is_in_brackets_where_a_proxy_reads_it() {
    let proxy = Server::proxy("502 Bad Gateway").await;
    let mut target = proxy.target(Some(&proxy));
    (target.host, target.port) = ("::1".to_owned(), 443);
    poll(Base { target, tls: None, prefix: String::new() }).await.expect_err("refused");
    assert!(proxy.heads()[0].starts_with("CONNECT [::1]:443 HTTP/1.1\r\nHost: [::1]:443\r\n"), "{:?}", proxy.heads());
}

#[tokio::test]
async fn redirect_is_not_followed() {
    let other = Server::start(Answer::ok("null"), None).await;
    for status in [301, 302, 307, 308] {
        let to = format!("http://localhost:{}/", other.port);
        let answer = format!("HTTP/1.1 {status} Moved\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n");
        let server = Server::start(Answer::text(answer), None).await;
        let text = poll(server.plain()).await.expect_err("refused");
        assert!(text.contains(&status.to_string()) && text.ends_with("set base_url to where the API is"), "{text}");
    }
    assert_eq!(other.heads(), Vec::<String>::new(), "the key went elsewhere");
}

#[tokio::test]
async fn servers_with_a_prefix_and_another_name_for_the_worker_are_asked_as_they_want_it() {
    let server = Server::start(Answer::ok("null"), None).await;
    assert_eq!(poll(Base { prefix: "/tenant/api/v1/cloud".to_owned(), ..server.plain() }).await, Ok(()));
    let head = server.heads().remove(0);
    assert!(
        head.starts_with("GET /tenant/api/v1/cloud/environments/env_1/work/poll?block_ms=999 HTTP/1.1\r\n"),
        "{head}"
    );
    assert!(head.contains("\r\nworker-id: w-1\r\n") && !head.contains("anthropic-worker-id"), "{head}");
    assert!(!head.contains("x-api-key") && !head.contains("x-stainless"), "{head}");
}

#[tokio::test]
async fn answers_without_an_end_are_given_up_at_their_limit() {
    let megabyte = vec![b' '; 1024 * 1024];
    let chunk = [b"100000\r\n".as_slice(), &megabyte, b"\r\n"].concat();
    for (head, ever) in [
        ("HTTP/1.1 200 OK\r\n\r\n", megabyte.clone()),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2147483648\r\n\r\n", megabyte.clone()),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", chunk.clone()),
    ] {
        let server = Server::start(Answer::endless(head, ever), None).await;
        let failure = beat(&server, WITHIN).await.expect_err("refused");
        assert_eq!(failure.to_string(), "the answer is larger than 1048576 bytes", "{head}");
        let page = api(server.plain()).list(&secret(), "sesn_1", None).await.expect_err("refused");
        assert_eq!(page.to_string(), "the answer is larger than 67108864 bytes", "{head}");
    }
}

#[tokio::test]
async fn heads_without_an_end_are_given_up() {
    let server = Server::start(Answer::endless("HTTP/1.1 200 OK\r\n", b"a: b\r\n".repeat(1000)), None).await;
    let failure = beat(&server, WITHIN).await.expect_err("refused");
    assert!(matches!(failure, Failure::Transport(_)), "{failure}");
}

#[tokio::test]
async fn answers_that_do_not_come_are_waited_for_as_long_as_the_request_may_take() {
    for slow in ["", "HTTP/1.1 200 OK\r\nx: ", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nnu"] {
        let server = Server::start(Answer::text(slow), None).await;
        let begun = Instant::now();
        let failure = beat(&server, Duration::from_millis(300)).await.expect_err("refused");
        assert!(matches!(failure, Failure::Timeout(_)) && !failure.is_fatal(), "{slow:?}: {failure}");
        assert!(begun.elapsed() < WITHIN, "{slow:?}");
    }
}

/// A lease that is lost is lost, and a key that is refused is refused, although the reason never ends.
#[tokio::test]
async fn refusal_counts_although_its_reason_never_ends() {
    for status in [401, 412] {
        let head = format!("HTTP/1.1 {status} Refused\r\ncontent-length: 100\r\n\r\n{{");
        for answer in [Answer::text(head.clone()), Answer::endless(&head, vec![b' '; 64])] {
            let server = Server::start(answer, None).await;
            let failure = beat(&server, WITHIN).await.expect_err("refused");
            assert_eq!(failure.status(), Some(status), "{failure}");
        }
    }
}

/// What was stored is stored, whatever is said about it: to post it once more would be a second answer.
#[tokio::test]
async fn result_that_was_taken_is_not_posted_again_for_what_stands_in_the_answer() {
    let head = "HTTP/1.1 200 OK\r\ncontent-length: 2147483648\r\n\r\n";
    for answer in [Answer::text(head), Answer::endless(head, vec![b'x'; 65_536]), Answer::ok("not JSON")] {
        let server = Server::start(answer, None).await;
        let api = api(server.plain());
        let blocks = content::text(false, "x");
        assert!(api.answer(&secret(), "sesn_1", "t1", blocks).await.is_ok());
        assert!(api.stop(&secret(), "work_1").await.is_ok());
    }
    let empty =
        Server::start(Answer::text("HTTP/1.1 204 No Content\r\ncontent-type: application/json\r\n\r\n"), None).await;
    assert!(api(empty.plain()).stop(&secret(), "work_1").await.is_ok());
}

#[tokio::test]
async fn answers_that_are_no_json_or_another_json_are_failures_that_may_pass() {
    for body in ["", "{", "[]", "3", "\"text\"", "{\"id\": \"a/b\"}", "<html>"] {
        let server = Server::start(Answer::ok(body), None).await;
        let api = api(server.plain());
        let failures = [
            api.poll().await.err(),
            api.beat(&secret(), "work_1", "x", WITHIN).await.err(),
            api.is_over(&secret(), "sesn_1").await.err().or(Some(Failure::Malformed)),
            api.list(&secret(), "sesn_1", None).await.err(),
        ];
        for failure in failures {
            let failure = failure.unwrap_or_else(|| panic!("{body:?} was taken"));
            assert!(!failure.is_fatal(), "{body:?}: {failure}");
        }
    }
}
