//! The texts that the model has learned, as a table, and inputs that nobody should have sent.

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::tool::{NAMES, run, testing::Workspace};

/// Runs the steps of a conversation; `/workspace` stands for the working directory in inputs and texts.
fn converse(steps: &[(&str, Value, &str, bool)]) {
    let workspace = Workspace::new();
    let root = workspace.root().to_str().expect("utf-8").to_owned();
    for (tool, input, expected, is_error) in steps {
        let input: Value = serde_json::from_str(&input.to_string().replace("/workspace", &root)).expect("json");
        let (text, failed) = crate::tool::testing::texts(workspace.call(tool, &input));
        assert_eq!(
            (text.as_str(), failed),
            (expected.replace("/workspace", &root).as_str(), *is_error),
            "{tool} {input}"
        );
    }
}

#[test]
fn texts_are_those_of_the_toolset() {
    converse(&[
        ("write", json!({"file_path": "a/b.txt", "content": "l1\nl2\nl3\n"}), "wrote 9 bytes to a/b.txt", false),
        ("read", json!({"file_path": "a/b.txt"}), "l1\nl2\nl3\n", false),
        ("read", json!({"file_path": "/workspace/a/b.txt"}), "l1\nl2\nl3\n", false),
        ("read", json!({"file_path": "a/b.txt", "view_range": [2, 2]}), "l2", false),
        ("read", json!({"file_path": "a/b.txt", "view_range": [2, -1]}), "l2\nl3\n", false),
        (
            "read",
            json!({"file_path": "/etc/passwd"}),
            "read: path '/etc/passwd' is outside the session's working directory",
            true,
        ),
        ("read", json!({"file_path": "nope"}), "read: nope: no such file or directory", true),
        ("read", json!({"file_path": "a"}), "read: a: not a regular file", true),
        ("read", json!({"file_path": "a/b.txt/c"}), "read: a/b.txt/c: not a directory", true),
        (
            "edit",
            json!({"file_path": "a/b.txt", "old_string": "l", "new_string": "L"}),
            "edit: old_string appears 3 times in a/b.txt (must be unique)",
            true,
        ),
        (
            "edit",
            json!({"file_path": "a/b.txt", "old_string": "zzz", "new_string": ""}),
            "edit: old_string not found in a/b.txt",
            true,
        ),
        (
            "edit",
            json!({"file_path": "a/b.txt", "old_string": "l2", "new_string": "L2"}),
            "edited a/b.txt (1 replacement(s))",
            false,
        ),
        ("glob", json!({"pattern": "**/*.txt"}), "/workspace/a/b.txt", false),
        ("glob", json!({"pattern": "**/*.rs"}), "no matches", false),
        (
            "glob",
            json!({"pattern": "/etc/*"}),
            "glob: absolute pattern not permitted; pass a relative pattern (and optionally path)",
            true,
        ),
        ("glob", json!({"pattern": "../*"}), "glob: '..' is not permitted in the pattern", true),
        ("glob", json!({"pattern": "{a,..}/*"}), "glob: '..' is not permitted in the pattern", true),
        ("grep", json!({"pattern": "L2"}), "/workspace/a/b.txt:2:L2\n", false),
        ("grep", json!({"pattern": "L2", "path": "a/b.txt"}), "2:L2\n", false),
        ("grep", json!({"pattern": "zzz"}), "no matches", false),
        (
            "grep",
            json!({"pattern": "("}),
            "grep: invalid regex: regex parse error:\n    (?:()\n    ^\nerror: unclosed group",
            true,
        ),
    ]);
}

#[test]
fn missing_and_wrong_fields_are_named() {
    converse(&[
        ("read", json!({}), "read: file_path is required", true),
        ("read", json!({"file_path": null}), "read: file_path is required", true),
        ("read", json!({"file_path": ""}), "read: file_path is required", true),
        ("read", json!({"file_path": 3}), "read: file_path must be a string", true),
        ("read", json!({"file_path": "a\u{0}b"}), "read: file_path must not contain a NUL character", true),
        ("read", json!([]), "read: input must be a JSON object", true),
        ("read", json!({"file_path": "a", "view_range": [1]}), "read: view_range must be [start_line, end_line]", true),
        ("read", json!({"file_path": "a", "view_range": "1"}), "read: view_range must be [start_line, end_line]", true),
        (
            "read",
            json!({"file_path": "a", "view_range": [-1, 2]}),
            "read: view_range start_line must not be negative, lines are counted from 1",
            true,
        ),
        ("write", json!({"file_path": "a"}), "write: content is required", true),
        ("write", json!({"file_path": "a", "content": ["x"]}), "write: content must be a string", true),
        ("edit", json!({"file_path": "a", "old_string": "", "new_string": ""}), "edit: old_string is required", true),
        ("edit", json!({"file_path": "a", "old_string": "x"}), "edit: new_string is required", true),
        (
            "edit",
            json!({"file_path": "a", "old_string": "x", "new_string": "y", "replace_all": "yes"}),
            "edit: replace_all must be true or false",
            true,
        ),
        ("glob", json!({"path": "a"}), "glob: pattern is required", true),
        ("glob", json!({"pattern": "*", "path": "nope"}), "glob: nope: no such file or directory", true),
        ("grep", json!({"pattern": "x", "path": "nope"}), "grep: nope: no such file or directory", true),
        ("grep", json!({}), "grep: pattern is required", true),
        ("browse", json!({}), "unknown tool 'browse'", true),
    ]);
}

#[test]
fn unknown_keys_and_null_options_are_ignored() {
    converse(&[
        ("write", json!({"file_path": "a", "content": "é", "why": "because"}), "wrote 2 bytes to a", false),
        ("read", json!({"file_path": "a", "view_range": null}), "é", false),
        ("glob", json!({"pattern": "*", "path": null}), "/workspace/a", false),
        ("grep", json!({"pattern": "é", "path": ""}), "/workspace/a:1:é\n", false),
    ]);
}

#[test]
fn input_that_is_not_json_is_an_error_of_the_named_tool() {
    let workspace = Workspace::new();
    for input in [&b""[..], b"{", b"\xff", b"{\"file_path\": \"\\ud800\"}", &b"[".repeat(100_000)] {
        let (text, is_error) = crate::tool::testing::texts(run("read", input, &workspace.context));
        assert!(is_error && text.starts_with("read: input is not valid JSON: "), "{text}");
    }
}

#[test]
fn patterns_made_to_exhaust_stack_or_memory_are_refused() {
    let workspace = Workspace::new();
    workspace.put("a", "a\n");
    for pattern in [
        "{".repeat(257) + &"}".repeat(257),
        "{".repeat(100_000) + &"}".repeat(100_000),
        "{a,".repeat(50_000) + "b" + &"}".repeat(50_000),
        "[".repeat(100_000),
    ] {
        assert!(workspace.error("glob", &json!({"pattern": pattern})).starts_with("glob: invalid pattern: "));
    }
    for pattern in
        ["(".repeat(100_000) + &")".repeat(100_000), r"((\w{1000}){1000}){1000}".to_owned(), "[".repeat(100_000)]
    {
        assert!(workspace.error("grep", &json!({"pattern": pattern})).starts_with("grep: invalid regex: "));
    }
}

#[test]
fn deeply_nested_pattern_is_compiled() {
    let workspace = Workspace::new();
    workspace.put("b", "");

    let text = workspace.ok("glob", &json!({"pattern": "{a,".repeat(100) + "b" + &"}".repeat(100)}));

    assert_eq!(text, workspace.path("b").display().to_string());
}

#[test]
fn working_directory_that_is_gone_is_an_error() {
    let workspace = Workspace::new();
    std::fs::remove_dir(workspace.root()).expect("remove");
    let text = workspace.error("read", &json!({"file_path": "a"}));
    assert_eq!(text, format!("read: {}: no such file or directory", workspace.root().display()));
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[a-c./*{},\\[\\]()+?\\\\-]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| prop::collection::vec(inner, 0..4).prop_map(Value::from))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn no_input_makes_a_tool_panic_or_stay_silent(
        tool in prop::sample::select(NAMES.to_vec()),
        fields in prop::collection::hash_map(
            prop::sample::select(vec![
                "file_path", "content", "old_string", "new_string", "replace_all", "view_range", "pattern", "path", "x",
            ]),
            any_json(),
            0..9,
        ),
    ) {
        let workspace = Workspace::new();
        workspace.put("a", "abc\n");
        workspace.put("b/c", "abc\n");
        let result = workspace.call(tool, &json!(fields));
        prop_assert_eq!(result.content.len(), 1);
        prop_assert!(std::fs::read_dir(workspace.outside()).expect("outside").next().is_none());
    }

    #[test]
    fn no_bytes_make_a_tool_panic(tool in "[a-z]{0,5}", input in prop::collection::vec(any::<u8>(), 0..64)) {
        let workspace = Workspace::new();
        prop_assert!(run(&tool, &input, &workspace.context).is_error);
    }
}
