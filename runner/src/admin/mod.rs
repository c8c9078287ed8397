//! The local administration socket: what is open, and ending it.
//!
//! A unix socket, mode 0600, whose peers are also checked by user id. It looks at sessions and puts work into the same
//! channel as any connector; it has no power of its own over a sandbox.

mod peer;
mod present;
mod service;
mod socket;

pub use service::{Counted, Parts, serve};
pub use socket::SocketError;
