//! Readiness and watchdog for systemd: datagrams to the socket it names in the environment.
//!
//! The watchdog is fed by progress of the session loop, never by a timer alone: a wedged daemon is restarted. Without
//! systemd all of this does nothing.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::work::Progress;

/// What systemd put into the environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// `NOTIFY_SOCKET`.
    pub socket: Option<OsString>,
    /// `WATCHDOG_USEC`.
    pub watchdog_usec: Option<String>,
    /// `WATCHDOG_PID`.
    pub watchdog_pid: Option<String>,
}

impl Environment {
    /// Reads the environment of this process.
    #[must_use]
    pub fn read() -> Self {
        Self {
            socket: std::env::var_os("NOTIFY_SOCKET"),
            watchdog_usec: std::env::var("WATCHDOG_USEC").ok(),
            watchdog_pid: std::env::var("WATCHDOG_PID").ok(),
        }
    }
}

/// Speaks to systemd.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Uses what `environment` says, for the process `pid`.
    ///
    /// # Errors
    /// When the named socket cannot be used; a malformed watchdog time means no watchdog.
    pub fn new(environment: &Environment, pid: u32) -> io::Result<Self> {
        let socket = match &environment.socket {
            None => None,
            Some(name) => {
                let address = match name.as_bytes() {
                    [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
                    _ => SocketAddr::from_pathname(name)?,
                };
                let socket = UnixDatagram::unbound()?;
                // A full socket must not stop the daemon; the next message will do.
                socket.set_nonblocking(true)?;
                Some((socket, address))
            }
        };
        let ours = environment.watchdog_pid.as_ref().is_none_or(|text| text.parse() == Ok(pid));
        let period = environment.watchdog_usec.as_ref().and_then(|text| text.parse().ok()).map(Duration::from_micros);
        Ok(Self { socket, watchdog: period.filter(|period| ours && !period.is_zero()) })
    }

    /// How often the watchdog is to be fed; half of what systemd allows.
    #[must_use]
    pub fn watchdog_every(&self) -> Option<Duration> {
        self.watchdog.map(|period| period / 2)
    }

    /// The runner takes work.
    pub fn ready(&self) {
        self.send("READY=1\nSTATUS=taking work");
    }

    /// The runner is being emptied.
    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=finishing calls");
    }

    /// The runner is alive.
    pub fn alive(&self) {
        self.send("WATCHDOG=1");
    }

    fn send(&self, message: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(message.as_bytes(), address)
        {
            tracing::debug!(%error, "systemd did not take a message");
        }
    }
}

/// Feeds the watchdog only while the loop goes round.
#[derive(Debug)]
pub struct Watchdog {
    progress: Progress,
    seen: Option<u64>,
}

impl Watchdog {
    /// Watches `progress`.
    #[must_use]
    pub fn new(progress: Progress) -> Self {
        Self { progress, seen: None }
    }

    /// Whether there was progress since the last look.
    pub fn has_moved(&mut self) -> bool {
        let count = self.progress.count();
        self.seen.replace(count) != Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 128];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn readiness_and_end_reach_the_named_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let environment = Environment { socket: Some(path.into()), ..Default::default() };
        let notifier = Notifier::new(&environment, 1).unwrap();
        notifier.ready();
        notifier.stopping();
        assert_eq!(received(&socket), "READY=1\nSTATUS=taking work");
        assert_eq!(received(&socket), "STOPPING=1\nSTATUS=finishing calls");
    }

    #[test]
    fn abstract_sockets_are_understood() {
        let name = format!("sbr-conn-test-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        let environment = Environment { socket: Some(format!("@{name}").into()), ..Default::default() };
        Notifier::new(&environment, 1).unwrap().alive();
        assert_eq!(received(&socket), "WATCHDOG=1");
    }

    #[test]
    fn watchdog_of_another_process_or_of_no_time_is_not_ours() {
        let every = |usec: &str, pid: Option<&str>| {
            let watchdog_pid = pid.map(str::to_owned);
            let environment = Environment { socket: None, watchdog_usec: Some(usec.into()), watchdog_pid };
            Notifier::new(&environment, 7).unwrap().watchdog_every()
        };
        assert_eq!(every("10000000", Some("7")), Some(Duration::from_secs(5)));
        assert_eq!(every("10000000", None), Some(Duration::from_secs(5)));
        assert_eq!(every("10000000", Some("8")), None);
        assert_eq!(every("0", None), None);
        assert_eq!(every("soon", None), None);
    }

    #[test]
    fn loop_that_stands_still_does_not_feed_the_watchdog() {
        let progress = Progress::default();
        let mut watchdog = Watchdog::new(progress.clone());
        assert!(watchdog.has_moved());
        assert!(!watchdog.has_moved());
        progress.tick();
        assert!(watchdog.has_moved());
    }
}
