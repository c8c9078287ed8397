//! `sandbox-runner doctor`: what this host enforces, found out by attacking a sandbox, and what would change it.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

mod queues;

use super::config::DEFAULT_PATH;
use super::embedded::{self, Wishes};
use super::{code, complain, describe, floor, outcome, print, say};
use crate::sandbox::host::{Setting, settings};
use crate::sandbox::launch::{HostReport, LaunchError};
use crate::sandbox::measure::{Attempt, MeasureError, Measurement, measure};
use crate::sandbox::receipt::{LAYERS, Tier};
use crate::sandbox::start::{StartError, StartedLauncher};
use crate::work::{Layer, Receipt};

#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Exit with 77 when less than this tier is reached
    #[arg(long, value_name = "TIER", default_value = "none")]
    min_tier: Tier,
    /// Show the kernel settings that stand in the way, then ask and change them
    #[arg(long)]
    fix: bool,
    /// Change them without asking
    #[arg(long, requires = "fix")]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Configuration file, whose work queues are looked at
    #[arg(long, value_name = "FILE", env = "RUNNER_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Directory for everything this command keeps [default: /var/lib/sandbox-runner for root, else below the home]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Leave out a layer, to show that it is missed; for tests
    #[arg(long, value_name = "LAYER", hide = true)]
    without: Vec<String>,
}

/// Why the host could not be examined.
#[derive(Debug, thiserror::Error)]
enum DoctorError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("cannot start the async runtime")]
    Runtime(#[source] std::io::Error),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Measure(#[from] MeasureError),
}

/// Runs the subcommand.
pub(super) fn run(arguments: &DoctorArguments) -> ExitCode {
    // Before anything else, because starting the launcher gives up root.
    let settings = if arguments.fix { fix(arguments.yes) } else { settings() };
    // Files of the operator as well; the servers are asked when root is given up.
    let looked = queues::look(&arguments.config);
    let examined = examine(arguments);
    let queues = queues::ask(looked);
    let host = match examined {
        Ok((host, Ok(measurement))) => {
            let text = if arguments.json {
                let mut value = report_json(&host, &measurement, &settings);
                value["queues"] = queues::json(&queues);
                value.to_string()
            } else {
                format!("{}{}", report_text(&host, &measurement, &settings), queues::text(&queues))
            };
            print(text.trim_end());
            verdict(arguments.min_tier, &host, &measurement.receipt)
        }
        Ok((host, Err(error))) => Some(failed(arguments, &error, &settings, Some(&host), &queues)),
        Err(error) => Some(failed(arguments, &error, &settings, None, &queues)),
    };
    let of_queues = if queues.iter().all(queues::Found::is_good) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    host.unwrap_or(of_queues)
}

type Examined = (HostReport, Result<Measurement, DoctorError>);

fn examine(arguments: &DoctorArguments) -> Result<Examined, DoctorError> {
    let state_directory = arguments.state_dir.as_deref().and_then(|path| std::path::absolute(path).ok());
    let wishes =
        Wishes { state_directory, without: arguments.without.clone(), allow_nested: true, ..Wishes::default() };
    let started = embedded::start(&wishes)?;
    let host = started.host.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DoctorError::Runtime)?;
    let (measured, process) = runtime.block_on(measure_with(started));
    drop(runtime);
    if let Some(mut process) = process {
        process.end();
    }
    Ok((host, measured))
}

async fn measure_with(
    started: StartedLauncher,
) -> (Result<Measurement, DoctorError>, Option<crate::sandbox::start::LauncherProcess>) {
    match embedded::sandboxes(started) {
        Ok((sandboxes, process)) => (measure(&sandboxes).await.map_err(DoctorError::from), Some(process)),
        Err(error) => (Err(error.into()), None),
    }
}

/// What a host that is below the floor exits with.
fn verdict(wanted: Tier, host: &HostReport, receipt: &Receipt) -> Option<ExitCode> {
    let reached = receipt.tier.parse().unwrap_or(Tier::None);
    if reached >= wanted {
        return None;
    }
    let accept = format!("use --min-tier {reached}");
    for line in floor::lines(receipt, host, wanted, reached, ("--min-tier", &accept)) {
        say(&format!("sandbox-runner: {line}"));
    }
    Some(ExitCode::from(code::BELOW_FLOOR))
}

fn failed(
    arguments: &DoctorArguments,
    error: &DoctorError,
    settings: &[Setting],
    host: Option<&HostReport>,
    found: &[queues::Found],
) -> ExitCode {
    complain(error);
    if arguments.json {
        let mut value = json!({ "tier": "none", "error": describe(error), "host": host, "settings": settings });
        value["queues"] = queues::json(found);
        print(&value.to_string());
    } else {
        print(queues::text(found).trim());
        for missing in host.iter().flat_map(|host| &host.missing) {
            say(&format!(
                "missing: {} ({}, {}); {}",
                missing.layer,
                missing.attempt,
                errno_name(missing.errno),
                missing.remedy
            ));
        }
        for setting in settings {
            say(&setting_line(setting));
        }
    }
    if arguments.min_tier > Tier::None { ExitCode::from(code::BELOW_FLOOR) } else { ExitCode::FAILURE }
}

/// Shows what it would change, asks, changes; returns what is left.
fn fix(without_asking: bool) -> Vec<Setting> {
    let found = settings();
    if found.is_empty() {
        say("no kernel setting stands in the way");
        return found;
    }
    for setting in &found {
        say(&setting_line(setting));
    }
    if !without_asking && !confirmed() {
        say("nothing was changed");
        return found;
    }
    for setting in &found {
        match setting.change() {
            Ok(()) => say(&format!(
                "changed {} from {} to {} until the next boot; to keep it, write the line {} = {} into \
                 /etc/sysctl.d/90-sandbox-runner.conf",
                setting.name, setting.current, setting.wanted, setting.name, setting.wanted
            )),
            Err(error) => {
                say(&format!("could not change {}: {error}; run as root: {}", setting.name, setting.command()))
            }
        }
    }
    settings()
}

fn confirmed() -> bool {
    if !std::io::stdin().is_terminal() {
        say("not asking, because standard input is not a terminal; use --yes to change them");
        return false;
    }
    // A prompt that cannot be shown is not answered, which means no.
    if write!(std::io::stderr(), "Change these settings until the next boot? [y/N] ").is_err() {
        return false;
    }
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

pub(super) fn setting_line(setting: &Setting) -> String {
    format!(
        "setting: {} is {}, should be {}: {}; {}",
        setting.name,
        setting.current,
        setting.wanted,
        setting.reason,
        setting.command()
    )
}

fn report_json(host: &HostReport, measurement: &Measurement, settings: &[Setting]) -> Value {
    let mut value = outcome::receipt_to_json(&measurement.receipt);
    let layers = value["layers"].as_array_mut().into_iter().flatten();
    for (layer, shown) in measurement.receipt.layers.iter().zip(layers) {
        let attempts: Vec<_> = attempts_on(layer, &measurement.attempts).collect();
        shown["in_force"] = (!layer.enforced.is_empty()).into();
        shown["attempts"] = json!(attempts);
        shown["remedy"] = remedy(layer, host).into();
    }
    value["host"] = json!(host);
    value["settings"] = json!(settings);
    value
}

fn report_text(host: &HostReport, measurement: &Measurement, settings: &[Setting]) -> String {
    let mut text = format!(
        "tier {}\n\n{:<22} {:<8} {:<34} how it was measured\n",
        measurement.receipt.tier, "layer", "in force", "enforced"
    );
    for layer in &measurement.receipt.layers {
        let in_force = if layer.enforced.is_empty() { "NO" } else { "yes" };
        let enforced = if layer.enforced.is_empty() { errno_name(layer.errno) } else { shorten(&layer.enforced, 34) };
        text +=
            &format!("{:<22} {in_force:<8} {enforced:<34} {}\n", layer.name, measured(layer, &measurement.attempts));
        if layer.enforced.is_empty() {
            let about = LAYERS.iter().find(|(name, _)| *name == layer.name).map_or("", |(_, about)| about);
            text += &format!("{:<22} needed so that {about}\n", "");
            let remedy = remedy(layer, host);
            if !remedy.is_empty() {
                text += &format!("{:<22} remedy: {remedy}\n", "");
            }
        }
    }
    let controllers =
        if host.cgroup_controllers.is_empty() { "none".to_owned() } else { host.cgroup_controllers.join(" ") };
    text += &format!(
        "\nhost: cgroups {} ({controllers}), landlock ABI {}, {} ids per sandbox, {} sandboxes at once, launcher from {}{}\n",
        host.cgroup_mode,
        host.landlock_abi,
        host.ids_per_sandbox,
        host.slots,
        host.image_source,
        if host.rootless { ", as an ordinary user" } else { "" },
    );
    for setting in settings {
        text += &format!("{}\n", setting_line(setting));
    }
    text
}

fn attempts_on<'a>(layer: &'a Layer, attempts: &'a [Attempt]) -> impl Iterator<Item = &'a Attempt> {
    attempts.iter().filter(|attempt| attempt.layer == layer.name)
}

/// What the attacks on one layer showed.
fn measured(layer: &Layer, attempts: &[Attempt]) -> String {
    if let Some(through) = attempts_on(layer, attempts).find(|attempt| !attempt.held) {
        return format!(
            "ATTACK GOT THROUGH: {} {}",
            outcome::printable(&through.attempt),
            outcome::printable(&through.detail)
        );
    }
    let mut held = attempts_on(layer, attempts);
    match (held.next(), held.count()) {
        (None, _) => "reported by the launcher".to_owned(),
        (Some(first), others) => {
            let answer = if first.errno == 0 { String::new() } else { format!(": {}", errno_name(first.errno)) };
            let more = if others == 0 { String::new() } else { format!(", and {others} more") };
            format!("refused {}{answer}{more}", outcome::printable(&first.attempt))
        }
    }
}

/// What would put `layer` in force; empty when it is.
pub(super) fn remedy(layer: &Layer, host: &HostReport) -> String {
    if !layer.enforced.is_empty() {
        return String::new();
    }
    let switch = match layer.name.as_str() {
        "cgroup_memory" | "cgroup_pids" | "cgroup_cpu" => "cgroup_limits",
        "landlock_scopes" => "landlock",
        name => name,
    };
    if host.switched_off.iter().any(|name| name == switch) {
        return format!("remove {switch:?} from [danger] without in the launcher's policy");
    }
    host.missing
        .iter()
        .find(|missing| missing.layer == layer.name)
        .map_or_else(|| usual_remedy(&layer.name).to_owned(), |missing| missing.remedy.clone())
}

/// What puts a layer in force where the launcher names no cause.
fn usual_remedy(layer: &str) -> &'static str {
    match layer {
        "separate_principals" | "idmapped_lowers" => {
            "run the launcher as root, on a file system that can be mapped to other ids"
        }
        "cgroup_memory" | "cgroup_pids" | "cgroup_cpu" => {
            "let the kernel offer this controller in the cgroup tree: see cgroup.controllers and the boot option cgroup_disable="
        }
        "cgroup_kill" => "let the launcher make groups in the cgroup tree",
        "disk_limit" => "ask for a sandbox whose disk is in memory: others have no bound of their own",
        "landlock" => "Linux 5.19 with landlock in the lsm= boot option is needed",
        "landlock_scopes" => "Linux 6.12 with landlock in the lsm= boot option is needed",
        _ => {
            "none by configuration: the launcher asks for this layer on every host, so report the attempt that got through"
        }
    }
}

pub(super) fn errno_name(errno: i32) -> String {
    if errno == 0 { "-".to_owned() } else { nix::Error::from_raw(errno).to_string() }
}

fn shorten(text: &str, longest: usize) -> String {
    let text = outcome::printable(text);
    if text.chars().count() <= longest { text } else { text.chars().take(longest - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::launch::{MissingLayer, ReportedLayer};
    use crate::sandbox::measure::apply;
    use crate::sandbox::receipt::{missing_for, receipt};

    fn host() -> HostReport {
        let missing = MissingLayer {
            layer: "disk_limit".into(),
            attempt: "quotactl".into(),
            errno: 95,
            remedy: "mount the state directory with prjquota".into(),
        };
        HostReport { missing: vec![missing], switched_off: vec!["landlock".into()], ..HostReport::default() }
    }

    fn measurement() -> Measurement {
        let reported: Vec<_> = LAYERS
            .iter()
            .filter(|(name, _)| *name != "disk_limit")
            .map(|(name, _)| ReportedLayer {
                name: (*name).into(),
                requested: "yes".into(),
                enforced: Some("yes".into()),
                errno: 0,
            })
            .collect();
        let attempt = |layer: &str, attempt: &str, held| Attempt {
            layer: layer.into(),
            attempt: attempt.into(),
            errno: 1,
            held,
            detail: String::new(),
        };
        let attempts = vec![
            attempt("seccomp", "bpf", true),
            attempt("seccomp", "kexec", true),
            attempt("proc_masked", "read kcore", false),
        ];
        Measurement { receipt: apply(receipt(&reported, 65_536, &host()), &attempts, 65_536, false), attempts }
    }

    #[test]
    fn text_shows_cause_and_remedy_of_every_missing_layer() {
        let text = report_text(&host(), &measurement(), &[]);

        for expected in [
            "refused bpf: EPERM: Operation not permitted, and 1 more",
            "ATTACK GOT THROUGH: read kcore",
            "remedy: mount the state directory with prjquota",
            "remedy: remove \"landlock\" from [danger]",
            "EOPNOTSUPP",
            "needed so that disk space is limited",
        ] {
            assert!(text.contains(expected), "{expected} not in\n{text}");
        }
        assert!(text.starts_with("tier provider\n"), "{text}");
    }

    #[test]
    fn every_layer_of_the_tier_full_has_a_remedy_where_the_launcher_names_none() {
        let full = missing_for(&receipt(&[], 1, &HostReport::default()).layers, Tier::Full);
        let layers = receipt(&[], 1, &HostReport::default()).layers;

        assert!(full.len() > 20, "{full:?}");
        for layer in layers.iter().filter(|layer| full.contains(&layer.name.as_str())) {
            let remedy = remedy(layer, &HostReport::default());
            assert!(!remedy.is_empty(), "{} has no remedy", layer.name);
        }
        // What a launcher reports that says no cause is answered by the name, not by the sentence for defects.
        for name in ["cgroup_memory", "cgroup_kill", "disk_limit", "landlock", "idmapped_lowers", "separate_principals"]
        {
            assert_ne!(usual_remedy(name), usual_remedy("seccomp"), "{name}");
        }
    }

    #[test]
    fn limits_switched_off_by_the_operator_name_their_switch() {
        let host = HostReport { switched_off: vec!["cgroup_limits".into()], ..HostReport::default() };
        for layer in receipt(&[], 1, &host).layers.iter().filter(|layer| layer.name == "cgroup_memory") {
            assert!(remedy(layer, &host).starts_with("remove \"cgroup_limits\" from [danger]"));
        }
    }

    #[test]
    fn json_has_every_layer_with_its_attempts() {
        let value = report_json(&host(), &measurement(), &[]);

        let layers = value["layers"].as_array().expect("an array");
        let seccomp = layers.iter().find(|layer| layer["name"] == "seccomp").expect("listed");
        assert_eq!(layers.len(), LAYERS.len());
        assert_eq!(seccomp["attempts"].as_array().map(Vec::len), Some(2));
        assert_eq!(seccomp["in_force"], true);
        assert_eq!(value["tier"], "provider");
    }
}
