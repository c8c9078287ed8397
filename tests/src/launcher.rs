//! A launcher started by the tests, and the other end of its socket with nothing between us and the wire: what a
//! compromised runner has.

use std::fs::{self, Permissions};
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, send, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use prost::Message;
use proto::launch::v1::{
    CreateSandbox, Failure, Hello, HostRootfs, Reply, Request, SandboxCreated, create_sandbox, reply, request,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::rootfs::shared_directory;
use crate::runner::sandbox_init;

/// uid of the runner in the policies of these tests: neither root nor a user of the host.
pub const RUNNER_UID: u32 = 64_013;
/// First host id of these tests' sandboxes: away from the default, so that nobody's sandboxes are mistaken for ours.
pub const ID_BASE: u32 = 2_080_374_784;
/// Largest packet of the protocol.
pub const LARGEST_PACKET: usize = 64 * 1024;

/// What a policy file says; the text can be replaced as a whole.
#[derive(Debug)]
pub struct Setup {
    directory: TempDir,
    /// Text of the policy file.
    pub policy: String,
    /// Mode of the policy file.
    pub mode: u32,
    /// Owner of the policy file.
    pub owner: u32,
}

impl Setup {
    /// A policy with one profile, `slots` slots and one allowed rootfs named `allowed`.
    ///
    /// # Panics
    /// When the directories cannot be made.
    #[must_use]
    pub fn new(slots: u32, rootfs: &Path) -> Self {
        let directory = shared_directory("launcher");
        for name in ["state", "run"] {
            fs::create_dir(directory.path().join(name)).expect("a directory of our own");
        }
        // As an installation has it: the launcher's state is root's, the run directory can be traversed by the runner.
        fs::set_permissions(directory.path().join("state"), Permissions::from_mode(0o711)).expect("chmod");
        let policy = format!(
            r#"version = 1
runner_uid = {RUNNER_UID}
runner_gid = {RUNNER_UID}
state_directory = "{base}/state"
run_directory = "{base}/run"
lock_directory = "{base}/locks"
listen = "{base}/run/launcher.sock"
orphan_timeout_seconds = 60

[ids]
base = {ID_BASE}
per_sandbox = 65536
slots = {slots}

[rootfs.allowed]
path = "{rootfs}"

[profiles.default]
root = true
seccomp = "standard"
default = {{ memory_bytes = 268435456, cpu_millis = 1000, pids = 64, disk_bytes = 67108864 }}
maximum = {{ memory_bytes = 536870912, cpu_millis = 2000, pids = 128, disk_bytes = 134217728 }}

[danger]
without = []
"#,
            base = directory.path().display(),
            rootfs = rootfs.display(),
        );
        Self { directory, policy, mode: 0o600, owner: 0 }
    }

    /// Where the socket will be.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("run/launcher.sock")
    }

    /// The directory that holds everything of this setup.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// State and run directories.
    #[must_use]
    pub fn directories(&self) -> [PathBuf; 2] {
        [self.directory.path().join("state"), self.directory.path().join("run")]
    }

    /// The command that starts a launcher with this policy.
    ///
    /// # Panics
    /// When the policy cannot be written.
    #[must_use]
    pub fn command(&self) -> Command {
        let path = self.directory.path().join("launcher.toml");
        let _ = fs::remove_file(&path);
        fs::write(&path, &self.policy).expect("the policy file");
        fs::set_permissions(&path, Permissions::from_mode(self.mode)).expect("chmod of the policy file");
        chown(&path, Some(self.owner), None).expect("chown of the policy file");
        let mut command = Command::new(sandbox_init());
        command.arg0("sandbox-init").arg("launcher").arg("--policy").arg(path);
        command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// The same of the installed command, which becomes the launcher.
    ///
    /// # Panics
    /// When the policy cannot be written.
    #[must_use]
    pub fn installed_command(&self, program: &Path) -> Command {
        let policy = self.command().get_args().last().expect("the policy is the last argument").to_owned();
        let mut command = Command::new(program);
        command.arg("launcher").arg("--policy").arg(policy);
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Starts a launcher and waits until it serves.
    ///
    /// # Errors
    /// With its own message when it ends instead.
    pub fn start(self) -> anyhow::Result<Launcher> {
        let command = self.command();
        self.start_with(command)
    }

    /// The same with a prepared command.
    ///
    /// # Errors
    /// With its own message when it ends instead.
    pub fn start_with(self, mut command: Command) -> anyhow::Result<Launcher> {
        let mut process = command.spawn().context("starting the launcher")?;
        let deadline = Instant::now() + Duration::from_secs(20);
        // The socket exists a moment before it belongs to the runner, and that before anybody listens.
        while Connection::greeted(&self.socket()).is_err() {
            if let Some(status) = process.try_wait()? {
                let mut message = String::new();
                if let Some(mut stderr) = process.stderr.take() {
                    std::io::Read::read_to_string(&mut stderr, &mut message)?;
                }
                bail!("the launcher ended with {status}: {message}");
            }
            if Instant::now() > deadline {
                let _ = process.kill();
                let _ = process.wait();
                bail!("the launcher does not serve");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Launcher { setup: self, process })
    }
}

/// A running launcher. Dropping it asks it to end, and kills it when it does not.
#[derive(Debug)]
pub struct Launcher {
    setup: Setup,
    process: Child,
}

impl Launcher {
    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it was started with.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Kills it without warning.
    pub fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Ends it with all sandboxes, and hands out the directories for a look.
    pub fn stop(mut self) -> [PathBuf; 2] {
        self.end();
        self.setup.directories()
    }

    fn end(&mut self) {
        if let Ok(connection) = Connection::greeted(&self.setup.socket()) {
            let _ = connection.ask(request::Body::Stop(proto::launch::v1::Stop {}));
        }
        let _ = crate::runner::wait(&mut self.process, Duration::from_secs(15));
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        if self.is_alive() {
            self.end();
        }
    }
}

/// A connection to a launcher. Whatever is written goes out as it is.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
}

impl Connection {
    /// Connects with the runner's uid.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        Self::open_as(path, RUNNER_UID)
    }

    /// Connects with another uid.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn open_as(path: &Path, uid: u32) -> anyhow::Result<Self> {
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let limit = TimeVal::new(20, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        setsockopt(&socket, sockopt::SendTimeout, &limit)?;
        connect_with_uid(&socket, path, uid)?;
        Ok(Self { socket })
    }

    /// Connects and greets.
    ///
    /// # Errors
    /// When the launcher does not welcome us.
    pub fn greeted(path: &Path) -> anyhow::Result<Self> {
        Self::greeted_as(path, RUNNER_UID)
    }

    /// The same with another uid.
    ///
    /// # Errors
    /// When the launcher does not welcome us.
    pub fn greeted_as(path: &Path, uid: u32) -> anyhow::Result<Self> {
        let connection = Self::open_as(path, uid)?;
        match connection.ask(request::Body::Hello(Hello { major: 1 }))?.body {
            Some(reply::Body::Welcome(_)) => Ok(connection),
            other => bail!("no welcome but {other:?}"),
        }
    }

    /// The connection itself, for a client that goes on with it.
    #[must_use]
    pub fn into_descriptor(self) -> OwnedFd {
        self.socket
    }

    /// Sends bytes as one packet.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn send(&self, bytes: &[u8]) -> nix::Result<usize> {
        send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)
    }

    /// The same with this many descriptors on top, which no message of the protocol has.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn send_with_descriptors(&self, bytes: &[u8], count: usize) -> nix::Result<usize> {
        let descriptors = vec![self.socket.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let parts = [IoSlice::new(bytes)];
        sendmsg::<()>(self.socket.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)
    }

    /// The next packet; empty when the launcher has closed the connection. Descriptors that came along are closed.
    ///
    /// # Errors
    /// The kernel's answer, for instance when nothing came for 20 seconds.
    pub fn receive(&self) -> nix::Result<Vec<u8>> {
        self.receive_up_to(LARGEST_PACKET)
    }

    /// The same for a protocol with larger packets.
    ///
    /// # Errors
    /// As [`Connection::receive`].
    pub fn receive_up_to(&self, largest: usize) -> nix::Result<Vec<u8>> {
        let mut buffer = vec![0; largest + 1];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        buffer.truncate(length);
        Ok(buffer)
    }

    /// Sends a request and waits for its answer, leaving out events.
    ///
    /// # Errors
    /// When the connection is closed or the answer cannot be read.
    pub fn ask(&self, body: request::Body) -> anyhow::Result<Reply> {
        let request = Request { request_id: 7, body: Some(body) };
        self.send(&request.encode_to_vec()).context("sending")?;
        loop {
            let packet = self.receive().context("receiving")?;
            if packet.is_empty() {
                bail!("the launcher closed the connection");
            }
            let reply = Reply::decode(packet.as_slice()).context("decoding")?;
            if reply.request_id == 7 {
                return Ok(reply);
            }
        }
    }

    /// Makes a sandbox.
    ///
    /// # Errors
    /// When it is not made, with the answer.
    pub fn create(&self, sandbox: CreateSandbox) -> anyhow::Result<SandboxCreated> {
        match self.ask(request::Body::CreateSandbox(sandbox))?.body {
            Some(reply::Body::SandboxCreated(created)) => Ok(created),
            other => bail!("not created: {other:?}"),
        }
    }

    /// Asks for something that must be refused, and returns the refusal.
    ///
    /// # Errors
    /// When it was not refused.
    pub fn refusal(&self, body: request::Body) -> anyhow::Result<Failure> {
        match self.ask(body)?.body {
            Some(reply::Body::Failure(failure)) => Ok(failure),
            other => bail!("not refused: {other:?}"),
        }
    }
}

/// The kernel records the credentials of whoever calls `connect`, so a child of that uid connects our socket for us.
fn connect_with_uid(socket: &OwnedFd, path: &Path, uid: u32) -> anyhow::Result<()> {
    let finished = {
        let mut command = Command::new(crate::prober::path());
        command.arg("connect").arg(path).uid(uid).gid(uid).stdin(Stdio::from(socket.try_clone()?));
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        crate::runner::finish(command, Duration::from_secs(10))?
    };
    ensure!(
        finished.status.success(),
        "cannot connect to {} as uid {uid}: {}",
        path.display(),
        finished.errors().trim()
    );
    Ok(())
}

/// How a launcher with this run directory names its groups.
#[must_use]
pub fn group_of_launcher(run: &Path) -> String {
    let digest = Sha256::digest(run.as_os_str().as_encoded_bytes());
    digest.iter().take(4).fold("sandbox-runner-".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// A sandbox with everything at its default.
#[must_use]
pub fn plain_sandbox(id: &str) -> CreateSandbox {
    CreateSandbox {
        sandbox_id: id.to_owned(),
        profile: "default".to_owned(),
        rootfs: Some(create_sandbox::Rootfs::Host(HostRootfs {})),
        ephemeral: true,
        ..CreateSandbox::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, UnixAddr, bind, listen};

    #[test]
    fn connection_has_the_rights_of_the_uid_that_was_asked_for() {
        crate::needs_root!();
        let directory = shared_directory("peer");
        let path = directory.path().join("socket");
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("socket");
        bind(listener.as_raw_fd(), &UnixAddr::new(&path).expect("short path")).expect("bind");
        listen(&listener, Backlog::new(4).expect("backlog")).expect("listen");
        chown(&path, Some(12_345), None).expect("chown");
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("chmod");

        Connection::open_as(&path, 12_345).expect("the owner may connect").send(b"hello").expect("sent");
        let refused = Connection::open_as(&path, 12_346).expect_err("another user may not").to_string();

        assert!(refused.contains("Permission denied"), "{refused}");
    }
}
