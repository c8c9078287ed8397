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
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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
    /// Watched for packets only. Watched for room as well, it would wake its task each time the other side takes a packet.
    socket: AsyncFd<OwnedFd>,
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
        let socket = watch(socket, Interest::READABLE)?;
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
        loop {
            match self.send_now(bytes) {
                Err(PacketError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            // Rare, so it is watched for room only now, through a descriptor of its own.
            let again = self.socket.get_ref().try_clone().map_err(io("dup"))?;
            let room = watch(again, Interest::WRITABLE)?;
            drop(room.writable().await.map_err(io("epoll"))?);
        }
    }

    /// Sends one packet if the other side has room for it, which is an error of kind `WouldBlock` otherwise.
    ///
    /// # Errors
    /// As [`PacketSocket::send`].
    pub fn send_now(&self, bytes: &[u8]) -> Result<(), PacketError> {
        if bytes.len() > self.limit {
            return Err(PacketError::TooLarge { limit: self.limit });
        }
        let mut none = SendAncillaryBuffer::default();
        match sendmsg(self.socket.get_ref(), &[IoSlice::new(bytes)], &mut none, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(errno) => match io::Error::from(errno) {
                error if is_closed(&error) => Err(PacketError::Closed),
                source => Err(PacketError::Io { step: "sendmsg", source }),
            },
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
        let received =
            self.socket.async_io(Interest::READABLE, |socket| receive_now(socket, buffer, self.descriptors)).await;
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

#[expect(
    deprecated,
    reason = "its replacement is unsafe for types that lie about their descriptor, which OwnedFd cannot"
)]
fn watch(socket: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, PacketError> {
    AsyncFd::with_interest(socket, interest).map_err(io("epoll"))
}

struct Received {
    length: usize,
    flags: ReturnFlags,
    descriptors: Vec<OwnedFd>,
}

fn receive_now(socket: &OwnedFd, buffer: &mut [u8], accepted: Descriptors) -> io::Result<Received> {
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

fn io(step: &'static str) -> impl Fn(io::Error) -> PacketError {
    move |source| PacketError::Io { step, source }
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
    async fn sending_waits_for_room_and_loses_nothing() {
        let (socket, theirs) = pair(1000, Descriptors::Refused);
        let mut filled = 0_u32;
        while socket.send_now(&[1; 1000]).is_ok() {
            filled += 1;
        }

        let mut send = std::pin::pin!(socket.send(&[2; 10]));
        let early = tokio::time::timeout(std::time::Duration::from_millis(20), &mut send).await;
        assert!(early.is_err(), "sent although nobody had read");
        let mut buffer = [0; 2000];
        for _ in 0..filled {
            assert_eq!(rustix::io::read(&theirs, &mut buffer).expect("read"), 1000);
        }
        send.await.expect("sent");
        assert_eq!(rustix::io::read(&theirs, &mut buffer).expect("read"), 10);
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
