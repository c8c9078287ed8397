//! Anything in any order.

use super::*;

/// One of the things that can happen, in an order that nobody has thought of.
fn anything(step: u8, which: u8, link: u64) -> Event {
    let id = format!("t{}", which % 4);
    let call_id = format!("claude:env_1:{id}");
    let work_id = || WORK.to_owned();
    let beat = |goes_on| Beat { last_heartbeat: "x".into(), ttl_seconds: Some(u64::from(which % 8)), goes_on };
    let live = |event: Value| Event::Live { work_id: WORK.into(), link, event: wire::event(event) };
    let page = |events: Vec<Value>| Page { events: events.into_iter().map(wire::event).collect(), next: None };
    let delivery = |order| Delivery { work_id: WORK.into(), order, token: None };
    match step % 28 {
        0 => Event::Polled(Ok(Some(delivery(Order::Session(SESSION.into()))))),
        1 => Event::Polled(Ok(Some(delivery(Order::Nothing("healthcheck".into()))))),
        2 => Event::Polled(Err(status(if which.is_multiple_of(2) { 401 } else { 503 }))),
        3 | 4 => Event::Acked { work_id: work_id(), result: Ok(()) },
        5 => Event::Acked { work_id: work_id(), result: Err(status([403, 409, 500][usize::from(which % 3)])) },
        6 | 7 => Event::Beaten { work_id: work_id(), sent: u64::from(which) * SECOND, result: Ok(beat(true)) },
        8 => Event::Beaten { work_id: work_id(), sent: 0, result: Ok(beat(false)) },
        9 => {
            Event::Beaten { work_id: work_id(), sent: 0, result: Err(status([412, 401, 500][usize::from(which % 3)])) }
        }
        10 => Event::Fetched { work_id: work_id(), result: Ok(which.is_multiple_of(8)) },
        11 | 12 => Event::Connected { work_id: work_id(), link },
        13 => Event::Listed { work_id: work_id(), link, result: Ok(page(vec![bash(&id), interrupt(), asking("t9")])) },
        14 => Event::Listed { work_id: work_id(), link, result: Ok(page(vec![bash(&id), end_of_turn()])) },
        15 => Event::Listed { work_id: work_id(), link, result: Err(status(500)) },
        16 => Event::Disconnected { work_id: work_id(), link, failure: (which.is_multiple_of(3)).then(lost) },
        17 => live(bash(&id)),
        18 => live(result_of(&id)),
        19 => live(interrupt()),
        20 => live(end_of_turn()),
        21 => live(verdict("t9", "allow")),
        22 => Event::Posted { work_id: work_id(), tool_use_id: id, result: Ok(()) },
        23 => Event::Posted {
            work_id: work_id(),
            tool_use_id: id,
            result: Err(status([400, 413, 503][usize::from(which % 3)])),
        },
        24 => Event::Update(finished(&call_id, "x")),
        25 => refused([RequestKind::Open, RequestKind::Call][usize::from(which % 2)], Some(&call_id), Code::Capacity),
        26 => Event::Update(Update::SessionEnded { session_id: core(), epoch: 1, end: SessionEnd::Closed }),
        _ => Event::Stopped {
            work_id: work_id(),
            result: if which.is_multiple_of(2) { Ok(()) } else { Err(status(500)) },
        },
    }
}

proptest::proptest! {
    #[test]
    fn nothing_is_asked_for_an_item_that_is_not_ours(
        was_left in proptest::bool::ANY,
        steps in proptest::collection::vec((0_u8..28, 0_u8..255, 0_u64..20), 1..200),
    ) {
        let held = Held {
            work_id: WORK.into(),
            session_id: SESSION.into(),
            last_heartbeat: "before".into(),
            ttl_seconds: 30,
        };
        let leases = if was_left { vec![held] } else { Vec::new() };
        let mut machine = Machine::new(rules(), half, Handover { leases, ..Handover::default() });
        let mut now = 1_000 * SECOND;
        let mut is_leased = false;
        let begun = machine.handle(now, Event::Update(Update::Restored));
        let mut is_ours = begun.iter().any(|action| matches!(action, Action::TakeUp { .. }));
        proptest::prop_assert_eq!(is_ours, was_left);
        // Until it is acknowledged here, it is ours only if the server says so.
        let mut is_doubtful = was_left;
        for (step, which, seconds) in steps {
            now += seconds * SECOND / 4;
            let link = machine.items.get(WORK).map_or(0, Item::link_number);
            let event = anything(step, which, link);
            is_leased |= matches!(event, Event::Beaten { result: Ok(_), .. });
            for action in machine.handle(now, event) {
                match action {
                    Action::Ack(_) => {
                        proptest::prop_assert!(!is_ours, "it was taken twice");
                        (is_ours, is_leased, is_doubtful) = (true, false, false);
                    }
                    Action::Forget { .. } => is_ours = false,
                    Action::Post { .. } => proptest::prop_assert!(is_ours && is_leased),
                    Action::Stop { .. } => proptest::prop_assert!(is_ours && (is_leased || !is_doubtful)),
                    Action::Beat { .. } | Action::AckAgain { .. } | Action::Stream { .. } => {
                        proptest::prop_assert!(is_ours);
                    }
                    _ => {}
                }
            }
            // Looking again brings nothing new at the same moment: what is due was done.
            let again = machine.handle(now, Event::Tick);
            proptest::prop_assert!(again.is_empty(), "{:?} was not done at once", again);
        }
    }
}
