//! The rules that look at arguments, each with the reason for every line.
//!
//! `SHARED` lines exist only where the workload has the user id of process 1 (a host that gives us a single id).
//! There the kernel would let the workload change the limits, scheduling and fate of process 1 (pid 1) and of the
//! spawner (pid 2). `kill(0)` stays: it reaches the caller's own process group, and every call runs in a session of
//! its own.

use nix::errno::Errno;

use super::Verdict;
use super::rule::{ALLOW, Clause, REFUSE, Test, When};
use crate::policy::Profile;

const STANDARD: When = When::Profile(Profile::Standard);
const STRICT: When = When::Profile(Profile::Strict);
const SHARED: When = When::SharedIdentity;
const NESTED: When = When::NoNamespaces;

/// Process 1 and the spawner.
const PROTECTED: &[u32] = &[1, 2];
/// The same, and what reaches them as a group: all processes (-1) and the group of the spawner (-2).
const PROTECTED_OR_GROUP: &[u32] = &[1, 2, u32::MAX, u32::MAX - 1];

/// Allowed in the standard profile, refused in the strict one.
pub(super) const STANDARD_ONLY: &[Clause] = &[Clause::otherwise(ALLOW).only(STANDARD), Clause::otherwise(REFUSE)];

/// The first argument is the pid (or thread id) the call is aimed at.
pub(super) const PID_FIRST: &[Clause] =
    &[Clause::on(&[Test::is(0, PROTECTED)], REFUSE).only(SHARED), Clause::otherwise(ALLOW)];

/// `kill(pid, signal)`.
pub(super) const KILL: &[Clause] =
    &[Clause::on(&[Test::is(0, PROTECTED_OR_GROUP)], REFUSE).only(SHARED), Clause::otherwise(ALLOW)];

/// Refused with a shared identity, because the target cannot be seen by a filter.
pub(super) const UNSHARED_ONLY: &[Clause] = &[Clause::otherwise(REFUSE).only(SHARED), Clause::otherwise(ALLOW)];

/// `setpriority(which, who, value)`: 0 process, 1 group, 2 user. By user would include process 1.
pub(super) const SETPRIORITY: &[Clause] = &[
    Clause::on(&[Test::is(0, &[0, 1]), Test::is(1, PROTECTED)], REFUSE).only(SHARED),
    Clause::on(&[Test::is(0, &[2])], REFUSE).only(SHARED),
    Clause::otherwise(ALLOW),
];

/// `ioprio_set(which, who, value)`: the same with 1 process, 2 group, 3 user.
pub(super) const IOPRIO_SET: &[Clause] = &[
    Clause::on(&[Test::is(0, &[1, 2]), Test::is(1, PROTECTED)], REFUSE).only(SHARED),
    Clause::on(&[Test::is(0, &[3])], REFUSE).only(SHARED),
    Clause::otherwise(ALLOW),
];

/// `fcntl(descriptor, command, value)`: the owner of a descriptor gets its signal, which may be any (`F_SETSIG`).
pub(super) const FCNTL: &[Clause] = &[
    Clause::on(&[Test::is(1, &[F_SETOWN]), Test::is(2, PROTECTED_OR_GROUP)], REFUSE).only(SHARED),
    // The owner is behind a pointer.
    Clause::on(&[Test::is(1, &[F_SETOWN_EX])], REFUSE).only(SHARED),
    Clause::otherwise(ALLOW),
];
const F_SETOWN: u32 = 8;
const F_SETOWN_EX: u32 = 15;

/// `clone(flags, ...)`: no new namespace of any kind. The bits are NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
/// and NEWNS; `CLONE_NEWTIME` lies in the exit signal's byte and cannot be given to `clone`.
pub(super) const CLONE: &[Clause] =
    &[Clause::on(&[Test::AnyBit { argument: 0, bits: CLONE_NEW_ANY }], REFUSE), Clause::otherwise(ALLOW)];
pub(super) const CLONE_NEW_ANY: u32 = 0x7e02_0000;

/// Refused where the workload has no namespaces of its own: the object would be the container's, and outlive the sandbox.
pub(super) const NAMESPACED_ONLY: &[Clause] = &[Clause::otherwise(REFUSE).only(NESTED), Clause::otherwise(ALLOW)];

/// `connect(descriptor, address, length)`. Without a network namespace only unix sockets exist, and every socket file of the
/// container could be reached: landlock does not cover them below ABI 9, and the address is behind a pointer.
pub(super) const CONNECT: &[Clause] =
    &[Clause::otherwise(Verdict::Errno(Errno::EACCES)).only(NESTED), Clause::otherwise(ALLOW)];

/// `socket(domain, type, protocol)`.
pub(super) const SOCKET: &[Clause] = &[
    // Datagram sockets send to an address without connecting.
    Clause::on(&[Test::is(0, &[AF_UNIX]), STREAM_OR_SEQUENCED], ALLOW).only(NESTED),
    Clause::otherwise(Verdict::Errno(Errno::EAFNOSUPPORT)).only(NESTED),
    Clause::on(&[Test::is(0, &[AF_UNIX])], ALLOW),
    Clause::on(&[INTERNET, STREAM_OR_DATAGRAM, Test::is(2, INTERNET_PROTOCOLS)], ALLOW),
    // MPTCP, SCTP, SMC, L2TP and others: large kernel code that is loaded on demand. This errno makes callers fall
    // back.
    Clause::on(&[INTERNET, STREAM_OR_DATAGRAM], Verdict::Errno(Errno::EPROTONOSUPPORT)),
    // Raw sockets, and type 10, by which the kernel turns AF_INET into AF_PACKET.
    Clause::on(&[INTERNET], REFUSE),
    // Interface and address lists. The other netlink families answer "no such protocol", on which the audit library
    // and libudev go on without it.
    Clause::on(&[Test::is(0, &[AF_NETLINK]), Test::is(2, &[NETLINK_ROUTE])], ALLOW).only(STANDARD),
    Clause::on(&[Test::is(0, &[AF_NETLINK])], Verdict::Errno(Errno::EPROTONOSUPPORT)).only(STANDARD),
    // VSOCK speaks to the hypervisor's side, ALG to kernel crypto; neither is confined by a network namespace.
    Clause::otherwise(Verdict::Errno(Errno::EAFNOSUPPORT)),
];
const INTERNET: Test = Test::is(0, &[AF_INET, AF_INET6]);
/// The upper bits of the type are CLOEXEC and NONBLOCK.
const STREAM_OR_DATAGRAM: Test = Test::In { argument: 1, mask: 0xf, values: &[1, 2] };
/// The same bits.
const STREAM_OR_SEQUENCED: Test = Test::In { argument: 1, mask: 0xf, values: &[1, 5] };
/// Default, ICMP (ping sockets), TCP, UDP, ICMPv6.
const INTERNET_PROTOCOLS: &[u32] = &[0, 1, 6, 17, 58];
const AF_UNIX: u32 = 1;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const AF_NETLINK: u32 = 16;
const NETLINK_ROUTE: u32 = 0;

/// `socketpair(domain, ...)`: the kernel makes sockets of the family before it finds that most have no pairs.
pub(super) const SOCKETPAIR: &[Clause] = &[
    // One end of a datagram pair sends to any address.
    Clause::on(&[Test::is(0, &[AF_UNIX]), STREAM_OR_SEQUENCED], ALLOW).only(NESTED),
    Clause::otherwise(Verdict::Errno(Errno::EAFNOSUPPORT)).only(NESTED),
    Clause::on(&[Test::is(0, &[AF_UNIX])], ALLOW),
    Clause::otherwise(Verdict::Errno(Errno::EAFNOSUPPORT)),
];

/// `ioctl(descriptor, command, argument)`.
pub(super) const IOCTL: &[Clause] = &[
    Clause::on(&[Test::is(1, &[TIOCSTI, TIOCLINUX, TIOCSETD, FS_IOC_FSSETXATTR])], REFUSE),
    // The owner that gets the signal is behind a pointer.
    Clause::on(&[Test::is(1, &[FIOSETOWN, SIOCSPGRP])], REFUSE).only(SHARED),
    Clause::otherwise(ALLOW),
];
/// Types into the terminal of another process.
const TIOCSTI: u32 = 0x5412;
/// Pastes into a virtual console.
const TIOCLINUX: u32 = 0x541c;
/// Loads line disciplines, old kernel code with a history of holes.
const TIOCSETD: u32 = 0x5423;
/// Changes the project id by which disk quotas are accounted.
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;
const FIOSETOWN: u32 = 0x8901;
const SIOCSPGRP: u32 = 0x8902;

/// `personality(persona)`: all ones asks, `PER_LINUX32` and `UNAME26` change what `uname` tells; debuggers turn address
/// randomisation off. The rest (executable data, page zero mapped) only helps exploits.
pub(super) const PERSONALITY: &[Clause] = &[
    Clause::on(&[Test::is(0, &[u32::MAX])], ALLOW),
    Clause::on(&[Test::AnyBit { argument: 0, bits: !(PER_LINUX32 | UNAME26 | ADDR_NO_RANDOMIZE) }], REFUSE)
        .only(STANDARD),
    Clause::on(&[Test::AnyBit { argument: 0, bits: !(PER_LINUX32 | UNAME26) }], REFUSE).only(STRICT),
    Clause::otherwise(ALLOW),
];
const PER_LINUX32: u32 = 0x0008;
const UNAME26: u32 = 0x2_0000;
const ADDR_NO_RANDOMIZE: u32 = 0x4_0000;

/// `prctl(option, ...)`: a filter set this way cannot have a listener, so the standard profile keeps it.
pub(super) const PRCTL: &[Clause] =
    &[Clause::on(&[Test::is(0, &[PR_SET_SECCOMP])], REFUSE).only(STRICT), Clause::otherwise(ALLOW)];
const PR_SET_SECCOMP: u32 = 22;

/// `seccomp(operation, flags, argument)`: browsers confine themselves. A listener would let one process answer the
/// system calls of another, and its descriptor defeats what a tool's own filter promises.
pub(super) const SECCOMP: &[Clause] = &[
    Clause::otherwise(REFUSE).only(STRICT),
    Clause::on(&[Test::AnyBit { argument: 1, bits: SECCOMP_FILTER_FLAG_NEW_LISTENER }], REFUSE),
    Clause::otherwise(ALLOW),
];
const SECCOMP_FILTER_FLAG_NEW_LISTENER: u32 = 1 << 3;
