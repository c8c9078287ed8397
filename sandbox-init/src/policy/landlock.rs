//! The landlock domain of a sandbox: one ruleset, entered once by the spawner and inherited by all that runs below it.
//!
//! It is the second fence behind the mounts. It keeps writes where the profile says, refuses `mount` in any form,
//! device nodes, from ABI 5 on device commands outside of `/dev`, and from ABI 6 on abstract unix sockets and signals
//! across the border of the domain: so nothing inside can signal process 1, whatever ids are in use. The 0:0 node, which
//! an overlay takes for "deleted", is a device node to some kernels and a regular file to others; it hides nothing but
//! a file of the same sandbox.
//!
//! What the domain forbids includes opening files that are not below the root, whoever holds the directory: a process
//! inside cannot open `cgroup.procs` of its slot, but can use a descriptor that was opened outside. The spawner is
//! inside and is protected by its ids, or by seccomp where ids are shared.
//!
//! Uses the highest ABI that both the kernel and this code know, never ABI 1: that one refuses every rename between
//! directories, which breaks package managers and compilers. Does not restrict TCP; the network namespace does.
//! Never follows a symbolic link of the image when it opens a directory to grant.

mod nested;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, Erratum, PathBeneath, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope, make_bitflags,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

pub use nested::prepare_nested;

use super::Profile;
use crate::sys;

/// The newest ABI whose rights this file grants. A newer kernel is used as if it had this one.
const NEWEST: ABI = ABI::V9;

/// Below the root, what a strict sandbox may change. The rest is read and executed only.
const STRICT_WRITABLE: [&str; 6] = ["workspace", "tmp", "dev/shm", "home", "var/tmp", "run"];

/// The directory whose nodes take device commands: terminals need them, and the set of nodes is ours.
const DEVICES: &str = "dev";

/// Why landlock could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The root, or a directory to grant, cannot be opened.
    #[error("cannot open {} for the landlock ruleset", path.display())]
    Open {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: nix::Error,
    },
    /// The kernel refused the ruleset or a rule.
    #[error("cannot build the landlock ruleset of profile {}", profile.name())]
    Build {
        /// Whose ruleset.
        profile: Profile,
        /// Why.
        source: RulesetError,
    },
    /// The kernel refused to apply it.
    #[error("cannot enter the landlock domain")]
    Enter {
        /// Why.
        source: RulesetError,
    },
    /// The kernel has landlock, but the ruleset ended up empty.
    #[error("the landlock domain was not entered although the kernel offers ABI {abi}")]
    Ignored {
        /// What it offers.
        abi: i32,
    },
}

/// Why a kernel gets no domain at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotApplied {
    /// The kernel has no landlock, or it is not enabled.
    Unavailable(Errno),
    /// ABI 1 forbids renames between directories.
    RenamesForbidden,
}

impl NotApplied {
    /// What the kernel answers; for ABI 1 that is what a rename would be answered with.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::Unavailable(errno) => errno,
            Self::RenamesForbidden => Errno::EXDEV,
        }
    }
}

/// What a kernel before ABI 6 answers to a ruleset with scopes: a field that it does not know (landlock_create_ruleset(2)).
pub const WITHOUT_SCOPES: Errno = Errno::E2BIG;

impl std::fmt::Display for NotApplied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unavailable(Errno::EOPNOTSUPP) => {
                f.write_str("landlock is not enabled: add it to the lsm= boot option")
            }
            Self::Unavailable(Errno::ENOSYS) => f.write_str(
                "this kernel has no landlock, or a system call filter hides it: Linux 5.19 with CONFIG_SECURITY_LANDLOCK is needed",
            ),
            Self::Unavailable(errno) => {
                write!(f, "landlock cannot be used here ({errno}): let the system call filter of the container pass it")
            }
            Self::RenamesForbidden => {
                f.write_str("landlock ABI 1 forbids renames between directories: Linux 5.19 is needed")
            }
        }
    }
}

/// What is enforced, for the receipt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Achieved {
    /// The ABI in use; 0 when nothing is.
    pub abi: i32,
    /// What the kernel offers, which may be newer.
    pub kernel_abi: Option<i32>,
    /// Why nothing is in use.
    pub not_applied: Option<NotApplied>,
    /// Truncation counts as a write (ABI 3).
    pub truncate: bool,
    /// Device commands are refused outside of `/dev` (ABI 5).
    pub ioctl_dev: bool,
    /// Abstract unix sockets and signals end at the border of the domain (ABI 6).
    pub scopes: bool,
    /// Known faults of landlock that the kernel says it has repaired, as its bit mask.
    pub repaired_errata: u32,
    /// Directories of the profile that are absent, links or no directories in this root, and were not granted.
    pub not_granted: Vec<&'static str>,
}

/// A ruleset that is complete but not yet in force.
#[derive(Debug)]
pub struct Prepared {
    ruleset: Option<RulesetCreated>,
    achieved: Achieved,
}

/// The landlock ABI of the running kernel, `None` where it has none.
#[must_use]
pub fn kernel_abi() -> Option<i32> {
    sys::landlock::abi().ok()
}

/// What the running kernel lets us enforce.
#[must_use]
pub fn offered_here() -> Achieved {
    offered(sys::landlock::abi())
}

/// Builds the domain of `profile` over the tree at `root`, which is `/` after the root has been changed.
///
/// Restricts nothing yet. The directories are opened here, so later changes of the tree cannot move the rules.
///
/// # Errors
/// [`LandlockError::Open`] when `root` itself cannot be opened, or a directory for another reason than its shape;
/// [`LandlockError::Build`] when the kernel refuses. A kernel without usable landlock is no error: [`Achieved`] says
/// so.
pub fn prepare(profile: Profile, root: &Path) -> Result<Prepared, LandlockError> {
    let mut achieved = offered_here();
    if achieved.abi == 0 {
        return Ok(Prepared { ruleset: None, achieved });
    }
    achieved.repaired_errata = Erratum::current().bits();

    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let tree =
        open(root, flags, Mode::empty()).map_err(|source| LandlockError::Open { path: root.to_path_buf(), source })?;
    let mut grants = Vec::new();
    for (directory, access) in grants_below_root(profile) {
        let how = OpenHow::new().flags(flags).resolve(
            ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
        match openat2(&tree, directory, how) {
            Ok(opened) => grants.push((opened, access)),
            Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR) => achieved.not_granted.push(directory),
            Err(source) => return Err(LandlockError::Open { path: root.join(directory), source }),
        }
    }
    grants.push((tree, access_to_root(profile)));

    let ruleset = build(grants).map_err(|source| LandlockError::Build { profile, source })?;
    Ok(Prepared { ruleset: Some(ruleset), achieved })
}

impl Prepared {
    /// What will be in force after [`Self::restrict_self`].
    #[must_use]
    pub fn achieved(&self) -> &Achieved {
        &self.achieved
    }

    /// Puts the calling thread, and all it starts from now on, into the domain. There is no way back.
    ///
    /// Sets `no_new_privs`, which the kernel demands. The caller is single-threaded: other threads stay outside.
    ///
    /// # Errors
    /// [`LandlockError::Enter`] when the kernel refuses, [`LandlockError::Ignored`] when it had no effect.
    pub fn restrict_self(self) -> Result<Achieved, LandlockError> {
        let Some(ruleset) = self.ruleset else { return Ok(self.achieved) };
        let status = ruleset.restrict_self().map_err(|source| LandlockError::Enter { source })?;
        match status.ruleset {
            RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(self.achieved),
            RulesetStatus::NotEnforced => Err(LandlockError::Ignored { abi: self.achieved.abi }),
        }
    }
}

/// What a kernel with this answer to the version question lets us enforce.
fn offered(kernel: nix::Result<i32>) -> Achieved {
    let (abi, not_applied) = match kernel {
        Err(errno) => (0, Some(NotApplied::Unavailable(errno))),
        Ok(..=1) => (0, Some(NotApplied::RenamesForbidden)),
        Ok(abi) => (abi.min(NEWEST as i32), None),
    };
    Achieved {
        abi,
        kernel_abi: kernel.ok(),
        not_applied,
        truncate: abi >= 3,
        ioctl_dev: abi >= 5,
        scopes: abi >= 6,
        repaired_errata: 0,
        not_granted: Vec::new(),
    }
}

/// Reading and changing files and directories, without device nodes and device commands.
fn access_for_writing() -> BitFlags<AccessFs> {
    let withheld = make_bitflags!(AccessFs::{MakeChar | MakeBlock | IoctlDev});
    AccessFs::from_all(NEWEST) & !withheld
}

fn access_to_root(profile: Profile) -> BitFlags<AccessFs> {
    match profile {
        // The rootfs is the sandbox's own copy; what must not change in it is read-only by its mount.
        Profile::Standard => access_for_writing(),
        Profile::Strict => AccessFs::from_read(NEWEST),
    }
}

fn grants_below_root(profile: Profile) -> Vec<(&'static str, BitFlags<AccessFs>)> {
    let devices = make_bitflags!(AccessFs::{ReadFile | ReadDir | WriteFile | Truncate | IoctlDev});
    let mut grants = vec![(DEVICES, devices)];
    if profile == Profile::Strict {
        grants.extend(STRICT_WRITABLE.map(|directory| (directory, access_for_writing())));
    }
    grants
}

fn build(grants: Vec<(OwnedFd, BitFlags<AccessFs>)>) -> Result<RulesetCreated, RulesetError> {
    let mut ruleset =
        Ruleset::default().handle_access(AccessFs::from_all(NEWEST))?.scope(Scope::from_all(NEWEST))?.create()?;
    for (directory, access) in grants {
        ruleset = ruleset.add_rule(PathBeneath::new(directory, access))?;
    }
    Ok(ruleset)
}

#[cfg(test)]
mod tests;
