//! The helper process that runs peers and the floor, with the rights the benchmark was started with.
//!
//! Its commands are fixed when it starts and requests only name them, because the requests come from a process that has
//! given up those rights. It measures from spawn to end, so a peer pays for no protocol of ours.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use super::peer::{Inventory, Settings};

/// Idle processes end by themselves after this time, whatever becomes of us.
const CROWD_SECONDS: &str = "900";
/// Idle processes started without a pause.
const CROWD_BATCH: usize = 100;
/// Creators of a rate.
const CREATORS: usize = 2;
/// Lines of the plain shell, by name.
const SHELL_LINES: [(&str, &str); 2] = [("echo", "echo hi"), ("true", "/bin/true")];

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
    sleeper: Vec<OsString>,
    crowd: Vec<Child>,
    inventory: Inventory,
    /// Removed at the end.
    _work: tempfile::TempDir,
}

impl Server {
    fn new(settings: &Settings) -> io::Result<Self> {
        let shared = Path::new("/dev/shm");
        let work = tempfile::Builder::new().prefix("sandbox-runner-bench.").tempdir_in(if shared.is_dir() {
            shared.to_path_buf()
        } else {
            std::env::temp_dir()
        })?;
        let mut server = Self {
            commands: BTreeMap::new(),
            floor_program: settings.floor.clone(),
            floor: None,
            shell: None,
            sleeper: words(&["sleep", CROWD_SECONDS]),
            crowd: Vec::new(),
            inventory: Inventory::default(),
            _work: work,
        };
        if let Some(busybox) = find("busybox") {
            // A smaller process, so that thousands of them are about their number and not about memory.
            server.sleeper = [vec![busybox.into_os_string()], std::mem::take(&mut server.sleeper)].concat();
        }
        let candidates = server.candidates(settings)?;
        for (name, command) in candidates {
            match run(&command) {
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
            list.push(("runc", self.runc(&busybox)?));
        }
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

    /// A bundle with runc's own default specification.
    fn runc(&self, busybox: &Path) -> io::Result<Vec<OsString>> {
        let work = self._work.path();
        let (root, bundle) = (work.join("root"), work.join("bundle"));
        for directory in ["bin", "proc", "dev", "sys", "tmp"] {
            std::fs::create_dir_all(root.join(directory))?;
        }
        std::fs::copy(busybox, root.join("bin/busybox"))?;
        std::fs::create_dir_all(&bundle)?;
        // A runc that is missing or fails shows when the finished command is tried.
        let _ = run(&[words(&["runc", "spec", "--bundle"]), vec![bundle.clone().into_os_string()]].concat());
        let file = bundle.join("config.json");
        if let Ok(text) = std::fs::read_to_string(&file) {
            let mut specification: serde_json::Value = serde_json::from_str(&text)?;
            specification["process"]["terminal"] = false.into();
            specification["process"]["args"] = serde_json::json!(["/bin/busybox", "true"]);
            specification["root"]["path"] = root.to_string_lossy().into();
            std::fs::write(&file, specification.to_string())?;
        }
        let mut command = words(&["runc", "--root"]);
        command.extend([work.join("runc").into_os_string(), "run".into(), "--bundle".into(), bundle.into_os_string()]);
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
                line.split_ascii_whitespace().map(|word| word.parse().map_err(|_| line.clone())).collect()
            }
            ["shell", name] => {
                let (_, line) = SHELL_LINES.iter().find(|(known, _)| known == name).ok_or("no such line")?;
                let shell = self.shell.as_mut().ok_or("there is no bash")?;
                shell.ask(&format!("{line}\necho end $?\n"), |answer| answer.starts_with("end")).map(|(us, _)| vec![us])
            }
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
    }
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
        // Both kinds end with their input.
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
    fn crowd_is_gone_when_it_was_dispersed() {
        let mut server = server();
        server.answer("crowd 3").expect("started");
        let pids: Vec<u32> = server.crowd.iter().map(Child::id).collect();

        server.answer("crowd 0").expect("ended");

        assert_eq!(pids.len(), 3);
        assert!(pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "{pids:?}");
    }
}
