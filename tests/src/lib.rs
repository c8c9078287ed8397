//! Harness shared by the suites: what is planted on the host, how the command is driven, how the host is compared.
//!
//! The suites talk to the shipped program through its command line and its sockets, never to its modules. Linked are only
//! the system call table, because a table is compared with the kernel's own answers, the generated message types, and the
//! reference orchestrator, which is the other end of the daemon's link. What one runner leaves to the next is tested with the
//! runner's own clients of launcher and process 1: nothing else can be dropped and begun again at a chosen moment.
//!
//! - [`prober`]: builds the attack program and reads its result lines
//! - [`runner`]: finds the built command, runs it as root or as uid 65534
//! - [`rootfs`]: a directory that can be the root of a sandbox and holds the prober
//! - [`daemon`]: a launcher as a service, a runner with its configuration, and an orchestrator
//! - [`faultproxy`]: the wire between the last two, which can be broken
//! - [`claude`]: the other end of the work queue of Claude Managed Agents
//! - [`canary`]: files, a process and listeners on the host that no sandbox may reach
//! - [`host`]: everything a sandbox could leave behind, counted from outside
//! - [`launcher`]: a launcher of our own and a hostile runner's end of its socket
//! - [`keeper`]: the runner's end of the control socket of one sandbox
//! - [`ledger`]: what calls say that they do, kept outside of everything that runner and launcher have
//! - [`successor`]: runners that follow one another on the sandboxes of one launcher
//! - [`terminal`]: a terminal of the host around the command, with somebody who types
//! - [`way`]: what lies between a daemon and a server, such as a proxy
//! - [`skip`]: how a missing capability is reported
#![forbid(unsafe_code)]

pub mod canary;
pub mod claude;
pub mod daemon;
pub mod faultproxy;
pub mod host;
pub mod keeper;
pub mod launcher;
pub mod ledger;
pub mod prober;
pub mod rootfs;
pub mod runner;
pub mod skip;
pub mod successor;
pub mod terminal;
pub mod way;
