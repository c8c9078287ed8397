//! The control plane that workers are tested with keeps the contract itself: spoken to over HTTP, by hand.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use sandbox_runner_tests::claude::client::Client;
use sandbox_runner_tests::claude::{
    Breach, CallState, Endpoint, Environment, Fault, Frame, How, Interrupt, Mock, NewSession, Secret, Status, Step,
    ToolUse, Verdict, Wire, WorkState,
};
use serde_json::{Value, json};

/// A control plane with an environment and a session whose work item is in the queue.
struct World {
    mock: Mock,
    environment: Environment,
    session: String,
    key: Client,
}

impl World {
    async fn new(session: NewSession) -> Self {
        let mock = Mock::start().await;
        let environment = mock.lock().create_environment("test").unwrap();
        let session = mock.lock().create_session(&environment.id, session).unwrap();
        let key = Client::bearer(&mock, &environment.keys[0]);
        Self { mock, environment, session, key }
    }

    fn work(&self, rest: &str) -> String {
        format!("/v1/environments/{}/work{rest}", self.environment.id)
    }

    fn events(&self, rest: &str) -> String {
        format!("/v1/sessions/{}/events{rest}", self.session)
    }

    /// Polls once, and returns the item with a client that has its token.
    async fn claim(&self) -> (Value, Client) {
        let item = self.key.get(&self.work("/poll")).await.unwrap().body;
        let secret = URL_SAFE.decode(item["secret"].as_str().unwrap()).unwrap();
        let secret: Value = serde_json::from_slice(&secret).unwrap();
        let token = Client::bearer(&self.mock, secret["sessions_token"].as_str().unwrap());
        (item, token)
    }

    /// Claims, acknowledges and beats once; returns the id of the item, the client, and what to expect at the next beat.
    async fn lease(&self) -> (String, Client, String) {
        let (item, token) = self.claim().await;
        let id = item["id"].as_str().unwrap().to_owned();
        assert_eq!(
            self.key.post(&self.work(&format!("/{id}/ack")), &Value::Null).await.unwrap().body["state"],
            "starting"
        );
        let beat = self.beat(&token, &id, "NO_HEARTBEAT").await;
        assert_eq!((beat.0, &beat.1["state"], &beat.1["lease_extended"]), (200, &json!("active"), &json!(true)));
        (id, token, beat.1["last_heartbeat"].as_str().unwrap().to_owned())
    }

    async fn beat(&self, client: &Client, id: &str, expected: &str) -> (u16, Value) {
        let expected = expected.replace(':', "%3A");
        let path = self.work(&format!("/{id}/heartbeat?expected_last_heartbeat={expected}"));
        let answer = client.post(&path, &Value::Null).await.unwrap();
        (answer.status, answer.body)
    }
}

fn result(id: &str, text: &str) -> Value {
    json!({"events": [{"type": "user.tool_result", "tool_use_id": id, "is_error": false,
        "content": [{"type": "text", "text": text}]}]})
}

#[tokio::test]
async fn item_is_delivered_once_until_it_is_older_than_the_poll_says() {
    let world = World::new(NewSession::default()).await;
    let (item, _) = world.claim().await;
    assert_eq!((&item["state"], &item["data"]["id"]), (&json!("queued"), &json!(world.session)));
    assert_eq!(world.key.get(&world.work("/poll?block_ms=1")).await.unwrap().body, Value::Null);
    let stats = world.key.get(&world.work("/stats")).await.unwrap().body;
    assert_eq!((&stats["depth"], &stats["pending"]), (&json!(0), &json!(1)));
    world.mock.lock().pass(Duration::from_millis(5001));
    assert_eq!(world.key.get(&world.work("/poll")).await.unwrap().body["id"], item["id"]);
    world.mock.lock().pass(Duration::from_millis(2001));
    assert_eq!(world.key.get(&world.work("/poll")).await.unwrap().body, Value::Null);
    assert_eq!(world.key.get(&world.work("/poll?reclaim_older_than_ms=2000")).await.unwrap().body["id"], item["id"]);
}

#[tokio::test]
async fn poll_waits_for_what_comes_and_refuses_bounds_that_the_api_refuses() {
    let world = World::new(NewSession::default()).await;
    world.claim().await;
    let waiting = {
        let (key, path) = (world.key.clone().with("anthropic-worker-id", "w-1"), world.work("/poll?block_ms=999"));
        tokio::spawn(async move { key.get(&path).await.unwrap().body })
    };
    world.mock.until("a poll", |plane| (plane.record.len() == 2).then_some(())).await;
    let second = world.mock.lock().create_session(&world.environment.id, NewSession::default()).unwrap();
    assert_eq!(waiting.await.unwrap()["data"]["id"], json!(second));
    let stats = world.key.get(&world.work("/stats")).await.unwrap().body;
    assert_eq!(stats["workers_polling"], 1);
    for wrong in ["block_ms=0", "block_ms=1000", "block_ms=x", "reclaim_older_than_ms=0"] {
        let answer = world.key.get(&world.work(&format!("/poll?{wrong}"))).await.unwrap();
        assert_eq!((answer.status, &answer.body["error"]["type"]), (400, &json!("invalid_request_error")), "{wrong}");
        assert!(answer.body["error"]["message"].as_str().unwrap().starts_with(wrong.split('=').next().unwrap()));
    }
}

#[tokio::test]
async fn heartbeat_compares_and_the_loser_hears_the_state_of_the_lease() {
    let world = World::new(NewSession::default()).await;
    let (id, token, last) = world.lease().await;
    let (status, body) = world.beat(&token, &id, "NO_HEARTBEAT").await;
    assert_eq!(status, 412);
    let message = format!("Heartbeat precondition failed: expected NO_HEARTBEAT, actual was {last}");
    assert_eq!(body["error"]["message"], json!(message));
    assert_eq!(body["error"]["details"]["error_code"], "heartbeat_precondition_failed");
    assert_eq!(body["error"]["details"]["current_state"]["last_heartbeat"], json!(last));
    let (status, body) = world.beat(&token, &id, &last).await;
    assert_eq!(status, 200);
    assert_ne!(body["last_heartbeat"], json!(last));
}

#[tokio::test]
async fn lapsed_lease_goes_back_to_the_queue_with_another_token() {
    let world = World::new(NewSession::default()).await;
    let (id, old, last) = world.lease().await;
    world.mock.lock().pass(Duration::from_secs(301));
    let (status, body) = world.beat(&old, &id, &last).await;
    assert_eq!((status, &body["error"]["details"]["current_state"]["state"]), (412, &json!("queued")));
    assert!(body["error"]["message"].as_str().unwrap().ends_with("actual was NULL"));
    let (again, new) = world.claim().await;
    assert_eq!(again["id"], json!(id));
    let token = |client: &Client| client.headers[0].1.clone();
    assert_ne!(token(&old), token(&new));
    // The old worker stops what is no longer its own.
    old.post(&world.work(&format!("/{id}/stop")), &json!({"force": true})).await.unwrap();
    assert_eq!(world.mock.lock().breaches, [Breach::StopAfterLeaseLost { work_id: id }]);
}

#[tokio::test]
async fn stop_is_answered_empty_and_a_second_one_is_a_conflict() {
    let world = World::new(NewSession::default()).await;
    let (id, token, last) = world.lease().await;
    let stop = world.work(&format!("/{id}/stop"));
    let answer = world.key.post(&stop, &json!({})).await.unwrap();
    assert_eq!((answer.status, answer.content_type, answer.body), (204, None, Value::Null));
    assert_eq!(world.mock.lock().item(&id).state, WorkState::Stopping);
    // No comparison any more.
    let (status, body) = world.beat(&token, &id, "whatever").await;
    assert_eq!((status, &body["state"]), (200, &json!("stopping")), "{last}");
    assert_eq!(token.post(&stop, &json!({"force": true})).await.unwrap().status, 204);
    assert_eq!(token.post(&stop, &json!({"force": true})).await.unwrap().status, 409);
    let (status, body) = world.beat(&token, &id, "whatever").await;
    assert_eq!((status, &body["state"], &body["lease_extended"]), (200, &json!("stopped"), &json!(false)));
}

#[tokio::test]
async fn each_credential_opens_what_it_is_for_and_nothing_else() {
    let world = World::new(NewSession::default()).await;
    let (item, token) = world.claim().await;
    let id = item["id"].as_str().unwrap();
    let store = world.mock.lock().create_store();
    let other = world.mock.lock().create_environment("other").unwrap();
    let other = Client::bearer(&world.mock, &other.keys[0]);
    let nobody = Client::bearer(&world.mock, "sk-ant-oat01-nobody");
    let api = nobody.clone().with("authorization", "").with("x-api-key", "sk-ant-api03-mock");
    let memories = format!("/v1/memory_stores/{store}/memories");
    let session = format!("/v1/sessions/{}", world.session);
    for (client, path, status) in [
        (&world.key, world.work("/poll"), 200),
        (&token, world.work("/poll"), 403),
        (&api, world.work("/poll"), 403),
        (&other, world.work("/poll"), 403),
        (&nobody, world.work("/poll"), 401),
        (&world.key, world.work(&format!("/{id}")), 403),
        (&token, world.work(&format!("/{id}")), 403),
        (&api, world.work(&format!("/{id}")), 200),
        (&api, world.work(""), 403),
        (&world.key, world.work(""), 200),
        (&token, session.clone(), 200),
        (&world.key, session.clone(), 200),
        (&other, session.clone(), 403),
        (&world.key, memories.clone(), 403),
        // The store is not of the session of the token.
        (&token, memories.clone(), 403),
        (&api, memories.clone(), 200),
    ] {
        assert_eq!(client.get(&path).await.unwrap().status, status, "{path} with {:?}", client.headers);
    }
    let without = token.clone().with("anthropic-beta", "something-else");
    assert_eq!(without.get(&session).await.unwrap().status, 400);
    let without = token.clone().with("anthropic-version", "");
    assert_eq!(without.get(&session).await.unwrap().status, 400);
    let both = token.with("x-api-key", "sk-ant-api03-mock");
    assert_eq!(both.get(&session).await.unwrap().status, 401);
}

#[tokio::test]
async fn secret_has_the_form_that_the_session_asks_for() {
    for (secret, check) in [
        (Secret::Missing, Value::is_null as fn(&Value) -> bool),
        (Secret::NotBase64, |secret| URL_SAFE.decode(secret.as_str().unwrap()).is_err()),
        (Secret::Unpadded, |secret| !secret.as_str().unwrap().ends_with('=')),
        (Secret::NotJson, |secret| URL_SAFE.decode(secret.as_str().unwrap()).unwrap() == b"not json"),
    ] {
        let world = World::new(NewSession { secret, ..NewSession::default() }).await;
        let item = world.key.get(&world.work("/poll")).await.unwrap().body;
        assert!(check(&item["secret"]), "{secret:?}: {}", item["secret"]);
        // Only a poll shows it.
        assert_eq!(world.key.get(&world.work("")).await.unwrap().body["data"][0]["secret"], Value::Null);
    }
}

#[tokio::test]
async fn results_move_the_session_on_when_all_are_there() {
    let script = vec![
        Step::Call(vec![ToolUse::bash("a"), ToolUse::custom("lookup", json!({}))]),
        Step::Say("done".to_owned()),
        Step::EndTurn("end_turn".to_owned()),
    ];
    let world = World::new(NewSession { script: Some(script), ..NewSession::default() }).await;
    let (_, token, _) = world.lease().await;
    let mut stream = token.stream(&world.events("/stream")).await.unwrap();
    world.mock.say(&world.session, "go");
    let ids = world.mock.lock().session(&world.session).waiting();
    let answer = token.post(&world.events(""), &result(&ids[0], "one")).await.unwrap();
    assert_eq!((answer.status, &answer.body["data"][0]["tool_use_id"]), (200, &json!(ids[0])));
    assert!(answer.body["data"][0]["processed_at"].is_string());
    let custom = json!({"events": [{"type": "user.custom_tool_result", "custom_tool_use_id": ids[1], "content": []}]});
    assert_eq!(token.post(&world.events(""), &custom).await.unwrap().status, 200);
    assert!(stream.read_until("\"type\":\"end_turn\"").await.unwrap());
    let told: Vec<&str> = stream.text().lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    let wanted = [
        "user.message",
        "session.status_running",
        "session.thread_status_running",
        "agent.tool_use",
        "agent.custom_tool_use",
        "session.status_idle",
        "user.tool_result",
        "session.status_idle",
        "user.custom_tool_result",
        "session.status_running",
        "session.thread_status_running",
        "agent.message",
        "session.status_idle",
    ];
    assert_eq!(told.into_iter().filter(|name| *name != "ping").collect::<Vec<_>>(), wanted);
    let session = world.mock.lock().session(&world.session).clone();
    let waiting: Vec<&Value> = session.events("session.status_idle").iter().map(|idle| &idle["stop_reason"]).collect();
    assert_eq!(waiting[0]["event_ids"], json!(ids));
    assert_eq!(waiting[1]["event_ids"], json!([ids[1]]));
    assert!(world.mock.lock().breaches.is_empty());
}

#[tokio::test]
async fn results_that_nobody_waits_for_are_refused_by_name() {
    let world = World::new(NewSession::default()).await;
    let (_, token, _) = world.lease().await;
    let uses = vec![
        ToolUse::bash("a"),
        ToolUse::bash("b").permission(Some("ask")),
        ToolUse::bash("c").permission(Some("deny")),
    ];
    let ids = world.mock.lock().call_tools(&world.session, uses);
    let block =
        |block: Value| json!({"events": [{"type": "user.tool_result", "tool_use_id": ids[0], "content": [block]}]});
    let mut with_thread = result(&ids[0], "x");
    with_thread["events"][0]["session_thread_id"] = json!("sthr_1");
    for (body, names) in [
        (result("sevt_999", "x"), "events.0.tool_use_id"),
        (result(&ids[1], "x"), "not allowed"),
        (result(&ids[2], "x"), "not allowed"),
        (with_thread, "session_thread_id"),
        (json!({"events": []}), "events"),
        (json!({}), "events"),
        (json!({"events": [{"type": "agent.tool_use"}]}), "events.0.type"),
        (block(json!({"type": "text", "text": ""})), "events.0.content.0.text"),
        (block(json!({"type": "tool_reference"})), "events.0.content.0.type"),
        (block(json!({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "%"}})), "data"),
        (
            block(json!({"type": "image", "source": {"type": "base64", "media_type": "image/bmp", "data": "aGk="}})),
            "media_type",
        ),
    ] {
        let answer = token.post(&world.events(""), &body).await.unwrap();
        assert_eq!(answer.status, 400, "{body}");
        let message = answer.body["error"]["message"].as_str().unwrap();
        assert!(message.contains(names), "{message} should name {names}");
    }
    assert_eq!(world.mock.lock().session(&world.session).call(&ids[0]).state, CallState::Open);
    assert_eq!(token.post(&world.events(""), &result(&ids[0], "x")).await.unwrap().status, 200);
    assert_eq!(token.post(&world.events(""), &result(&ids[0], "y")).await.unwrap().status, 400);
    let second = Breach::SecondResult { tool_use_id: ids[0].clone() };
    assert!(world.mock.lock().breaches.contains(&second));
    world.mock.lock().terminate_session(&world.session);
    assert_eq!(token.post(&world.events(""), &result(&ids[0], "x")).await.unwrap().status, 400);
}

#[tokio::test]
async fn verdict_opens_or_ends_a_call_that_waits_for_one() {
    let world = World::new(NewSession::default()).await;
    let (_, token, _) = world.lease().await;
    let ask = || ToolUse::bash("a").permission(Some("ask"));
    let ids = world.mock.lock().call_tools(&world.session, vec![ask(), ask()]);
    world.mock.confirm(&world.session, &ids[1], Verdict::Deny);
    world.mock.confirm(&world.session, &ids[0], Verdict::Allow);
    assert_eq!(token.post(&world.events(""), &result(&ids[0], "x")).await.unwrap().status, 200);
    let session = world.mock.lock().session(&world.session).clone();
    let states: Vec<CallState> = session.calls.iter().map(|call| call.state).collect();
    assert_eq!(states, [CallState::Answered, CallState::Denied]);
    assert_eq!(session.events("agent.tool_result").len(), 1);
    assert_eq!(session.status, Status::Running);
}

#[tokio::test]
async fn interrupt_ends_the_turn_after_the_calls_or_at_once() {
    for interrupt in [Interrupt::WaitsForCalls, Interrupt::AtOnce] {
        let world = World::new(NewSession::default()).await;
        world.mock.lock().settings.interrupt = interrupt;
        let (_, token, _) = world.lease().await;
        let id = world.mock.lock().call_tools(&world.session, vec![ToolUse::bash("a")]).remove(0);
        world.mock.interrupt(&world.session, None);
        let status = token.post(&world.events(""), &result(&id, "x")).await.unwrap().status;
        assert_eq!(status, if interrupt == Interrupt::AtOnce { 400 } else { 200 });
        let session = world.mock.lock().session(&world.session).clone();
        assert_eq!(session.events("session.status_idle").last().unwrap()["stop_reason"]["type"], "end_turn");
        let told = session.events("user.interrupt");
        assert!(told.last().unwrap()["processed_at"].is_string());
        assert_eq!(told.len(), if interrupt == Interrupt::AtOnce { 1 } else { 2 });
        // The history has it once.
        let history = token.get(&world.events("?types[]=user.interrupt")).await.unwrap().body;
        assert_eq!(history["data"].as_array().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn history_comes_in_pages_in_either_order_and_by_type() {
    let world = World::new(NewSession::default()).await;
    let uses = (0..5).map(|number| ToolUse::bash(&number.to_string())).collect();
    let ids = world.mock.lock().emit_calls(&world.session, uses);
    let mut seen = Vec::new();
    let mut page = String::new();
    loop {
        let body = world.key.get(&world.events(&format!("?limit=2{page}"))).await.unwrap().body;
        seen.extend(body["data"].as_array().unwrap().iter().map(|event| event["id"].as_str().unwrap().to_owned()));
        match body["next_page"].as_str() {
            Some(next) => page = format!("&page={next}"),
            None => break,
        }
    }
    assert_eq!(seen, ids);
    let body = world.key.get(&world.events("?order=desc&limit=1")).await.unwrap().body;
    assert_eq!(body["data"][0]["id"], json!(ids[4]));
    let third = world.mock.lock().session(&world.session).events("agent.tool_use")[2]["processed_at"].clone();
    let after = third.as_str().unwrap().replace(':', "%3A");
    let body = world.key.get(&world.events(&format!("?created_at[gt]={after}"))).await.unwrap().body;
    assert_eq!(body["data"].as_array().unwrap().len(), 2);
    for wrong in ["page=x", "order=up", "limit=0", "created_at[gt]=x"] {
        assert_eq!(world.key.get(&world.events(&format!("?{wrong}"))).await.unwrap().status, 400, "{wrong}");
    }
}

#[tokio::test]
async fn stream_tells_what_comes_after_it_in_the_frames_that_are_asked_for() {
    let world = World::new(NewSession::default()).await;
    world.mock.lock().settings.ping_every = Duration::from_millis(50);
    world.mock.lock().emit_calls(&world.session, vec![ToolUse::bash("before")]);
    let mut stream = world.key.stream(&world.events("/stream")).await.unwrap();
    let uses = vec![
        ToolUse::bash("pieces").over(Wire::Pieces(7)),
        ToolUse::bash("lines").over(Wire::ManyLines),
        ToolUse::bash("twice").over(Wire::Twice),
        ToolUse::bash("absent").over(Wire::Absent),
        ToolUse::bash("named").over(Wire::Named(Some("message".to_owned()))),
    ];
    world.mock.lock().emit_calls(&world.session, uses);
    world.mock.lock().frame(&world.session, Frame::Raw(b": a comment\n\n".to_vec()));
    assert!(stream.read_until(": a comment").await.unwrap());
    assert!(stream.read_until("event: ping").await.unwrap());
    let text = stream.take();
    assert!(!text.contains("before") && !text.contains("absent"));
    assert_eq!(text.matches("twice").count(), 2);
    assert!(text.contains("event: message\n"));
    assert!(text.contains("data:     \"command\": \"lines\"\n"), "{text}");
    world.mock.lock().emit_calls(&world.session, vec![ToolUse::bash("cut").over(Wire::CutAfter(30))]);
    assert!(stream.read_until("no such text").await.is_err());
    assert!(stream.text().ends_with("event: agent.tool_use\ndata: {\""), "{}", stream.text());
    let mut stream = world.key.stream(&world.events("/stream")).await.unwrap();
    world.mock.lock().delete_session(&world.session);
    assert!(!stream.read_until("no such text").await.unwrap());
    assert!(stream.text().contains("event: session.deleted"));
}

#[tokio::test]
async fn thread_has_its_own_stream_and_its_end_closes_its_calls() {
    let world = World::new(NewSession::default()).await;
    let (_, token, _) = world.lease().await;
    let thread = world.mock.lock().spawn_thread(&world.session, "reviewer");
    let threads = format!("/v1/sessions/{}/threads", world.session);
    let listed = token.get(&threads).await.unwrap().body;
    assert_eq!(listed["data"][1]["parent_thread_id"], listed["data"][0]["id"]);
    let mut own = token.stream(&format!("{threads}/{thread}/stream")).await.unwrap();
    let mut whole = token.stream(&world.events("/stream")).await.unwrap();
    let uses = vec![ToolUse::bash("of the primary"), ToolUse::bash("of the thread").in_thread(&thread)];
    let ids = world.mock.lock().call_tools(&world.session, uses);
    assert!(own.read_until("of the thread").await.unwrap());
    assert!(whole.read_until("of the thread").await.unwrap());
    assert!(!own.text().contains("of the primary") && whole.text().contains("of the primary"));
    // On its own stream a call names no thread.
    assert!(!own.text().contains("session_thread_id") && whole.text().contains("session_thread_id"));
    assert_eq!(
        token.post(&format!("{threads}/{thread}/archive"), &Value::Null).await.unwrap().body["status"],
        "terminated"
    );
    assert_eq!(token.post(&world.events(""), &result(&ids[1], "x")).await.unwrap().status, 400);
    assert_eq!(token.post(&world.events(""), &result(&ids[0], "x")).await.unwrap().status, 200);
    assert_eq!(token.get(&format!("{threads}/sthr_99")).await.unwrap().status, 404);
}

#[tokio::test]
async fn fault_happens_where_and_how_often_it_was_told() {
    let world = World::new(NewSession::default()).await;
    let poll = world.work("/poll");
    let inject = |fault| world.mock.lock().faults.push(fault);
    inject(Fault::times(Endpoint::Poll, 2, How::StatusRetryAfter(429, 7)).after(1));
    world.mock.lock().duplicate_deliveries = 2;
    let first = world.key.get(&world.work("/stats")).await.unwrap();
    assert_eq!(first.status, 200);
    assert_eq!(world.key.get(&poll).await.unwrap().status, 200);
    for _ in 0..2 {
        let answer = world.key.get(&poll).await.unwrap();
        assert_eq!((answer.status, answer.retry_after.as_deref()), (429, Some("7")));
        assert_eq!(answer.body["error"]["type"], "rate_limit_error");
    }
    // Delivered three times without waiting.
    let (one, _) = world.claim().await;
    let (two, token) = world.claim().await;
    assert_eq!(one["id"], two["id"]);
    let id = one["id"].as_str().unwrap();
    let ack = world.work(&format!("/{id}/ack"));
    inject(Fault::next(Endpoint::Ack, How::LoseRequest));
    assert!(world.key.post(&ack, &Value::Null).await.is_err());
    assert_eq!(world.mock.lock().item(id).state, WorkState::Queued);
    inject(Fault::next(Endpoint::Ack, How::LoseResponse));
    assert!(world.key.post(&ack, &Value::Null).await.is_err());
    assert_eq!(world.mock.lock().item(id).state, WorkState::Starting);
    assert_eq!(world.key.post(&ack, &Value::Null).await.unwrap().status, 200);
    inject(Fault::next(Endpoint::Heartbeat, How::StatusAfterEffect(500)));
    assert_eq!(world.beat(&token, id, "NO_HEARTBEAT").await.0, 500);
    assert_eq!(world.mock.lock().item(id).state, WorkState::Active);
    inject(Fault::next(Endpoint::GetSession, How::CutBody(10)));
    let session = format!("/v1/sessions/{}", world.session);
    assert!(token.get(&session).await.is_err());
    inject(Fault::next(Endpoint::GetSession, How::Silence));
    let silent = tokio::time::timeout(Duration::from_millis(200), token.get(&session)).await;
    assert!(silent.is_err(), "{silent:?}");
    assert_eq!(token.get(&session).await.unwrap().status, 200);
}

#[tokio::test]
async fn state_outlives_the_server() {
    let mut world = World::new(NewSession::default()).await;
    let (id, token, last) = world.lease().await;
    let mut stream = token.stream(&world.events("/stream")).await.unwrap();
    world.mock.halt().await;
    assert!(stream.read_until("no such text").await.is_err());
    assert!(token.get(&world.events("")).await.is_err());
    world.mock.resume().await;
    assert_eq!(world.beat(&token, &id, &last).await.0, 200);
}

#[tokio::test]
async fn memory_is_changed_only_under_the_precondition_that_holds() {
    let mock = Mock::start().await;
    let environment = mock.lock().create_environment("test").unwrap();
    let store = mock.lock().create_store();
    let resource = json!({"type": "memory_store", "memory_store_id": store, "mount_path": "/mnt/memory/notes"});
    let session = NewSession { resources: vec![resource], ..NewSession::default() };
    let session = mock.lock().create_session(&environment.id, session).unwrap();
    let key = Client::bearer(&mock, &environment.keys[0]);
    let world = World { mock, environment, session, key };
    let (_, token) = world.claim().await;
    let path = format!("/v1/memory_stores/{store}/memories");
    let made = token.post(&path, &json!({"path": "/a.md", "content": "one"})).await.unwrap().body;
    let id = made["id"].as_str().unwrap();
    let taken = token.post(&path, &json!({"path": "/a.md", "content": "two"})).await.unwrap();
    assert_eq!((taken.status, &taken.body["error"]["conflicting_memory_id"]), (409, &json!(id)));
    let change =
        |sha: &Value| json!({"content": "two", "precondition": {"type": "content_sha256", "content_sha256": sha}});
    let memory = format!("{path}/{id}");
    let wrong = token.post(&memory, &change(&json!("0".repeat(64)))).await.unwrap();
    assert_eq!((wrong.status, &wrong.body["error"]["type"]), (409, &json!("memory_precondition_failed_error")));
    let changed = token.post(&memory, &change(&made["content_sha256"])).await.unwrap().body;
    let shown = token.get(&format!("{path}?view=full")).await.unwrap().body;
    assert_eq!(shown["data"][0]["content"], "two");
    assert_eq!(token.get(&path).await.unwrap().body["data"][0]["content"], Value::Null);
    let delete = |sha: &str| format!("{memory}?expected_content_sha256={sha}");
    assert_eq!(token.send("DELETE", &delete("x"), &Value::Null).await.unwrap().status, 409);
    let sha = changed["content_sha256"].as_str().unwrap();
    assert_eq!(token.send("DELETE", &delete(sha), &Value::Null).await.unwrap().body["type"], "memory_deleted");
    assert_eq!(token.get(&memory).await.unwrap().status, 404);
    for path_of_memory in ["a.md", "/a/../b", "/a//b", "/\u{7}", ""] {
        let answer = token.post(&path, &json!({"path": path_of_memory, "content": ""})).await.unwrap();
        assert_eq!(answer.status, 400, "{path_of_memory:?}");
    }
}
