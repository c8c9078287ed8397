//! One connection of the runner: packets in, packets out, never blocking.
//!
//! Bounds: one packet is at most 128 KiB in both directions. Answers wait in a queue of [`QUEUE_LIMIT`] bytes; while it is
//! over that, no further request is read, so a runner that does not read its answers stops being served instead of
//! costing memory. Events (started, output advanced, finished) never wait in the queue: they are made from the state of a
//! call at the moment when the socket can take them, so a slow runner costs nothing and loses nothing.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use prost::Message as _;
use proto::init::v1::{Frame, Request};

/// Largest packet of the protocol.
pub(crate) const PACKET_LIMIT: usize = 128 * 1024;
/// Bytes of answers that may wait. Beyond it no request is read until the runner has read.
const QUEUE_LIMIT: usize = 1024 * 1024;

/// What one look at the socket gave.
#[derive(Debug)]
pub(crate) enum Received {
    /// A well-formed request.
    Request(Box<Request>),
    /// Nothing at present.
    Nothing,
    /// The peer is gone, or has sent what is no packet of this protocol. The connection is over.
    Over,
}

/// The peer is gone.
#[derive(Debug, thiserror::Error)]
#[error("the runner has closed the connection")]
pub(crate) struct Gone;

/// The connection of one runner.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    /// Generation of the runner, known after its Hello.
    pub(crate) generation: Option<u64>,
    queue: VecDeque<Vec<u8>>,
    queued_bytes: usize,
}

impl Connection {
    /// Takes over an accepted, non-blocking socket.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, generation: None, queue: VecDeque::new(), queued_bytes: 0 }
    }

    /// Reads one packet. `buffer` is at least one byte longer than [`PACKET_LIMIT`], so that a longer one is noticed.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Received {
        let length = match recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC) {
            Ok(length) => length,
            Err(Errno::EAGAIN | Errno::EINTR) => return Received::Nothing,
            Err(_) => return Received::Over,
        };
        // An empty packet and the end of the connection look alike, and neither is a request.
        if length == 0 || length > PACKET_LIMIT {
            return Received::Over;
        }
        match buffer.get(..length).map(Request::decode) {
            Some(Ok(request)) => Received::Request(Box::new(request)),
            _ => Received::Over,
        }
    }

    /// Whether another request may be read now.
    pub(crate) fn may_read(&self) -> bool {
        self.queued_bytes < QUEUE_LIMIT
    }

    /// Whether an event may be written now: answers go first, in order.
    pub(crate) fn is_clear(&self) -> bool {
        self.queue.is_empty()
    }

    /// Sends an answer, or queues it.
    pub(crate) fn answer(&mut self, frame: &Frame) -> Result<(), Gone> {
        let packet = frame.encode_to_vec();
        if self.queue.is_empty() && self.write(&packet)? {
            return Ok(());
        }
        self.queued_bytes = self.queued_bytes.saturating_add(packet.len());
        self.queue.push_back(packet);
        Ok(())
    }

    /// Sends an event; `false` when the socket cannot take it now and the caller keeps it in its state.
    pub(crate) fn event(&mut self, frame: &Frame) -> Result<bool, Gone> {
        if !self.queue.is_empty() {
            return Ok(false);
        }
        self.write(&frame.encode_to_vec())
    }

    /// Sends what waits.
    pub(crate) fn flush(&mut self) -> Result<(), Gone> {
        while let Some(packet) = self.queue.pop_front() {
            if !self.write(&packet)? {
                self.queue.push_front(packet);
                break;
            }
            self.queued_bytes = self.queued_bytes.saturating_sub(packet.len());
        }
        Ok(())
    }

    fn write(&self, packet: &[u8]) -> Result<bool, Gone> {
        match send(self.socket.as_raw_fd(), packet, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOBUFS) => Ok(false),
            Err(_) => Err(Gone),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
