//! The shipped daemon as an operator runs it: a launcher as a service of its own, a runner that gives up root, a
//! configuration file, and the reference orchestrator at the far end of a wire that can be broken.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::launch::v1::{ListSandboxes, Stop, reply, request};
use proto::runner::v1 as pb;
use runner::dev::{LinkSettings, Orchestrator, Session};

use crate::faultproxy::FaultProxy;
use crate::host;
use crate::launcher::{Connection, RUNNER_UID, Setup, group_of_launcher};
use crate::rootfs::Rootfs;
use crate::runner::{binary, scaled, wait};

/// Nothing that these suites wait for takes longer on a machine that is not broken.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What differs between installations.
#[derive(Debug)]
pub struct Options {
    /// Sandboxes that can exist at once; measuring the host needs one of them for a moment.
    pub slots: u32,
    /// How the orchestrator keeps the link.
    pub link: LinkSettings,
    /// Lines of `[limits]` in the configuration.
    pub limits: String,
    /// Lines of `[pressure]`.
    pub pressure: String,
    /// The installed program, of which launcher and runner are started and the launcher replaces itself; the built ones when
    /// nobody says.
    pub program: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        let (limits, pressure) = (small_sandboxes(), unwatched());
        Self { slots: 4, link: LinkSettings::default(), limits, pressure, program: None }
    }
}

/// Sandboxes so small that many fit on any machine.
#[must_use]
pub fn small_sandboxes() -> String {
    "sandbox_memory_bytes = 134217728\nsandbox_pids = 64\nsandbox_disk_bytes = 67108864\nsandbox_cpu_millis = 1000\n\
     host_reserve_memory_bytes = 0\nhost_reserve_disk_bytes = 0\nhost_reserve_pids = 0\n"
        .to_owned()
}

/// What suites run beside each other, and on what disk, is not what they are about.
fn unwatched() -> String {
    "disk_low_bytes = 0\ndisk_critical_bytes = 0\nmemory_stall_percent = 0\nio_stall_percent = 0\n".to_owned()
}

/// An installation that runs. Dropping it ends everything in it.
#[derive(Debug)]
pub struct Daemon {
    /// The far end.
    pub orchestrator: Arc<Orchestrator>,
    /// What is between.
    pub wire: FaultProxy,
    setup: Setup,
    _rootfs: Rootfs,
    program: Option<PathBuf>,
    launcher: Option<Child>,
    runner: Option<Child>,
    /// Crash points of runners that are started from here on; see `runner/src/crash_point.rs`.
    pub crash_points: String,
    /// Processes that were started again after they had ended by themselves or by force.
    pub restarts: u32,
}

impl Daemon {
    /// Installs and starts everything, and returns when the link is up.
    ///
    /// # Panics
    /// When a part does not start; with what it said.
    pub async fn start(options: Options) -> Self {
        let mut daemon = Self::install(options).await;
        daemon.start_launcher().await;
        daemon.start_runner().await;
        daemon
    }

    /// Makes directories, certificates and configuration, and starts nothing but the orchestrator.
    ///
    /// # Panics
    /// When the host does not let us.
    pub async fn install(options: Options) -> Self {
        let orchestrator = Arc::new(Orchestrator::start(options.link).await.expect("the orchestrator starts"));
        Self::install_for(options, orchestrator).await
    }

    async fn install_for(options: Options, orchestrator: Arc<Orchestrator>) -> Self {
        let rootfs = Rootfs::with_prober();
        let mut setup = Setup::new(options.slots, rootfs.path());
        if let Some(program) = &options.program {
            setup.policy = format!("program = \"{}\"\n{}", program.display(), setup.policy);
        }
        let [state, run] = setup.directories();
        // As the units have it: the runner makes its own socket in the run directory, and keeps its identity.
        chown(&run, None, Some(RUNNER_UID)).expect("chown of the run directory");
        fs::set_permissions(&run, Permissions::from_mode(0o1771)).expect("chmod of the run directory");
        let identity = state.join("identity");
        let journal = state.join("journal");
        for directory in [&identity, &journal] {
            fs::create_dir(directory).expect("a directory of our own");
        }
        orchestrator.write_client_files(&identity, "runner-1").expect("certificates");
        for path in
            host::files_below(&identity).iter().map(PathBuf::as_path).chain([identity.as_path(), journal.as_path()])
        {
            chown(path, Some(RUNNER_UID), Some(RUNNER_UID)).expect("chown to the runner");
        }
        let wire = FaultProxy::to(orchestrator.address()).await;
        let daemon = Self {
            orchestrator,
            wire,
            setup,
            _rootfs: rootfs,
            program: options.program,
            launcher: None,
            runner: None,
            crash_points: String::new(),
            restarts: 0,
        };
        fs::write(daemon.config(), daemon.config_text(&options.limits, &options.pressure)).expect("the configuration");
        daemon
    }

    fn config_text(&self, limits: &str, pressure: &str) -> String {
        let [state, run] = self.setup.directories();
        format!(
            r#"[orchestrator]
endpoint = "https://127.0.0.1:{port}"
ca_file = "{identity}/authorities.pem"
certificate_file = "{identity}/certificate.pem"
key_file = "{identity}/key.pem"
server_name = "localhost"
reconnect_first_ms = 1
reconnect_most_ms = 20

[runner]
id = "runner-1"
state_directory = "{state}"
run_directory = "{run}"
launcher_socket = "{socket}"
min_tier = "none"

[pressure]
{pressure}
[limits]
{limits}
[log]
level = "info"
"#,
            port = self.wire.port(),
            identity = state.join("identity").display(),
            state = state.display(),
            run = run.display(),
            socket = self.setup.socket().display(),
        )
    }

    /// The configuration file of the runner.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.setup.directory().join("config.toml")
    }

    /// State and run directories.
    #[must_use]
    pub fn directories(&self) -> [PathBuf; 2] {
        self.setup.directories()
    }

    /// What runner and launcher have said so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.setup.directory().join("log")
    }

    fn log_file(&self) -> File {
        OpenOptions::new().create(true).append(true).open(self.log_path()).expect("a log of our own")
    }

    /// Pid of the launcher.
    #[must_use]
    pub fn launcher_pid(&self) -> Option<u32> {
        self.launcher.as_ref().map(Child::id)
    }

    /// Pid of the runner.
    #[must_use]
    pub fn runner_pid(&self) -> Option<u32> {
        self.runner.as_ref().map(Child::id)
    }

    /// Starts the launcher and waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    pub async fn start_launcher(&mut self) {
        // The new socket must not be mistaken for the one of a launcher that was killed.
        let _ = fs::remove_file(self.setup.socket());
        let mut command = match &self.program {
            Some(program) => self.setup.installed_command(program),
            None => self.setup.command(),
        };
        command.stderr(self.log_file());
        let mut process = command.spawn().expect("the launcher starts");
        let deadline = Instant::now() + scaled(PATIENCE);
        while Connection::greeted(&self.setup.socket()).is_err() {
            let status = process.try_wait().expect("own child");
            assert!(status.is_none(), "the launcher ended with {status:?}: {}", self.end_of_log());
            assert!(Instant::now() < deadline, "the launcher does not serve: {}", self.end_of_log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.launcher = Some(process);
    }

    /// The command that runs the daemon with its configuration.
    #[must_use]
    pub fn runner_command(&self) -> Command {
        let mut command = Command::new(self.program.as_deref().unwrap_or_else(|| binary()));
        command.arg("run").arg("--config").arg(self.config());
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(self.log_file());
        if !self.crash_points.is_empty() {
            command.env("SANDBOX_RUNNER_CRASH_POINTS", &self.crash_points);
        }
        command
    }

    /// Starts the runner and waits until its link is up.
    ///
    /// # Panics
    /// When it ends instead.
    pub async fn start_runner(&mut self) {
        self.start_runner_with(&[]).await;
    }

    /// The same through another program, which executes the command that follows its own arguments.
    ///
    /// # Panics
    /// When it ends instead.
    pub async fn start_runner_with(&mut self, before: &[&str]) {
        let links = self.orchestrator.links();
        match before {
            [] => self.spawn_runner(),
            [program, arguments @ ..] => {
                let inner = self.runner_command();
                let mut command = Command::new(program);
                command.args(arguments).arg(inner.get_program()).args(inner.get_args());
                command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(self.log_file());
                self.runner = Some(command.spawn().expect("the runner starts"));
            }
        }
        let deadline = Instant::now() + scaled(PATIENCE);
        while self.orchestrator.links() == links {
            let status = self.runner.as_mut().and_then(|process| process.try_wait().expect("own child"));
            assert!(status.is_none(), "the runner ended with {status:?}: {}", self.end_of_log());
            assert!(Instant::now() < deadline, "the runner does not connect: {}", self.end_of_log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Starts the runner and waits until it ends, which it does by a crash point.
    ///
    /// # Panics
    /// When it does not end.
    pub async fn start_runner_to_its_end(&mut self) -> ExitStatus {
        self.spawn_runner();
        self.runner_to_its_end().await
    }

    /// Waits until the runner that was started has ended by itself.
    ///
    /// # Panics
    /// When there is none, or it does not end.
    pub async fn runner_to_its_end(&mut self) -> ExitStatus {
        let mut process = self.runner.take().expect("a runner");
        let deadline = Instant::now() + scaled(PATIENCE);
        loop {
            if let Some(status) = process.try_wait().expect("own child") {
                return status;
            }
            if Instant::now() >= deadline {
                let _ = process.kill();
                let _ = process.wait();
                panic!("the runner does not end: {}", self.end_of_log());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Starts the runner and waits for nothing.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn spawn_runner(&mut self) {
        self.runner = Some(self.runner_command().spawn().expect("the runner starts"));
    }

    /// Has the launcher execute its installed program in place, as a service manager does for a reload, and waits until that serves.
    ///
    /// # Panics
    /// When there is none, or it does not.
    pub async fn reload_launcher(&mut self) {
        let before = Connection::greeted(&self.setup.socket()).expect("the launcher serves");
        let pid = self.launcher_pid().expect("a launcher");
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGHUP).expect("own child");
        // The connection from before ends with the program that held it.
        while before.receive().is_ok_and(|packet| !packet.is_empty()) {}
        let deadline = Instant::now() + scaled(PATIENCE);
        while Connection::greeted(&self.setup.socket()).is_err() {
            assert!(!has_ended(&mut self.launcher), "the launcher ended: {}", self.end_of_log());
            assert!(Instant::now() < deadline, "the next program does not serve: {}", self.end_of_log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until runner or launcher have said something.
    ///
    /// # Panics
    /// When they do not; with what they said instead.
    pub async fn said(&self, text: &str) {
        let deadline = Instant::now() + scaled(PATIENCE);
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "nobody says {text:?}: {}", self.end_of_log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Another installation, with a launcher of its own, whose runner has a copy of what this one has on its disk and the same
    /// orchestrator. Nothing of it is started.
    ///
    /// # Panics
    /// When the host does not let us.
    pub async fn copy(&self, options: Options) -> Self {
        let copy = Self::install_for(options, Arc::clone(&self.orchestrator)).await;
        for name in ["identity", "journal"] {
            let [[from, _], [to, _]] = [self.directories(), copy.directories()];
            copy_directory(&from.join(name), &to.join(name));
        }
        copy
    }

    /// Does what a service manager does: starts again what has ended.
    pub async fn tend(&mut self) {
        self.tend_launcher().await;
        self.tend_runner();
    }

    /// The same for the launcher alone.
    pub async fn tend_launcher(&mut self) {
        if has_ended(&mut self.launcher) {
            self.restarts += 1;
            self.start_launcher().await;
        }
    }

    /// The same for the runner alone. Does not wait for its link.
    pub fn tend_runner(&mut self) {
        if has_ended(&mut self.runner) {
            self.restarts += 1;
            self.spawn_runner();
        }
    }

    /// Name of the groups of this installation's launcher, in every hierarchy.
    #[must_use]
    pub fn group(&self) -> String {
        let [_, run] = self.directories();
        group_of_launcher(&run)
    }

    /// Whether the runner runs.
    pub fn runner_is_alive(&mut self) -> bool {
        self.runner.as_mut().is_some_and(|process| matches!(process.try_wait(), Ok(None)))
    }

    /// Whether runner and launcher both run.
    pub fn is_alive(&mut self) -> bool {
        !has_ended(&mut self.launcher) & !has_ended(&mut self.runner)
    }

    /// Opens a session.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn session(&self, session_id: &str) -> Session {
        let request = pb::OpenSession { session_id: session_id.into(), ..Default::default() };
        let opened = within("session", self.orchestrator.open_session(request)).await;
        opened.unwrap_or_else(|error| panic!("{error}: {}", self.end_of_log()))
    }

    /// Sandboxes that the launcher holds, in the order of their names.
    ///
    /// # Panics
    /// When it does not say.
    #[must_use]
    pub fn sandboxes(&self) -> Vec<String> {
        let connection = Connection::greeted(&self.setup.socket()).expect("the launcher serves");
        match connection.ask(request::Body::ListSandboxes(ListSandboxes::default())).expect("an answer").body {
            Some(reply::Body::SandboxList(list)) => {
                let mut sandboxes: Vec<_> = list.sandboxes.into_iter().map(|entry| entry.sandbox_id).collect();
                sandboxes.sort();
                sandboxes
            }
            other => panic!("no list: {other:?}"),
        }
    }

    /// Ends everything in order, and looks for what sandboxes have left on the disk: sockets, directories, spools. A launcher
    /// that ends removes what it prepared ahead, and nothing that it has forgotten.
    ///
    /// # Panics
    /// When something does not end, or is left.
    pub fn end_with_nothing_left(&mut self) {
        if self.runner.is_some() {
            let status = self.stop_runner();
            assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", self.end_of_log());
        }
        let status = self.stop_launcher();
        assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", self.end_of_log());
        let [state, run] = self.setup.directories();
        let left: Vec<_> = [&state, &run].iter().flat_map(|top| host::files_below(&top.join("sandboxes"))).collect();
        let some = &left[..left.len().min(10)];
        assert!(left.is_empty(), "{} files of sandboxes are left, among them {some:?}", left.len());
    }

    /// Asks the runner to end in order. `None` when it had to be killed.
    pub fn stop_runner(&mut self) -> Option<ExitStatus> {
        let mut process = self.runner.take()?;
        // A runner that has ended already is waited for all the same.
        let _ = kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGTERM);
        wait(&mut process, PATIENCE)
    }

    /// Kills the runner without warning.
    ///
    /// # Panics
    /// When there is none.
    pub fn kill_runner(&mut self) {
        let mut process = self.runner.take().expect("a runner");
        process.kill().expect("own child");
        process.wait().expect("own child");
    }

    /// Asks the runner to leave everything to the next one, as a service manager does for a restart.
    ///
    /// # Panics
    /// When it does not end well.
    pub fn leave_runner(&mut self) {
        let mut process = self.runner.take().expect("a runner");
        kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGUSR1).expect("own child");
        let status = wait(&mut process, PATIENCE);
        assert!(status.is_some_and(|status| status.success()), "{status:?}: {}", self.end_of_log());
    }

    /// Asks the launcher to end with everything it holds.
    pub fn stop_launcher(&mut self) -> Option<ExitStatus> {
        let mut process = self.launcher.take()?;
        if let Ok(connection) = Connection::greeted(&self.setup.socket()) {
            let _ = connection.ask(request::Body::Stop(Stop {}));
        }
        wait(&mut process, PATIENCE)
    }

    /// Kills the launcher without warning, and starts the next one.
    ///
    /// # Panics
    /// When there is none.
    pub async fn replace_launcher_by_force(&mut self) {
        let mut process = self.launcher.take().expect("a launcher");
        process.kill().expect("own child");
        process.wait().expect("own child");
        self.start_launcher().await;
    }

    /// The last lines of the log, for messages.
    #[must_use]
    pub fn end_of_log(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

/// Copies the files of a directory over those of another one, with their owner and mode.
///
/// # Panics
/// When the host does not let us.
pub fn copy_directory(from: &Path, to: &Path) {
    for source in host::files_below(from).into_iter().filter(|path| path.is_file()) {
        let target = to.join(source.strip_prefix(from).expect("a file below it"));
        fs::copy(&source, &target).expect("a copy");
        chown(&target, Some(RUNNER_UID), Some(RUNNER_UID)).expect("chown to the runner");
    }
}

fn has_ended(process: &mut Option<Child>) -> bool {
    process.as_mut().is_none_or(|process| !matches!(process.try_wait(), Ok(None)))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.runner.take() {
            // Whatever it still had to say, the test is over.
            let _ = process.kill();
            let _ = process.wait();
        }
        self.stop_launcher();
    }
}

/// Waits, but not for ever.
///
/// # Panics
/// When it takes longer than [`PATIENCE`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let patience = scaled(PATIENCE);
    tokio::time::timeout(patience, future).await.unwrap_or_else(|_| panic!("{what}: not within {patience:?}"))
}

/// The working directory of a session, seen from the host. It stays readable after the sandbox has gone, because an open
/// directory keeps its file system.
#[derive(Debug)]
pub struct Workspace {
    /// Host pid of process 1.
    pub process_1: u32,
    marker: String,
    directory: File,
}

/// Name of the file that tells workspaces apart.
pub const MARKER: &str = ".whose";

impl Workspace {
    /// The workspace whose marker says `text`, if its sandbox lives.
    #[must_use]
    pub fn find(text: &str) -> Option<Self> {
        host::pids().filter(|pid| host::inner_pid(*pid) == Some(1)).find_map(|process_1| {
            let path = PathBuf::from(format!("/proc/{process_1}/root/workspace"));
            let is_it = marker_in(&path) == text;
            let directory = is_it.then(|| File::open(&path).ok()).flatten()?;
            Some(Self { process_1, marker: text.to_owned(), directory })
        })
    }

    /// Whether process 1 is still the one of this workspace.
    #[must_use]
    pub fn lives(&self) -> bool {
        marker_in(Path::new(&format!("/proc/{}/root/workspace", self.process_1))) == self.marker
    }

    /// The spawner.
    #[must_use]
    pub fn spawner(&self) -> Option<u32> {
        self.children().into_iter().find(|child| child.1 == host::SPAWNER).map(|child| child.0)
    }

    /// A process that process 1 has for the workload: a shell, a call, or one that waits to become one.
    #[must_use]
    pub fn worker(&self) -> Option<u32> {
        self.children().into_iter().find(|child| child.1 > host::SPAWNER).map(|child| child.0)
    }

    /// Children of process 1, each with the pid it has in there. One that has just ended has none any more, and is left out.
    fn children(&self) -> Vec<(u32, u32)> {
        let numbered = |pid| Some((pid, host::inner_pid(pid)?));
        host::children_of(self.process_1).into_iter().filter_map(numbered).collect()
    }

    /// A file, opened for reading. What it holds stays when everything that names it is removed.
    #[must_use]
    pub fn open(&self, name: &str) -> Option<File> {
        use std::os::fd::AsRawFd;
        File::open(format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd())).ok()
    }

    /// A file, empty when there is none.
    #[must_use]
    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_default()
    }

    /// Name of a file, for this process alone and as long as this exists.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()))
    }
}

fn marker_in(workspace: &Path) -> String {
    fs::read_to_string(workspace.join(MARKER)).unwrap_or_default().trim().to_owned()
}

/// Runs a command in the session's shell.
#[must_use]
pub fn bash(command: impl Into<String>) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() })
}

/// Runs a command without the shell of the session.
#[must_use]
pub fn exec(script: impl Into<String>) -> pb::call::Input {
    let argv = vec![b"/bin/sh".to_vec(), b"-c".to_vec(), script.into().into_bytes()];
    pb::call::Input::Exec(pb::ExecInput { argv, cwd: Some(b"/workspace".to_vec()), ..Default::default() })
}

/// What a model reads of a result.
#[must_use]
pub fn text_of(finished: &pb::CallFinished) -> String {
    let content = finished.result.iter().flat_map(|result| &result.content);
    let texts = content.filter_map(|block| match &block.kind {
        Some(pb::content_block::Kind::Text(text)) => Some(text.as_str()),
        _ => None,
    });
    texts.collect()
}

/// A small generator is enough to choose; its seed is printed, so that a failure can be looked at again.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// The seed of `SEED`, or one of this moment.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_secs())
    })
}

/// A number from the environment, for runs of another size.
#[must_use]
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
