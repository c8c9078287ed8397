//! Whom the runner runs as, and how it stops being root.
//!
//! A runner that was started as root starts the launcher and then becomes the user `sandbox-runner`, or, where that does
//! not exist, the first id of the sandboxes' range, which the launcher gives to no sandbox. Never `nobody`: other services
//! use it. The user database is read from `/etc/passwd` directly, since a static program must not load name services.

use std::fs;
use std::io;

use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

use super::home::Identity;

const USER: &str = "sandbox-runner";

/// Why root could not be given up.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A step was refused.
    #[error("cannot give up root privilege: {step} failed")]
    Drop {
        /// Which.
        step: &'static str,
        /// The kernel's answer.
        source: nix::Error,
    },
    /// The steps were accepted, and still root can be had back.
    #[error("gave up root privilege, but the kernel still allows to regain it")]
    StillPrivileged,
}

/// The identity the runner will have: its own when it is not root.
pub fn runner_identity(first_range_id: u32) -> Identity {
    let own = geteuid();
    if !own.is_root() {
        return Identity { uid: own.as_raw(), gid: nix::unistd::getegid().as_raw() };
    }
    let listed = fs::read_to_string("/etc/passwd").or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(String::new()),
        _ => Err(error),
    });
    listed
        .ok()
        .and_then(|passwd| find_user(&passwd, USER))
        .unwrap_or(Identity { uid: first_range_id, gid: first_range_id })
}

/// Becomes `target` for good. Must be called while the process has one thread.
///
/// # Errors
/// [`IdentityError`]; the caller must end, because it may be half way.
pub fn become_identity(target: Identity) -> Result<(), IdentityError> {
    if geteuid().as_raw() == target.uid {
        return Ok(());
    }
    let step = |step| move |source| IdentityError::Drop { step, source };
    let (uid, gid) = (Uid::from_raw(target.uid), Gid::from_raw(target.gid));
    setgroups(&[]).map_err(step("setgroups"))?;
    setresgid(gid, gid, gid).map_err(step("setresgid"))?;
    setresuid(uid, uid, uid).map_err(step("setresuid"))?;
    nix::sys::prctl::set_no_new_privs().map_err(step("no_new_privs"))?;
    // The post-condition is tried, not assumed.
    let regained = setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_ok();
    if regained || geteuid() != uid { Err(IdentityError::StillPrivileged) } else { Ok(()) }
}

fn find_user(passwd: &str, name: &str) -> Option<Identity> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields[0] == name)?;
    let identity = Identity { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? };
    // An account that is root under another name would defeat the purpose.
    (identity.uid != 0 && identity.gid != 0).then_some(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dedicated_user_is_found_in_the_user_database() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nsandbox-runner:x:991:990::/nonexistent:/usr/sbin/nologin\n";

        assert_eq!(find_user(passwd, USER), Some(Identity { uid: 991, gid: 990 }));
    }

    #[test]
    fn missing_broken_and_root_entries_are_no_user() {
        for passwd in ["", "root:x:0:0:::", "sandbox-runner:x:0:990::", "sandbox-runner", "sandbox-runner:x:a:b::"] {
            assert_eq!(find_user(passwd, USER), None, "{passwd}");
        }
    }
}
