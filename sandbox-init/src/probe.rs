//! The attacks that `doctor` makes from inside a throw-away sandbox, as its workload.
//!
//! Each attempt does the forbidden thing and looks at what the kernel says. Nothing is inferred from a version, a file or
//! what was asked for. The report is JSON: `{"attempts":[{"layer","attempt","errno","held","detail"}]}`.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde::Serialize;

use crate::sys::process::{Cloned, attempt, exit_now};

/// One attack and how it went.
#[derive(Debug, Serialize)]
struct Attempt {
    layer: &'static str,
    attempt: &'static str,
    errno: i32,
    held: bool,
    detail: String,
}

#[derive(Debug, Serialize)]
struct Report {
    attempts: Vec<Attempt>,
}

/// Runs every attack. Takes up to two seconds. `alone`: the sandbox has namespaces of its own.
#[must_use]
pub fn run(alone: bool) -> String {
    let mut attempts = Vec::new();
    principals(&mut attempts);
    if !alone {
        neighbours(&mut attempts);
    }
    namespaces(&mut attempts);
    files(&mut attempts);
    system_calls(&mut attempts);
    status(&mut attempts);
    limits(&mut attempts);
    serde_json::to_string(&Report { attempts }).unwrap_or_default()
}

/// An attack that must fail.
fn refused<T>(layer: &'static str, attempt: &'static str, result: Result<T, Errno>) -> Attempt {
    match result {
        Ok(_) => Attempt { layer, attempt, errno: 0, held: false, detail: "succeeded".to_owned() },
        Err(errno) => Attempt { layer, attempt, errno: errno as i32, held: true, detail: errno.desc().to_owned() },
    }
}

/// An attack that must fail in one of these ways, because another errno would mean that another layer stopped it.
fn refused_with<T>(
    layer: &'static str,
    attempt: &'static str,
    result: Result<T, Errno>,
    expected: &[Errno],
) -> Attempt {
    let mut made = refused(layer, attempt, result);
    made.held = made.held && expected.iter().any(|errno| *errno as i32 == made.errno);
    made
}

fn fact(layer: &'static str, attempt: &'static str, held: bool, detail: impl Into<String>) -> Attempt {
    Attempt { layer, attempt, errno: 0, held, detail: detail.into() }
}

fn io<T>(result: std::io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))
}

fn number(value: libc::c_int) -> u32 {
    u32::from_ne_bytes(value.to_ne_bytes())
}

fn principals(attempts: &mut Vec<Attempt>) {
    let first = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let map = first("/proc/self/uid_map");
    let host_root = map.lines().any(|line| line.split_whitespace().nth(1) == Some("0") && line.contains("4294967295"));
    attempts.push(fact("user_namespace", "uid 0 inside is uid 0 of the host", !host_root, map.trim().to_owned()));
    attempts.push(refused("separate_principals", "kill(1, SIGKILL)", kill(Pid::from_raw(1), Signal::SIGKILL)));
    attempts.push(refused("separate_principals", "kill(2, SIGKILL)", kill(Pid::from_raw(2), Signal::SIGKILL)));
    attempts.push(refused("separate_principals", "open /proc/1/mem", io(fs::File::open("/proc/1/mem"))));
}

/// What a sandbox without namespaces of its own must not reach in the container around it.
fn neighbours(attempts: &mut Vec<Attempt>) {
    let keeper = nix::unistd::getppid();
    attempts.push(refused("separate_principals", "kill(process 1, SIGKILL)", kill(keeper, Signal::SIGKILL)));
    let memory = io(fs::File::open(format!("/proc/{keeper}/mem")));
    attempts.push(refused("separate_principals", "open the memory of process 1", memory));
    let only = [Errno::EACCES];
    for (attempt, result) in [
        ("list /", io(fs::read_dir("/").map(drop))),
        ("list /etc", io(fs::read_dir("/etc").map(drop))),
        ("list /run", io(fs::read_dir("/run").map(drop))),
        ("list /tmp", io(fs::read_dir("/tmp").map(drop))),
        ("write a file in /tmp", io(fs::File::create("/tmp/probe-file").map(drop))),
        ("write a file in /dev/shm", io(fs::File::create("/dev/shm/probe-file").map(drop))),
    ] {
        let mut made = refused_with("landlock", attempt, result, &only);
        // A container without that directory has nothing to be kept from.
        made.held |= made.errno == libc::ENOENT;
        attempts.push(made);
    }
    for (attempt, family, kind) in [
        ("socket(AF_INET)", libc::AF_INET, libc::SOCK_STREAM),
        ("socket(AF_INET6)", libc::AF_INET6, libc::SOCK_DGRAM),
        ("socket(AF_NETLINK)", libc::AF_NETLINK, libc::SOCK_RAW),
        ("socket(AF_UNIX, SOCK_DGRAM)", libc::AF_UNIX, libc::SOCK_DGRAM),
    ] {
        let made = crate::sys::process::attempt(libc::SYS_socket, [number(family), number(kind), 0, 0, 0]);
        attempts.push(refused_with("seccomp", attempt, made, &[Errno::EAFNOSUPPORT]));
    }
    let segment = attempt(libc::SYS_shmget, [0, 4096, 0o1600, 0, 0]);
    attempts.push(refused_with("seccomp", "shmget", segment, &[Errno::EPERM]));
}

fn namespaces(attempts: &mut Vec<Attempt>) {
    let unshare = |flag: libc::c_int| attempt(libc::SYS_unshare, [number(flag), 0, 0, 0, 0]);
    attempts.push(refused("nested_user_namespace", "unshare(CLONE_NEWUSER)", unshare(libc::CLONE_NEWUSER)));
    attempts.push(refused("mount_namespace", "unshare(CLONE_NEWNS)", unshare(libc::CLONE_NEWNS)));
    attempts.push(refused("mount_namespace", "umount2(\"\")", attempt(libc::SYS_umount2, [0; 5])));
    attempts.push(refused("root_switch", "open /proc/1/root", io(fs::read_dir("/proc/1/root"))));
    let seen = fs::read_dir("/proc").map(|entries| {
        entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
            .count()
    });
    let seen = seen.unwrap_or(0);
    // This process and, at most, a shell and a spare: nothing of the host.
    attempts.push(fact("pid_namespace", "list processes", seen <= 4, format!("{seen} processes seen")));
    let destination = SocketAddr::from(([198, 51, 100, 1], 80));
    let reached = io(TcpStream::connect_timeout(&destination, Duration::from_millis(300)));
    attempts.push(refused("network_namespace", "connect to an address outside", reached));
    let interfaces = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let foreign =
        interfaces.lines().skip(2).filter_map(|line| line.split_once(':')).any(|(name, _)| name.trim() != "lo");
    attempts.push(fact("network_namespace", "list interfaces", !foreign, "loopback only"));
    let segments = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default().lines().count();
    attempts.push(fact(
        "ipc_namespace",
        "list System V segments",
        segments <= 1,
        format!("{} segments seen", segments.saturating_sub(1)),
    ));
    attempts.push(refused("uts_namespace", "sethostname", nix::unistd::sethostname("breached")));
    let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let rooted = cgroup.lines().all(|line| line.ends_with(":/"));
    attempts.push(fact("cgroup_namespace", "read /proc/self/cgroup", rooted, "paths begin at the sandbox"));
}

fn files(attempts: &mut Vec<Attempt>) {
    let mut byte = [0_u8; 1];
    let core = fs::File::open("/proc/kcore").and_then(|mut file| file.read(&mut byte));
    let hidden = !matches!(core, Ok(read) if read > 0);
    attempts.push(fact("proc_masked", "read /proc/kcore", hidden, format!("{core:?}")));
    let pattern = io(fs::File::options().write(true).open("/proc/sys/kernel/core_pattern"));
    attempts.push(refused("proc_masked", "open /proc/sys/kernel/core_pattern for writing", pattern));
    let node = mknod("/dev/probe", SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 1));
    attempts.push(refused("private_devices", "mknod /dev/probe c 1 1", node));
    let memory = io(fs::File::open("/dev/mem"));
    attempts.push(refused("private_devices", "open /dev/mem", memory));
    attempts.push(landlock());
    let owner = fs::metadata("/etc").map(|found| std::os::unix::fs::MetadataExt::uid(&found));
    attempts.push(fact("idmapped_lowers", "stat /etc", matches!(owner, Ok(0)), format!("owner {owner:?}")));
}

/// First ABI that knows commands to devices.
const DEVICE_COMMANDS_ABI: i32 = 5;
/// Domains that the kernel stacks on one process.
const STACKED_DOMAINS: i32 = 16;

/// What landlock alone stops, which depends on the kernel.
fn landlock() -> Attempt {
    let layer = "landlock";
    let abi = crate::sys::landlock::abi().unwrap_or(0);
    // What `/proc` must not show is covered by a device that is not below `/dev`.
    if abi >= DEVICE_COMMANDS_ABI
        && let Ok(device) = fs::File::open("/proc/cmdline")
        && device.metadata().is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_char_device(&found.file_type()))
    {
        let command = nix::unistd::isatty(&device);
        return refused_with(layer, "ioctl(TCGETS) on a device outside of /dev", command, &[Errno::EACCES]);
    }
    // An overlay takes the 0:0 node for "deleted". The kernel lets everybody make it, and so do the domains of newer kernels.
    let path = "/tmp/probe-whiteout";
    let whiteout = mknod(path, SFlag::S_IFCHR, Mode::S_IRWXU, 0);
    if whiteout.is_err() {
        return refused_with(layer, "mknod /tmp/probe-whiteout c 0 0", whiteout, &[Errno::EACCES]);
    }
    let _ = fs::remove_file(path);
    let stacked = child_code(stack_domains).unwrap_or(STACKED_DOMAINS);
    fact(layer, "stack 16 domains", stacked < STACKED_DOMAINS, format!("{stacked} more domains entered"))
}

/// Enters domains until the kernel refuses, and says how many.
fn stack_domains() -> i32 {
    use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
    let enter = || {
        let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        ruleset.handle_access(AccessFs::MakeBlock)?.create()?.restrict_self()
    };
    let entered = (0..STACKED_DOMAINS).take_while(|_| enter().is_ok()).count();
    i32::try_from(entered).unwrap_or(STACKED_DOMAINS)
}

fn system_calls(attempts: &mut Vec<Attempt>) {
    let zero = [0; 5];
    let unknown = [Errno::ENOSYS];
    attempts.push(refused_with("seccomp", "io_uring_setup", attempt(libc::SYS_io_uring_setup, zero), &unknown));
    attempts.push(refused_with("seccomp", "keyctl", attempt(libc::SYS_keyctl, zero), &unknown));
    attempts.push(refused_with("seccomp", "clone3", attempt(libc::SYS_clone3, zero), &unknown));
    attempts.push(refused_with(
        "seccomp",
        "userfaultfd",
        attempt(libc::SYS_userfaultfd, zero),
        &[Errno::EPERM, Errno::ENOSYS],
    ));
}

fn status(attempts: &mut Vec<Attempt>) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim).unwrap_or_default()
    };
    attempts.push(fact("no_new_privileges", "read NoNewPrivs", field("NoNewPrivs") == "1", field("NoNewPrivs")));
    let filters: u32 = field("Seccomp_filters").parse().unwrap_or(0);
    attempts.push(fact("seccomp", "count filters", filters >= 2, format!("{filters} filters")));
    attempts.push(refused("capabilities", "capset with CAP_SYS_ADMIN", crate::sys::capability::set(1 << 21)));
    let bounding = u64::from_str_radix(field("CapBnd"), 16).unwrap_or(u64::MAX);
    // CAP_SYS_ADMIN, CAP_SYS_PTRACE, CAP_NET_ADMIN, CAP_SYS_MODULE (linux/capability.h).
    let dangerous = (1 << 21) | (1 << 19) | (1 << 12) | (1 << 16);
    attempts.push(fact("capabilities", "look at the bounding set", bounding & dangerous == 0, field("CapBnd")));
}

/// Memory that a limit of the throw-away sandbox must stop.
const HOG_BYTES: usize = 512 << 20;
/// Processes that a limit of the throw-away sandbox must stop.
const MOST_PROCESSES: usize = 256;
/// Wall time of the processor attack.
const BURN: Duration = Duration::from_millis(400);

fn limits(attempts: &mut Vec<Attempt>) {
    attempts.push(burn_processor());
    attempts.push(fork_many());
    attempts.push(fill_disk());
    // Last: the kernel may take more than the one that asks.
    attempts.push(hog_memory());
}

fn child(work: impl FnOnce()) -> nix::Result<(nix::unistd::Pid, std::os::fd::OwnedFd)> {
    // The filter answers ENOSYS to clone3, which is why this uses the older call.
    match crate::sys::process::fork()? {
        Cloned::Child => {
            work();
            exit_now(0)
        }
        Cloned::Parent { pid, pidfd } => Ok((pid, pidfd)),
    }
}

/// Runs `work` in a child and returns what it returned.
fn child_code(work: impl FnOnce() -> i32) -> nix::Result<i32> {
    let (_, pidfd) = child(|| exit_now(work()))?;
    match waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED)? {
        WaitStatus::Exited(_, code) => Ok(code),
        _ => Err(Errno::ECHILD),
    }
}

fn burn_processor() -> Attempt {
    let layer = "cgroup_cpu";
    let what = "burn every processor for 400 ms";
    let started = Instant::now();
    let mut children = Vec::new();
    for _ in 0..4 {
        let spin = move || {
            while started.elapsed() < BURN {
                std::hint::spin_loop();
            }
        };
        if let Ok((_, pidfd)) = child(spin) {
            children.push(pidfd);
        }
    }
    for pidfd in &children {
        let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
    }
    let used = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)
        .map_or(0.0, |usage| seconds(usage.user_time()) + seconds(usage.system_time()));
    let share = used / started.elapsed().as_secs_f64();
    // The throw-away sandbox is given half a processor; the quota is filled in periods, so a part of one more may be used.
    Attempt {
        layer,
        attempt: what,
        errno: 0,
        held: share < 0.85,
        detail: format!("{share:.2} processors used of 0.50 allowed"),
    }
}

fn seconds(time: nix::sys::time::TimeVal) -> f64 {
    use nix::sys::time::TimeValLike;
    std::time::Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap_or(0)).as_secs_f64()
}

fn fork_many() -> Attempt {
    let mut children = Vec::new();
    let mut errno = 0;
    for _ in 0..MOST_PROCESSES {
        match child(|| {
            nix::unistd::pause();
        }) {
            Ok(made) => children.push(made),
            Err(refused) => {
                errno = refused as i32;
                break;
            }
        }
    }
    for (pid, pidfd) in &children {
        // Not by pidfd: where process 1 and the workload are one user, the filter refuses that call. Not yet waited for,
        // the child still owns its pid.
        let _ = nix::sys::signal::kill(*pid, nix::sys::signal::Signal::SIGKILL);
        let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
    }
    let held = errno == libc::EAGAIN;
    Attempt {
        layer: "cgroup_pids",
        attempt: "fork without end",
        errno,
        held,
        detail: format!("{} processes made", children.len()),
    }
}

fn fill_disk() -> Attempt {
    let path = "/var/tmp/probe-fill";
    let block = vec![1_u8; 1 << 20];
    let mut written = 0_u32;
    let result = fs::File::create(path).and_then(|mut file| {
        for _ in 0..128 {
            file.write_all(&block)?;
            written += 1;
        }
        Ok(())
    });
    let _ = fs::remove_file(path);
    let mut made =
        refused_with("disk_limit", "write 128 MiB to the root filesystem", io(result), &[Errno::ENOSPC, Errno::EDQUOT]);
    made.detail = format!("{} after {written} MiB", made.detail);
    made
}

fn hog_memory() -> Attempt {
    let hog = || {
        let mut held = Vec::new();
        while held.len() < HOG_BYTES / (1 << 20) {
            held.push(vec![1_u8; 1 << 20]);
        }
        std::hint::black_box(&held);
    };
    let ended = child(hog).and_then(|(_, pidfd)| waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED));
    let held = matches!(ended, Ok(WaitStatus::Signaled(_, Signal::SIGKILL, _)));
    fact("cgroup_memory", "use 512 MiB", held, format!("{ended:?}"))
}
