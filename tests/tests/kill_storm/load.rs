//! Sessions with mixed calls, and what must be true of each of them whatever was killed.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{CallOutcome, DevError, Orchestrator, Session};
use sandbox_runner_tests::daemon::{MARKER, PATIENCE, Random, Workspace, bash, exec};
use sandbox_runner_tests::ledger::{self, Page};
use sandbox_runner_tests::runner::scaled;
use sha2::{Digest, Sha256};

use crate::account::{Account, Breach, Verdict};

/// Calls that a session sends before it looks at the first of them.
const BURST: u64 = 4;
/// Bursts of a session that nobody kills.
const BURSTS: u64 = 5;
/// Size of the file that commands print pieces of.
const WHOLE: u64 = 1_000_000;
/// What a shell may say by itself when a command of it is killed.
const LAST_WORDS: usize = 256;

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Prints a piece of the file in two parts, with a rest between them.
    Print {
        from: u64,
        size: u64,
        rest_ms: u64,
        in_shell: bool,
    },
    /// Adds a line to a file.
    Edit,
    Write,
    Read,
    Grep,
}

/// A call that was sent.
#[derive(Debug)]
struct Sent {
    id: String,
    task: Task,
}

/// Opens one session after the other and gives it work, until the storm is over.
pub(crate) async fn drive(orchestrator: Arc<Orchestrator>, account: Arc<Account>, driver: u64, seed: u64) {
    let mut random = Random::new(seed.wrapping_mul(driver + 7));
    let mut round = 0;
    while !account.is_over() {
        round += 1;
        let name = format!("d{driver}-{round}");
        let request = pb::OpenSession { session_id: name.clone(), ..Default::default() };
        let all_hit = account.all_hit();
        match in_time(orchestrator.open_session(request)).await {
            Some(Ok(session)) => {
                account.figures().sessions += 1;
                let lives = Life { session: &session, account: &account, all_hit };
                lives.live(&mut random).await;
            }
            // What a launcher that is away or full answers is honest, and tried again.
            Some(Err(DevError::Refused { .. } | DevError::SessionEnded { .. })) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Some(Err(other)) => panic!("{name}: {other}"),
            None => account.breach(Breach::LostOutcome, format!("{name} is neither opened nor refused")),
        }
    }
}

async fn in_time<T>(future: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(scaled(PATIENCE), future).await.ok()
}

/// One session.
struct Life<'a> {
    session: &'a Session,
    account: &'a Account,
    /// Attacks on every sandbox before this one was asked for.
    all_hit: u64,
}

impl Life<'_> {
    /// Calls until the session is lost or has had enough, and then a look at what they left.
    async fn live(&self, random: &mut Random) {
        let name = &self.session.session_id;
        let lines = WHOLE / 13 + 1;
        let prepare = format!(
            "{} && seq -f '%012.0f' 1 {lines} | head -c {WHOLE} > big && echo end > edited && echo needle > fixed.txt && \
             echo {name} > {MARKER}",
            ledger::MAKE_PIPE
        );
        let first = format!("{name}-first");
        self.session.send(&first, bash(prepare));
        if self.outcome(&first).await.is_none_or(|(verdict, _)| verdict != Verdict::Completed) {
            self.account.figures().lost_sessions += 1;
            return;
        }
        let marker = name.clone();
        let found = tokio::task::spawn_blocking(move || Workspace::find(&marker)).await.expect("no panic");
        let Some(workspace) = found.map(Arc::new) else {
            // It was lost between its answer and our look.
            self.account.figures().lost_sessions += 1;
            return;
        };
        let mut page = match self.account.ledger.page(&workspace) {
            Ok(page) => page,
            Err(error) => panic!("{name}: its ledger: {error}"),
        };
        self.account.workspaces().insert(name.clone(), Arc::clone(&workspace));
        let (mut calls, mut lost) = (Vec::new(), false);
        for burst in 0..BURSTS {
            lost = self.burst(burst, random, &mut calls).await;
            if lost || self.account.is_over() {
                break;
            }
        }
        self.account.workspaces().remove(name);
        self.account.figures().lost_sessions += u64::from(lost);
        self.count(&calls, &workspace, &mut page);
        let is_countable = |call: &&(Sent, Verdict, bool)| matches!(call.0.task, Task::Print { .. } | Task::Edit);
        let ended_ns = |call: &&(Sent, Verdict, bool)| self.account.ledger.entry(&call.0.id).ended_ns;
        let alone = calls.iter().filter(|call| self.account.is_alone_at(ended_ns(call))).count() as u64;
        {
            let mut figures = self.account.figures();
            figures.counted += calls.iter().filter(is_countable).count() as u64;
            figures.ended_alone += alone;
        }
        if !lost {
            let close = in_time(self.session.close(Duration::ZERO)).await;
            if close.is_none_or(|ended| ended.is_err()) {
                self.account.breach(Breach::LostOutcome, format!("{name} is not closed"));
            }
            // Nothing may begin after its outcome was told.
            self.count(&calls, &workspace, &mut page);
        }
    }

    /// Sends some calls and waits for all of them. `true`: the session is lost.
    async fn burst(&self, burst: u64, random: &mut Random, calls: &mut Vec<(Sent, Verdict, bool)>) -> bool {
        let name = &self.session.session_id;
        let mut sent = Vec::new();
        for number in 0..BURST {
            let (id, task) = (format!("{name}-{}", burst * BURST + number), Task::choose(random));
            self.session.send(&id, task.input(&id));
            sent.push(Sent { id, task });
        }
        if random.below(4) == 0 {
            let unlucky = usize::try_from(random.below(BURST)).expect("small");
            // The first one is meant to run; the others wait behind it, and most of them still do.
            let runs = unlucky > 0 || in_time(self.session.started(&sent[0].id)).await.is_some();
            if runs {
                self.session.cancel(&sent[unlucky].id, pb::CancelMode::Kill);
            }
        }
        let mut lost = false;
        for call in sent {
            let Some((verdict, finished)) = self.outcome(&call.id).await else {
                lost = true;
                continue;
            };
            *self.account.figures().verdicts.entry(verdict).or_default() += 1;
            let is_lost = matches!(verdict, Verdict::Refused | Verdict::Indeterminate | Verdict::NeverStarted);
            if is_lost && !self.account.is_hit(name, self.all_hit) {
                let text = format!("{} is {verdict:?}, and its sandbox was not attacked: {finished:?}", call.id);
                self.account.breach(Breach::Untrue, text);
            }
            lost |= is_lost;
            if let Some(finished) = &finished {
                self.check_output(&call, verdict, finished);
            }
            let recovered = finished.is_some_and(|finished| finished.message.recovered);
            self.session.shed(&call.id);
            calls.push((call, verdict, recovered));
        }
        lost
    }

    /// What is said about a call; nothing when nothing is said in time.
    async fn outcome(&self, id: &str) -> Option<(Verdict, Option<CallOutcome>)> {
        let account = self.account;
        let untrue = |text: String| account.breach(Breach::Untrue, format!("{id}: {text}"));
        let finished = match in_time(self.session.outcome(id)).await {
            Some(Ok(finished)) => finished,
            Some(Err(DevError::Refused { failure, .. })) => {
                let known = ["SESSION_UNKNOWN", "SESSION_CLOSED", "STALE_EPOCH", "SESSION_LOST"];
                if !known.contains(&failure.code.as_str()) {
                    untrue(format!("refused: {} {}", failure.code, failure.message));
                }
                return Some((Verdict::Refused, None));
            }
            Some(Err(other)) => panic!("{id}: {other}"),
            None => {
                account.breach(Breach::LostOutcome, format!("{id} has none"));
                return None;
            }
        };
        let verdict = match finished.message.outcome.clone().and_then(|outcome| outcome.kind) {
            Some(Kind::Exited(pb::Exited { code: 0 })) => {
                let failed = finished.message.result.as_ref().is_some_and(|result| result.is_error);
                if failed { Verdict::Ended } else { Verdict::Completed }
            }
            Some(Kind::Cancelled(cancelled)) if cancelled.before_start => Verdict::Withdrawn,
            Some(Kind::Exited(_) | Kind::Signaled(_) | Kind::Cancelled(_)) => Verdict::Ended,
            Some(Kind::NeverStarted(pb::NeverStarted { failure, .. })) => {
                if failure.is_none_or(|failure| failure.message.is_empty()) {
                    untrue("never started, and no reason".to_owned());
                }
                Verdict::NeverStarted
            }
            Some(Kind::Indeterminate(pb::Indeterminate { failure })) => {
                if failure.is_none_or(|failure| failure.message.is_empty()) {
                    untrue("indeterminate, and no reason".to_owned());
                }
                Verdict::Indeterminate
            }
            other => {
                untrue(format!("{other:?}"));
                Verdict::Ended
            }
        };
        Some((verdict, Some(finished)))
    }

    /// Every byte that a command printed is there or declared missing.
    fn check_output(&self, call: &Sent, verdict: Verdict, finished: &CallOutcome) {
        let Task::Print { from, size, .. } = call.task else { return };
        let range = usize::try_from(from).expect("small")..usize::try_from(from + size).expect("small");
        let expected = &whole()[range];
        let stream = finished.streams.get(&1);
        let missing: u64 = stream.iter().flat_map(|stream| &stream.holes).map(|(_, length)| length).sum();
        self.account.figures().bytes_declared_missing += missing;
        if missing > 0 {
            return;
        }
        let bytes = stream.map_or(&[][..], |stream| &stream.bytes);
        if verdict == Verdict::Completed {
            let sum = Sha256::digest(expected);
            let told = finished.message.streams.iter().find(|summary| summary.stream == 1);
            if Sha256::digest(bytes) != sum || (size > 0 && told.is_none_or(|told| told.sha256 != sum[..])) {
                let text =
                    format!("{}: {} bytes came of {size}, or others, or their sum is wrong", call.id, bytes.len());
                return self.account.breach(Breach::MissingBytes, text);
            }
            self.account.figures().bytes_checked += size;
            return;
        }
        let common = bytes.iter().zip(expected).take_while(|(one, other)| one == other).count();
        let rest = &bytes[common..];
        let is_of_the_file = rest.split(|byte| !byte.is_ascii_digit()).any(|word| word.len() >= 12);
        if rest.len() > LAST_WORDS || is_of_the_file {
            let text = format!("{} ({verdict:?}): {common} bytes of {size} are right, {} follow", call.id, rest.len());
            self.account.breach(Breach::MissingBytes, text);
        }
    }

    /// Compares what was said with what the ledger says, and for edits with the file.
    fn count(&self, calls: &[(Sent, Verdict, bool)], workspace: &Workspace, page: &mut Page) {
        if let Err(error) = page.enter() {
            panic!("{}: its ledger: {error}", self.session.session_id);
        }
        let edited = workspace.read("edited");
        let edited = String::from_utf8_lossy(&edited).into_owned();
        for (Sent { id, task }, verdict, recovered) in calls {
            let entry = self.account.ledger.entry(id);
            let times = match task {
                Task::Print { .. } => entry.begun,
                Task::Edit => edited.lines().filter(|line| line == id).count() as u64,
                Task::Write | Task::Read | Task::Grep => continue,
            };
            let agrees = match verdict {
                Verdict::Completed => times == 1,
                Verdict::NeverStarted | Verdict::Refused | Verdict::Withdrawn => times == 0,
                Verdict::Ended | Verdict::Indeterminate => times <= 1,
            };
            if times > 1 || entry.ended > 1 {
                self.account.breach(Breach::ExecutedTwice, format!("{id} ({verdict:?}) began {times} times"));
            } else if !agrees {
                self.account.breach(Breach::Untrue, format!("{id} is {verdict:?} and began {times} times"));
            }
            if *verdict == Verdict::Completed && matches!(task, Task::Print { .. }) {
                let alone = self.account.is_alone_at(entry.ended_ns);
                if entry.ended != 1 || (alone && !recovered) {
                    let text =
                        format!("{id} is {verdict:?}, recovered {recovered}, without a runner {alone}: {entry:?}");
                    self.account.breach(Breach::Untrue, text);
                }
            }
        }
    }
}

impl Task {
    fn choose(random: &mut Random) -> Self {
        match random.below(12) {
            0 => Self::Edit,
            1 => Self::Write,
            2 => Self::Read,
            3 => Self::Grep,
            choice => {
                let size = [0, 100, 60_000, 100_000, 300_000][usize::try_from(random.below(5)).expect("small")];
                let from = random.below(WHOLE - size);
                Self::Print { from, size, rest_ms: random.below(250), in_shell: choice % 2 == 0 }
            }
        }
    }

    fn input(self, id: &str) -> pb::call::Input {
        use pb::call::Input;
        match self {
            Self::Print { from, size, rest_ms, in_shell } => {
                let half = size / 2;
                // Every part is one program, so nothing is printed after something that was killed.
                let part = |from, count| {
                    format!(
                        "dd if=/workspace/big iflag=skip_bytes,count_bytes skip={from} count={count} bs=64K status=none"
                    )
                };
                let script = format!(
                    "{} && {} && sleep 0.{rest_ms:03} && {} && {}",
                    ledger::begin(id),
                    part(from, half),
                    part(from + half, size - half),
                    ledger::end(id)
                );
                if in_shell { bash(script) } else { exec(script) }
            }
            Self::Edit => Input::Edit(pb::EditInput {
                file_path: "edited".into(),
                // Each edit appends, so a second one would be seen.
                old_string: "end".into(),
                new_string: format!("{id}\nend"),
                replace_all: false,
            }),
            Self::Write => Input::Write(pb::WriteInput { file_path: id.into(), content: id.repeat(100) }),
            Self::Read => Input::Read(pb::ReadInput { file_path: "fixed.txt".into(), view_range: Vec::new() }),
            Self::Grep => Input::Grep(pb::GrepInput { pattern: "ne+dle".into(), path: None }),
        }
    }
}

/// The file that commands print pieces of: every twelve digits of it are somewhere once.
fn whole() -> &'static [u8] {
    static WHOLE_FILE: OnceLock<Vec<u8>> = OnceLock::new();
    WHOLE_FILE.get_or_init(|| {
        let mut bytes: Vec<u8> = (1..=WHOLE / 13 + 1).flat_map(|line| format!("{line:012}\n").into_bytes()).collect();
        bytes.truncate(usize::try_from(WHOLE).expect("small"));
        bytes
    })
}
