//! Resource limits that every process of the sandbox inherits. Lowering only, so no capability is needed.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

use super::StageError;

/// Resource, name, most.
const LIMITS: [(Resource, &str, u64); 7] = [
    // Counted for the user that made the user namespace, which is the launcher's.
    (Resource::RLIMIT_SIGPENDING, "pending signals", 4096),
    // core_pattern is not namespaced: a handler named there would run on the host, as root, even with a limit of 0. One byte
    // is what the kernel takes for "no handler either" (core(5), "piping core dumps to a program"), and no core fits into it.
    (Resource::RLIMIT_CORE, "core size", 1),
    (Resource::RLIMIT_NOFILE, "open files", 65_536),
    (Resource::RLIMIT_MEMLOCK, "locked memory", 8 << 20),
    // POSIX queues are charged to the user, not to the memory cgroup.
    (Resource::RLIMIT_MSGQUEUE, "message queues", 0),
    (Resource::RLIMIT_RTPRIO, "real-time priority", 0),
    (Resource::RLIMIT_NICE, "nice ceiling", 0),
];

/// Applies the limits to this process.
///
/// # Errors
/// [`StageError`] names the limit.
pub fn apply() -> Result<(), StageError> {
    for (resource, name, most) in LIMITS {
        let refused = |source| StageError { step: format!("limit {name}"), source };
        let (_, hard) = getrlimit(resource).map_err(refused)?;
        let value = if hard == RLIM_INFINITY { most } else { hard.min(most) };
        setrlimit(resource, value, value).map_err(refused)?;
    }
    Ok(())
}

/// What stands in for cgroups where there are none: the number of processes of the workload's user, and what one process or
/// one file may take. The kernel counts processes per user, so neither process 1 nor the container is part of it.
///
/// # Errors
/// [`StageError`] names the limit.
pub fn apply_nested(nested: &crate::boot::Nested) -> Result<(), StageError> {
    for (resource, name, most) in [
        (Resource::RLIMIT_NPROC, "processes", nested.pids),
        (Resource::RLIMIT_DATA, "private memory", nested.memory_bytes),
        (Resource::RLIMIT_FSIZE, "file size", nested.file_bytes),
    ] {
        let refused = |source| StageError { step: format!("limit {name}"), source };
        let (_, hard) = getrlimit(resource).map_err(refused)?;
        let value = hard.min(most);
        setrlimit(resource, value, value).map_err(refused)?;
    }
    Ok(())
}

/// `oom_score_adj` of the workload: when memory is short the kernel takes one of its processes before process 1.
pub const WORKLOAD_OOM_SCORE: i32 = 500;

/// The own `/proc/self/oom_score_adj`, opened while this process may still open it; children inherit the value.
#[derive(Debug)]
pub struct OomScore(Option<std::fs::File>);

impl OomScore {
    /// Opens it. A host that refuses costs a preference, not a limit.
    #[must_use]
    pub fn open() -> Self {
        Self(std::fs::File::options().write(true).open("/proc/self/oom_score_adj").ok())
    }

    /// Sets it. Raising is always allowed, and so is going back to where it was.
    pub fn set(&self, value: i32) {
        use std::io::Write;
        if let Some(mut file) = self.0.as_ref() {
            let _ = file.write_all(value.to_string().as_bytes());
        }
    }
}
