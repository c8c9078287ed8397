//! The wire is cut again and again: every call runs once, has one outcome, and every byte of it arrives.
//!
//! `LINK_CALLS`, `LINK_SESSIONS` and `LINK_CUTS` make it larger.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use proto::runner::v1 as pb;
use runner::dev::LinkSettings;
use runner::session::core::CallStage;
use tokio::sync::watch;

use crate::fake::bytes_of;
use crate::world::{Options, World, patience, within};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A small generator, so that a failing run can be repeated from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cut_of_the_wire_repeats_a_call_or_loses_a_byte() {
    let (calls, sessions, cuts) = (number("LINK_CALLS", 200), number("LINK_SESSIONS", 10), number("LINK_CUTS", 100));
    let seed = number("LINK_SEED", u64::from(std::process::id()) | 1);
    println!("seed {seed}: {calls} calls in {sessions} sessions, at least {cuts} cuts");
    // A small window keeps output under way for longer, so that more cuts hit it.
    let link =
        LinkSettings { window: 64 * 1024, heartbeat_every: Duration::from_millis(100), ..LinkSettings::default() };
    let world = Arc::new(World::new(Options { link, ..Default::default() }).await);

    let (made, seen) = watch::channel(0);
    let cutter = tokio::spawn(cut_for_ever(Arc::clone(&world), made, seed));
    let mut running = Vec::new();
    for session in 0..sessions {
        let own = (0..calls).filter(|call| call % sessions == session).collect();
        running.push(tokio::spawn(load(Arc::clone(&world), format!("s{session}"), own, seen.clone(), cuts, seed)));
    }
    for task in running {
        tokio::time::timeout(Duration::from_secs(1200), task).await.unwrap().unwrap();
    }
    let made = *seen.borrow();
    cutter.abort();
    println!("{made} cuts, {} links", world.orchestrator.links());
    assert!(made >= cuts, "only {made} cuts were made");
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// Sends calls spread evenly over all cuts, at most sixteen at a time, and checks each of them.
async fn load(
    world: Arc<World>,
    name: String,
    own: Vec<u64>,
    mut cuts_made: watch::Receiver<u64>,
    cuts: u64,
    seed: u64,
) {
    let session = world.session(&name).await;
    let mut random = Random(seed.wrapping_mul(own[0] + 1) | 1);
    let mut open = VecDeque::new();
    for (position, call) in own.iter().enumerate() {
        let due = cuts * (position as u64 + 1) / own.len() as u64;
        let id = format!("call-{call}");
        let size = [0, 10, 70_000, 400_000][random.below(4) as usize] + random.below(5000);
        let script = format!("print {}; pause {}; print {}", size / 2, random.below(100), size - size / 2);
        let input = pb::BashInput { command: Some(script), ..Default::default() };
        session.send(&id, pb::call::Input::Bash(input));
        open.push_back((id, size));
        // Sessions send in bursts, so that some calls wait.
        if open.len() >= 8 {
            while let Some((id, size)) = open.pop_front() {
                check(&world, &session, &id, size).await;
            }
            cuts_made.wait_for(|made| *made >= due).await.unwrap();
        }
    }
    for (id, size) in open {
        check(&world, &session, &id, size).await;
    }
    cuts_made.wait_for(|made| *made >= cuts).await.unwrap();
}

async fn check(world: &World, session: &runner::dev::Session, id: &str, size: u64) {
    let finished = session.outcome(id).await.unwrap();
    let exited = Some(pb::outcome::Kind::Exited(pb::Exited { code: 0 }));
    assert_eq!(finished.message.outcome.unwrap().kind, exited);
    let complete = finished.streams.get(&1).map_or(size == 0, |stream| stream.bytes == bytes_of(id, size));
    assert!(complete, "output of {id} differs");
    assert_eq!(world.fakes.executions_of(id), 1, "{id}");
}

/// Cuts at random moments, and prints what each cut has hit.
async fn cut_for_ever(world: Arc<World>, made: watch::Sender<u64>, seed: u64) {
    let mut random = Random(seed ^ 0x9e37_79b9);
    let mut hit = [0_u64; 3];
    loop {
        within("runner", world.orchestrator.runner()).await.unwrap();
        // On a slow machine longer, so that as much gets through between two cuts.
        tokio::time::sleep(Duration::from_millis(random.below(30)) * patience()).await;
        let view = world.sessions.view().await.unwrap();
        world.wire.cut();
        let calls = view.sessions.iter().flat_map(|session| &session.calls);
        let mut phases = [false; 3];
        for call in calls {
            match call.stage {
                CallStage::Queued => phases[0] = true,
                CallStage::Starting | CallStage::Running => phases[1] = true,
                CallStage::Finished(_) => phases[2] = true,
            }
        }
        for (count, phase) in hit.iter_mut().zip(phases) {
            *count += u64::from(phase);
        }
        made.send_modify(|made| *made += 1);
        if made.borrow().is_multiple_of(50_u64) {
            let [queued, running, finished] = hit;
            println!(
                "{} cuts: with a call queued {queued}, running {running}, finished and unacknowledged {finished}",
                *made.borrow()
            );
        }
        // The next cut must hit a new link.
        let links = world.orchestrator.links();
        within("link", async {
            while world.orchestrator.links() == links {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
    }
}
