//! Packets with descriptors over SOCK_SEQPACKET sockets.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Descriptors that one packet may carry: as many as the kernel lets anybody send (`SCM_MAX_FD`, unix(7)), so that none is
/// ever installed without an owner here.
pub const MAX_DESCRIPTORS: usize = 253;

/// One packet.
#[derive(Debug, Default)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors, close-on-exec.
    pub descriptors: Vec<OwnedFd>,
}

/// Sends one packet.
///
/// # Errors
/// `EAGAIN` when the peer does not read, `EPIPE` when it is gone, `EMSGSIZE` when it is too large for the socket.
pub fn send<F: AsFd>(socket: &F, bytes: &[u8], descriptors: &[RawFd]) -> nix::Result<()> {
    let slices = [IoSlice::new(bytes)];
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control: &[ControlMessage<'_>] = if descriptors.is_empty() { &[] } else { &rights };
    let sent = sendmsg::<()>(socket.as_fd().as_raw_fd(), &slices, control, MsgFlags::MSG_NOSIGNAL, None)?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::EMSGSIZE) }
}

/// Receives one packet without descriptors from a peer that may not send any: the kernel drops what came along.
///
/// # Errors
/// `EAGAIN` on a non-blocking socket, `EMSGSIZE` when the packet was cut or carried descriptors.
pub fn receive_plain<F: AsFd>(socket: &F, limit: usize) -> nix::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0_u8; limit];
    let (length, flags) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut slices, None, MsgFlags::empty())?;
        (message.bytes, message.flags)
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(Errno::EMSGSIZE);
    }
    bytes.truncate(length);
    Ok((length > 0).then_some(bytes))
}

/// Receives one packet of at most `limit` bytes. `None` is the end of the connection.
///
/// # Errors
/// `EAGAIN` on a non-blocking socket, `EMSGSIZE` when the packet or its descriptors were cut.
pub fn receive<F: AsFd>(socket: &F, limit: usize) -> nix::Result<Option<Packet>> {
    let mut bytes = vec![0_u8; limit];
    let mut control = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let (length, flags, descriptors) = {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut descriptors = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                for fd in raw {
                    // SAFETY: the kernel has just installed this descriptor for us and nobody else owns it.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        (message.bytes, message.flags, descriptors)
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(Errno::EMSGSIZE);
    }
    if length == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    bytes.truncate(length);
    Ok(Some(Packet { bytes, descriptors }))
}
