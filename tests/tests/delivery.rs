//! Every call is answered once and every byte of it arrives, whatever happens to the wire: the built daemon, real
//! sandboxes, and an orchestrator behind a wire that is cut again and again.
//!
//! That a call ran once is seen in the sandbox: each command adds a line to a file of its own. `SEED`, `DELIVERY_CALLS`
//! and `DELIVERY_CUTS` repeat a run or make it larger.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::runner::v1 as pb;
use runner::dev::{Link, LinkSettings, Session};
use sandbox_runner_tests::daemon::{
    Daemon, MARKER, Options, Random, bash, exec, number, seed, small_sandboxes, text_of, within,
};
use sandbox_runner_tests::faultproxy::Cut;
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::{is_slow, scaled};
use sha2::{Digest, Sha256};
use tokio::sync::{broadcast, watch};

/// How much of everything.
#[derive(Debug, Clone, Copy)]
struct Plan {
    calls: u64,
    sessions: u64,
    cuts: u64,
    /// Cuts for each of the three moments, at least.
    each: u64,
}

/// Calls that a session sends before it looks at the first of them: most of them wait.
const BURST: usize = 8;
/// How long the cutter waits for the moment it wants before it tries another.
const MOMENT: Duration = Duration::from_millis(500);

/// F-20: the link is closed, reset, cut within a frame or frozen, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cut_of_the_wire_repeats_a_call_or_loses_a_byte() {
    needs_root!();
    let _host = host::shared();
    storm(everyday()).await;
}

/// What passes in seconds where handshakes take milliseconds; where the processor is emulated they take seconds.
fn everyday() -> Plan {
    if is_slow() {
        return Plan { calls: 24, sessions: 2, cuts: 6, each: 1 };
    }
    Plan { calls: 120, sessions: 6, cuts: 30, each: 5 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn a_thousand_calls_and_three_hundred_cuts_repeat_no_call_and_lose_no_byte() {
    needs_root!();
    let _host = host::shared();
    let (calls, cuts) = (number("DELIVERY_CALLS", 1000), number("DELIVERY_CUTS", 300));
    storm(Plan { calls, sessions: 20, cuts, each: cuts / 6 }).await;
}

/// A moment in the life of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// It is accepted and waits behind others of its session.
    Queued,
    /// It runs, and some of its output has come.
    InFlight,
    /// Its end has come, and the runner has not heard that.
    Unacknowledged,
    /// None of them.
    Other,
}

type Hits = BTreeMap<Moment, u64>;

impl Plan {
    fn is_satisfied_by(self, hits: &Hits) -> bool {
        let of = |moment| hits.get(&moment).copied().unwrap_or(0);
        let moments = [Moment::Queued, Moment::InFlight, Moment::Unacknowledged];
        hits.values().sum::<u64>() >= self.cuts && moments.into_iter().all(|moment| of(moment) >= self.each)
    }
}

/// What everybody in a run shares.
struct World {
    daemon: Daemon,
    plan: Plan,
    hits: watch::Sender<Hits>,
    /// First half of the output of calls that are under way: until it has come the command runs.
    halves: Mutex<HashMap<String, u64>>,
}

async fn storm(plan: Plan) {
    let seed = seed();
    println!("seed {seed}: at least {} calls in {} sessions and {} cuts", plan.calls, plan.sessions, plan.cuts);
    // A small window keeps output under way for longer, so that more cuts hit it.
    let link =
        LinkSettings { window: 64 * 1024, heartbeat_every: Duration::from_millis(500), ..LinkSettings::default() };
    let slots = u32::try_from(plan.sessions + 2).expect("few sessions");
    let daemon = Daemon::start(Options { slots, link, limits: small_sandboxes(), ..Options::default() }).await;
    let world = Arc::new(World { daemon, plan, hits: watch::channel(Hits::new()).0, halves: Mutex::default() });

    let cutter = tokio::spawn(cut_for_ever(Arc::clone(&world), seed));
    let mut running = Vec::new();
    for session in 0..plan.sessions {
        running.push(tokio::spawn(load(Arc::clone(&world), session, seed)));
    }
    let mut sent = 0;
    for task in running {
        sent += tokio::time::timeout(Duration::from_secs(1800), task).await.expect("an end").expect("no panic");
    }
    cutter.abort();
    assert!(cutter.await.is_err_and(|error| error.is_cancelled()), "the cutter ended by itself");
    let hits = world.hits.borrow().clone();
    println!("figures: {sent} calls, {} links, cuts by what they hit: {hits:?}", world.daemon.orchestrator.links());
    assert!(sent >= plan.calls);
    assert!(plan.is_satisfied_by(&hits), "too few cuts: {hits:?}");
    assert_eq!(world.daemon.orchestrator.complaints(), Vec::<String>::new());
    end(world).await;
}

/// In order, and nothing stays: no sandbox, no file of one.
async fn end(world: Arc<World>) {
    let Ok(World { mut daemon, .. }) = Arc::try_unwrap(world).map_err(drop) else { panic!("somebody still runs") };
    assert_eq!(daemon.sandboxes(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

/// What a call does, and so what must come of it.
#[derive(Debug, Clone)]
enum Kind {
    /// Adds a line to its file and prints so many bytes, in the shell of the session or beside it.
    Command {
        size: u64,
        in_shell: bool,
    },
    Write,
    Edit,
    Read,
    Glob,
    Grep,
}

impl Kind {
    fn choose(random: &mut Random) -> Self {
        match random.below(10) {
            0 => Self::Write,
            1 => Self::Edit,
            2 => Self::Read,
            3 => Self::Glob,
            4 => Self::Grep,
            choice => {
                let sizes = [0, 10, 60_000, 150_000, 400_000, 1_000_000];
                let size = sizes[usize::try_from(random.below(6)).expect("small")];
                let more = if size == 0 { 0 } else { random.below(5000) };
                Self::Command { size: size + more, in_shell: choice % 2 == 0 }
            }
        }
    }

    fn input(&self, id: &str, pause_ms: u64) -> pb::call::Input {
        use pb::call::Input;
        match self {
            Self::Command { size, in_shell } => {
                let half = size / 2;
                let lines = size / line_of(id, 1).len() as u64 + 1;
                let print = format!("seq -f '{id}-%010.0f' 1 {lines} | head -c {size}");
                let script = format!(
                    "echo x >> n/{id}; {print} | head -c {half}; sleep 0.{pause_ms:03}; {print} | tail -c +{}",
                    half + 1
                );
                if *in_shell { bash(script) } else { exec(script) }
            }
            Self::Write => Input::Write(pb::WriteInput { file_path: format!("w/{id}"), content: content_of(id) }),
            Self::Edit => Input::Edit(pb::EditInput {
                file_path: "edited".into(),
                // Each edit appends, so a second one would be seen.
                old_string: "end".into(),
                new_string: format!("{id}\nend"),
                replace_all: false,
            }),
            Self::Read => Input::Read(pb::ReadInput { file_path: "fixed.txt".into(), view_range: Vec::new() }),
            Self::Glob => Input::Glob(pb::GlobInput { pattern: "fixed*".into(), path: None }),
            Self::Grep => Input::Grep(pb::GrepInput { pattern: "ne+dle".into(), path: None }),
        }
    }

    fn check(&self, id: &str, finished: &runner::dev::CallOutcome) {
        let message = &finished.message;
        let text = text_of(message);
        if let Self::Command { size, .. } = self {
            let exited = Some(pb::outcome::Kind::Exited(pb::Exited { code: 0 }));
            assert_eq!(message.outcome.clone().and_then(|outcome| outcome.kind), exited, "{id}: {text}");
            let expected = output_of(id, *size);
            let stream = finished.streams.get(&1);
            let (bytes, holes) = stream.map_or((&[][..], 0), |stream| (&stream.bytes[..], stream.holes.len()));
            assert_eq!((bytes.len(), holes), (expected.len(), 0), "output of {id}");
            assert_eq!(Sha256::digest(bytes), Sha256::digest(&expected), "output of {id}");
            return;
        }
        assert!(message.result.as_ref().is_some_and(|result| !result.is_error), "{id} {self:?}: {text}");
        let expected = match self {
            Self::Read | Self::Grep => "needle",
            Self::Glob => "fixed.txt",
            _ => "",
        };
        assert!(text.contains(expected), "{id} {self:?}: {text}");
    }
}

fn line_of(id: &str, number: u64) -> String {
    format!("{id}-{number:010}\n")
}

fn output_of(id: &str, size: u64) -> Vec<u8> {
    let size = usize::try_from(size).expect("small");
    let mut bytes: Vec<u8> = Vec::with_capacity(size + 64);
    let mut number = 1;
    while bytes.len() < size {
        bytes.extend(line_of(id, number).as_bytes());
        number += 1;
    }
    bytes.truncate(size);
    bytes
}

fn content_of(id: &str) -> String {
    format!("content of {id}\n").repeat(50)
}

/// Sends bursts of calls until there were enough calls and enough cuts, checks each of them, and at the end what they did.
async fn load(world: Arc<World>, session: u64, seed: u64) -> u64 {
    let name = format!("s{session}");
    let mut random = Random::new(seed.wrapping_mul(session + 1));
    let quota = world.plan.calls.div_ceil(world.plan.sessions);
    let opened = world.daemon.session(&name).await;
    let first = format!("mkdir n w; echo end > edited; echo needle > fixed.txt; echo {name} > {MARKER}");
    within("first call", opened.bash(&format!("{name}-first"), &first)).await.expect("the first call");
    let mut done = Vec::new();
    let enough = |sent: u64| sent >= quota && world.plan.is_satisfied_by(&world.hits.borrow());
    // Far more than is needed; then the counts say what was missing.
    while !enough(done.len() as u64) && (done.len() as u64) < quota * 8 {
        let mut open = VecDeque::new();
        for _ in 0..BURST {
            let id = format!("{name}-{}", done.len() + open.len());
            let kind = Kind::choose(&mut random);
            if let Kind::Command { size, .. } = &kind {
                world.halves.lock().expect("no panic holds it").insert(id.clone(), size / 2);
            }
            opened.send(&id, kind.input(&id, 50 + random.below(300)));
            open.push_back((id, kind));
        }
        for (id, kind) in open {
            let finished = within(&id, opened.outcome(&id)).await.unwrap_or_else(|error| panic!("{id}: {error}"));
            kind.check(&id, &finished);
            done.push((id, kind));
        }
    }
    check_effects(&opened, &name, &done).await;
    within("close", opened.close(Duration::ZERO)).await.expect("the session ends");
    done.len() as u64
}

/// Looks into the sandbox: every command has left one line, every file is what was written, every edit is there once.
async fn check_effects(session: &Session, name: &str, done: &[(String, Kind)]) {
    let script = "exec 2>/dev/null; cd n; for f in *; do echo \"$f $(wc -l < \"$f\")\"; done; cd ../w; sha256sum * | sed 's/ \\+/ /'; \
                  cd ..; sed 's/$/ edited/' edited";
    let finished = within("effects", session.run(&format!("{name}-last"), exec(script))).await.expect("the last call");
    let text = String::from_utf8_lossy(&finished.streams[&1].bytes).into_owned();
    let mut found: Vec<&str> = text.lines().filter(|line| !line.starts_with("* ") && *line != "end edited").collect();
    let mut expected: Vec<String> = done
        .iter()
        .filter_map(|(id, kind)| match kind {
            Kind::Command { .. } => Some(format!("{id} 1")),
            Kind::Write => {
                let sum: String = Sha256::digest(content_of(id)).iter().map(|byte| format!("{byte:02x}")).collect();
                Some(format!("{sum} {id}"))
            }
            Kind::Edit => Some(format!("{id} edited")),
            _ => None,
        })
        .collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected, "what the calls of {name} have left");
}

/// Cuts at chosen moments, in turn, and counts what each cut has hit.
async fn cut_for_ever(world: Arc<World>, seed: u64) {
    let mut random = Random::new(seed ^ 0x9e37_79b9);
    for turn in 0_u64.. {
        within("link", world.daemon.orchestrator.runner()).await.expect("an orchestrator");
        let wanted = [Moment::Queued, Moment::InFlight, Moment::Unacknowledged][usize::try_from(turn % 3).unwrap_or(0)];
        let links = world.daemon.orchestrator.links();
        let how = match random.below(4) {
            0 => Cut::Close,
            1 => Cut::Reset,
            2 => Cut::After(random.below(100_000)),
            _ => Cut::Freeze(Duration::from_millis(random.below(60))),
        };
        let reached = tokio::time::timeout(scaled(MOMENT), moment(&world, wanted)).await.is_ok();
        world.daemon.wire.cut(how).await;
        world.daemon.wire.release();
        let hit = if reached { wanted } else { Moment::Other };
        world.hits.send_modify(|hits| *hits.entry(hit).or_default() += 1);
        // The next cut must hit a new link.
        within("new link", async {
            while world.daemon.orchestrator.links() == links {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        if world.plan.is_satisfied_by(&world.hits.borrow()) {
            // Enough of it: what is left of the load may pass. Where a handshake takes seconds, a link must last longer.
            tokio::time::sleep(scaled(Duration::from_millis(500))).await;
        }
    }
}

/// Waits until a call is where it is wanted.
async fn moment(world: &World, wanted: Moment) {
    let mut seen = world.daemon.orchestrator.watch();
    match wanted {
        // The orchestrator hears a little later; of several that wait, the last one still does.
        Moment::Queued => {
            while !world.daemon.orchestrator.waiting().values().any(|count| *count >= 3) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        Moment::InFlight => loop {
            let Some(Link::Output(chunk)) = next(&mut seen).await else { continue };
            let halves = world.halves.lock().expect("no panic holds it");
            // Up to its half the output is printed before the command sleeps.
            let half = halves.get(&chunk.call_id).copied().unwrap_or(0);
            if chunk.offset + (chunk.data.len() as u64) <= half {
                return;
            }
        },
        // The acknowledgement of whatever ends now stays on the wire.
        Moment::Unacknowledged => {
            world.daemon.wire.hold_what_goes_to_the_runner();
            while !matches!(next(&mut seen).await, Some(Link::Finished(_))) {}
        }
        Moment::Other => {}
    }
}

/// The next event; `None` when some were missed.
async fn next(seen: &mut broadcast::Receiver<Link>) -> Option<Link> {
    match seen.recv().await {
        Ok(event) => Some(event),
        Err(broadcast::error::RecvError::Lagged(_)) => None,
        Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
    }
}
