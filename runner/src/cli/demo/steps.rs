//! What the two sessions of the demo do, and what each step has to show.

use std::path::Path;
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::call::Input;
use proto::runner::v1::outcome::Kind;

use super::call::{Actor, Seen, bash};
use super::screen::StepResult;
use crate::dev::DevError;

/// Memory of session B, so that running out of it takes a moment only.
pub(super) const MEMORY_B: u64 = 96 << 20;
/// A cancelled command has this long to have begun.
const BEFORE_CANCEL: Duration = Duration::from_millis(300);
/// Where session A works.
pub(super) const FILE: &str = "/workspace/demo/notes.txt";

/// Either what was shown, or what went wrong.
type Verdict = Result<String, String>;

impl Actor<'_> {
    fn judge(&self, step: &str, took: Duration, verdict: Verdict) {
        let ok = verdict.is_ok();
        let proof = verdict.unwrap_or_else(|problem| problem);
        let milliseconds = took.as_secs_f64() * 1000.0;
        let (session, step) = (self.name.to_owned(), step.to_owned());
        self.screen.result(StepResult { session, step, ok, skipped: false, proof, milliseconds });
    }

    fn skip(&self, step: &str, why: &str) {
        let (session, step, proof) = (self.name.to_owned(), step.to_owned(), why.to_owned());
        self.screen.result(StepResult { session, step, ok: true, skipped: true, proof, milliseconds: 0.0 });
    }

    async fn tool(&self, tool: &str, shown: &str, input: Input) -> Result<Seen, DevError> {
        self.screen.event(self.name, tool, shown);
        let seen = self.call(&format!("{}-{tool}-{}", self.name, uuid::Uuid::new_v4().simple()), input).await?;
        for line in seen.text.lines().take(4) {
            self.screen.event(self.name, "|", line);
        }
        Ok(seen)
    }
}

/// Checks one condition after another; the first that does not hold is the verdict.
fn check(seen: &Seen, conditions: &[(bool, &str)], proof: impl Into<String>) -> Verdict {
    match conditions.iter().find(|(holds, _)| !holds) {
        None => Ok(proof.into()),
        Some((_, expected)) => {
            let said = seen.everything().split_whitespace().collect::<Vec<_>>().join(" ");
            let said: String = said.chars().take(200).collect();
            Err(format!("expected {expected}; {}, said: {said}", seen.ending()))
        }
    }
}

/// Session A: a stream, the file tools, a failing command.
pub(super) async fn files(actor: &Actor<'_>) -> Result<(), DevError> {
    let command = "for i in 1 2 3 4; do echo \"line $i of a stream\"; sleep 0.2; done; cd /tmp; export KEPT=yes";
    let seen = actor.bash("A-stream", command).await?;
    let conditions = [
        (seen.code() == Some(0), "exit code 0"),
        (seen.output.lines().count() == 4, "four lines"),
        (seen.pieces_before_end >= 2, "output before the end"),
    ];
    let proof = format!("{} pieces of output arrived while the command ran", seen.pieces_before_end);
    actor.judge("streamed bash", seen.took, check(&seen, &conditions, proof));

    let seen = actor.bash("A-state", "echo \"$PWD $KEPT\"").await?;
    let conditions = [(seen.output.trim() == "/tmp yes", "/tmp yes")];
    actor.judge("same shell", seen.took, check(&seen, &conditions, "directory and variables last between calls"));

    let content = "alpha\nbeta\ngamma\n".to_owned();
    let input = Input::Write(pb::WriteInput { file_path: FILE.to_owned(), content });
    let seen = actor.tool("write", FILE, input).await?;
    actor.judge("write", seen.took, check(&seen, &[(!seen.is_error, "success")], "a file and its directory were made"));

    let seen = actor.tool("read", FILE, read(FILE)).await?;
    let conditions = [(!seen.is_error, "success"), (seen.text.contains("beta"), "what was written")];
    actor.judge("read", seen.took, check(&seen, &conditions, "the same text comes back"));

    let input = Input::Edit(pb::EditInput {
        file_path: FILE.to_owned(),
        old_string: "beta".to_owned(),
        new_string: "delta".to_owned(),
        replace_all: false,
    });
    let seen = actor.tool("edit", "beta -> delta", input).await?;
    actor.judge("edit", seen.took, check(&seen, &[(!seen.is_error, "success")], "one place was replaced, atomically"));

    let (pattern, path) = ("**/*.txt".to_owned(), Some("/workspace".to_owned()));
    let seen = actor.tool("glob", "**/*.txt", Input::Glob(pb::GlobInput { pattern, path })).await?;
    let conditions = [(!seen.is_error, "success"), (seen.text.contains("notes.txt"), "notes.txt")];
    actor.judge("glob", seen.took, check(&seen, &conditions, "the file is found by its name"));

    let (pattern, path) = ("^del".to_owned(), Some("/workspace".to_owned()));
    let seen = actor.tool("grep", "^del", Input::Grep(pb::GrepInput { pattern, path })).await?;
    let conditions = [(!seen.is_error, "success"), (seen.text.contains("delta"), "delta")];
    actor.judge("grep", seen.took, check(&seen, &conditions, "the edited line is found by its text"));

    let seen = actor.bash("A-fail", "cat /no/such/file; (exit 3)").await?;
    let conditions = [(seen.code() == Some(3), "exit code 3"), (seen.output.contains("No such file"), "the reason")];
    actor.judge("failing command", seen.took, check(&seen, &conditions, "exit code and message are reported"));
    Ok(())
}

/// Session B: cancelling, running out of memory, and a secret of the host that stays outside.
pub(super) async fn limits(actor: &Actor<'_>, canary: &Path, secret: &str) -> Result<(), DevError> {
    let seen = actor.bash("B-who", "id -un; uname -n; ps -e | wc -l").await?;
    let conditions = [(seen.code() == Some(0), "exit code 0")];
    actor.judge("own world", seen.took, check(&seen, &conditions, "own users, own host name, own processes"));

    actor.screen.event(actor.name, "$", "sleep 30");
    let (watch, begin) = (actor.orchestrator.watch(), Instant::now());
    actor.session.send("B-cancel", bash("sleep 30"));
    actor.session.started("B-cancel").await?;
    tokio::time::sleep(BEFORE_CANCEL).await;
    actor.screen.event(actor.name, "^C", "cancel");
    actor.session.cancel("B-cancel", pb::CancelMode::Interrupt);
    let seen = actor.follow("B-cancel", watch, begin).await?;
    let conditions = [
        (matches!(seen.outcome, Some(Kind::Cancelled(_))), "a cancelled call"),
        (seen.took < Duration::from_secs(25), "an end before sleep ends by itself"),
    ];
    let proof = format!("ended after {:.1} s instead of 30", seen.took.as_secs_f64());
    actor.judge("cancelled command", seen.took, check(&seen, &conditions, proof));

    let memory = actor.session.receipt.layers.iter().find(|layer| layer.name == "cgroup_memory");
    if memory.is_some_and(|layer| !layer.enforced.is_empty()) {
        out_of_memory(actor).await?;
    } else {
        actor.skip(
            "out of memory",
            "left out: this user has no cgroup to limit memory with, as the receipt says (run as root to see it)",
        );
    }

    canary_by_bash(actor, canary, secret).await?;
    canary_by_read(actor, canary, secret).await
}

async fn out_of_memory(actor: &Actor<'_>) -> Result<(), DevError> {
    let seen = actor.bash("B-oom", "tail /dev/zero").await?;
    let conditions = [(matches!(seen.outcome, Some(Kind::OutOfMemory(_))), "an end by lack of memory")];
    let proof = format!("stopped at the session's {} MiB, and the cause is named", MEMORY_B >> 20);
    actor.judge("out of memory", seen.took, check(&seen, &conditions, proof));

    let seen = actor.bash("B-after", "echo still here").await?;
    let conditions = [(seen.output.trim() == "still here", "still here")];
    actor.judge("after that", seen.took, check(&seen, &conditions, "the session goes on"));
    Ok(())
}

async fn canary_by_bash(actor: &Actor<'_>, canary: &Path, secret: &str) -> Result<(), DevError> {
    let path = canary.display();
    let command = format!("cat {path} /proc/1/root{path} /proc/self/root/../..{path}");
    let seen = actor.bash("B-canary", &command).await?;
    let conditions = [
        (seen.code().is_some_and(|code| code != 0), "a refusal"),
        (!seen.everything().contains(secret), "no secret"),
        // Not an empty success under another name: the command itself must have tried and failed.
        (seen.output.matches("cat: ").count() == 3, "three refusals"),
    ];
    actor.judge("canary by bash", seen.took, check(&seen, &conditions, "the host's file is not there, by three ways"));
    Ok(())
}

async fn canary_by_read(actor: &Actor<'_>, canary: &Path, secret: &str) -> Result<(), DevError> {
    for path in [canary.display().to_string(), format!("/workspace/../../..{}", canary.display())] {
        let seen = actor.tool("read", &path, read(&path)).await?;
        let conditions = [(seen.is_error, "a refusal"), (!seen.everything().contains(secret), "no secret")];
        actor.judge("canary by read", seen.took, check(&seen, &conditions, "the read tool does not get it either"));
    }
    Ok(())
}

/// What the read tool is asked.
pub(super) fn read(path: &str) -> Input {
    Input::Read(pb::ReadInput { file_path: path.to_owned(), view_range: Vec::new() })
}
