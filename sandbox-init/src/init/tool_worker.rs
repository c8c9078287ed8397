//! A worker: one process of the workload that answers file tools, one call after the other.
//!
//! Confined like every other process of the workload, and believed as little: what it answers is a claim, a byte too many
//! is its end, and so is a call that has to be ended. It keeps nothing between calls.
//!
//! A request is one packet, or a memory file when it is too long for one. An answer is its length, 8 bytes, little endian,
//! and then the bytes, in packets of at most [`PIECE_BYTES`].

use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Pid, read};
use prost::Message as _;

use crate::sys::process::pidfd_signal;
use crate::sys::socket::{Packet, receive, send};
use crate::tool::clear_intent;

use super::event::Key;
use super::slot::SlotId;

/// Largest packet of an answer.
const PIECE_BYTES: usize = 64 * 1024;
/// Requests up to this length travel in their packet.
const INLINE_BYTES: usize = 64 * 1024;
/// Packet that says: the descriptor is a memory file that holds the request.
const IN_FILE: &[u8] = b"file";
const HEADER_BYTES: usize = 8;
/// Number of the descriptor of a worker into which it writes what it is about to do.
pub(crate) const INTENTS: RawFd = 3;

/// One call of a tool.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ToolRequest {
    /// `read`, `write` or `edit`.
    #[prost(string, tag = "1")]
    pub(crate) tool: String,
    /// Its input.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) input_json: Vec<u8>,
    /// What an earlier worker was about to do with this call when it died: what became of it is asked, nothing is done again.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) intent: Vec<u8>,
}

/// A running worker, idle or at a call.
#[derive(Debug)]
pub(crate) struct ToolWorker {
    pub(crate) key: Key,
    pub(crate) pid: Pid,
    pub(crate) pidfd: OwnedFd,
    /// Its slot, for as long as it lives.
    pub(crate) slot: SlotId,
    /// Our end, non-blocking.
    pub(crate) socket: OwnedFd,
    /// A memory file in which it writes down what it is about to do.
    pub(crate) intents: File,
}

/// How far an answer has arrived.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Arrived {
    /// Its length, once it is known.
    expected: Option<u64>,
    received: u64,
}

/// What a look at the socket of a worker gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// There is more to come.
    More,
    /// The answer is complete.
    Complete,
    /// What no worker of ours does. It is to be killed.
    Nonsense,
    /// It has closed its end, or is dead.
    Closed,
}

impl ToolWorker {
    /// Hands it a call. On failure it has not seen it.
    pub(crate) fn ask(&self, request: &ToolRequest) -> nix::Result<()> {
        clear_intent(&self.intents)?;
        // The workload may have stopped it, which is one of its own, with everything else (`kill -STOP -1`).
        let _ = pidfd_signal(self.pidfd.as_fd(), nix::libc::SIGCONT);
        let encoded = request.encode_to_vec();
        if encoded.len() <= INLINE_BYTES {
            return send(&self.socket, &encoded, &[]);
        }
        let file = memory_file(&encoded)?;
        send(&self.socket, IN_FILE, &[file.as_raw_fd()])
    }

    /// Reads what has arrived, at most `buffer` and a few packets, and hands on what belongs to the answer.
    pub(crate) fn look(&self, arrived: &mut Arrived, buffer: &mut [u8], mut take: impl FnMut(&[u8])) -> Look {
        let mut budget = buffer.len();
        while budget > 0 {
            let packet = match read(self.socket.as_fd(), buffer) {
                Ok(0) => return Look::Closed,
                Ok(length) => buffer.get(..length).unwrap_or_default(),
                Err(Errno::EAGAIN | Errno::EINTR) => return Look::More,
                Err(_) => return Look::Closed,
            };
            budget = budget.saturating_sub(packet.len());
            let bytes = match arrived.expected {
                Some(_) => packet,
                None => {
                    let Some((header, bytes)) = packet.split_first_chunk::<HEADER_BYTES>() else {
                        return Look::Nonsense;
                    };
                    arrived.expected = Some(u64::from_le_bytes(*header));
                    bytes
                }
            };
            arrived.received = arrived.received.saturating_add(bytes.len() as u64);
            if arrived.expected.is_some_and(|expected| arrived.received > expected) {
                return Look::Nonsense;
            }
            take(bytes);
            if arrived.expected == Some(arrived.received) {
                return Look::Complete;
            }
        }
        Look::More
    }
}

/// The life of a worker: answers until nobody asks any more. `run` makes the bytes of one answer.
pub(crate) fn serve(socket: &OwnedFd, mut run: impl FnMut(&ToolRequest, &mut Vec<u8>)) -> nix::Result<()> {
    loop {
        let packet = match receive(socket, INLINE_BYTES + 1024) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Ok(()),
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error),
        };
        let request = request(packet)?;
        let mut answer = vec![0; HEADER_BYTES];
        run(&request, &mut answer);
        let length = answer.len().saturating_sub(HEADER_BYTES) as u64;
        if let Some(header) = answer.first_chunk_mut() {
            *header = length.to_le_bytes();
        }
        for piece in answer.chunks(PIECE_BYTES) {
            send(socket, piece, &[])?;
        }
    }
}

fn request(mut packet: Packet) -> nix::Result<ToolRequest> {
    let bytes =
        if packet.bytes == IN_FILE { read_all(packet.descriptors.pop().ok_or(Errno::EBADMSG)?)? } else { packet.bytes };
    ToolRequest::decode(bytes.as_slice()).map_err(|_| Errno::EBADMSG)
}

/// A message that is too large for a packet.
pub(crate) fn memory_file(bytes: &[u8]) -> nix::Result<OwnedFd> {
    let name = CString::from(c"task");
    let file = memfd_create(name.as_c_str(), MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(file);
    file.write_all(bytes).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::ENOSPC)))?;
    Ok(file.into())
}

/// What [`memory_file`] holds.
pub(crate) fn read_all(file: OwnedFd) -> nix::Result<Vec<u8>> {
    use std::io::{Read as _, Seek as _};
    let mut file = File::from(file);
    let mut bytes = Vec::new();
    let result = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    Ok(bytes)
}
