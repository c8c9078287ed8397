//! What a sandbox must not reach, planted on the host where anybody else can: world-readable files, a process, listeners.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

use crate::rootfs::shared_directory;

/// Name of an environment variable of the runner that no workload may see.
pub const VARIABLE: &str = "SBR_ATTACK_CANARY";

/// A set of canaries. Dropping it takes everything away again.
#[derive(Debug)]
pub struct Canaries {
    directory: TempDir,
    files: Vec<PathBuf>,
    outside: Vec<PathBuf>,
    content: String,
    token: String,
    process: Child,
    tcp: Vec<TcpListener>,
    port: u16,
    unix: UnixListener,
    abstract_listener: UnixListener,
}

impl Canaries {
    /// Plants everything.
    ///
    /// # Panics
    /// When the host does not let us; then no test of this crate means anything.
    #[must_use]
    pub fn plant() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let token = format!("sbr-attack-canary-{}-{number}", std::process::id());
        let directory = shared_directory("canary");
        let content = format!("secret of {token}\n");
        let mut outside = vec![PathBuf::from("/var/tmp").join(&token)];
        if nix::unistd::geteuid().is_root() {
            outside.push(PathBuf::from("/etc").join(&token));
        }
        let mut files = vec![directory.path().join("canary")];
        files.extend(outside.iter().cloned());
        for file in &files {
            fs::write(file, &content).expect("a canary file");
            fs::set_permissions(file, Permissions::from_mode(0o644)).expect("chmod of a canary file");
        }
        let process = Command::new("sleep")
            .arg0(&token)
            .arg("600")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("the canary process");
        let four = TcpListener::bind("0.0.0.0:0").expect("a listener");
        let port = four.local_addr().expect("the port of a listener").port();
        // Without IPv6 on the host there is nothing to listen on, and nothing to reach either.
        let mut tcp = vec![four];
        tcp.extend(TcpListener::bind(("::1", port)).ok());
        let socket = directory.path().join("socket");
        let unix = UnixListener::bind(&socket).expect("a unix listener");
        fs::set_permissions(&socket, Permissions::from_mode(0o777)).expect("chmod of a socket");
        let name = SocketAddr::from_abstract_name(&token).expect("an abstract name");
        let abstract_listener = UnixListener::bind_addr(&name).expect("an abstract listener");
        for listener in &tcp {
            listener.set_nonblocking(true).expect("non-blocking");
        }
        unix.set_nonblocking(true).expect("non-blocking");
        abstract_listener.set_nonblocking(true).expect("non-blocking");
        Self { directory, files, outside, content, token, process, tcp, port, unix, abstract_listener }
    }

    /// Options that tell the prober where everything is.
    #[must_use]
    pub fn options(&self) -> Vec<String> {
        let mut options = Vec::new();
        let mut push = |name: &str, value: String| options.extend([format!("--{name}"), value]);
        for file in &self.files {
            push("file", file.display().to_string());
        }
        push("socket", self.directory.path().join("socket").display().to_string());
        push("abstract", self.token.clone());
        push("port", self.port.to_string());
        push("token", self.token.clone());
        push("variable", VARIABLE.to_owned());
        for address in host_addresses() {
            push("address", address.to_string());
        }
        options
    }

    /// The files, for tests that name them.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The secret in the files.
    #[must_use]
    pub fn content(&self) -> &str {
        &self.content
    }

    /// The canary process's name.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Port of the listeners.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Fails when any canary was touched: file changed, sibling made, process gone, listener connected to.
    ///
    /// # Panics
    /// That is its purpose.
    pub fn assert_untouched(&mut self) {
        for file in &self.files {
            let content = fs::read_to_string(file).expect("a canary file was removed");
            assert_eq!(content, self.content, "a canary file was changed: {}", file.display());
            let breach = file.with_file_name("breach");
            assert!(!breach.exists(), "something was written beside a canary: {}", breach.display());
        }
        assert!(self.process.try_wait().expect("wait").is_none(), "the canary process was ended");
        for listener in &self.tcp {
            assert_nobody_came(listener.accept().map(drop), "the TCP listener of the host");
        }
        assert_nobody_came(self.unix.accept().map(drop), "the unix listener of the host");
        assert_nobody_came(self.abstract_listener.accept().map(drop), "the abstract listener of the host");
    }
}

impl Drop for Canaries {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        for file in &self.outside {
            let _ = fs::remove_file(file);
        }
    }
}

fn assert_nobody_came(accepted: io::Result<()>, what: &str) {
    match accepted {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
        Ok(()) => panic!("{what} was reached from a sandbox"),
        Err(error) => panic!("{what} broke: {error}"),
    }
}

/// The host's own addresses, from the kernel's list of local routes.
fn host_addresses() -> Vec<IpAddr> {
    let text = fs::read_to_string(Path::new("/proc/net/fib_trie")).unwrap_or_default();
    let mut found = Vec::new();
    let mut candidate = None;
    for line in text.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            candidate = address.parse::<IpAddr>().ok();
        } else if line.starts_with("/32 host LOCAL")
            && let Some(address) = candidate
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}
