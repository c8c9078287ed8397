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
use crate::bench::row::{Row, Verdict};
use crate::bench::subject::Subject;
use crate::config::launcher_policy::{IdRanges, LauncherPolicy, NamedVolume, RUNNER_ID};
use crate::sandbox::HostSandboxes;
use crate::sandbox::home::Identity;
use crate::sandbox::identity::runner_identity;
use crate::sandbox::launch::LaunchError;
use crate::sandbox::start::{LauncherProcess, StartError, StartedLauncher, start_launcher};

/// How often a goal is measured that others disturb.
const ATTEMPTS: u32 = 3;
/// Others may be done by then.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(10);
/// Sandboxes at once, with some room: the goals hold a hundred beside each other.
const SANDBOXES: u32 = 128;
/// Name of the tree's volume in the generated policy.
const TREE: &str = "tree";

/// Examples below the options.
const EXAMPLES: &str = "\
Every figure is a median of interleaved rounds, and every ratio is taken between figures of the same seconds. Rows that
others disturbed (more than 15 % of the processors) are measured again, and without a ratio when that does not help.
The exit code says whether it could be measured, not whether goals were met.

  cc -O2 -static -o /tmp/floor tests/floor/floor.c
  sandbox-runner bench --floor /tmp/floor --tree ~/.cargo/registry/src --sdk-python ~/venv/bin/python
  sandbox-runner bench --floor /tmp/floor --json G1 G4 G5       only these, as one JSON object
  sandbox-runner bench --list                                   what each goal is";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
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
    /// Python with the package anthropic, whose tools are measured beside ours [default: python3, if it has it]
    #[arg(long, value_name = "PROGRAM")]
    sdk_python: Option<PathBuf>,
    /// Directory for everything this command keeps [default: /var/lib/sandbox-runner for root, else below the home]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Run the peers of another process of this command
    #[arg(long, hide = true)]
    serve_peers: bool,
    /// Where a daemon that is started finds its certificates
    #[arg(long, hide = true, requires = "serve_peers")]
    certificates: Option<PathBuf>,
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
    #[error("cannot make a directory for the certificates of the benchmark")]
    Certificates(#[source] std::io::Error),
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
    Settings {
        floor: arguments.floor.clone(),
        tree: arguments.tree.clone(),
        pattern: arguments.pattern.clone(),
        sdk_python: arguments.sdk_python.clone(),
        certificates: arguments.certificates.clone(),
    }
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
    let certificates = private_directory().map_err(Failure::Certificates)?;
    let settings = Settings {
        floor: absolute("--floor", &arguments.floor)?,
        tree: absolute("--tree", &arguments.tree)?,
        sdk_python: arguments.sdk_python.as_deref().map(program),
        certificates: Some(certificates.path().to_owned()),
        ..settings(arguments)
    };
    let tree = settings.tree.as_deref().map(|path| (TREE.to_owned(), count_files(path)));
    // Both need the rights that are given up afterwards, and neither may be started by a process with threads.
    let peers = Peers::start(Path::new("/proc/self/exe"), &["bench", "--serve-peers"], &settings)?;
    for (name, reason) in &peers.inventory.missing {
        say(&format!("sandbox-runner: {name} is left out: {reason}"));
    }
    let started = start(arguments, settings.tree.as_deref())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::Runtime)?;
    let rounds = usize::try_from(arguments.rounds).unwrap_or(usize::MAX);
    let pattern = arguments.pattern.clone();
    let (wanted, directory) = (arguments.goals.clone(), certificates.path().to_owned());
    // As in the daemon, the work is a task of the runtime and not of the thread that started it.
    let work = runtime.spawn(async move {
        let (sandboxes, process) = sandboxes(started)?;
        let subject = Subject::new(sandboxes);
        let mut bench = Bench { subject, peers, rounds, tree, pattern, certificates: directory };
        let measured = measure(&goals, &wanted, &mut bench).await;
        let Bench { peers, .. } = bench;
        Ok::<_, Failure>((measured, peers, process))
    });
    let (measured, peers, mut process) = runtime.block_on(work).map_err(Failure::Task)??;
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    process.end();
    peers.end();
    drop(certificates);
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
    policy.ids = IdRanges::of_this_process(SANDBOXES).sandboxes;
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

/// Certificates are written after root was given up, and read by a daemon that has given it up too.
fn private_directory() -> std::io::Result<tempfile::TempDir> {
    let directory = tempfile::Builder::new().prefix(peer_server::DIRECTORY_PREFIX).tempdir_in("/tmp")?;
    let Identity { uid, gid } = runner_identity(RUNNER_ID);
    std::os::unix::fs::chown(directory.path(), Some(uid), Some(gid))?;
    Ok(directory)
}

/// A bare name is looked up, a path is made absolute. Links stay: a virtual environment is one.
fn program(given: &Path) -> PathBuf {
    if given.components().count() == 1 { given.to_owned() } else { std::path::absolute(given).unwrap_or(given.into()) }
}

/// A goal that cannot be measured is reported as such, and the others are measured all the same. What others disturbed
/// is measured again; when it still is void it is reported as void.
async fn measure(goals: &[&Goal], wanted: &[String], bench: &mut Bench) -> Result<(Vec<Row>, f64), BenchError> {
    let before = Usage::now()?;
    let mut rows = Vec::new();
    for goal in goals {
        let mut attempt = 1;
        let measured = loop {
            say(&format!("sandbox-runner: measuring {}: {}", goal.ids.join(", "), goal.what));
            let measured = goal.measure(bench).await.unwrap_or_else(|error| {
                let reason = super::describe(&error);
                goal.ids.iter().map(|id| Row::unmeasured(id, goal.what, &reason)).collect()
            });
            if attempt == ATTEMPTS || !measured.iter().any(Row::is_void) {
                break measured;
            }
            attempt += 1;
            say("sandbox-runner: others disturbed this, so it is measured again");
            tokio::time::sleep(PAUSE).await;
        };
        rows.extend(measured.into_iter().filter(|row| is_wanted(&row.goal, wanted)));
    }
    Ok((rows, Usage::now()?.foreign_percent_since(&before)))
}

fn is_wanted(goal: &str, wanted: &[String]) -> bool {
    wanted.is_empty() || wanted.iter().any(|name| name.eq_ignore_ascii_case(goal))
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
    let count = |verdict| rows.iter().filter(|row| row.verdict() == verdict).count();
    print(&format!(
        "{} met, {} missed, {} void, {} not measured, {} only shown",
        count(Verdict::Met),
        count(Verdict::Missed),
        count(Verdict::Void),
        count(Verdict::NotMeasured),
        count(Verdict::Shown)
    ));
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
