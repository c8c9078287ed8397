//! Looks at the host and closes admission before it suffers: disks, descriptors of this process, and what processes wait for
//! (PSI, Documentation/accounting/psi.rst).
//!
//! [`judge`] decides and is pure, [`read`] measures, [`watch`] is the task that joins them and tells the sessions. It
//! only ever keeps new work out: nothing that runs is ended for it.

pub mod judge;
pub mod read;
pub mod watch;
