//! Privileged: what the background process is told to do, it does with our capabilities.
//!
//! The talk with the background process: orders go out as it can take them, its reports lead to what waits for them.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use prost::Message;

use super::{End, Launcher};
use crate::launcher::background::{Order, PACKET_BYTES, Report};
use crate::launcher::nested;
use crate::sys::socket::{receive_what_fits, send};

impl Launcher<'_> {
    /// Gives one order, with what it is about, now or as soon as it can be taken.
    pub(super) fn order(&mut self, order: &Order, descriptor: Option<OwnedFd>) {
        if self.background_gone {
            return;
        }
        self.orders.push_back((order.encode_to_vec(), descriptor));
        self.give_orders();
    }

    /// Sends what the background process can take; the rest waits, bounded by the number of slots.
    pub(super) fn give_orders(&mut self) {
        while let Some((order, descriptor)) = self.orders.front() {
            let descriptors: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
            match send(&self.parts.background, order, &descriptors) {
                Ok(()) => {
                    self.orders.pop_front();
                }
                Err(Errno::EAGAIN) => return,
                Err(_) => return self.lose_background(),
            }
        }
    }

    /// Reads one report.
    pub(super) fn report(&mut self) {
        // Out of descriptors: one blank is lost, not the process that made it.
        let packet = match receive_what_fits(&self.parts.background, PACKET_BYTES) {
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            Ok(Some(packet)) => packet,
            Ok(None) | Err(_) => return self.lose_background(),
        };
        let Ok(report) = Report::decode(packet.bytes.as_slice()) else { return };
        if !report.reclaimed.is_empty() {
            self.reclaimed(&report);
        } else if !report.removed.is_empty() {
            if let Some(farewell) = self.farewells.remove(&report.removed) {
                nested::reap_orphans();
                self.say(farewell);
            }
            // A group that does not become empty keeps its ids: nobody else may get them.
            if let Some(slot) = self.removing.remove(&report.removed).filter(|_| report.failure.is_empty()) {
                self.parts.slots.release(slot);
            }
        } else if !report.failure.is_empty() {
            self.make_failed(&report);
        } else {
            self.made(report, packet.descriptors);
        }
    }

    /// Without the background process nothing can be made or removed: the launcher ends.
    fn lose_background(&mut self) {
        let _ = self.epoll.delete(&self.parts.background);
        self.background_gone = true;
        self.making.clear();
        self.removing.clear();
        self.stop(End::Stopped);
    }
}
