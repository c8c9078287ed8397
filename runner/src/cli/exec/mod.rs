//! `sandbox-runner exec -- CMD`: one command in a new sandbox, its output as it arrives, its exit code as ours.
//!
//! The launcher is started for this one sandbox and ends with it, so whatever happens to this process leaves nothing
//! behind. With `--tty` the command has a terminal of its own inside; see `terminal`.

mod input;
mod output;
mod terminal;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::sync::watch;

use self::input::{Signals, cancel_on_signals, end_input, forward_stdin};
use self::output::{CallState, Observer, Output, follow};
use self::terminal::{Changes, RawMode};
use super::embedded::{self, GIVEN_ROOTFS, Wishes};
use super::{code, complain, doctor, floor, outcome, say};
use crate::config::launcher_policy::{PROFILE_DEFAULT, PROFILE_STRICT, PROFILE_USER};
use crate::config::units::{parse_cpus, parse_duration, parse_size};
use crate::sandbox::HostSandboxes;
use crate::sandbox::launch::HostReport;
use crate::sandbox::live::LiveSandbox;
use crate::sandbox::measure::{MeasureError, measure};
use crate::sandbox::receipt::Tier;
use crate::sandbox::spec::{EnvironmentVariable, Limits, Rootfs, Spec, parse_environment_variable};
use crate::sandbox::start::StartedLauncher;
use crate::work::{
    CallEnd, CallId, CallLimits, CancelMode, ExecInput, Gate, Outcome, OutputMode, PreparedCall, Receipt, Sandbox,
    Terminal, ToolFailure, ToolInput,
};

/// Output kept in the sandbox while it waits to be printed; the disk limit usually comes first.
const KEPT_HEAD_BYTES: u64 = 1 << 30;
const KEPT_TAIL_BYTES: u64 = 16 << 20;
/// Between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct ExecArguments {
    /// Root filesystem: `host` (the host's programs, read-only, with a private rest) or a directory
    #[arg(long, value_name = "host|DIR", default_value = "host")]
    rootfs: PathBuf,
    /// Memory limit, swap included, such as 64M or 1G
    #[arg(long, value_name = "SIZE", value_parser = parse_size, allow_negative_numbers = true)]
    memory: Option<u64>,
    /// Processor limit, such as 0.5 or 2
    #[arg(long, value_name = "NUMBER", value_parser = parse_cpus, allow_negative_numbers = true)]
    cpus: Option<u64>,
    /// Most processes and threads at once
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..), allow_negative_numbers = true)]
    pids: Option<u64>,
    /// Most bytes written to disk
    #[arg(long, value_name = "SIZE", value_parser = parse_size, allow_negative_numbers = true)]
    disk: Option<u64>,
    /// Wall time after which the command is ended, such as 500ms, 2s or 5m
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, allow_negative_numbers = true)]
    timeout: Option<Duration>,
    /// What can be reached
    #[arg(long, value_name = "NETWORK", value_enum, default_value_t = NetworkChoice::None)]
    network: NetworkChoice,
    /// Environment variable of the command; may be repeated
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_environment_variable)]
    environment: Vec<EnvironmentVariable>,
    /// Working directory inside the sandbox
    #[arg(long, value_name = "DIR")]
    workdir: Option<PathBuf>,
    /// Rights of the command: `root` inside the sandbox, an ordinary `user`, or `strict` (user, fewer system calls)
    #[arg(long, value_name = "PROFILE", value_enum, default_value_t = ProfileChoice::Root)]
    profile: ProfileChoice,
    /// Pass standard input on to the command
    #[arg(short = 'i', long, visible_alias = "interactive")]
    stdin: bool,
    /// Run the command in a terminal made inside the sandbox, as large as the one this was started from (80 by 24 without
    /// one); standard error comes on standard output too. With -i standard input must be a terminal, and every key goes to
    /// the command, Ctrl-C too; without, reading finds the end of input
    #[arg(short = 't', long, conflicts_with = "json")]
    tty: bool,
    /// Print one JSON object with outcome, output and receipt instead of the output itself
    #[arg(long)]
    json: bool,
    /// Measure the isolation first, which takes two seconds, and exit with 77 when less than this tier is reached
    #[arg(long, value_name = "TIER")]
    min_tier: Option<Tier>,
    /// Directory for everything this command keeps [default: /var/lib/sandbox-runner for root, else below the home]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Leave out a layer, to show that it matters; for tests
    #[arg(long, value_name = "LAYER", hide = true)]
    without: Vec<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NetworkChoice {
    /// Nothing but the sandbox's own loopback
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProfileChoice {
    /// uid 0 inside, with a small set of capabilities
    Root,
    /// An ordinary user inside
    User,
    /// An ordinary user with fewer system calls
    Strict,
}

/// What stopped `exec` before the command could end.
#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("--rootfs {}", path.display())]
    Rootfs { path: PathBuf, source: std::io::Error },
    #[error("--state-dir {} cannot be made absolute", path.display())]
    StateDirectory { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Start(#[from] crate::sandbox::start::StartError),
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
    #[error(transparent)]
    Launch(#[from] crate::sandbox::launch::LaunchError),
    #[error(transparent)]
    Create(#[from] crate::sandbox::CreateError),
    #[error("the command was not started: {}; {}", .0.message, .0.remediation)]
    Call(ToolFailure),
    #[error(transparent)]
    Measure(#[from] MeasureError),
    #[error("the command was not started")]
    BelowFloor,
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
    #[error(
        "standard input is not a terminal; leave out -i to run in a terminal that nobody types into, or -t to pass it on as \
         it is"
    )]
    NotATerminal,
    #[error("cannot change the mode of the terminal")]
    Terminal(#[source] std::io::Error),
    #[error("the sandbox was lost: {0}")]
    Lost(String),
    #[error("cannot write the output")]
    Output(#[source] std::io::Error),
}

/// Runs the subcommand.
pub(super) fn run(arguments: &ExecArguments) -> ExitCode {
    match try_run(arguments) {
        Ok(code) => ExitCode::from(code),
        // Whoever reads has seen enough, as in `exec -- yes | head`; a shell shows the same for a command of its own.
        Err(ExecError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::from(outcome::BROKEN_PIPE)
        }
        Err(ExecError::BelowFloor) => ExitCode::from(code::BELOW_FLOOR),
        Err(error) => {
            complain(&error);
            if let Some(remediation) = remediation(&error) {
                say(&format!("sandbox-runner: {remediation}"));
            }
            ExitCode::from(code::OURS)
        }
    }
}

fn remediation(error: &ExecError) -> Option<String> {
    use crate::sandbox::CreateError;
    use crate::sandbox::launch::LaunchError;
    match error {
        ExecError::Create(CreateError::Launch(LaunchError::Refused { remediation, .. })) => {
            Some(remediation.clone()).filter(|text| !text.is_empty())
        }
        _ => None,
    }
}

fn try_run(arguments: &ExecArguments) -> Result<u8, ExecError> {
    if arguments.tty && arguments.stdin && !terminal::is_input() {
        return Err(ExecError::NotATerminal);
    }
    let rootfs = match arguments.rootfs.to_str() {
        Some("host") => None,
        _ => Some(
            embedded::absolute(&arguments.rootfs)
                .map_err(|source| ExecError::Rootfs { path: arguments.rootfs.clone(), source })?,
        ),
    };
    let state_directory = arguments.state_dir.as_ref().map(std::path::absolute).transpose().map_err(|source| {
        ExecError::StateDirectory { path: arguments.state_dir.clone().unwrap_or_default(), source }
    })?;
    let from_directory = rootfs.is_some();
    let without = arguments.without.clone();
    let wishes = Wishes { state_directory, rootfs, without, allow_nested: true, ..Wishes::default() };
    let started = embedded::start(&wishes)?;
    if started.host.shape == "nested" && arguments.min_tier.is_none() {
        // Never silently: on any other host the same command line has walls that this one lacks.
        say(
            "sandbox-runner: no namespace can be made here, so the command runs at tier nested, which has no walls around \
             processes, network interfaces, memory and disk; --min-tier rootless refuses that, --min-tier nested accepts it",
        );
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ExecError::Runtime)?;
    let spec = spec(arguments, from_directory);
    let (result, process) = runtime.block_on(run_in_sandbox(arguments, &spec, started));
    // A reader of standard input may hang for ever; everything else is already done.
    runtime.shutdown_background();
    if let Some(mut process) = process {
        process.end();
    }
    result
}

fn spec(arguments: &ExecArguments, from_directory: bool) -> Spec {
    let profile = match arguments.profile {
        ProfileChoice::Root => PROFILE_DEFAULT,
        ProfileChoice::User => PROFILE_USER,
        ProfileChoice::Strict => PROFILE_STRICT,
    };
    Spec {
        profile: profile.to_owned(),
        rootfs: if from_directory { Rootfs::Directory(GIVEN_ROOTFS.to_owned()) } else { Rootfs::Host },
        limits: Limits {
            memory_bytes: arguments.memory.unwrap_or(0),
            cpu_millis: arguments.cpus.unwrap_or(0),
            pids: arguments.pids.unwrap_or(0),
            disk_bytes: arguments.disk.unwrap_or(0),
        },
        ..Spec::throw_away(format!("exec-{}", uuid::Uuid::new_v4().simple()))
    }
}

async fn run_in_sandbox(
    arguments: &ExecArguments,
    spec: &Spec,
    started: StartedLauncher,
) -> (Result<u8, ExecError>, Option<crate::sandbox::start::LauncherProcess>) {
    let (sandboxes, process) = match embedded::sandboxes(started) {
        Ok(parts) => parts,
        Err(error) => return (Err(error.into()), None),
    };
    let result = async {
        let mut signals = Signals::new(arguments.tty && arguments.stdin).map_err(ExecError::Signals)?;
        if let Some(wanted) = arguments.min_tier {
            tokio::select! {
                checked = check_floor(&sandboxes, wanted) => checked?,
                mode = signals.next() => return Ok(cancelled_early(mode)),
            }
        }
        let sandbox = tokio::select! {
            sandbox = sandboxes.create_live(spec) => sandbox?,
            // Nothing runs yet; the launcher drops what it has begun when its connection closes.
            mode = signals.next() => return Ok(cancelled_early(mode)),
        };
        for line in missing_limits(arguments, &sandbox.receipt(), sandboxes.host()) {
            say(&format!("sandbox-runner: {line}"));
        }
        let result = run_call(arguments, &sandbox, signals).await;
        sandbox.close(Duration::ZERO).await;
        result
    }
    .await;
    (result, Some(process))
}

/// A line for each limit that was asked for and that this host does not enforce.
fn missing_limits(arguments: &ExecArguments, receipt: &Receipt, host: &HostReport) -> Vec<String> {
    let asked = [
        ("--memory", arguments.memory.is_some(), "cgroup_memory"),
        ("--cpus", arguments.cpus.is_some(), "cgroup_cpu"),
        ("--pids", arguments.pids.is_some(), "cgroup_pids"),
        ("--disk", arguments.disk.is_some(), "disk_limit"),
    ];
    let line = |(option, _, name): &(&str, bool, &str)| {
        let layer = receipt.layers.iter().find(|layer| layer.name == *name && layer.enforced.is_empty())?;
        let (errno, remedy) = (doctor::errno_name(layer.errno), doctor::remedy(layer, host));
        Some(format!("{option} has no effect here ({errno}): {remedy}"))
    };
    asked.iter().filter(|(_, is_asked, _)| *is_asked).filter_map(line).collect()
}

async fn check_floor(sandboxes: &HostSandboxes, wanted: Tier) -> Result<(), ExecError> {
    let receipt = measure(sandboxes).await?.receipt;
    let reached = receipt.tier.parse().unwrap_or(Tier::None);
    if reached >= wanted {
        return Ok(());
    }
    let accept = format!("use --min-tier {reached}");
    for line in floor::lines(&receipt, sandboxes.host(), wanted, reached, ("--min-tier", &accept)) {
        say(&format!("sandbox-runner: {line}"));
    }
    Err(ExecError::BelowFloor)
}

fn cancelled_early(mode: CancelMode) -> u8 {
    outcome::exit_code(&Outcome::Cancelled { mode, before_start: true, killed: false, code: -1 })
}

async fn run_call(arguments: &ExecArguments, sandbox: &LiveSandbox, signals: Signals) -> Result<u8, ExecError> {
    let call_id = CallId::new("exec").map_err(|error| ExecError::Call(error.into()))?;
    let (observer, progress) = watch::channel(CallState::default());
    let changes = arguments.tty.then(Changes::listen).transpose().map_err(ExecError::Signals)?;
    let call = prepared(arguments, call_id.clone(), changes.as_ref().map(Changes::known));
    sandbox.start_call(call, Arc::new(Observer(observer))).await.map_err(ExecError::Call)?;
    let raw = (arguments.tty && arguments.stdin).then(RawMode::enter).transpose().map_err(ExecError::Terminal)?;
    let control = sandbox.control().clone();
    let cancelling = tokio::spawn(cancel_on_signals(control.clone(), call_id.clone(), signals));
    if arguments.stdin {
        tokio::spawn(forward_stdin(control.clone(), call_id.clone()));
    } else if arguments.tty {
        tokio::spawn(end_input(control.clone(), call_id.clone()));
    }
    let mut output = Output::new(arguments.json);
    let ended = match changes {
        Some(changes) => tokio::select! {
            ended = follow(sandbox, &call_id, progress, &mut output) => ended,
            never = changes.pass_on(control, &call_id, raw.as_ref()) => match never {},
        },
        None => follow(sandbox, &call_id, progress, &mut output).await,
    };
    cancelling.abort();
    // Before anything of ours is said.
    drop(raw);
    let end = ended?;
    output.finish(&end, &sandbox.receipt()).await?;
    if !arguments.json {
        explain(&end);
    }
    Ok(outcome::exit_code(&end.outcome))
}

fn prepared(arguments: &ExecArguments, call_id: CallId, terminal: Option<Terminal>) -> PreparedCall {
    let variable = |entry: &EnvironmentVariable| [entry.name.as_bytes(), b"=", &entry.value[..]].concat();
    let mut env: Vec<Vec<u8>> = arguments.environment.iter().map(variable).collect();
    if terminal.is_some() && !env.iter().any(|entry| entry.starts_with(b"TERM=")) {
        env.extend(terminal::kind());
    }
    let exec = ExecInput {
        argv: arguments.command.iter().map(|argument| argument.clone().into_vec()).collect(),
        env,
        cwd: arguments.workdir.clone().map(|path| path.into_os_string().into_vec()),
        stdin: arguments.stdin,
        terminal,
    };
    let limits = CallLimits {
        start_within: None,
        timeout: arguments.timeout,
        grace: GRACE,
        spool_head_bytes: KEPT_HEAD_BYTES,
        spool_tail_bytes: KEPT_TAIL_BYTES,
    };
    PreparedCall { call_id, input: ToolInput::Exec(exec), limits, output_mode: OutputMode::Separate, gate: Gate::Open }
}

/// Says on standard error what the exit code alone does not tell.
fn explain(end: &CallEnd) {
    if let Some(cause) = outcome::cause(&end.outcome) {
        say(&format!("sandbox-runner: {cause}"));
    }
    for note in &end.notes {
        say(&format!("sandbox-runner: note: {}", outcome::printable(&note.text)));
    }
}
