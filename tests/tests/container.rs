//! The three shapes in which the runner is deployed in containers, by podman, without a registry: what `doctor` measures
//! must be the tier that the shape can reach, and the attacks must agree with it.
#![forbid(unsafe_code)]

use std::process::{Command, Stdio};
use std::time::Duration;

use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::prober;
use sandbox_runner_tests::rootfs::{Rootfs, shared_directory};
use sandbox_runner_tests::runner::{Finished, binary, finish};

const PATIENCE: Duration = Duration::from_secs(120);

/// crun refuses hybrid cgroups, and the default ulimits need CAP_SYS_RESOURCE; neither matters to what is measured.
const ENGINE: &[&str] = &["--runtime=runc", "--cgroup-manager=cgroupfs"];
const RUN: &[&str] = &["--rm", "--net=host", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=4096:4096"];

fn podman(arguments: &[&str]) -> anyhow::Result<Finished> {
    let mut command = Command::new("podman");
    command.args(ENGINE).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command, PATIENCE)
}

/// An image with nothing but the prober: the command under test is one static file and needs no more. Removed when
/// dropped.
struct Image {
    name: String,
}

impl Image {
    fn import(purpose: &str) -> Result<Self, String> {
        let rootfs = Rootfs::with_prober();
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

    /// Runs a program in a container of this shape.
    fn run(&self, shape: &[&str], arguments: &[&str]) -> anyhow::Result<Finished> {
        let program = format!("{}:/usr/bin/sandbox-runner:ro", binary().display());
        let mut all = vec!["run"];
        all.extend(RUN);
        all.extend(shape);
        all.extend(["--volume", &program, "--tmpfs", "/var/lib/sandbox-runner:mode=700", &self.name]);
        all.extend(arguments);
        podman(&all)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // What cannot be removed is at worst a small image under a name of ours.
        let _ = podman(&["rmi", "--force", &self.name]);
    }
}

/// The tier that `doctor` names, and whether the catalogue agrees: the same attacks through `exec` in the same container.
fn assert_shape(purpose: &str, shape: &[&str], accepted: &[&str]) {
    needs_root!();
    let image = match Image::import(purpose) {
        Ok(image) => image,
        Err(reason) => sandbox_runner_tests::skip!("{reason}"),
    };
    match image.run(shape, &["/usr/bin/prober", "exit", "7"]) {
        Ok(finished) if finished.code() == 7 => {}
        Ok(finished) => sandbox_runner_tests::skip!("no container of this shape here: {}", finished.errors().trim()),
        Err(error) => sandbox_runner_tests::skip!("no container of this shape here: {error:#}"),
    }

    let doctor = image.run(shape, &["/usr/bin/sandbox-runner", "doctor", "--json"]).expect("doctor ends");
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout)
        .unwrap_or_else(|error| panic!("doctor prints no JSON ({error}): {} {}", doctor.text(), doctor.errors()));
    let tier = tier_in(&report).unwrap_or_else(|| panic!("no tier in {report}"));
    assert!(accepted.contains(&tier), "measured {tier}, expected one of {accepted:?}: {report}\n{}", doctor.errors());

    let exec = ["/usr/bin/sandbox-runner", "exec", "--", "/usr/bin/prober", "only", "S01"];
    let finished = image.run(shape, &exec).expect("exec ends");
    let rows = finished.rows();
    let breached: Vec<String> =
        rows.iter().filter(|row| row.result == prober::Verdict::Breached).map(ToString::to_string).collect();
    assert!(breached.is_empty(), "the receipt says {tier}, the attacks disagree: {breached:#?}");
}

fn tier_in(report: &serde_json::Value) -> Option<&str> {
    report.get("tier").or_else(|| report.get("receipt")?.get("tier"))?.as_str()
}

#[test]
fn privileged_container_reaches_full() {
    // As a DaemonSet has it: the host's cgroup tree, because limits are made there.
    let shape = ["--privileged", "--cgroupns=host", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"];
    assert_shape("privileged", &shape, &["full"]);
}
