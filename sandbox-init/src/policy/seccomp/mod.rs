//! The seccomp policy: every system call of both architectures, its answer and the reason, and the filters that say so.
//!
//! The policy is an allowlist in source: `table` names every system call up to the newest of Linux 6.18 and what
//! happens to it. What the table does not name does not exist for the workload (`ENOSYS`), so that a C library falls
//! back as it would on an older kernel. [`verdict`] is the meaning, read from the table; [`filters`] is the same in
//! BPF.
//!
//! Two filters are stacked, because the rule that forbids loading filters can only be in the one that is loaded last:
//!
//! - the **first** refuses (`EPERM` and the socket errnos) and allows the rest;
//! - the **last** says `ENOSYS` for what does not exist, and in the strict profile refuses further filters, which the
//!   first could not do without refusing the last one.
//!
//! Both kill a process that enters with the numbers of another architecture (`int 0x80` on x86_64); x32 numbers are
//! above the newest known one and therefore do not exist. Of two errnos the kernel takes the one of the filter loaded
//! last; so the first may answer anything to calls that do not exist, which makes it shorter.
//!
//! The kernel runs a filter once per system call number when it is loaded, so the cost of loading is the length of
//! the path and not of the program: `emit` writes a binary search over ranges instead of a chain of comparisons. On
//! x86_64 the standard profile takes 112 + 34 instructions (longest path 25 + 11), with a shared identity 170 + 34,
//! the strict profile 109 + 33; on aarch64 114 + 21. The same as a plain allowlist of one comparison per call takes
//! about 2,000 instructions and seven times as long to load (0.85 ms instead of 0.12).
//!
//! Never decides on memory behind a pointer, never kills for a policy decision: tools get an errno they can report.

mod argument;
mod emit;
#[cfg(test)]
mod interpret;
mod rule;
mod table;
#[cfg(test)]
mod tests;

use nix::errno::Errno;
pub use seccompiler::BpfProgram;

use super::Profile;
use rule::{ABSENT, Decision};
use table::SYSTEM_CALLS;

/// A processor architecture, native 64 bit calls only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// x86_64 without x32.
    X86_64,
    /// aarch64.
    Aarch64,
}

impl Arch {
    /// The architecture this program is built for.
    #[cfg(target_arch = "x86_64")]
    pub const NATIVE: Self = Self::X86_64;
    /// The architecture this program is built for.
    #[cfg(target_arch = "aarch64")]
    pub const NATIVE: Self = Self::Aarch64;

    /// `AUDIT_ARCH_*`, which the kernel puts into the data a filter sees.
    const fn audit(self) -> u32 {
        match self {
            Self::X86_64 => 0xc000_003e,
            Self::Aarch64 => 0xc000_00b7,
        }
    }
}

/// What the policy depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// How much the workload may use.
    pub profile: Profile,
    /// The workload has the host user id of process 1, because the host gives us a single id. Then the kernel's own
    /// permission checks do not protect process 1 and the spawner (pids 1 and 2), and the filter does it instead.
    pub shared_identity: bool,
    /// The workload is in the network and IPC namespaces of the container around it, because none can be made. Then the
    /// filter keeps it from every socket that leads out of its own processes, and from System V IPC.
    pub no_namespaces: bool,
}

/// The answer to one system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The kernel goes on; its own checks still apply.
    Allow,
    /// The call fails with this error and has no effect.
    Errno(Errno),
}

/// What the policy answers to `number` with `arguments`: the meaning of the table, without BPF.
#[must_use]
pub fn verdict(arch: Arch, options: &Options, number: u32, arguments: &[u64; 6]) -> Verdict {
    SYSTEM_CALLS
        .iter()
        .find(|call| call.number(arch) == Some(number))
        .map_or(ABSENT, |call| call.rule.resolve(options).verdict(arguments))
}

/// One system call of the policy, for people and for probers that go through all numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its name in the kernel.
    pub name: &'static str,
    /// Its number on the architecture that was asked for.
    pub number: u32,
    /// Why it is treated as it is; empty where it is plainly allowed.
    pub reason: &'static str,
}

/// Every system call the policy knows on `arch`, ordered as the kernel's table of x86_64.
pub fn entries(arch: Arch) -> impl Iterator<Item = Entry> {
    SYSTEM_CALLS
        .iter()
        .filter_map(move |call| Some(Entry { name: call.name, number: call.number(arch)?, reason: call.reason }))
}

/// The two filters, in the order in which they must be loaded.
#[must_use]
pub fn filters(arch: Arch, options: &Options) -> [BpfProgram; 2] {
    let decisions = decisions(arch, options);
    let first = decisions.iter().map(|entry| match entry {
        // The last filter says ENOSYS, whatever the first one says.
        None | Some((Decision::Fixed(ABSENT), _)) => None,
        // The last filter must be free to allow, and to be loaded.
        Some((_, true)) => Some(Decision::Fixed(Verdict::Allow)),
        Some((decision, false)) => Some(decision.clone()),
    });
    let last = decisions.iter().map(|entry| match entry {
        None => Some(Decision::Fixed(ABSENT)),
        Some((decision, true)) => Some(decision.clone()),
        // An errno of the last filter would win over the first one's.
        Some((_, false)) => Some(Decision::Fixed(Verdict::Allow)),
    });
    [emit::program(arch, first, Verdict::Allow), emit::program(arch, last, ABSENT)]
}

/// By number: the decision, and whether it is the last filter's. `None` where no system call has the number.
fn decisions(arch: Arch, options: &Options) -> Vec<Option<(Decision, bool)>> {
    let newest = SYSTEM_CALLS.iter().filter_map(|call| call.number(arch)).max().unwrap_or(0);
    let mut decisions = vec![None; newest as usize + 1];
    for call in SYSTEM_CALLS {
        let Some(number) = call.number(arch) else { continue };
        let decision = call.rule.resolve(options);
        let in_last = call.in_last_filter || decision == Decision::Fixed(ABSENT);
        decisions[number as usize] = Some((decision, in_last));
    }
    decisions
}
