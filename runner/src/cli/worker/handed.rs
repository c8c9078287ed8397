//! What was handed on to this command: flags, variables, and the work item on standard input. Read before any thread exists.

use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::warn;
use zeroize::Zeroizing;

use super::ItemArguments;
use crate::connector::claude::Handed;

/// Largest work item: some hundred bytes and what metadata there is.
const MOST_ITEM_BYTES: usize = 1 << 20;
/// Whoever hands an item on has written it before this command begins. A pipe that stays silent is for somebody else.
const FIRST_BYTE_WITHIN: Duration = Duration::from_secs(2);
/// From its first byte on.
const WHOLE_WITHIN: Duration = Duration::from_secs(10);
/// The secret of the item, as the launch scripts of the official worker pass it on.
const SECRET: &str = "ANTHROPIC_WORK_SECRET";

/// Why it cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandedError {
    #[error("standard input cannot be read")]
    Input(#[source] io::Error),
    #[error("standard input: the work item is larger than {MOST_ITEM_BYTES} bytes")]
    TooLarge,
    #[error("standard input: the work item did not come whole within {} s", WHOLE_WITHIN.as_secs())]
    Late,
    #[error("{SECRET} is not text")]
    NoText,
}

/// Everything that says which item it is and with what it is served.
pub(super) fn read(arguments: &ItemArguments) -> Result<Handed, HandedError> {
    let secret = std::env::var_os(SECRET).filter(|secret| !secret.is_empty());
    let secret =
        secret.map(|secret| secret.into_string().map(Zeroizing::new).map_err(|_| HandedError::NoText)).transpose()?;
    Ok(Handed {
        environment_id: arguments.environment_id.clone(),
        work_id: arguments.work_id.clone(),
        session_id: arguments.session_id.clone(),
        environment_key: arguments.environment_key.as_ref().map(|key| key.0.clone()),
        secret,
        secret_file: arguments.work_secret_file.clone(),
        item: item()?,
    })
}

/// What is on standard input; `None` for a terminal, and where nothing is or comes.
fn item() -> Result<Option<Zeroizing<Vec<u8>>>, HandedError> {
    let mut input = io::stdin();
    if input.is_terminal() {
        return Ok(None);
    }
    let mut item = Zeroizing::new(Vec::with_capacity(64 * 1024));
    let mut deadline = Instant::now() + FIRST_BYTE_WITHIN;
    loop {
        if !is_readable(deadline).map_err(HandedError::Input)? {
            if item.is_empty() {
                warn!("nothing comes on standard input, so the variables alone say which work item it is");
                return Ok(None);
            }
            return Err(HandedError::Late);
        }
        let mut piece = Zeroizing::new([0; 16 * 1024]);
        let count = match input.read(&mut piece[..]) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(HandedError::Input(error)),
        };
        if item.is_empty() {
            deadline = Instant::now() + WHOLE_WITHIN;
        }
        item.extend_from_slice(&piece[..count]);
        if item.len() > MOST_ITEM_BYTES {
            return Err(HandedError::TooLarge);
        }
        // Some keep the pipe open behind it.
        if count == 0 || serde_json::from_slice::<serde::de::IgnoredAny>(&item).is_ok() {
            let is_there = item.iter().any(|byte| !byte.is_ascii_whitespace());
            return Ok(is_there.then_some(item));
        }
    }
}

fn is_readable(deadline: Instant) -> io::Result<bool> {
    let input = io::stdin();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut waiting = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
