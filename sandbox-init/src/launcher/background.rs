//! Privileged: the launcher's second process, a copy of it made at start.
//!
//! Does everything that may block: making blanks (namespaces, v1 attaches, root filesystems ahead of need), removing cgroups
//! and uppers, asking for memory back. The request loop talks to it over a socket pair and never waits for it. When the
//! launcher is gone it finishes what it began; in embedded mode, where nobody will come back for the sandboxes, it ends them
//! and removes every trace.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::Pid;
use prost::Message;

use super::cgroup::{Group, Reclaim, Tree};
use super::files::{Files, Owners};
use super::forecast::{Ahead, AheadRoot, Amounts, Forecast, Site};
use super::host::{HostRoot, Places};
use super::nested;
use super::policy_file::Limits;
use super::rootfs::{Builder, Built};
use super::shape::Shape;
use super::spawn::{Blank, Private, Range, Unmade, Workshop, make_blank};
use crate::sys::socket::{Packet, receive_what_fits, send};
use crate::tree;

/// Launcher to background process.
#[derive(Clone, PartialEq, Message)]
pub struct Order {
    /// Make a blank with this name; empty: no.
    #[prost(string, tag = "1")]
    pub make: String,
    /// Remove what this name holds; empty: no. Its mount namespace may follow as a descriptor, to be dissolved first.
    #[prost(string, tag = "2")]
    pub remove: String,
    /// Id slot.
    #[prost(uint32, tag = "3")]
    pub slot: u32,
    /// First host id.
    #[prost(uint32, tag = "4")]
    pub base: u32,
    /// Number of ids.
    #[prost(uint32, tag = "5")]
    pub count: u32,
    /// What the next request will probably ask.
    #[prost(message, optional, tag = "6")]
    pub forecast: Option<Forecast>,
    /// Ask the kernel for the memory of the workload of this name, for as long as it stands still; empty: no.
    #[prost(string, tag = "7")]
    pub reclaim: String,
}

/// Background process to launcher.
#[derive(Clone, PartialEq, Message)]
pub struct Report {
    /// A blank of this name is ready; descriptors follow.
    #[prost(string, tag = "1")]
    pub made: String,
    /// This name holds nothing any more.
    #[prost(string, tag = "2")]
    pub removed: String,
    /// The order failed: what failed.
    #[prost(string, tag = "3")]
    pub failure: String,
    /// errno of the failure.
    #[prost(int32, tag = "4")]
    pub errno: i32,
    /// Id slot.
    #[prost(uint32, tag = "5")]
    pub slot: u32,
    /// Host pid of a made blank, or of the process 1 that was begun when the order failed; 0: there is none.
    #[prost(int32, tag = "6")]
    pub pid: i32,
    /// Names of the v1 directories among the descriptors.
    #[prost(string, repeated, tag = "7")]
    pub v1: Vec<String>,
    /// Whether cgroup directories are among the descriptors.
    #[prost(bool, tag = "8")]
    pub grouped: bool,
    /// Whether a user namespace is among the descriptors.
    #[prost(bool, tag = "9")]
    pub namespaced: bool,
    /// What was written into the limit files.
    #[prost(message, optional, tag = "10")]
    pub limits: Option<Amounts>,
    /// Size of the upper in memory among the descriptors; 0: there is none.
    #[prost(uint64, tag = "11")]
    pub upper_bytes: u64,
    /// Memory of the workload of this name was asked for: see `errno` and `reclaimed_bytes`.
    #[prost(string, tag = "12")]
    pub reclaimed: String,
    /// Bytes that it has fewer.
    #[prost(uint64, tag = "13")]
    pub reclaimed_bytes: u64,
    /// Whether a mount namespace is among the descriptors.
    #[prost(bool, tag = "14")]
    pub has_mounts: bool,
    /// Lower directory of the root filesystem over that upper; empty: there is none.
    #[prost(string, tag = "15")]
    pub lower: String,
    /// Whether that lower is shown through an id map.
    #[prost(bool, tag = "16")]
    pub idmapped: bool,
    /// Copies of the host's directories among the descriptors.
    #[prost(uint32, tag = "17")]
    pub directories: u32,
}

/// Largest order or report.
pub const PACKET_BYTES: usize = 16 * 1024;

/// What the background process needs.
#[derive(Debug)]
pub struct Background {
    /// Our cgroups.
    pub tree: Tree,
    /// The sealed image.
    pub image: OwnedFd,
    /// To the launcher.
    pub socket: OwnedFd,
    /// Nobody adopts the sandboxes of this launcher.
    pub embedded: bool,
    /// How the names of this launcher begin.
    pub prefix: String,
    /// Who gets the files of a sandbox.
    pub owners: Owners,
    /// How sandboxes are made.
    pub shape: Shape,
    /// Our directories.
    pub places: Places,
    /// The host's directories.
    pub host_root: HostRoot,
}

/// A removal that has to be tried again.
#[derive(Debug)]
struct Removal {
    order: Order,
    /// The last reference to its mounts, unless it lives.
    mounts: Vec<OwnedFd>,
    since: Instant,
}

/// How long a removal stands back for blanks.
const OVERDUE: Duration = Duration::from_millis(50);
/// How long a removal may fail before it is left for the next start.
const PATIENCE: Duration = Duration::from_secs(30);

impl Background {
    /// Serves until the launcher is gone.
    pub fn run(self) {
        let mut builder = Builder::default();
        // What a blank inherits bounds its user namespace: pending signals are counted for the launcher's user.
        let _ = setrlimit(Resource::RLIMIT_SIGPENDING, 4096, 4096);
        let mut removals: VecDeque<Removal> = VecDeque::new();
        let mut removed = false;
        // At most one for each sandbox: see `Launcher::reclaim`.
        let mut reclaims: VecDeque<Reclaim> = VecDeque::new();
        loop {
            let timeout = match (reclaims.is_empty() && !removed, removals.is_empty()) {
                (false, _) => PollTimeout::ZERO,
                (true, false) => PollTimeout::from(2_u8),
                (true, true) => PollTimeout::NONE,
            };
            removed = false;
            let mut interest = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut interest, timeout) {
                Ok(0) => {
                    removed = self.remove_oldest(&mut removals);
                    self.reclaim_a_piece(&mut reclaims);
                }
                // Without room for a descriptor the mounts are dissolved here and now.
                Ok(_) => match receive_what_fits(&self.socket, PACKET_BYTES) {
                    Ok(Some(packet)) => self.obey(packet, &mut builder, &mut removals, &mut reclaims),
                    Err(Errno::EINTR) => {}
                    Ok(None) | Err(_) => break,
                },
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
            // Whoever wants a sandbox waits for a blank; nobody waits for a removal, until ids or disk run short.
            if removals.iter().any(|removal| removal.since.elapsed() > OVERDUE) {
                removed = self.remove_oldest(&mut removals);
            }
        }
        while removals.iter().any(|removal| removal.since.elapsed() < PATIENCE) {
            removals.retain_mut(|removal| !self.remove(removal));
            std::thread::sleep(Duration::from_millis(2));
        }
        if self.embedded {
            self.remove_every_trace();
        }
    }

    fn obey(
        &self,
        packet: Packet,
        builder: &mut Builder,
        removals: &mut VecDeque<Removal>,
        reclaims: &mut VecDeque<Reclaim>,
    ) {
        let Ok(order) = Order::decode(packet.bytes.as_slice()) else { return };
        if !order.remove.is_empty() {
            removals.push_back(Removal { order, mounts: packet.descriptors, since: Instant::now() });
        } else if !order.reclaim.is_empty() {
            reclaims.push_back(Reclaim::new(order.reclaim));
        } else if !order.make.is_empty() {
            self.make(&order, builder);
        }
    }

    /// Asks for a piece of memory of the oldest that stands still. Nobody waits for it, so orders come before the next piece.
    fn reclaim_a_piece(&self, reclaims: &mut VecDeque<Reclaim>) {
        let Some(errno) = reclaims.front_mut().and_then(|oldest| oldest.step(&self.tree)) else { return };
        if let Some(Reclaim { name: reclaimed, bytes: reclaimed_bytes, .. }) = reclaims.pop_front() {
            self.report(&Report { reclaimed, reclaimed_bytes, errno, ..Report::default() }, &[]);
        }
    }

    fn make(&self, order: &Order, builder: &mut Builder) {
        let workshop = Workshop { tree: &self.tree, image: self.image.as_fd(), owners: self.owners };
        let range = Range { slot: order.slot, base: order.base, count: order.count };
        let made = match self.shape {
            Shape::Nested => nested::make_blank(workshop.image, order.make.clone(), range).map_err(Unmade::from),
            Shape::Privileged | Shape::Unprivileged => make_blank(&workshop, order.make.clone(), range),
        };
        match made {
            Ok(mut blank) => {
                if let Some(forecast) = order.forecast.as_ref().filter(|_| self.shape != Shape::Nested) {
                    let rootless = self.shape == Shape::Unprivileged;
                    let mut site = Site { tree: &self.tree, builder, host_root: &self.host_root, rootless };
                    forecast.prepare(&mut site, &mut blank, range);
                }
                self.hand_over(&blank);
            }
            Err(Unmade { pid, source }) => {
                // What a process was begun with is removed when the launcher, its parent, says that it is gone.
                if pid.is_none() {
                    let _ = self.tree.remove(&order.make);
                    self.remove_files(&order.make, order.base, order.count);
                }
                let (pid, errno) = (pid.map_or(0, Pid::as_raw), root_errno(&source));
                let failure = chain(&source);
                self.report(&Report { failure, errno, pid, slot: order.slot, ..Report::default() }, &[]);
            }
        }
    }

    fn hand_over(&self, blank: &Blank) {
        let mut descriptors: Vec<RawFd> = vec![blank.pidfd.as_raw_fd(), blank.boot.as_raw_fd()];
        if let Some(Private { user_namespace, files: Files { listener, spool, spool_mount } }) = &blank.private {
            descriptors.extend([user_namespace, listener, spool, spool_mount].map(AsRawFd::as_raw_fd));
        }
        let mut report =
            Report { made: blank.name.clone(), slot: blank.slot, pid: blank.pid.as_raw(), ..Report::default() };
        report.namespaced = blank.private.is_some();
        report.limits = blank.limits.map(Amounts::from);
        if let Some(group) = &blank.group {
            report.grouped = true;
            descriptors.extend([group.init.as_raw_fd(), group.work.as_raw_fd()]);
            for (name, directory) in &group.v1 {
                report.v1.push((*name).to_owned());
                descriptors.push(directory.as_raw_fd());
            }
        }
        if let Some(mounts) = &blank.mounts {
            report.has_mounts = true;
            descriptors.push(mounts.as_raw_fd());
        }
        if let Some(Ahead { bytes, upper, root }) = &blank.ahead {
            report.upper_bytes = *bytes;
            descriptors.push(upper.as_raw_fd());
            if let Some(AheadRoot { lower, built, directories }) = root {
                report.lower = lower.to_string_lossy().into_owned();
                report.idmapped = built.idmapped;
                report.directories = u32::try_from(directories.len()).unwrap_or(u32::MAX);
                descriptors.push(built.mount.as_raw_fd());
                descriptors.extend(directories.iter().map(AsRawFd::as_raw_fd));
            }
        }
        self.report(&report, &descriptors);
    }

    fn report(&self, report: &Report, descriptors: &[RawFd]) {
        // The socket blocks; a launcher that is gone shows in the next poll.
        let bytes = report.encode_to_vec();
        if send(&self.socket, &bytes, descriptors).is_err() && !descriptors.is_empty() {
            // Too many are on their way: the launcher ends a blank that comes without them.
            let _ = send(&self.socket, &bytes, &[]);
        }
    }

    /// One try, so that an order never waits for more than one; what fails goes to the end. True when it succeeded.
    fn remove_oldest(&self, removals: &mut VecDeque<Removal>) -> bool {
        let Some(mut oldest) = removals.pop_front() else { return false };
        let removed = self.remove(&mut oldest);
        if !removed {
            removals.push_back(oldest);
        }
        removed
    }

    /// One try. True when there is nothing left to do.
    fn remove(&self, removal: &mut Removal) -> bool {
        removal.mounts.clear();
        let order = &removal.order;
        self.tree.kill(&order.remove);
        if !self.end(order) || !self.tree.remove(&order.remove) {
            let given_up = removal.since.elapsed() > PATIENCE;
            if given_up {
                let failure = format!("the processes of {} do not end", order.remove);
                self.report(
                    &Report { removed: order.remove.clone(), failure, slot: order.slot, ..Report::default() },
                    &[],
                );
            }
            return given_up;
        }
        self.remove_files(&order.remove, order.base, order.count);
        self.report(&Report { removed: order.remove.clone(), slot: order.slot, ..Report::default() }, &[]);
        true
    }

    /// Without a pid namespace the end of process 1 is not the end of the others. True when there are none.
    fn end(&self, order: &Order) -> bool {
        self.shape != Shape::Nested || nested::end(&self.places.sandboxes(), &order.remove, order.base)
    }

    /// Removes socket, spool and upper of one name.
    fn remove_files(&self, name: &str, base: u32, count: u32) {
        let _ = std::fs::remove_file(self.places.sockets().join(format!("{name}.sock")));
        match self.shape {
            Shape::Nested => nested::remove_files(&self.places.sandboxes(), name),
            Shape::Privileged | Shape::Unprivileged => {
                tree::remove_below(&self.places.sandboxes(), name, base, count);
            }
        }
    }

    fn remove_every_trace(&self) {
        for name in self.tree.names(&self.prefix) {
            self.tree.kill(&name);
        }
        self.tree.close(&self.prefix);
        for name in leftover_names(&self.prefix, &self.places) {
            let order = Order { remove: name, ..Order::default() };
            let since = Instant::now();
            while !self.end(&order) && since.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
            self.remove_files(&order.remove, 0, 0);
        }
    }
}

/// Names with this prefix that have files.
#[must_use]
pub fn leftover_names(prefix: &str, places: &Places) -> Vec<String> {
    let mut names = Vec::new();
    for directory in [places.sockets(), places.sandboxes()] {
        let Ok(entries) = std::fs::read_dir(&directory) else { continue };
        let found = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.extend(
            found.filter(|name| name.starts_with(prefix)).map(|name| name.trim_end_matches(".sock").to_owned()),
        );
    }
    names.sort();
    names.dedup();
    names
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// errno of the innermost cause, 0 if there is none.
pub fn root_errno(error: &(dyn std::error::Error + 'static)) -> i32 {
    let mut current: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut found = 0;
    while let Some(inner) = current {
        if let Some(errno) = inner.downcast_ref::<nix::Error>() {
            found = *errno as i32;
        } else if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            found = io.raw_os_error().unwrap_or(found);
        }
        current = inner.source();
    }
    found
}

/// Rebuilds a blank from a report and its descriptors. `None`: the report does not hold together.
#[must_use]
pub fn blank_from(report: Report, descriptors: Vec<OwnedFd>) -> Option<Blank> {
    let mut descriptors = descriptors.into_iter();
    let (pidfd, boot) = (descriptors.next()?, descriptors.next()?);
    let private = if report.namespaced {
        let user_namespace = descriptors.next()?;
        let files =
            Files { listener: descriptors.next()?, spool: descriptors.next()?, spool_mount: descriptors.next()? };
        Some(Private { user_namespace, files })
    } else {
        None
    };
    let group = if report.grouped {
        let (init, work) = (descriptors.next()?, descriptors.next()?);
        let mut v1 = Vec::new();
        for name in &report.v1 {
            let name = ["memory", "pids", "cpu", "cpuacct"].into_iter().find(|known| known == name)?;
            v1.push((name, descriptors.next()?));
        }
        Some(Group { name: report.made.clone(), init, work, v1 })
    } else {
        None
    };
    let mounts = if report.has_mounts { Some(descriptors.next()?) } else { None };
    let limits = report.limits.map(Limits::from);
    let ahead = match report.upper_bytes {
        0 => None,
        bytes => Some(Ahead {
            bytes,
            upper: descriptors.next()?,
            root: match report.lower.as_str() {
                "" => None,
                lower => Some(AheadRoot {
                    lower: lower.into(),
                    built: Built { mount: descriptors.next()?, idmapped: report.idmapped },
                    directories: (0..report.directories).map(|_| descriptors.next()).collect::<Option<_>>()?,
                }),
            },
        }),
    };
    Some(Blank {
        name: report.made,
        slot: report.slot,
        pid: nix::unistd::Pid::from_raw(report.pid),
        pidfd,
        boot,
        mounts,
        private,
        group,
        limits,
        ahead,
        spent: Vec::new(),
    })
}
