//! A hunt for credentials, as a tool call would do it, and what may be found.

/// The script: it looks in environments, arguments, memory and descriptors of all processes that it sees, and in files.
pub const HUNT: &str = include_str!("hunt.sh");
/// A command that plants in the sandbox what the hunter must find.
pub const PLANT: &str = "export PLANTED=$(printf 'sk-an%s' t-canary-memory); sleep 600 & \
                         printf 'sk-an%s' t-canary-file > .token; exec 9< .token";
/// What is planted begins so.
const CANARY: &str = "sk-ant-canary-";

/// What a hunt found, each with its place.
///
/// # Panics
/// When it was cut off.
#[must_use]
pub fn found(hunt: &str) -> Vec<(String, String)> {
    assert!(hunt.trim_end().ends_with("HUNTED to the end"), "the hunt did not end:\n{hunt}");
    let lines = hunt.lines().filter_map(|line| line.strip_prefix("FOUND "));
    let split = |line: &str| line.rsplit_once(": ").map(|(place, secret)| (place.to_owned(), secret.to_owned()));
    lines.filter_map(split).collect()
}

/// Asserts that a hunt in a sandbox has seen everything that was planted there, and nothing else.
///
/// # Panics
/// When it was blind, or has found a credential.
pub fn assert_only_planted(hunt: &str) {
    let found = found(hunt);
    let planted =
        |place: &str| found.iter().any(|(found, secret)| found.starts_with(place) && secret.starts_with(CANARY));
    for place in ["environment of ", "memory of ", "descriptor ", "file /workspace/.token"] {
        assert!(planted(place), "the hunter is blind to {place}\n{hunt}");
    }
    let foreign: Vec<_> = found.iter().filter(|(_, secret)| !secret.starts_with(CANARY)).collect();
    assert!(foreign.is_empty(), "credentials are in the sandbox: {foreign:?}");
    assert!(hunt.contains("REFUSED memory of 1\n"), "process 1 let itself be read\n{hunt}");
}
