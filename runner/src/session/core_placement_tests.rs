//! Placements of a session: newer ones take it over, and what is told of them, or of its end, is on disk before.

use std::collections::BTreeMap;

use super::core::{Action, Config, Input};
use super::core_restore_tests::{attached, left};
use super::core_tests::{core, open, refusal, sandbox_id, sid};
use crate::journal::Record;
use crate::work::*;

#[test]
fn end_of_a_session_that_could_not_be_opened_is_on_disk_before_it_is_told() {
    let mut core = core(Config::default());
    core.handle(open("s", 1));
    let failure = ToolFailure::new(Code::SandboxCreateFailed, "no", "none");

    let failed = core.handle(Input::SandboxFailed { session_id: sid("s"), failure });
    let late = core.handle(open("s", 2));
    let written = core.handle(Input::EndedWritten { session_id: sid("s"), durable: true });

    assert_eq!(failed, [Action::WriteEnded { session_id: sid("s"), epoch: 1 }]);
    assert!(matches!(&late[..], [Action::Tell(Update::Refused { .. })]), "{late:?}");
    let told = |action: &Action| matches!(action, Action::Tell(Update::SessionEnded { epoch: 1, .. }));
    assert!(written.iter().any(told), "{written:?}");
    assert!(core.handle(open("s", 2)).iter().any(|action| matches!(action, Action::CreateSandbox(_))));
}

#[test]
fn end_of_a_placement_that_is_not_known_to_be_on_disk_is_there_before_it_is_told() {
    let (mut core, _) = attached(left(Vec::new()), &[]);
    core.handle(open("s", 9));

    let lost = core.handle(Input::SandboxLost { session_id: sid("s"), reason: "gone".into() });
    let written = core.handle(Input::EndedWritten { session_id: sid("s"), durable: true });

    let told = |action: &Action| matches!(action, Action::Tell(Update::SessionEnded { epoch: 9, .. }));
    assert!(
        lost.contains(&Action::WriteEnded { session_id: sid("s"), epoch: 9 }) && !lost.iter().any(told),
        "{lost:?}"
    );
    assert!(written.iter().any(told), "{written:?}");
}

#[test]
fn takeover_with_a_newer_placement_is_written_down_before_it_is_told() {
    let (mut core, _) = attached(left(Vec::new()), &[]);

    let actions = core.handle(open("s", 9));

    let noted = |action: &Action| matches!(action, Action::Note(Record::SessionOpening(open)) if open.epoch == 9);
    assert!(actions.iter().any(noted), "{actions:?}");
    let told = |action: &Action| matches!(action, Action::Tell(Update::SessionOpened { epoch: 9, .. }));
    assert!(matches!(actions.last(), Some(Action::WriteReady { .. })) && !actions.iter().any(told), "{actions:?}");
    let written = core.handle(Input::ReadyWritten { session_id: sid("s"), durable: true });
    assert!(matches!(&written[..], [action] if told(action)), "{written:?}");
}

fn placements_told(actions: &[Action]) -> Vec<u64> {
    let told = |action: &Action| match action {
        Action::Tell(Update::SessionOpened { epoch, .. }) => Some(*epoch),
        _ => None,
    };
    actions.iter().filter_map(told).collect()
}

/// F-33, F-45: the next runner would know the older placement only, and refuse the orders of this one.
#[test]
fn repeat_of_a_takeover_that_the_journal_has_refused_is_refused_like_the_first() {
    let (mut core, _) = attached(left(Vec::new()), &[]);
    core.handle(open("s", 9));

    let first = core.handle(Input::ReadyWritten { session_id: sid("s"), durable: false });
    let repeat = core.handle(open("s", 9));

    assert_eq!((refusal(&first), refusal(&repeat)), (Code::JournalReadOnly, Code::JournalReadOnly));
    assert_eq!(placements_told(&repeat), Vec::<u64>::new());
}

#[test]
fn second_takeover_is_told_when_its_own_record_is_on_disk_and_not_with_the_first() {
    let (mut core, _) = attached(left(Vec::new()), &[]);
    let written = || Input::ReadyWritten { session_id: sid("s"), durable: true };
    core.handle(open("s", 9));
    assert_eq!(core.handle(open("s", 9)), [], "a repeat is answered with the first");
    core.handle(open("s", 10));

    let (first, second) = (core.handle(written()), core.handle(written()));

    assert_eq!((placements_told(&first), placements_told(&second)), (vec![], vec![10]));
}

#[test]
fn takeover_of_a_session_that_is_being_opened_or_taken_over_from_an_earlier_runner_is_on_disk_before_it_is_told() {
    let mut opening = core(Config::default());
    let written = || Input::ReadyWritten { session_id: sid("s"), durable: true };
    opening.handle(open("s", 1));
    opening.handle(Input::SandboxReady { session_id: sid("s"), sandbox_id: sandbox_id(), receipt: Receipt::default() });
    opening.handle(open("s", 2));
    let (first, second) = (opening.handle(written()), opening.handle(written()));
    assert_eq!((placements_told(&first), placements_told(&second)), (vec![], vec![2]));

    let mut attaching = core(Config::default());
    attaching.handle(Input::Recovered(Box::new(left(Vec::new()))));
    attaching.handle(open("s", 9));
    let attached = attaching.handle(Input::SandboxAttached {
        session_id: sid("s"),
        found: BTreeMap::new(),
        processes: Processes::Run,
    });
    assert_eq!(placements_told(&attached), Vec::<u64>::new(), "{attached:?}");
    assert_eq!(placements_told(&attaching.handle(written())), [9]);
}

#[test]
fn session_that_is_closing_is_not_taken_over_and_nothing_of_that_is_written_down() {
    let (mut core, _) = attached(left(Vec::new()), &[]);
    core.handle(super::core_tests::close("s", 3));

    let late = core.handle(open("s", 9));

    let refused = |action: &Action| matches!(action, Action::Tell(Update::Refused { failure, .. }) if failure.code == Code::SessionClosed);
    assert!(matches!(&late[..], [action] if refused(action)), "{late:?}");
    let over = core.handle(Input::SandboxClosed { session_id: sid("s") });
    let ended = |action: &Action| matches!(action, Action::Note(Record::SessionEnded { epoch: 3, .. }));
    assert!(over.iter().any(ended), "{over:?}");
}

#[test]
fn takeovers_that_a_hanging_disk_does_not_take_are_refused_and_the_session_stays() {
    let (mut core, _) = attached(left(Vec::new()), &[]);
    let records = (10..30)
        .map(|epoch| core.handle(open("s", epoch)))
        .filter(|actions| actions.iter().any(|action| matches!(action, Action::Note(_) | Action::WriteReady { .. })));
    assert!(records.count() < 10);
    let refused = core.handle(open("s", 40));
    assert!(
        matches!(&refused[..], [Action::Tell(Update::Refused { failure, .. })] if failure.retryable),
        "{refused:?}"
    );

    for _ in 0..10 {
        core.handle(Input::ReadyWritten { session_id: sid("s"), durable: true });
    }
    assert!(core.handle(open("s", 40)).iter().any(|action| matches!(action, Action::WriteReady { .. })));
}
