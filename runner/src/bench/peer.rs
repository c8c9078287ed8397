//! Client of the helper process that runs peers and the floor.
//!
//! Blocking on purpose: while a peer is measured, nothing of ours may run beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::{Deserialize, Serialize};

use super::row::Measured;
use super::sample::Samples;

/// Why a peer was not measured.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The helper process cannot be started or spoken to.
    #[error("the process that runs the peers: {step}")]
    Helper {
        /// What was attempted.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It answered with an error.
    #[error("{request:?} failed: {reason}")]
    Failed {
        /// What was asked.
        request: String,
        /// Its answer.
        reason: String,
    },
}

/// What the helper needs to know; its command line.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The floor program.
    pub floor: Option<PathBuf>,
    /// A tree to search.
    pub tree: Option<PathBuf>,
    /// Regular expression of the search.
    pub pattern: String,
    /// A Python that can import the official SDK; without it the first `python3` of the search path is tried.
    pub sdk_python: Option<PathBuf>,
    /// Where the certificates of a daemon are put.
    pub certificates: Option<PathBuf>,
}

/// Memory of one process, in KiB.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// All of it that is resident.
    pub resident: f64,
    /// What it shares with nobody.
    pub private: f64,
}

/// First line of the helper.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Commands that worked once.
    pub available: BTreeSet<String>,
    /// The others, and why.
    pub missing: BTreeMap<String, String>,
}

/// The helper process.
#[derive(Debug)]
pub struct Peers {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// What it can run.
    pub inventory: Inventory,
}

/// Times of one floor sandbox, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FloorTimes {
    /// Until it executes.
    pub ready: f64,
    /// From there, or from the kill, to its end.
    pub reap: f64,
    /// All of it.
    pub cycle: f64,
}

impl Peers {
    /// Starts the helper with the rights of this process. `program` and `arguments` start this program as the helper.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn start(program: &Path, arguments: &[&str], settings: &Settings) -> Result<Self, PeerError> {
        let helper = |step| move |source| PeerError::Helper { step, source };
        let mut command = Command::new(program);
        // A signal to all of us ends the benchmark; the helper then finds its input ended, and clears up.
        command.process_group(0);
        command.args(arguments).arg("--pattern").arg(&settings.pattern);
        if let Some(floor) = &settings.floor {
            command.arg("--floor").arg(floor);
        }
        if let Some(tree) = &settings.tree {
            command.arg("--tree").arg(tree);
        }
        if let Some(python) = &settings.sdk_python {
            command.arg("--sdk-python").arg(python);
        }
        if let Some(directory) = &settings.certificates {
            command.arg("--certificates").arg(directory);
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(helper("cannot be started"))?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(helper("has no pipes")(io::ErrorKind::BrokenPipe.into()));
        };
        let mut peers = Self { child, requests, answers: BufReader::new(answers), inventory: Inventory::default() };
        let line = peers.line()?;
        peers.inventory = serde_json::from_str(&line)
            .map_err(|error| helper("says something else than its inventory")(error.into()))?;
        Ok(peers)
    }

    /// Whether `name` can be run.
    pub fn has(&self, name: &str) -> bool {
        self.inventory.available.contains(name)
    }

    /// The summary of what `name` took, or why there is none.
    ///
    /// # Errors
    /// The reason, for the reader of a row.
    pub fn measured(&self, name: &str, samples: &Samples) -> Measured {
        samples.summary().ok_or_else(|| match self.inventory.missing.get(name) {
            Some(reason) => reason.clone(),
            None => "there are no samples".to_owned(),
        })
    }

    /// Runs `name` once, if it is there; milliseconds.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn run(&mut self, name: &str) -> Result<Option<f64>, PeerError> {
        if !self.has(name) {
            return Ok(None);
        }
        Ok(self.ask(&format!("run {name}"))?.first().map(|us| us / 1000.0))
    }

    /// Runs `name` once, if it is there, and adds the time to `samples`.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn sample(&mut self, name: &str, samples: &mut Samples) -> Result<(), PeerError> {
        self.run(name)?.into_iter().for_each(|value| samples.push(value));
        Ok(())
    }

    /// One floor sandbox of `kind` (fresh, pooled or kill), if there is a floor program.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn floor(&mut self, kind: &str) -> Result<Option<FloorTimes>, PeerError> {
        if !self.has("floor") {
            return Ok(None);
        }
        let values = self.ask(&format!("floor {kind}"))?;
        let ms = |index: usize| values.get(index).copied().unwrap_or(f64::NAN) / 1000.0;
        Ok(Some(FloorTimes { ready: ms(0), reap: ms(1), cycle: ms(3) }))
    }

    /// A message to another process of the floor program and back, if there is one; milliseconds.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn hop(&mut self) -> Result<Option<f64>, PeerError> {
        if !self.has("floor") {
            return Ok(None);
        }
        Ok(self.ask("floor hop")?.first().map(|us| us / 1000.0))
    }

    /// The floor program keeps `count` sandboxes with a shell, or none with 0.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn hold(&mut self, count: usize) -> Result<(), PeerError> {
        if count == 0 {
            return self.ask("floor drop").map(drop);
        }
        (0..count).try_for_each(|_| self.ask("floor hold").map(drop))
    }

    /// Runs a tool of the official SDK in its own process and adds the time, if the SDK is there.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn sdk(&mut self, tool: &str, samples: &mut Samples) -> Result<(), PeerError> {
        if self.has("sdk") {
            self.ask(&format!("sdk {tool}"))?.first().into_iter().for_each(|us| samples.push(us / 1000.0));
        }
        Ok(())
    }

    /// Memory of a new process that has imported the SDK and its tools, if it is there.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn sdk_memory(&mut self) -> Result<Option<Memory>, PeerError> {
        if self.has("sdk") { self.memory("sdk").map(Some) } else { Ok(None) }
    }

    /// Memory of the daemon that was started.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn daemon_memory(&mut self) -> Result<Memory, PeerError> {
        self.memory("daemon")
    }

    fn memory(&mut self, whose: &str) -> Result<Memory, PeerError> {
        let values = self.ask(&format!("memory {whose}"))?;
        let kib = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        Ok(Memory { resident: kib(0), private: kib(1) })
    }

    /// Starts a daemon that dials this loopback port. With `durable` it keeps a journal on a disk.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn start_daemon(&mut self, port: u16, durable: bool) -> Result<(), PeerError> {
        let journal = if durable { "durable" } else { "ephemeral" };
        self.ask(&format!("daemon start {port} {journal}")).map(drop)
    }

    /// Ends that daemon and waits for its end.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn stop_daemon(&mut self) -> Result<(), PeerError> {
        self.ask("daemon stop").map(drop)
    }

    /// How many of `name` two creators finish in a second, `each` per creator.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn rate(&mut self, name: &str, each: usize) -> Result<Option<f64>, PeerError> {
        if !self.has(name) {
            return Ok(None);
        }
        Ok(self.ask(&format!("rate {name} {each}"))?.first().copied())
    }

    /// Runs a prepared line in a plain bash of the host; milliseconds.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn shell(&mut self, line: &str) -> Result<Option<f64>, PeerError> {
        if !self.has("bash") {
            return Ok(None);
        }
        Ok(self.ask(&format!("shell {line}"))?.first().map(|us| us / 1000.0))
    }

    /// Fills the machine with `count` idle processes; 0 removes them.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn crowd(&mut self, count: usize) -> Result<(), PeerError> {
        self.ask(&format!("crowd {count}")).map(drop)
    }

    fn ask(&mut self, request: &str) -> Result<Vec<f64>, PeerError> {
        let helper = |source| PeerError::Helper { step: "does not take requests", source };
        writeln!(self.requests, "{request}").and_then(|()| self.requests.flush()).map_err(helper)?;
        let line = self.line()?;
        let failed = |reason: &str| PeerError::Failed { request: request.to_owned(), reason: reason.to_owned() };
        let values = line.strip_prefix("ok").ok_or_else(|| failed(line.trim()))?;
        values.split_ascii_whitespace().map(|value| value.parse().map_err(|_| failed(value))).collect()
    }

    fn line(&mut self) -> Result<String, PeerError> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(0) => Err(PeerError::Helper { step: "has ended", source: io::ErrorKind::UnexpectedEof.into() }),
            Ok(_) => Ok(line),
            Err(source) => Err(PeerError::Helper { step: "does not answer", source }),
        }
    }

    /// Ends the helper, which removes everything it made.
    pub fn end(self) {
        let Self { mut child, requests, .. } = self;
        // Its input has ended, and so will it; root's helper could not be signalled by us anyway.
        drop(requests);
        let _ = child.wait();
    }
}
