//! What is asked of the launcher for one sandbox, in our own types. Pure: no clock, no file, no socket.
//!
//! Checks here give early and precise errors; the launcher checks everything again, because it does not trust us.

use std::time::Duration;

/// Everything that describes a sandbox to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Chosen by the runner, unique among living sandboxes.
    pub sandbox_id: String,
    /// Name of a profile of the launcher's policy.
    pub profile: String,
    /// Root filesystem.
    pub rootfs: Rootfs,
    /// Limits; 0 takes the profile's default.
    pub limits: Limits,
    /// Volumes named in the policy.
    pub volumes: Vec<VolumeUse>,
    /// Nobody needs the changes after the end.
    pub ephemeral: bool,
    /// How long the sandbox outlives its last runner; `None` for as long as the host is up.
    pub orphan_timeout: Option<Duration>,
    /// Environment of every process.
    pub environment: Vec<EnvironmentVariable>,
    /// Working directory inside; empty means `/workspace`.
    pub working_directory: String,
    /// Host name inside; empty means `sandbox`.
    pub hostname: String,
}

/// Root filesystem of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rootfs {
    /// The host's `/usr`, read-only, with private rest.
    Host,
    /// A directory that the policy lists under this name.
    Directory(String),
    /// Prepared layers by digest, topmost first.
    Layers(Vec<String>),
}

/// Limits of a sandbox; 0 takes the profile's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory, swap included.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes written to the root filesystem.
    pub disk_bytes: u64,
}

/// Use of a volume that the policy names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeUse {
    /// Name in the policy.
    pub name: String,
    /// Read-only even where the policy allows writing.
    pub read_only: bool,
}

/// One variable of the environment.
#[derive(Clone, PartialEq, Eq)]
pub struct EnvironmentVariable {
    /// Name, without `=`.
    pub name: String,
    /// Value; never shown, because customers put secrets there in spite of every advice.
    pub value: Vec<u8>,
}

impl std::fmt::Debug for EnvironmentVariable {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}=<{} bytes>", self.name, self.value.len())
    }
}

/// A value that cannot be asked for. The text names the field.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {problem}")]
pub struct SpecError {
    /// Name of the field.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub problem: String,
}

/// Environment, together with everything else, has to fit into one packet.
const LARGEST_ENVIRONMENT: usize = 48 * 1024;

impl Spec {
    /// A sandbox on the host's own programs with the default profile and limits, removed without a trace.
    pub fn throw_away(sandbox_id: impl Into<String>) -> Self {
        Self {
            sandbox_id: sandbox_id.into(),
            profile: "default".into(),
            rootfs: Rootfs::Host,
            limits: Limits::default(),
            volumes: Vec::new(),
            ephemeral: true,
            orphan_timeout: None,
            environment: Vec::new(),
            working_directory: String::new(),
            hostname: String::new(),
        }
    }

    /// Looks at every field.
    ///
    /// # Errors
    /// The first value that the launcher would refuse.
    pub fn validate(&self) -> Result<(), SpecError> {
        let refuse = |field, problem: String| Err(SpecError { field, problem });
        if !is_name(&self.sandbox_id, 64) {
            return refuse("sandbox_id", format!("{:?} must be 1 to 64 characters of [A-Za-z0-9_-]", self.sandbox_id));
        }
        if !is_name(&self.profile, 64) {
            return refuse("profile", format!("{:?} must be 1 to 64 characters of [A-Za-z0-9_-]", self.profile));
        }
        match &self.rootfs {
            Rootfs::Directory(name) if !is_name(name, 64) => {
                return refuse("rootfs.directory", format!("{name:?} is not a name; paths belong into the policy"));
            }
            Rootfs::Layers(digests) => {
                if let Some(bad) = digests.iter().find(|digest| !is_digest(digest)) {
                    return refuse("rootfs.layers", format!("{bad:?} is not sha256: and 64 hexadecimal digits"));
                }
            }
            _ => {}
        }
        if let Some(volume) = self.volumes.iter().find(|volume| !is_name(&volume.name, 64)) {
            return refuse("volumes.name", format!("{:?} is not a name; paths belong into the policy", volume.name));
        }
        if !self.working_directory.is_empty() && !is_absolute_path(&self.working_directory) {
            return refuse("working_directory", format!("{:?} must be an absolute path", self.working_directory));
        }
        if !self.hostname.is_empty() && !is_name(&self.hostname, 64) {
            return refuse("hostname", format!("{:?} must be at most 64 characters of [A-Za-z0-9_-]", self.hostname));
        }
        self.validate_environment()
    }

    fn validate_environment(&self) -> Result<(), SpecError> {
        let refuse = |problem: String| Err(SpecError { field: "environment", problem });
        for variable in &self.environment {
            if !is_variable_name(&variable.name) {
                return refuse(format!("{:?} is not a variable name", variable.name));
            }
            if variable.value.contains(&0) {
                return refuse(format!("the value of {} contains a NUL byte", variable.name));
            }
        }
        let total: usize = self.environment.iter().map(|variable| variable.name.len() + variable.value.len() + 2).sum();
        if total > LARGEST_ENVIRONMENT {
            return refuse(format!("{total} bytes in all, at most {LARGEST_ENVIRONMENT} are possible"));
        }
        Ok(())
    }
}

/// Reads `NAME=value`.
///
/// # Errors
/// When there is no `=`, or what stands before it is not a variable name.
pub fn parse_environment_variable(text: &str) -> Result<EnvironmentVariable, SpecError> {
    match text.split_once('=') {
        Some((name, value)) if is_variable_name(name) => {
            Ok(EnvironmentVariable { name: name.to_owned(), value: value.as_bytes().to_vec() })
        }
        _ => Err(SpecError { field: "environment", problem: format!("{text:?} is not NAME=value") }),
    }
}

fn is_name(text: &str, longest: usize) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    !text.is_empty() && text.len() <= longest && text.bytes().all(allowed)
}

fn is_digest(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

fn is_variable_name(text: &str) -> bool {
    !text.is_empty() && !text.contains(['=', '\0'])
}

fn is_absolute_path(text: &str) -> bool {
    text.starts_with('/') && text.len() < 4096 && !text.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throw_away_sandbox_is_valid_as_it_is() {
        assert_eq!(Spec::throw_away("exec-1").validate(), Ok(()));
    }

    #[test]
    fn every_bad_value_is_refused_by_the_name_of_its_field() {
        let base = || Spec::throw_away("a");
        let variable = |name: &str, value: &[u8]| EnvironmentVariable { name: name.into(), value: value.into() };
        let cases = [
            ("sandbox_id", Spec { sandbox_id: "../x".into(), ..base() }),
            ("sandbox_id", Spec { sandbox_id: "x".repeat(65), ..base() }),
            ("profile", Spec { profile: String::new(), ..base() }),
            ("rootfs.directory", Spec { rootfs: Rootfs::Directory("/etc".into()), ..base() }),
            ("rootfs.layers", Spec { rootfs: Rootfs::Layers(vec!["sha256:ABC".into()]), ..base() }),
            ("volumes.name", Spec { volumes: vec![VolumeUse { name: "/".into(), read_only: true }], ..base() }),
            ("working_directory", Spec { working_directory: "work".into(), ..base() }),
            ("working_directory", Spec { working_directory: "/a\0b".into(), ..base() }),
            ("hostname", Spec { hostname: "a.b c".into(), ..base() }),
            ("environment", Spec { environment: vec![variable("A=B", b"")], ..base() }),
            ("environment", Spec { environment: vec![variable("A", b"x\0")], ..base() }),
            ("environment", Spec { environment: vec![variable("A", &[b'x'; 60_000])], ..base() }),
        ];
        for (field, spec) in cases {
            assert_eq!(spec.validate().expect_err(field).field, field);
        }
    }

    #[test]
    fn environment_values_never_appear_in_debug_output() {
        let variable = parse_environment_variable("TOKEN=secret").expect("valid");

        assert_eq!(format!("{variable:?}"), "TOKEN=<6 bytes>");
    }

    #[test]
    fn environment_text_without_a_name_is_refused() {
        for text in ["", "NAME", "=value"] {
            assert!(parse_environment_variable(text).is_err(), "{text}");
        }
    }
}
