//! The shapes in which the runner is deployed in containers, by podman, without a registry: what `doctor` measures must be
//! the tier that the shape can reach, the whole attack catalogue must agree with it, and nothing may be left behind.
#![forbid(unsafe_code)]

#[path = "isolation/expectations.rs"]
mod expectations;
#[path = "isolation/table.rs"]
mod table;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sandbox_init::policy::Profile;
use sandbox_init::policy::seccomp::Options;
use sandbox_runner_tests::canary::Canaries;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::prober::{self, Row, Verdict};
use sandbox_runner_tests::rootfs::{PROBER, Rootfs, shared_directory};
use sandbox_runner_tests::runner::{Finished, binary, finish};
use serde_json::Value;

use crate::expectations::assert_held;
use crate::table::{LAST, assert_answers};

const PATIENCE: Duration = Duration::from_secs(120);
const RUNNER: &str = "/usr/bin/sandbox-runner";
const STATE: &str = "/var/lib/sandbox-runner";

/// crun refuses hybrid cgroups, and the default ulimits need CAP_SYS_RESOURCE; neither matters to what is measured.
const ENGINE: &[&str] = &["--runtime=runc", "--cgroup-manager=cgroupfs"];
const RUN: &[&str] = &["--detach", "--net=host", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=4096:4096"];
/// First host id of a container with ids of its own.
const FIRST_ID: u32 = 1_879_048_192;
const OWN_IDS: &[&str] = &["--uidmap", "0:1879048192:65536", "--gidmap", "0:1879048192:65536"];

fn podman(arguments: &[&str]) -> anyhow::Result<Finished> {
    let mut command = Command::new("podman");
    command.args(ENGINE).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command, PATIENCE)
}

/// An image with the prober and a shell, whose libraries come from this host. Removed when dropped.
struct Image {
    name: String,
}

impl Image {
    fn import(purpose: &str) -> Result<Self, String> {
        let rootfs = Rootfs::with_prober();
        for program in ["bash", "sleep"] {
            install(rootfs.path(), program)?;
        }
        let archive = shared_directory("image");
        let file = archive.path().join("image.tar");
        let status = Command::new("tar").arg("-C").arg(rootfs.path()).arg("-cf").arg(&file).arg(".").status();
        if !status.is_ok_and(|status| status.success()) {
            return Err("tar does not work".to_owned());
        }
        let name = format!("localhost/sbr-attack-{purpose}-{}:latest", std::process::id());
        match podman(&["import", "--quiet", &file.display().to_string(), &name]) {
            Ok(finished) if finished.status.success() => Ok(Self { name }),
            Ok(finished) => Err(format!("podman cannot import an image: {}", finished.errors().trim())),
            Err(error) => Err(format!("podman does not run: {error:#}")),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // What cannot be removed is at worst a small image under a name of ours.
        let _ = podman(&["rmi", "--force", &self.name]);
    }
}

/// Copies a program of this host and the libraries that `ldd` names into a root filesystem.
fn install(rootfs: &Path, program: &str) -> Result<(), String> {
    let source = Path::new("/usr/bin").join(program);
    let copy = |from: &Path| -> Result<(), String> {
        let to = rootfs.join(from.strip_prefix("/").unwrap_or(from));
        let parent = to.parent().unwrap_or(rootfs);
        fs::create_dir_all(parent)
            .and_then(|()| fs::copy(from, &to))
            .map(drop)
            .map_err(|error| format!("{} cannot be copied: {error}", from.display()))
    };
    copy(&source)?;
    let listed = Command::new("ldd").arg(&source).output().map_err(|error| format!("ldd does not run: {error}"))?;
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    text.split_whitespace().filter(|word| word.starts_with('/')).try_for_each(|library| copy(Path::new(library)))
}

/// A container that runs until it is dropped, with canaries where any process of it could reach them.
struct Container {
    name: String,
    /// Host pid of its first process.
    pid: i32,
    canaries: Canaries,
    _image: Image,
}

impl Container {
    fn start(purpose: &str, shape: &[&str]) -> Result<Self, String> {
        let image = Image::import(purpose)?;
        let canaries = Canaries::plant();
        let name = format!("sbr-attack-{purpose}-{}", std::process::id());
        let program = format!("{}:{RUNNER}:ro", binary().display());
        let state = format!("{STATE}:mode=700");
        let mut all = vec!["run", "--name", &name];
        all.extend(RUN);
        all.extend(shape);
        all.extend(["--volume", &program, "--tmpfs", &state]);
        // The directory of the first canary holds the socket too.
        let mut shown: Vec<PathBuf> = canaries.files().to_vec();
        shown.extend(canaries.files().first().and_then(|file| file.parent()).map(Path::to_path_buf));
        let volumes: Vec<String> = shown.iter().map(|path| format!("{0}:{0}", path.display())).collect();
        for volume in &volumes {
            all.extend(["--volume", volume]);
        }
        all.extend([&image.name, "/usr/bin/sleep", "900"]);
        let started = podman(&all).map_err(|error| format!("podman does not run: {error:#}"))?;
        let mut container = Self { name, pid: 0, canaries, _image: image };
        if !started.status.success() {
            return Err(format!("no container of this shape here: {}", started.errors().trim()));
        }
        let inspected = podman(&["inspect", "--format", "{{.State.Pid}}", &container.name]);
        let inspected = inspected.map_err(|error| format!("podman does not run: {error:#}"))?;
        container.pid = inspected.text().trim().parse().map_err(|_| "the container has no pid".to_owned())?;
        Ok(container)
    }

    /// Gives the container's own groups to its root, as a runtime does that delegates.
    fn delegate(&self) {
        let is_unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        for directory in self.groups() {
            let used = ["memory", "pids", "cpu", "cpuacct", "unified"];
            let hierarchy = directory.strip_prefix("/sys/fs/cgroup").ok().and_then(|path| path.iter().next());
            if !is_unified && !hierarchy.and_then(|name| name.to_str()).is_none_or(|name| used.contains(&name)) {
                continue;
            }
            for name in ["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "tasks"] {
                let path = directory.join(name);
                if path.exists() {
                    std::os::unix::fs::chown(&path, Some(FIRST_ID), Some(FIRST_ID)).expect("root gives a group away");
                }
            }
        }
    }

    /// The directories of the container's own groups.
    fn groups(&self) -> Vec<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).expect("the container runs");
        let mut found = Vec::new();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let hierarchy = if controllers.is_empty() { "unified" } else { controllers.trim_start_matches("name=") };
            // Without version 1 controllers the unified tree is the mount itself.
            for base in [Path::new("/sys/fs/cgroup").join(hierarchy), PathBuf::from("/sys/fs/cgroup")] {
                let directory = base.join(path.trim_start_matches('/'));
                if path.len() > 1 && directory.join("cgroup.procs").exists() {
                    found.push(directory);
                    break;
                }
            }
        }
        assert!(!found.is_empty(), "the groups of the container were not found in {text}");
        found
    }

    /// Host pids of everything that runs in the container's groups but its first process, which reaps nobody: what ended
    /// without a parent stays a zombie there whatever we do.
    fn others(&self) -> Vec<i32> {
        let own = fs::read_to_string(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        let own: Vec<&str> = own.lines().filter(|line| line.rsplit(':').next().is_some_and(|p| p.len() > 1)).collect();
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| *pid != self.pid)
            .filter(|pid| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
            })
            .filter(|pid| {
                let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
                groups.lines().any(|line| own.iter().any(|own| line == *own || line.starts_with(&format!("{own}/"))))
            })
            .collect()
    }

    fn exec(&self, arguments: &[&str]) -> Finished {
        let mut all = vec!["exec", &self.name];
        all.extend(arguments);
        podman(&all).expect("the command ends")
    }

    /// `sandbox-runner exec` with these options.
    fn sandbox(&self, options: &[&str], command: &[&str]) -> Finished {
        let mut all = vec![RUNNER, "exec"];
        all.extend(options);
        all.push("--");
        all.extend(command);
        self.exec(&all)
    }

    fn doctor(&self) -> Value {
        let doctor = self.exec(&[RUNNER, "doctor", "--json"]);
        serde_json::from_slice(&doctor.stdout)
            .unwrap_or_else(|error| panic!("doctor prints no JSON ({error}): {} {}", doctor.text(), doctor.errors()))
    }

    /// The whole catalogue in one sandbox, with the canaries of this container.
    fn attacks(&mut self) -> Vec<Row> {
        let mut arguments = vec![PROBER.to_owned()];
        arguments.extend(self.canaries.options());
        arguments.extend(["--external".to_owned(), "all".to_owned()]);
        let rows = self.sandbox(&[], &arguments.iter().map(String::as_str).collect::<Vec<_>>()).rows();
        self.canaries.assert_untouched();
        assert!(rows.len() > 300, "only {} rows", rows.len());
        rows
    }

    /// Nothing but the first process, no group below the container's own, no file of a sandbox.
    fn assert_nothing_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.others().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let named = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let left: Vec<String> = self.others().iter().map(named).collect();
        assert!(left.is_empty(), "processes were left in the container: {left:?}");
        for directory in self.groups() {
            let children: Vec<PathBuf> = fs::read_dir(&directory)
                .expect("a group of the container")
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| path.is_dir())
                .collect();
            assert!(children.is_empty(), "groups were left: {children:?}");
        }
        let script = "shopt -s nullglob; for f in /var/lib/sandbox-runner/sandboxes/* /run/sandbox-runner/sandboxes/*; do echo $f; done";
        let files = self.exec(&["/usr/bin/bash", "-c", script]);
        assert_eq!((files.code(), files.text().as_str()), (0, ""), "files were left: {}", files.errors());
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = podman(&["rm", "--force", "--time", "0", &self.name]);
    }
}

/// A container of this shape, or the end of the test where there is none.
macro_rules! container {
    ($purpose:literal, $shape:expr) => {{
        needs_root!();
        match Container::start($purpose, &$shape) {
            Ok(container) => container,
            Err(reason) => sandbox_runner_tests::skip!("{reason}"),
        }
    }};
}

fn with_own_ids(shape: &[&'static str]) -> Vec<&'static str> {
    OWN_IDS.iter().chain(shape).copied().collect()
}

fn layer<'a>(report: &'a Value, name: &str) -> &'a Value {
    let layers = report["layers"].as_array().expect("layers");
    layers.iter().find(|layer| layer["name"] == name).unwrap_or_else(|| panic!("no layer {name} in {report}"))
}

fn assert_tier(report: &Value, tier: &str) {
    assert_eq!(report["tier"], tier, "{report:#}");
}

/// A command with output on both streams and an exit code of its own.
fn assert_exec_works(container: &Container) {
    let script = "echo out; echo err >&2; cd; echo kept > file; read -r line < file; echo $line; exit 3";
    let finished = container.sandbox(&[], &["/usr/bin/bash", "-c", script]);
    assert_eq!((finished.code(), finished.text().as_str()), (3, "out\nkept\n"), "{}", finished.errors());
    assert!(finished.errors().lines().any(|line| line == "err"), "{}", finished.errors());
}

/// Everything that holds on a host holds here.
fn assert_walls(container: &mut Container, tier: &str) {
    assert_tier(&container.doctor(), tier);
    assert_held(&container.attacks());
    assert_exec_works(container);
    container.assert_nothing_left();
}

/// What a floor above the measured tier says: nothing ran, a line for each missing layer, the setting that accepts it.
fn assert_refused_below(container: &Container, report: &Value, floor: &str) {
    let tier = report["tier"].as_str().expect("a tier");
    let finished = container.sandbox(&["--min-tier", floor], &["/usr/bin/bash", "-c", "echo ran"]);
    let lines = finished.errors();
    assert_eq!((finished.code(), finished.text().as_str()), (77, ""), "{lines}");
    let missing = lines.lines().filter(|line| line.contains(" missing: ")).count();
    assert!(missing > 0, "{lines}");
    // A pod misses nothing but ids, which are no layer.
    for line in lines.lines().filter(|line| line.contains(" missing: ") && !line.contains(" missing: ranges of ")) {
        let name = line.split(" missing: ").nth(1).and_then(|rest| rest.split(' ').next()).expect("a name");
        assert_eq!(layer(report, name)["in_force"], false, "{line}");
    }
    assert!(lines.lines().last().is_some_and(|line| line.ends_with(&format!("--min-tier {tier}"))), "{lines}");

    let daemon = container.exec(&[
        "/usr/bin/bash",
        "-c",
        &format!("echo '[runner]\nmin_tier = \"{floor}\"' > /root/c.toml; exec {RUNNER} run --ephemeral --config /root/c.toml"),
    ]);
    assert_eq!(daemon.code(), 77, "{}", daemon.errors());
    assert!(daemon.errors().contains(&format!("min_tier = \"{tier}\"")), "{}", daemon.errors());
}

#[test]
fn privileged_container_reaches_full() {
    let mut container = container!("privileged", ["--privileged"]);
    assert_walls(&mut container, "full");
}

#[test]
fn privileged_container_with_the_host_s_cgroup_tree_reaches_full() {
    // As a DaemonSet has it.
    let shape = ["--privileged", "--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"];
    let container = container!("daemonset", shape);
    assert_tier(&container.doctor(), "full");
    assert_exec_works(&container);
    container.assert_nothing_left();
}

#[test]
fn container_with_65536_ids_and_its_own_group_reaches_pod() {
    let mut container = container!("pod", with_own_ids(&["--privileged"]));
    container.delegate();
    assert_walls(&mut container, "pod");
    let report = container.doctor();
    assert_eq!(report["host"]["ids_per_sandbox"], 4096);
    assert_eq!(report["host"]["slots"], 15);
    assert_refused_below(&container, &report, "full");
}

#[test]
fn pod_needs_neither_cap_net_admin_nor_cap_sys_ptrace() {
    let rights = ["--cap-add=SYS_ADMIN", "--security-opt=seccomp=unconfined", "--security-opt=unmask=ALL"];
    let mut container = container!("pod-few-rights", with_own_ids(&rights));
    container.delegate();
    assert_walls(&mut container, "pod");
}

#[test]
fn pod_without_a_group_of_its_own_names_every_missing_limit() {
    let container = container!("pod-undelegated", with_own_ids(&["--privileged"]));

    let report = container.doctor();

    assert_tier(&report, "rootless");
    for name in ["cgroup_memory", "cgroup_pids", "cgroup_cpu", "cgroup_kill"] {
        let layer = layer(&report, name);
        assert_eq!((layer["in_force"].as_bool(), layer["errno"].as_i64()), (Some(false), Some(13)), "{layer}");
        assert!(layer["remedy"].as_str().is_some_and(|remedy| remedy.contains("cgroup")), "{layer}");
    }
    assert_exec_works(&container);
    assert_refused_below(&container, &report, "pod");
    container.assert_nothing_left();
}

/// What the tier `nested` does not promise: attack, and the layer that the receipt must show missing because of it.
const NOT_PROMISED_WHEN_NESTED: &[(&str, &str)] = &[
    // Mounts of the container are seen as they are.
    ("F16", "mount_namespace"),
    ("P08", "mount_namespace"),
    // The container's runtime hides some of these files, landlock none.
    ("P05", "proc_masked"),
    ("P07", "pid_namespace"),
    ("P10.map", "user_namespace"),
    // Seen, not used: no socket leads there.
    ("W05", "network_namespace"),
];

/// Refusals by other means than on a host: by landlock where nothing exists elsewhere, by the filter where a namespace is
/// empty elsewhere.
fn is_held_when_nested(row: &Row) -> bool {
    let errnos: &[&str] = match row.id.get(..1) {
        Some("W") => &["EAFNOSUPPORT", "EACCES"],
        Some("F") => &["EACCES"],
        _ => &[],
    };
    row.result == Verdict::Held && errnos.contains(&row.errno.as_str())
}

fn assert_nested(container: &mut Container) {
    let report = container.doctor();
    assert_tier(&report, "nested");
    assert_eq!(report["host"]["shape"], "nested");
    for name in ["cgroup_memory", "cgroup_cpu", "disk_limit", "network_namespace", "pid_namespace", "user_namespace"] {
        let layer = layer(&report, name);
        assert_eq!((layer["in_force"].as_bool(), layer["errno"] == 0), (Some(false), false), "{layer}");
        assert!(layer["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{layer}");
    }
    for name in ["separate_principals", "cgroup_pids", "cgroup_kill", "capabilities", "seccomp", "landlock"] {
        assert_eq!(layer(&report, name)["in_force"], true, "{report:#}");
    }

    let mut others = Vec::new();
    for row in container.attacks() {
        let exception = NOT_PROMISED_WHEN_NESTED.iter().find(|(id, _)| row.id.starts_with(id));
        match exception {
            Some((_, missing)) if row.result == Verdict::Breached => {
                assert_eq!(layer(&report, missing)["in_force"], false, "{row} contradicts the receipt");
            }
            _ if is_held_when_nested(&row) => {}
            _ => others.push(row),
        }
    }
    assert_held(&others);
    assert_table(container);
    assert_exec_works(container);
    assert_refused_below(container, &report, "full");
    container.assert_nothing_left();
}

/// Every system call is answered as the table says, beside what the container's own filter says to an ordinary user.
fn assert_table(container: &Container) {
    let last = LAST.to_string();
    let scan = [PROBER, "table", "0", &last];
    let inside = container.sandbox(&[], &scan);
    let mut arguments = vec!["exec", "--user", "65534", &container.name];
    arguments.extend(scan);
    let outside = podman(&arguments).expect("the command ends");
    let options = Options { profile: Profile::Standard, shared_identity: false, no_namespaces: true };

    let [inside, outside] = [inside, outside].map(|finished| {
        let scanned = prober::scan(&finished.stdout).expect("a scan");
        assert!(!scanned.is_empty(), "{}", finished.errors());
        scanned
    });
    assert_answers(&options, &inside, &outside);
}

#[test]
fn container_with_the_default_profile_reaches_nested() {
    let mut container = container!("nested", []);
    assert_nested(&mut container);
}

#[test]
fn container_whose_filter_hides_namespaces_reaches_nested() {
    let profile = concat!("seccomp=", env!("CARGO_MANIFEST_DIR"), "/container/docker-like-seccomp.json");
    let mut container = container!("nested-filter", ["--security-opt", profile]);
    assert_nested(&mut container);
}

#[test]
fn nested_holds_one_sandbox_and_leaves_nothing_when_its_runner_is_killed() {
    let container = container!("nested-single", []);
    let mut first = Command::new("podman")
        .args(ENGINE)
        .args(["exec", &container.name, RUNNER, "exec", "--", "/usr/bin/bash", "-c"])
        // One that nobody waits for, in a session of its own, so that only its user tells whose it is.
        .arg("(trap '' TERM HUP; /usr/bin/sleep 600 & /usr/bin/sleep 600) & echo begun; wait")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("podman starts");
    let mut line = String::new();
    BufReader::new(first.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
    assert_eq!(line, "begun\n");

    let second = container.sandbox(&[], &["/usr/bin/bash", "-c", "echo ran"]);

    assert_eq!((second.code(), second.text().as_str()), (125, ""), "{}", second.errors());
    assert!(second.errors().contains("one sandbox at a time"), "{}", second.errors());
    assert!(second.errors().contains("end it first"), "{}", second.errors());
    let command = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let runner = container.others().into_iter().find(|pid| command(pid).starts_with("/usr/bin/sandbox-runner\0exec"));
    kill(Pid::from_raw(runner.expect("the first runner lives")), Signal::SIGKILL).expect("root kills");
    first.wait().expect("podman ends");
    container.assert_nothing_left();
    assert_exec_works(&container);
}
