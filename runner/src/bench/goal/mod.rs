//! The goals: what each measures and against what. One file per subject.

mod call;
mod cancel;
mod creation;
mod crowd;
mod distance;
mod durable;
mod ending;
mod fence;
mod file;
mod floods;
mod loss;
mod objective;
mod output;
mod resident;
mod restart;
mod search;
mod stamp;
mod stream;
mod sync;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use super::BenchError;
use super::echo::Echo;
use super::machine::Usage;
use super::peer::Peers;
use super::row::Row;
use super::subject::Subject;
use super::whole::{Whole, link_settings};

/// Bytes that the large-output goal prints.
pub const FLOOD_BYTES: usize = 10_000_000;
/// Rounds that are run and not counted, so that caches and pools are filled.
const WARM_UP: usize = 3;
/// Long enough for the launcher to refill its pool, which it begins only after a while without requests.
const REFILL: Duration = Duration::from_millis(100);

/// A small message, as a call or its end is one.
const MESSAGE_BYTES: usize = 64;
/// Long enough for what follows a call (acknowledgements, the next slot) to be over before somebody else has his turn.
const SETTLE: Duration = Duration::from_millis(2);

async fn settle() {
    tokio::time::sleep(SETTLE).await;
}

/// What every goal works with.
pub struct Bench {
    /// Ours.
    pub subject: Subject,
    /// Others.
    pub peers: Peers,
    /// Rounds that count.
    pub rounds: usize,
    /// Name of the volume with the tree to search, and its number of files.
    pub tree: Option<(String, usize)>,
    /// Regular expression of the search.
    pub pattern: String,
    /// Ours alone, and where a daemon that is started finds its certificates.
    pub certificates: PathBuf,
}

impl Bench {
    /// A directory of our own for one part of the benchmark.
    fn directory(&self, name: &str) -> Result<PathBuf, BenchError> {
        let directory = self.certificates.join(name);
        std::fs::create_dir_all(&directory)
            .map_err(|source| BenchError::Machine { path: directory.display().to_string(), source })?;
        Ok(directory)
    }

    /// The same, and empty: nobody goes on with the journal of a measurement that was disturbed.
    fn fresh_directory(&self, name: &str) -> Result<PathBuf, BenchError> {
        let directory = self.directory(name)?;
        let failed = |source| BenchError::Machine { path: directory.display().to_string(), source };
        std::fs::remove_dir_all(&directory).map_err(failed)?;
        self.directory(name)
    }

    /// The whole way, on the loopback.
    async fn whole(&self) -> Result<Whole, BenchError> {
        let directory = self.directory("whole")?;
        Whole::start(self.subject.sandboxes(), &directory, (link_settings(true), false), async |address| Ok(address))
            .await
    }

    /// The same with a journal, and the directory on whose file system that is.
    async fn durable(&self) -> Result<(Whole, PathBuf), BenchError> {
        let directory = self.fresh_directory("durable")?;
        let way = Whole::start(self.subject.sandboxes(), &directory, (link_settings(true), true), async |address| {
            Ok(address)
        })
        .await?;
        Ok((way, directory))
    }

    /// The floor of the link.
    async fn echo(&self, each_way: Option<Duration>) -> Result<Echo, BenchError> {
        Echo::open(&self.directory("floor")?, each_way).await
    }
}

type Measuring<'a> = Pin<Box<dyn Future<Output = Result<Vec<Row>, BenchError>> + Send + 'a>>;

/// A group of goals that are measured together.
pub struct Goal {
    /// Ids in the table of goals.
    pub ids: &'static [&'static str],
    /// In words.
    pub what: &'static str,
    measure: for<'a> fn(&'a mut Bench) -> Measuring<'a>,
}

/// All goals, in the order in which they are measured.
///
/// Objectives of the daemon that have no row here: S1 to S3 and S17 to S19 are tests. S12, a day without an orchestrator, takes a
/// day; its parts, a runner without a lease and one that nobody asks for anything, are tests (`standstill`, `idle`). S20 counts
/// the days of many runners.
pub const GOALS: &[Goal] = &[
    Goal { ids: &["G1", "G3"], what: "a sandbox made, used once, gone", measure: |b| Box::pin(creation::cycle(b)) },
    Goal { ids: &["G4"], what: "time to ready of paced creation, p99", measure: |b| Box::pin(creation::paced(b)) },
    Goal { ids: &["G5"], what: "sandboxes per second of two creators", measure: |b| Box::pin(creation::rate(b)) },
    Goal {
        ids: &["G6"],
        what: "creation among 4,000 foreign processes, and with a large runner",
        measure: |b| Box::pin(crowd::measure(b)),
    },
    Goal {
        ids: &["G7", "G8"],
        what: "bash calls in a living sandbox, over the whole way",
        measure: |b| Box::pin(call::shell(b)),
    },
    Goal { ids: &["G9"], what: "read, write and edit inside", measure: |b| Box::pin(file::inside(b)) },
    Goal { ids: &["G10"], what: "read, write and edit over the whole way", measure: |b| Box::pin(file::whole(b)) },
    Goal { ids: &["G11", "G12"], what: "glob and grep", measure: |b| Box::pin(search::measure(b)) },
    Goal { ids: &["G13"], what: "large output", measure: |b| Box::pin(call::flood(b)) },
    Goal { ids: &["G14"], what: "large results over a long distance", measure: |b| Box::pin(distance::measure(b)) },
    Goal {
        ids: &["G17", "G18", "G19"],
        what: "memory and start of a daemon, memory of its idle sandboxes",
        measure: |b| Box::pin(resident::measure(b)),
    },
    Goal { ids: &["G20"], what: "killing a sandbox with 200 processes", measure: |b| Box::pin(ending::measure(b)) },
    Goal { ids: &["S4"], what: "sessions taken over by the next daemon", measure: |b| Box::pin(restart::measure(b)) },
    Goal { ids: &["S5"], what: "a journal of 10,000 records opened", measure: |b| Box::pin(durable::recovery(b)) },
    Goal { ids: &["S6"], what: "dispatch to started", measure: |b| Box::pin(durable::started(b)) },
    Goal { ids: &["S7"], what: "output produced to its frame", measure: |b| Box::pin(output::measure(b)) },
    Goal { ids: &["S8"], what: "cancel to signal, and to the end", measure: |b| Box::pin(cancel::measure(b)) },
    Goal { ids: &["S9"], what: "a silent network noticed by both sides", measure: |b| Box::pin(loss::detected(b)) },
    Goal { ids: &["S10"], what: "a session placed elsewhere, gone here", measure: |b| Box::pin(fence::measure(b)) },
    Goal { ids: &["S11"], what: "links back after an outage", measure: |b| Box::pin(loss::reconnected(b)) },
    Goal {
        ids: &["S13", "S14"],
        what: "a daemon with 100 sessions emptied, and its memory",
        measure: |b| Box::pin(resident::hundred(b)),
    },
    Goal {
        ids: &["S15", "S16"],
        what: "output through the spool, and heartbeats beside it and beside 50 floods",
        measure: |b| Box::pin(stream::measure(b)),
    },
    Goal { ids: &["S21"], what: "one record made durable", measure: |b| Box::pin(durable::record(b)) },
];

impl Goal {
    /// Measures, and notes what others did meanwhile.
    ///
    /// # Errors
    /// [`BenchError`].
    pub async fn measure(&self, bench: &mut Bench) -> Result<Vec<Row>, BenchError> {
        let before = Usage::now()?;
        let mut rows = (self.measure)(bench).await?;
        let foreign_percent = Usage::now()?.foreign_percent_since(&before);
        for row in &mut rows {
            row.foreign_percent = foreign_percent;
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_goal_is_measured_by_one_group_only() {
        let mut ids: Vec<&str> = GOALS.iter().flat_map(|goal| goal.ids).copied().collect();
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();

        assert_eq!(ids.len(), count);
    }
}
