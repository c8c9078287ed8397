//! Privileged: decides by the peer's uid whom the launcher obeys.
//!
//! The runner's connections: accepts them, reads one request from each packet, and sends answers. A runner that does not
//! read its answers is closed; no queue is kept for it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt::PeerCredentials};
use prost::Message;
use proto::launch::v1 as wire;
use proto::launch::v1::{reply::Body as Answer, request::Body as Question};

use super::{End, Event, Launcher};
use crate::launcher::shape::Shape;
use crate::launcher::validate::refusal;
use crate::sys::process::inherited_descriptor;
use crate::sys::socket::{receive_plain, send};

/// Largest request.
const REQUEST_BYTES: usize = 64 * 1024;
/// Connections at once; a runner needs one, its successor another.
const MAX_CONNECTIONS: usize = 8;

/// One connection of the runner.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    greeted: bool,
}

impl Launcher<'_> {
    /// Takes the next connection, if it is the runner's and there is room.
    pub(super) fn accept(&mut self) {
        let Some(listener) = &self.parts.listener else { return };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let raw = match accept4(listener.as_raw_fd(), flags) {
            Ok(raw) => raw,
            Err(Errno::EMFILE | Errno::ENFILE) => {
                // Level-triggered: without a rest the loop would spin on the connection that it cannot take.
                self.listener_rests = self.epoll.delete(listener).is_ok();
                return;
            }
            Err(_) => return,
        };
        let Ok(socket) = inherited_descriptor(raw) else { return };
        let allowed = getsockopt(&socket, PeerCredentials).is_ok_and(|peer| self.is_runner(peer.uid()));
        if allowed && self.connections.len() >= MAX_CONNECTIONS {
            self.counters.connections_refused += 1;
        } else if allowed {
            // An epoll that is full leaves the peer with a closed connection, which it tries again.
            let _ = self.add_connection(socket);
        }
    }

    fn is_runner(&self, uid: u32) -> bool {
        // In an unprivileged user namespace the runner's uid is the one that is mapped to 0.
        uid == if self.parts.rootless { 0 } else { self.parts.policy.runner_uid }
    }

    pub(super) fn add_connection(&mut self, socket: OwnedFd) -> nix::Result<()> {
        let number = self.number();
        self.watch(&socket, Event::Connection(number))?;
        self.connections.insert(number, Connection { socket, greeted: false });
        Ok(())
    }

    fn close(&mut self, number: u32) {
        self.connections.remove(&number);
        // Nobody would ever hear of the sandboxes it has asked for.
        self.waiting.retain(|waiting| waiting.connection != number);
        if let Some(listener) = self.parts.listener.as_ref().filter(|_| self.listener_rests) {
            self.listener_rests = self.watch(listener, Event::Listener).is_err();
        }
        if self.embedded && self.connections.is_empty() {
            self.stop(End::Stopped);
        }
    }

    /// Reads one request.
    pub(super) fn question(&mut self, number: u32) {
        let Some(connection) = self.connections.get(&number) else { return };
        let packet = match receive_plain(&connection.socket, REQUEST_BYTES) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(Some(packet)) => packet,
            // Descriptors do not travel to the launcher; a packet that was cut is no request.
            Ok(None) | Err(_) => return self.close(number),
        };
        let Ok(request) = wire::Request::decode(packet.as_slice()) else {
            self.answer(
                number,
                0,
                Answer::Failure(refusal(
                    "INVALID_FIELD",
                    "the packet is no launch/v1 request",
                    "send a request of launch/v1",
                )),
            );
            return self.close(number);
        };
        self.last_request = Instant::now();
        let greeted = connection.greeted;
        match request.body {
            Some(Question::Hello(hello)) => self.hello(number, request.request_id, hello.major),
            _ if !greeted => {
                self.answer(
                    number,
                    request.request_id,
                    Answer::Failure(refusal("INVALID_FIELD", "the first request must be hello", "send hello first")),
                );
            }
            Some(body) => self.dispatch(number, request.request_id, body),
            None => self.answer(
                number,
                request.request_id,
                Answer::Failure(refusal(
                    "NOT_SUPPORTED",
                    "the request has no body that this launcher knows",
                    "upgrade the launcher",
                )),
            ),
        }
    }

    fn hello(&mut self, number: u32, request_id: u64, major: u32) {
        if major != 1 {
            let failure = refusal(
                "NOT_SUPPORTED",
                format!("major is {major}, this launcher speaks 1"),
                "upgrade the older of the two",
            );
            return self.answer(number, request_id, Answer::Failure(failure));
        }
        if let Some(connection) = self.connections.get_mut(&number) {
            connection.greeted = true;
        }
        let welcome = wire::Welcome {
            major: 1,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: Some(wire::HostReport {
                idmapped_lowers: self.builder.idmaps() && self.parts.shape == Shape::Privileged,
                ..self.parts.report.clone()
            }),
        };
        self.answer(number, request_id, Answer::Welcome(welcome));
    }

    fn dispatch(&mut self, number: u32, request_id: u64, body: Question) {
        match body {
            Question::CreateSandbox(request) => self.create(number, request_id, &request),
            Question::KillSandbox(kill) => self.kill_sandbox(number, request_id, &kill.sandbox_id),
            Question::ListSandboxes(asked) => {
                let list = self.list(&asked.sandbox_id);
                self.answer(number, request_id, list);
            }
            Question::FreezeSandbox(freeze) => {
                let answer = self.freeze(&freeze);
                self.answer(number, request_id, answer);
            }
            Question::InspectSandbox(inspect) => {
                let answer = self.inspect(&inspect.sandbox_id);
                self.answer(number, request_id, answer);
            }
            Question::ReadCounters(_) => self.answer(number, request_id, Answer::Counters(self.counters)),
            Question::Reexecute(_) => match self.may_replace() {
                Ok(()) => {
                    self.answer(number, request_id, Answer::Done(wire::Done {}));
                    self.stop(End::Reexecute);
                }
                Err(failure) => self.answer(number, request_id, Answer::Failure(failure)),
            },
            Question::Stop(_) => {
                self.answer(number, request_id, Answer::Done(wire::Done {}));
                self.stop(End::Stopped);
            }
            Question::Hello(_) => {}
        }
    }

    pub(super) fn answer(&mut self, number: u32, request_id: u64, body: Answer) {
        self.answer_with(number, request_id, body, &[]);
    }

    /// Whether there was somebody who took it.
    pub(super) fn answer_with(&mut self, number: u32, request_id: u64, body: Answer, descriptors: &[i32]) -> bool {
        let Some(connection) = self.connections.get(&number) else { return false };
        let reply = wire::Reply { request_id, body: Some(body) };
        // A runner that does not read its answers is closed: the launcher keeps no queue for it.
        let taken = send(&connection.socket, &reply.encode_to_vec(), descriptors).is_ok();
        if !taken {
            self.close(number);
        }
        taken
    }

    /// Tells every runner what nobody has asked for.
    pub(super) fn tell_all(&mut self, body: &Answer) {
        let numbers: Vec<u32> = self.connections.iter().filter(|(_, c)| c.greeted).map(|(n, _)| *n).collect();
        for number in numbers {
            self.answer(number, 0, body.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nix::sys::socket::{AddressFamily, Backlog, SockType, UnixAddr, bind, connect, listen, socket};
    use proto::launch::v1::{CreateSandbox, HostRootfs, create_sandbox::Rootfs};

    use super::*;
    use crate::launcher::serve::making::MAX_WAITING;
    use crate::launcher::serve::pool::tests::{launcher, pair};

    /// Sends a request on the first connection and returns its answer.
    fn ask(launcher: &mut Launcher<'_>, runner: &OwnedFd, body: Question) -> Answer {
        let request = wire::Request { request_id: 7, body: Some(body) };
        send(runner, &request.encode_to_vec(), &[]).expect("room");
        let number = *launcher.connections.keys().next().expect("a connection");
        launcher.question(number);
        let packet = receive_plain(runner, REQUEST_BYTES).expect("a packet").expect("an answer");
        wire::Reply::decode(packet.as_slice()).expect("a reply").body.expect("a body")
    }

    fn seqpacket(flags: SockFlag) -> OwnedFd {
        socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).expect("a socket")
    }

    fn listener(path: &Path) -> OwnedFd {
        let listener = seqpacket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK);
        bind(listener.as_raw_fd(), &UnixAddr::new(path).expect("a short path")).expect("bound");
        listen(&listener, Backlog::new(16).expect("few")).expect("listening");
        listener
    }

    #[test]
    fn whatever_is_beyond_a_bound_is_refused_and_counted() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let ((background, _theirs), (connection, runner)) = (pair(), pair());
        let mut launcher = launcher(directory.path(), background, connection);
        launcher.parts.policy.runner_uid = nix::unistd::geteuid().as_raw();
        launcher.parts.listener = Some(listener(&path));
        // There is one already.
        let peers: Vec<_> = (1..=MAX_CONNECTIONS)
            .map(|_| {
                let peer = seqpacket(SockFlag::SOCK_CLOEXEC);
                connect(peer.as_raw_fd(), &UnixAddr::new(&path).expect("a short path")).expect("connected");
                launcher.accept();
                peer
            })
            .collect();
        assert_eq!(launcher.connections.len(), MAX_CONNECTIONS);
        assert_eq!(receive_plain(&peers[MAX_CONNECTIONS - 1], REQUEST_BYTES), Ok(None), "it is open");

        ask(&mut launcher, &runner, Question::Hello(wire::Hello { major: 1 }));
        let create = |number: usize| CreateSandbox {
            sandbox_id: format!("s{number}"),
            profile: "default".to_owned(),
            rootfs: Some(Rootfs::Host(HostRootfs {})),
            ..CreateSandbox::default()
        };
        let number = *launcher.connections.keys().next().expect("a connection");
        (0..MAX_WAITING).for_each(|waiting| launcher.create(number, 1, &create(waiting)));
        let refused = ask(&mut launcher, &runner, Question::CreateSandbox(create(MAX_WAITING)));
        assert!(matches!(&refused, Answer::Failure(failure) if failure.code == "NO_SLOT"), "{refused:?}");

        let counted = ask(&mut launcher, &runner, Question::ReadCounters(wire::ReadCounters {}));
        let expected = wire::Counters { connections_refused: 1, creations_refused: 1, creations_given_up: 0 };
        assert_eq!(counted, Answer::Counters(expected));
    }
}
