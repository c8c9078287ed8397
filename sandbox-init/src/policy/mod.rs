//! What a workload may do, as data: one table per mechanism, a reason per line.
//!
//! - [`seccomp`]: every system call of both architectures and what happens to it.
//! - [`landlock`]: which parts of the tree may be written, and what may be reached outside of it.
//! - [`capability`]: every capability, and who keeps it.
//!
//! Nothing here reads a file of the image or a request: a launch request names a profile, the meaning is compiled in.

pub mod capability;
pub mod landlock;
pub mod seccomp;

/// How much a workload is trusted to use, for seccomp and landlock alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Development work: package managers, debuggers, browsers with their own sandbox. The whole rootfs is writable.
    Standard,
    /// Running something and looking at the result: no debugger, no `chroot`, no netlink, few writable directories.
    Strict,
}

impl Profile {
    /// Both profiles, for tables and tests.
    pub const ALL: [Self; 2] = [Self::Standard, Self::Strict];

    /// The name a policy file or a receipt uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Strict => "strict",
        }
    }

    /// The profile called `name`, `None` when there is none.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|profile| profile.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_is_found_by_its_own_name_and_by_no_other() {
        for profile in Profile::ALL {
            assert_eq!(Profile::from_name(profile.name()), Some(profile));
        }
        assert_eq!(Profile::from_name("Standard"), None);
        assert_eq!(Profile::from_name(""), None);
    }
}
