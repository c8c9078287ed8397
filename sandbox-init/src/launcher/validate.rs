//! Checks a request against the policy. Pure: no file, no clock.
//!
//! Everything that comes out of here is a name that the policy knows, a number within its bounds, or bytes that are only
//! ever environment or a host name. The rest of the launcher takes [`Checked`] and never looks at the request again.

use std::path::PathBuf;

use proto::launch::v1::{CreateSandbox, Failure, Network, create_sandbox::Rootfs};

use super::host::place;
use super::policy_file::{Limits, Policy, Profile};

/// A request that the policy allows.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The sandbox.
    pub sandbox_id: String,
    /// What it gets.
    pub profile: Profile,
    /// The lower directory in the trimmed namespace.
    pub lower: PathBuf,
    /// The lower is our skeleton and the host's own directories are mounted over it.
    pub host_rootfs: bool,
    /// Limits after defaults.
    pub limits: Limits,
    /// Name, read-only, target of each volume.
    pub volumes: Vec<CheckedVolume>,
    /// Changes need not outlive the sandbox.
    pub ephemeral: bool,
    /// Milliseconds without a runner.
    pub orphan_timeout_ms: u64,
    /// `NAME=value`.
    pub environment: Vec<Vec<u8>>,
    /// Absolute.
    pub working_directory: String,
    /// Host name.
    pub hostname: String,
}

/// A volume that the policy allows.
#[derive(Clone, Debug)]
pub struct CheckedVolume {
    /// Source in the trimmed namespace.
    pub source: PathBuf,
    /// Absolute target inside.
    pub target: String,
    /// Mounted read-only.
    pub read_only: bool,
}

/// Bytes of environment a sandbox may start with.
const MAX_ENVIRONMENT_BYTES: usize = 32 * 1024;
/// Volumes of one sandbox.
const MAX_VOLUMES: usize = 16;

/// A refusal with the field and the fix.
#[must_use]
pub fn refusal(code: &str, message: impl Into<String>, remediation: impl Into<String>) -> Failure {
    Failure { code: code.to_owned(), message: message.into(), errno: 0, remediation: remediation.into() }
}

fn invalid(message: impl Into<String>, remediation: impl Into<String>) -> Failure {
    refusal("INVALID_FIELD", message, remediation)
}

fn not_allowed(message: impl Into<String>, remediation: impl Into<String>) -> Failure {
    refusal("NOT_ALLOWED", message, remediation)
}

/// A name that can be part of a file name: letters, digits, dash, underscore.
fn is_name(text: &str, most: usize) -> bool {
    !text.is_empty()
        && text.len() <= most
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// Checks a request.
///
/// # Errors
/// The refusal to send back.
pub fn check(request: &CreateSandbox, policy: &Policy) -> Result<Checked, Failure> {
    if !is_name(&request.sandbox_id, 64) {
        return Err(invalid("sandbox_id must be 1 to 64 characters of [A-Za-z0-9_-]", "choose another sandbox_id"));
    }
    let profile = policy.profiles.get(&request.profile).ok_or_else(|| {
        not_allowed(
            format!("profile {:?} is not in the launcher's policy", request.profile),
            "name a profile of the policy file or add one",
        )
    })?;
    let (lower, host_rootfs) = check_rootfs(request, policy)?;
    Ok(Checked {
        sandbox_id: request.sandbox_id.clone(),
        profile: profile.clone(),
        lower,
        host_rootfs,
        limits: check_limits(request, profile)?,
        volumes: check_volumes(request, policy)?,
        ephemeral: request.ephemeral,
        orphan_timeout_ms: check_orphan_timeout(request, policy)?,
        environment: check_environment(request)?,
        working_directory: check_working_directory(request)?,
        hostname: check_hostname(request)?,
    })
}

fn check_rootfs(request: &CreateSandbox, policy: &Policy) -> Result<(PathBuf, bool), Failure> {
    if !matches!(Network::try_from(request.network), Ok(Network::Unspecified | Network::None)) {
        return Err(invalid(format!("network {} is unknown", request.network), "use NETWORK_NONE"));
    }
    match &request.rootfs {
        Some(Rootfs::Host(_)) => Ok((PathBuf::from(place::SKELETON), true)),
        Some(Rootfs::Directory(name)) if policy.rootfs.contains_key(name) && is_name(name, 64) => {
            Ok((PathBuf::from(place::ROOTFS).join(name), false))
        }
        Some(Rootfs::Directory(name)) => Err(not_allowed(
            format!("rootfs.directory {name:?} is not in the launcher's policy"),
            "add a [rootfs.NAME] section to the policy file",
        )),
        Some(Rootfs::Layers(_)) => Err(refusal(
            "NOT_SUPPORTED",
            "rootfs.layers is not built yet",
            "use the host root filesystem or a directory of the policy",
        )),
        None => Err(invalid("rootfs is missing", "set rootfs.host or rootfs.directory")),
    }
}

fn check_limits(request: &CreateSandbox, profile: &Profile) -> Result<Limits, Failure> {
    let asked = request.limits.unwrap_or_default();
    let pick = |name: &str, asked: u64, default: u64, maximum: u64| {
        let value = if asked == 0 { default } else { asked };
        if value > maximum {
            return Err(not_allowed(
                format!("limits.{name} is {value}, the profile {:?} allows {maximum}", request.profile),
                format!("ask for at most {maximum} or raise the profile's maximum in the policy file"),
            ));
        }
        Ok(value)
    };
    let (low, high) = (&profile.default, &profile.maximum);
    let limits = Limits {
        memory_bytes: pick("memory_bytes", asked.memory_bytes, low.memory_bytes, high.memory_bytes)?,
        cpu_millis: pick("cpu_millis", asked.cpu_millis, low.cpu_millis, high.cpu_millis)?,
        pids: pick("pids", asked.pids, low.pids, high.pids)?,
        disk_bytes: pick("disk_bytes", asked.disk_bytes, low.disk_bytes, high.disk_bytes)?,
    };
    // Below these a shell cannot start; the kernel would kill it without telling why.
    for (name, value, least) in [
        ("memory_bytes", limits.memory_bytes, 4 << 20),
        ("cpu_millis", limits.cpu_millis, 10),
        ("pids", limits.pids, 8),
        ("disk_bytes", limits.disk_bytes, 1 << 20),
    ] {
        if value < least {
            return Err(invalid(
                format!("limits.{name} is {value}, at least {least} is needed"),
                format!("raise limits.{name}"),
            ));
        }
    }
    Ok(limits)
}

fn check_volumes(request: &CreateSandbox, policy: &Policy) -> Result<Vec<CheckedVolume>, Failure> {
    if request.volumes.len() > MAX_VOLUMES {
        return Err(invalid(format!("volumes has more than {MAX_VOLUMES} entries"), "mount fewer volumes"));
    }
    let mut volumes = Vec::new();
    for volume in &request.volumes {
        let allowed = policy.volumes.get(&volume.name).filter(|_| is_name(&volume.name, 64)).ok_or_else(|| {
            not_allowed(
                format!("volume {:?} is not in the launcher's policy", volume.name),
                "add a [volumes.NAME] section to the policy file",
            )
        })?;
        let target = allowed.target.clone().unwrap_or_else(|| PathBuf::from("/mnt").join(&volume.name));
        volumes.push(CheckedVolume {
            source: PathBuf::from(place::VOLUMES).join(&volume.name),
            target: target.to_string_lossy().into_owned(),
            read_only: volume.read_only || !allowed.writable,
        });
    }
    Ok(volumes)
}

fn check_orphan_timeout(request: &CreateSandbox, policy: &Policy) -> Result<u64, Failure> {
    let most = policy.orphan_timeout_seconds.saturating_mul(1000);
    match request.orphan_timeout_ms {
        0 => Ok(most),
        asked if asked <= most => Ok(asked),
        asked => Err(not_allowed(
            format!("orphan_timeout_ms is {asked}, the policy allows {most}"),
            "ask for less or raise orphan_timeout_seconds in the policy file",
        )),
    }
}

fn check_environment(request: &CreateSandbox) -> Result<Vec<Vec<u8>>, Failure> {
    let total: usize = request.environment.iter().map(Vec::len).sum();
    if total > MAX_ENVIRONMENT_BYTES {
        return Err(invalid(
            format!("environment is {total} bytes, at most {MAX_ENVIRONMENT_BYTES} fit"),
            "write large values into a file of the sandbox",
        ));
    }
    for entry in &request.environment {
        let name = entry.split(|byte| *byte == b'=').next().unwrap_or_default();
        if entry.contains(&0) || name.is_empty() || name.len() == entry.len() {
            return Err(invalid("environment has an entry that is not NAME=value", "write NAME=value without NUL"));
        }
    }
    Ok(request.environment.clone())
}

fn check_working_directory(request: &CreateSandbox) -> Result<String, Failure> {
    let directory =
        if request.working_directory.is_empty() { "/workspace" } else { request.working_directory.as_str() };
    let plain = directory.starts_with('/')
        && directory.len() <= 1024
        && !directory.contains('\0')
        && directory.split('/').all(|part| part != "..");
    let first = directory.split('/').find(|part| !part.is_empty()).unwrap_or_default();
    let ours = ["proc", "sys", "dev", "etc", "usr", "run"].contains(&first);
    if ours {
        return Err(invalid(
            format!("working_directory is below /{first}, which belongs to the sandbox itself"),
            "use a path such as /workspace",
        ));
    }
    if plain {
        Ok(directory.to_owned())
    } else {
        Err(invalid("working_directory must be an absolute path without .. and NUL", "use a path such as /workspace"))
    }
}

fn check_hostname(request: &CreateSandbox) -> Result<String, Failure> {
    let name = if request.hostname.is_empty() { "sandbox" } else { request.hostname.as_str() };
    if is_name(name, 63) {
        Ok(name.to_owned())
    } else {
        Err(invalid("hostname must be 1 to 63 characters of [A-Za-z0-9_-]", "choose another hostname"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::launch::v1::{HostRootfs, Limits as Asked, Volume};
    use std::path::Path;

    fn policy() -> Policy {
        super::super::policy_file::parse(
            r#"
            version = 1
            runner_uid = 7
            runner_gid = 7
            state_directory = "/s"
            run_directory = "/r"
            [ids]
            base = 100000
            per_sandbox = 65536
            slots = 4
            [rootfs.debian]
            path = "/srv/debian"
            [volumes.data]
            path = "/srv/data"
            [profiles.default]
            root = true
            seccomp = "standard"
            default = { memory_bytes = 67108864, cpu_millis = 1000, pids = 64, disk_bytes = 67108864 }
            maximum = { memory_bytes = 134217728, cpu_millis = 2000, pids = 128, disk_bytes = 134217728 }
            "#,
            Path::new("/p"),
        )
        .expect("valid policy")
    }

    fn request() -> CreateSandbox {
        CreateSandbox {
            sandbox_id: "a".into(),
            profile: "default".into(),
            rootfs: Some(Rootfs::Host(HostRootfs {})),
            ..CreateSandbox::default()
        }
    }

    fn refused(change: impl FnOnce(&mut CreateSandbox)) -> Failure {
        let mut request = request();
        change(&mut request);
        check(&request, &policy()).expect_err("must be refused")
    }

    #[test]
    fn defaults_of_the_profile_fill_what_is_not_asked() {
        let checked = check(&request(), &policy()).expect("allowed");
        assert_eq!(checked.limits.pids, 64);
        assert_eq!(checked.working_directory, "/workspace");
        assert_eq!(checked.orphan_timeout_ms, 8_100_000);
    }

    #[test]
    fn a_name_that_is_a_path_is_refused() {
        for name in ["../../etc", "/", "/etc", "debian/..", ""] {
            let failure = refused(|r| r.rootfs = Some(Rootfs::Directory(name.into())));
            assert_eq!(failure.code, "NOT_ALLOWED", "{name}");
            let failure = refused(|r| r.volumes = vec![Volume { name: name.into(), read_only: true }]);
            assert_eq!(failure.code, "NOT_ALLOWED", "{name}");
            assert_eq!(refused(|r| r.sandbox_id = name.into()).code, "INVALID_FIELD", "{name}");
        }
    }

    #[test]
    fn a_limit_above_the_maximum_is_refused_by_name() {
        let failure = refused(|r| r.limits = Some(Asked { pids: 129, ..Asked::default() }));
        assert_eq!(failure.code, "NOT_ALLOWED");
        assert!(failure.message.contains("limits.pids"));
    }

    #[test]
    fn a_limit_too_small_for_a_shell_is_refused_by_name() {
        assert!(
            refused(|r| r.limits = Some(Asked { memory_bytes: 4096, ..Asked::default() }))
                .message
                .contains("memory_bytes")
        );
    }

    #[test]
    fn an_unknown_network_is_refused() {
        assert!(refused(|r| r.network = 99).message.contains("network"));
    }

    #[test]
    fn environment_without_a_name_or_with_nul_is_refused() {
        for entry in [&b"=x"[..], b"NAME", b"A=\0"] {
            assert!(refused(|r| r.environment = vec![entry.to_vec()]).message.contains("environment"));
        }
    }

    #[test]
    fn a_working_directory_that_climbs_is_refused() {
        for directory in ["relative", "/a/../b", "/a\0"] {
            assert!(refused(|r| r.working_directory = directory.into()).message.contains("working_directory"));
        }
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        assert!(!refused(|r| r.profile = "x".into()).remediation.is_empty());
        assert!(!refused(|r| r.rootfs = None).remediation.is_empty());
    }
}
