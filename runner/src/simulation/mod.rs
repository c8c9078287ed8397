//! Runner and orchestrator over a network that loses links, a disk that loses what was not synced, and processes that die at
//! any step: the same promises must hold in every world that a seed describes.
//!
//! Real are the session core, the connector with its book, outbox, lease and frames as bytes, the journal with its segments,
//! and the reference orchestrator. Simulated are what they stand on: the wire, the disk, the clock, the sandboxes, and the
//! order in which things happen, which is drawn from the seed and from nothing else. `select!`, tonic and TLS are left out:
//! tokio and rustls draw lots of their own, and a seed would not describe a world any more.
//!
//! `SEEDS=5000` runs as many, from `FIRST_SEED` on; a failing one is printed with what it had done.

mod host;
mod life;
mod lots;
mod mistakes;
mod wire;
mod world;

use std::sync::OnceLock;
use std::time::{Instant, SystemTime};

use self::lots::{Fault, Tally};
use self::mistakes::Mistake;
use self::world::World;
use crate::connector::tls::{Credentials, TlsSource};
use crate::dev::pki::{Authority, Validity};

/// Worlds of an ordinary test.
const SEEDS: u64 = 50;
/// Worlds that once found a mistake, whether they are of the first form, and what it was.
const FIXTURES: &[(u64, bool, &str)] = &[
    (728, true, "the greeting of a process that has died arrives after that of the next one"),
    (7489, true, "a greeting that its process has given up arrives after the next one of the same process"),
    (1042, false, "a copy is served that does not know a call of which some output has not come"),
];

/// Certificates that nobody looks at.
fn credentials() -> Credentials {
    static CREDENTIALS: OnceLock<Credentials> = OnceLock::new();
    let make = || {
        let directory = tempfile::tempdir().expect("a directory");
        let authority = Authority::new("simulated").expect("an authority");
        let client = authority.client("simulated", Validity::Now).expect("a certificate");
        let files = authority.write_client_files(directory.path(), &client).expect("files");
        TlsSource::load(files, SystemTime::now()).expect("certificates").current().clone()
    };
    CREDENTIALS.get_or_init(make).clone()
}

fn run(seed: u64) -> Result<Tally, String> {
    in_simulated_time(World::new(seed).run())
}

fn run_making(seed: u64, mistake: Mistake) -> Result<Tally, String> {
    in_simulated_time(World::new(seed).with(mistake.needs()).making(mistake).run())
}

fn run_with(seed: u64, faults: &[Fault]) -> Result<Tally, String> {
    in_simulated_time(World::new(seed).with(faults).run())
}

fn in_simulated_time<T>(world: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    // Every poll here is one of ours; a budget of the runtime would make some of them fail.
    runtime.expect("a runtime").block_on(tokio::task::unconstrained(world))
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// F-03 to F-10, F-12, F-19, F-20, F-24, F-27, F-28, F-33, F-47: invariants I1 to I8 in worlds drawn from seeds.
#[test]
#[allow(clippy::print_stdout, reason = "a failing seed has to be known")]
fn every_world_keeps_the_promises() {
    let (first, count) = (number("FIRST_SEED", 1), number("SEEDS", SEEDS));
    let begin = Instant::now();
    let mut total = Tally::default();
    let mut failures = Vec::new();
    let fixtures = FIXTURES.iter().map(|(seed, is_of_first_form, _)| (*seed, *is_of_first_form));
    for (seed, is_of_first_form) in fixtures.chain((first..first + count).map(|seed| (seed, false))) {
        let world = if is_of_first_form { World::of_first_form(seed) } else { World::new(seed) };
        match in_simulated_time(world.run()) {
            Ok(tally) => total.add(&tally),
            Err(problem) => {
                println!("seed {seed}: {problem}");
                failures.push(seed);
                if failures.len() >= 10 {
                    break;
                }
            }
        }
    }
    println!("{count} worlds from seed {first} in {} s: {total:?}", begin.elapsed().as_secs());
    assert!(failures.is_empty(), "promises were broken in the worlds of seeds {failures:?}");
    assert!(total.has_everything(), "some kind of fault never happened: {total:?}");
}

#[test]
fn a_seed_always_describes_the_same_world() {
    for seed in [7, 8] {
        assert_eq!(run(seed), run(seed));
    }
}

/// F-20: given up with its link, or left by a process that has died, and then slower than the next one.
#[test]
fn greeting_that_a_later_one_has_overtaken_is_not_answered_and_costs_neither_link_nor_call() {
    for seed in 1..=10 {
        for dies in [false, true] {
            in_simulated_time(World::new(seed).late_greeting(dies)).unwrap();
        }
    }
}

/// F-22: what runs ends meanwhile, what waits does not begin, and everything is told once when the link is back.
#[test]
fn ninety_minutes_in_which_nothing_passes_suspend_what_waits_and_lose_nothing() {
    let length = std::time::Duration::from_secs(90 * 60);
    for seed in 1..=5 {
        in_simulated_time(World::new(seed).nothing_passes_for(length)).unwrap();
    }
}

/// F-23: the sandbox ends when lease and orphan time are over, and its calls are answered honestly.
#[test]
fn three_hours_in_which_nothing_passes_end_the_sandbox_when_its_orphan_time_is_over() {
    for seed in 1..=5 {
        in_simulated_time(World::new(seed).nothing_passes_for_too_long()).unwrap();
    }
}
