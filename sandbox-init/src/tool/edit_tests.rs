use std::fs;

use proptest::prelude::*;
use serde_json::json;

use crate::tool::testing::Workspace;

#[test]
fn texts_are_literal_and_line_ends_stay() {
    let workspace = Workspace::new();
    workspace.put("a", "one $1\r\ntwo \\n\r\n");

    workspace.ok("edit", &json!({"file_path": "a", "old_string": "$1\r\ntwo", "new_string": "$0\r\n.*"}));

    assert_eq!(workspace.content("a"), "one $0\r\n.* \\n\r\n");
}

#[test]
fn every_occurrence_is_replaced_and_counted_on_request() {
    let workspace = Workspace::new();
    workspace.put("a", "aaaa b aa");

    let text =
        workspace.ok("edit", &json!({"file_path": "a", "old_string": "aa", "new_string": "a", "replace_all": true}));

    assert_eq!((text.as_str(), workspace.content("a").as_str()), ("edited a (3 replacement(s))", "aa b a"));
}

#[test]
fn files_that_are_too_large_binary_or_missing_are_refused() {
    let workspace = Workspace::new();
    workspace.put("large", "x".repeat(262_145));
    workspace.put("binary", b"x\xff");
    workspace.put("directory/file", "x");
    let edit = |name: &str| workspace.error("edit", &json!({"file_path": name, "old_string": "x", "new_string": "y"}));

    assert_eq!(
        edit("large"),
        "edit: large is 262145 bytes, exceeds 262144-byte limit. The edit tool loads the whole file and cannot modify a \
         file this large."
    );
    assert_eq!(edit("binary"), "edit: binary: not valid UTF-8 text (cannot edit binary files)");
    assert_eq!(edit("directory"), "edit: directory: not a regular file");
    assert_eq!(edit("nope"), "edit: nope: no such file or directory");
    assert_eq!(edit("/etc/hosts"), "edit: path '/etc/hosts' is outside the session's working directory");
}

#[test]
fn replacing_everywhere_cannot_multiply_a_file_without_bound() {
    let workspace = Workspace::new();
    workspace.put("a", "x".repeat(200_000));

    let text = workspace.error(
        "edit",
        &json!({"file_path": "a", "old_string": "x", "new_string": "y".repeat(100_000), "replace_all": true}),
    );

    assert_eq!(text, "edit: a would become 20000000000 bytes, exceeds 67108864-byte limit for the result of an edit");
    assert_eq!(fs::metadata(workspace.path("a")).expect("metadata").len(), 200_000);
}

/// Replacement without overlaps from left to right, one step at a time.
fn naive(text: &str, old: &str, new: &str) -> (String, usize) {
    let (mut result, mut count, mut rest) = (String::new(), 0, text);
    while let Some(character) = rest.chars().next() {
        if let Some(after) = rest.strip_prefix(old) {
            result.push_str(new);
            count += 1;
            rest = after;
        } else {
            result.push(character);
            rest = &rest[character.len_utf8()..];
        }
    }
    (result, count)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn edit_does_what_replacing_by_hand_does(
        text in "(a|b|ab|é|\r\n|\n){0,30}",
        old in "(a|b|é|\r\n|\n){1,3}",
        new in "(a|b|\\$|\r\n){0,3}",
        everywhere in any::<bool>(),
    ) {
        let workspace = Workspace::new();
        workspace.put("f", &text);
        let (changed, count) = naive(&text, &old, &new);
        let input = json!({"file_path": "f", "old_string": old, "new_string": new, "replace_all": everywhere});

        if count == 1 || (count > 1 && everywhere) {
            prop_assert_eq!(workspace.ok("edit", &input), format!("edited f ({count} replacement(s))"));
            prop_assert_eq!(workspace.content("f"), changed);
        } else {
            let expected = match count {
                0 => "edit: old_string not found in f".to_owned(),
                _ => format!("edit: old_string appears {count} times in f (must be unique)"),
            };
            prop_assert_eq!(workspace.error("edit", &input), expected);
            prop_assert_eq!(workspace.content("f"), text);
        }
    }
}
