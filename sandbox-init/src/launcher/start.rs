//! Privileged: from a bare process to a serving launcher.
//!
//! The order is: signals and descriptors (whatever the caller left behind), own image, policy, user namespace where there
//! is no privilege, cgroups, locks, sockets, and last the trimmed mount namespace, after which no host path can be opened.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, sched_getaffinity, unshare};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, getsockopt, socketpair, sockopt::SockType as SockTypeOption,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, geteuid};
use sha2::{Digest, Sha256};

use super::background::{Background, chain};
use super::cgroup::Tree;
use super::files::Owners;
use super::host;
use super::ids::{IdsError, Slots};
use super::kernel_log::KernelLog;
use super::listen::listen_on;
use super::nested;
use super::policy_file::{self, Policy, PolicyError};
use super::replace::{FIRST_OTHER, Handover, Program, ReplaceError};
use super::report::report;
use super::serve::{End, Launcher, Parts, hold_signals};
use super::shape::{self, Refusal, Shape};
use super::state;
use crate::sys::process::{CloneArguments, Cloned, clone3, close_range, inherited_descriptor, reset_signals};

/// Why the launcher cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The locks.
    #[error(transparent)]
    Ids(#[from] IdsError),
    /// The mount namespace.
    #[error(transparent)]
    Host(#[from] host::HostError),
    /// The program was not replaced.
    #[error(transparent)]
    Replace(#[from] ReplaceError),
    /// A kernel call.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The cause.
        #[source]
        source: nix::Error,
    },
    /// A file.
    #[error("cannot prepare {}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A directory of ours belongs to somebody else.
    #[error("{} belongs to uid {owner}; remove it or give it to the launcher's user", path.display())]
    Foreign {
        /// Where.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Too few descriptors.
    #[error("the limit of open files is {hard}; raise it to at least 1024 (ulimit -Hn, LimitNOFILE=)")]
    FewDescriptors {
        /// The hard limit.
        hard: u64,
    },
    /// The ids of the host itself.
    #[error("ids.base is {base}; ids below 65536 belong to the host's own users")]
    LowIds {
        /// The base.
        base: u32,
    },
    /// No namespace can be made.
    #[error(
        "sandboxes need namespaces, which the kernel allows nobody here; give the container what the tier pod needs, or \
         accept the tier nested with `allow_nested = true` in the policy"
    )]
    NoNamespaces(#[source] Refusal),
    /// Not even other users can be had.
    #[error("no namespace can be made here, and not even other users can be separated")]
    NotEvenNested(#[source] Refusal),
    /// Nobody to serve.
    #[error("descriptor 0 is no connection and the policy names no `listen` socket")]
    NoSocket,
}

impl StartError {
    /// Exit code: what only the operator can heal is told apart, so that a service manager does not try again.
    fn code(&self) -> u8 {
        match self {
            Self::Policy(_) | Self::LowIds { .. } | Self::NoSocket | Self::Foreign { .. } => CONFIGURATION,
            Self::Ids(_)
            | Self::Host(_)
            | Self::Replace(_)
            | Self::Step { .. }
            | Self::File { .. }
            | Self::FewDescriptors { .. }
            | Self::NoNamespaces(_)
            | Self::NotEvenNested(_) => FAILED,
        }
    }
}

/// What trying again may heal.
const FAILED: u8 = 1;
/// Wrong usage.
const USAGE: u8 = 2;
/// `EX_CONFIG` of sysexits.h.
const CONFIGURATION: u8 = 78;

pub(super) fn step(step: &'static str) -> impl FnOnce(nix::Error) -> StartError {
    move |source| StartError::Step { step, source }
}

pub(super) fn file(path: &Path) -> impl FnOnce(std::io::Error) -> StartError + '_ {
    move |source| StartError::File { path: path.to_owned(), source }
}

/// Everything that differs between a first start and a replaced program.
struct Beginning {
    policy: Policy,
    policy_text: String,
    tree: Tree,
    slots: Slots,
    host_root: host::HostRoot,
    listener: Option<OwnedFd>,
    connection: Option<OwnedFd>,
    program: Option<Program>,
    shape: Shape,
    refusal: Option<Refusal>,
    places: host::Places,
    kernel_log: KernelLog,
}

/// Runs the launcher until it has nothing left to serve.
///
/// # Errors
/// [`StartError`] says what is missing.
pub fn run(policy_path: &Path) -> Result<(), StartError> {
    reset_signals();
    hold_signals().map_err(step("hold signals"))?;
    umask(Mode::from_bits_truncate(0o022));
    close_range(3, i32::MAX).map_err(step("close inherited descriptors"))?;
    let image = own_image()?;
    let (mut policy, policy_text) = policy_file::load(policy_path)?;
    // One that is installed may be started with any socket as its input, as by a socket unit.
    let connection = if policy.listen.is_none() { connection() } else { None };
    let (shape, refusal) = shape::find();
    let rootless = shape == Shape::Unprivileged;
    if let Some(refusal) = refusal.filter(|refusal| !policy.allow_nested || !refusal.is_for_good()) {
        return Err(StartError::NoNamespaces(refusal));
    }
    if rootless {
        enter_user_namespace()?;
        policy.ids = super::policy_file::Ids { base: 0, per_sandbox: 1, slots: policy.ids.slots };
    }
    if !rootless && policy.ids.base < LOWEST_ID && !host::in_user_namespace() {
        return Err(StartError::LowIds { base: policy.ids.base });
    }
    protect_memory(rootless)?;
    raise_descriptor_limit()?;
    if shape == Shape::Nested {
        nested::adopt_orphans().map_err(step("adopt orphans"))?;
        policy.ids = nested::draw(&policy.ids).map_err(file(Path::new("/dev/urandom")))?;
    } else {
        host::separate()?;
    }
    let group = if rootless { None } else { Some(policy.runner_gid) };
    let own = [
        ("/state/sandboxes", own_directory(&policy.state_directory, "sandboxes", passage(shape), group)?),
        ("/state/launcher", own_directory(&policy.state_directory, "launcher", 0o700, None)?),
        ("/run/sandboxes", own_directory(&policy.run_directory, "sandboxes", 0o711, None)?),
    ];
    let tree = match shape {
        Shape::Nested => Tree::nothing(),
        Shape::Privileged | Shape::Unprivileged => Tree::open(&tag(&policy), !rootless),
    };
    let locks = policy.lock_directory.clone().unwrap_or_else(|| {
        if rootless { policy.run_directory.join("ids") } else { PathBuf::from("/run/sandbox-runner-ids") }
    });
    let slots = Slots::open(&locks, policy.ids.clone(), shape != Shape::Privileged)?;
    let listener = if connection.is_some() { None } else { Some(listen_on(&policy, rootless)?) };
    // Before the host's tree is left.
    let kernel_log = KernelLog::open();
    let program =
        policy.program.as_deref().map(Program::open).transpose().map_err(step("open the directory of `program`"))?;
    let (host_root, places) = if shape == Shape::Nested {
        let places = host::Places::of(&policy);
        nested::rehearse(&policy.ids, &places.sandboxes()).map_err(StartError::NotEvenNested)?;
        (host::HostRoot::default(), places)
    } else {
        let host_root = host::enter(&policy, &own, rootless, tree.mode() != super::cgroup::Mode::None)?;
        // The launcher has no use for any network.
        unshare(CloneFlags::CLONE_NEWNET).map_err(step("leave the network"))?;
        (host_root, host::Places::trimmed())
    };
    let beginning = Beginning {
        policy,
        policy_text,
        tree,
        slots,
        host_root,
        listener,
        connection,
        program,
        shape,
        refusal,
        places,
        kernel_log,
    };
    begin(beginning, image)
}

/// Goes on where the program before was replaced.
fn resume(name: CString) -> Result<(), StartError> {
    reset_signals();
    hold_signals().map_err(step("hold signals"))?;
    umask(Mode::from_bits_truncate(0o022));
    let handover = Handover::receive(name).map_err(step("take over from the program before"))?;
    close_range(FIRST_OTHER, i32::MAX).map_err(step("close inherited descriptors"))?;
    let image = own_image()?;
    protect_memory(false)?;
    let policy = policy_file::parse(&handover.policy, Path::new("(handed over)"))?;
    // What had to be mounted was mounted by the program before.
    let tree = Tree::open(&tag(&policy), false);
    let slots = Slots::new(handover.locks, policy.ids.clone(), false);
    let beginning = Beginning {
        policy_text: handover.policy,
        tree,
        slots,
        host_root: host::HostRoot::found(),
        listener: Some(handover.listener),
        connection: None,
        program: Some(handover.program),
        shape: Shape::Privileged,
        refusal: None,
        places: host::Places::trimmed(),
        kernel_log: KernelLog::handed_over(handover.kernel_log),
        policy,
    };
    begin(beginning, image)
}

/// Nobody else traces the launcher or reads its memory.
///
/// Children share this mark until they execute, and the kernel opens the namespaces of a protected child only with
/// CAP_SYS_PTRACE. A container's root may lack it; then whoever else is root in that container is let in, which owns
/// everything there anyway. The runner and all sandboxes have other ids.
fn protect_memory(rootless: bool) -> Result<(), StartError> {
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    let traces = crate::sys::capability::effective().is_ok_and(|held| held & CAP_SYS_PTRACE != 0);
    nix::sys::prctl::set_dumpable(rootless || !traces).map_err(step("protect the launcher's memory"))
}

/// A directory of ours below one that may belong to the runner: made if it is missing, never reached through a link, and
/// refused when anybody else could change it.
fn own_directory(parent: &Path, name: &str, mode: u32, group: Option<u32>) -> Result<OwnedFd, StartError> {
    use nix::sys::stat::{fchmod, fstat, mkdirat};
    let path = parent.join(name);
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let above = open(parent, flags, Mode::empty()).map_err(|errno| file(parent)(errno.into()))?;
    match mkdirat(&above, name, Mode::from_bits_truncate(0o700)) {
        Ok(()) | Err(nix::Error::EEXIST) => {}
        Err(errno) => return Err(file(&path)(errno.into())),
    }
    let opened = nix::fcntl::openat(&above, name, flags | OFlag::O_NOFOLLOW, Mode::empty())
        .map_err(|errno| file(&path)(errno.into()))?;
    let found = fstat(&opened).map_err(|errno| file(&path)(errno.into()))?;
    if found.st_uid != geteuid().as_raw() {
        return Err(StartError::Foreign { path, owner: found.st_uid });
    }
    if group.is_some() {
        nix::unistd::fchown(&opened, None, group.map(nix::unistd::Gid::from_raw)).map_err(step("own a directory"))?;
    }
    fchmod(&opened, Mode::from_bits_truncate(mode)).map_err(step("close a directory"))?;
    Ok(opened)
}

/// Mode of the directory that holds those of the sandboxes: the workload passes through it where it is no mount of its own.
fn passage(shape: Shape) -> u32 {
    if shape == Shape::Nested { 0o711 } else { 0o710 }
}

/// A sandbox takes about a dozen descriptors here; running out of them in the middle would end all of them.
fn raise_descriptor_limit() -> Result<(), StartError> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the descriptor limit"))?;
    if hard < LEAST_DESCRIPTORS {
        return Err(StartError::FewDescriptors { hard });
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(step("raise the descriptor limit"))
}

/// Ids below it belong to users of the host.
const LOWEST_ID: u32 = 65_536;

/// Fewest descriptors to serve with.
const LEAST_DESCRIPTORS: u64 = 1024;

fn own_image() -> Result<OwnedFd, StartError> {
    let image = open("/proc/self/exe", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(step("open the own image"))?;
    // Process 1 executes it as root of a namespace that owns nothing on this host: only the bits for "others" count.
    let found = nix::sys::stat::fstat(&image).map_err(step("look at the own image"))?;
    if found.st_mode & 0o005 != 0o005 {
        nix::sys::stat::fchmod(&image, Mode::from_bits_truncate(0o555))
            .map_err(step("make the own image executable"))?;
    }
    Ok(image)
}

fn begin(beginning: Beginning, image: OwnedFd) -> Result<(), StartError> {
    let Beginning {
        policy,
        policy_text,
        mut tree,
        slots,
        host_root,
        listener,
        connection,
        program,
        shape,
        refusal,
        places,
        kernel_log,
    } = beginning;
    tree.look_at_spools(&places.sandboxes());
    let rootless = shape == Shape::Unprivileged;
    let embedded = connection.is_some();
    let prefix = name_prefix(embedded);
    let kind = kind_prefix(embedded);
    let owners = Owners { runner_uid: policy.runner_uid, runner_gid: policy.runner_gid, shared: rootless };
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(step("make a socket pair"))?;
    let arguments = CloneArguments { flags: 0, exit_signal: libc::SIGCHLD, cgroup: None, ..CloneArguments::default() };
    let background_process = match clone3(&arguments).map_err(step("start the background process"))? {
        Cloned::Child => {
            // It ends with the launcher's end of the socket; what it starts begins with every signal open.
            reset_signals();
            drop((ours, connection, listener, slots, program, kernel_log));
            Background { tree, image, socket: theirs, embedded, prefix: kind, owners, shape, places, host_root }.run();
            crate::sys::process::exit_now(0)
        }
        Cloned::Parent { pidfd, .. } => pidfd,
    };
    drop(theirs);
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .map_err(step("never wait for the background process"))?;
    let for_later = (|| {
        Some(Handover {
            policy: policy_text,
            listener: listener.as_ref()?.try_clone().ok()?,
            locks: slots.directory().try_clone_to_owned().ok()?,
            program: program?,
            kernel_log: kernel_log.for_later(),
        })
    })();
    let parts = Parts {
        report: report(&policy, &tree, shape, refusal.as_ref()),
        policy,
        tree: tree.clone(),
        slots,
        host_root,
        background: ours,
        listener,
        connection,
        rootless,
        shape,
        places,
        processors: processors(),
        prefix,
        replaceable: for_later.is_some() && !embedded && shape == Shape::Privileged,
        kernel_log,
    };
    let checked = |handover: &Handover| handover.program.check();
    let launcher =
        Launcher::new(parts, for_later.as_ref().map(|handover| &handover.program)).map_err(step("prepare to serve"))?;
    let end = launcher.run().map_err(step("serve"))?;
    // The loop is gone and with it our end of the socket: the background process finishes and ends.
    let _ = nix::sys::wait::waitid(
        nix::sys::wait::Id::PIDFd(background_process.as_fd()),
        nix::sys::wait::WaitPidFlag::WEXITED,
    );
    match (end, for_later) {
        (End::Reexecute, Some(handover)) => {
            // Checked again, on the descriptor that is executed.
            let file = checked(&handover)?;
            Err(handover.execute(&file).into())
        }
        (End::Left, _) => Ok(()),
        (End::Stopped | End::Reexecute, _) => {
            tree.close(&kind_prefix(embedded));
            if !embedded {
                state::clear();
            }
            Ok(())
        }
    }
}

/// How names of this launcher begin: those of an embedded one are its own alone, the others are adopted by a successor.
fn kind_prefix(embedded: bool) -> String {
    if embedded { format!("e{}-", std::process::id()) } else { "s-".to_owned() }
}

/// The kind and eight random digits, so that a name never comes again, not even with the same pid after a restart.
fn name_prefix(embedded: bool) -> String {
    let random = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    let digits: String = random.chars().filter(char::is_ascii_hexdigit).take(8).collect();
    format!("{}{digits}", kind_prefix(embedded))
}

/// Descriptor 0, when the runner that started us put a connection there.
fn connection() -> Option<OwnedFd> {
    let input = inherited_descriptor(0).ok()?;
    let connected = matches!(getsockopt(&input, SockTypeOption), Ok(SockType::SeqPacket));
    if !connected {
        // Descriptor 0 stays open for whatever comes after us.
        std::mem::forget(input);
        return None;
    }
    let moved = crate::sys::process::duplicate_above(input.as_fd(), 3).ok()?;
    // Blocking would let one slow runner stop the loop.
    nix::fcntl::fcntl(&moved, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).ok()?;
    drop(input);
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    crate::sys::process::place_descriptor(null.as_raw_fd(), 0).ok()?;
    if null.as_raw_fd() == 0 {
        std::mem::forget(null);
    }
    Some(moved)
}

/// An ordinary user becomes root of a user namespace of his own, with the one id that he may map.
fn enter_user_namespace() -> Result<(), StartError> {
    let (uid, gid) = (geteuid(), nix::unistd::getegid());
    unshare(CloneFlags::CLONE_NEWUSER).map_err(step("make a user namespace"))?;
    for (path, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {uid} 1")),
        ("/proc/self/gid_map", format!("0 {gid} 1")),
    ] {
        fs::write(path, text).map_err(file(Path::new(path)))?;
    }
    Ok(())
}

/// Distinguishes launchers of one host in cgroup names.
fn tag(policy: &Policy) -> String {
    let digest = Sha256::digest(policy.run_directory.as_os_str().as_encoded_bytes());
    digest.iter().take(4).map(|byte| format!("{byte:02x}")).collect()
}

fn processors() -> Vec<u32> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else { return Vec::new() };
    (0..nix::sched::CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .filter_map(|cpu| u32::try_from(cpu).ok())
        .collect()
}

/// Arguments of the launcher role.
///
/// # Errors
/// What is wrong, for the caller's standard error, and the exit code.
pub fn main(arguments: &[CString]) -> Result<(), (String, u8)> {
    let usage = || ("usage: sandbox-init launcher --policy FILE".to_owned(), USAGE);
    let failed = |error: StartError| (chain(&error), error.code());
    let [flag, path] = arguments else { return Err(usage()) };
    if flag.as_bytes() == b"--resume" {
        return resume(path.clone()).map_err(failed);
    }
    if flag.as_bytes() != b"--policy" {
        return Err(usage());
    }
    let path = std::str::from_utf8(path.as_bytes()).map_err(|_| usage())?;
    run(Path::new(path)).map_err(failed)
}
