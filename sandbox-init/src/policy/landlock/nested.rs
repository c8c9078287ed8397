//! The domain of a sandbox without namespaces: the only wall between the workload and the files of its container.
//!
//! Grants what programs need to run, read-only, and the sandbox's own directories. Everything else of the container is out
//! of reach: configuration, keys, state and sockets of the runner, the files of other users, `/tmp`. What landlock does not
//! cover is left to user ids: names and attributes of files can be seen where directories let others search them.

use std::os::fd::OwnedFd;
use std::path::Path;

use landlock::{
    Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetError, Scope, make_bitflags,
};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};

use super::{LandlockError, NEWEST, Prepared, access_for_writing, offered_here};
use crate::policy::Profile;

/// Programs and libraries.
const PROGRAMS: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];

/// What programs read to run. Of `/proc` the kernel shows nobody the memory, environment and descriptors of another user.
const READABLE: [&str; 18] = [
    "/proc",
    "/etc/alternatives",
    "/etc/debian_version",
    "/etc/group",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/magic",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/passwd",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/terminfo",
    "/etc/timezone",
];

/// Nodes without a way to anybody else.
const DEVICES: [&str; 6] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// Builds the domain around `directory`, the sandbox's own, of which `writable` may be changed.
///
/// # Errors
/// As [`super::prepare`].
pub fn prepare_nested(profile: Profile, directory: &Path, writable: &[&str]) -> Result<Prepared, LandlockError> {
    let mut achieved = offered_here();
    if achieved.abi == 0 {
        return Ok(Prepared { ruleset: None, achieved });
    }
    achieved.repaired_errata = landlock::Erratum::current().bits();
    let execute = AccessFs::from_read(NEWEST);
    let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
    let device = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
    let exchange = make_bitflags!(AccessFs::{ReadFile | WriteFile});
    let mut grants = Vec::new();
    for (paths, access) in [(&PROGRAMS[..], execute), (&READABLE[..], read), (&DEVICES[..], device)] {
        for path in paths {
            match grant(Path::new(path), access) {
                Ok(granted) => grants.push(granted),
                Err(Errno::ENOENT | Errno::ENOTDIR) => achieved.not_granted.push(path),
                Err(source) => return Err(LandlockError::Open { path: path.into(), source }),
            }
        }
    }
    let own = writable.iter().map(|name| (*name, access_for_writing())).chain([("output", read), ("call", exchange)]);
    for (name, access) in own {
        let path = directory.join(name);
        grants.push(grant(&path, access).map_err(|source| LandlockError::Open { path, source })?);
    }
    let ruleset = build(grants).map_err(|source| LandlockError::Build { profile, source })?;
    Ok(Prepared { ruleset: Some(ruleset), achieved })
}

/// The container's own tree is the operator's, so its links are followed.
fn grant(path: &Path, access: BitFlags<AccessFs>) -> nix::Result<(OwnedFd, BitFlags<AccessFs>)> {
    let opened = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let kind = SFlag::from_bits_truncate(fstat(&opened)?.st_mode & SFlag::S_IFMT.bits());
    // The kernel refuses rights over directories on a file.
    let access = if kind == SFlag::S_IFDIR { access } else { access & AccessFs::from_file(NEWEST) };
    Ok((opened, access))
}

fn build(grants: Vec<(OwnedFd, BitFlags<AccessFs>)>) -> Result<RulesetCreated, RulesetError> {
    // No port is granted: where TCP is covered (ABI 4), it is refused a second time.
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (path, access) in grants {
        ruleset = ruleset.add_rule(PathBeneath::new(path, access))?;
    }
    Ok(ruleset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::ErrorKind;

    #[test]
    fn only_programs_and_the_own_directories_are_in_reach() {
        let (own, other) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        for name in ["workspace", "output", "call"] {
            fs::create_dir(own.path().join(name)).expect("a directory");
        }
        fs::write(own.path().join("output/1"), "x").expect("a file");
        fs::write(other.path().join("secret"), "x").expect("a file");
        let prepared = prepare_nested(Profile::Standard, own.path(), &["workspace"]).expect("a ruleset");
        let (own, secret) = (own.path().to_owned(), other.path().join("secret"));
        let answers = std::thread::spawn(move || {
            prepared.restrict_self().expect("the domain");
            let kind = |result: std::io::Result<()>| result.err().map(|error| error.kind());
            [
                kind(fs::write(own.join("workspace/a"), "x")),
                kind(fs::read(own.join("output/1")).map(drop)),
                kind(fs::read("/proc/self/stat").map(drop)),
                kind(fs::read_dir("/usr").map(drop)),
                kind(fs::write(own.join("output/1"), "y")),
                kind(fs::write(own.join("b"), "x")),
                kind(fs::read(secret).map(drop)),
                kind(fs::read_dir("/tmp").map(drop)),
                kind(fs::read_dir("/etc").map(drop)),
                kind(std::net::TcpListener::bind("127.0.0.1:0").map(drop)),
            ]
        })
        .join()
        .expect("the confined thread");
        let (reached, refused) = answers.split_at(4);
        assert_eq!(reached, [None; 4]);
        assert_eq!(refused, [Some(ErrorKind::PermissionDenied); 6]);
    }
}
