//! From what was measured to what is not taken any more. Pure: a reading in, a judgement out.
//!
//! Whatever closes opens at another value than it closed at, or admission would flap with every session.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::work::{Closed, Gauge, Pressure, Resource, Shortage, Trouble};

/// Time over which waiting is averaged. Shorter, and one large file that is written closes a healthy host.
pub const WINDOW: Duration = Duration::from_secs(10);
/// Free files below which nothing more is opened, and nothing more is written, in thousandths of all.
const INODES_LOW_PER_MILLE: u64 = 50;
const INODES_CRITICAL_PER_MILLE: u64 = 20;
/// Descriptors that are kept free for the runner itself when there are plenty, and where there are few, as a part of all.
const DESCRIPTORS_KEPT: u64 = 64;
const DESCRIPTORS_KEPT_PART: u64 = 4;

/// When work is not taken any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// Free bytes of a disk below which no session is opened; `None` follows the size of the disk, 0 never closes.
    pub disk_low_bytes: Option<u64>,
    /// Free bytes of a disk below which no call is taken that may write; as above.
    pub disk_critical_bytes: Option<u64>,
    /// Share of the time, in percent, in which some process waited for memory, from which on no session is opened; 0: never.
    pub memory_stall_percent: u64,
    /// The same for times in which all processes waited for block devices.
    pub io_stall_percent: u64,
    /// The same for times in which some process waited for a processor.
    pub cpu_stall_percent: u64,
}

/// A file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// What it holds: `state` or `run`.
    pub name: &'static str,
    /// Bytes that an ordinary user may still use.
    pub free_bytes: u64,
    /// All bytes.
    pub total_bytes: u64,
    /// Files that an ordinary user may still make.
    pub free_inodes: u64,
    /// All files; 0 where there is no such bound.
    pub total_inodes: u64,
}

/// Microseconds for which processes have waited, since the boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stalls {
    /// Some for memory.
    pub memory: u64,
    /// All for block devices.
    pub io: u64,
    /// Some for a processor.
    pub processor: u64,
}

/// What was measured at one moment. What cannot be measured here is absent, and closes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    /// On a clock that does not go back.
    pub at: Duration,
    /// File systems that the runner writes to.
    pub disks: Vec<Disk>,
    /// What processes wait for.
    pub stalls: Option<Stalls>,
    /// Descriptors in use, and how many there can be.
    pub descriptors: Option<(u64, u64)>,
    /// The journal has met a full disk and keeps what room it has for the results of calls that were taken.
    pub journal_is_full: bool,
}

/// Remembers what is closed.
#[derive(Debug)]
pub struct Judge {
    marks: Marks,
    closed: BTreeMap<(Resource, String), bool>,
    history: VecDeque<(Duration, Stalls)>,
    pressure: Pressure,
}

impl Judge {
    /// Nothing is closed.
    #[must_use]
    pub fn new(marks: Marks) -> Self {
        Self { marks, closed: BTreeMap::new(), history: VecDeque::new(), pressure: Pressure::default() }
    }

    /// How the host stands, after this reading and those before it.
    pub fn judge(&mut self, reading: &Reading) -> Pressure {
        self.pressure = Pressure::default();
        for disk in &reading.disks {
            self.disk(disk);
        }
        if reading.journal_is_full {
            // Also those that only look: each is written down.
            let measured = Trouble::NO_SPACE.to_owned();
            self.pressure.shortages.push(Shortage { resource: Resource::Disk, closed: Closed::Calls, measured });
        }
        if let Some((used, limit)) = reading.descriptors {
            self.descriptors(used, limit);
        }
        if let Some(stalls) = reading.stalls {
            self.stalls(reading.at, stalls);
        }
        std::mem::take(&mut self.pressure)
    }

    fn disk(&mut self, disk: &Disk) {
        let Disk { name, free_bytes, total_bytes, free_inodes, total_inodes } = *disk;
        self.gauge(format!("disk_free_bytes{{disk=\"{name}\"}}"), free_bytes);
        let low = self.marks.disk_low_bytes.unwrap_or_else(|| disk_low(total_bytes));
        let critical = self.marks.disk_critical_bytes.unwrap_or_else(|| disk_critical(total_bytes));
        let measured = |mark: u64| {
            format!("{} MiB of the {name} disk are free, {} MiB are kept free", free_bytes >> 20, mark >> 20)
        };
        self.below((Resource::Disk, format!("{name} low")), free_bytes, low, Closed::Sessions, || measured(low));
        let key = (Resource::Disk, format!("{name} critical"));
        self.below(key, free_bytes, critical, Closed::Writing, || measured(critical));
        if total_inodes == 0 {
            return;
        }
        self.gauge(format!("disk_free_inodes{{disk=\"{name}\"}}"), free_inodes);
        let part = |per_mille: u64| total_inodes / 1000 * per_mille + total_inodes % 1000 * per_mille / 1000;
        let (low, critical) = (part(INODES_LOW_PER_MILLE), part(INODES_CRITICAL_PER_MILLE));
        let measured =
            |mark: u64| format!("{free_inodes} files more fit on the {name} disk, room for {mark} is kept free");
        self.below((Resource::Disk, format!("{name} inodes")), free_inodes, low, Closed::Sessions, || measured(low));
        let key = (Resource::Disk, format!("{name} last inodes"));
        self.below(key, free_inodes, critical, Closed::Writing, || measured(critical));
    }

    fn descriptors(&mut self, used: u64, limit: u64) {
        self.gauge("descriptors_open".to_owned(), used);
        self.gauge("descriptors_limit".to_owned(), limit);
        let free = limit.saturating_sub(used);
        let low = DESCRIPTORS_KEPT.min(limit / DESCRIPTORS_KEPT_PART);
        let critical = low / DESCRIPTORS_KEPT_PART;
        let measured = |mark: u64| format!("{used} of {limit} descriptors are open, {mark} are kept free");
        let key = |name: &str| (Resource::Descriptors, name.to_owned());
        self.below(key("low"), free, low, Closed::Sessions, || measured(low));
        self.below(key("critical"), free, critical, Closed::Calls, || measured(critical));
    }

    /// Closes below `mark`, and opens when a tenth more is free again.
    fn below(
        &mut self,
        key: (Resource, String),
        free: u64,
        mark: u64,
        closed: Closed,
        measured: impl FnOnce() -> String,
    ) {
        let resource = key.0;
        let is_closed = self.closed.entry(key).or_default();
        let enough = if *is_closed { mark.saturating_add(mark.div_ceil(10)) } else { mark };
        *is_closed = free < enough;
        if *is_closed {
            self.pressure.shortages.push(Shortage { resource, closed, measured: measured() });
        }
    }

    fn stalls(&mut self, at: Duration, now: Stalls) {
        while self.history.get(1).is_some_and(|(then, _)| at.saturating_sub(*then) >= WINDOW) {
            self.history.pop_front();
        }
        self.history.push_back((at, now));
        let Some((since, then)) = self.history.front().copied() else { return };
        let window = at.saturating_sub(since);
        // A shorter time says nothing; what was closed stays closed.
        let is_whole = window >= WINDOW;
        let Marks { memory_stall_percent, io_stall_percent, cpu_stall_percent, .. } = self.marks;
        for (resource, name, mark, now, then) in [
            (Resource::Memory, "memory", memory_stall_percent, now.memory, then.memory),
            (Resource::Io, "io", io_stall_percent, now.io, then.io),
            (Resource::Processor, "cpu", cpu_stall_percent, now.processor, then.processor),
        ] {
            let waited = u128::from(now.saturating_sub(then)) * 100;
            let percent = u64::try_from(waited / window.as_micros().max(1)).unwrap_or(u64::MAX);
            if is_whole {
                self.gauge(format!("stalled_percent{{resource=\"{name}\"}}"), percent);
            }
            let is_closed = self.closed.entry((resource, name.to_owned())).or_default();
            if is_whole {
                // Half of what closes: the sessions that were kept out would bring the rest back.
                *is_closed = mark > 0 && percent >= if *is_closed { mark.div_ceil(2) } else { mark };
            }
            if *is_closed {
                let measured =
                    format!("processes waited for {name} in {percent} % of the last seconds, {mark} % close");
                self.pressure.shortages.push(Shortage { resource, closed: Closed::Sessions, measured });
            }
        }
    }

    fn gauge(&mut self, name: String, value: u64) {
        self.pressure.gauges.push(Gauge { name, value });
    }
}

/// A tenth, and at least 5 GiB, where that is not more than a quarter.
fn disk_low(total: u64) -> u64 {
    (total / 10).max(5 << 30).min(total / 4)
}

/// Three hundredths, and at least 1 GiB, where that is not more than a twentieth.
fn disk_critical(total: u64) -> u64 {
    (total / 100 * 3).max(1 << 30).min(total / 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn disk(free_bytes: u64, free_inodes: u64) -> Reading {
        let disk = Disk { name: "state", free_bytes, total_bytes: 100 * GIB, free_inodes, total_inodes: 1000 };
        Reading { disks: vec![disk], ..Reading::default() }
    }

    fn closed(pressure: &Pressure) -> Vec<Closed> {
        pressure.shortages.iter().map(|shortage| shortage.closed).collect()
    }

    #[test]
    fn disk_closes_sessions_first_then_writing_and_opens_later_than_it_closed() {
        use Closed::{Sessions, Writing};
        let mut judge = Judge::new(Marks::default());
        for (free, expected) in [
            (10 * GIB, vec![]),
            (10 * GIB - 1, vec![Sessions]),
            (10 * GIB, vec![Sessions]),
            (3 * GIB - 1, vec![Sessions, Writing]),
            (3 * GIB, vec![Sessions, Writing]),
            (4 * GIB, vec![Sessions]),
            (11 * GIB, vec![]),
            (10 * GIB, vec![]),
        ] {
            assert_eq!(closed(&judge.judge(&disk(free, 1000))), expected, "{free}");
        }
    }

    #[test]
    fn files_are_counted_like_bytes_and_the_message_has_the_numbers() {
        let mut judge = Judge::new(Marks::default());
        assert_eq!(closed(&judge.judge(&disk(50 * GIB, 50))), []);
        let pressure = judge.judge(&disk(50 * GIB, 49));
        assert_eq!(pressure.shortages[0].measured, "49 files more fit on the state disk, room for 50 is kept free");
        assert_eq!(closed(&judge.judge(&disk(50 * GIB, 19))), [Closed::Sessions, Closed::Writing]);
        assert_eq!(closed(&judge.judge(&disk(50 * GIB, 55))), []);
    }

    #[test]
    fn disk_without_a_bound_of_files_is_judged_by_its_bytes() {
        let mut judge = Judge::new(Marks::default());
        let mut reading = disk(50 * GIB, 0);
        reading.disks[0].total_inodes = 0;
        assert_eq!(closed(&judge.judge(&reading)), []);
    }

    #[test]
    fn small_disk_keeps_a_part_of_itself_and_configured_marks_win() {
        assert_eq!((disk_low(8 * GIB), disk_low(30 * GIB), disk_low(100 * GIB)), (2 * GIB, 5 * GIB, 10 * GIB));
        assert_eq!((disk_critical(10 * GIB), disk_critical(100 * GIB)), (GIB / 2, 100 * GIB / 100 * 3));
        let marks = Marks { disk_low_bytes: Some(60 * GIB), disk_critical_bytes: Some(0), ..Marks::default() };
        assert_eq!(closed(&Judge::new(marks).judge(&disk(50 * GIB, 1000))), [Closed::Sessions]);
        let off = Marks { disk_low_bytes: Some(0), disk_critical_bytes: Some(0), ..Marks::default() };
        assert_eq!(closed(&Judge::new(off).judge(&disk(0, 1000))), []);
    }

    #[test]
    fn descriptors_close_sessions_then_calls() {
        let mut judge = Judge::new(Marks::default());
        let mut at = |used, limit| {
            let reading = Reading { descriptors: Some((used, limit)), ..Reading::default() };
            closed(&judge.judge(&reading))
        };
        assert_eq!(at(192, 256), []);
        assert_eq!(at(193, 256), [Closed::Sessions]);
        assert_eq!(at(186, 256), [Closed::Sessions]);
        assert_eq!(at(256, 256), [Closed::Sessions, Closed::Calls]);
        assert_eq!(at(100, 256), []);
        // Where there are many, no more are kept than are of use.
        assert_eq!(at(19_936, 20_000), []);
    }

    /// One reading a second, with this share of the second spent waiting for memory.
    fn seconds(judge: &mut Judge, clock: &mut (u64, u64), count: u64, percent: u64) -> Vec<Closed> {
        let mut last = Vec::new();
        for _ in 0..count {
            *clock = (clock.0 + 1, clock.1 + percent * 10_000);
            let stalls = Some(Stalls { memory: clock.1, ..Stalls::default() });
            last = closed(&judge.judge(&Reading { at: Duration::from_secs(clock.0), stalls, ..Reading::default() }));
        }
        last
    }

    #[test]
    fn waiting_closes_when_it_lasts_and_opens_when_it_has_ended() {
        let mut judge = Judge::new(Marks { memory_stall_percent: 20, ..Marks::default() });
        let mut clock = (1000, 77);
        assert_eq!(seconds(&mut judge, &mut clock, 9, 100), [], "not a whole window yet");
        let mut judge = Judge::new(Marks { memory_stall_percent: 20, ..Marks::default() });
        assert_eq!(seconds(&mut judge, &mut clock, 20, 0), []);
        assert_eq!(seconds(&mut judge, &mut clock, 1, 100), [], "one bad second is no shortage");
        assert_eq!(seconds(&mut judge, &mut clock, 10, 25), [Closed::Sessions]);
        assert_eq!(seconds(&mut judge, &mut clock, 20, 12), [Closed::Sessions], "half of what closes keeps it closed");
        assert_eq!(seconds(&mut judge, &mut clock, 11, 5), []);
    }

    #[test]
    fn waiting_that_nobody_watches_closes_nothing_and_is_measured() {
        let mut judge = Judge::new(Marks::default());
        let mut clock = (0, 0);
        assert_eq!(seconds(&mut judge, &mut clock, 20, 100), []);
        let stalls = Some(Stalls { memory: clock.1, ..Stalls::default() });
        let pressure = judge.judge(&Reading { at: Duration::from_secs(20), stalls, ..Reading::default() });
        assert!(pressure.gauges.contains(&Gauge { name: "stalled_percent{resource=\"memory\"}".into(), value: 100 }));
    }

    #[test]
    fn full_disk_of_the_journal_closes_everything_whatever_the_marks() {
        let off = Marks { disk_low_bytes: Some(0), disk_critical_bytes: Some(0), ..Marks::default() };
        let mut judge = Judge::new(off);
        let mut reading = Reading { journal_is_full: true, ..disk(50 * GIB, 1000) };
        let refusal = judge.judge(&reading).session_refusal().expect("refused");
        assert_eq!(
            refusal.to_string(),
            "this runner takes no new sessions now: the disk of the journal is full (DISK_LOW)"
        );
        assert_eq!(closed(&judge.judge(&reading)), [Closed::Calls]);
        reading.journal_is_full = false;
        assert_eq!(closed(&judge.judge(&reading)), []);
    }

    #[test]
    fn what_cannot_be_measured_closes_nothing() {
        assert_eq!(Judge::new(Marks::default()).judge(&Reading::default()), Pressure::default());
    }
}
