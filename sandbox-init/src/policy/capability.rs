//! Every capability of Linux and who keeps it, with the reason.
//!
//! All of them are capabilities in a user namespace of the sandbox; on the host the sandbox has none. A table and
//! nothing else: the system calls that drop what is not kept are made by the stage that starts a process. A
//! capability newer than the table is kept by nobody, because [`mask`] names what is kept.

/// Whose capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// A workload that is root of its sandbox, so that package managers work.
    Root,
    /// Any other workload: nothing.
    None,
    /// Process 1 and the spawner after the set-up, in the outer user namespace of the sandbox.
    Process1,
}

/// One capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// Its number in `linux/capability.h`.
    pub number: u32,
    /// Its name there without `CAP_`.
    pub name: &'static str,
    root_keeps: bool,
    root_reason: &'static str,
    process_1_reason: Option<&'static str>,
}

/// Whether a profile keeps a capability, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Kept in the bounding, permitted and effective set; otherwise in none.
    pub kept: bool,
    /// Why, in a few words.
    pub reason: &'static str,
}

impl Capability {
    /// The bit in a capability mask.
    #[must_use]
    pub const fn bit(&self) -> u64 {
        1 << self.number
    }

    /// Whether `profile` keeps it, and why.
    #[must_use]
    pub const fn decision(&self, profile: Profile) -> Decision {
        match profile {
            Profile::Root => Decision { kept: self.root_keeps, reason: self.root_reason },
            Profile::None => Decision { kept: false, reason: "the workload is an ordinary user" },
            Profile::Process1 => match self.process_1_reason {
                Some(reason) => Decision { kept: true, reason },
                None => Decision { kept: false, reason: "process 1 has no use for it after the set-up" },
            },
        }
    }

    const fn process_1(self, reason: &'static str) -> Self {
        Self { process_1_reason: Some(reason), ..self }
    }
}

/// All capabilities, ordered by number without a gap.
#[must_use]
pub const fn all() -> &'static [Capability] {
    &CAPABILITIES
}

/// What `profile` keeps.
pub fn kept(profile: Profile) -> impl Iterator<Item = &'static Capability> {
    all().iter().filter(move |capability| capability.decision(profile).kept)
}

/// What `profile` keeps, as the bit mask the kernel uses.
#[must_use]
pub fn mask(profile: Profile) -> u64 {
    kept(profile).fold(0, |mask, capability| mask | capability.bit())
}

/// The reason why `profile` keeps the capability `number`; `None` when it does not.
#[must_use]
pub fn is_kept(profile: Profile, number: u32) -> Option<&'static str> {
    kept(profile).find(|capability| capability.number == number).map(|capability| capability.decision(profile).reason)
}

const fn keep(number: u32, name: &'static str, reason: &'static str) -> Capability {
    Capability { number, name, root_keeps: true, root_reason: reason, process_1_reason: None }
}

const fn drop(number: u32, name: &'static str, reason: &'static str) -> Capability {
    Capability { number, name, root_keeps: false, root_reason: reason, process_1_reason: None }
}

/// `keep` and `drop` speak of [`Profile::Root`].
#[rustfmt::skip]
const CAPABILITIES: [Capability; 41] = [
    keep(0, "CHOWN", "package managers give the files they unpack to other users of the sandbox"),
    keep(1, "DAC_OVERRIDE", "root opens every file of its own rootfs; ids outside of the map stay out of reach"),
    drop(2, "DAC_READ_SEARCH", "opens files by handle, which has led out of containers; DAC_OVERRIDE suffices"),
    keep(3, "FOWNER", "package managers change modes and times of files they gave to other users"),
    keep(4, "FSETID", "keeps the set-id bits of installed files; the mount makes them inert"),
    keep(5, "KILL", "root stops services it started as other users; process 1 is in another user namespace")
        .process_1("ends calls, which run under the ids of the workload"),
    keep(6, "SETGID", "services and package managers change to their own group; only mapped groups exist")
        .process_1("takes the workload's groups before a call starts"),
    keep(7, "SETUID", "services and package managers change to their own user; only mapped users exist")
        .process_1("takes the workload's user before a call starts"),
    drop(8, "SETPCAP", "changes bounding sets and securebits, which are final once the workload runs")
        .process_1("drops the bounding set of a call, which entering a user namespace has filled"),
    drop(9, "LINUX_IMMUTABLE", "immutable files would survive the removal of the sandbox"),
    keep(10, "NET_BIND_SERVICE", "servers under test listen on low ports of the sandbox's own network"),
    drop(11, "NET_BROADCAST", "the kernel does not use it"),
    drop(12, "NET_ADMIN", "changes the addresses, routes and egress rules that confine the sandbox"),
    drop(13, "NET_RAW", "forges and captures packets; ping works by datagram sockets"),
    drop(14, "IPC_LOCK", "locked memory cannot be reclaimed; the limit allows everybody a small amount"),
    drop(15, "IPC_OWNER", "shared memory of other users is no part of installing packages"),
    drop(16, "SYS_MODULE", "kernel modules belong to the host"),
    drop(17, "SYS_RAWIO", "hardware ports and physical memory belong to the host"),
    keep(18, "SYS_CHROOT", "debootstrap and package scripts use it; the mount namespace is what confines"),
    drop(19, "SYS_PTRACE", "debuggers trace the caller's own processes without it"),
    drop(20, "SYS_PACCT", "process accounting belongs to the host"),
    drop(21, "SYS_ADMIN", "mounts, namespaces and much else: the largest part of the kernel's surface")
        .process_1("enters the workload's user namespace, for which the kernel asks nothing less"),
    drop(22, "SYS_BOOT", "the machine belongs to the host"),
    drop(23, "SYS_NICE", "real-time and negative priorities take processor time from neighbours"),
    drop(24, "SYS_RESOURCE", "lifts the limits that are set on the sandbox"),
    drop(25, "SYS_TIME", "the clock belongs to the host"),
    drop(26, "SYS_TTY_CONFIG", "hangs up the terminals of others"),
    drop(27, "MKNOD", "makes device nodes; the kernel refuses that in a user namespace, and /dev is complete"),
    drop(28, "LEASE", "a lease on another user's file delays whoever opens it"),
    drop(29, "AUDIT_WRITE", "forges entries in the audit log of the host; login tools go on without it"),
    drop(30, "AUDIT_CONTROL", "the audit rules belong to the host"),
    drop(31, "SETFCAP", "file capabilities would be kept in a saved tree; package scripts fall back to set-id bits"),
    drop(32, "MAC_OVERRIDE", "mandatory access rules belong to the host"),
    drop(33, "MAC_ADMIN", "mandatory access rules belong to the host"),
    drop(34, "SYSLOG", "the kernel log tells addresses and neighbours"),
    drop(35, "WAKE_ALARM", "power management belongs to the host"),
    drop(36, "BLOCK_SUSPEND", "power management belongs to the host"),
    drop(37, "AUDIT_READ", "the audit log of the host tells about neighbours"),
    drop(38, "PERFMON", "performance counters measure the kernel and neighbours"),
    drop(39, "BPF", "loads programs into the kernel"),
    drop(40, "CHECKPOINT_RESTORE", "chooses pids and reads the memory maps of other processes"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_exactly_these() {
        assert_eq!(mask(Profile::Root), 0x404fb);
        assert_eq!(mask(Profile::None), 0);
        // KILL, SETGID, SETUID, SETPCAP, SYS_ADMIN.
        assert_eq!(mask(Profile::Process1), 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 21);
    }

    #[test]
    fn every_capability_is_listed_once_in_order_with_a_reason_for_every_profile() {
        for (number, capability) in all().iter().enumerate() {
            assert_eq!(capability.number as usize, number, "{}", capability.name);
            for profile in [Profile::Root, Profile::None, Profile::Process1] {
                assert!(!capability.decision(profile).reason.is_empty(), "{} {profile:?}", capability.name);
            }
        }
    }

    #[test]
    fn every_capability_of_the_running_kernel_has_a_line() {
        let newest = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").expect("the newest capability");
        let newest: usize = newest.trim().parse().expect("a number");
        assert!(newest < all().len(), "capability {newest} has no line and no reason here");
    }

    #[test]
    fn a_kept_capability_has_a_reason_and_a_dropped_or_unknown_one_has_none() {
        assert!(is_kept(Profile::Root, 0).is_some());
        assert_eq!(is_kept(Profile::Root, 21), None);
        assert!(is_kept(Profile::Process1, 21).is_some());
        assert_eq!(is_kept(Profile::None, 0), None);
        assert_eq!(is_kept(Profile::Root, 63), None);
    }

    #[test]
    fn no_workload_keeps_what_leads_out_of_a_sandbox() {
        let dangerous = [
            "SYS_ADMIN",
            "SYS_PTRACE",
            "SYS_MODULE",
            "SYS_RAWIO",
            "SYS_RESOURCE",
            "SYS_TIME",
            "NET_ADMIN",
            "NET_RAW",
            "MKNOD",
            "SETPCAP",
            "SETFCAP",
            "DAC_READ_SEARCH",
            "BPF",
            "PERFMON",
            "CHECKPOINT_RESTORE",
        ];
        for name in dangerous {
            let capability = all().iter().find(|capability| capability.name == name).expect("a capability");
            assert!(!capability.decision(Profile::Root).kept, "{name}");
        }
    }
}
