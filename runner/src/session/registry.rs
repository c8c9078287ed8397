//! Admission by reservation: a session gets a place when its limits fit into what the operator set aside, and keeps it
//! until its sandbox is gone.
//!
//! Reservations are sums of limits, not measurements: a sandbox may use all it was promised, at any moment.

use std::collections::HashMap;

use crate::work::{Code, ResourceLimits, SessionId, ToolFailure};

/// What is set aside for sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserve {
    /// Sessions at the same time.
    pub max_sessions: usize,
    /// Memory.
    pub memory_bytes: u64,
    /// Disk space.
    pub disk_bytes: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Descriptors of the runner.
    pub descriptors: u64,
}

/// Descriptors of the runner that one session may need: its socket, spools being read, the link's share.
pub const DESCRIPTORS_PER_SESSION: u64 = 16;

/// Who holds what.
#[derive(Debug)]
pub struct Registry {
    reserve: Reserve,
    defaults: ResourceLimits,
    held: HashMap<SessionId, ResourceLimits>,
}

impl Registry {
    /// An empty registry. `defaults` stand in for limits that a session leaves at zero.
    #[must_use]
    pub fn new(reserve: Reserve, defaults: ResourceLimits) -> Self {
        Self { reserve, defaults, held: HashMap::new() }
    }

    /// Limits with the operator's defaults filled in.
    #[must_use]
    pub fn fill(&self, asked: ResourceLimits) -> ResourceLimits {
        let or = |value: u64, default: u64| if value == 0 { default } else { value };
        ResourceLimits {
            cpu_millis: or(asked.cpu_millis, self.defaults.cpu_millis),
            memory_bytes: or(asked.memory_bytes, self.defaults.memory_bytes),
            disk_bytes: or(asked.disk_bytes, self.defaults.disk_bytes),
            pids: or(asked.pids, self.defaults.pids),
        }
    }

    /// Gives `session_id` a place, and returns its limits with the defaults filled in.
    ///
    /// # Errors
    /// `CAPACITY`, naming the limit, what is asked, held and set aside. Nothing is reserved then. A request above the
    /// whole reserve is marked as not retryable.
    pub fn admit(&mut self, session_id: &SessionId, asked: ResourceLimits) -> Result<ResourceLimits, ToolFailure> {
        let limits = self.fill(asked);
        let sessions = self.held.len() as u64;
        let sum = |pick: fn(&ResourceLimits) -> u64| self.held.values().map(pick).fold(0_u64, u64::saturating_add);
        let checks = [
            ("sessions", 1, sessions, self.reserve.max_sessions as u64),
            ("memory_bytes", limits.memory_bytes, sum(|l| l.memory_bytes), self.reserve.memory_bytes),
            ("disk_bytes", limits.disk_bytes, sum(|l| l.disk_bytes), self.reserve.disk_bytes),
            ("pids", limits.pids, sum(|l| l.pids), self.reserve.pids),
            (
                "descriptors",
                DESCRIPTORS_PER_SESSION,
                sessions.saturating_mul(DESCRIPTORS_PER_SESSION),
                self.reserve.descriptors,
            ),
        ];
        for (name, wanted, held, limit) in checks {
            if held.saturating_add(wanted) > limit {
                return Err(refusal(name, wanted, held, limit));
            }
        }
        self.held.insert(session_id.clone(), limits);
        Ok(limits)
    }

    /// Gives a place to a session that has a sandbox already, however full it is: refusing it would free nothing.
    pub fn reinstate(&mut self, session_id: &SessionId, limits: ResourceLimits) {
        self.held.insert(session_id.clone(), limits);
    }

    /// Gives the place back. Unknown sessions hold none.
    pub fn release(&mut self, session_id: &SessionId) {
        self.held.remove(session_id);
    }

    /// Sessions that hold a place.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.held.len()
    }
}

fn refusal(name: &str, wanted: u64, held: u64, limit: u64) -> ToolFailure {
    let never = wanted > limit;
    let mut failure = ToolFailure::new(
        Code::Capacity,
        format!("{name}: {wanted} asked, {held} of {limit} are reserved by open sessions"),
        if never {
            format!("ask for at most {limit}, or {}", more_of(name))
        } else {
            "close a session, try again later, or place the session on another runner".to_owned()
        },
    );
    if never {
        failure.retryable = false;
        failure.retry_after = None;
    }
    failure
}

/// What the operator of the runner can do so that more is set aside.
fn more_of(name: &str) -> &'static str {
    match name {
        "memory_bytes" => "lower limits.host_reserve_memory_bytes of the runner, whose host has no more memory",
        "disk_bytes" => {
            "lower limits.host_reserve_disk_bytes of the runner, or make room on the disk of its state directory"
        }
        "pids" => "lower limits.host_reserve_pids of the runner, or raise kernel.pid_max of its host",
        "descriptors" => "raise LimitNOFILE in the unit of the runner",
        _ => "raise limits.max_sessions of the runner",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::file::ConfigFile;

    const DEFAULTS: ResourceLimits = ResourceLimits { cpu_millis: 1000, memory_bytes: 100, disk_bytes: 10, pids: 5 };

    fn reserve_of(max_sessions: usize) -> Reserve {
        Reserve { max_sessions, memory_bytes: 1000, disk_bytes: 1000, pids: 1000, descriptors: 1000 }
    }

    fn registry(max_sessions: usize, memory_bytes: u64) -> Registry {
        Registry::new(Reserve { memory_bytes, ..reserve_of(max_sessions) }, DEFAULTS)
    }

    fn id(text: &str) -> SessionId {
        SessionId::new(text).unwrap()
    }

    #[test]
    fn zeros_become_the_operators_defaults() {
        let mut registry = registry(1, 1000);
        let limits = registry.admit(&id("a"), ResourceLimits { pids: 7, ..Default::default() }).unwrap();
        assert_eq!(limits, ResourceLimits { pids: 7, ..DEFAULTS });
    }

    #[test]
    fn refusal_names_limit_and_numbers_and_reserves_nothing() {
        let mut registry = registry(10, 250);
        registry.admit(&id("a"), ResourceLimits::default()).unwrap();
        registry.admit(&id("b"), ResourceLimits::default()).unwrap();
        let failure = registry.admit(&id("c"), ResourceLimits::default()).unwrap_err();
        assert_eq!(failure.message, "memory_bytes: 100 asked, 200 of 250 are reserved by open sessions");
        assert!(failure.retryable && failure.code == Code::Capacity);
        assert_eq!(registry.sessions(), 2);
    }

    #[test]
    fn place_is_free_again_after_release() {
        let mut registry = registry(1, 1000);
        registry.admit(&id("a"), ResourceLimits::default()).unwrap();
        assert!(registry.admit(&id("b"), ResourceLimits::default()).unwrap_err().message.starts_with("sessions: 1"));
        registry.release(&id("a"));
        assert!(registry.admit(&id("b"), ResourceLimits::default()).is_ok());
    }

    #[test]
    fn every_resource_is_reserved_and_the_session_that_finds_too_little_is_refused_by_its_name() {
        let much = reserve_of(9);
        let cases = [
            ("sessions: 1 asked, 1 of 1", Reserve { max_sessions: 1, ..much }),
            ("memory_bytes: 100 asked, 100 of 199", Reserve { memory_bytes: 199, ..much }),
            ("disk_bytes: 10 asked, 10 of 19", Reserve { disk_bytes: 19, ..much }),
            ("pids: 5 asked, 5 of 9", Reserve { pids: 9, ..much }),
            ("descriptors: 16 asked, 16 of 31", Reserve { descriptors: 31, ..much }),
        ];
        for (expected, reserve) in cases {
            let mut registry = Registry::new(reserve, DEFAULTS);
            registry.admit(&id("a"), ResourceLimits::default()).unwrap();
            let failure = registry.admit(&id("b"), ResourceLimits::default()).unwrap_err();
            assert!(failure.message.starts_with(expected) && failure.retryable, "{failure:?}");
            registry.release(&id("a"));
            registry.admit(&id("b"), ResourceLimits::default()).unwrap();
        }
    }

    #[test]
    fn request_above_the_whole_reserve_is_not_retryable_and_names_the_setting_that_exists() {
        let more =
            |limits| Registry::new(Reserve { descriptors: 1, ..reserve_of(1) }, DEFAULTS).admit(&id("a"), limits);
        let most = u64::MAX;
        let cases = [
            ("host_reserve_memory_bytes", ResourceLimits { memory_bytes: most, ..Default::default() }),
            ("host_reserve_disk_bytes", ResourceLimits { disk_bytes: most, ..Default::default() }),
            ("host_reserve_pids", ResourceLimits { pids: most, ..Default::default() }),
        ];
        for (key, limits) in cases {
            let failure = more(limits).unwrap_err();
            assert!(
                !failure.retryable && failure.remediation.contains(&format!("lower limits.{key} of")),
                "{failure:?}"
            );
            ConfigFile::parse("c.toml".as_ref(), &format!("[limits]\n{key} = 1\n")).expect("a key that is known");
        }
        let failure = more(ResourceLimits::default()).unwrap_err();
        assert!(!failure.retryable && failure.remediation.contains("LimitNOFILE"), "{failure:?}");
        let failure = Registry::new(reserve_of(0), DEFAULTS).admit(&id("a"), ResourceLimits::default()).unwrap_err();
        assert!(failure.remediation.contains("raise limits.max_sessions of"), "{failure:?}");
        ConfigFile::parse("c.toml".as_ref(), "[limits]\nmax_sessions = 1\n").expect("a key that is known");
    }
}
