//! `sandbox-runner bench`: what this runner costs here, beside other runtimes and the floor of the machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{complain, embedded, print, say};
use crate::bench::BenchError;
use crate::bench::goal::{Bench, GOALS, Goal};
use crate::bench::machine::{self, Usage};
use crate::bench::peer::{PeerError, Peers, Settings};
use crate::bench::peer_server;
use crate::bench::row::Row;
use crate::bench::subject::Subject;
use crate::config::launcher_policy::{LauncherPolicy, NamedVolume, RUNNER_ID};
use crate::sandbox::HostSandboxes;
use crate::sandbox::identity::runner_identity;
use crate::sandbox::launch::LaunchError;
use crate::sandbox::start::{LauncherProcess, StartError, StartedLauncher, start_launcher};

/// Name of the tree's volume in the generated policy.
const TREE: &str = "tree";

#[derive(Debug, Args)]
pub(super) struct BenchArguments {
    /// Print one JSON object instead of lines
    #[arg(long)]
    json: bool,
    /// Rounds that count for each figure
    #[arg(long, value_name = "NUMBER", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// List the goals and stop
    #[arg(long)]
    list: bool,
    /// Program built from tests/floor/floor.c with `cc -O2 -static`; without it nothing is compared with the floor
    #[arg(long, value_name = "PROGRAM")]
    floor: Option<PathBuf>,
    /// Directory that is searched, such as ~/.cargo/registry/src; without it nothing is searched
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    /// Regular expression that is searched for
    #[arg(long, value_name = "PATTERN", default_value = r"fn\s+poll_next")]
    pattern: String,
    /// Directory for everything this command keeps [default: /var/lib/sandbox-runner for root, else below the home]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Run the peers of another process of this command
    #[arg(long, hide = true)]
    serve_peers: bool,
    /// Goals to measure, such as G1; all of them when none is named
    #[arg(value_name = "GOAL")]
    goals: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("there is no goal {0:?}; --list shows them")]
    UnknownGoal(String),
    #[error("{what} {}", path.display())]
    Path { what: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
    #[error("a measurement was interrupted by a failure of ours")]
    Task(#[source] tokio::task::JoinError),
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Bench(#[from] BenchError),
}

/// Runs the subcommand. Goals that are missed do not change the exit code: this measures, tests decide.
pub(super) fn run(arguments: &BenchArguments) -> ExitCode {
    if arguments.serve_peers {
        return match peer_server::serve(&settings(arguments)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => failed(&error),
        };
    }
    match try_run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    complain(error);
    ExitCode::FAILURE
}

fn settings(arguments: &BenchArguments) -> Settings {
    Settings { floor: arguments.floor.clone(), tree: arguments.tree.clone(), pattern: arguments.pattern.clone() }
}

fn try_run(arguments: &BenchArguments) -> Result<(), Failure> {
    let goals = chosen(&arguments.goals)?;
    if arguments.list {
        goals.iter().for_each(|goal| print(&format!("{:<8} {}", goal.ids.join(" "), goal.what)));
        return Ok(());
    }
    let absolute = |what, path: &Option<PathBuf>| {
        let resolved = path.as_deref().map(embedded::absolute).transpose();
        resolved.map_err(|source| Failure::Path { what, path: path.clone().unwrap_or_default(), source })
    };
    let settings = Settings {
        floor: absolute("--floor", &arguments.floor)?,
        tree: absolute("--tree", &arguments.tree)?,
        ..settings(arguments)
    };
    let tree = settings.tree.as_deref().map(|path| (TREE.to_owned(), count_files(path)));
    // Both need the rights that are given up afterwards, and neither may be started by a process with threads.
    let peers = Peers::start(Path::new("/proc/self/exe"), &["bench", "--serve-peers"], &settings)?;
    for (name, reason) in &peers.inventory.missing {
        say(&format!("sandbox-runner: {name} is left out: {reason}"));
    }
    let started = start(arguments, settings.tree.as_deref())?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::Runtime)?;
    let rounds = usize::try_from(arguments.rounds).unwrap_or(usize::MAX);
    let pattern = arguments.pattern.clone();
    // As in the daemon, the work is a task of the runtime and not of the thread that started it.
    let work = runtime.spawn(async move {
        let (sandboxes, process) = sandboxes(started)?;
        let mut bench = Bench { subject: Subject::new(sandboxes), peers, rounds, tree, pattern };
        let measured = measure(&goals, &mut bench).await;
        let Bench { peers, .. } = bench;
        Ok::<_, Failure>((measured, peers, process))
    });
    let (measured, peers, mut process) = runtime.block_on(work).map_err(Failure::Task)??;
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    process.end();
    peers.end();
    let (rows, foreign_percent) = measured?;
    report(arguments.json, &rows, foreign_percent)
}

fn chosen(names: &[String]) -> Result<Vec<&'static Goal>, Failure> {
    let is = |goal: &Goal, name: &str| goal.ids.iter().any(|id| id.eq_ignore_ascii_case(name));
    if let Some(unknown) = names.iter().find(|name| !GOALS.iter().any(|goal| is(goal, name))) {
        return Err(Failure::UnknownGoal(unknown.clone()));
    }
    Ok(GOALS.iter().filter(|goal| names.is_empty() || names.iter().any(|name| is(goal, name))).collect())
}

fn start(arguments: &BenchArguments, tree: Option<&Path>) -> Result<StartedLauncher, Failure> {
    let state = arguments.state_dir.as_ref().map(std::path::absolute).transpose().map_err(|source| Failure::Path {
        what: "--state-dir",
        path: arguments.state_dir.clone().unwrap_or_default(),
        source,
    })?;
    let home = embedded::home(state.as_deref());
    let identity = runner_identity(RUNNER_ID);
    let size = embedded::host_size();
    let mut policy = LauncherPolicy::embedded(identity.uid, identity.gid, home.state.clone(), home.run.clone(), size);
    policy.pool = Some(1);
    policy.lock_directory = nix::unistd::geteuid().is_root().then(|| PathBuf::from("/run/sandbox-runner-ids"));
    if let Some(path) = tree {
        policy.volumes = BTreeMap::from([(TREE.to_owned(), NamedVolume { path: path.to_owned(), writable: false })]);
    }
    Ok(start_launcher(&home, &policy)?)
}

fn sandboxes(started: StartedLauncher) -> Result<(HostSandboxes, LauncherProcess), Failure> {
    Ok(embedded::sandboxes(started)?)
}

/// Regular files below `path`; what cannot be read is not counted, and not searched either.
fn count_files(path: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    let kinds = entries.flatten().filter_map(|entry| Some((entry.path(), entry.file_type().ok()?)));
    kinds.map(|(path, kind)| if kind.is_dir() { count_files(&path) } else { usize::from(kind.is_file()) }).sum()
}

/// A goal that cannot be measured is reported as such, and the others are measured all the same.
async fn measure(goals: &[&Goal], bench: &mut Bench) -> Result<(Vec<Row>, f64), BenchError> {
    let before = Usage::now()?;
    let mut rows = Vec::new();
    for goal in goals {
        say(&format!("sandbox-runner: measuring {}: {}", goal.ids.join(", "), goal.what));
        match goal.measure(bench).await {
            Ok(measured) => rows.extend(measured),
            Err(error) => {
                let note = super::describe(&error);
                let unmeasured = |id: &&str| Row {
                    note: note.clone(),
                    ..Row::new(id, goal.what, crate::bench::row::Unit::Milliseconds)
                };
                rows.extend(goal.ids.iter().map(unmeasured));
            }
        }
    }
    Ok((rows, Usage::now()?.foreign_percent_since(&before)))
}

fn report(as_json: bool, rows: &[Row], foreign_percent: f64) -> Result<(), Failure> {
    let (hardware, kernel) = machine::description()?;
    let guards = machine::guards(foreign_percent)?;
    if as_json {
        let command: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        let goals: Vec<_> = rows.iter().map(Row::to_json).collect();
        print(
            &json!({
                "hardware": hardware,
                "kernel": kernel,
                "command": command.join(" "),
                "guards": guards,
                "goals": goals,
            })
            .to_string(),
        );
        return Ok(());
    }
    print(&format!("{hardware}; Linux {kernel}"));
    print(&format!(
        "{} processes, {} MiB available, others used {foreign_percent:.1} % of the processors",
        guards["processes"], guards["available_mib"]
    ));
    rows.iter().for_each(|row| print(&row.to_line()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_chosen_by_id_and_unknown_ones_are_refused() {
        let ids = |names: &[&str]| {
            chosen(&names.iter().map(ToString::to_string).collect::<Vec<_>>()).map(|goals| goals.len())
        };

        assert_eq!(ids(&["g3"]).ok(), Some(1));
        assert_eq!(ids(&[]).ok(), Some(GOALS.len()));
        assert!(ids(&["G1", "G99"]).is_err_and(|error| error.to_string().contains("G99")));
    }
}
