//! What was asked for and what is in force, layer by layer, and the name computed from it. Pure.
//!
//! A layer counts when the launcher enforced it *and*, where it was attacked, the attack failed. Nothing is inferred from
//! kernel versions, and no tier is ever configured: the operator sets a floor, the host decides what is reached.

use std::fmt;
use std::str::FromStr;

use super::launch::{HostReport, ReportedLayer};
use crate::work::{Layer, Receipt};

/// How strongly a sandbox is isolated; the order is the order of strength.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Less than any tier: not for the work of others.
    None,
    /// The provider's container is the boundary; ours only takes privileges away.
    Provider,
    /// One sandbox per container: landlock, seccomp and no way back to privilege.
    Nested,
    /// Namespaces of an ordinary user, without limits by the kernel or ranges of ids.
    Rootless,
    /// Everything of `Full` with compact ranges of ids or shared lowers.
    Pod,
    /// Every layer.
    Full,
}

/// Every layer, in the order of every receipt, with what it protects.
pub const LAYERS: [(&str, &str); 23] = [
    ("user_namespace", "root inside is nobody outside"),
    ("separate_principals", "the workload and process 1 are different users"),
    ("nested_user_namespace", "the workload has no rights over the namespaces it runs in"),
    ("mount_namespace", "mounts of the host are out of reach"),
    ("root_switch", "the host's root directory is not in the sandbox"),
    ("pid_namespace", "processes of the host cannot be seen or signalled"),
    ("network_namespace", "interfaces and sockets of the host are out of reach"),
    ("ipc_namespace", "shared memory and queues of the host are out of reach"),
    ("uts_namespace", "the host's name cannot be changed"),
    ("cgroup_namespace", "the cgroup tree of the host is not visible"),
    ("proc_masked", "files of /proc that tell about the host are hidden"),
    ("private_devices", "only harmless devices exist"),
    ("cgroup_memory", "memory is limited"),
    ("cgroup_pids", "the number of processes is limited"),
    ("cgroup_cpu", "processor time is limited"),
    ("cgroup_kill", "every process can be ended at once"),
    ("disk_limit", "disk space is limited"),
    ("capabilities", "rights of root are reduced to the listed ones"),
    ("no_new_privileges", "set-user-id programs give no rights"),
    ("seccomp", "rarely used system calls are refused"),
    ("landlock", "files outside the root are refused a second time"),
    ("landlock_scopes", "signals and abstract sockets stay inside"),
    ("idmapped_lowers", "files of the image belong to no user of the host"),
];

/// Signal scoping is an item of the vector and not of any tier: it needs a newer kernel than `full` does.
const FULL: [&str; 21] = [
    "user_namespace",
    "separate_principals",
    "nested_user_namespace",
    "mount_namespace",
    "root_switch",
    "pid_namespace",
    "network_namespace",
    "ipc_namespace",
    "uts_namespace",
    "cgroup_namespace",
    "proc_masked",
    "private_devices",
    "cgroup_memory",
    "cgroup_pids",
    "cgroup_cpu",
    "cgroup_kill",
    "disk_limit",
    "capabilities",
    "no_new_privileges",
    "seccomp",
    "landlock",
];

const ROOTLESS: [&str; 13] = [
    "user_namespace",
    "mount_namespace",
    "root_switch",
    "pid_namespace",
    "network_namespace",
    "ipc_namespace",
    "uts_namespace",
    "proc_masked",
    "private_devices",
    "capabilities",
    "no_new_privileges",
    "seccomp",
    "landlock",
];

const NESTED: [&str; 5] = ["separate_principals", "capabilities", "no_new_privileges", "seccomp", "landlock"];
const PROVIDER: [&str; 1] = ["no_new_privileges"];
const FULL_RANGE: u32 = 65_536;

/// The receipt of one sandbox: the launcher's report in fixed order, with what the host says about absent layers.
pub fn receipt(reported: &[ReportedLayer], id_count: u32, host: &HostReport) -> Receipt {
    let layers: Vec<Layer> = LAYERS.iter().map(|(name, _)| layer(name, reported, host)).collect();
    let tier = tier(&layers, id_count, host.rootless).to_string();
    Receipt { tier, layers, switched_off: host.switched_off.clone() }
}

/// The tier that these layers make.
pub fn tier(layers: &[Layer], id_count: u32, rootless: bool) -> Tier {
    let enforced = |name: &str| layers.iter().any(|layer| layer.name == name && !layer.enforced.is_empty());
    let has = |needed: &[&str]| needed.iter().all(|name| enforced(name));
    // A launcher without real root cannot give separate ranges that the host respects, whatever else it achieves.
    if has(&FULL) && !rootless {
        return if enforced("idmapped_lowers") && id_count >= FULL_RANGE { Tier::Full } else { Tier::Pod };
    }
    [(&ROOTLESS[..], Tier::Rootless), (&NESTED[..], Tier::Nested), (&PROVIDER[..], Tier::Provider)]
        .into_iter()
        .find(|(needed, _)| has(needed))
        .map_or(Tier::None, |(_, tier)| tier)
}

/// Names of the layers that keep `layers` below `wanted`.
pub fn missing_for(layers: &[Layer], wanted: Tier) -> Vec<&'static str> {
    let needed: &[&'static str] = match wanted {
        Tier::None => &[],
        Tier::Provider => &PROVIDER,
        Tier::Nested => &NESTED,
        Tier::Rootless => &ROOTLESS,
        Tier::Pod | Tier::Full => &FULL,
    };
    let enforced = |name: &str| layers.iter().any(|layer| layer.name == name && !layer.enforced.is_empty());
    let mut missing: Vec<_> = needed.iter().copied().filter(|name| !enforced(name)).collect();
    if wanted == Tier::Full && !enforced("idmapped_lowers") {
        missing.push("idmapped_lowers");
    }
    missing
}

fn layer(name: &str, reported: &[ReportedLayer], host: &HostReport) -> Layer {
    let absent = host.missing.iter().find(|missing| missing.layer == name);
    let errno = absent.map_or(0, |missing| missing.errno);
    let switched_off = host.switched_off.iter().any(|layer| layer == name);
    match reported.iter().find(|layer| layer.name == name) {
        Some(layer) => Layer {
            name: name.to_owned(),
            requested: layer.requested.clone(),
            // The operator's own switch wins over whatever is claimed.
            enforced: if switched_off { String::new() } else { layer.enforced.clone().unwrap_or_default() },
            errno: if layer.errno == 0 { errno } else { layer.errno },
        },
        None => Layer { name: name.to_owned(), requested: String::new(), enforced: String::new(), errno },
    }
}

impl Tier {
    /// Every tier, weakest first.
    pub const ALL: [Self; 6] = [Self::None, Self::Provider, Self::Nested, Self::Rootless, Self::Pod, Self::Full];

    /// The name as operators write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Provider => "provider",
            Self::Nested => "nested",
            Self::Rootless => "rootless",
            Self::Pod => "pod",
            Self::Full => "full",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|tier| tier.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a tier: write none, provider, nested, rootless, pod or full"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report_without(absent: &[&str]) -> Vec<ReportedLayer> {
        LAYERS
            .iter()
            .map(|(name, _)| ReportedLayer {
                name: (*name).to_owned(),
                requested: "yes".into(),
                enforced: (!absent.contains(name)).then(|| "yes".to_owned()),
                errno: if absent.contains(name) { 1 } else { 0 },
            })
            .collect()
    }

    fn tier_without(absent: &[&str], id_count: u32, rootless: bool) -> String {
        receipt(&report_without(absent), id_count, &HostReport { rootless, ..HostReport::default() }).tier
    }

    #[test]
    fn tiers_follow_from_the_layers_alone() {
        let cases: [(&[&str], u32, bool, &str); 9] = [
            (&[], 65_536, false, "full"),
            (&["landlock_scopes"], 65_536, false, "full"),
            (&[], 4_096, false, "pod"),
            (&["idmapped_lowers"], 65_536, false, "pod"),
            (&["disk_limit"], 65_536, false, "rootless"),
            (&[], 65_536, true, "rootless"),
            (&["user_namespace", "pid_namespace"], 1, true, "nested"),
            (&["landlock", "user_namespace"], 1, true, "provider"),
            (&["no_new_privileges"], 65_536, false, "none"),
        ];
        for (absent, id_count, rootless, expected) in cases {
            assert_eq!(tier_without(absent, id_count, rootless), expected, "{absent:?}");
        }
    }

    #[test]
    fn layer_switched_off_by_the_operator_is_missing_whatever_is_claimed() {
        let host = HostReport { switched_off: vec!["seccomp".into()], ..HostReport::default() };

        let receipt = receipt(&report_without(&[]), 65_536, &host);

        let seccomp = receipt.layers.iter().find(|layer| layer.name == "seccomp").expect("listed");
        assert_eq!(seccomp.enforced, "");
        assert_eq!((receipt.tier.as_str(), receipt.switched_off.len()), ("provider", 1));
    }

    #[test]
    fn receipt_always_lists_every_layer_in_the_same_order() {
        let names = |receipt: &Receipt| receipt.layers.iter().map(|layer| layer.name.clone()).collect::<Vec<_>>();
        let empty = receipt(&[], 0, &HostReport::default());
        let mut shuffled = report_without(&[]);
        shuffled.reverse();

        assert_eq!(names(&empty), LAYERS.map(|(name, _)| name));
        assert_eq!(names(&receipt(&shuffled, 1, &HostReport::default())), names(&empty));
        assert_eq!(empty.tier, "none");
    }

    #[test]
    fn every_tier_names_only_known_layers() {
        for name in FULL.iter().chain(&ROOTLESS).chain(&NESTED).chain(&PROVIDER) {
            assert!(LAYERS.iter().any(|(layer, _)| layer == name), "{name}");
        }
    }

    #[test]
    fn tier_names_are_read_back() {
        for tier in Tier::ALL {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        assert!("best".parse::<Tier>().is_err());
    }
}
