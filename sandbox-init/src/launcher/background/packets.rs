//! What launcher and background process say to each other: one order or one report in a packet, with its descriptors.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use prost::Message;

use crate::launcher::cgroup::Group;
use crate::launcher::files::Files;
use crate::launcher::forecast::{Ahead, AheadRoot, Amounts, Forecast};
use crate::launcher::policy_file::Limits;
use crate::launcher::rootfs::Built;
use crate::launcher::spawn::{Blank, Private};

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

/// What is said of a blank that was made, and the descriptors that go with it, as [`blank_from`] reads them.
#[must_use]
pub(super) fn report_of(blank: &Blank) -> (Report, Vec<RawFd>) {
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
    (report, descriptors)
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
