//! Our daemon and the official worker below a load.

use std::path::{Path, PathBuf};

use sandbox_runner_tests::claude::official::Worker;
use sandbox_runner_tests::claude::ours;
use sandbox_runner_tests::daemon::Options;
use sandbox_runner_tests::host;

use crate::memory::{self, Memory};
use crate::scenario::{Load, Measured, Site};

/// No session is left for being idle before its memory is measured, in seconds.
const IDLE: u32 = 600;
/// Official workers that start at the same time; importing the SDK takes a processor a while.
const STARTING: usize = 4;

/// One daemon serves all sessions. `program` is what is installed in place of the built one.
pub(crate) async fn ours(load: Load, program: Option<PathBuf>) -> Measured {
    let site = Site::new().await;
    let available = memory::available();
    // Beyond those in use there are some that are prepared ahead, and the one that is measured at the start.
    let slots = u32::try_from(load.sessions).unwrap() + 3;
    let options = Options { slots, program, ..Options::default() };
    let most = if load.at_once { load.sessions } else { 1 };
    let lines = format!("max_idle_seconds = {IDLE}\nmax_sessions = {most}\n");
    let mut daemon = ours::install_with(&[(&site.mock, &site.environment)], false, options, &lines).await;
    daemon.start_launcher().await;
    daemon.tend_runner();

    let sessions = site.serve(load).await;

    let mut measured = site.measured(&sessions, load);
    if load.at_once {
        assert!(daemon.sandboxes().len() >= load.sessions, "a sandbox has gone before its session");
        let roots = [daemon.runner_pid().unwrap(), daemon.launcher_pid().unwrap()];
        let memory = Memory::of(&roots, available);
        let inner = memory.processes.iter().filter(|pid| host::inner_pid(**pid) == Some(1));
        assert!(inner.count() >= load.sessions, "not every sandbox was measured");
        measured.memory = Some(memory);
        site.end(&sessions).await;
    }
    daemon.end_with_nothing_left();
    measured
}

/// One process serves one session after the other, or as many processes one each.
pub(crate) async fn official(load: Load, python: &Path) -> Measured {
    let site = Site::new().await;
    let available = memory::available();
    let mut workers = Vec::new();
    let most = if load.at_once { load.sessions } else { 1 };
    while workers.len() < most {
        for _ in workers.len()..most.min(workers.len() + STARTING) {
            workers.push(Worker::start(python, &site.mock, &site.environment, f64::from(IDLE)));
        }
        let poll = |plane: &sandbox_runner_tests::claude::ControlPlane| {
            (plane.environments[0].workers.len() == workers.len()).then_some(())
        };
        site.mock.until("the first poll of the official workers", poll).await;
    }

    let sessions = site.serve(load).await;

    let mut measured = site.measured(&sessions, load);
    if load.at_once {
        let roots: Vec<u32> = workers.iter().map(Worker::pid).collect();
        let memory = Memory::of(&roots, available);
        assert!(memory.processes.len() >= 2 * load.sessions, "not every worker was measured with its shell");
        measured.memory = Some(memory);
        site.end(&sessions).await;
    }
    measured
}
