//! Everything that can wake process 1, as one closed list, and its form as the 64-bit token of an epoll entry.

/// Names a call inside process 1. Never reused, so an event for a call that is gone finds nothing.
pub(crate) type Key = u64;

/// What woke the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A runner connects.
    Accept,
    /// The runner has sent something, hung up, or can take more.
    Connection,
    /// A deadline may be due.
    Alarm,
    /// A child has ended (SIGCHLD).
    Children,
    /// The spawner has ended, and with it the sandbox.
    SpawnerGone,
    /// A pipe of a call has bytes or was closed. The index counts the pipes of that call.
    Output(Key, u8),
    /// The standard input of a call can take more.
    Stdin(Key),
    /// A program has started, or could not be.
    StartError(Key),
    /// The first process of a call has ended.
    Process(Key),
    /// The shell of this generation claims something.
    ShellStatus(Key),
    /// The shell of this generation has ended.
    ShellProcess(Key),
    /// The worker of this key answers.
    Worker(Key),
    /// The worker of this key has ended.
    WorkerProcess(Key),
}

/// Keys are counted from zero, so 48 bits last longer than any machine.
const KEY_BITS: u32 = 48;
const KEY_MASK: u64 = (1 << KEY_BITS) - 1;

impl Event {
    /// The token of this event.
    pub(crate) fn token(self) -> u64 {
        let (kind, index, key) = match self {
            Event::Accept => (1, 0, 0),
            Event::Connection => (2, 0, 0),
            Event::Alarm => (3, 0, 0),
            Event::Children => (4, 0, 0),
            Event::SpawnerGone => (5, 0, 0),
            Event::Output(key, index) => (6, index, key),
            Event::Stdin(key) => (7, 0, key),
            Event::StartError(key) => (8, 0, key),
            Event::Process(key) => (9, 0, key),
            Event::ShellStatus(key) => (10, 0, key),
            Event::ShellProcess(key) => (11, 0, key),
            Event::Worker(key) => (12, 0, key),
            Event::WorkerProcess(key) => (13, 0, key),
        };
        (kind << 56) | (u64::from(index) << KEY_BITS) | (key & KEY_MASK)
    }

    /// The event behind a token; `None` for a token that this module never made.
    pub(crate) fn from_token(token: u64) -> Option<Self> {
        let key = token & KEY_MASK;
        let index = u8::try_from((token >> KEY_BITS) & 0xff).ok()?;
        Some(match token >> 56 {
            1 => Event::Accept,
            2 => Event::Connection,
            3 => Event::Alarm,
            4 => Event::Children,
            5 => Event::SpawnerGone,
            6 => Event::Output(key, index),
            7 => Event::Stdin(key),
            8 => Event::StartError(key),
            9 => Event::Process(key),
            10 => Event::ShellStatus(key),
            11 => Event::ShellProcess(key),
            12 => Event::Worker(key),
            13 => Event::WorkerProcess(key),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_event() -> impl Strategy<Value = Event> {
        let key = 0..=KEY_MASK;
        prop_oneof![
            Just(Event::Accept),
            Just(Event::Connection),
            Just(Event::Alarm),
            Just(Event::Children),
            Just(Event::SpawnerGone),
            (key.clone(), any::<u8>()).prop_map(|(key, index)| Event::Output(key, index)),
            key.clone().prop_map(Event::Stdin),
            key.clone().prop_map(Event::StartError),
            key.clone().prop_map(Event::Process),
            key.clone().prop_map(Event::ShellStatus),
            key.clone().prop_map(Event::ShellProcess),
            key.clone().prop_map(Event::Worker),
            key.prop_map(Event::WorkerProcess),
        ]
    }

    proptest! {
        #[test]
        fn every_event_survives_the_way_through_its_token(event in any_event()) {
            prop_assert_eq!(Event::from_token(event.token()), Some(event));
        }
    }

    #[test]
    fn a_token_nobody_made_is_no_event() {
        assert_eq!(Event::from_token(0), None);
        assert_eq!(Event::from_token(u64::MAX), None);
    }
}
