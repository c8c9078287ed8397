//! What was measured, in lines for the record.

use std::fs;
use std::time::Duration;

use crate::memory::Memory;
use crate::scenario::{Load, Measured};

/// One load on both workers.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) load: Load,
    pub(crate) ours: Vec<Measured>,
    pub(crate) official: Vec<Measured>,
}

/// Under which conditions the figures were taken.
pub(crate) fn conditions(release: bool, turns: usize) -> String {
    let profile = if release { "release" } else { "debug" };
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!("{profile} runner, {processors} processors, load {load} before, each {turns} times in turn")
}

/// All times of one worker below one load.
struct Times {
    sorted: Vec<Duration>,
    per_second: f64,
}

impl Times {
    fn of(turns: &[Measured]) -> Self {
        let mut sorted: Vec<Duration> = turns.iter().flat_map(|one| &one.latencies).copied().collect();
        sorted.sort();
        let took: Duration = turns.iter().map(|one| one.took).sum();
        #[allow(clippy::cast_precision_loss, reason = "some thousand calls")]
        let per_second = sorted.len() as f64 / took.as_secs_f64();
        Self { sorted, per_second }
    }

    /// The least time within which so many percent of the calls were answered, in milliseconds.
    fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.sorted.len() * percent).div_ceil(100).max(1);
        self.sorted[rank - 1].as_secs_f64() * 1000.0
    }

    fn text(&self) -> String {
        let (median, p99) = (self.percentile(50), self.percentile(99));
        let (count, rate) = (self.sorted.len(), self.per_second);
        format!("{count} calls, {rate:.1}/s, p50 {median:.1} ms, p99 {p99:.1} ms")
    }
}

impl Row {
    pub(crate) fn new(load: Load) -> Self {
        Self { load, ours: Vec::new(), official: Vec::new() }
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        let (ours, official) = (Times::of(&self.ours), Times::of(&self.official));
        let sessions = self.load.sessions;
        let how = if self.load.at_once { "at once" } else { "one after the other" };
        let each = if self.load.at_once { ", a process each," } else { "" };
        let mut lines = vec![
            format!("{sessions} sessions {how}: ours {}; official{each} {}", ours.text(), official.text()),
            format!(
                "of these, official / ours: p50 {:.2}x, p99 {:.2}x; ours / official: calls per second {:.2}x",
                official.percentile(50) / ours.percentile(50),
                official.percentile(99) / ours.percentile(99),
                ours.per_second / official.per_second,
            ),
        ];
        if self.load.at_once {
            lines.extend([
                self.memory("sessions per machine at equal memory (private)", |memory| mib(memory.private)),
                self.memory("the same with what is shared divided up", |memory| mib(memory.proportional)),
                self.memory("the same by MemAvailable, kernel memory included", |memory| signed(memory.less_available)),
            ]);
        }
        lines
    }

    /// MiB of a session with either worker, and how many times more the official one takes.
    fn memory(&self, what: &str, of: impl Fn(&Memory) -> f64) -> String {
        #[allow(clippy::cast_precision_loss, reason = "few sessions")]
        let mean = |turns: &[Measured]| {
            let sum: f64 = turns.iter().filter_map(|one| one.memory.as_ref()).map(&of).sum();
            sum / (turns.len() * self.load.sessions) as f64
        };
        let (ours, official) = (mean(&self.ours), mean(&self.official));
        let ratio = official / ours;
        // Where others gave back more than was taken, there is no figure.
        let ratio =
            if ours > 0.0 && official > 0.0 { format!("{ratio:.1}x") } else { "none, others disturbed".to_owned() };
        format!("{what}: {ratio}, ours {ours:.2} MiB a session, official {official:.2} MiB")
    }
}

fn mib(bytes: u64) -> f64 {
    signed(i64::try_from(bytes).unwrap())
}

#[allow(clippy::cast_precision_loss, reason = "less than 2^52 bytes")]
fn signed(bytes: i64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
