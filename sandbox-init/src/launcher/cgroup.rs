//! Privileged: makes and removes cgroups below a base of our own (CAP_DAC_OVERRIDE on cgroupfs, or delegation).
//!
//! Layout, per sandbox `S`: `S/init` holds process 1 and the spawner, `S/work` holds the slots of the calls and carries the
//! customer's limits. On a host with cgroup v2 controllers both live in the unified tree. On a hybrid host the unified tree
//! carries membership, kill and freeze, and one group per v1 controller (memory, pids, cpu, cpuacct) carries the limits for
//! the whole sandbox, process 1 included: moving a process between v1 groups costs a grace period of 8 to 14 ms, so it is
//! done once, ahead of time, by the background process.
//!
//! Limits are written with the controllers of cgroups-rs on directories that this module made. Its hierarchies are not
//! used: its v2 hierarchy has a constant mount point and writes plain files into a tmpfs on hybrid hosts.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cgroups_rs::MaxValue;
use cgroups_rs::cpu::CpuController;
use cgroups_rs::memory::MemController;
use cgroups_rs::pid::PidController;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode as FileMode;

use super::own_mounts;
use super::policy_file::Limits;

/// How the host's controllers are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything in cgroup v2.
    Unified,
    /// Controllers in v1, membership in v2.
    Hybrid,
    /// Nothing we may write.
    None,
}

impl Mode {
    /// Name for reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unified => "unified",
            Self::Hybrid => "hybrid",
            Self::None => "none",
        }
    }
}

/// Why a cgroup step failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory of cgroupfs refused.
    #[error("cannot {action} cgroup {}", path.display())]
    File {
        /// create, open, write, remove.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A limit was refused.
    #[error("cannot set {limit} of cgroup {}: {message}", path.display())]
    Limit {
        /// memory, pids or cpu.
        limit: &'static str,
        /// Where.
        path: PathBuf,
        /// What cgroups-rs says.
        message: String,
    },
}

impl CgroupError {
    /// errno of the cause, 0 if none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::File { source, .. } => source.raw_os_error().unwrap_or(0),
            Self::Limit { .. } => 0,
        }
    }
}

/// Controllers that we use in the unified tree.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];
/// v1 controllers that we use.
pub(super) const V1_CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "cpuacct"];
/// Slots that process 1 may make: one for each of its calls (128), for each finished call that left processes (64), for the
/// shell and for the next call, and some that are on their way out. Fewer, and commands that leave processes behind would
/// keep every later call from starting.
const MAX_SLOTS: &str = "256";
/// Memory of process 1 and the spawner, spool page cache included. Measured: below 2 MiB without cache.
const INIT_MEMORY_BYTES: &str = "67108864";

/// The base of our groups in each hierarchy.
#[derive(Clone, Debug)]
pub struct Tree {
    mode: Mode,
    unified: Option<PathBuf>,
    v1: Vec<(&'static str, PathBuf)>,
    /// Controllers that limits can be set with.
    pub controllers: Vec<String>,
    /// Why there is none, when there is none.
    pub failure: Option<std::sync::Arc<CgroupError>>,
}

/// Directories of one sandbox, open.
#[derive(Debug)]
pub struct Group {
    /// Name below every base.
    pub name: String,
    /// `S/init` in the unified tree.
    pub init: OwnedFd,
    /// `S/work` in the unified tree.
    pub work: OwnedFd,
    /// v1 directories in the order memory, pids, cpuacct, as far as they exist.
    pub v1: Vec<(&'static str, OwnedFd)>,
}

/// The kernel's account of one sandbox.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// Bytes in use.
    pub memory_bytes: u64,
    /// Highest use.
    pub memory_peak_bytes: u64,
    /// Kills for memory.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Forks refused.
    pub pids_refused: u64,
    /// Processor time.
    pub cpu_usec: u64,
    /// Limit in force.
    pub memory_limit: u64,
    /// Limit in force.
    pub pids_limit: u64,
}

impl Tree {
    /// Finds the hierarchies and makes our base in each. Never fails: what is missing is in `failure` and the receipt.
    ///
    /// `may_mount`: this process is alone in its mount namespace. Where the hierarchies that it finds there cannot be used,
    /// as in a container that shows them read-only, in part, or from another group on, it mounts them itself, with its own
    /// group as their root. That needs CAP_SYS_ADMIN; whether we may make groups in them the kernel decides all the same.
    #[must_use]
    pub fn open(tag: &str, may_mount: bool) -> Self {
        let attempt = || {
            let mut tree = Self::nothing();
            let prepared = tree.prepare(tag);
            // The bases were made to see that they can be; the first sandbox makes them again. A launcher that is killed
            // before it has any leaves none.
            tree.remove_bases();
            prepared.map(|()| tree)
        };
        let found = match attempt() {
            Err(first) if may_mount => own_mounts::mount().map_err(|_| first).and_then(|()| attempt()),
            other => other,
        };
        found.unwrap_or_else(|error| Self { failure: Some(std::sync::Arc::new(error)), ..Self::nothing() })
    }

    /// No groups at all.
    #[must_use]
    pub fn nothing() -> Self {
        Self { mode: Mode::None, unified: None, v1: Vec::new(), controllers: Vec::new(), failure: None }
    }

    fn prepare(&mut self, tag: &str) -> Result<(), CgroupError> {
        let mounts = Mounts::read();
        let own = own_paths();
        let missing = || CgroupError::File {
            action: "find",
            path: PathBuf::from("/sys/fs/cgroup"),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        };
        let unified = mounts.unified.iter().rev().find(|mount| mount.holds(own_path(&own, ""))).ok_or_else(missing)?;
        if mounts.v1.is_empty() {
            self.mode = Mode::Unified;
            let base = prepare_unified(&unified.point, &unified.locate(own_path(&own, "")), tag)?;
            self.controllers =
                read(&base.join("cgroup.subtree_control")).split_whitespace().map(str::to_owned).collect();
            self.unified = Some(base);
        } else {
            self.mode = Mode::Hybrid;
            let base = unified.locate(own_path(&own, "")).join(format!("sandbox-runner-{tag}"));
            make_directory(&base)?;
            self.unified = Some(base);
            for controller in V1_CONTROLLERS {
                let path = own_path(&own, controller);
                let mut shown = mounts.v1.iter().rev().filter(|(name, _)| name == controller).peekable();
                if shown.peek().is_none() {
                    continue;
                }
                let (_, mount) = shown.find(|(_, mount)| mount.holds(path)).ok_or_else(missing)?;
                let base = mount.locate(path).join(format!("sandbox-runner-{tag}"));
                make_directory(&base)?;
                self.v1.push((controller, base));
                self.controllers.push(controller.to_owned());
            }
        }
        Ok(())
    }

    /// How the host's controllers are mounted.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Makes the groups of one sandbox and gives process 1 (host uid `keeper`) what it needs to make slots.
    ///
    /// # Errors
    /// [`CgroupError`]; what was made is removed again by [`Tree::remove`].
    pub fn create(&self, name: &str, keeper: u32) -> Result<Group, CgroupError> {
        let Some(base) = &self.unified else {
            return Err(CgroupError::File {
                action: "create",
                path: PathBuf::from(name),
                source: io::Error::from_raw_os_error(libc::ENOENT),
            });
        };
        let sandbox = base.join(name);
        let (init, work) = (sandbox.join("init"), sandbox.join("work"));
        // A group that exists belongs to somebody: joining it would end him with us.
        self.create_below(base, &sandbox)?;
        for directory in [&init, &work] {
            make_directory(directory)?;
        }
        if self.mode == Mode::Unified {
            enable(&sandbox, &CONTROLLERS);
            enable(&work, &["memory", "pids"]);
            write(&init.join("memory.max"), INIT_MEMORY_BYTES).or_else(absent)?;
            write(&init.join("pids.max"), "16").or_else(absent)?;
            write(&work.join("memory.oom.group"), "0").or_else(absent)?;
        }
        write(&work.join("cgroup.max.descendants"), MAX_SLOTS)?;
        // Process 1 makes the slots below S/work and clones into them; cgroup_attach_permissions() wants cgroup.procs of the
        // common ancestor, S. The limit files stay ours.
        for path in [work.clone(), work.join("cgroup.procs"), sandbox.join("cgroup.procs"), init.join("cgroup.procs")] {
            std::os::unix::fs::chown(&path, Some(keeper), Some(keeper)).map_err(|source| CgroupError::File {
                action: "hand over",
                path,
                source,
            })?;
        }
        let mut v1 = Vec::new();
        for (controller, base) in &self.v1 {
            let directory = base.join(name);
            self.create_below(base, &directory)?;
            v1.push((*controller, open_directory(&directory)?));
        }
        Ok(Group { name: name.to_owned(), init: open_directory(&init)?, work: open_directory(&work)?, v1 })
    }

    /// Makes a group of one sandbox. Another launcher that has just ended may have removed the base, which it shared with us.
    fn create_below(&self, base: &Path, directory: &Path) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::File { action: "create", path: directory.to_owned(), source };
        for _ in 0..8 {
            match fs::create_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => return other.map_err(failed),
            }
            if fs::create_dir(base).is_ok() && self.mode == Mode::Unified {
                // While there was no base, a service manager may have taken back what nobody used above it.
                for directory in base.parent().into_iter().chain([base]) {
                    enable(directory, &CONTROLLERS);
                }
            }
        }
        fs::create_dir(directory).map_err(failed)
    }

    /// Moves `pid` into the v1 groups. Blocks for a grace period per hierarchy: never on a request path.
    ///
    /// # Errors
    /// [`CgroupError::File`].
    pub fn attach_v1(&self, name: &str, pid: i32) -> Result<(), CgroupError> {
        for (_, base) in &self.v1 {
            write(&base.join(name).join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

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
                    .map_err(|e| failed("cpu", e.to_string()))
            }
            Mode::Hybrid => {
                for (controller, base) in &self.v1 {
                    let directory = base.join(name);
                    let failed =
                        |message: String| CgroupError::Limit { limit: controller, path: directory.clone(), message };
                    match *controller {
                        "memory" => {
                            let memory_controller = MemController::new(directory.clone(), false);
                            memory_controller.set_limit(memory).map_err(|e| failed(e.to_string()))?;
                            // Must follow the memory limit: memory plus swap may not be the smaller one.
                            if directory.join("memory.memsw.limit_in_bytes").exists() {
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

    /// Kills everything in the sandbox. A frozen v2 group dies too.
    pub fn kill(&self, name: &str) {
        if let Some(base) = &self.unified {
            // Absent below Linux 5.14; the caller has killed process 1, and its pid namespace with it, already.
            let _ = write(&base.join(name).join("cgroup.kill"), "1");
        }
    }

    /// Freezes or thaws the workload.
    ///
    /// # Errors
    /// [`CgroupError::File`].
    pub fn freeze(&self, name: &str, frozen: bool) -> Result<(), CgroupError> {
        write(&self.work(name).join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Host pids of every process of the sandbox.
    #[must_use]
    pub fn processes(&self, name: &str) -> Vec<u32> {
        let Some(base) = &self.unified else { return Vec::new() };
        let mut found = Vec::new();
        let mut pending = vec![base.join(name)];
        while let Some(directory) = pending.pop() {
            found.extend(
                read(&directory.join("cgroup.procs")).split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()),
            );
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            pending.extend(entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        found
    }

    /// Processes that the kernel killed because a memory limit was reached. Cheaper than the whole account: it stands
    /// between the end of a sandbox and the answer to whoever waits for it.
    #[must_use]
    pub fn oom_kills(&self, name: &str) -> u64 {
        match self.mode {
            Mode::Unified => field(&self.work(name).join("memory.events"), "oom_kill"),
            Mode::Hybrid => {
                let memory = self.v1.iter().find(|(controller, _)| *controller == "memory");
                memory.map_or(0, |(_, base)| field(&base.join(name).join("memory.oom_control"), "oom_kill"))
            }
            Mode::None => 0,
        }
    }

    /// The kernel's account of a sandbox.
    #[must_use]
    pub fn account(&self, name: &str) -> Account {
        let mut account = Account::default();
        match self.mode {
            Mode::Unified => {
                let work = self.work(name);
                account.memory_bytes = number(&work.join("memory.current"));
                account.memory_peak_bytes = number(&work.join("memory.peak"));
                account.oom_kills = field(&work.join("memory.events"), "oom_kill");
                account.pids = number(&work.join("pids.current"));
                account.pids_refused = field(&work.join("pids.events"), "max");
                account.cpu_usec = field(&work.join("cpu.stat"), "usage_usec");
                account.memory_limit = number(&work.join("memory.max"));
                account.pids_limit = number(&work.join("pids.max"));
            }
            Mode::Hybrid => {
                for (controller, base) in &self.v1 {
                    let directory = base.join(name);
                    match *controller {
                        "memory" => {
                            account.memory_bytes = number(&directory.join("memory.usage_in_bytes"));
                            account.memory_peak_bytes = number(&directory.join("memory.max_usage_in_bytes"));
                            account.oom_kills = field(&directory.join("memory.oom_control"), "oom_kill");
                            account.memory_limit = number(&directory.join("memory.limit_in_bytes"));
                        }
                        "pids" => {
                            account.pids = number(&directory.join("pids.current"));
                            account.pids_refused = field(&directory.join("pids.events"), "max");
                            account.pids_limit = number(&directory.join("pids.max"));
                        }
                        "cpuacct" => account.cpu_usec = number(&directory.join("cpuacct.usage")) / 1000,
                        _ => {}
                    }
                }
            }
            Mode::None => {}
        }
        account
    }

    /// Removes the groups of a sandbox. False: something is still inside, try again later.
    #[must_use]
    pub fn remove(&self, name: &str) -> bool {
        let mut gone = true;
        if let Some(base) = &self.unified {
            gone &= remove_tree(&base.join(name), 3);
        }
        for (_, base) in &self.v1 {
            gone &= remove_tree(&base.join(name), 1);
        }
        gone
    }

    /// Names with this prefix that have a group here.
    #[must_use]
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let Some(base) = &self.unified else { return Vec::new() };
        let Ok(entries) = fs::read_dir(base) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect()
    }

    /// Removes every group with this prefix, and our bases unless another launcher uses them, when the launcher ends for good.
    pub fn close(&self, prefix: &str) {
        for name in self.names(prefix) {
            self.kill(&name);
            for _ in 0..200 {
                if self.remove(&name) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.remove_bases();
    }

    /// Removes our bases as far as they are empty.
    fn remove_bases(&self) {
        for base in self.unified.iter().chain(self.v1.iter().map(|(_, base)| base)) {
            let _ = fs::remove_dir(base);
        }
    }

    fn work(&self, name: &str) -> PathBuf {
        self.unified.clone().unwrap_or_default().join(name).join("work")
    }
}

/// Period of the processor quota, microseconds: the kernel's own default.
const PERIOD_USEC: u64 = 100_000;

/// One place where a hierarchy is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    /// The group that is the root of the mount, as this process names it. A container may be shown a part of the tree.
    root: String,
    point: PathBuf,
}

impl Mount {
    /// Whether the group at `path` can be seen here.
    fn holds(&self, path: &str) -> bool {
        Path::new(path).strip_prefix(&self.root).is_ok()
    }

    /// Where the group at `path` is; the mount point itself when it is not below it.
    fn locate(&self, path: &str) -> PathBuf {
        match Path::new(path).strip_prefix(&self.root) {
            Ok(below) if below.as_os_str().is_empty() => self.point.clone(),
            Ok(below) => self.point.join(below),
            Err(_) => self.point.clone(),
        }
    }
}

/// Where the hierarchies are mounted, in the order in which they were.
#[derive(Debug, Default)]
struct Mounts {
    unified: Vec<Mount>,
    v1: Vec<(String, Mount)>,
}

impl Mounts {
    fn read() -> Self {
        Self::parse(&read(Path::new("/proc/self/mountinfo")))
    }

    /// Reads proc(5) mountinfo: root and mount point are fields 4 and 5, type and super options follow the lone dash.
    fn parse(text: &str) -> Self {
        let mut mounts = Self::default();
        for line in text.lines() {
            let Some((front, back)) = line.split_once(" - ") else { continue };
            let mut fields = front.split(' ').skip(3);
            let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
            let mount = Mount { root: root.to_owned(), point: PathBuf::from(point) };
            let mut back = back.split(' ');
            match back.next() {
                Some("cgroup2") => mounts.unified.push(mount),
                Some("cgroup") => {
                    for option in back.nth(1).unwrap_or_default().split(',') {
                        if V1_CONTROLLERS.contains(&option) {
                            mounts.v1.push((option.to_owned(), mount.clone()));
                        }
                    }
                }
                _ => {}
            }
        }
        mounts
    }
}

/// `/proc/self/cgroup` as (controllers, path); the unified hierarchy has no controllers.
fn own_paths() -> Vec<(String, String)> {
    read(Path::new("/proc/self/cgroup"))
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            Some((controllers.to_owned(), path.to_owned()))
        })
        .collect()
}

fn own_path<'a>(own: &'a [(String, String)], controller: &str) -> &'a str {
    own.iter()
        .find(|(controllers, _)| controllers.split(',').any(|name| name == controller))
        .map_or("/", |(_, path)| path.as_str())
}

/// Makes the base in a unified host and enables the controllers on the way.
///
/// Under systemd with `DelegateSubgroup=launcher` the base is the unit's own group, the parent of ours. Elsewhere it is a
/// group at the root of what we see. In a container that root may hold processes (the container's own first process), and
/// the kernel then refuses to enable controllers below it; those processes are moved into a leaf first.
fn prepare_unified(mount: &Path, own_directory: &Path, tag: &str) -> Result<PathBuf, CgroupError> {
    let parent = if own_directory.file_name().is_some_and(|name| name == "launcher") {
        own_directory.parent().unwrap_or(mount).to_owned()
    } else {
        mount.to_owned()
    };
    if !enable(&parent, &CONTROLLERS) && parent.join("cgroup.type").exists() {
        let leaf = parent.join("sandbox-runner-host");
        make_directory(&leaf)?;
        for pid in read(&parent.join("cgroup.procs")).split_whitespace() {
            // A process that ended in between is no problem, and one that cannot be moved shows in the next step.
            let _ = write(&leaf.join("cgroup.procs"), pid);
        }
        enable(&parent, &CONTROLLERS);
    }
    let base = parent.join(format!("sandbox-runner-{tag}"));
    make_directory(&base)?;
    enable(&base, &CONTROLLERS);
    Ok(base)
}

fn enable(directory: &Path, controllers: &[&str]) -> bool {
    let file = directory.join("cgroup.subtree_control");
    let mut all = true;
    for controller in controllers {
        all &= write(&file, &format!("+{controller}")).is_ok();
    }
    all
}

/// Removes a tree of groups of at most `depth` levels below `directory`.
fn remove_tree(directory: &Path, depth: u32) -> bool {
    // A group without children goes at once; listing one costs more than removing it.
    if is_removed(directory) {
        return true;
    }
    if depth == 0 {
        return false;
    }
    let Ok(entries) = fs::read_dir(directory) else { return false };
    let mut children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    children.all(|child| remove_tree(&child.path(), depth - 1)) && is_removed(directory)
}

fn is_removed(directory: &Path) -> bool {
    fs::remove_dir(directory).err().is_none_or(|error| error.kind() == io::ErrorKind::NotFound)
}

fn make_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::File { action: "create", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, CgroupError> {
    open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, FileMode::empty())
        .map_err(|errno| CgroupError::File { action: "open", path: path.to_owned(), source: errno.into() })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    let failed = |source| CgroupError::File { action: "write", path: path.to_owned(), source };
    File::options().write(true).open(path).map_err(failed)?.write_all(value.as_bytes()).map_err(failed)
}

/// A file that this kernel or this host does not have is no failure where the receipt shows the effect.
fn absent(error: CgroupError) -> Result<(), CgroupError> {
    match &error {
        CgroupError::File { source, .. } if source.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A file with one number; "max" and absence read as 0.
fn number(path: &Path) -> u64 {
    read(path).trim().parse().unwrap_or(0)
}

/// A field of a flat keyed file.
fn field(path: &Path, key: &str) -> u64 {
    read(path).lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok()).unwrap_or(0)
}

/// Borrowed v1 directory by controller name.
impl Group {
    /// The v1 directory of `controller`.
    #[must_use]
    pub fn v1_directory(&self, controller: &str) -> Option<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        self.v1.iter().find(|(name, _)| *name == controller).map(|(_, fd)| fd.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_host_is_read_from_mountinfo() {
        let mounts = Mounts::parse(
            "30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
             31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
             32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpuacct,x\n\
             33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(mounts.unified, [Mount { root: "/".to_owned(), point: PathBuf::from("/sys/fs/cgroup/unified") }]);
        let names: Vec<&str> = mounts.v1.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["cpu", "cpuacct"]);
    }

    #[test]
    fn the_own_group_is_found_below_the_part_of_the_tree_that_a_container_is_shown() {
        let at = |root: &str| Mount { root: root.to_owned(), point: PathBuf::from("/c") };
        assert_eq!(at("/").locate("/pod/a"), PathBuf::from("/c/pod/a"));
        assert_eq!(at("/pod/a").locate("/pod/a"), PathBuf::from("/c"));
        assert_eq!(at("/pod").locate("/pod/a/b"), PathBuf::from("/c/a/b"));
        assert!(!at("/pod/a").holds("/pod/ab"), "a name that begins alike is another group");
        // The tree above the root of our own cgroup namespace: where in it we are cannot be told.
        assert!(!at("/../..").holds("/"));
    }

    #[test]
    fn the_own_path_is_found_in_a_joined_hierarchy() {
        let own = vec![("cpu,cpuacct".to_owned(), "/a".to_owned()), (String::new(), "/b".to_owned())];
        assert_eq!(own_path(&own, "cpuacct"), "/a");
        assert_eq!(own_path(&own, ""), "/b");
        assert_eq!(own_path(&own, "memory"), "/");
    }
}
