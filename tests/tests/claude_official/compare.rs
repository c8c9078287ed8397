//! Each scenario with the official worker and with ours, side by side.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use sandbox_runner_tests::{host, needs_official_sdk, needs_root};

use crate::classes::{CLASSES, Class, MOST};
use crate::transcript::{Subject, Transcript, transcript};
use crate::world::{Served, Whose, World};
use crate::{gates, leases, serving, wire};

/// Scenarios at the same time, each with two workers.
const AT_ONCE: usize = 6;

/// A scenario, named as its function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Scenario {
    Interrupt,
    Verdicts,
    Thread,
    Beats,
    Operator,
    LostLease,
    LostBeat,
    TwoWorkers,
    RejectedToken,
    EveryTool,
    Secrets,
    NothingToDo,
    NextMessage,
    SkillsAndMemories,
    EndedWorker,
    LostAnswers,
    HoweverEventsCome,
    RestartOfTheServer,
}

/// The long ones first.
const SCENARIOS: [Scenario; 18] = [
    Scenario::LostLease,
    Scenario::TwoWorkers,
    Scenario::Operator,
    Scenario::LostAnswers,
    Scenario::RestartOfTheServer,
    Scenario::RejectedToken,
    Scenario::Beats,
    Scenario::LostBeat,
    Scenario::HoweverEventsCome,
    Scenario::Secrets,
    Scenario::NextMessage,
    Scenario::Interrupt,
    Scenario::Verdicts,
    Scenario::Thread,
    Scenario::EveryTool,
    Scenario::NothingToDo,
    Scenario::SkillsAndMemories,
    Scenario::EndedWorker,
];

impl Scenario {
    async fn run(self, world: &mut World<'_>) -> Served {
        match self {
            Self::Interrupt => gates::interrupt(world).await,
            Self::Verdicts => gates::verdicts(world).await,
            Self::Thread => gates::thread(world).await,
            Self::Beats => leases::beats(world).await,
            Self::Operator => leases::operator_and_interrupt(world).await,
            Self::LostLease => leases::lost_lease(world).await,
            Self::LostBeat => leases::lost_beat(world).await,
            Self::TwoWorkers => leases::two_workers(world).await,
            Self::RejectedToken => leases::rejected_token(world).await,
            Self::EveryTool => serving::every_tool(world).await,
            Self::Secrets => serving::secrets(world).await,
            Self::NothingToDo => serving::nothing_to_do(world).await,
            Self::NextMessage => serving::next_message(world).await,
            Self::SkillsAndMemories => {
                let home = tempfile::tempdir().unwrap();
                serving::skills_and_memories(world, home.path()).await.0
            }
            Self::EndedWorker => serving::ended_worker(world).await,
            Self::LostAnswers => wire::lost_answers(world).await,
            Self::HoweverEventsCome => wire::however_events_come(world).await,
            Self::RestartOfTheServer => wire::restart_of_the_server(world).await,
        }
    }
}

/// Where the workers differ.
#[derive(Debug)]
pub(crate) struct Difference {
    pub(crate) scenario: Scenario,
    pub(crate) subject: Subject,
    pub(crate) official: Vec<String>,
    pub(crate) ours: Vec<String>,
}

impl Difference {
    fn of(scenario: Scenario, mut official: Transcript, mut ours: Transcript) -> Vec<Self> {
        let subjects: BTreeSet<Subject> = official.keys().chain(ours.keys()).cloned().collect();
        let mut differences = Vec::new();
        for subject in subjects {
            let take = |from: &mut Transcript| from.remove(&subject).unwrap_or_default();
            let (official, ours) = (take(&mut official), take(&mut ours));
            // Which of two workers comes first is chance; the scenario looks at what comes of it.
            let by_chance = scenario == Scenario::TwoWorkers && matches!(subject, Subject::Item(_));
            if official != ours && !by_chance {
                differences.push(Self { scenario, subject, official, ours });
            }
        }
        differences
    }
}

async fn serve(scenario: Scenario, whose: Whose<'_>) -> Transcript {
    let mut world = World::new(whose).await;
    let served = scenario.run(&mut world).await;
    transcript(&world, &served).await
}

/// Runs a scenario with either worker; a runtime of its own, because what they wait for differs.
fn compared(scenario: Scenario, python: &Path) -> Vec<Difference> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (official, ours) = runtime
        .block_on(async { tokio::join!(serve(scenario, Whose::Official(python)), serve(scenario, Whose::Ours)) });
    assert!(!official.is_empty(), "{scenario:?} left nothing to compare");
    Difference::of(scenario, official, ours)
}

#[test]
#[ignore = "takes minutes"]
fn both_workers_change_the_same_but_for_what_is_meant() {
    let python = needs_official_sdk!();
    needs_root!();
    let _host = host::shared();
    let (next, differences, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(scenario) = SCENARIOS.get(next.fetch_add(1, Ordering::SeqCst)) {
                    match catch_unwind(|| compared(*scenario, &python)) {
                        Ok(found) => differences.lock().unwrap().extend(found),
                        Err(_) => failed.lock().unwrap().push(*scenario),
                    }
                }
            });
        }
    });
    let mut met: BTreeMap<&str, usize> = BTreeMap::new();
    let mut unknown = Vec::new();
    for difference in differences.into_inner().unwrap() {
        match CLASSES.iter().find(|class| (class.fits)(&difference)) {
            Some(class) => *met.entry(class.name).or_default() += 1,
            None => unknown.push(difference),
        }
    }
    for class in CLASSES {
        let Class { name, official, ours, why, .. } = class;
        println!("{} {name}: the official one {official}; ours {ours}: {why}", met.get(name).unwrap_or(&0));
    }
    let failed = failed.into_inner().unwrap();
    assert!(
        unknown.is_empty() && failed.is_empty(),
        "failed: {failed:?}; {} differences are in no class:\n{unknown:#?}",
        unknown.len()
    );
    let shown = CLASSES.iter().filter(|class| class.always).map(|class| class.name);
    let missed: Vec<&str> = shown.filter(|name| !met.contains_key(name)).collect();
    assert!(missed.is_empty(), "no scenario shows them, so they are no differences any more: {missed:?}");
    assert!(CLASSES.len() <= MOST, "{} classes", CLASSES.len());
}
