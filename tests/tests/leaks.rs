//! Nothing is left behind, whoever ends and however: counted from outside over every cgroup hierarchy, the host's mounts,
//! namespaces by inode, loop devices, processes, and files of the state directory.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use sandbox_runner_tests::daemon::{Daemon, MARKER, Options, Workspace, bash, within};
use sandbox_runner_tests::host::{self, SandboxPids, Snapshot};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::{PROBER, Rootfs};
use sandbox_runner_tests::runner::{Caller, Exec, is_slow, scaled, wait};

const PATIENCE: Duration = Duration::from_secs(30);
const SANDBOXES: usize = 200;
/// Every fifth ends by kill -9.
const KILLED_EVERY: usize = 5;

/// What the host looked like before.
struct Baseline {
    snapshot: Snapshot,
    namespaces: BTreeSet<String>,
    foreign: BTreeSet<String>,
}

impl Baseline {
    /// After one sandbox has come and gone: what is made once and kept (directories, locks) is there already.
    fn after_one(exec: &Exec) -> Self {
        Self::after_one_of_each(std::slice::from_ref(exec))
    }

    fn after_one_of_each(execs: &[Exec]) -> Self {
        // Before anything of ours exists: what our own launchers leave must not count as foreign.
        let foreign = host::launcher_groups();
        for exec in execs {
            let finished = exec.prober(["exit", "0"]);
            assert_eq!(finished.code(), 0, "{}", finished.errors());
        }
        // The command may return a moment before the kernel has dropped the last mount.
        std::thread::sleep(Duration::from_millis(500));
        let states: Vec<&Path> = execs.iter().map(Exec::state_directory).collect();
        let namespaces = host::namespaces(&foreign);
        Self { snapshot: Snapshot::take_beside(&states, foreign.clone()), namespaces, foreign }
    }

    fn assert_restored(&self, states: &[&Path]) {
        host::assert_restored(&self.snapshot, states, PATIENCE);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left: Vec<_> = host::namespaces(&self.foreign).difference(&self.namespaces).cloned().collect();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "namespaces are left: {left:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A command with a sleeping workload. Ended with the test, however that ends.
struct Sleeping(Child);

impl Sleeping {
    fn start(exec: &Exec, token: &str) -> Self {
        let mut command = exec.command([PROBER, "sleep", "600", token]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("the command starts"))
    }

    fn id(&self) -> u32 {
        self.0.id()
    }

    fn wait(&mut self) -> Option<ExitStatus> {
        wait(&mut self.0, PATIENCE)
    }
}

impl Drop for Sleeping {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The launcher that this command has started.
fn launcher_of(command: u32) -> Option<u32> {
    host::children_of(command).into_iter().find(|pid| host::is_outside(*pid))
}

/// Waits until the output of a call that takes its time is kept in files.
fn wait_for_spool(state: &Path) {
    let deadline = Instant::now() + PATIENCE;
    let entries = |directory: &Path| std::fs::read_dir(directory).into_iter().flatten().flatten();
    while !entries(&state.join("sandboxes")).any(|one| entries(&one.path().join("output")).next().is_some()) {
        assert!(Instant::now() < deadline, "no output of the command is kept below {}", state.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Has each caller use a sandbox, and expects the host as it was.
fn assert_clean_after(used: impl Fn(Caller, &Exec)) {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::exclusive();
        let rootfs = Rootfs::owned_by(caller.uid());
        let exec = Exec::in_rootfs(caller, rootfs.path());
        let baseline = Baseline::after_one(&exec);
        used(caller, &exec);
        baseline.assert_restored(&[exec.state_directory()]);
    }
}

/// Starts a sandbox, kills what `choose` names, and expects the host as it was and the command to have ended.
fn assert_clean_after_killing(what: &str, choose: impl Fn(&Sleeping, &SandboxPids) -> Option<u32>) {
    assert_clean_after(|caller, exec| {
        let token = format!("sbr-attack-{what}-{}", std::process::id());
        let mut child = Sleeping::start(exec, &token);
        let pids = host::wait_for_sandbox(&token, PATIENCE);
        wait_for_spool(exec.state_directory());
        let victim = choose(&child, &pids).unwrap_or_else(|| panic!("no {what} to kill beside {pids:?}"));

        host::kill_now(victim);

        let status =
            child.wait().unwrap_or_else(|| panic!("{caller:?}: the command hangs after its {what} was killed"));
        assert!(!status.success(), "{caller:?}: success although the {what} was killed");
    });
}

#[test]
fn nothing_is_left_when_the_runner_is_killed() {
    needs_root!();
    assert_clean_after_killing("runner", |command, _| Some(command.id()));
}

#[test]
fn nothing_is_left_when_the_launcher_is_killed() {
    needs_root!();
    assert_clean_after_killing("launcher", |command, _| launcher_of(command.id()));
}

#[test]
fn nothing_is_left_when_process_1_is_killed() {
    needs_root!();
    assert_clean_after_killing("process 1", |_, pids| Some(pids.process_1));
}

#[test]
fn nothing_is_left_when_the_spawner_is_killed() {
    needs_root!();
    assert_clean_after_killing("spawner", |_, pids| pids.spawner);
}

#[test]
fn nothing_is_left_when_a_command_that_took_its_time_ends() {
    needs_root!();
    assert_clean_after(|caller, exec| {
        let mut command = exec.command([PROBER, "sleep", "2"]);
        let mut child = command.stdout(Stdio::null()).spawn().expect("the command starts");
        wait_for_spool(exec.state_directory());

        assert!(child.wait().expect("own child").success(), "{caller:?}");
    });
}

#[test]
fn nothing_is_left_when_the_workload_is_killed() {
    needs_root!();
    assert_clean_after_killing("workload", |_, pids| Some(pids.workload));
}

/// A group of the memory controller, or of the unified tree, in which the command and everything it starts run out of memory
/// as on a host that has too little.
struct ShortOfMemory {
    directory: std::path::PathBuf,
    /// Where a process goes. In the unified tree a leaf by this name, so that the groups of the sandbox are made beside it,
    /// below the limit, and not at the root of the tree.
    members: std::path::PathBuf,
}

impl ShortOfMemory {
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("sbr-short-{}", std::process::id());
        let make = |root: &str, leaf: &str, file: &str| {
            let directory = Path::new(root).join(&name);
            std::fs::create_dir(&directory).ok()?;
            let group = Self { members: directory.join(leaf), directory };
            if !leaf.is_empty() {
                std::fs::create_dir(&group.members).ok()?;
            }
            std::fs::write(group.directory.join(file), bytes.to_string()).ok()?;
            Some(group)
        };
        make("/sys/fs/cgroup/memory", "", "memory.limit_in_bytes")
            .or_else(|| make("/sys/fs/cgroup", "launcher", "memory.max"))
    }

    /// The command, in this group from its beginning.
    fn holding(&self, inner: &std::process::Command) -> std::process::Command {
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg("echo $$ > \"$1\" && shift && exec \"$@\"").arg("sh");
        command.arg(self.members.join("cgroup.procs")).arg(inner.get_program()).args(inner.get_args());
        command
    }

    fn limit(&self, bytes: u64) {
        for file in ["memory.limit_in_bytes", "memory.max"] {
            let path = self.directory.join(file);
            if path.exists() {
                std::fs::write(path, bytes.to_string()).expect("the limit of an own group");
            }
        }
    }
}

impl Drop for ShortOfMemory {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let gone = || {
            // The leaf may have gone the time before.
            let _ = (self.members != self.directory).then(|| std::fs::remove_dir(&self.members));
            std::fs::remove_dir(&self.directory).is_ok()
        };
        while !gone() {
            // A group of a sandbox that stays in it keeps it from going.
            if Instant::now() > deadline {
                assert!(std::thread::panicking(), "something is left in {}", self.directory.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(25));
        }
    }
}

/// The host itself is out of memory: the kernel takes processes of ours in the order of their scores, until there is enough.
#[test]
fn nothing_is_left_when_the_host_runs_out_of_memory() {
    needs_root!();
    let _host = host::exclusive();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());
    let baseline = Baseline::after_one(&exec);
    let Some(group) = ShortOfMemory::new(512 << 20) else {
        sandbox_runner_tests::skip!("no group with a memory limit can be made here")
    };
    // More than the host has, and well below the sandbox's own limit.
    let mut command = group.holding(&exec.command([PROBER, "memory", "1500"]));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = Sleeping(command.spawn().expect("sh starts"));

    let status = child.wait().expect("the command ends");

    assert!(!status.success(), "nobody was killed");
    // Nothing of the removal may depend on memory that is not there.
    group.limit(1 << 30);
    drop(group);
    baseline.assert_restored(&[exec.state_directory()]);
}

#[test]
fn memory_that_is_short_on_the_host_is_not_ascribed_to_the_limit_of_the_sandbox() {
    needs_root!();
    let _host = host::exclusive();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path()).flag("--json").option("--memory", "2G");
    let Some(group) = ShortOfMemory::new(512 << 20) else {
        sandbox_runner_tests::skip!("no group with a memory limit can be made here")
    };
    let mut command = group.holding(&exec.command([PROBER, "memory", "1500"]));
    command.stdin(Stdio::null()).stderr(Stdio::piped()).stdout(Stdio::piped());

    let finished = sandbox_runner_tests::runner::finish(command, PATIENCE).expect("the command ends");

    group.limit(1 << 30);
    let report: serde_json::Value = serde_json::from_slice(&finished.stdout)
        .unwrap_or_else(|error| panic!("no report ({error}): {} {}", finished.text(), finished.errors()));
    assert_eq!(report["outcome"]["kind"], "out_of_memory", "{report}");
    assert_eq!(report["outcome"]["limit_bytes"], 0, "{report}");
    assert!(
        report["notes"].to_string().contains("the host or a group around the sandbox ran out of memory"),
        "{report}"
    );
}

#[test]
fn nothing_is_left_after_an_interrupt() {
    needs_root!();
    let _host = host::exclusive();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());
    let baseline = Baseline::after_one(&exec);
    let token = format!("sbr-attack-interrupt-{}", std::process::id());
    let mut child = Sleeping::start(&exec, &token);
    let _ = host::wait_for_sandbox(&token, PATIENCE);

    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("own child");

    let status = child.wait().expect("the command ends");
    assert_eq!(status.code(), Some(130));
    baseline.assert_restored(&[exec.state_directory()]);
}

/// A small generator is enough to choose moments; its seed is printed, so a failure can be looked at again.
struct Moments(u64);

impl Moments {
    fn next(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Ends one sandbox at a random moment by killing one of the processes that make it.
fn end_by_force(exec: &Exec, token: &str, delay: Duration, choice: u64) {
    let mut child = Sleeping::start(exec, token);
    std::thread::sleep(delay);
    let inside = |number| host::family_of(child.id()).into_iter().find(|pid| host::inner_pid(*pid) == Some(number));
    let victim = match choice {
        0 => None,
        1 => launcher_of(child.id()),
        2 => inside(1),
        _ => inside(2),
    };
    // What does not exist yet at this moment cannot be killed; then it is the command's turn.
    host::kill_now(victim.unwrap_or(child.id()));
    // A killed process that was not essential (a spare, a half-made sandbox) does not end the command.
    std::thread::sleep(Duration::from_millis(300));
    host::kill_now(child.id());
    child.wait().expect("a killed command ends");
}

#[test]
fn two_hundred_sandboxes_of_which_a_fifth_is_killed_leave_nothing() {
    needs_root!();
    let _host = host::exclusive();
    let rootfs = Rootfs::with_prober();
    let execs: Vec<Exec> = (0..4).map(|_| Exec::in_rootfs(Caller::Root, rootfs.path())).collect();
    let baseline = Baseline::after_one_of_each(&execs);
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |now| now.as_secs());
    println!("seed {seed}");
    let plan: Vec<_> = {
        let mut moments = Moments(seed);
        (0..SANDBOXES).map(|number| (number, Duration::from_millis(moments.next(250)), moments.next(4))).collect()
    };
    let queue = Mutex::new(plan.into_iter());
    let next = || queue.lock().expect("no panic holds it").next();
    let failures = Mutex::new(Vec::new());

    std::thread::scope(|scope| {
        for exec in &execs {
            scope.spawn(|| {
                while let Some((number, delay, choice)) = next() {
                    if number % KILLED_EVERY == 0 {
                        end_by_force(exec, &format!("sbr-attack-{seed}-{number}"), delay, choice);
                        continue;
                    }
                    let finished = exec.prober(["exit", "0"]);
                    if finished.code() != 0 {
                        failures.lock().expect("no panic holds it").push(format!("{number}: {}", finished.errors()));
                    }
                }
            });
        }
    });

    let failures = failures.into_inner().expect("no panic holds it");
    assert!(failures.is_empty(), "sandboxes that were not attacked failed: {failures:#?}");
    let states: Vec<&Path> = execs.iter().map(Exec::state_directory).collect();
    baseline.assert_restored(&states);
}

/// A session with a call; every fifth ends with its process 1, which is killed while a call runs.
async fn visit(daemon: &Daemon, number: usize) {
    let name = format!("visit-{number}");
    let session = daemon.session(&name).await;
    let mark = format!("echo {name} > /workspace/{MARKER}; head -c 100000 /dev/zero");
    let marked = within("mark", session.bash(&format!("{name}-mark"), &mark)).await.expect("an end");
    assert_eq!(marked.streams[&1].bytes.len(), 100_000, "{name}");
    if !number.is_multiple_of(KILLED_EVERY) {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
        return;
    }
    session.send(&format!("{name}-runs"), bash("sleep 600"));
    within("start", session.started(&format!("{name}-runs"))).await.expect("started");
    host::kill_now(Workspace::find(&name).expect("its sandbox lives").process_1);
    within("over", session.over()).await.expect("the session ends");
}

/// The runner and the launcher that serve on, unlike the commands above, which end with their sandbox.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_of_which_a_fifth_is_killed_leave_no_descriptor_in_runner_and_launcher() {
    needs_root!();
    let _host = host::exclusive();
    let mut daemon = Daemon::start(Options::default()).await;
    let served = [daemon.runner_pid().expect("a runner"), daemon.launcher_pid().expect("a launcher")];
    for number in 0..10 {
        visit(&daemon, number).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = served.map(host::descriptors);
    let count = if is_slow() { 20 } else { 100 };

    for number in 10..10 + count {
        visit(&daemon, number).await;
    }

    let deadline = Instant::now() + scaled(PATIENCE);
    let mut after = served.map(host::descriptors);
    while after.iter().zip(&before).any(|(after, before)| after > before) {
        assert!(Instant::now() < deadline, "descriptors of runner and launcher: {before:?} before, {after:?} after");
        tokio::time::sleep(Duration::from_millis(100)).await;
        after = served.map(host::descriptors);
    }
    assert_eq!(served, [daemon.runner_pid(), daemon.launcher_pid()].map(|pid| pid.expect("it still runs")));
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}
