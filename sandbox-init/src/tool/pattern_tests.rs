use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Pattern {
    Pattern::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn walk_starts_at_the_literal_part_of_the_pattern() {
    let cases: [(&str, &[u8]); 7] = [
        ("src/a/*.rs", b"src/a"),
        ("src/a/lib.rs", b"src/a"),
        ("./src//a/**/*.rs", b"src/a"),
        ("**/*.rs", b""),
        ("*.rs", b""),
        ("s{r,t}c/a/*.rs", b""),
        ("src/**", b"src"),
    ];
    for (text, start) in cases {
        assert_eq!(parse(text).start(), start, "{text}");
    }
}

#[test]
fn directories_that_cannot_hold_a_match_are_not_entered() {
    let cases = [
        ("crates/*/src/lib.rs", "crates", true),
        ("crates/*/src/lib.rs", "docs", false),
        ("crates/*/src/lib.rs", "crates/x", true),
        ("crates/*/src/lib.rs", "crates/x/tests", false),
        ("crates/*/src/lib.rs", "crates/x/src/deep", false),
        ("*.rs", "src", false),
        ("**/*.rs", "src/deep", true),
        ("**/*.rs", ".git", false),
        ("**/*.js", "a/node_modules", false),
        ("a/node_modules/*.js", "a/node_modules", true),
        ("{a,b/c}/*.rs", "b", true),
    ];
    for (text, directory, expected) in cases {
        let depth = directory.split('/').count();
        assert_eq!(parse(text).can_match_below(directory.as_bytes(), depth), expected, "{text} {directory}");
    }
}

#[test]
fn pattern_that_cannot_be_read_is_refused() {
    let text = |pattern: &str| Pattern::parse(pattern).err().map(|error| error.to_string());

    assert_eq!(
        text("a{b").as_deref(),
        Some(
            "glob: invalid pattern: error parsing glob 'a{b': unclosed alternate group; \
                                             missing '}' (maybe escape '{' with '[{]'?)"
        )
    );
    assert!(text("[a").is_some_and(|text| text.starts_with("glob: invalid pattern: ")));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4096) })]

    /// Pruning is only an optimisation: whatever matches can be reached.
    #[test]
    fn every_path_that_matches_can_be_reached(
        text in prop::collection::vec("[ab]|\\*|\\?|\\*\\*|\\[!a\\]|\\[ab\\]|\\{a,b/a\\}|\\{a,\\}b|a\\*|\\\\a|\\*\\*b|b\\*\\*", 1..5),
        path in "[ab]{1,2}(/[ab]{1,2}){0,4}",
    ) {
        let Ok(pattern) = Pattern::parse(&text.join("/")) else { return Ok(()) };
        if pattern.matches(path.as_bytes()) {
            let start = String::from_utf8(pattern.start()).expect("utf-8");
            prop_assert!(start.is_empty() || Path::new(&path).starts_with(&start));
            let names: Vec<&str> = path.split('/').collect();
            for depth in 1..names.len() {
                let directory = names[..depth].join("/");
                prop_assert!(pattern.can_match_below(directory.as_bytes(), depth), "{:?} at {directory}", text);
            }
        }
    }
}
