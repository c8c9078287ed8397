//! The same load on our daemon and on the worker of the official SDK, in one run: what each session costs in memory, and how
//! long a tool use waits for its result.
//!
//! The control plane of the tests takes the time, from the moment at which a tool use is in the log of its session to the one at
//! which its result is. Each tool use is made as soon as the one before has its result, so a session has always one that
//! waits. The official worker serves one session at a time: sessions at once are as many processes.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

mod figures;
mod memory;
mod scenario;
mod workers;

use std::path::PathBuf;

use sandbox_runner_tests::runner::profile_directory;
use sandbox_runner_tests::{host, needs_official_sdk, needs_root};

use figures::Row;
use scenario::Load;

/// How often each load is put on each worker, in turns.
const TURNS: usize = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "starts five of the official worker, whose libraries take long"]
async fn three_sessions_at_once_and_two_in_turn_are_answered_right_by_both() {
    needs_root!();
    let python = needs_official_sdk!();
    let _host = host::shared();
    for load in [Load { sessions: 3, rounds: 1, at_once: true }, Load { sessions: 2, rounds: 1, at_once: false }] {
        let (ours, official) = tokio::join!(workers::ours(load, None), workers::official(load, &python));
        for measured in [ours, official] {
            assert_eq!(measured.latencies.len(), load.calls());
            assert_eq!(measured.memory.is_some(), load.at_once);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes, and its figures mean nothing on a busy machine"]
async fn fifty_sessions_at_once_and_few_are_answered_right_by_both_and_measured() {
    needs_root!();
    let python = needs_official_sdk!();
    let _host = host::exclusive();
    let program = release();
    println!("figures: {}", figures::conditions(program.is_some(), TURNS));
    let loads = [
        Load { sessions: 50, rounds: 3, at_once: true },
        Load { sessions: 4, rounds: 6, at_once: true },
        Load { sessions: 5, rounds: 6, at_once: false },
    ];
    let mut rows = loads.map(Row::new);
    for _ in 0..TURNS {
        for row in &mut rows {
            row.ours.push(workers::ours(row.load, program.clone()).await);
            row.official.push(workers::official(row.load, &python).await);
            println!("so far: {}", row.lines().join("; "));
        }
    }
    for row in &rows {
        for line in row.lines() {
            println!("figures: {line}");
        }
    }
}

/// The program as it is shipped, where it has been built.
fn release() -> Option<PathBuf> {
    let program = profile_directory().unwrap().with_file_name("release").join("sandbox-runner");
    program.exists().then_some(program)
}
