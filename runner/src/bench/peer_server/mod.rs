//! The helper process that runs peers and the floor, with the rights the benchmark was started with.
//!
//! Its commands are fixed when it starts and requests only name them, because the requests come from a process that has
//! given up those rights. It measures from spawn to end, so a peer pays for no protocol of ours.
//!
//! This file reads requests and keeps what they are about. [`commands`] are the peers that are spawned anew each time,
//! [`conversation`] those that stay, [`daemon`] the runner as root starts it, [`timing`] what is measured.

mod commands;
mod conversation;
mod daemon;
mod timing;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use self::commands::{candidates, find, sdk_tools, words};
use self::conversation::{Conversation, numbers, sdk};
use self::daemon::Daemon;
use self::timing::{CREATORS, memory, probe, quiet, rate, run};
use super::peer::{Inventory, Settings};

/// Begins the name of every directory that the benchmark makes.
pub const DIRECTORY_PREFIX: &str = "sandbox-runner-bench.";
/// Idle processes end by themselves after this time, whatever becomes of us.
const CROWD_SECONDS: &str = "900";
/// Idle processes started without a pause.
const CROWD_BATCH: usize = 100;
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
    sdk: Option<Conversation>,
    sdk_command: Vec<OsString>,
    daemon: Option<Daemon>,
    certificates: Option<PathBuf>,
    sleeper: Vec<OsString>,
    crowd: Vec<Child>,
    inventory: Inventory,
    /// Removed at the end.
    work: tempfile::TempDir,
    /// The same on a disk, where a daemon keeps its journal, and the port of the orchestrator that it is about.
    kept: Option<(u16, tempfile::TempDir)>,
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
            kept: None,
        };
        if let Some(busybox) = find("busybox") {
            // A smaller process, so that thousands of them are about their number and not about memory.
            server.sleeper = [vec![busybox.into_os_string()], std::mem::take(&mut server.sleeper)].concat();
        }
        let candidates = candidates(server.work.path(), settings)?;
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
        server.sdk_command = sdk_tools(server.work.path(), settings)?;
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
            ["memory", "sdk"] => memory(sdk(&self.sdk_command)?.pid()),
            ["memory", "daemon"] => memory(self.daemon.as_ref().ok_or("there is no daemon")?.pid()),
            ["daemon", "start", port, journal @ ("durable" | "ephemeral")] => {
                let port = port.parse().map_err(|_| format!("{port:?} is not a port"))?;
                self.start_daemon(port, *journal == "durable").map(|()| Vec::new())
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

    fn start_daemon(&mut self, port: u16, durable: bool) -> Result<(), Failure> {
        if self.daemon.is_some() {
            return Err("there is a daemon already".to_owned());
        }
        let certificates = self.certificates.as_ref().ok_or("no directory of certificates was given")?;
        // The other directory is in memory, where a journal would be refused. Another orchestrator knows nothing of what is in it.
        if durable && self.kept.as_ref().is_none_or(|(served, _)| *served != port) {
            self.kept = Some((port, kept().map_err(|error| error.to_string())?));
        }
        let kept = self.kept.as_ref().filter(|_| durable);
        let work = kept.map_or(&self.work, |(_, directory)| directory);
        self.daemon = Some(Daemon::start(port, certificates, work.path(), durable)?);
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
            std::thread::sleep(Duration::from_millis(5));
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

/// A directory where files outlive a restart of the machine, as journals have to.
fn kept() -> io::Result<tempfile::TempDir> {
    let lasting = Path::new("/var/tmp");
    let place = if lasting.is_dir() { lasting.to_path_buf() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix(DIRECTORY_PREFIX).tempdir_in(place)
}

/// Whether a directory was made by the benchmark; nothing else is removed by anybody with its rights.
fn is_ours(directory: &Path) -> bool {
    directory.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(DIRECTORY_PREFIX.as_bytes()))
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
    fn crowd_is_gone_when_it_was_dispersed() {
        let mut server = server();
        server.answer("crowd 3").expect("started");
        let pids: Vec<u32> = server.crowd.iter().map(Child::id).collect();

        server.answer("crowd 0").expect("ended");

        assert_eq!(pids.len(), 3);
        assert!(pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()), "{pids:?}");
    }
}
