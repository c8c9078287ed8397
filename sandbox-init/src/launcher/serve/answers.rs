//! Privileged by its place only: the words of the answers, and of the refusals that more than one request can get.

use proto::launch::v1 as wire;
use proto::launch::v1::reply::Body as Answer;

use super::process::{Memory, Process};
use super::{Launcher, kills};
use crate::launcher::background::{chain, root_errno};
use crate::launcher::cgroup::{Account, Tree};
use crate::launcher::shape::Shape;
use crate::launcher::validate::refusal;

impl Launcher<'_> {
    /// The sandboxes that are ready, or the one that was asked for.
    pub(super) fn list(&self, only: &str) -> Answer {
        let entries = self.processes.values().filter_map(|process| self.entry(process));
        let wanted = entries.filter(|entry| only.is_empty() || entry.sandbox_id == only);
        Answer::SandboxList(wire::SandboxList { sandboxes: wanted.collect() })
    }

    fn entry(&self, process: &Process) -> Option<wire::SandboxEntry> {
        Some(wire::SandboxEntry {
            sandbox_id: process.sandbox_id()?.to_owned(),
            socket_name: format!("{}.sock", process.name),
            pid: u32::try_from(process.pid).unwrap_or(0),
            adopted: process.adopted,
            id_base: process.slot.base,
            id_count: process.slot.count,
            output_directory: self.output_directory(&process.name),
            frozen: self.parts.tree.is_frozen(&process.name),
        })
    }

    /// What one sandbox uses now, and whom the kernel has killed in it.
    pub(super) fn inspect(&mut self, sandbox_id: &str) -> Answer {
        let Some((number, process)) = self.find(sandbox_id) else { return unknown(sandbox_id) };
        let account = self.parts.tree.account(&process.name);
        if account.oom_kills > 0 {
            self.learn_of_kills();
        }
        match self.processes.get(&number) {
            Some(process) => inspection(account, &self.parts.tree, process),
            None => unknown(sandbox_id),
        }
    }

    /// Where the workload finds the output of its calls; empty is the usual place.
    pub(super) fn output_directory(&self, name: &str) -> String {
        match self.parts.shape {
            Shape::Nested => self.parts.places.sandboxes().join(name).join("output").display().to_string(),
            Shape::Privileged | Shape::Unprivileged => String::new(),
        }
    }
}

/// What one sandbox uses now.
fn inspection(account: Account, tree: &Tree, process: &Process) -> Answer {
    Answer::Inspection(wire::SandboxInspection {
        sandbox_id: process.sandbox_id().unwrap_or_default().to_owned(),
        memory_bytes: account.memory_bytes,
        memory_peak_bytes: account.memory_peak_bytes,
        oom_kills: account.oom_kills,
        pids: account.pids,
        pids_refused: account.pids_refused,
        cpu_usec: account.cpu_usec,
        limits: Some(wire::Limits {
            memory_bytes: account.memory_limit,
            pids: account.pids_limit,
            cpu_millis: 0,
            disk_bytes: 0,
        }),
        host_pids: tree.processes(&process.name),
        reclaim: match process.memory {
            Memory::Reclaimed(reclaim) => Some(reclaim),
            Memory::Kept | Memory::Asked => None,
        },
        memory_kills: kills::named(&process.killed).cloned().collect(),
    })
}

/// Nothing here has this id.
pub(super) fn unknown(sandbox_id: &str) -> Answer {
    Answer::Failure(refusal("SANDBOX_UNKNOWN", format!("there is no sandbox {sandbox_id:?}"), "list the sandboxes"))
}

/// Why there is no place for one sandbox more.
pub(super) fn no_slot_left(shape: Shape) -> wire::Failure {
    match shape {
        Shape::Nested => refusal(
            "NO_SLOT",
            "this container allows no namespace, so it holds one sandbox at a time, and that one is in use",
            "end it first, start another container, or give this one what the tier pod needs",
        ),
        Shape::Privileged | Shape::Unprivileged => no_slot("every id range is in use"),
    }
}

/// No place, for a reason of this moment.
pub(super) fn no_slot(message: &str) -> wire::Failure {
    refusal("NO_SLOT", message, "end a sandbox or raise ids.slots in the policy file")
}

/// A step of the host failed: what it was, with all its causes and the errno.
pub(super) fn host_error(error: &(dyn std::error::Error + 'static)) -> wire::Failure {
    let mut failure = refusal("HOST_ERROR", chain(error), "run `sandbox-runner doctor`");
    failure.errno = root_errno(error);
    failure
}
