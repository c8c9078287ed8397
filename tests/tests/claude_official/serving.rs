//! What a worker does with a work item from its delivery to its stop.

use std::path::Path;

use sandbox_runner_tests::claude::{
    ControlPlane, Credential, Endpoint, Expect, Fate, NewSession, Secret, Skill, Step, ToolUse, WorkState,
};
use sandbox_runner_tests::needs_official_sdk;
use serde_json::{Value, json};

use crate::world::{Served, Whose, World};

fn plain(text: &str) -> Expect {
    Expect::Text(text.to_owned())
}

pub(crate) async fn every_tool(world: &World<'_>) -> Served {
    let file = format!("{}/a/b.txt", world.root().display());
    let tool = |name: &str, input: Value, expect: Expect| ToolUse::new(name, input).expecting(expect);
    let script = vec![
        Step::Say("I begin.".to_owned()),
        Step::Call(vec![ToolUse::bash("echo hi; echo err >&2").expecting(plain("hi\nerr"))]),
        Step::Call(vec![
            tool(
                "write",
                json!({"file_path": "a/b.txt", "content": "l1\nl2\nl3\n"}),
                plain("wrote 9 bytes to a/b.txt"),
            ),
            tool("read", json!({"file_path": "a/b.txt", "view_range": [2, 2]}), plain("l2")),
            tool(
                "edit",
                json!({"file_path": "a/b.txt", "old_string": "l2", "new_string": "L2"}),
                plain("edited a/b.txt (1 replacement(s))"),
            ),
            tool("read", json!({"file_path": file}), plain("l1\nL2\nl3\n")),
            tool("glob", json!({"pattern": "**/*.txt"}), plain(&file)),
            tool("grep", json!({"pattern": "L2"}), plain(&format!("{file}:2:L2\n"))),
        ]),
        Step::Call(vec![
            ToolUse::bash("cd /tmp && export A=5"),
            ToolUse::bash("pwd; echo $A").expecting(plain("/tmp\n5")),
            ToolUse::bash("echo out; false").expecting(Expect::ErrorHas("out".to_owned())),
            tool(
                "read",
                json!({"file_path": "/etc/passwd"}),
                Expect::Error("read: path '/etc/passwd' is outside the session's working directory".to_owned()),
            ),
            tool(
                "edit",
                json!({"file_path": "a/b.txt", "old_string": "l", "new_string": "x"}),
                Expect::Error("edit: old_string appears 2 times in a/b.txt (must be unique)".to_owned()),
            ),
            ToolUse::bash("echo $ANTHROPIC_API_KEY$MOCK_MAX_IDLE"),
        ]),
        Step::EndTurn("end_turn".to_owned()),
    ];
    let session = world.session(NewSession { script: Some(script), ..NewSession::default() });
    world.mock.say(&session, "go");
    world.mock.turn_over(&session).await;
    world.mock.stopped(&session).await;
    world.assert_no_breach();
    let ids = world.mock.lock().session(&session).calls.iter().map(|call| call.id.clone()).collect();
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_tool_is_run_and_answered_and_the_item_is_stopped_after_the_idle_time() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let Served { session, ids, .. } = every_tool(&world).await;
    assert_eq!(world.text(&session, &ids[9]).await, "out", "the exit code is not shown");
    assert_eq!(world.text(&session, &ids[12]).await, "1", "its own environment is");
    let plane = world.mock.lock();
    assert_eq!(plane.session(&session).events("user.tool_result").len(), 13);
    let item = plane.work[0].clone();
    assert_eq!((item.state, item.deliveries), (WorkState::Stopped, 1));
    let own = Credential::SessionsToken { work_id: item.id.clone(), generation: 0 };
    let key = Credential::EnvironmentKey(world.environment.id.clone());
    for request in &plane.record {
        let by_key = matches!(request.endpoint, Some(Endpoint::Poll | Endpoint::Ack));
        assert_eq!(request.credential, if by_key { key.clone() } else { own.clone() }, "{}", request.line());
        // The worker may ask for its next item already.
        let waits = request.endpoint == Some(Endpoint::Poll) && request.fate == Fate::Pending;
        let answered = matches!(request.fate, Fate::Answered(200 | 204));
        assert!(waits || answered, "{}: {:?}", request.line(), request.fate);
        assert_eq!(request.incoming.header("x-api-key"), None);
        let worker_id = request.incoming.header("anthropic-worker-id").is_some();
        assert_eq!(worker_id, request.endpoint == Some(Endpoint::Poll), "{}", request.line());
    }
    let posts: Vec<Value> =
        plane.record.iter().filter(|one| one.endpoint == Some(Endpoint::SendEvents)).map(|one| one.json()).collect();
    assert!(posts.iter().all(|body| body["events"].as_array().unwrap().len() == 1), "one result a request");
    let stop = plane.record.iter().find(|request| request.endpoint == Some(Endpoint::Stop)).unwrap();
    assert_eq!(stop.json(), json!({"force": true}));
    drop(plane);
    let endpoints = world.endpoints(&session);
    assert_eq!(endpoints[0], Endpoint::Ack);
    let place = |endpoint| endpoints.iter().position(|one| *one == endpoint).unwrap();
    // The stream is opened before the history is read, so that nothing is between them.
    assert!(place(Endpoint::StreamEvents) < place(Endpoint::ListEvents));
    assert!(place(Endpoint::Heartbeat) < place(Endpoint::StreamEvents));
    assert_eq!(*endpoints.last().unwrap(), Endpoint::Stop);
}

pub(crate) async fn secrets(world: &World<'_>) -> Served {
    for secret in [Secret::Missing, Secret::NotBase64, Secret::NotJson, Secret::NoToken, Secret::Unpadded] {
        let session = world.session(NewSession { secret, ..NewSession::default() });
        let id = world.mock.lock().call_tools(&session, vec![ToolUse::bash("echo hi")]).remove(0);
        assert_eq!(world.text(&session, &id).await, "hi");
        let post = world.mock.requests(Endpoint::SendEvents).pop().unwrap();
        let by_token = matches!(post.credential, Credential::SessionsToken { .. });
        assert_eq!(by_token, secret == Secret::Unpadded, "{secret:?}: {:?}", post.credential);
        world.end(&session).await;
    }
    world.assert_no_breach();
    Served::default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secret_without_a_token_makes_the_environment_key_serve() {
    let python = needs_official_sdk!();
    secrets(&World::new(Whose::Official(&python)).await).await;
}

pub(crate) async fn nothing_to_do(world: &World<'_>) -> Served {
    let check = world.mock.lock().enqueue(&world.environment.id, "healthcheck", "check_1", Secret::Token);
    let (session, ids) = world.calls(vec![ToolUse::bash("echo never")]);
    world.mock.lock().terminate_session(&session);
    world.mock.stopped(&session).await;
    // One that serves several at once does not stop them in their order.
    let is_stopped = |plane: &ControlPlane| (plane.item(&check).state == WorkState::Stopped).then_some(());
    world.mock.until("the end of the other item", is_stopped).await;
    let plane = world.mock.lock();
    assert_eq!(plane.session(&session).call(&ids[0]).result, None);
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn item_of_another_kind_and_of_an_ended_session_is_stopped_without_a_call() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    nothing_to_do(&world).await;
    assert_eq!(world.mock.requests(Endpoint::StreamEvents).len(), 0);
}

pub(crate) async fn next_message(world: &World<'_>) -> Served {
    let script = vec![
        Step::Call(vec![ToolUse::bash("X=1; echo kept > file")]),
        Step::EndTurn("end_turn".to_owned()),
        Step::Call(vec![ToolUse::bash("cat file; echo ${X-no variable}").expecting(Expect::Has("kept\n".to_owned()))]),
        Step::Terminate,
    ];
    let session = world.session(NewSession { script: Some(script), ..NewSession::default() });
    world.mock.say(&session, "one");
    world.mock.turn_over(&session).await;
    world.mock.stopped(&session).await;
    world.mock.say(&session, "two");
    world.mock.turn_over(&session).await;
    world.mock.stopped(&session).await;
    assert_eq!(world.mock.lock().work.len(), 2);
    world.assert_no_breach();
    let ids = world.mock.lock().session(&session).calls.iter().map(|call| call.id.clone()).collect();
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn next_message_is_another_item_and_the_files_are_still_there() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let served = next_message(&world).await;
    assert_eq!(world.text(&served.session, &served.ids[1]).await, "kept\nno variable");
}

/// A session whose agent has a skill, and that has a store of memories below `home`; its only call uses both. Returns the store.
pub(crate) async fn skills_and_memories(world: &World<'_>, home: &Path) -> (Served, String) {
    std::fs::create_dir(home.join("pdf")).unwrap();
    std::fs::write(home.join("pdf/SKILL.md"), "how to").unwrap();
    let tar = std::process::Command::new("tar").args(["-C", home.to_str().unwrap(), "-c", "pdf"]).output().unwrap();
    let mount = home.join("notes");
    let (store, session) = {
        let mut plane = world.mock.lock();
        let skill =
            Skill { skill_id: "skill_1".into(), version_id: "skver_9".into(), name: "pdf".into(), archive: tar.stdout };
        plane.skills.push(skill);
        let store = plane.create_store();
        for number in 0..25 {
            plane.add_memory(&store, &format!("/notes/{number:02}.md"), &format!("note {number}")).unwrap();
        }
        let resource = json!({"type": "memory_store", "memory_store_id": store, "mount_path": mount,
            "access": "read_write", "name": "notes", "description": "", "instructions": ""});
        let new = NewSession {
            resources: vec![resource],
            skills: vec![("skill_1".to_owned(), "latest".to_owned())],
            ..NewSession::default()
        };
        (store, plane.create_session(&world.environment.id, new).unwrap())
    };
    let mount = mount.display();
    let command = format!(
        "cat skills/pdf/SKILL.md; ls {mount}/notes | wc -l; echo changed > {mount}/notes/03.md; echo new > {mount}/new.md; rm {mount}/notes/04.md"
    );
    let ids = vec![world.call(&session, ToolUse::bash(&command))];
    world.mock.result_of(&session, &ids[0]).await;
    world.end(&session).await;
    (Served { session, ids, home: Some(home.to_owned()), ..Served::default() }, store)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skills_and_memories_are_there_before_the_first_call_and_changes_come_back() {
    let python = needs_official_sdk!();
    let world = World::new(Whose::Official(&python)).await;
    let home = tempfile::tempdir().unwrap();
    let (served, store) = skills_and_memories(&world, home.path()).await;
    assert_eq!(world.text(&served.session, &served.ids[0]).await, "how to25");
    let memories = world.mock.lock().store(&store).unwrap().memories.clone();
    let content = |path: &str| memories.iter().find(|memory| memory.path == path).map(|memory| memory.content.clone());
    assert_eq!(content("/notes/03.md").as_deref(), Some("changed\n"));
    assert_eq!(content("/new.md").as_deref(), Some("new\n"));
    assert_eq!(content("/notes/04.md"), None);
    assert_eq!(content("/notes/05.md").as_deref(), Some("note 5"));
    // Both are gone with the session.
    assert!(!world.root().join("skills/pdf").exists() && !home.path().join("notes").exists());
}

pub(crate) async fn ended_worker(world: &World<'_>) -> Served {
    let (session, ids) = world.calls(vec![ToolUse::bash("echo hi")]);
    world.mock.result_of(&session, &ids[0]).await;
    world.terminate();
    world.mock.stopped(&session).await;
    world.assert_no_breach();
    Served { session, ids, ..Served::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn worker_that_is_ended_stops_its_item() {
    let python = needs_official_sdk!();
    ended_worker(&World::new(Whose::Official(&python)).await).await;
}
