//! Measures this runner against other runtimes and against the floor of the machine, in the same seconds.
//!
//! Every figure is a ratio between medians of interleaved rounds: absolute times say little about another machine. The
//! measured path is the daemon's own (launcher, process 1, their clients), with one launcher for the whole run. Nothing is
//! asserted, nothing is left out: a missed goal is printed as missed, and a run disturbed by others prints no ratios.
//!
//! Root is given up before anything is measured, as in the daemon; peers that need it are run by a helper process that was
//! started before (`peer_server`) and knows a fixed list of commands.

pub mod delay;
pub mod echo;
pub mod goal;
pub mod machine;
pub mod network;
pub mod peer;
pub mod peer_server;
pub mod row;
pub mod sample;
pub mod subject;
pub mod whole;

use std::io;

use self::peer::PeerError;
use crate::dev::DevError;
use crate::sandbox::CreateError;
use crate::sandbox::launch::LaunchError;
use crate::work::{Outcome, ToolFailure};

/// Why a goal could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A peer or the floor failed.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// No sandbox.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The launcher refused.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A call was refused.
    #[error("the call {call:?} was refused: {}; {}", failure.message, failure.remediation)]
    Refused {
        /// Which.
        call: String,
        /// Why.
        failure: Box<ToolFailure>,
    },
    /// A call ended otherwise than expected, so its time means nothing.
    #[error("the call {call:?} ended with {outcome:?}: {said}")]
    Ended {
        /// Which.
        call: String,
        /// How.
        outcome: Box<Outcome>,
        /// The beginning of its output.
        said: String,
    },
    /// The sandbox ended during a call.
    #[error("the sandbox was lost: {0}")]
    Lost(String),
    /// The state of the machine cannot be read.
    #[error("cannot read {path}")]
    Machine {
        /// Which file.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The orchestrator or the link to it.
    #[error(transparent)]
    Dev(#[from] DevError),
    /// The same, found by the benchmark.
    #[error("the link: {0}")]
    Link(String),
    /// A setting is needed that was not given.
    #[error("{0}")]
    Missing(&'static str),
}
