//! Several environments of one daemon, and their keys.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_runner_tests::claude::{Endpoint, Fate, Mock, NewSession, Secret, ToolUse, ours};
use sandbox_runner_tests::daemon::Options;
use sandbox_runner_tests::launcher::RUNNER_UID;
use sandbox_runner_tests::{host, needs_root};
use serde_json::json;

use super::{Site, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn environments_are_served_beside_each_other_and_a_refused_key_stops_its_own_only() {
    needs_root!();
    let _host = host::shared();
    let mock = Mock::start().await;
    let environment = mock.lock().create_environment("first").expect("an environment");
    let second = mock.lock().create_environment("second").expect("an environment");
    let mut daemon = ours::install(&mock, &environment, false).await;
    let key = ours::key_file(&daemon, &second);
    fs::write(&key, "sk-ant-oat01-wrong\n").expect("the key");
    chown(&key, Some(RUNNER_UID), Some(RUNNER_UID)).expect("chown of the key");
    fs::set_permissions(&key, Permissions::from_mode(0o600)).expect("chmod of the key");
    let written = fs::read_to_string(daemon.config()).expect("the configuration");
    let more = written[..written.find("[runner]").expect("a section")].replace(&environment.id, &second.id);
    fs::write(daemon.config(), format!("{more}{written}")).expect("the configuration");
    daemon.start_launcher().await;
    daemon.tend_runner();
    let site = Site { daemon, mock, environment };

    wait_until("the second is refused", || site.daemon.log().contains("the work queue refuses this runner")).await;
    let first = site.session();
    assert_eq!(site.text(&first, ToolUse::bash("echo first")).await, "first");

    // It would be asked for work again in a minute or two.
    fs::write(&key, format!("{}\n", second.keys[0])).expect("the key");
    hang_up(&site);
    let other = site.mock.lock().create_session(&second.id, NewSession::default()).expect("a session");
    assert_eq!(site.text(&other, ToolUse::bash("echo second")).await, "second");
    assert_eq!(site.text(&first, ToolUse::bash("echo still")).await, "still");
    site.end();
}

/// An item that nobody serves is worse than one that waits in its queue, where another worker may take it. The workspace that
/// one queue keeps for a session that nobody wants makes room for a session of the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_queues_with_one_place_left_one_is_asked_and_then_the_other_gets_it() {
    needs_root!();
    let _host = host::shared();
    let mock = Mock::start().await;
    let environments = ["first", "second"].map(|name| mock.lock().create_environment(name).expect("an environment"));
    let waiting = environments.each_ref().map(|environment| {
        let session = mock.lock().create_session(&environment.id, NewSession::default()).expect("a session");
        let id = mock.lock().call_tools(&session, vec![ToolUse::bash("sleep 1; echo done")]).remove(0);
        (session, id)
    });
    let queues = environments.each_ref().map(|environment| (&mock, environment));
    // The place beside it is for the measurement of the next runner.
    let options = Options { slots: 2, ..Options::default() };
    let mut daemon = ours::install_with(&queues, false, options, "max_idle_seconds = 1\n").await;
    daemon.start_launcher().await;
    daemon.tend_runner();

    let delivered = || [0, 1].map(|number| mock.lock().work[number].deliveries);
    wait_until("one of them has been asked", || delivered().contains(&1)).await;
    let first = usize::from(delivered()[0] == 0);
    for number in [first, 1 - first] {
        let (session, id) = &waiting[number];
        assert_eq!(mock.result_of(session, id).await.text(), "done");
        if number == first {
            assert_eq!(delivered().iter().sum::<u32>(), 1, "both were asked");
        }
        mock.lock().end_turn(session, json!({"type": "end_turn"}));
        mock.stopped(session).await;
    }
    daemon.end_with_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workspace_of_the_section_is_named_in_every_request() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start_with("workspace_id = \"wrkspc_1\"\nmax_idle_seconds = 1\n").await;
    let session = site.session();
    assert_eq!(site.text(&session, ToolUse::bash("echo hi")).await, "hi");
    site.mock.lock().end_turn(&session, json!({"type": "end_turn"}));
    site.mock.stopped(&session).await;
    let record = site.mock.lock().record.clone();
    for endpoint in [Endpoint::Poll, Endpoint::Ack, Endpoint::Heartbeat, Endpoint::SendEvents, Endpoint::Stop] {
        assert!(record.iter().any(|request| request.endpoint == Some(endpoint)), "no {endpoint:?}");
    }
    let named = record.iter().all(|request| request.incoming.header("anthropic-workspace-id") == Some("wrkspc_1"));
    assert!(named, "{record:?}");
    site.end();
}

/// An item without a token of its own is served with the key, and with the one that is in use.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_without_a_token_goes_on_with_a_key_that_was_replaced() {
    needs_root!();
    let _host = host::shared();
    let site = Site::start().await;
    for secret in [Secret::Missing, Secret::NotBase64] {
        let new = NewSession { secret, ..NewSession::default() };
        let session = site.mock.lock().create_session(&site.environment.id, new).expect("a session");
        assert_eq!(site.text(&session, ToolUse::bash("echo before")).await, "before");

        let key = site.mock.lock().rotate_environment_key(&site.environment.id);
        fs::write(ours::key_file(&site.daemon, &site.environment), format!("{key}\n")).expect("the key");
        let read = || site.daemon.log().matches("the key of an environment was read again").count();
        let before = read();
        hang_up(&site);
        wait_until("the key is read", || read() > before).await;

        assert_eq!(site.text(&session, ToolUse::bash("echo after")).await, "after");
    }
    let refused = site.mock.requests(Endpoint::SendEvents);
    assert!(!refused.iter().any(|request| matches!(request.fate, Fate::Answered(401))), "with the old key");
    site.end();
}

fn hang_up(site: &Site) {
    let pid = site.daemon.runner_pid().expect("a runner");
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGHUP).expect("the runner");
}
