//! Packets with descriptors over SOCK_SEQPACKET sockets.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};

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
    receive_unless(socket, limit, libc::MSG_TRUNC | libc::MSG_CTRUNC)
}

/// Receives one packet that says something even if this process can hold no further descriptor: those that found no room are
/// closed by the kernel, from the last one back.
///
/// # Errors
/// `EAGAIN` on a non-blocking socket, `EMSGSIZE` when the packet was cut.
pub fn receive_what_fits<F: AsFd>(socket: &F, limit: usize) -> nix::Result<Option<Packet>> {
    receive_unless(socket, limit, libc::MSG_TRUNC)
}

fn receive_unless<F: AsFd>(socket: &F, limit: usize, refused: libc::c_int) -> nix::Result<Option<Packet>> {
    let mut bytes = vec![0_u8; limit];
    let (length, flags, descriptors) = receive_message(socket, &mut bytes)?;
    if flags & refused != 0 {
        return Err(Errno::EMSGSIZE);
    }
    if length == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    bytes.truncate(length);
    Ok(Some(Packet { bytes, descriptors }))
}

/// Room for the descriptors of one packet, in words, because a control message begins with numbers that are aligned.
const CONTROL_WORDS: usize = 4 + MAX_DESCRIPTORS.div_ceil(2);

/// Length, flags and descriptors of one packet. Not by nix, which hands out no descriptor at all when some were cut: those that
/// the kernel has installed would stay open without an owner.
fn receive_message<F: AsFd>(socket: &F, bytes: &mut [u8]) -> nix::Result<(usize, libc::c_int, Vec<OwnedFd>)> {
    let mut control = [0_u64; CONTROL_WORDS];
    let mut slice = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is integers and pointers; all zeroes is a valid value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut slice;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: the header names one slice and one control buffer that live across the call, with their sizes.
    let result = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(Errno::result(result)?).map_err(|_| Errno::EIO)?;
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled the control buffer, which is aligned, and set its length.
    let mut part = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !part.is_null() {
        // SAFETY: `part` is not null, so it points to a header inside the control buffer, which is aligned for it.
        let control_header = unsafe { *part };
        if (control_header.cmsg_level, control_header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: CMSG_LEN only computes.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            // SAFETY: CMSG_DATA points behind the header of `part`.
            let data = unsafe { libc::CMSG_DATA(part) }.cast::<RawFd>();
            for index in 0..control_header.cmsg_len.saturating_sub(empty) / size_of::<RawFd>() {
                // SAFETY: the length of this part, which the kernel has set, says that the number is inside it.
                let place = unsafe { data.add(index) };
                // SAFETY: as above; a plain integer, of any alignment.
                let raw = unsafe { place.read_unaligned() };
                // SAFETY: the kernel has installed this descriptor for us; it is read once and nobody else owns it.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
        // SAFETY: `part` is a header of this message.
        part = unsafe { libc::CMSG_NXTHDR(&raw const header, part) };
    }
    Ok((length, header.msg_flags, descriptors))
}

#[cfg(test)]
mod tests {
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::resource::{Resource, setrlimit};
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};

    use super::*;
    use crate::sys::process::{Cloned, exit_now, fork};

    /// In a process that has room for one descriptor: what comes of a packet with three, and whether all are closed at the end.
    fn with_room_for_one(received: impl FnOnce(&OwnedFd) -> bool) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair");
        let sent = [theirs.as_raw_fd(); 3];
        send(&theirs, b"name", &sent).expect("room");
        match fork().expect("a process") {
            Cloned::Child => {
                let next = || fcntl(&ours, FcntlArg::F_DUPFD_CLOEXEC(0)).unwrap_or(-1);
                let free = next();
                // SAFETY: this is the only owner of the number just made.
                drop(unsafe { OwnedFd::from_raw_fd(free) });
                let limit = u64::try_from(free + 1).unwrap_or(0);
                let limited = setrlimit(Resource::RLIMIT_NOFILE, limit, limit).is_ok();
                exit_now(i32::from(!(limited && received(&ours) && next() == free)))
            }
            Cloned::Parent { pidfd, .. } => {
                let end = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED).expect("a child");
                assert!(matches!(end, WaitStatus::Exited(_, 0)), "{end:?}");
            }
        }
    }

    #[test]
    fn a_packet_whose_descriptors_find_no_room_still_says_its_bytes() {
        with_room_for_one(|socket| {
            let packet = receive_what_fits(socket, 16).ok().flatten().unwrap_or_default();
            packet.bytes == b"name" && packet.descriptors.len() == 1
        });
    }

    #[test]
    fn no_descriptor_of_a_refused_packet_stays_open() {
        with_room_for_one(|socket| matches!(receive(socket, 16), Err(Errno::EMSGSIZE)));
    }
}
