//! The terminal of a call.
//!
//! Process 1 makes it in the sandbox's own devpts and keeps our end; the program gets the other one as descriptors 0 to 2 and
//! as its controlling terminal. No terminal of the host is involved: whatever the program types into, steers or hangs up is
//! this one, and it ends with the call.

use std::os::fd::{AsFd as _, OwnedFd};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, unlockpt};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::termios::{SpecialCharacterIndices, tcgetattr};

use crate::sys::terminal::{open_peer, set_window_size};

use super::serve::errno_of;

/// `TERM` of a program that was given none: what every terminal of today understands.
const TERM: &[u8] = b"TERM=xterm";

/// Both ends of a new terminal.
#[derive(Debug)]
pub(crate) struct NewTerminal {
    /// Ours, which does not block.
    pub(crate) ours: OwnedFd,
    /// The program's.
    pub(crate) theirs: OwnedFd,
}

impl NewTerminal {
    /// Makes one. `may_share` says that nobody but the workload can open it by its name, which it then may: programs look
    /// for their terminal there (`tty`, `tmux`).
    ///
    /// # Errors
    /// ENOSPC when the sandbox has as many as it may have.
    pub(crate) fn open((columns, rows): (u16, u16), may_share: bool) -> nix::Result<Self> {
        let ours = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        grantpt(&ours)?;
        unlockpt(&ours)?;
        let theirs = open_peer(ours.as_fd())?;
        if may_share {
            fchmod(&theirs, Mode::from_bits_truncate(0o666))?;
        }
        set_window_size(theirs.as_fd(), columns, rows)?;
        let ours = ours.as_fd().try_clone_to_owned().map_err(errno_of)?;
        Ok(Self { ours, theirs })
    }
}

/// The environment of a program in a terminal. That of the sandbox says `TERM=dumb`, which is true of a pipe; what the call
/// itself says stays.
pub(crate) fn environment(merged: Vec<Vec<u8>>, of_the_call: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let is_term = |entry: &[u8]| entry.starts_with(b"TERM=");
    if of_the_call.iter().any(|entry| is_term(entry)) {
        return merged;
    }
    merged.into_iter().filter(|entry| !is_term(entry)).chain([TERM.to_vec()]).collect()
}

/// What typing the end of the input is: the terminal's end-of-file character, twice behind an unfinished line, which the
/// first one only hands over. Nothing where the program has switched that character off.
pub(crate) fn end_of_input(ours: &OwnedFd, last: Option<u8>) -> Vec<u8> {
    let character = tcgetattr(ours)
        .ok()
        .and_then(|settings| settings.control_chars.get(SpecialCharacterIndices::VEOF as usize).copied())
        .filter(|character| *character != 0);
    let Some(character) = character else { return Vec::new() };
    let begins_a_line = last.is_none_or(|byte| matches!(byte, b'\n' | b'\r') || byte == character);
    vec![character; if begins_a_line { 1 } else { 2 }]
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::unistd::{isatty, read, write};

    #[test]
    fn both_ends_are_one_terminal_of_the_size_asked_for() {
        let terminal = NewTerminal::open((100, 30), false).unwrap();
        assert_eq!((isatty(&terminal.ours), isatty(&terminal.theirs)), (Ok(true), Ok(true)));
        write(&terminal.theirs, b"out\n").unwrap();
        let mut buffer = [0; 16];
        let length = read(&terminal.ours, &mut buffer).unwrap();
        assert_eq!(buffer.get(..length), Some(&b"out\r\n"[..]));
        drop(terminal.theirs);
        assert_eq!(read(&terminal.ours, &mut buffer), Err(Errno::EIO));
    }

    #[test]
    fn end_of_input_is_typed_once_at_the_beginning_of_a_line_and_twice_behind_it() {
        let terminal = NewTerminal::open((80, 24), false).unwrap();
        let typed = |last| end_of_input(&terminal.ours, last);
        assert_eq!([typed(None), typed(Some(b'\n')), typed(Some(4))], [vec![4], vec![4], vec![4]]);
        assert_eq!(typed(Some(b'x')), [4, 4]);
    }

    #[test]
    fn a_terminal_is_not_dumb_unless_the_call_says_so() {
        let sandbox = vec![b"TERM=dumb".to_vec(), b"HOME=/".to_vec()];
        assert_eq!(environment(sandbox.clone(), &[]), [b"HOME=/".to_vec(), b"TERM=xterm".to_vec()]);
        assert_eq!(environment(sandbox.clone(), &[b"TERM=dumb".to_vec()]), sandbox);
    }
}
