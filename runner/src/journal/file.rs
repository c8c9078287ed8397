//! The journal on disk: a bounded queue before one thread that owns the log.
//!
//! Group commit: the thread takes everything that is queued, writes it at once, syncs once, and then tells all who wait. The
//! queue keeps the order of the calls to `append`. What does not fit is refused; because every record vouches for those
//! before it, a refused one ends the journal, but for three kinds that nothing builds upon: a call that is not accepted
//! and a cancel that is not noted are refused to their callers, and an acknowledgement that is forgotten is asked for again. They
//! are refused first, so that the others find room.

use std::collections::BTreeMap;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::codec;
use super::disk::{Disk, HostDisk};
use super::live::Step;
use super::log::{Entry, Log, LogOpenError, SIZES, Sizes};
use super::record::{Record, Recovered};
use super::scan::ScanError;
use super::segment::{Identity, LogError};
use super::{Journal, JournalError};
use crate::telemetry::Counters;
use crate::work::BoxFuture;

/// Records that wait to be written.
const QUEUED_RECORDS: usize = 4096;
/// Bytes of the records that wait to be written.
const QUEUED_BYTES: usize = 8 << 20;

/// How often a full disk is tried again.
const SPACE_INTERVAL: Duration = Duration::from_secs(30);

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory could not be made or opened.
    #[error("cannot open journal directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else writes there.
    #[error("journal {} is in use by another runner", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// What is there cannot be used. Nothing was changed.
    #[error("the journal cannot be read")]
    Scan(#[from] ScanError),
    /// A new segment could not be begun. What is there is recovered again by the next attempt.
    #[error("no journal segment can be begun: {reason}")]
    Begin {
        /// What failed.
        reason: String,
    },
    /// The system gives no thread.
    #[error("cannot start the journal's thread")]
    Thread(#[source] io::Error),
}

/// How a journal is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Everything is written down.
    Good,
    /// The disk was full. Accepted calls go on and their results are written down, but no new call is taken.
    OutOfSpace,
    /// Nothing is written down any more, because of this.
    Broken(String),
}

/// A journal in a directory. Dropping it writes and syncs what is queued first.
pub struct FileJournal {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for FileJournal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileJournal").field("condition", &self.state()).finish_non_exhaustive()
    }
}

impl FileJournal {
    /// Opens the journal in `directory`, which is made when it is missing, and recovers what an earlier runner left there.
    ///
    /// Blocks. The directory is locked until the journal is dropped.
    ///
    /// # Errors
    /// `OpenError`; what is there stays as it is.
    pub fn open(directory: &Path, state_id: &str, boot_id: &str) -> Result<(Self, Recovered), OpenError> {
        let failed = |source| OpenError::Directory { path: directory.to_path_buf(), source };
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            Ok(()) => sync_parent(directory).map_err(failed)?,
            // Whoever was killed in between has left one whose name a power cut would take away, with everything in it. Where
            // the parent is not ours to open, it was not we who made it.
            Err(_) => match sync_parent(directory) {
                Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(failed(error)),
                _ => {}
            },
        }
        let disk = HostDisk::open_directory(directory).map_err(failed)?;
        if !disk.lock().map_err(failed)? {
            return Err(OpenError::InUse { path: directory.to_path_buf() });
        }
        let identity = Identity { state_id: state_id.to_owned(), boot_id: boot_id.to_owned() };
        Self::open_on(disk, identity, SIZES, SPACE_INTERVAL)
    }

    /// The same on any disk.
    pub(super) fn open_on<D: Disk + 'static>(
        disk: D,
        identity: Identity,
        sizes: Sizes,
        space_interval: Duration,
    ) -> Result<(Self, Recovered), OpenError>
    where
        D::File: 'static,
    {
        let (log, recovered) = Log::open(disk, identity, sizes).map_err(|error| match error {
            LogOpenError::Scan(error) => OpenError::Scan(error),
            LogOpenError::Log(error) => OpenError::Begin { reason: reason(&error) },
        })?;
        let queue = Queue { out_of_space: log.is_out_of_space(), ..Queue::default() };
        let longest = sizes.longest_payload();
        let shared =
            Arc::new(Shared { queue: Mutex::new(queue), wake: Condvar::new(), longest, counters: Counters::default() });
        let writer = Writer { shared: Arc::clone(&shared), log, space_interval, looked: Instant::now() };
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || writer.run());
        Ok((Self { shared, thread: Some(thread.map_err(OpenError::Thread)?) }, recovered))
    }

    /// How the journal is.
    #[must_use]
    pub fn state(&self) -> Condition {
        let queue = self.shared.lock();
        match &queue.broken {
            Some(reason) => Condition::Broken(reason.clone()),
            None if queue.out_of_space => Condition::OutOfSpace,
            None => Condition::Good,
        }
    }

    /// Whether nothing is written down any more.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        matches!(self.state(), Condition::Broken(_))
    }

    /// How long the disk has been busy with the present batch: a disk that hangs must cost the lease.
    #[must_use]
    pub fn busy_for(&self) -> Duration {
        self.shared.lock().busy_since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Journal for FileJournal {
    fn is_durable(&self) -> bool {
        true
    }

    fn append(&self, record: Record) -> BoxFuture<'static, Result<(), JournalError>> {
        let kind = record.kind();
        match self.shared.enqueue(&record) {
            Ok(done) => Box::pin(async move {
                let ended = || "the journal's thread has ended".to_owned();
                let result = done.await.unwrap_or_else(|_| Err(ended()));
                result.map_err(|reason| JournalError { record: kind, reason, is_final: true })
            }),
            Err(reason) => {
                let error = JournalError { record: kind, reason, is_final: self.is_broken() };
                Box::pin(std::future::ready(Err(error)))
            }
        }
    }

    fn condition(&self) -> (Condition, Duration) {
        (self.state(), self.busy_for())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.shared.counters.all()
    }
}

impl Drop for FileJournal {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // It has said what went wrong, if anything did.
            let _ = thread.join();
        }
    }
}

type Done = oneshot::Sender<Result<(), String>>;

#[derive(Default)]
struct Queue {
    entries: Vec<Entry>,
    done: Vec<Done>,
    bytes: usize,
    broken: Option<String>,
    out_of_space: bool,
    busy_since: Option<Instant>,
    closed: bool,
}

impl Queue {
    /// Why a record of this size and kind has no room. Half of the places, and all of the bytes, are the limit of what is
    /// optional; the rest are steps of calls that were taken, whose number is bounded and whose results are in memory anyway.
    fn overflow(&self, bytes: usize, is_optional: bool) -> Option<Refusal> {
        let most = if is_optional { QUEUED_RECORDS / 2 } else { QUEUED_RECORDS };
        let bound = match self.entries.len() >= most {
            true => "records",
            // A record larger than the queue goes alone.
            false if is_optional && self.bytes + bytes > QUEUED_BYTES && !self.entries.is_empty() => "bytes",
            false => return None,
        };
        Some((bound, format!("{} records of {} bytes wait to be written", self.entries.len(), self.bytes)))
    }
}

/// Which bound a record has met, for those who count, and in words.
type Refusal = (&'static str, String);

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
    longest: usize,
    counters: Counters,
}

impl Shared {
    /// Nothing is left half-done under this lock, so a panic of another holder changes nothing.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enqueue(&self, record: &Record) -> Result<oneshot::Receiver<Result<(), String>>, String> {
        let is_optional =
            matches!(record, Record::Accepted(_) | Record::Cancelled { .. } | Record::Acknowledged { .. });
        let encoded = codec::encode(record).and_then(|payload| match payload.len() {
            length if length > self.longest => {
                Err(format!("it has {length} bytes, a segment has room for {}", self.longest))
            }
            _ => Ok(payload),
        });
        let mut queue = self.lock();
        if let Some(reason) = &queue.broken {
            return Err(reason.clone());
        }
        if queue.out_of_space && matches!(record, Record::Accepted(_)) {
            self.refused("disk");
            return Err("the disk is full".to_owned());
        }
        let (bound, refused) = match encoded {
            Ok(payload) => match queue.overflow(payload.len(), is_optional) {
                None => {
                    let (done, result) = oneshot::channel();
                    queue.bytes += payload.len();
                    queue.entries.push(Entry { step: Step::of(record), payload });
                    queue.done.push(done);
                    drop(queue);
                    self.wake.notify_one();
                    return Ok(result);
                }
                Some(reason) => reason,
            },
            Err(reason) => ("segment", reason),
        };
        self.refused(bound);
        if !is_optional {
            queue.broken = Some(format!("an earlier record was refused ({}): {refused}", record.kind()));
        }
        Err(refused)
    }

    fn refused(&self, bound: &str) {
        self.counters.add("journal_refused_total", &[("bound", bound)]);
    }
}

/// The thread's side.
struct Writer<D: Disk> {
    shared: Arc<Shared>,
    log: Log<D>,
    space_interval: Duration,
    /// When the disk was last found full.
    looked: Instant,
}

impl<D: Disk> Writer<D> {
    fn run(mut self) {
        while let Some((entries, done)) = self.take() {
            if entries.is_empty() {
                self.look_for_room();
                continue;
            }
            let was_out_of_space = self.log.is_out_of_space();
            let mut done = done.into_iter();
            let result = self.log.append(&entries, |count| {
                for done in done.by_ref().take(count) {
                    // Nobody may be waiting for it.
                    let _ = done.send(Ok(()));
                }
            });
            let broken = result.err().map(|error| reason(&error));
            let mut queue = self.shared.lock();
            queue.busy_since = None;
            queue.out_of_space = self.log.is_out_of_space();
            let Some(broken) = broken else {
                drop(queue);
                if !was_out_of_space {
                    self.looked = Instant::now();
                }
                // Not only when nobody writes: what ends and is acknowledged meanwhile would keep the journal closed for ever.
                self.look_for_room();
                continue;
            };
            tracing::error!(reason = broken, "the journal is broken, nothing is written down any more");
            queue.broken = Some(broken.clone());
            let waiting = std::mem::take(&mut queue.done);
            queue.entries.clear();
            drop(queue);
            for done in done.chain(waiting) {
                let _ = done.send(Err(broken.clone()));
            }
            return;
        }
    }

    /// Sets the ballast aside again when the disk has room, from time to time.
    fn look_for_room(&mut self) {
        if self.log.is_out_of_space() && self.looked.elapsed() >= self.space_interval {
            // A disk may hang here as well, with records waiting.
            self.shared.lock().busy_since = Some(Instant::now());
            self.log.make_ballast();
            self.looked = Instant::now();
            let mut queue = self.shared.lock();
            (queue.busy_since, queue.out_of_space) = (None, self.log.is_out_of_space());
        }
    }

    /// Everything that is queued; `None` when the journal is closed and all is written. Nothing, from time to time, while
    /// the disk is full.
    fn take(&self) -> Option<(Vec<Entry>, Vec<Done>)> {
        let queue = self.shared.lock();
        let waits = |queue: &mut Queue| queue.entries.is_empty() && !queue.closed;
        let mut queue = if queue.out_of_space {
            let rest = self.space_interval.saturating_sub(self.looked.elapsed());
            let waited = self.shared.wake.wait_timeout_while(queue, rest, waits);
            waited.unwrap_or_else(PoisonError::into_inner).0
        } else {
            self.shared.wake.wait_while(queue, waits).unwrap_or_else(PoisonError::into_inner)
        };
        if queue.entries.is_empty() {
            return (!queue.closed).then(Default::default);
        }
        queue.bytes = 0;
        queue.busy_since = Some(Instant::now());
        Some((std::mem::take(&mut queue.entries), std::mem::take(&mut queue.done)))
    }
}

/// Makes the name of `directory` as durable as what will be in it.
fn sync_parent(directory: &Path) -> io::Result<()> {
    let parent = directory.parent().filter(|parent| !parent.as_os_str().is_empty());
    std::fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// However the thread ends, nobody waits for it in vain.
impl<D: Disk> Drop for Writer<D> {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.broken.get_or_insert_with(|| "the journal's thread has ended".to_owned());
        queue.entries.clear();
        queue.done.clear();
    }
}

/// The error with its cause.
fn reason(error: &LogError) -> String {
    format!("{error}: {}", error.source)
}
