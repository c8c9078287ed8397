//! `demo --interactive`: tool calls typed at a prompt, one after another, in one session.

use std::io::Write;

use proto::runner::v1 as pb;
use proto::runner::v1::call::Input;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::super::outcome::printable;
use super::call::{Actor, bash};
use super::steps::read;
use crate::dev::DevError;

const HELP: &str = ":read PATH | :write PATH TEXT | :edit PATH OLD NEW | :glob PATTERN | :grep PATTERN | :help | :quit; \
                    anything else is a command for bash; Ctrl-C ends the running call";

/// What a line asks for.
#[derive(Debug, PartialEq)]
enum Line {
    Nothing,
    Quit,
    Help,
    Call(Input),
}

/// At the prompt both end the demo; during a call an interrupt ends the call.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }
}

/// Serves the prompt until the end of the input, `:quit` or a signal.
pub(super) async fn serve(actor: &Actor<'_>) -> Result<(), DevError> {
    let Ok(mut signals) = Signals::listen() else { return Err(DevError::Stopped) };
    actor.screen.line(HELP);
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut number = 0_u64;
    loop {
        prompt();
        let line = tokio::select! {
            line = lines.next_line() => match line {
                Ok(Some(line)) => line,
                _ => break,
            },
            _ = signals.interrupt.recv() => break,
            _ = signals.terminate.recv() => break,
        };
        let input = match parse(&line) {
            Ok(Line::Nothing) => continue,
            Ok(Line::Quit) => break,
            Ok(Line::Help) => {
                actor.screen.line(HELP);
                continue;
            }
            Ok(Line::Call(input)) => input,
            Err(problem) => {
                actor.screen.line(&problem);
                continue;
            }
        };
        number += 1;
        if !call(actor, &format!("prompt-{number}"), input, &mut signals).await? {
            break;
        }
    }
    actor.screen.line("");
    Ok(())
}

/// Runs one call; a signal ends it. `false`: the whole is to end.
async fn call(actor: &Actor<'_>, call_id: &str, input: Input, signals: &mut Signals) -> Result<bool, DevError> {
    let is_bash = matches!(input, Input::Bash(_));
    let called = actor.call(call_id, input);
    tokio::pin!(called);
    let mut mode = pb::CancelMode::Interrupt;
    loop {
        tokio::select! {
            seen = &mut called => {
                match seen {
                    Ok(seen) => {
                        if !is_bash {
                            actor.screen.line(&shown(&seen.text));
                        }
                        let milliseconds = seen.took.as_secs_f64() * 1000.0;
                        actor.screen.line(&format!("[{}, {milliseconds:.1} ms]", seen.ending()));
                    }
                    Err(error @ DevError::Refused { .. }) => actor.screen.line(&shown(&error.to_string())),
                    Err(error) => return Err(error),
                }
                return Ok(true);
            }
            _ = signals.interrupt.recv() => {
                actor.session.cancel(call_id, mode);
                // Whoever insists gets more.
                mode = pb::CancelMode::Kill;
            }
            // The end of the session ends the call as well.
            _ = signals.terminate.recv() => return Ok(false),
        }
    }
}

/// What a tool answered, fit for a terminal: contents and names of files are the workload's, and may not steer it.
fn shown(text: &str) -> String {
    let line = |line: &str| line.split('\t').map(printable).collect::<Vec<_>>().join("\t");
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

fn prompt() {
    let mut out = std::io::stdout().lock();
    // Without a reader the next line of input is the end.
    let _ = write!(out, "bash> ").and_then(|()| out.flush());
}

fn parse(line: &str) -> Result<Line, String> {
    let line = line.trim();
    if line.is_empty() {
        return Ok(Line::Nothing);
    }
    let Some(rest) = line.strip_prefix(':') else { return Ok(Line::Call(bash(line))) };
    let (verb, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let rest = rest.trim();
    let need = |what: &str| if rest.is_empty() { Err(format!(":{verb} needs {what}")) } else { Ok(rest.to_owned()) };
    Ok(match verb {
        "quit" | "q" => Line::Quit,
        "help" => Line::Help,
        "read" => Line::Call(read(&need("a path")?)),
        "write" => {
            let text = need("a path and a text")?;
            let (path, content) = text.split_once(' ').unwrap_or((&text, ""));
            Line::Call(Input::Write(pb::WriteInput { file_path: path.to_owned(), content: format!("{content}\n") }))
        }
        "edit" => {
            let text = need("a path, an old and a new word")?;
            let words: Vec<_> = text.split_whitespace().collect();
            let [path, old, new] = words[..] else { return Err(":edit needs a path, an old and a new word".into()) };
            Line::Call(Input::Edit(pb::EditInput {
                file_path: path.to_owned(),
                old_string: old.to_owned(),
                new_string: new.to_owned(),
                replace_all: false,
            }))
        }
        "glob" => Line::Call(Input::Glob(pb::GlobInput { pattern: need("a pattern")?, path: None })),
        "grep" => Line::Call(Input::Grep(pb::GrepInput { pattern: need("a pattern")?, path: None })),
        _ => return Err(format!(":{verb} is not known; {HELP}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_unless_they_begin_with_a_colon() {
        assert_eq!(parse("  "), Ok(Line::Nothing));
        assert_eq!(parse(":quit"), Ok(Line::Quit));
        assert_eq!(parse("ls -l"), Ok(Line::Call(bash("ls -l"))));
        assert_eq!(parse(":read /a b"), Ok(Line::Call(read("/a b"))));
        let written = pb::WriteInput { file_path: "/f".into(), content: "two words\n".into() };
        assert_eq!(parse(":write /f two words"), Ok(Line::Call(Input::Write(written))));
    }

    #[test]
    fn what_a_file_holds_steers_no_terminal() {
        assert_eq!(shown("a\tb\n\u{1b}]0;title\u{7}\r\u{9b}2J"), "a\tb\n?]0;title???2J");
    }

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(parse(":read"), Err(":read needs a path".to_owned()));
        assert_eq!(parse(":edit /f a"), Err(":edit needs a path, an old and a new word".to_owned()));
        assert!(parse(":rm /").is_err_and(|problem| problem.starts_with(":rm is not known; :read PATH")));
    }
}
