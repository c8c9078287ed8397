//! The helper process that runs peers and the floor, with the rights the benchmark was started with.
//!
//! Its commands are fixed when it starts and requests only name them, because the requests come from a process that has
//! given up those rights. It measures from spawn to end, so a peer pays for no protocol of ours.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::Permissions;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::peer::{Inventory, Settings};

/// Begins the name of every directory that the benchmark makes.
pub const DIRECTORY_PREFIX: &str = "sandbox-runner-bench.";
/// Idle processes end by themselves after this time, whatever becomes of us.
const CROWD_SECONDS: &str = "900";
/// Idle processes started without a pause.
const CROWD_BATCH: usize = 100;
/// Creators of a rate.
const CREATORS: usize = 2;
/// Lines of the plain shell, by name.
const SHELL_LINES: [(&str, &str); 2] = [("echo", "echo hi"), ("true", "/bin/true")];
/// Serves the official SDK's tools.
const SDK_TOOLS: &str = include_str!("sdk_tools.py");
/// What a worker imports before it can take work.
const SDK_IMPORT: &str =
    "from anthropic import AsyncAnthropic; from anthropic.lib.tools.agent_toolset import beta_agent_toolset_20260401";

type Failure = String;

/// Serves requests until standard input ends.
///
/// # Errors
/// When standard input or output fail.
pub fn serve(settings: &Settings) -> io::Result<()> {
    let mut server = Server::new(settings)?;
    let mut output = io::stdout().lock();
    writeln!(output, "{}", serde_json::to_string(&server.inventory)?)?;
    output.flush()?;
    for line in io::stdin().lock().lines() {
        match server.answer(&line?) {
            Ok(values) => {
                let values: Vec<String> = values.iter().map(|value| format!("{value:.3}")).collect();
                writeln!(output, "ok {}", values.join(" "))?;
            }
            Err(failure) => writeln!(output, "{}", failure.replace('\n', " "))?,
        }
        output.flush()?;
    }
    server.disperse();
    Ok(())
}

struct Server {
    commands: BTreeMap<&'static str, Vec<OsString>>,
    floor_program: Option<PathBuf>,
    floor: Option<Conversation>,
    shell: Option<Conversation>,
    sdk: Option<Conversation>,
    sdk_command: Vec<OsString>,
    daemon: Option<Daemon>,
    certificates: Option<PathBuf>,
    sleeper: Vec<OsString>,
    crowd: Vec<Child>,
    inventory: Inventory,
    /// Removed at the end.
    work: tempfile::TempDir,
}

impl Server {
    fn new(settings: &Settings) -> io::Result<Self> {
        let shared = Path::new("/dev/shm");
        let work = tempfile::Builder::new().prefix(DIRECTORY_PREFIX).tempdir_in(if shared.is_dir() {
            shared.to_path_buf()
        } else {
            std::env::temp_dir()
        })?;
        let mut server = Self {
            commands: BTreeMap::new(),
            floor_program: settings.floor.clone(),
            floor: None,
            shell: None,
            sdk: None,
            sdk_command: Vec::new(),
            daemon: None,
            certificates: settings.certificates.clone(),
            sleeper: words(&["sleep", CROWD_SECONDS]),
            crowd: Vec::new(),
            inventory: Inventory::default(),
            work,
        };
        if let Some(busybox) = find("busybox") {
            // A smaller process, so that thousands of them are about their number and not about memory.
            server.sleeper = [vec![busybox.into_os_string()], std::mem::take(&mut server.sleeper)].concat();
        }
        let candidates = server.candidates(settings)?;
        for (name, command) in candidates {
            match probe(&command) {
                Ok(_) => {
                    server.inventory.available.insert(name.to_owned());
                    server.commands.insert(name, command);
                }
                Err(failure) => {
                    server.inventory.missing.insert(name.to_owned(), failure);
                }
            }
        }
        let shell = Conversation::start(Command::new("bash").args(["--noprofile", "--norc"]));
        let floor = match &settings.floor {
            Some(program) => Conversation::start(Command::new(program).arg("serve"))
                .and_then(|mut floor| floor.ask("fresh\n", |_| true).map(|_| floor)),
            None => Err("no floor program was given".to_owned()),
        };
        server.shell = server.take_note("bash", shell);
        server.sdk_command = server.sdk_tools(settings)?;
        let sdk = sdk(&server.sdk_command);
        server.sdk = server.take_note("sdk", sdk);
        server.floor = server.take_note("floor", floor);
        Ok(server)
    }

    fn take_note<T>(&mut self, name: &str, found: Result<T, Failure>) -> Option<T> {
        match found {
            Ok(found) => {
                self.inventory.available.insert(name.to_owned());
                Some(found)
            }
            Err(failure) => {
                self.inventory.missing.insert(name.to_owned(), failure);
                None
            }
        }
    }

    fn candidates(&self, settings: &Settings) -> io::Result<Vec<(&'static str, Vec<OsString>)>> {
        let program: Vec<OsString> = super::subject::true_program().into_iter().map(OsString::from).collect();
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
        let flood = format!("head -c {} /dev/zero | cat >/dev/null", super::goal::FLOOD_BYTES);
        let mut list = vec![
            ("spawn", program.clone()),
            ("bwrap", [bwrap, program].concat()),
            ("flood", words(&["sh", "-c", &flood])),
        ];
        if let Some(busybox) = find("busybox") {
            list.push(("runc", self.container("runc", &busybox)?));
            list.push(("crun", self.container("crun", &busybox)?));
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
    fn sdk_tools(&self, settings: &Settings) -> io::Result<Vec<OsString>> {
        let work = self.work.path().join("sdk");
        std::fs::create_dir_all(&work)?;
        let mut command = python(settings);
        command.extend(words(&["-c", SDK_TOOLS]));
        command.extend([work.into_os_string(), settings.tree.clone().unwrap_or_default().into_os_string()]);
        command.push(settings.pattern.clone().into());
        Ok(command)
    }

    /// A bundle with the default specification of `runtime`, runc or crun.
    fn container(&self, runtime: &str, busybox: &Path) -> io::Result<Vec<OsString>> {
        let work = self.work.path().join(runtime);
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

    fn answer(&mut self, request: &str) -> Result<Vec<f64>, Failure> {
        let words: Vec<&str> = request.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["run", name] => run(self.command(name)?).map(|us| vec![us]),
            ["rate", "floor", each] => self.floor_rate(each).map(|rate| vec![rate]),
            ["rate", name, each] => {
                let each = each.parse().map_err(|_| format!("{each:?} is not a number"))?;
                rate(self.command(name)?, each).map(|rate| vec![rate])
            }
            ["floor", kind] => {
                let floor = self.floor.as_mut().ok_or("there is no floor program")?;
                let (_, line) = floor.ask(&format!("{kind}\n"), |_| true)?;
                numbers(&format!("ok {line}"))
            }
            ["shell", name] => {
                let (_, line) = SHELL_LINES.iter().find(|(known, _)| known == name).ok_or("no such line")?;
                let shell = self.shell.as_mut().ok_or("there is no bash")?;
                shell.ask(&format!("{line}\necho end $?\n"), |answer| answer.starts_with("end")).map(|(us, _)| vec![us])
            }
            ["sdk", tool] => {
                let sdk = self.sdk.as_mut().ok_or("there is no SDK")?;
                numbers(&sdk.ask(&format!("{tool}\n"), |_| true)?.1)
            }
            ["memory", "sdk"] => memory(sdk(&self.sdk_command)?.child.id()),
            ["memory", "daemon"] => memory(self.daemon.as_ref().ok_or("there is no daemon")?.0.id()),
            ["daemon", "start", port] => {
                let port = port.parse().map_err(|_| format!("{port:?} is not a port"))?;
                self.start_daemon(port).map(|()| Vec::new())
            }
            ["daemon", "stop"] => self.daemon.take().map_or(Ok(()), Daemon::stop).map(|()| Vec::new()),
            ["crowd", "0"] => {
                self.disperse();
                Ok(Vec::new())
            }
            ["crowd", count] => self.gather(count.parse().map_err(|_| format!("{count:?} is not a number"))?),
            _ => Err(format!("unknown request {request:?}")),
        }
    }

    fn command(&self, name: &str) -> Result<&[OsString], Failure> {
        self.commands.get(name).map(Vec::as_slice).ok_or_else(|| format!("there is no {name}"))
    }

    /// A daemon as root starts it: with a launcher of its own, below our directory. Only the port is the caller's choice.
    fn start_daemon(&mut self, port: u16) -> Result<(), Failure> {
        if self.daemon.is_some() {
            return Err("there is a daemon already".to_owned());
        }
        let certificates = self.certificates.as_ref().ok_or("no directory of certificates was given")?;
        let home = self.work.path().join("daemon");
        let failed = |error: io::Error| error.to_string();
        std::fs::create_dir_all(&home).map_err(failed)?;
        // The runner gives up root and has to reach what is below.
        for directory in [self.work.path(), &home] {
            std::fs::set_permissions(directory, Permissions::from_mode(0o755)).map_err(failed)?;
        }
        let configuration = home.join("config.toml");
        std::fs::write(&configuration, daemon_configuration(port, certificates, &home)).map_err(failed)?;
        let arguments = [OsString::from("--log-level"), "error".into(), "run".into(), "--config".into()];
        let mut command = Command::new("/proc/self/exe");
        command.args(arguments).arg(&configuration);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        self.daemon = Some(Daemon(command.spawn().map_err(failed)?));
        Ok(())
    }

    fn floor_rate(&self, each: &str) -> Result<f64, Failure> {
        let program = self.floor_program.as_ref().ok_or("there is no floor program")?;
        let creators = CREATORS.to_string();
        let arguments = ["create", "--creators", &creators, "--rounds", each];
        let output = Command::new(program).args(arguments).stderr(Stdio::null()).output().map_err(|e| e.to_string())?;
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        value["per_second"].as_f64().ok_or_else(|| "the floor program printed no rate".to_owned())
    }

    fn gather(&mut self, count: usize) -> Result<Vec<f64>, Failure> {
        let sleeper = self.sleeper.clone();
        while self.crowd.len() < count {
            for _ in 0..CROWD_BATCH.min(count - self.crowd.len()) {
                self.crowd.push(quiet(&sleeper).spawn().map_err(|error| format!("{:?}: {error}", sleeper[0]))?);
            }
            // Others shall not notice us more than necessary.
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(Vec::new())
    }

    fn disperse(&mut self) {
        for child in &mut self.crowd {
            let _ = child.kill();
        }
        for mut child in self.crowd.drain(..) {
            let _ = child.wait();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.disperse();
        // Before the certificates it uses.
        drop(self.daemon.take());
        if let Some(directory) = self.certificates.as_ref().filter(|directory| is_ours(directory)) {
            // Gone already, unless the benchmark was killed.
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

/// A daemon, ended in order at the latest when the benchmark ends.
struct Daemon(Child);

impl Daemon {
    fn stop(mut self) -> Result<(), Failure> {
        let status = self.end()?;
        if status.success() { Ok(()) } else { Err(format!("the daemon ended with {status}")) }
    }

    fn end(&mut self) -> Result<ExitStatus, Failure> {
        if let (Ok(None), Ok(pid)) = (self.0.try_wait(), i32::try_from(self.0.id())) {
            // Not reaped, so the pid is still its own.
            kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|error| error.to_string())?;
        }
        self.0.wait().map_err(|error| error.to_string())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = self.end();
    }
}

/// Small sandboxes, so that many fit beside each other; nothing of it changes what one costs.
fn daemon_configuration(port: u16, certificates: &Path, home: &Path) -> String {
    let (certificates, home) = (certificates.display(), home.display());
    format!(
        "[orchestrator]\nendpoint = \"https://127.0.0.1:{port}\"\nserver_name = \"localhost\"\n\
         ca_file = \"{certificates}/authorities.pem\"\ncertificate_file = \"{certificates}/certificate.pem\"\n\
         key_file = \"{certificates}/key.pem\"\n\
         [runner]\nid = \"bench\"\nstate_directory = \"{home}/state\"\nrun_directory = \"{home}/run\"\n\
         min_tier = \"none\"\n\
         [limits]\nmax_sessions = 512\nsandbox_memory_bytes = 33554432\nsandbox_pids = 32\n\
         sandbox_disk_bytes = 16777216\n"
    )
}

/// A Python that may have the SDK.
fn python(settings: &Settings) -> Vec<OsString> {
    vec![settings.sdk_python.clone().unwrap_or_else(|| "python3".into()).into_os_string()]
}

/// The process that serves the SDK's tools, after it has imported them.
fn sdk(command: &[OsString]) -> Result<Conversation, Failure> {
    let mut sdk = Conversation::start(Command::new(&command[0]).args(&command[1..]))?;
    let (_, line) = sdk.ask("", |_| true)?;
    numbers(&line).map(|_| sdk)
}

/// The numbers after `ok`; anything else is a failure.
fn numbers(line: &str) -> Result<Vec<f64>, Failure> {
    let values = line.strip_prefix("ok").ok_or_else(|| line.trim().to_owned())?;
    values.split_ascii_whitespace().map(|word| word.parse().map_err(|_| line.trim().to_owned())).collect()
}

/// What is resident of a process, and what of it is private, in KiB.
fn memory(pid: u32) -> Result<Vec<f64>, Failure> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let [resident, clean, dirty] = ["Rss:", "Private_Clean:", "Private_Dirty:"].map(|key| kibibytes(&text, key));
    match (resident, clean, dirty) {
        (Some(resident), Some(clean), Some(dirty)) => Ok(vec![resident, clean + dirty]),
        _ => Err(format!("{path} is not what it should be")),
    }
}

fn kibibytes(text: &str, key: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Whether a directory was made by the benchmark; nothing else is removed by anybody with its rights.
fn is_ours(directory: &Path) -> bool {
    directory.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(DIRECTORY_PREFIX.as_bytes()))
}

/// A program that answers lines.
struct Conversation {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Conversation {
    fn start(command: &mut Command) -> Result<Self, Failure> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
        let (input, output) = (child.stdin.take(), child.stdout.take().ok_or("no pipe")?);
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    /// Microseconds from the question to the line that `is_last`, and that line.
    fn ask(&mut self, question: &str, is_last: impl Fn(&str) -> bool) -> Result<(f64, String), Failure> {
        let start = Instant::now();
        let input = self.input.as_mut().ok_or("no pipe")?;
        input.write_all(question.as_bytes()).map_err(|error| error.to_string())?;
        let mut line = String::new();
        loop {
            line.clear();
            match self.output.read_line(&mut line) {
                Ok(0) => return Err("the program has ended".to_owned()),
                Ok(_) if is_last(&line) => return Ok((microseconds(start), line)),
                Ok(_) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        // All kinds end with their input.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn quiet(command: &[OsString]) -> Command {
    let mut quiet = Command::new(&command[0]);
    quiet.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet
}

fn microseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}

/// Whether a command works here; if not, what it says about it.
fn probe(command: &[OsString]) -> Result<(), Failure> {
    let Err(failure) = run(command) else { return Ok(()) };
    let output = quiet(command).stderr(Stdio::piped()).output().map_err(|_| failure.clone())?;
    let said = String::from_utf8_lossy(&output.stderr);
    Err(said.lines().rev().find(|line| !line.trim().is_empty()).map_or(failure, |last| last.trim().to_owned()))
}

/// Microseconds from spawn to a good end.
fn run(command: &[OsString]) -> Result<f64, Failure> {
    let mut prepared = quiet(command);
    let start = Instant::now();
    let status = prepared.status().map_err(|error| format!("{}: {error}", command[0].display()))?;
    let took = microseconds(start);
    if status.success() { Ok(took) } else { Err(format!("{} ended with {status}", command[0].display())) }
}

fn rate(command: &[OsString], each: usize) -> Result<f64, Failure> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let creators: Vec<_> =
            (0..CREATORS).map(|_| scope.spawn(|| (0..each).try_for_each(|_| run(command).map(drop)))).collect();
        creators.into_iter().try_for_each(|creator| creator.join().map_err(|_| "a creator failed".to_owned())?)
    })?;
    let count = u32::try_from(each * CREATORS).map_err(|error| error.to_string())?;
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// A program on the search path.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::ConfigFile;

    fn server() -> Server {
        Server::new(&Settings::default()).expect("a temporary directory")
    }

    #[test]
    fn only_commands_known_from_the_start_are_run() {
        let mut server = server();

        assert_eq!(server.answer("run /bin/true"), Err("there is no /bin/true".to_owned()));
        assert!(server.answer("shell rm").is_err());
        assert!(server.answer("floor fresh").is_err());
        assert!(server.answer("").is_err());
    }

    #[test]
    fn plain_shell_is_timed_until_its_command_has_ended() {
        let mut server = server();

        let took = server.answer("shell true").expect("bash is on every machine that builds this");

        assert!(took.len() == 1 && took[0] > 0.0, "{took:?}");
    }

    #[test]
    fn failing_command_has_no_time() {
        let error = run(&words(&["false"])).expect_err("failed");

        assert!(error.contains("false ended with"), "{error}");
    }

    #[test]
    fn process_that_cannot_import_the_sdk_is_left_out_with_its_reason() {
        let settings = Settings { sdk_python: Some("/bin/false".into()), ..Settings::default() };

        let mut server = Server::new(&settings).expect("a temporary directory");

        assert_eq!(server.inventory.missing["sdk"], "the program has ended");
        assert_eq!(server.answer("sdk echo"), Err("there is no SDK".to_owned()));
    }

    #[test]
    fn only_directories_of_the_benchmark_are_removed() {
        let other = tempfile::tempdir().expect("a directory");
        let own = tempfile::Builder::new().prefix(DIRECTORY_PREFIX).tempdir().expect("a directory");
        for directory in [&other, &own] {
            let certificates = Some(directory.path().to_owned());
            drop(Server::new(&Settings { certificates, ..Settings::default() }).expect("a temporary directory"));
        }

        assert!(other.path().exists());
        assert!(!own.path().exists());
    }

    #[test]
    fn answers_that_are_not_numbers_are_failures() {
        assert_eq!(numbers("ok 1.5 2\n"), Ok(vec![1.5, 2.0]));
        assert_eq!(numbers("error ImportError: x\n"), Err("error ImportError: x".to_owned()));
        assert_eq!(numbers("ok many\n"), Err("ok many".to_owned()));
    }

    #[test]
    fn memory_of_a_process_is_what_the_kernel_says() {
        let own = memory(std::process::id()).expect("our own");

        assert!(own[0] >= own[1] && own[1] > 0.0, "{own:?}");
        assert_eq!(kibibytes("Rss:    12 kB\nPss: 1 kB\n", "Rss:"), Some(12.0));
    }

    #[test]
    fn configuration_of_the_daemon_holds() {
        let text = daemon_configuration(4711, Path::new("/c"), Path::new("/h"));

        let file = ConfigFile::parse(Path::new("config.toml"), &text).expect("every key is known");

        assert_eq!(file.orchestrator.and_then(|o| o.endpoint).as_deref(), Some("https://127.0.0.1:4711"));
        assert_eq!(file.runner.run_directory, Some("/h/run".into()));
    }

    #[test]
    fn crowd_is_gone_when_it_was_dispersed() {
        let mut server = server();
        server.answer("crowd 3").expect("started");
        let pids: Vec<u32> = server.crowd.iter().map(Child::id).collect();

        server.answer("crowd 0").expect("ended");

        assert_eq!(pids.len(), 3);
        assert!(pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "{pids:?}");
    }
}
