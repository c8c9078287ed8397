//! Privileged: hands blanks the descriptors of their root filesystem and of their groups.
//!
//! From request to sandbox: a request that was checked waits for a blank, gets the oldest one, and is answered when process
//! 1 says that it has closed itself in.

use std::os::fd::AsRawFd;
use std::time::Instant;

use nix::errno::Errno;
use prost::Message;
use proto::launch::v1 as wire;
use proto::launch::v1::reply::Body as Answer;

use super::Launcher;
use super::answers::{host_error, no_slot};
use super::pool::REFILL_DELAY;
use super::process::Phase;
use crate::boot::Booted;
use crate::launcher::background::PACKET_BYTES;
use crate::launcher::create::{self, Context};
use crate::launcher::forecast::Forecast;
use crate::launcher::nested;
use crate::launcher::shape::Shape;
use crate::launcher::state::{self, Record};
use crate::launcher::validate::{Checked, check, refusal};
use crate::sys::socket::receive;

/// Requests that may wait for a blank; beyond that NO_SLOT.
pub(super) const MAX_WAITING: usize = 64;
/// Blanks that have become sandboxes and whose mounts may wait for a quiet moment.
const MAX_SPENT: usize = 4;

/// A request that waits for a blank.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) connection: u32,
    pub(super) request_id: u64,
    pub(super) request: Checked,
    pub(super) since: Instant,
}

impl Launcher<'_> {
    /// Checks a request and has it wait for a blank.
    pub(super) fn create(&mut self, number: u32, request_id: u64, request: &wire::CreateSandbox) {
        let checked = check(request, &self.parts.policy).and_then(|checked| match self.parts.shape {
            Shape::Nested => nested::check(&checked).map(|()| checked),
            Shape::Privileged | Shape::Unprivileged => Ok(checked),
        });
        let checked = match checked {
            Ok(checked) => checked,
            Err(failure) => return self.answer(number, request_id, Answer::Failure(failure)),
        };
        let taken = self.find(&checked.sandbox_id).is_some()
            || self.waiting.iter().any(|waiting| waiting.request.sandbox_id == checked.sandbox_id)
            || self.processes.values().any(|process| {
                matches!(&process.phase, Phase::Booting { waiting, .. } if waiting.request.sandbox_id == checked.sandbox_id)
            });
        if taken {
            let failure = refusal(
                "SANDBOX_EXISTS",
                format!("sandbox_id {:?} is in use", checked.sandbox_id),
                "choose another sandbox_id",
            );
            return self.answer(number, request_id, Answer::Failure(failure));
        }
        if self.waiting.len() >= MAX_WAITING {
            self.counters.creations_refused += 1;
            return self.answer(number, request_id, Answer::Failure(no_slot("too many sandboxes are being made")));
        }
        let since = Instant::now();
        self.in_a_row = self.last_asked.is_some_and(|last| since.duration_since(last) < REFILL_DELAY);
        self.last_asked = Some(since);
        self.waiting.push_back(Waiting { connection: number, request_id, request: checked, since });
        self.hand_out();
    }

    /// Gives waiting requests to blanks.
    pub(super) fn hand_out(&mut self) {
        while !self.waiting.is_empty() {
            let Some(number) = self.processes.iter().find(|(_, p)| matches!(p.phase, Phase::Blank)).map(|(n, _)| *n)
            else {
                break;
            };
            let Some(waiting) = self.waiting.pop_front() else { break };
            self.boot(number, waiting);
        }
    }

    /// Tells a blank what to become.
    fn boot(&mut self, number: u32, waiting: Waiting) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        let Some(blank) = process.blank.as_mut() else { return };
        let mut context = Context {
            policy: &self.parts.policy,
            tree: &self.parts.tree,
            builder: &mut self.builder,
            host_root: &self.parts.host_root,
            rootless: self.parts.rootless,
            embedded: self.embedded,
            processors: &self.parts.processors,
            places: &self.parts.places,
        };
        let booted = match self.parts.shape {
            Shape::Nested => nested::boot(&mut context, blank, &process.slot, &waiting.request),
            Shape::Privileged | Shape::Unprivileged => {
                create::boot(&mut context, blank, &process.slot, &waiting.request)
            }
        };
        match booted {
            Ok(layers) => {
                self.forecast = Some(Forecast::after(&waiting.request, &self.parts.policy));
                process.phase = Phase::Booting { waiting: Box::new(waiting), layers };
            }
            Err(error) => {
                let failure = host_error(&error);
                self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
                self.kill(number, None);
            }
        }
    }

    /// Hears from process 1 whether it has closed itself in, and answers the request.
    pub(super) fn booted(&mut self, number: u32) {
        let Some(process) = self.processes.get_mut(&number) else { return };
        let Some(boot) = process.boot.as_ref() else { return };
        let message = match receive(boot, PACKET_BYTES) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(Some(packet)) => Booted::decode(packet.bytes.as_slice()).ok(),
            Ok(None) | Err(_) => None,
        };
        // One packet is all there is to say; the socket has done its work.
        if let Some(boot) = process.boot.take() {
            let _ = self.epoll.delete(&boot);
        }
        let previous = std::mem::replace(&mut process.phase, Phase::Ending { sandbox_id: None, answer: None });
        let Phase::Booting { waiting, mut layers } = previous else {
            return self.kill(number, None);
        };
        let booted = message.unwrap_or_else(|| Booted {
            failure: "process 1 ended before it was ready".to_owned(),
            errno: libc::EPIPE,
            layers: Vec::new(),
        });
        if !booted.failure.is_empty() {
            let mut failure = refusal(
                "HOST_ERROR",
                format!("the sandbox cannot be closed: {}", booted.failure),
                "run `sandbox-runner doctor`",
            );
            failure.errno = booted.errno;
            self.answer(waiting.connection, waiting.request_id, Answer::Failure(failure));
            return self.kill(number, None);
        }
        layers.extend(booted.layers);
        let adopts = self.adopts();
        let directory = self.processes.get(&number).map(|process| self.output_directory(&process.name));
        let Some(process) = self.processes.get_mut(&number) else { return };
        // Its namespaces and groups live without our descriptors.
        let mut blank = process.blank.take();
        process.mounts = blank.as_mut().and_then(|blank| blank.mounts.take());
        process.phase = Phase::Ready { sandbox_id: waiting.request.sandbox_id.clone() };
        process.record = adopts.then(|| state::start_time(process.pid)).flatten().map(|start_time| Record {
            sandbox_id: waiting.request.sandbox_id.clone(),
            name: process.name.clone(),
            pid: process.pid,
            start_time,
            slot: process.slot.number,
        });
        self.failures = 0;
        let created = wire::SandboxCreated {
            sandbox_id: waiting.request.sandbox_id,
            socket_name: format!("{}.sock", process.name),
            pid: u32::try_from(process.pid).unwrap_or(0),
            id_base: process.slot.base,
            id_count: process.slot.count,
            layers,
            output_directory: directory.unwrap_or_default(),
            took_us: u64::try_from(waiting.since.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        let pidfd = process.pidfd.as_raw_fd();
        self.store();
        if !self.answer_with(waiting.connection, waiting.request_id, Answer::SandboxCreated(created), &[pidfd]) {
            // Its runner has gone meanwhile, and a successor may have looked at the list before this one was on it.
            self.kill(number, None);
        }
        self.last_request = Instant::now();
        self.spent.extend(blank.map(|blank| (self.last_request, blank)));
        while self.spent.len() > MAX_SPENT {
            self.spent.pop_front();
        }
    }
}
