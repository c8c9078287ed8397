//! Settings of this host that stand in the way of isolation, and what they should be. Reading is pure over the text of the
//! files; writing happens only on the operator's explicit word.

use std::fs;
use std::io;
use std::path::PathBuf;

/// One setting that should be changed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Setting {
    /// Its name for `sysctl`.
    pub name: &'static str,
    /// What it is.
    pub current: String,
    /// What it should be.
    pub wanted: &'static str,
    /// What the present value prevents.
    pub reason: &'static str,
}

struct Rule {
    name: &'static str,
    wanted: &'static str,
    reason: &'static str,
    is_bad: fn(&str) -> bool,
}

const RULES: [Rule; 4] = [
    Rule {
        name: "kernel.unprivileged_userns_clone",
        wanted: "1",
        reason: "without it no sandbox can have the inner user namespace, and an ordinary user can have none at all",
        is_bad: |value| value == "0",
    },
    Rule {
        name: "user.max_user_namespaces",
        wanted: "65536",
        reason: "each sandbox needs two user namespaces",
        is_bad: |value| value.parse::<u64>().is_ok_and(|count| count < 256),
    },
    Rule {
        name: "kernel.apparmor_restrict_unprivileged_userns",
        wanted: "0",
        reason: "with it an ordinary user gets user namespaces without any right in them",
        is_bad: |value| value == "1",
    },
    Rule {
        name: "vm.memfd_noexec",
        wanted: "0",
        reason: "with 2 the launcher has to run from a file instead of sealed memory",
        is_bad: |value| value == "2",
    },
];

impl Setting {
    /// The command that changes it until the next boot.
    pub fn command(&self) -> String {
        format!("sysctl -w {}={}", self.name, self.wanted)
    }

    /// Changes it until the next boot.
    ///
    /// # Errors
    /// The kernel's answer; without root it refuses.
    pub fn change(&self) -> io::Result<()> {
        fs::write(path_of(self.name), self.wanted)
    }
}

/// Every setting of this host that should be changed.
pub fn settings() -> Vec<Setting> {
    settings_from(|name| fs::read_to_string(path_of(name)).ok())
}

fn settings_from(read: impl Fn(&str) -> Option<String>) -> Vec<Setting> {
    RULES
        .iter()
        .filter_map(|rule| {
            // A setting that does not exist on this kernel forbids nothing.
            let current = read(rule.name)?.trim().to_owned();
            (rule.is_bad)(&current).then_some(Setting {
                name: rule.name,
                current,
                wanted: rule.wanted,
                reason: rule.reason,
            })
        })
        .collect()
}

fn path_of(name: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(name.replace('.', "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_values_that_forbid_something_are_reported() {
        let found = settings_from(|name| {
            Some(
                match name {
                    "kernel.unprivileged_userns_clone" => "0\n",
                    "user.max_user_namespaces" => "96000\n",
                    "vm.memfd_noexec" => "1\n",
                    _ => return None,
                }
                .to_owned(),
            )
        });

        assert_eq!(found.len(), 1);
        assert_eq!(found[0].command(), "sysctl -w kernel.unprivileged_userns_clone=1");
    }

    #[test]
    fn no_user_namespaces_at_all_is_reported() {
        let found = settings_from(|name| (name == "user.max_user_namespaces").then(|| "0\n".to_owned()));

        assert_eq!(found[0].wanted, "65536");
    }
}
