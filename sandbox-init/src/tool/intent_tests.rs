use std::fs::{self, File};
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use proto::init::v1::ToolResult;
use serde_json::json;

use super::*;
use crate::tool::testing::{Workspace, texts};

fn workspace() -> (Workspace, Arc<File>) {
    let mut workspace = Workspace::new();
    let file = Arc::new(File::from(memfd_create(c"intents", MFdFlags::MFD_CLOEXEC).expect("memory file")));
    workspace.context.intents = Some(Arc::clone(&file));
    (workspace, file)
}

fn settled(workspace: &Workspace, tool: &str, input: &serde_json::Value, file: &File) -> (Found, Option<String>) {
    let intent = read(file).expect("an intent");
    let answer = settle(tool, input.to_string().as_bytes(), &intent, &workspace.context);
    let (found, result) = Found::decode(&answer).expect("an answer");
    let text = |bytes: &[u8]| texts(ToolResult::decode(bytes).expect("a result")).0;
    (found, (!result.is_empty()).then(|| text(result)))
}

/// Puts the file and its draft back to where they were before the rename.
fn undo(workspace: &Workspace, name: &str, old: Option<&str>) -> String {
    let intent = Intent::decode(read(workspace.context.intents.as_ref().expect("file")).expect("noted").as_slice());
    let draft = String::from_utf8(intent.expect("an intent").draft).expect("a name");
    fs::rename(workspace.path(name), workspace.path(&draft)).expect("the draft again");
    if let Some(old) = old {
        workspace.put(name, old);
    }
    draft
}

#[test]
fn tool_that_is_killed_after_the_rename_has_done_it_and_says_what_it_would_have_said() {
    for (tool, input, old) in [
        ("write", json!({"file_path": "a/b", "content": "new"}), None),
        ("write", json!({"file_path": "a/b", "content": "same"}), Some("same")),
        ("edit", json!({"file_path": "a/b", "old_string": "x", "new_string": "y", "replace_all": true}), Some("xx")),
    ] {
        let (workspace, file) = workspace();
        old.map(|old| workspace.put("a/b", old));
        let text = workspace.ok(tool, &input);

        assert_eq!(settled(&workspace, tool, &input, &file), (Found::Replaced, Some(text)));
    }
}

#[test]
fn tool_that_is_killed_before_the_rename_has_changed_nothing_and_its_draft_is_removed() {
    for old in [None, Some("old"), Some("new")] {
        let (workspace, file) = workspace();
        old.map(|old| workspace.put("a", old));
        let input = json!({"file_path": "a", "content": "new"});
        workspace.ok("write", &input);
        let draft = undo(&workspace, "a", old);

        assert_eq!(settled(&workspace, "write", &input, &file), (Found::Unchanged, None), "{old:?}");

        assert!(!workspace.path(&draft).exists());
        assert_eq!(fs::read_to_string(workspace.path("a")).ok().as_deref(), old);
    }
}

#[test]
fn file_that_somebody_else_has_replaced_since_decides_nothing() {
    let (workspace, file) = workspace();
    let input = json!({"file_path": "a", "content": "new"});
    workspace.ok("write", &input);
    fs::write(workspace.path("other"), "new").expect("file");
    fs::rename(workspace.path("other"), workspace.path("a")).expect("replaced");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Neither, None));

    fs::remove_file(workspace.path("a")).expect("removed");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Neither, None));
}

#[test]
fn overwrite_in_place_is_known_by_its_content() {
    let (workspace, file) = workspace();
    workspace.put("a", "old");
    let input = json!({"file_path": "a", "content": "new content"});
    let status = fstat(File::open(workspace.path("a")).expect("file")).expect("status");
    Notebook::new(&workspace.context, "done so").will_overwrite(&status, b"new content").expect("noted");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Unchanged, None));

    workspace.put("a", "new con");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Neither, None));
    workspace.put("a", "new content");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Replaced, Some("done so".to_owned())));
}

#[test]
fn nothing_is_noted_by_what_writes_nothing_and_a_cleared_note_is_none() {
    let (workspace, file) = workspace();
    workspace.put("a", "text");
    workspace.ok("read", &json!({"file_path": "a"}));
    workspace.error("edit", &json!({"file_path": "a", "old_string": "absent", "new_string": "y"}));
    assert_eq!(read(&file), None);

    workspace.ok("write", &json!({"file_path": "a", "content": "x"}));
    assert!(read(&file).is_some());
    clear(&file).expect("cleared");
    assert_eq!(read(&file), None);
}

#[test]
fn file_of_the_workload_with_nonsense_in_it_is_answered_with_what_nobody_can_tell() {
    let (workspace, file) = workspace();
    file.write_all_at(&[0xff; 3], 0).expect("written");
    assert_eq!(read(&file), None, "longer than any note");
    file.write_all_at(&[9, 0, 1], 0).expect("written");
    assert_eq!(read(&file), None, "shorter than it says");
    let input = json!({"file_path": "a", "content": "x"});
    for intent in [&b"\xff\xff\xff"[..], b""] {
        let answer = settle("write", input.to_string().as_bytes(), intent, &workspace.context);
        assert_eq!(Found::decode(&answer), Some((Found::Neither, &b""[..])));
    }
    assert_eq!(Found::decode(&[7]), None);
}

#[test]
fn nothing_is_written_when_it_cannot_be_noted() {
    let (mut workspace, _) = workspace();
    let read_only = File::open("/dev/null").expect("a file that takes nothing");
    workspace.context.intents = Some(Arc::new(read_only));
    workspace.put("a", "old");
    workspace.error("write", &json!({"file_path": "a", "content": "new"}));
    assert_eq!((workspace.content("a"), workspace.leftovers()), ("old".to_owned(), Vec::new()));
}

/// Between the making of a draft and the word of what it is there is a moment.
#[test]
fn tool_that_is_killed_while_its_draft_is_made_has_changed_nothing_and_leaves_none() {
    let (workspace, file) = workspace();
    workspace.put("a", "old");
    let input = json!({"file_path": "a", "content": "new"});
    Notebook::new(&workspace.context, "done so").will_create(OsStr::new(".tmp-1")).expect("noted");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Unchanged, None), "it was not made yet");

    fs::write(workspace.path(".tmp-1"), "").expect("made");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Unchanged, None));
    assert!(!workspace.path(".tmp-1").exists());

    fs::write(workspace.path(".tmp-1"), "of somebody else").expect("a file");
    assert_eq!(settled(&workspace, "write", &input, &file), (Found::Unchanged, None));
    assert!(workspace.path(".tmp-1").exists());
    assert_eq!(fs::read_to_string(workspace.path("a")).expect("it is there"), "old");
}
