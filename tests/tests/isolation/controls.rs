//! Negative controls. An attack that fails everywhere proves nothing about a sandbox, so each must succeed where the
//! layer that stops it is gone: on the bare host, and in the shipped program with that layer switched off.

use std::process::{Command, Stdio};
use std::time::Duration;

use sandbox_runner_tests::canary::Canaries;
use sandbox_runner_tests::prober::{self, Row, Verdict};
use sandbox_runner_tests::rootfs::{Rootfs, SET_UID_PROBER, shared_directory};
use sandbox_runner_tests::runner::{Caller, Exec, finish};
use sandbox_runner_tests::{host, needs_root};

/// Attacks that must succeed for root on a bare host. The rest needs something planted by a single test, looks for what a
/// bare host may well not have, or is refused to everybody.
const BREACHED_ON_A_BARE_HOST: &[&str] = &[
    "F01",
    "F02",
    "F03",
    "F07",
    "F07.tmpfs",
    "F07.proc",
    "F08",
    "F08.remount",
    "F10.open_tree",
    "F10.move_mount",
    "F10.fsopen",
    "F10.fsmount",
    "F10.fspick",
    "F10.mount_setattr",
    "F11",
    "F12",
    "F16",
    "F16.device",
    "F17",
    "F19",
    "F21",
    "F21.open",
    "P01",
    "P04",
    "P04.list",
    "P05",
    "P05.kallsyms",
    "P10.map",
    "N01",
    "N02",
    "N03",
    "N04",
    "N05",
    "N07",
    "N08",
    "N09",
    "N11",
    "C01.CapPrm",
    "C01.CapEff",
    "C01.CapBnd",
    "C02.securebits",
    "C03",
    "C03.seccomp",
    "C05",
    "C07.seize",
    "C07.readv",
    "C07.writev",
    "C07.file",
    "C07.getfd",
    "C07.pidfd_signal",
    "C07.prlimit",
    "C07.oom_score_adj",
    "C07.setpriority",
    "C07.affinity",
    "C07.scheduler",
    "C07.ioprio",
    "C07.kcmp",
    "C07.robust_list",
    "C07.move_pages",
    "I01",
    "I01.tgkill",
    "I01.queue",
    "I02",
    "S01.setup",
    "S02",
    "S03",
    "S04",
    "S05.add_key",
    "S05.keyctl",
    "S07",
    "S08.swapon",
    "S09.mount",
    "S11.acct",
    "S12.init",
    "S14.getfd",
    "S15.setns",
    "S16.tiocsti",
    "S16.high",
    "S17.personality",
    "S18",
    "S22.syslog",
    "S22.sethostname",
    "S23",
    "D01",
    "D03",
    "D04",
    "W02",
    "W03",
    "W04",
    "W05",
    "W06",
    "W07",
    "W13",
    "W15",
];

fn on_bare_host(arguments: &[String]) -> Vec<Row> {
    let directory = shared_directory("bare");
    let mut command = Command::new(prober::path());
    command.args(arguments).current_dir(directory.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let finished = finish(command, Duration::from_secs(60)).expect("the prober ends");
    finished.rows()
}

#[test]
fn attacks_succeed_on_a_bare_host() {
    needs_root!();
    let _host = host::shared();
    let canaries = Canaries::plant();
    let mut arguments = vec!["--bare".to_owned()];
    arguments.extend(canaries.options());
    arguments.push("all".to_owned());

    let rows = on_bare_host(&arguments);

    let failed: Vec<&str> = BREACHED_ON_A_BARE_HOST
        .iter()
        .copied()
        .filter(|id| {
            let of_id = || rows.iter().filter(|row| row.id == *id);
            let gone_from_kernel = of_id().all(|row| row.result == Verdict::Absent) && of_id().count() > 0;
            !gone_from_kernel && !of_id().any(|row| row.result == Verdict::Breached)
        })
        .collect();
    assert!(failed.is_empty(), "without any sandbox these attacks must succeed, else they prove nothing: {failed:?}");
    let errors: Vec<String> = rows.iter().filter(|row| row.result == Verdict::Error).map(ToString::to_string).collect();
    assert!(errors.is_empty(), "attacks that could not be made: {errors:#?}");
}

#[test]
fn a_foreign_process_is_seen_on_a_bare_host() {
    needs_root!();
    let _host = host::shared();
    let canaries = Canaries::plant();
    let arguments: Vec<String> = canaries.options().into_iter().chain(["only".to_owned(), "P07".to_owned()]).collect();

    let rows = on_bare_host(&arguments);

    assert!(rows.iter().any(|row| row.id == "P07" && row.result == Verdict::Breached), "{rows:?}");
}

#[test]
fn an_inherited_descriptor_and_variable_are_seen_on_a_bare_host() {
    let _host = host::shared();
    let canaries = Canaries::plant();
    let mut command = Command::new("sh");
    command.args(["-c", "exec 7</ && exec \"$0\" \"$@\""]).arg(prober::path()).args(canaries.options()).arg("keeper");
    command.env(sandbox_runner_tests::canary::VARIABLE, "x").env("RUNNER_TOKEN", "x");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());

    // Not as root: the group also signals process 1, which must not be the host's.
    if nix::unistd::geteuid().is_root() {
        std::os::unix::process::CommandExt::uid(&mut command, sandbox_runner_tests::runner::NOBODY);
    }
    let rows = finish(command, Duration::from_secs(60)).expect("the prober ends").rows();

    for id in ["I04", "I08", "I08.runner"] {
        assert!(rows.iter().any(|row| row.id == id && row.result == Verdict::Breached), "{id} saw nothing");
    }
}

#[test]
fn a_leaked_directory_and_a_path_of_the_host_are_seen_on_a_bare_host() {
    let _host = host::shared();
    for (id, options) in [("F05", ""), ("P08", "--string /proc")] {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec 7</etc && exec \"$0\" {options} only {id}")]).arg(prober::path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());

        let rows = finish(command, Duration::from_secs(60)).expect("the prober ends").rows();

        assert!(rows.iter().any(|row| row.id == id && row.result == Verdict::Breached), "{rows:?}");
    }
}

/// For an ordinary user the file of root, for root the one that is made and then run as another user.
#[test]
fn set_uid_files_gain_on_a_bare_host() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_set_uid_prober();
    let place = rootfs.path().join(SET_UID_PROBER.trim_start_matches('/'));
    for (caller, gained) in [
        (Caller::Nobody, vec!["set-uid file of root"]),
        (Caller::Root, vec!["set-uid file of root", "set-uid file made here"]),
    ] {
        let directory = shared_directory("bare");
        std::os::unix::fs::chown(directory.path(), Some(caller.uid()), None).expect("chown of an own directory");
        let mut command = caller.command(prober::path());
        command.arg("--set-uid").arg(&place).args(["only", "C04"]).current_dir(directory.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());

        let rows = finish(command, Duration::from_secs(60)).expect("the prober ends").rows();

        let breached = |row: &&Row| row.id == "C04.gift" && row.result == Verdict::Breached;
        let found: Vec<&str> = rows.iter().filter(breached).map(|row| row.attack.as_str()).collect();
        assert_eq!(found, gained, "{caller:?}: {rows:#?}");
    }
}

#[test]
fn a_rootfs_of_the_tests_is_readable_and_holds_a_working_prober() {
    let rootfs = Rootfs::with_prober();
    let output = Command::new(rootfs.path().join("usr/bin/prober")).args(["exit", "7"]).status().expect("executable");
    assert_eq!(output.code(), Some(7));
}

/// One layer, and an attack that only this layer stops: made with it and without it, in the shipped program.
struct Layer {
    /// As the danger switch names it.
    switch: &'static str,
    /// As the receipt names it.
    receipt: &'static str,
    /// Options of the sandbox.
    options: &'static [(&'static str, &'static str)],
    /// Arguments of the prober.
    attack: &'static [&'static str],
    /// Rows that must be held with the layer and breached without it.
    rows: &'static [&'static str],
}

const LAYERS: &[Layer] = &[
    Layer {
        switch: "seccomp",
        receipt: "seccomp",
        options: &[],
        attack: &["only", "S01"],
        rows: &["S01.setup", "S04", "S05.keyctl", "S14.getfd", "S16.tiocsti", "S16.high", "S18"],
    },
    Layer { switch: "seccomp", receipt: "seccomp", options: &[], attack: &["only", "W13"], rows: &["W13"] },
    Layer { switch: "landlock", receipt: "landlock", options: &[], attack: &["only", "L01"], rows: &["L01"] },
    Layer {
        switch: "landlock",
        receipt: "landlock",
        options: &[("--profile", "strict")],
        attack: &["only", "L02"],
        rows: &["L02"],
    },
    Layer {
        switch: "capabilities",
        receipt: "capabilities",
        options: &[],
        attack: &["only", "C01"],
        rows: &["C01.CapEff", "C01.CapPrm", "C01.CapBnd"],
    },
    Layer { switch: "proc_masked", receipt: "proc_masked", options: &[], attack: &["only", "P05"], rows: &["P05"] },
    Layer {
        switch: "cgroup_limits",
        receipt: "cgroup_pids",
        options: &[("--pids", "64")],
        attack: &["forkbomb", "300"],
        rows: &["R01"],
    },
    Layer {
        switch: "cgroup_limits",
        receipt: "cgroup_memory",
        options: &[("--memory", "64M")],
        attack: &["memory", "160"],
        rows: &["R02"],
    },
    Layer {
        switch: "cgroup_limits",
        receipt: "cgroup_cpu",
        options: &[("--cpus", "0.1")],
        attack: &["cpu", "4", "2000", "16"],
        rows: &["R07"],
    },
];

#[derive(serde::Deserialize)]
struct Report {
    stdout: String,
    outcome: Outcome,
    receipt: Receipt,
}

#[derive(serde::Deserialize)]
struct Outcome {
    kind: String,
}

#[derive(serde::Deserialize)]
struct Receipt {
    switched_off: Vec<String>,
    layers: Vec<ReceiptLayer>,
}

#[derive(serde::Deserialize)]
struct ReceiptLayer {
    name: String,
    enforced: String,
}

impl Layer {
    /// Makes the attack, with the layer or without it.
    fn run(&self, without: bool) -> Report {
        let rootfs = Rootfs::with_prober();
        let mut exec = Exec::in_rootfs(Caller::Root, rootfs.path()).flag("--json");
        for (name, value) in self.options {
            exec = exec.option(name, *value);
        }
        if without {
            exec = exec.option("--without", self.switch);
        }
        let finished = exec.prober(self.attack.iter().copied());
        serde_json::from_slice(&finished.stdout)
            .unwrap_or_else(|error| panic!("no report ({error}): {} {}", finished.text(), finished.errors()))
    }

    fn breached(&self, report: &Report) -> Vec<&'static str> {
        // Who was killed for memory reports nothing more.
        if report.outcome.kind == "out_of_memory" {
            return Vec::new();
        }
        let rows = prober::rows(report.stdout.as_bytes()).expect("result lines");
        let breached = |id: &str| rows.iter().any(|row| row.id == id && row.result == Verdict::Breached);
        self.rows.iter().copied().filter(|id| breached(id)).collect()
    }
}

fn assert_layer_matters(switch: &str) {
    let _host = host::shared();
    for layer in LAYERS.iter().filter(|layer| layer.switch == switch) {
        let with = layer.run(false);
        let without = layer.run(true);

        let enforced = |report: &Report| {
            let found = report.receipt.layers.iter().find(|entry| entry.name == layer.receipt);
            found.is_some_and(|entry| !entry.enforced.is_empty())
        };
        assert!(enforced(&with), "{}: not enforced on this host", layer.receipt);
        assert!(with.receipt.switched_off.is_empty(), "{:?}", with.receipt.switched_off);
        assert_eq!(layer.breached(&with), Vec::<&str>::new(), "with {switch}");
        assert_eq!(layer.breached(&without), layer.rows, "without {switch} these must succeed");
        assert!(!enforced(&without), "the receipt hides that {} is missing", layer.receipt);
        assert_eq!(without.receipt.switched_off, [switch], "the receipt hides the switch");
    }
}

#[test]
fn attacks_succeed_without_seccomp_and_the_receipt_says_so() {
    needs_root!();
    assert_layer_matters("seccomp");
}

#[test]
fn attacks_succeed_without_landlock_and_the_receipt_says_so() {
    needs_root!();
    assert_layer_matters("landlock");
}

#[test]
fn attacks_succeed_without_dropped_capabilities_and_the_receipt_says_so() {
    needs_root!();
    assert_layer_matters("capabilities");
}

#[test]
fn attacks_succeed_without_masks_and_the_receipt_says_so() {
    needs_root!();
    assert_layer_matters("proc_masked");
}

#[test]
fn attacks_succeed_without_limits_and_the_receipt_says_so() {
    needs_root!();
    assert_layer_matters("cgroup_limits");
}

#[test]
fn an_unknown_layer_cannot_be_switched_off() {
    needs_root!();
    let _host = host::shared();
    let finished = Exec::new(Caller::Root).option("--without", "everything").run(["true"]);

    assert_eq!(finished.code(), 125, "{}", finished.errors());
    assert!(finished.errors().contains("everything"), "the message does not name the value: {}", finished.errors());
}
