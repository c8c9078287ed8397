//! The commands of the peers: what is spawned anew for each measurement.
//!
//! They are made once, from the command line of the helper process. Whether one works here is found out by trying it.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use super::timing::quiet;
use crate::bench::peer::Settings;
use crate::bench::{goal, subject};

/// Serves the official SDK's tools.
const SDK_TOOLS: &str = include_str!("../sdk_tools.py");
/// What a worker imports before it can take work.
const SDK_IMPORT: &str =
    "from anthropic import AsyncAnthropic; from anthropic.lib.tools.agent_toolset import beta_agent_toolset_20260401";

/// Every peer by name, whether or not it works here. `work` is a directory of the benchmark.
pub(super) fn candidates(work: &Path, settings: &Settings) -> io::Result<Vec<(&'static str, Vec<OsString>)>> {
    let program: Vec<OsString> = subject::true_program().into_iter().map(OsString::from).collect();
    let bwrap = words(&[
        "bwrap",
        "--unshare-all",
        "--ro-bind",
        "/usr",
        "/usr",
        "--symlink",
        "usr/bin",
        "/bin",
        "--symlink",
        "usr/lib",
        "/lib",
        "--symlink",
        "usr/lib64",
        "/lib64",
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--tmpfs",
        "/tmp",
    ]);
    let flood = format!("head -c {} /dev/zero | cat >/dev/null", goal::FLOOD_BYTES);
    let mut list =
        vec![("spawn", program.clone()), ("bwrap", [bwrap, program].concat()), ("flood", words(&["sh", "-c", &flood]))];
    if let Some(busybox) = find("busybox") {
        list.push(("runc", container(work, "runc", &busybox)?));
        list.push(("crun", container(work, "crun", &busybox)?));
    }
    let mut import = python(settings);
    import.extend(words(&["-c", SDK_IMPORT]));
    list.push(("sdk-import", import));
    if let Some(tree) = &settings.tree {
        let tree = tree.as_os_str();
        let rg_files = words(&["rg", "--no-config", "--files", "--hidden", "--no-ignore", "-g", "**/*.rs"]);
        let find_times = words(&["-type", "f", "-name", "*.rs", "-printf", "%T@ %p\\n"]);
        let rg = words(&["rg", "--no-config", "-n", "--no-heading", "-e", &settings.pattern, "--"]);
        list.push(("rg-files", [rg_files, vec![tree.to_owned()]].concat()));
        list.push(("find", [words(&["find"]), vec![tree.to_owned()], find_times].concat()));
        list.push(("rg", [rg, vec![tree.to_owned()]].concat()));
    }
    Ok(list)
}

/// The command that serves the SDK's tools, in a directory of their own.
pub(super) fn sdk_tools(work: &Path, settings: &Settings) -> io::Result<Vec<OsString>> {
    let work = work.join("sdk");
    std::fs::create_dir_all(&work)?;
    let mut command = python(settings);
    command.extend(words(&["-c", SDK_TOOLS]));
    command.extend([work.into_os_string(), settings.tree.clone().unwrap_or_default().into_os_string()]);
    command.push(settings.pattern.clone().into());
    Ok(command)
}

/// A bundle with the default specification of `runtime`, runc or crun.
fn container(work: &Path, runtime: &str, busybox: &Path) -> io::Result<Vec<OsString>> {
    let work = work.join(runtime);
    let (root, bundle) = (work.join("root"), work.join("bundle"));
    for directory in ["bin", "proc", "dev", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(directory))?;
    }
    std::fs::copy(busybox, root.join("bin/busybox"))?;
    std::fs::create_dir_all(&bundle)?;
    // A runtime that is missing or fails shows when the finished command is tried.
    let _ = quiet(&words(&[runtime, "spec"])).current_dir(&bundle).status();
    let file = bundle.join("config.json");
    if let Ok(text) = std::fs::read_to_string(&file) {
        let mut specification: serde_json::Value = serde_json::from_str(&text)?;
        specification["process"]["terminal"] = false.into();
        specification["process"]["args"] = serde_json::json!(["/bin/busybox", "true"]);
        specification["root"]["path"] = root.to_string_lossy().into();
        std::fs::write(&file, specification.to_string())?;
    }
    let mut command = words(&[runtime, "--root"]);
    command.extend([work.join("state").into_os_string(), "run".into(), "--bundle".into(), bundle.into_os_string()]);
    command.push(format!("sandbox-runner-bench-{}", std::process::id()).into());
    Ok(command)
}

/// A Python that may have the SDK.
fn python(settings: &Settings) -> Vec<OsString> {
    vec![settings.sdk_python.clone().unwrap_or_else(|| "python3".into()).into_os_string()]
}

pub(super) fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// A program on the search path.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| candidate.is_file())
}
