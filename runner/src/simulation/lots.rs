//! What is drawn from a seed, what can go wrong, and how often it did.

use std::collections::BTreeMap;

/// Lots, drawn from a seed (splitmix64).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(super) fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).unwrap_or(0)
    }

    pub(super) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// What can go wrong in a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    Cut,
    Stall,
    OneWay,
    RunnerDies,
    RunnerDiesWriting,
    PowerCut,
    FailOver,
    StaleReplica,
    TimeJump,
    TimePasses,
    SandboxDies,
    SyncFails,
    SentAgain,
    SetBack,
    OlderPlacement,
}

/// In the order in which a seed draws them: those behind [`FIRST`] have their own lots, so that a world that once found a mistake
/// stays the same.
pub(super) const FAULTS: [Fault; 15] = [
    Fault::Cut,
    Fault::Stall,
    Fault::OneWay,
    Fault::RunnerDies,
    Fault::RunnerDiesWriting,
    Fault::PowerCut,
    Fault::FailOver,
    Fault::StaleReplica,
    Fault::TimeJump,
    Fault::TimePasses,
    Fault::SandboxDies,
    Fault::SyncFails,
    Fault::SentAgain,
    Fault::SetBack,
    Fault::OlderPlacement,
];

/// So many of them are in every form of the worlds.
pub(super) const FIRST: usize = 12;

/// What happened in one world or in many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) faults: BTreeMap<Fault, u64>,
    /// How calls ended.
    pub(super) ends: BTreeMap<&'static str, u64>,
    /// Links, lives of runners, steps.
    pub(super) counts: [u64; 3],
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        other.faults.iter().for_each(|(fault, count)| *self.faults.entry(*fault).or_default() += count);
        other.ends.iter().for_each(|(end, count)| *self.ends.entry(end).or_default() += count);
        self.counts.iter_mut().zip(other.counts).for_each(|(sum, count)| *sum += count);
    }

    /// Few worlds may miss a fault; many may not.
    pub(super) fn has_everything(&self) -> bool {
        self.counts[1] < 1000 || FAULTS.iter().all(|fault| self.faults.contains_key(fault))
    }
}
