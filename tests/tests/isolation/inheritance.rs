//! Whatever the command was started with stays outside: signal dispositions, descriptors, variables, umask.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use sandbox_runner_tests::canary::VARIABLE;
use sandbox_runner_tests::prober::Verdict;
use sandbox_runner_tests::rootfs::{PROBER, Rootfs};
use sandbox_runner_tests::runner::{Caller, Exec, Finished, binary, finish};
use sandbox_runner_tests::{host, needs_root};

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `exec -- prober ARGUMENTS` from a shell that first does `preparation`.
fn after(preparation: &str, arguments: &[&str]) -> Finished {
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());
    let inner = exec.command([PROBER].iter().chain(arguments));
    let mut command = Command::new("bash");
    command.arg("-c").arg(format!("{preparation}\nexec \"$0\" \"$@\"")).arg(inner.get_program()).args(inner.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command, PATIENCE).expect("the command ends")
}

fn status_line(text: &str, key: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}

#[test]
fn signals_ignored_or_blocked_by_the_caller_are_default_inside() {
    needs_root!();
    let finished = after("trap '' INT QUIT TERM PIPE USR1 HUP TSTP CHLD", &["read", "/proc/self/status"]);

    let ignored = u64::from_str_radix(&status_line(&finished.text(), "SigIgn:"), 16).expect("a mask");
    // The prober itself ignores SIGPIPE. Signals 32 and 33 belong to glibc, which ignores them in whatever it spawns from
    // a threaded program and takes them back where it needs them.
    let of_prober_and_library = 1 << 12 | 1 << 31 | 1 << 32;
    assert_eq!(ignored & !of_prober_and_library, 0, "{ignored:x} {}", finished.errors());
    assert_eq!(status_line(&finished.text(), "SigBlk:"), "0000000000000000");
}

#[test]
fn umask_of_the_caller_does_not_reach_the_workload() {
    needs_root!();
    let finished = after("umask 0777", &["read", "/proc/self/status"]);

    assert_eq!(status_line(&finished.text(), "Umask:"), "0022", "{}", finished.errors());
}

#[test]
fn descriptors_3_to_20_of_the_caller_are_not_visible_inside() {
    needs_root!();
    let mut preparation = String::from("exec 3</ 4</etc/passwd 5</dev/zero");
    for fd in 6..=20 {
        preparation.push_str(&format!(" {fd}</etc"));
    }
    for id in ["I04", "F05"] {
        let rows = after(&preparation, &["only", id]).rows();
        assert!(rows.iter().all(|row| row.result == Verdict::Held), "{rows:?}");
    }
}

#[test]
fn process_1_holds_no_descriptor_of_the_caller() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let marker = rootfs.path().join("etc/passwd");
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());
    let token = format!("sbr-attack-held-{}", std::process::id());
    let inner = exec.command([PROBER, "sleep", "600", &token]);
    let mut command = Command::new("bash");
    command.arg("-c").arg("exec 9<\"$1\"; shift; exec \"$@\"").arg("bash").arg(&marker);
    command.arg(inner.get_program()).args(inner.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().expect("bash starts");
    let inside = host::wait_for_sandbox(&token, PATIENCE).workload;

    // Everything that is in the workload's pid namespace, seen from outside.
    let namespace = std::fs::read_link(format!("/proc/{inside}/ns/pid")).expect("a pid namespace");
    let mut holders = Vec::new();
    for pid in
        host::pids().filter(|pid| std::fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|link| link == namespace))
    {
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            if std::fs::read_link(entry.path()).is_ok_and(|target| target == marker) {
                holders.push(pid);
            }
        }
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), nix::sys::signal::Signal::SIGTERM)
        .expect("own child");
    let _ = sandbox_runner_tests::runner::wait(&mut child, PATIENCE);

    assert!(holders.is_empty(), "processes {holders:?} of the sandbox hold a file of the caller");
}

#[test]
fn command_works_when_started_without_standard_descriptors() {
    needs_root!();
    let finished = after("exec 0<&-", &["exit", "7"]);

    assert_eq!(finished.code(), 7, "{}", finished.errors());
}

#[test]
fn environment_is_built_from_nothing() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path())
        .variable(VARIABLE, "secret")
        .variable("LD_PRELOAD", "")
        .variable("AWS_SECRET_ACCESS_KEY", "secret")
        .option("--env", "GIVEN=value with spaces");

    let finished = exec.prober(["env"]);

    let names: Vec<String> =
        finished.text().lines().filter_map(|line| Some(line.split_once('=')?.0.to_owned())).collect();
    let usual =
        ["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TERM", "TMPDIR", "PWD", "HOSTNAME", "GIVEN"];
    let unexpected: Vec<_> =
        names.iter().filter(|name| !usual.contains(&name.as_str()) && !name.starts_with("SANDBOX")).collect();
    assert!(unexpected.is_empty(), "{unexpected:?} came from somewhere");
    assert!(finished.text().contains("GIVEN=value with spaces"), "{} {}", finished.text(), finished.errors());
}

#[test]
fn standard_input_is_empty_unless_it_is_asked_for() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());

    let finished = exec.prober(["read", "/dev/stdin"]);

    assert_eq!((finished.code(), finished.text()), (0, String::new()), "{}", finished.errors());
}

#[test]
fn arguments_arrive_byte_for_byte() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let rootfs = Rootfs::owned_by(caller.uid());
        let exec = Exec::in_rootfs(caller, rootfs.path());
        let long = "x".repeat(30_000);
        let odd = [
            OsString::from("args"),
            OsString::from_vec(vec![0xff, 0xfe, 0x80]),
            OsString::from("\u{1b}]0;title\u{7}\n\t"),
            OsString::new(),
            OsString::from(long),
        ];

        let finished = exec.prober(odd);

        assert_eq!(finished.text(), "3\n12\n0\n30000\n", "{caller:?}: {}", finished.errors());
    }
}

#[test]
fn exit_codes_are_those_of_the_command() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let rootfs = Rootfs::owned_by(caller.uid());
        let exec = Exec::in_rootfs(caller, rootfs.path());

        assert_eq!(exec.prober(["exit", "0"]).code(), 0, "{caller:?}");
        assert_eq!(exec.prober(["exit", "123"]).code(), 123, "{caller:?}");
        assert_eq!(exec.run(["/no/such/program"]).code(), 127, "{caller:?}");
        assert_eq!(exec.run(["/etc/passwd"]).code(), 126, "{caller:?}");
        assert_eq!(exec.prober(["core"]).code(), 134, "{caller:?}");
        let slow = Exec::in_rootfs(caller, rootfs.path()).option("--timeout", "300ms").prober(["sleep", "60"]);
        assert_eq!(slow.code(), 124, "{caller:?}: {}", slow.errors());
        let refused = Exec::in_rootfs(caller, rootfs.path()).option("--without", "everything").prober(["exit", "0"]);
        assert_eq!(refused.code(), 125, "{caller:?}: {}", refused.errors());
    }
}

/// What the options do is the same for everybody; what differs is who enforces it.
#[test]
fn options_work_for_root_and_for_an_ordinary_user() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let exec = |name: &str, value: &str| Exec::new(caller).option(name, value);

        let variable = exec("--env", "GIVEN=a b").run(["sh", "-c", "echo \"$GIVEN\""]);
        assert_eq!(variable.text(), "a b\n", "{caller:?}: {}", variable.errors());
        let directory = exec("--workdir", "/usr/bin").run(["pwd"]);
        assert_eq!(directory.text(), "/usr/bin\n", "{caller:?}: {}", directory.errors());
        let absent = exec("--workdir", "/no/such/place").run(["pwd"]);
        assert_eq!(absent.code(), 125, "{caller:?}: {}", absent.errors());
        assert!(absent.errors().contains("cannot enter the working directory"), "{caller:?}: {}", absent.errors());
        let network = exec("--network", "none").run(["sh", "-c", "cat /proc/net/dev | wc -l"]);
        assert_eq!(network.text().trim(), "3", "{caller:?}: loopback and two lines of titles: {}", network.errors());
        // Kept, so that its state directory is there as long as the command runs.
        let with_input = Exec::new(caller).flag("--stdin");
        let mut input = with_input.command(["sh", "-c", "read line; echo \"got $line\""]);
        input.stdin(std::fs::File::open("/proc/sys/kernel/ostype").expect("a file of one line"));
        let input = finish(input, PATIENCE).expect("the command ends");
        assert_eq!(input.text(), "got Linux\n", "{caller:?}: {}", input.errors());

        let report = Exec::new(caller).flag("--json").run(["sh", "-c", "echo out; echo err >&2; exit 3"]);
        let value: serde_json::Value = serde_json::from_slice(&report.stdout)
            .unwrap_or_else(|error| panic!("{caller:?}: no report ({error}): {} {}", report.text(), report.errors()));
        assert_eq!(report.code(), 3, "{caller:?}");
        for (pointer, expected) in [("/stdout", "out\n"), ("/stderr", "err\n"), ("/outcome/kind", "exited")] {
            assert_eq!(value.pointer(pointer).and_then(|text| text.as_str()), Some(expected), "{caller:?}: {value}");
        }
        assert!(value.pointer("/receipt/layers").is_some_and(|layers| layers.is_array()), "{caller:?}: {value}");
    }
}

/// A limit that this host does not enforce for this user is never left out in silence.
#[test]
fn limit_that_was_asked_for_is_enforced_or_said_to_have_no_effect() {
    const OPTIONS: [(&str, &str, &str); 4] = [
        ("--memory", "64M", "cgroup_memory"),
        ("--cpus", "0.5", "cgroup_cpu"),
        ("--pids", "64", "cgroup_pids"),
        ("--disk", "16M", "disk_limit"),
    ];
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        for (option, value, name) in OPTIONS {
            let report = Exec::new(caller).option(option, value).flag("--json").run(["true"]);
            let json: serde_json::Value = serde_json::from_slice(&report.stdout)
                .unwrap_or_else(|error| panic!("{caller:?} {option}: no report ({error}): {}", report.errors()));
            let layers = json.pointer("/receipt/layers").and_then(|layers| layers.as_array()).expect("layers");
            let layer = layers.iter().find(|layer| layer["name"] == name).expect("the layer");
            let is_enforced = layer["enforced"].as_str().is_some_and(|text| !text.is_empty());
            let is_said = report.errors().contains(&format!("sandbox-runner: {option} has no effect here ("));
            assert_eq!(is_said, !is_enforced, "{caller:?} {option}: {layer}: {}", report.errors());
        }
        let silent = Exec::new(caller).run(["true"]);
        assert!(!silent.errors().contains("no effect"), "nobody asked for a limit: {}", silent.errors());
    }
}

#[test]
fn option_with_a_mistake_ends_exec_with_125_and_names_itself_wherever_other_options_are() {
    let cases = [
        ("--memory", "junk"),
        ("--memory", "0"),
        ("--cpus", "none"),
        ("--cpus", "-1"),
        ("--pids", "0"),
        ("--pids", "1.5"),
        ("--disk", "much"),
        ("--timeout", "0"),
        ("--timeout", "soon"),
        ("--network", "all"),
        ("--profile", "admin"),
        ("--env", "=x"),
    ];
    for (option, value) in cases {
        for before in [&[][..], &["--log-level", "debug"], &["--log-level=debug"]] {
            let mut command = Command::new(binary());
            command.args(before).args(["exec", option, value, "--", "true"]);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let refused = finish(command, PATIENCE).expect("it ends");
            assert_eq!(refused.code(), 125, "{before:?} {option} {value}: {}", refused.errors());
            assert!(refused.errors().contains(option), "{option} {value}: {}", refused.errors());
        }
    }
}

/// Where nothing may be executed from memory, the image is a file that belongs to root; the setting is that of a pid namespace
/// (Documentation/admin-guide/sysctl/vm.rst).
#[test]
fn host_that_executes_nothing_from_memory_gets_a_file_and_doctor_says_which() {
    needs_root!();
    if !std::path::Path::new("/proc/sys/vm/memfd_noexec").exists() {
        sandbox_runner_tests::skip!("this kernel has no vm.memfd_noexec");
    }
    let _host = host::shared();
    let directory = tempfile::tempdir_in("/var/tmp").expect("a directory of our own");
    let script = "echo 2 > /proc/sys/vm/memfd_noexec && \"$0\" exec --state-dir \"$1\" -- echo ran >&2 && \
                  exec \"$0\" doctor --json --state-dir \"$1\"";
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--mount-proc", "sh", "-c", script]).arg(binary()).arg(directory.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());

    let ended = finish(command, PATIENCE).expect("it ends");

    assert!(ended.errors().contains("ran\n"), "{}", ended.errors());
    let report: serde_json::Value = serde_json::from_slice(&ended.stdout).expect("JSON");
    assert_eq!((&report["tier"], &report["host"]["image_source"]), (&"full".into(), &"file".into()), "{report}");
}
