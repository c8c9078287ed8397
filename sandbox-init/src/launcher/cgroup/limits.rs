//! Privileged: writes the limit files of a sandbox, which are never handed to process 1.
//!
//! The customer's limits, with the controllers of cgroups-rs on directories that this module made. Its hierarchies are not
//! used: its v2 hierarchy has a constant mount point and writes plain files into a tmpfs on hybrid hosts.

use cgroups_rs::MaxValue;
use cgroups_rs::cpu::CpuController;
use cgroups_rs::memory::MemController;
use cgroups_rs::pid::PidController;

use super::files::{absent, write};
use super::making::INIT_MEMORY_BYTES;
use super::{CgroupError, Mode, Tree};
use crate::launcher::create::SPOOL_SHARE;
use crate::launcher::policy_file::Limits;

/// Period of the processor quota, microseconds: the kernel's own default.
const PERIOD_USEC: u64 = 100_000;

impl Tree {
    /// Writes the customer's limits. They are in force before the first process of the workload exists.
    ///
    /// # Errors
    /// [`CgroupError::Limit`] names the limit.
    pub fn limit(&self, name: &str, limits: &Limits) -> Result<(), CgroupError> {
        let memory = i64::try_from(limits.memory_bytes).unwrap_or(i64::MAX);
        let pids = i64::try_from(limits.pids).unwrap_or(i64::MAX);
        let quota = i64::try_from(limits.cpu_millis.saturating_mul(100)).unwrap_or(i64::MAX);
        match self.mode {
            Mode::Unified => {
                let work = self.work(name);
                let failed = |limit, message: String| CgroupError::Limit { limit, path: work.clone(), message };
                let memory_controller = MemController::new(work.clone(), true);
                memory_controller.set_limit(memory).map_err(|e| failed("memory", e.to_string()))?;
                // Swap would make the limit soft; a host without swap accounting has no such file.
                write(&work.join("memory.swap.max"), "0").or_else(absent)?;
                PidController::new(work.clone(), true)
                    .set_pid_max(MaxValue::Value(pids))
                    .map_err(|e| failed("pids", e.to_string()))?;
                CpuController::new(work.clone(), true)
                    .set_cfs_quota_and_period(Some(quota), Some(PERIOD_USEC))
                    .map_err(|e| failed("cpu", e.to_string()))?;
                let spool = if self.spools_in_memory { limits.disk_bytes / SPOOL_SHARE } else { 0 };
                let init = INIT_MEMORY_BYTES.saturating_add(spool).to_string();
                write(&work.with_file_name("init").join("memory.max"), &init).or_else(absent)
            }
            Mode::Hybrid => {
                for (controller, base) in &self.v1 {
                    let directory = base.join(name);
                    let failed =
                        |message: String| CgroupError::Limit { limit: controller, path: directory.clone(), message };
                    match *controller {
                        "memory" => {
                            let memory_controller = MemController::new(directory.clone(), false);
                            // Memory plus swap may never be the smaller one, whatever the two were before.
                            let counts_swap = directory.join("memory.memsw.limit_in_bytes").exists();
                            if counts_swap {
                                memory_controller.set_memswap_limit(-1).map_err(|e| failed(e.to_string()))?;
                            }
                            memory_controller.set_limit(memory).map_err(|e| failed(e.to_string()))?;
                            if counts_swap {
                                memory_controller.set_memswap_limit(memory).map_err(|e| failed(e.to_string()))?;
                            }
                        }
                        "pids" => PidController::new(directory.clone(), false)
                            .set_pid_max(MaxValue::Value(pids))
                            .map_err(|e| failed(e.to_string()))?,
                        "cpu" => CpuController::new(directory.clone(), false)
                            .set_cfs_quota_and_period(Some(quota), Some(PERIOD_USEC))
                            .map_err(|e| failed(e.to_string()))?,
                        _ => {}
                    }
                }
                Ok(())
            }
            Mode::None => Ok(()),
        }
    }
}
