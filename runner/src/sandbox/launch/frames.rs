//! Frames become our own types, and a specification becomes a frame.
//!
//! Nothing is judged here: whoever asked checks that an answer fits the question.

use std::collections::BTreeMap;
use std::time::Duration;

use nix::sys::signal::Signal;
use proto::launch::v1 as wire;

use super::{Ended, HostReport, InspectedLimits, Inspection, ListedSandbox, MemoryKill, MissingLayer, ReportedLayer};
use crate::config::units::display_size;
use crate::sandbox::spec::{Limits, Rootfs, Spec};
use crate::sandbox::victim::described;

/// Longest name of a process: fifteen bytes, each of which the kernel may write as `\x00`.
const LONGEST_NAME: usize = 60;

pub(super) fn counters(counters: wire::Counters) -> BTreeMap<String, u64> {
    let wire::Counters { connections_refused, creations_refused, creations_given_up } = counters;
    let named = [
        ("launcher_connections_refused_total", connections_refused),
        ("launcher_creations_refused_total", creations_refused),
        ("launcher_creations_given_up_total", creations_given_up),
    ];
    named.map(|(name, count)| (name.to_owned(), count)).into()
}

pub(super) fn host_report(welcome: wire::Welcome) -> HostReport {
    let host = welcome.host.unwrap_or_default();
    let missing = host.missing.into_iter().map(|entry| MissingLayer {
        layer: entry.layer,
        attempt: entry.attempt,
        errno: entry.errno,
        remedy: entry.remedy,
    });
    HostReport {
        launcher_version: welcome.version,
        cgroup_mode: host.cgroup_mode,
        cgroup_controllers: host.cgroup_controllers,
        landlock_abi: host.landlock_abi,
        ids_per_sandbox: host.ids_per_sandbox,
        slots: host.slots,
        rootless: host.rootless,
        image_source: host.image_source,
        idmapped_lowers: host.idmapped_lowers,
        missing: missing.collect(),
        switched_off: host.switched_off,
        shape: host.shape,
    }
}

pub(super) fn create(spec: &Spec) -> wire::CreateSandbox {
    let rootfs = match &spec.rootfs {
        Rootfs::Host => wire::create_sandbox::Rootfs::Host(wire::HostRootfs {}),
        Rootfs::Directory(name) => wire::create_sandbox::Rootfs::Directory(name.clone()),
        Rootfs::Layers(digests) => wire::create_sandbox::Rootfs::Layers(wire::LayerList { digest: digests.clone() }),
    };
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let variable = |name: &str, value: &[u8]| [name.as_bytes(), b"=", value].concat();
    wire::CreateSandbox {
        sandbox_id: spec.sandbox_id.clone(),
        profile: spec.profile.clone(),
        rootfs: Some(rootfs),
        limits: Some(limits(spec.limits)),
        network: wire::Network::None.into(),
        volumes: spec
            .volumes
            .iter()
            .map(|volume| wire::Volume { name: volume.name.clone(), read_only: volume.read_only })
            .collect(),
        ephemeral: spec.ephemeral,
        orphan_timeout_ms: spec.orphan_timeout.map_or(0, milliseconds),
        environment: spec.environment.iter().map(|entry| variable(&entry.name, &entry.value)).collect(),
        working_directory: spec.working_directory.clone(),
        hostname: spec.hostname.clone(),
    }
}

fn limits(limits: Limits) -> wire::Limits {
    wire::Limits {
        memory_bytes: limits.memory_bytes,
        cpu_millis: limits.cpu_millis,
        pids: limits.pids,
        disk_bytes: limits.disk_bytes,
    }
}

pub(super) fn layer(layer: wire::Layer) -> ReportedLayer {
    ReportedLayer {
        name: layer.name,
        requested: layer.requested,
        enforced: Some(layer.enforced).filter(|text| !text.is_empty()),
        errno: layer.errno,
    }
}

pub(super) fn listed(entry: wire::SandboxEntry) -> ListedSandbox {
    ListedSandbox {
        sandbox_id: entry.sandbox_id,
        socket_name: entry.socket_name,
        pid: entry.pid,
        adopted: entry.adopted,
        id_base: entry.id_base,
        id_count: entry.id_count,
        output_directory: entry.output_directory,
        frozen: entry.frozen,
    }
}

/// How a sandbox ended, and in words why.
pub(super) fn ended(ended: &wire::SandboxEnded) -> Ended {
    let wait_status = (ended.wait_status != -1).then_some(ended.wait_status);
    let mut reason = wait_status.map_or_else(|| "its process 1 ended".to_owned(), cause);
    if ended.oom_kills > 0 {
        reason.push_str(&killed_for_memory(ended));
    }
    Ended { wait_status, oom_kills: ended.oom_kills, reason }
}

/// How many were killed, at which limit, and who was the last.
fn killed_for_memory(ended: &wire::SandboxEnded) -> String {
    let mut text = match ended.oom_kills {
        1 => "; one process of it had been killed for want of memory".to_owned(),
        kills => format!("; {kills} processes of it had been killed for want of memory"),
    };
    if ended.memory_limit_bytes > 0 {
        text.push_str(&format!(" at the limit of {}", display_size(ended.memory_limit_bytes)));
    }
    if let Some(last) = ended.last_memory_kill.clone().map(memory_kill) {
        let whom = if ended.oom_kills == 1 { ": " } else { ", the last of them " };
        text.push_str(whom);
        text.push_str(&described(&last.process, last.used_bytes));
    }
    text
}

/// The launcher has taken the name from the kernel's log, and what it may contain is not left to that.
fn memory_kill(kill: wire::MemoryKill) -> MemoryKill {
    let printable = |character: char| if character.is_ascii_graphic() || character == ' ' { character } else { '?' };
    MemoryKill {
        number: kill.number,
        process: kill.process.chars().take(LONGEST_NAME).map(printable).collect(),
        used_bytes: kill.used_bytes,
    }
}

/// A wait status as in wait(2): a signal in the low seven bits, or an exit code in the next eight.
fn cause(status: i32) -> String {
    let signal = status & 0x7f;
    if signal != 0 {
        let name = Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |signal| signal.to_string());
        return format!("its process 1 was killed by {name}");
    }
    let code = (status >> 8) & 0xff;
    match wire::InitExit::try_from(code) {
        Ok(wire::InitExit::DeadlinePassed) => "its deadline passed and nobody put it off".to_owned(),
        Ok(wire::InitExit::Orphaned) => "no runner was connected for as long as it may be without one".to_owned(),
        Ok(wire::InitExit::SpawnerGone) => {
            "its spawner was killed or failed, so nothing could be started in it".to_owned()
        }
        Ok(wire::InitExit::Failed) => "its process 1 could not go on".to_owned(),
        Ok(wire::InitExit::Unspecified | wire::InitExit::NotClosed) | Err(_) => {
            format!("its process 1 ended with code {code}")
        }
    }
}

pub(super) fn inspection(seen: wire::SandboxInspection) -> Inspection {
    let limits = seen.limits.unwrap_or_default();
    Inspection {
        memory_bytes: seen.memory_bytes,
        memory_peak_bytes: seen.memory_peak_bytes,
        oom_kills: seen.oom_kills,
        pids: seen.pids,
        pids_refused: seen.pids_refused,
        cpu_usec: seen.cpu_usec,
        limits: InspectedLimits {
            memory_bytes: limits.memory_bytes,
            cpu_millis: limits.cpu_millis,
            pids: limits.pids,
            disk_bytes: limits.disk_bytes,
        },
        host_pids: seen.host_pids,
        memory_kills: seen.memory_kills.into_iter().map(memory_kill).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_sandbox_names_its_cause() {
        let told = |wait_status, oom_kills| {
            let sandbox_id = "a".to_owned();
            ended(&wire::SandboxEnded { sandbox_id, wait_status, oom_kills, ..Default::default() }).reason
        };
        let left_with = |exit: wire::InitExit| told(i32::from(exit) << 8, 0);

        assert_eq!(told(9, 0), "its process 1 was killed by SIGKILL");
        assert_eq!(told(0x8b, 0), "its process 1 was killed by SIGSEGV");
        assert_eq!(told(40, 0), "its process 1 was killed by signal 40");
        assert_eq!(told(-1, 0), "its process 1 ended");
        assert_eq!(
            told(9, 2),
            "its process 1 was killed by SIGKILL; 2 processes of it had been killed for want of memory"
        );
        assert!(left_with(wire::InitExit::SpawnerGone).contains("spawner"));
        assert!(left_with(wire::InitExit::Orphaned).contains("no runner was connected"));
        assert!(left_with(wire::InitExit::DeadlinePassed).contains("deadline"));
        assert_eq!(told(77 << 8, 0), "its process 1 ended with code 77");
        assert_eq!(told(i32::MIN, 0), "its process 1 ended with code 0");
    }

    #[test]
    fn the_end_of_a_sandbox_names_the_memory_limit_and_the_last_that_was_killed() {
        let told = |oom_kills, memory_limit_bytes, process: &str, used_bytes| {
            let sandbox_id = "a".to_owned();
            let last_memory_kill = (!process.is_empty()).then(|| wire::MemoryKill {
                number: oom_kills,
                process: process.to_owned(),
                used_bytes,
            });
            let told =
                wire::SandboxEnded { sandbox_id, wait_status: 9, oom_kills, memory_limit_bytes, last_memory_kill };
            ended(&told).reason.replace("its process 1 was killed by SIGKILL; ", "")
        };

        assert_eq!(
            told(1, 512 << 20, "python3", 498 << 20),
            "one process of it had been killed for want of memory at the limit of 512 MiB: python3, which used 498 MiB"
        );
        assert_eq!(
            told(2, 0, "a\u{1b}[2J", 0),
            "2 processes of it had been killed for want of memory, the last of them a?[2J"
        );
        assert_eq!(
            told(1, 1 << 30, "", 0),
            "one process of it had been killed for want of memory at the limit of 1 GiB"
        );
        assert!(told(1, 0, &"x".repeat(5000), 0).len() < 200);
    }
}
