//! Commands in one shell each: the official tool's, and the one of a session of the daemon.

use std::path::Path;

use sandbox_runner_tests::claude::{Mock, NewSession, ToolUse, ours};
use sandbox_runner_tests::daemon::{Random, number};
use sandbox_runner_tests::{host, needs_official_sdk, needs_root};
use serde_json::{Value, json};

use crate::{Answer, Case, Difference, Official, Verdict, pick, placed};

const DIFFERENCES: &[Difference] = &[
    Difference {
        name: "exit code",
        reason: "the official Python tool says only that a command failed; Go says with which code, and so do we: a model decides by it",
        fits: |case| both_fail(case) && without_code(&case.ours.text(), "") == Some(case.official.text()),
    },
    Difference {
        name: "lines of the shell",
        reason: "the shell of the official tool counts lines since its start and names itself; ours reads each command on its own, so that no number misleads",
        fits: |case| {
            let (official, ours) = (without_lines(&case.official.text()), case.ours.text());
            let same = case.official.is_error == case.ours.is_error;
            let coded = both_fail(case) && without_code(&ours, "").as_ref() == Some(&official);
            same && official != case.official.text() && (official == ours || coded)
        },
    },
    Difference {
        name: "time is up",
        reason: "the official tool loses what was printed, and its shell; ours shows it, ends the command and keeps the shell",
        fits: |case| {
            case.official.text() == TIMED_OUT
                && both_fail(case)
                && case.ours.text() == "part\nbash: command timed out after 300ms"
        },
    },
    Difference {
        name: "quote that is not closed",
        reason: "the official tool waits for the rest until the time is up, and its shell is lost; ours reads the command as a whole and says what is wrong",
        fits: |case| {
            let ours = case.ours.text();
            let told = ours.contains("unexpected EOF while looking for matching") && ours.ends_with("\nexit code: 2");
            case.official.text() == TIMED_OUT && both_fail(case) && told
        },
    },
    Difference {
        name: "syntax error",
        reason: "what is before the mistake is run by ours, as in every script; the official tool loses its shell",
        fits: |case| {
            let is_told = |text: String| text.contains("syntax error near unexpected token `then'");
            let ours = case.ours.text();
            let is_whole = ours.starts_with("before\n") && ours.ends_with("\nexit code: 2");
            both_fail(case) && is_told(case.official.text()) && is_told(ours) && is_whole
        },
    },
    Difference {
        name: "blank command",
        reason: "the official tool writes it between braces, which is a syntax error, and its shell is lost; nothing to do is done by ours",
        fits: |case| {
            let is_blank = case.input["command"].as_str().is_some_and(|text| text.trim().is_empty());
            let broken =
                case.official.is_error && case.official.text().contains("syntax error near unexpected token `}'");
            is_blank && broken && !case.ours.is_error && case.ours.text() == "(no output)"
        },
    },
    Difference {
        name: "shell that has ended",
        reason: "ours begins another one at once and says so",
        fits: |case| {
            both_fail(case) && without_code(&case.ours.text(), " (shell restarted)") == Some(case.official.text())
        },
    },
    Difference {
        name: "shell that was killed",
        reason: "the official tool says nothing; ours tells the signal, and begins another shell",
        fits: |case| {
            let told = case.ours.text() == "bash: killed by signal 9 (SIGKILL); shell restarted";
            both_fail(case) && case.official.text() == "(no output)" && told
        },
    },
    Difference {
        name: "after a shell that is lost",
        reason: "the official tool refuses every command, now and then with an exception of its own, until the model asks for a restart; ours goes on",
        fits: |case| {
            let lost = ["bash: bash session terminated; restart required", "BrokenResourceError()", "(no output)"];
            let refused = case.official.is_error && lost.contains(&case.official.text().as_str());
            case.input["command"] == "echo next" && refused && !case.ours.is_error && case.ours.text() == "next"
        },
    },
    Difference {
        name: "restart and more",
        reason: "the official Python tool passes over the command of a restart; TypeScript and Go run it, and so do we",
        fits: |case| {
            let passed_over = case.official.text() == "bash session restarted" && !case.official.is_error;
            passed_over && case.ours.text() == "and more" && !case.ours.is_error
        },
    },
    Difference {
        name: "just not too long",
        reason: "the official tool counts its own end mark as output; ours cuts what is longer than 102400 bytes, and nothing else",
        fits: |case| {
            let (official, ours) = (case.official.text(), case.ours.text());
            let shown = official.strip_prefix(CUT);
            ours.len() <= 102_400 && shown.is_some_and(|shown| shown.len() > 102_300 && ours.ends_with(shown))
        },
    },
    Difference {
        name: "where the rest is",
        reason: "the official tool drops the beginning of a long output; ours shows the same end, and names the file that has all of it",
        fits: |case| {
            let (official, mut ours) = (case.official.text(), case.ours.text());
            if case.ours.is_error {
                ours = without_code(&ours, "").unwrap_or(ours);
            }
            let (Some(official), Some(ours)) = (official.strip_prefix(CUT), ours.strip_prefix(CUT)) else {
                return false;
            };
            let Some((shown, note)) = ours.rsplit_once("\n[all ") else { return false };
            let shown = without_code(shown, "").unwrap_or_else(|| shown.to_owned());
            let same = shown.ends_with(official) || official.ends_with(&shown);
            let most = official.len().max(shown.len()) <= 102_400 && official.len().min(shown.len()) > 102_000;
            case.official.is_error == case.ours.is_error
                && same
                && most
                && note.contains(" bytes of output are in /run/")
        },
    },
    Difference {
        name: "late output",
        reason: "the official tool shows what a job prints after the end of its call as the output of another call",
        fits: |case| case.official.text() == "late\nafter" && case.ours.text() == "after" && !case.ours.is_error,
    },
    Difference {
        name: "named fields",
        reason: "the official tool takes what looks like true, and of other wrong types says only that arguments are invalid; ours names the field",
        fits: |case| {
            let coerced = case.input["restart"] == "yes" && case.official.text() == "bash session restarted";
            (coerced || case.official.is_invalid_arguments()) && case.ours.is_error && case.ours.begins("bash")
        },
    },
];
const TIMED_OUT: &str = "bash: bash command timed out after 0.3s";
const CUT: &str = "[output truncated]\n";

fn both_fail(case: &Case) -> bool {
    case.official.is_error && case.ours.is_error
}

/// The text before a last line that says the exit code and `more`, as the official tool shows it.
fn without_code(text: &str, more: &str) -> Option<String> {
    let (shown, last) = text.rsplit_once('\n').unwrap_or(("", text));
    let code = last.strip_prefix("exit code: ")?.strip_suffix(more)?;
    code.parse::<u8>().ok()?;
    Some(if shown.is_empty() { "(no output)".to_owned() } else { shown.to_owned() })
}

/// Without the line numbers of the official tool's shell.
fn without_lines(text: &str) -> String {
    let mut pieces = text.split("/bin/bash: line ");
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        plain.push_str("bash: ");
        plain.push_str(piece.split_once(": ").map_or(piece, |(_, rest)| rest));
    }
    plain
}

/// Lines of commands; what one leaves in the shell is there for those that come after it.
const LINES: &[&str] = &[
    "echo out",
    "echo err >&2",
    "printf 'no newline'",
    "printf 'three newlines\\n\\n\\n'",
    "printf '\\n\\nafter two newlines\\n'",
    "printf '\\n'",
    ":",
    "printf '\\xff\\xfe not UTF-8\\n'",
    "printf 'half a letter \\xc3'",
    "printf 'a\\0b\\n'",
    "printf '\\033[1;31mred\\033[0m \\033[2K\\n'",
    "printf 'over\\rwritten\\n'",
    "printf '\\t tab \\v \\b\\n'",
    "echo h\u{e9}llo \u{1f600}",
    "for n in 1 2 3; do echo out $n; echo err $n >&2; done",
    "seq 3 | tac",
    "cat",
    "read line; echo read $?",
    "echo 'single' \"double \\\" quote\" \\$",
    "echo before # comment",
    "cat <<'X'\nhere $HOME\nX",
    "true && echo and || echo or",
    "cd /tmp",
    "cd $W",
    "cd nowhere",
    "pwd",
    "export A=1",
    "A=2",
    "echo A is ${A-not set}",
    "unset A",
    "f() { echo function $1; return 4; }",
    "f x",
    "type -t f",
    "unset -f f",
    "list=(a b c); echo ${#list[@]}",
    "set -o pipefail",
    "set +o pipefail",
    "false | true",
    "! true",
    "nosuchcommand",
    "ls /nowhere",
    "umask",
    "yes | head -n 2",
    "echo x > file; cat file; rm file",
    "test -t 0 && echo terminal",
    "echo $((6 * 7)) $(echo inner) `echo old`",
    "ulimit -s unlimited 2>/dev/null; echo tried",
];
/// Last lines, for their exit codes.
const ENDS: &[&str] = &["", "", "true", "false", "(exit 2)", "(exit 42)", "(exit 127)", "(exit 255)", "sh -c 'exit 7'"];
/// Much output, around the size that is shown.
const LONG: &[&str] = &[
    "head -c 102399 /dev/zero | tr '\\0' a",
    "head -c 102400 /dev/zero | tr '\\0' a",
    "head -c 102401 /dev/zero | tr '\\0' a",
    "head -c 150000 /dev/zero | tr '\\0' a; echo; echo end",
    "seq 40000",
    "seq 40000; false",
    "yes \u{e9}\u{e9}\u{e9} | head -c 150001",
];

/// Calls that belong together, and whether a shell may not have lived through them.
struct Group {
    inputs: Vec<Value>,
    breaks: bool,
}

fn group(inputs: Vec<Value>) -> Group {
    Group { inputs, breaks: false }
}

fn breaking(inputs: Vec<Value>) -> Group {
    Group { inputs, breaks: true }
}

fn command(text: &str) -> Value {
    json!({"command": text})
}

/// Draws some lines, or a special case.
fn draw(random: &mut Random) -> Group {
    match random.below(24) {
        0 => group(vec![command(pick(random, LONG))]),
        1 => group(vec![command("sleep 0.2 & echo begun"), command("wait; echo over"), command("jobs")]),
        2 => group(vec![command("(sleep 0.2; echo late) & echo begun"), command("sleep 0.5; echo after")]),
        3 => breaking(vec![
            json!({"command": "echo part; sleep 5; echo never", "timeout_ms": 300}),
            command("echo next"),
        ]),
        4 => breaking(vec![command("echo bye; exit 3"), command("echo next")]),
        5 => breaking(vec![command("echo before\nif then"), command("echo next")]),
        6 => breaking(vec![json!({"command": "echo \"never closed", "timeout_ms": 300}), command("echo next")]),
        7 => group(vec![
            command("cd /tmp; A=5; sleep 30 &"),
            json!({"restart": true}),
            command("echo ${A-not set}; pwd; jobs | wc -l"),
        ]),
        8 => breaking(vec![json!({"restart": true, "command": "echo and more"})]),
        9 => {
            let wrong = [
                json!({}),
                json!({"command": null}),
                json!({"command": 5}),
                json!({"command": "echo hi", "timeout_ms": "soon"}),
                json!({"command": "echo hi", "timeout_ms": 0}),
                json!({"command": "echo hi", "restart": "yes"}),
                json!({"command": "echo hi", "unknown": 1}),
                json!({"command": ""}),
            ];
            group(vec![pick(random, &wrong)])
        }
        10 if random.below(2) == 0 => breaking(vec![command("  \n"), command("echo next")]),
        10 => breaking(vec![command("exec false"), command("echo next")]),
        11 => breaking(vec![command("kill -KILL $$"), command("echo next")]),
        _ => {
            let lines = 1 + random.below(4);
            let mut text: Vec<&str> = (0..lines).map(|_| pick(random, LINES)).collect();
            text.push(pick(random, ENDS));
            group(vec![command(text.join("\n").trim_end())])
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_are_answered_as_the_official_tool_does_but_for_what_is_meant() {
    let python = needs_official_sdk!();
    needs_root!();
    let _host = host::shared();
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().canonicalize().unwrap();
    let mut official = Official::start(&python, &root);
    let mock = Mock::start().await;
    let environment = mock.lock().create_environment("test").unwrap();
    let mut daemon = ours::start(&mock, &environment).await;
    let session = mock.lock().create_session(&environment.id, NewSession::default()).unwrap();
    let workspace = Path::new("/workspace");
    let mut random = Random::new(number("SEED", 7));
    let mut verdict = Verdict::default();
    let mut calls = number("BASH_CALLS", 200);
    while calls > 0 {
        let Group { mut inputs, breaks } = draw(&mut random);
        // A shell that is gone is not the reason of the next difference.
        inputs.extend(breaks.then(|| json!({"restart": true})));
        for input in inputs {
            calls = calls.saturating_sub(1);
            let id = mock.lock().call_tools(&session, vec![ToolUse::new("bash", placed(&input, workspace))]).remove(0);
            let official = official.call("bash", &placed(&input, &root), &root);
            let ours = mock.result_of(&session, &id).await;
            let ours = Answer::of(ours.is_error, ours.content, workspace);
            verdict.judge(&Case { tool: "bash", input, official, ours, root: root.clone() }, DIFFERENCES);
        }
    }
    verdict.assert(DIFFERENCES, &[], "BASH_CALLS");
    assert!(mock.lock().breaches.is_empty());
    daemon.end_with_nothing_left();
}
