//! The first certificate for a one-time token: interrupted at any point, cheated in any way.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use proto::runner::v1 as pb;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType};
use runner::connector::dial::Target;
use runner::connector::enrollment::{EnrollError, Enrollment, Pin, Request, Token, files};
use runner::connector::tls::TlsSource;
use runner::dev::pki::{Authority, Validity};
use runner::dev::{Enrollment as Service, LinkSettings, Orchestrator};
use tonic::Status;

use crate::world::{Options, Runner, within};

/// A request that is right in every way.
pub fn request(service: &Service, token: String) -> Request {
    let port = service.address().port();
    Request {
        target: Target { host: "127.0.0.1".into(), port, server_name: Some("localhost".into()), proxy: None },
        pin: Pin::from_hex(&service.fingerprint()).unwrap(),
        token: Token::parse(token.as_bytes()).unwrap(),
        labels: Default::default(),
        state_id: "state".into(),
        replace: false,
    }
}

pub async fn enroll(request: Request, directory: &Path) -> Result<String, EnrollError> {
    within("enrolment", Enrollment::begin(request, directory)?.run()).await
}

fn is_usable(directory: &Path) -> bool {
    TlsSource::load(files(directory), SystemTime::now()).is_ok()
}

async fn service() -> (Orchestrator, Service) {
    let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
    let service = orchestrator.start_enrollment().await.unwrap();
    (orchestrator, service)
}

#[tokio::test]
async fn enrolled_runner_makes_its_link() {
    let (orchestrator, service) = service().await;
    let directory = tempfile::tempdir().unwrap();
    let runner_id = enroll(request(&service, service.token("runner-1")), directory.path()).await.unwrap();
    assert_eq!(runner_id, "runner-1");
    assert_eq!(std::fs::metadata(files(directory.path()).key).unwrap().permissions().mode() & 0o777, 0o600);
    let _runner = Runner::dial(orchestrator.address().port(), files(directory.path()), Options::default());
    within("runner", orchestrator.runner()).await.unwrap();
}

/// F-60: after every step the process is gone. The same command with the same token ends well, and one key was used.
#[tokio::test]
async fn crash_after_any_step_leaves_a_usable_token_or_a_stored_identity() {
    let (_orchestrator, service) = service().await;
    for crash_after in 0.. {
        let directory = tempfile::tempdir().unwrap();
        let (before, _) = service.issued();
        let wanted = request(&service, service.token("runner-1"));
        let mut first = Enrollment::begin(wanted.clone(), directory.path()).unwrap();
        let mut done = false;
        for _ in 0..crash_after {
            done = within("step", first.step()).await.unwrap().is_some();
        }
        drop(first);
        let stored = is_usable(directory.path());
        match enroll(wanted, directory.path()).await {
            Ok(runner_id) => assert_eq!(runner_id, "runner-1"),
            Err(EnrollError::Enrolled { .. }) => assert!(stored, "after {crash_after} steps neither one nor the other"),
            Err(error) => panic!("after {crash_after} steps: {error}"),
        }
        assert!(is_usable(directory.path()), "after {crash_after} steps");
        assert_eq!(service.issued().0, before + 1, "after {crash_after} steps another key was used");
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 3, "lock, link and one set, after {crash_after} steps");
        if done {
            assert_eq!(crash_after, 5);
            return;
        }
    }
}

/// F-60: the identity was written and not put into use, and by now the service takes the token from nobody.
#[tokio::test]
async fn written_identity_is_put_into_use_although_its_token_has_ended() {
    let (_orchestrator, service) = service().await;
    let directory = tempfile::tempdir().unwrap();
    let token = service.token("runner-1");
    let wanted = request(&service, token.clone());
    let mut first = Enrollment::begin(wanted.clone(), directory.path()).unwrap();
    for _ in ["key", "ask", "write"] {
        assert!(within("step", first.step()).await.unwrap().is_none());
    }
    drop(first);
    assert!(!is_usable(directory.path()));
    service.expire(&token);
    assert_eq!(enroll(wanted.clone(), directory.path()).await.unwrap(), "runner-1");
    assert!(is_usable(directory.path()));

    // A key alone is no identity.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut second = Enrollment::begin(wanted.clone(), elsewhere.path()).unwrap();
    within("step", second.step()).await.unwrap();
    drop(second);
    let error = enroll(wanted, elsewhere.path()).await.unwrap_err().to_string();
    assert!(error.contains("has expired"), "{error}");
}

/// F-60: the service has given the certificate, and its answer was lost.
#[tokio::test]
async fn answer_that_is_lost_is_given_again_for_the_same_key() {
    let (_orchestrator, service) = service().await;
    let directory = tempfile::tempdir().unwrap();
    let wanted = request(&service, service.token("runner-1"));
    service.alter(Some(Box::new(|_| Err(Status::unavailable("the wire was cut")))));
    let error = enroll(wanted.clone(), directory.path()).await.unwrap_err().to_string();
    assert!(error.contains("the wire was cut; the same command may be given again"), "{error}");
    assert!(!is_usable(directory.path()));
    service.alter(None);
    enroll(wanted, directory.path()).await.unwrap();
    assert_eq!(service.issued(), (1, 0));
}

#[tokio::test]
async fn token_that_is_used_expired_or_unknown_is_refused_and_the_old_identity_stays() {
    let (_orchestrator, service) = service().await;
    let (directory, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let used = service.token("runner-1");
    enroll(request(&service, used.clone()), directory.path()).await.unwrap();
    let before = std::fs::read(files(directory.path()).key).unwrap();
    let expired = service.token("runner-1");
    service.expire(&expired);
    let cases =
        [(used, "was used, with another key"), (expired, "has expired"), ("made-up".to_owned(), "is not known")];
    for (token, expected) in cases {
        let again = Request { replace: true, ..request(&service, token) };
        for path in [directory.path(), elsewhere.path()] {
            let error = enroll(again.clone(), path).await.unwrap_err().to_string();
            assert!(error.contains(expected) && error.ends_with("; ask for a new token"), "{error}");
        }
        assert_eq!(std::fs::read(files(directory.path()).key).unwrap(), before);
        assert!(is_usable(directory.path()) && !is_usable(elsewhere.path()));
    }
    let without_replace = enroll(request(&service, service.token("runner-1")), elsewhere.path()).await;
    assert!(without_replace.is_ok(), "a directory without an identity takes a new token with the key it has");
    let error = enroll(request(&service, service.token("runner-1")), directory.path()).await.unwrap_err().to_string();
    // What was tried with --replace left its key there, which is not the one in use.
    assert!(error.contains("is enrolled already, as runner-1") && error.contains("--replace"), "{error}");
}

#[tokio::test]
async fn service_of_another_authority_never_sees_the_token() {
    let (_orchestrator, service) = service().await;
    let directory = tempfile::tempdir().unwrap();
    let other = directory.path().join("other.pem");
    std::fs::write(&other, Authority::new("theirs").unwrap().certificate_pem()).unwrap();
    for (pin, expected) in [
        (Pin::from_file(&other).unwrap(), "UnknownIssuer"),
        (Pin::from_hex(&"ab".repeat(32)).unwrap(), "has the pinned fingerprint"),
    ] {
        let wanted = Request { pin, ..request(&service, service.token("runner-1")) };
        let error = enroll(wanted, &directory.path().join("identity")).await.unwrap_err().to_string();
        assert!(error.contains("TLS with localhost failed") && error.contains(expected), "{error}");
    }
    let mut wanted = request(&service, service.token("runner-1"));
    wanted.target.server_name = Some("elsewhere.example".into());
    let error = enroll(wanted, &directory.path().join("identity")).await.unwrap_err().to_string();
    assert!(error.contains("not valid for name"), "{error}");
    assert_eq!(service.issued(), (0, 0));
    let error = Pin::from_file(&directory.path().join("none.pem")).unwrap_err().to_string();
    assert!(error.contains("none.pem"), "{error}");
    std::fs::write(&other, "nonsense").unwrap();
    let error = Pin::from_file(&other).unwrap_err().to_string();
    assert!(error.contains("it holds no certificate"), "{error}");
}

/// An authority of the test's own, which signs what no good one does.
fn forged(key: &KeyPair, names: Vec<SanType>, usage: ExtendedKeyUsagePurpose) -> pb::EnrollResponse {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(authority, KeyPair::generate().unwrap()).unwrap();
    let mut leaf = CertificateParams::default();
    (leaf.subject_alt_names, leaf.extended_key_usages) = (names, vec![usage]);
    let now = SystemTime::now();
    let hour = std::time::Duration::from_secs(3600);
    (leaf.not_before, leaf.not_after) = ((now - hour).into(), (now + hour).into());
    pb::EnrollResponse {
        runner_id: "runner-1".into(),
        chain_der: vec![leaf.signed_by(key, &authority).unwrap().der().to_vec()],
        trust_bundle_der: vec![authority.der().to_vec()],
        ..Default::default()
    }
}

/// Each of these answers is wrong in one way; nothing of it is kept, and the right one is taken afterwards.
#[tokio::test]
async fn answer_that_does_not_fit_our_key_name_time_or_authority_is_refused_and_the_old_identity_stays() {
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let (orchestrator, service) = service().await;
    let directory = tempfile::tempdir().unwrap();
    enroll(request(&service, service.token("runner-1")), directory.path()).await.unwrap();
    let before = std::fs::read(files(directory.path()).key).unwrap();
    let key = KeyPair::generate().unwrap();
    // The key that an interrupted enrolment would have left, so that the test can sign for it.
    std::fs::write(directory.path().join("pending.pem"), key.serialize_pem()).unwrap();
    let uri = |text: &str| vec![SanType::URI(text.try_into().unwrap())];
    let dns = |text: &str| vec![SanType::DnsName(text.try_into().unwrap())];
    let ours = "spiffe://sandbox-runner.test/runner/dev/runner-1";
    let good = || forged(&key, uri(ours), ClientAuth);
    let foreign = KeyPair::generate().unwrap();
    let half = {
        let mut answer = good();
        let length = answer.chain_der[0].len();
        answer.chain_der[0].truncate(length / 2);
        answer
    };
    let old = orchestrator.authority().client_for(&csr(&key), "runner-1", Validity::Expired).unwrap();
    let bundle = vec![orchestrator.authority().certificate_der()];
    let cases = [
        (forged(&foreign, uri(ours), ClientAuth), "does not belong to certificate"),
        (forged(&key, Vec::new(), ClientAuth), "has no subject alternative name"),
        (forged(&key, dns("runner-1"), ClientAuth), "names runner-1, and not spiffe://"),
        (forged(&key, uri("spiffe://sandbox-runner.test/runner/dev/runner-2"), ClientAuth), "and not spiffe://"),
        (forged(&key, uri(ours), ServerAuth), "is not of an authority in trust_bundle_der"),
        (pb::EnrollResponse { trust_bundle_der: bundle.clone(), ..good() }, "is not of an authority"),
        (pb::EnrollResponse { trust_bundle_der: Vec::new(), ..good() }, "trust_bundle_der holds 0 certificates"),
        (pb::EnrollResponse { trust_bundle_der: vec![b"nonsense".to_vec()], ..good() }, "is not usable"),
        (pb::EnrollResponse { chain_der: Vec::new(), ..good() }, "chain_der holds 0 certificates"),
        (pb::EnrollResponse { chain_der: vec![Vec::new(); 17], ..good() }, "chain_der holds 17 certificates"),
        (pb::EnrollResponse { runner_id: "a b".into(), ..good() }, "runner_id"),
        (pb::EnrollResponse { chain_der: vec![old], trust_bundle_der: bundle, ..good() }, "is expired since"),
        (half, "is not usable"),
    ];
    let wanted = Request { replace: true, ..request(&service, service.token("runner-1")) };
    for (answer, expected) in cases {
        service.alter(Some(Box::new(move |_| Ok(answer.clone()))));
        let error = enroll(wanted.clone(), directory.path()).await.unwrap_err().to_string();
        assert!(error.contains("nothing of it was kept") && error.contains(expected), "{expected}: {error}");
        assert_eq!(std::fs::read(files(directory.path()).key).unwrap(), before);
        assert!(is_usable(directory.path()));
    }
    let answer = good();
    service.alter(Some(Box::new(move |_| Ok(answer.clone()))));
    enroll(wanted, directory.path()).await.unwrap();
    assert_eq!(std::fs::read_to_string(files(directory.path()).key).unwrap(), key.serialize_pem());
}

fn csr(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

#[test]
fn tokens_that_are_not_one_word_are_refused_and_never_repeated() {
    for (text, expected) in [
        ("", "empty"),
        ("\n", "empty"),
        ("two words", "not one word"),
        ("t\u{f6}ken", "not one word"),
        (&"x".repeat(4097), "longer than 4096"),
    ] {
        let error = Token::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(text.trim().is_empty() || !error.contains(text), "{error}");
    }
    assert_eq!(format!("{:?}", Token::parse(b" hunter2\n").unwrap()), "Token(7 bytes)");
}

/// The command itself: token from a file or standard input, and what is left of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn command_reads_the_token_from_a_file_and_empties_it_or_from_standard_input() {
    let (_orchestrator, service) = service().await;
    let directory = tempfile::tempdir().unwrap();
    // As root the command becomes another user, who must be able to come here.
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let (config, token_file) = (directory.path().join("config.toml"), directory.path().join("token"));
    std::fs::write(&config, "").unwrap();
    let token = service.token("runner-7");
    std::fs::write(&token_file, format!("{token}\n")).unwrap();
    let command = |state: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandbox-runner"));
        let endpoint = format!("https://127.0.0.1:{}", service.address().port());
        command.args(["enroll", "--endpoint", &endpoint, "--server-name", "localhost"]);
        command.args(["--ca-sha256", &service.fingerprint(), "--json"]);
        command.arg("--config").arg(&config).arg("--state-dir").arg(directory.path().join(state));
        command
    };
    let run = |mut command: Command, input: Stdio| async move {
        let run = tokio::task::spawn_blocking(move || command.stdin(input).output().unwrap());
        let output = within("command", run).await.unwrap();
        let (text, errors) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        (output.status.code(), text, errors)
    };
    let mut with_file = command("state");
    with_file.arg("--token-file").arg(&token_file);
    let (code, text, errors) = run(with_file, Stdio::null()).await;
    assert_eq!(code, Some(0), "{errors}");
    assert!(text.contains("\"runner_id\":\"runner-7\"") && !errors.contains(&token), "{text}{errors}");
    assert_eq!(std::fs::read(&token_file).unwrap(), b"");
    assert!(is_usable(&directory.path().join("state/identity")));

    let input = directory.path().join("input");
    std::fs::write(&input, service.token("runner-8")).unwrap();
    let (code, text, errors) = run(command("other"), std::fs::File::open(&input).unwrap().into()).await;
    assert_eq!(code, Some(0), "{errors}");
    assert!(text.contains("runner-8"), "{text}");

    let (code, text, errors) = run(command("third"), Stdio::null()).await;
    assert_eq!((code, text.as_str()), (Some(1), ""));
    assert!(errors.contains("the token is not usable: it is empty"), "{errors}");
}
