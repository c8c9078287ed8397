//! One `SOCK_SEQPACKET` connection: whole packets, bounded, with descriptors only where they are expected.
//!
//! A packet that is larger than the limit, or that carries descriptors nobody asked for, is an error and not data. Knows
//! nothing of what the packets mean.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};
use tokio::net::UnixDatagram;

/// Descriptors one packet of a launcher may carry.
const MOST_DESCRIPTORS: usize = 8;

/// What went wrong on the connection.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The other side closed, or is gone.
    #[error("the connection was closed by the other side")]
    Closed,
    /// More bytes than the protocol allows.
    #[error("a packet of more than {limit} bytes arrived")]
    TooLarge {
        /// The protocol's limit.
        limit: usize,
    },
    /// Descriptors where none belong, or too many.
    #[error("a packet carried descriptors that nobody asked for")]
    UnexpectedDescriptors,
    /// The kernel refused.
    #[error("the connection failed: {step}")]
    Io {
        /// What was attempted.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Whether the other side is trusted to send descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptors {
    /// The kernel drops them unseen, and the packet is refused.
    Refused,
    /// At most eight per packet.
    Accepted,
}

/// A packet as it arrived.
#[derive(Debug)]
pub struct Packet<'a> {
    /// The message, in the caller's buffer.
    pub bytes: &'a [u8],
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
}

/// A connection driven by the tokio runtime.
#[derive(Debug)]
pub struct PacketSocket {
    /// A wrapper for readiness only: every read and write is `recvmsg` and `sendmsg` of our own, so it does not matter
    /// that the socket keeps order and connection, which a datagram socket does not.
    socket: UnixDatagram,
    limit: usize,
    descriptors: Descriptors,
}

impl PacketSocket {
    /// Takes over a connected socket.
    ///
    /// # Errors
    /// [`PacketError::Io`] when the descriptor cannot be polled.
    pub fn new(socket: OwnedFd, limit: usize, descriptors: Descriptors) -> Result<Self, PacketError> {
        rustix::io::ioctl_fionbio(&socket, true).map_err(io_errno("ioctl FIONBIO"))?;
        let socket = UnixDatagram::from_std(std::os::unix::net::UnixDatagram::from(socket))
            .map_err(|source| PacketError::Io { step: "epoll", source })?;
        Ok(Self { socket, limit, descriptors })
    }

    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`PacketError::Io`] when nobody listens there.
    pub fn connect(path: &Path, limit: usize, descriptors: Descriptors) -> Result<Self, PacketError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(io_errno("socket"))?;
        let address = SocketAddrUnix::new(path).map_err(io_errno("socket address"))?;
        connect(&socket, &address).map_err(io_errno("connect"))?;
        Self::new(socket, limit, descriptors)
    }

    /// Sends one packet; waits while the other side's queue is full.
    ///
    /// # Errors
    /// [`PacketError::TooLarge`] before anything is sent, [`PacketError::Closed`] when nobody reads any more.
    pub async fn send(&self, bytes: &[u8]) -> Result<(), PacketError> {
        if bytes.len() > self.limit {
            return Err(PacketError::TooLarge { limit: self.limit });
        }
        let sent = self
            .socket
            .async_io(tokio::io::Interest::WRITABLE, || {
                let mut none = SendAncillaryBuffer::default();
                Ok(sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut none, SendFlags::NOSIGNAL)?)
            })
            .await;
        match sent {
            Ok(_) => Ok(()),
            Err(error) if is_closed(&error) => Err(PacketError::Closed),
            Err(source) => Err(PacketError::Io { step: "sendmsg", source }),
        }
    }

    /// A buffer for [`PacketSocket::receive`]: one byte more than allowed tells an oversize packet from one that just fits.
    pub fn buffer(&self) -> Vec<u8> {
        vec![0; self.limit + 1]
    }

    /// Waits for one packet and puts it into `buffer`, made by [`PacketSocket::buffer`]. Cancelling the future loses nothing.
    ///
    /// # Errors
    /// Every variant of [`PacketError`]; after any of them the connection is of no use.
    pub async fn receive<'a>(&self, buffer: &'a mut [u8]) -> Result<Packet<'a>, PacketError> {
        let received = self
            .socket
            .async_io(tokio::io::Interest::READABLE, || receive_now(&self.socket, buffer, self.descriptors))
            .await;
        let received = match received {
            Ok(received) => received,
            Err(error) if is_closed(&error) => return Err(PacketError::Closed),
            Err(source) => return Err(PacketError::Io { step: "recvmsg", source }),
        };
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(PacketError::UnexpectedDescriptors);
        }
        if received.flags.contains(ReturnFlags::TRUNC) || received.length > self.limit {
            return Err(PacketError::TooLarge { limit: self.limit });
        }
        match buffer.get(..received.length) {
            // Both protocols have no empty message, and an ended connection reads as one.
            None | Some([]) => Err(PacketError::Closed),
            Some(bytes) => Ok(Packet { bytes, descriptors: received.descriptors }),
        }
    }
}

struct Received {
    length: usize,
    flags: ReturnFlags,
    descriptors: Vec<OwnedFd>,
}

fn receive_now(socket: &UnixDatagram, buffer: &mut [u8], accepted: Descriptors) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = match accepted {
        Descriptors::Accepted => RecvAncillaryBuffer::new(&mut space),
        // Without room the kernel closes whatever was sent and says so in the flags.
        Descriptors::Refused => RecvAncillaryBuffer::default(),
    };
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            descriptors.extend(rights);
        }
    }
    Ok(Received { length: message.bytes, flags: message.flags, descriptors })
}

fn io_errno(step: &'static str) -> impl Fn(Errno) -> PacketError {
    move |errno| PacketError::Io { step, source: errno.into() }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryMessage, socketpair};

    fn pair(limit: usize, descriptors: Descriptors) -> (PacketSocket, OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).expect("socketpair");
        (PacketSocket::new(ours, limit, descriptors).expect("socket"), theirs)
    }

    fn send_with_descriptor(socket: &OwnedFd) {
        let rights = [socket.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
        sendmsg(socket, &[IoSlice::new(b"hi")], &mut control, SendFlags::empty()).expect("sent");
    }

    #[tokio::test]
    async fn packet_over_the_limit_is_an_error_and_not_data() {
        let (socket, theirs) = pair(16, Descriptors::Refused);
        rustix::io::write(&theirs, &[0; 17]).expect("sent");

        assert!(matches!(socket.receive(&mut socket.buffer()).await, Err(PacketError::TooLarge { limit: 16 })));
    }

    #[tokio::test]
    async fn packet_of_exactly_the_limit_arrives_whole() {
        let (socket, theirs) = pair(16, Descriptors::Refused);
        rustix::io::write(&theirs, &[7; 16]).expect("sent");

        assert_eq!(socket.receive(&mut socket.buffer()).await.expect("packet").bytes, [7; 16]);
    }

    #[tokio::test]
    async fn descriptors_from_an_untrusted_side_are_refused() {
        let (socket, theirs) = pair(16, Descriptors::Refused);
        send_with_descriptor(&theirs);

        assert!(matches!(socket.receive(&mut socket.buffer()).await, Err(PacketError::UnexpectedDescriptors)));
    }

    #[tokio::test]
    async fn descriptors_from_the_launcher_arrive() {
        let (socket, theirs) = pair(16, Descriptors::Accepted);
        send_with_descriptor(&theirs);

        assert_eq!(socket.receive(&mut socket.buffer()).await.expect("packet").descriptors.len(), 1);
    }

    #[tokio::test]
    async fn closing_the_other_side_is_reported_as_closed() {
        let (socket, theirs) = pair(16, Descriptors::Refused);
        drop(theirs);

        assert!(matches!(socket.receive(&mut socket.buffer()).await, Err(PacketError::Closed)));
        assert!(matches!(socket.send(b"x").await, Err(PacketError::Closed)));
    }
}
