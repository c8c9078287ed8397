//! Work queues as `doctor` sees them: the key and who can read it, whether the server takes it, whether the clocks agree, and
//! what waits. Files are looked at before root is given up, and no server is asked before that.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::cli::outcome::printable;
use crate::cli::worker::leads_here;
use crate::cli::{config, describe};
use crate::config::launcher_policy::IdRanges;
use crate::config::resolve::{Given, GivenError, handed_on};
use crate::config::resolved::{Claude, Config};
use crate::connector::claude::{Checked, Question, check};
use crate::daemon::settings;
use crate::sandbox::home::Identity;
use crate::sandbox::identity::{become_identity, runner_identity};

/// A difference that is not noise; certificates and logs suffer from more.
const APART_SECONDS: i64 = 60;

/// A queue before its server was asked.
pub(super) struct Looked {
    found: Found,
    question: Option<Question>,
}

/// What was found about one queue.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    /// Where it is configured.
    place: String,
    environment_id: String,
    /// The file with the key, its mode and its owner.
    key: String,
    checked: Option<Checked>,
    problems: Vec<String>,
}

impl Found {
    pub(super) fn is_good(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Reads what is configured, and the keys.
pub(super) fn look(path: &Path) -> Vec<Looked> {
    let (config, mut looked) = match config::load_beside(path) {
        Ok(config) => (Some(config), Vec::new()),
        Err(problems) => {
            let problems = problems.iter().map(ToString::to_string).collect();
            let found = Found { place: path.display().to_string(), problems, ..Found::default() };
            (None, vec![Looked { found, question: None }])
        }
    };
    if let Some(config) = &config {
        let runner = runner_of(config);
        let sections = config.claude.iter().enumerate();
        looked.extend(sections.map(|(number, claude)| of_section(number, claude, runner)));
    }
    looked.extend(of_variables(config.as_ref().map_or(&[], |config| &config.claude)));
    looked
}

fn of_section(number: usize, claude: &Claude, runner: Identity) -> Looked {
    let mut found = Found {
        place: format!("claude[{number}]"),
        environment_id: claude.environment_id.clone(),
        key: claude.key_file.display().to_string(),
        ..Found::default()
    };
    if let Ok(metadata) = std::fs::metadata(&claude.key_file) {
        let (mode, uid, gid) = (metadata.mode() & 0o7777, metadata.uid(), metadata.gid());
        found.key = format!("{}, mode {mode:o}, owner {uid}:{gid}", found.key);
        // Who may read a credential is in its access control list (systemd.exec(5)), which the mode does not show.
        let is_credential = claude.key_file.starts_with(config::UNIT_CREDENTIALS);
        if !is_credential && !can_read(&metadata, runner) {
            found.problems.push(format!(
                "the runner, uid {}, cannot read the key file: chown it to that user, or give its group {} and mode 640",
                runner.uid, runner.gid
            ));
        }
    }
    let question = settings::base(claude).map_err(|error| describe(&error)).and_then(|base| {
        let (id, version) = (claude.environment_id.clone(), claude.api_version.clone());
        Question::with_key_file(base, id, version, &claude.key_file)
            .map(|question| question.in_workspace(claude.workspace_id.clone()))
            .map_err(|error| describe(&error))
    });
    let question = question.map_err(|problem| found.problems.push(problem)).ok();
    Looked { found, question }
}

/// The environment that `worker run` would serve with the variables of this process.
fn of_variables(sections: &[Claude]) -> Option<Looked> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let environment_id = variable("ANTHROPIC_ENVIRONMENT_ID")?;
    let mut found = Found {
        place: "the variables of worker run".to_owned(),
        environment_id: printable(&environment_id),
        key: "ANTHROPIC_ENVIRONMENT_KEY".to_owned(),
        ..Found::default()
    };
    let (base_url, workspace_id) = (variable("ANTHROPIC_BASE_URL"), variable("ANTHROPIC_WORKSPACE_ID"));
    let question = || -> Result<Question, String> {
        let key = variable("ANTHROPIC_ENVIRONMENT_KEY").ok_or(
            "ANTHROPIC_ENVIRONMENT_KEY is not set, so the queue cannot be asked; the secret of a work item is good for that item only",
        )?;
        let given = Given {
            base_url: base_url.as_deref(),
            allow_plain_http: base_url.as_deref().is_some_and(leads_here),
            workspace_id: workspace_id.as_deref(),
        };
        let claude = handed_on(sections, &environment_id, given).map_err(|GivenError { name, what, fix }| {
            format!("ANTHROPIC_{} {what}; {fix}", name.replace('-', "_").to_uppercase())
        })?;
        let base = settings::base(&claude).map_err(|error| describe(&error))?;
        let question = Question::with_key(base, environment_id.clone(), claude.api_version, &key);
        question.map(|question| question.in_workspace(claude.workspace_id)).ok_or_else(|| {
            "ANTHROPIC_ENVIRONMENT_ID is no id of the server, or ANTHROPIC_ENVIRONMENT_KEY is not one line of printable characters"
                .to_owned()
        })
    };
    let question = question().map_err(|problem| found.problems.push(problem)).ok();
    Some(Looked { found, question })
}

/// Whom the runner of this configuration runs as.
fn runner_of(config: &Config) -> Identity {
    let of_launcher = config.launcher_socket.as_ref().and_then(|socket| std::fs::symlink_metadata(socket).ok());
    match of_launcher {
        Some(socket) => Identity { uid: socket.uid(), gid: socket.gid() },
        None => runner_identity(IdRanges::of_this_process(1).runner),
    }
}

fn can_read(file: &Metadata, runner: Identity) -> bool {
    let mode = file.mode();
    if runner.uid == 0 {
        true
    } else if file.uid() == runner.uid {
        mode & 0o400 != 0
    } else if file.gid() == runner.gid {
        mode & 0o040 != 0
    } else {
        mode & 0o004 != 0
    }
}

/// Asks the servers, as whoever the runner is.
pub(super) fn ask(looked: Vec<Looked>) -> Vec<Found> {
    if looked.iter().all(|one| one.question.is_none()) {
        return looked.into_iter().map(|one| one.found).collect();
    }
    // Where no launcher could be started, nothing has been given up yet.
    let given_up = become_identity(runner_identity(IdRanges::of_this_process(1).runner));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ask_one = |Looked { mut found, question }: Looked| {
        match (question, &given_up, &runtime) {
            (Some(question), Ok(()), Ok(runtime)) => {
                let checked = runtime.block_on(check(question));
                found.problems.extend(Some(checked.problem.clone()).filter(|problem| !problem.is_empty()));
                found.problems.extend(checked.ahead_seconds.and_then(apart));
                found.checked = Some(checked);
            }
            (Some(_), Err(error), _) => found.problems.push(describe(error)),
            (Some(_), _, Err(error)) => found.problems.push(describe(error)),
            (None, _, _) => {}
        }
        found
    };
    looked.into_iter().map(ask_one).collect()
}

fn apart(ahead: i64) -> Option<String> {
    if ahead.abs() <= APART_SECONDS {
        return None;
    }
    let way = if ahead > 0 { "ahead of" } else { "behind" };
    let seconds = ahead.abs();
    Some(format!(
        "the clock of this machine is {seconds} s {way} that of the server: let chrony or systemd-timesyncd set it"
    ))
}

pub(super) fn text(queues: &[Found]) -> String {
    let mut text = String::new();
    for found in queues {
        text += &format!("\nqueue {} ({})\n", found.environment_id, found.place);
        if !found.key.is_empty() {
            text += &format!("  key        {}\n", found.key);
        }
        if let Some(checked) = &found.checked {
            text += &answer(checked);
        }
        for problem in &found.problems {
            text += &format!("  PROBLEM    {}\n", printable(problem));
        }
    }
    text
}

fn answer(checked: &Checked) -> String {
    let mut text = match checked.answered {
        Some(time) => format!("  server     answered in {} ms", time.as_millis()),
        None => "  server     does not answer".to_owned(),
    };
    if let Some(ahead) = checked.ahead_seconds {
        text += &format!(", clocks {} s apart", ahead.abs());
    }
    text.push('\n');
    if let (Some(depth), Some(pending)) = (checked.depth, checked.pending) {
        text += &format!("  waiting    {depth} queued, {pending} delivered and not acknowledged");
        if let Some(oldest) = &checked.oldest_queued_at {
            text += &format!(", the oldest since {oldest}");
        }
        if let Some(workers) = checked.workers_polling {
            text += &format!("; {workers} workers poll");
        }
        text.push('\n');
    }
    text
}

pub(super) fn json(queues: &[Found]) -> Value {
    let one = |found: &Found| {
        let checked = found.checked.clone().unwrap_or_default();
        json!({
            "environment_id": found.environment_id,
            "configured_in": found.place,
            "key": found.key,
            "answered_seconds": checked.answered.map(|time| time.as_secs_f64()),
            "clock_ahead_seconds": checked.ahead_seconds,
            "depth": checked.depth,
            "pending": checked.pending,
            "oldest_queued_at": checked.oldest_queued_at,
            "workers_polling": checked.workers_polling,
            "problems": found.problems,
        })
    };
    queues.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn clocks_that_are_a_minute_apart_are_a_problem_that_says_which_way() {
        assert_eq!((apart(60), apart(-60)), (None, None));
        assert!(apart(61).is_some_and(|text| text.contains("61 s ahead of")));
        assert!(apart(-3600).is_some_and(|text| text.contains("3600 s behind")));
    }

    #[test]
    fn answer_and_problems_stand_below_their_queue_and_steer_no_terminal() {
        let checked = Checked {
            answered: Some(Duration::from_millis(12)),
            ahead_seconds: Some(-2),
            depth: Some(3),
            pending: Some(1),
            oldest_queued_at: Some("2026-01-01T00:00:00Z".into()),
            workers_polling: Some(2),
            ..Checked::default()
        };
        let found = Found {
            place: "claude[0]".into(),
            environment_id: "env_1".into(),
            key: "/k, mode 640, owner 0:7".into(),
            checked: Some(checked),
            problems: vec!["no\u{1b}".into()],
        };
        let shown = text(std::slice::from_ref(&found));
        for expected in [
            "queue env_1 (claude[0])",
            "answered in 12 ms, clocks 2 s apart",
            "3 queued, 1 delivered and not acknowledged, the oldest since 2026-01-01T00:00:00Z; 2 workers poll",
            "PROBLEM    no?",
        ] {
            assert!(shown.contains(expected), "{expected} not in {shown}");
        }
        assert!(!found.is_good());
        assert_eq!(json(&[found])[0]["depth"], 3);
    }
}
