//! A daemon as root starts it, with a launcher of its own.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Failure;

/// A daemon, ended in order at the latest when the benchmark ends.
pub(super) struct Daemon(Child);

impl Daemon {
    /// Starts one below `work`, with a journal if it is `durable`. Only these and the port are the caller's choice.
    pub(super) fn start(port: u16, certificates: &Path, work: &Path, durable: bool) -> Result<Self, Failure> {
        let home = work.join("daemon");
        let failed = |error: io::Error| error.to_string();
        std::fs::create_dir_all(&home).map_err(failed)?;
        // The runner gives up root and has to reach what is below.
        for directory in [work, &home] {
            std::fs::set_permissions(directory, Permissions::from_mode(0o755)).map_err(failed)?;
        }
        let file = home.join("config.toml");
        std::fs::write(&file, configuration(port, certificates, &home)).map_err(failed)?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["--log-level", "error", "run", "--config"]).arg(&file);
        if !durable {
            command.arg("--ephemeral");
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().map(Self).map_err(failed)
    }

    pub(super) fn pid(&self) -> u32 {
        self.0.id()
    }

    pub(super) fn stop(mut self) -> Result<(), Failure> {
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
fn configuration(port: u16, certificates: &Path, home: &Path) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::ConfigFile;

    #[test]
    fn configuration_of_the_daemon_holds() {
        let text = configuration(4711, Path::new("/c"), Path::new("/h"));

        let file = ConfigFile::parse(Path::new("config.toml"), &text).expect("every key is known");

        assert_eq!(file.orchestrator.and_then(|o| o.endpoint).as_deref(), Some("https://127.0.0.1:4711"));
        assert_eq!(file.runner.run_directory, Some("/h/run".into()));
    }
}
