//! `sandbox-runner demo` as somebody tries it: the prompt, and what a host is told that forbids what it needs, also by `doctor --fix`.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sandbox_runner_tests::runner::{Caller, Finished, binary, finish};
use sandbox_runner_tests::{host, needs_root, skip};

/// The demo has an end of its own; nothing of it takes that long.
const PATIENCE: Duration = Duration::from_secs(120);

fn piped(mut command: Command) -> Command {
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What the prompt answers to these lines.
fn prompt(lines: &[&str]) -> Finished {
    let mut input = tempfile::tempfile().expect("a file of our own");
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    input.write_all(text.as_bytes()).expect("written");
    std::io::Seek::rewind(&mut input).expect("rewound");
    let mut command = piped(Command::new(binary()));
    command.args(["demo", "--interactive"]).stdin(input);
    finish(command, PATIENCE).expect("it ends")
}

#[test]
fn prompt_runs_what_is_typed_says_what_is_wrong_and_ends_in_order() {
    needs_root!();
    let _host = host::shared();

    let ended =
        prompt(&["echo typed > f; cat f", ":read f", ":read nothing", "exit 3", ":wrong", ":quit", "echo never"]);

    let said = ended.text();
    assert_eq!(ended.code(), 0, "{said}{}", ended.errors());
    for expected in ["bash> ", "typed", "nothing: no such file or directory", "[exit code 3, ", ":wrong is not known"] {
        assert!(said.contains(expected), "{expected} is not in {said}");
    }
    assert!(!said.contains("never"), "what follows :quit ran: {said}");
    assert!(prompt(&["echo last"]).text().contains("last"), "the end of the input is an end as well");
}

/// A shell script in a user namespace of its own, in which nobody may make another one. `$0` is the command under test, and what is
/// changed is this namespace's own setting.
fn forbidden(script: &str) -> Command {
    let mut command = piped(Caller::Nobody.command(Path::new("unshare")));
    let script = format!("limit=/proc/sys/user/max_user_namespaces; echo 0 > $limit && {script}");
    command.args(["--user", "--map-root-user", "sh", "-c", &script]).arg(binary()).env("HOME", "/nonexistent");
    command
}

/// Why nobody can look at such a host here.
fn obstacle() -> Option<String> {
    if let Some(obstacle) = Caller::Nobody.obstacle() {
        return Some(obstacle.to_string());
    }
    let mut attempt = piped(Caller::Nobody.command(Path::new("unshare")));
    attempt.args(["--user", "--map-root-user", "true"]);
    let can = finish(attempt, PATIENCE).is_ok_and(|attempt| attempt.code() == 0);
    (!can).then(|| "uid 65534 can make no user namespace here, or there is no unshare(1)".to_owned())
}

#[test]
fn host_that_forbids_user_namespaces_is_told_the_setting() {
    needs_root!();
    if let Some(obstacle) = obstacle() {
        skip!("{obstacle}");
    }

    let ended = finish(forbidden("exec \"$0\" demo"), PATIENCE).expect("it ends");

    assert_eq!(ended.code(), 1, "{}{}", ended.text(), ended.errors());
    let setting = "setting: user.max_user_namespaces is 0, should be ";
    assert!(ended.errors().contains(setting), "{}", ended.errors());
}

#[test]
fn doctor_shows_a_setting_before_it_changes_it_and_changes_none_without_a_yes() {
    needs_root!();
    if let Some(obstacle) = obstacle() {
        skip!("{obstacle}");
    }
    let run = |fix: &str| {
        let script = format!("{{ \"$0\" doctor {fix} </dev/null; echo \"limit $(cat $limit)\"; }} 2>&1");
        finish(forbidden(&script), PATIENCE).expect("it ends").text()
    };
    let shown = "setting: user.max_user_namespaces is 0, should be 65536: ";

    let asked = run("--fix");
    assert!(asked.contains(shown) && asked.contains("nothing was changed"), "{asked}");
    assert!(asked.contains("not asking, because standard input is not a terminal"), "{asked}");
    assert!(asked.ends_with("limit 0\n"), "it was changed without a yes: {asked}");

    let changed = run("--fix --yes");
    let before = changed.find(shown).expect("it is shown");
    let after =
        changed.find("changed user.max_user_namespaces from 0 to 65536 until the next boot").expect("it is changed");
    assert!(before < after, "shown after the change: {changed}");
    assert!(changed.ends_with("limit 65536\n"), "{changed}");
}
