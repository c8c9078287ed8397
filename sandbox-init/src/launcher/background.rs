//! Privileged: the launcher's second process, a copy of it made at start.
//!
//! Does everything that may block: making blanks (namespaces, v1 attaches, root filesystems ahead of need), removing cgroups
//! and uppers, asking for memory back. The request loop talks to it over a socket pair and never waits for it. When the
//! launcher is gone it finishes what it began; in embedded mode, where nobody will come back for the sandboxes, it ends them
//! and removes every trace.

mod packets;

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::Pid;
use prost::Message;

use super::cgroup::{Reclaim, Tree};
use super::files::Owners;
use super::forecast::Site;
use super::host::{HostRoot, Places};
use super::nested;
use super::rootfs::Builder;
use super::shape::Shape;
use super::spawn::{Range, Unmade, Workshop, make_blank};
use crate::sys::socket::{Packet, receive_what_fits, send};
use crate::tree;

use packets::report_of;
pub use packets::{Order, PACKET_BYTES, Report, blank_from};

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
                let (report, descriptors) = report_of(&blank);
                self.report(&report, &descriptors);
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
