//! Calls that are a command in the persistent shell, and the life of that shell.
//!
//! A command is written to the shell once. If the shell dies and the FIFO of the command was never opened, the command
//! provably never began, and is written to a new shell, once; in every other case it is never written again.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::pipe2;
use proto::init::v1::{NoteKind, Stream};

use crate::sys::child::{Exit, Which, reap};

use super::call::{Body, Call, Phase, Running, ShellBody, StartState, start_state};
use super::cause::{End, note};
use super::clock::now;
use super::event::{Event, Key};
use super::pipe::was_opened;
use super::prepare::{Refusal, Work, merge_environment};
use super::serve::Engine;
use super::shell::{Claim, Heard, STATUS_NUMBER, Shell, ShellPipes};
use super::spawner::{Program, SpawnRequest};

/// How often a command is written again to a new shell after it provably never began.
const ATTEMPTS: u8 = 1;

impl Engine {
    /// Opens the gate of a command. One at a time: the shell has one set of variables.
    pub(super) fn begin_command(&mut self, key: Key) -> Result<(), Refusal> {
        if self.running_command().is_some() {
            return Err(Refusal::Busy("another bash call is running".to_owned()));
        }
        let Some(call) = self.calls.get(&key) else { return Ok(()) };
        let Work::Bash { command, restart } = &call.plan.work else { return Ok(()) };
        let (restart, only_restart) = (*restart, *restart && command.is_empty());
        let plan = call.plan.clone();
        let mut running = self.new_running(&plan, Body::Shell(ShellBody { only_restart, ..ShellBody::default() }));
        if restart {
            self.end_shell();
            self.shells.lost_idle = false;
            self.shells.working_directory = self.working_directory.clone();
        } else if std::mem::take(&mut self.shells.lost_idle) {
            running.notes.push(note(NoteKind::ShellRenewed, RESTARTED));
        }
        if let Some(call) = self.calls.get_mut(&key) {
            call.phase = Phase::Running(Box::new(running));
        }
        self.drive_command(key);
        Ok(())
    }

    /// The call that has the shell now.
    fn running_command(&self) -> Option<Key> {
        let is_command =
            |call: &&Call| matches!(&call.phase, Phase::Running(running) if matches!(running.body, Body::Shell(_)));
        self.calls.values().find(is_command).map(|call| call.key)
    }

    /// Brings a command as far as it can get now: a shell, a ready shell, the command written to it.
    fn drive_command(&mut self, key: Key) {
        if self.shells.current.is_none()
            && let Err((reason, errno)) = self.start_shell()
        {
            return self.finish_never(key, End::NeverStarted { reason, errno, code: 125 });
        }
        if !self.shells.current.as_ref().is_some_and(|shell| shell.is_ready) {
            return;
        }
        let Some(call) = self.calls.get_mut(&key) else { return };
        let only_restart = call.running().and_then(Running::shell).is_some_and(|shell| shell.only_restart);
        if only_restart {
            return self.finish(key, End::Claimed(0));
        }
        if let Err((reason, errno)) = self.write_command(key) {
            self.finish_never(key, End::NeverStarted { reason, errno, code: 125 });
        }
    }

    fn write_command(&mut self, key: Key) -> Result<(), (String, i32)> {
        let Some(call) = self.calls.get(&key) else { return Ok(()) };
        let Work::Bash { command, .. } = &call.plan.work else { return Ok(()) };
        let failed = |error: nix::Error| (format!("no files for the command: {}", error.desc()), error as i32);
        let files = self.shells.files.write_command(command).map_err(super::serve::errno_of).map_err(failed)?;
        let mut outputs = vec![(Stream::Stdout, files.stdout)];
        if call.plan.separate {
            outputs.push((Stream::Stderr, self.shells.files.stderr(&files.nonce).map_err(failed)?));
        }
        let outputs = self.watch_outputs(key, &call.plan, outputs);
        let separate = call.plan.separate;
        let Some(shell) = &self.shells.current else { return Ok(()) };
        let (slot, is_fed) =
            (shell.slot, shell.feed(&self.shells.files.lines(&files.nonce, separate, shell.mute_status)));
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return Ok(()) };
        running.slot = Some(slot);
        running.outputs = outputs;
        running.announced.has_begun = true;
        if let Some(body) = running.shell() {
            body.nonce = Some(files.nonce);
        }
        self.attend();
        if !is_fed {
            // Its end, which this brings about, is handled like any other end of a shell.
            self.kill_shell();
        }
        Ok(())
    }

    /// Starts a shell ahead of need, and settles what the last command left. For when nobody waits.
    pub(super) fn settle_shell(&mut self) {
        if let Some(call_id) = self.shells.just_left.take() {
            self.move_shell(&call_id);
        } else if self.running_command().is_none()
            && let Some(shell) = &self.shells.current
            && self.shells.needs_mark
        {
            self.slots.mark_again(shell.slot, shell.pid);
            self.shells.needs_mark = false;
        }
        // Not beside a call of another kind: on a small machine the start of a shell would delay the end of that call.
        if self.shell_at().is_some_and(|moment| moment <= now()) {
            // If this fails, the next command tries again and reports it.
            self.shells.wanted = self.start_shell().is_ok();
        }
        // Not while a command runs: bash opens its files in the same directory at this moment.
        if self.shells.current.is_some() && self.running_command().is_none() {
            self.shells.files.tidy();
            self.shells.files.prepare();
        }
    }

    /// The last command left processes: they keep the slot, the shell goes on in a new one.
    fn move_shell(&mut self, call_id: &str) {
        let Some((pid, old)) = self.shells.current.as_ref().map(|shell| (shell.pid, shell.slot)) else { return };
        let Ok(new) = self.slots.take() else { return };
        if self.slots.adopt(new, pid).is_err() {
            self.slots.give_back(new, call_id);
            return;
        }
        if let Some(shell) = &mut self.shells.current {
            shell.slot = new;
        }
        self.slots.leave(old, pid);
        self.slots.mark(new, Some(pid));
        self.shells.needs_mark = false;
        self.slots.give_back(old, call_id);
    }

    fn start_shell(&mut self) -> Result<(), (String, i32)> {
        let failed = |error: nix::Error| (format!("no shell: {}", error.desc()), error as i32);
        let null = || {
            File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from).map_err(super::serve::errno_of)
        };
        let (their_control, control) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let (status, their_status) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let (start_error, their_error) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        for ours in [&control, &status, &start_error] {
            fcntl(ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed)?;
        }
        let slot = self.slots.take().map_err(failed)?;
        let quiet = [b"PS1=".to_vec(), b"PS2=".to_vec(), b"TERM=dumb".to_vec()];
        let path = self.shells.path.as_os_str().as_bytes().to_vec();
        let mut argv = vec![path];
        argv.extend(["--noprofile", "--norc", "--noediting", "-i"].map(|argument| argument.as_bytes().to_vec()));
        let request = SpawnRequest {
            program: Program::Execute { argv, environment: merge_environment(&self.environment, &quiet) },
            working_directory: self.shells.working_directory.clone(),
            descriptors: vec![
                (their_control, 0),
                (null().map_err(failed)?, 1),
                (null().map_err(failed)?, 2),
                (their_status, STATUS_NUMBER),
            ],
            slot: self.slots.directory(slot),
            terminal: false,
            start_error: their_error,
        };
        let spawned = match self.spawner.spawn(request) {
            Ok(spawned) => spawned,
            Err(error) => {
                self.slots.give_back(slot, "");
                return Err(self.spawn_failure(&error));
            }
        };
        let key = self.new_key();
        self.slots.mark(slot, Some(spawned.pid));
        self.shells.needs_mark = false;
        let pipes = ShellPipes { control, status, start_error };
        let shell = Shell::new(key, spawned.pid, spawned.pidfd, slot, pipes);
        // A shell that cannot be watched is noticed by the timeout of its first command.
        let _ = self.watch(&shell.pidfd, Event::ShellProcess(key));
        let _ = self.watch(shell.status(), Event::ShellStatus(key));
        self.shells.generation = self.shells.generation.saturating_add(1);
        self.shells.current = Some(shell);
        Ok(())
    }

    /// Kills the shell; its end is handled when it is reaped.
    fn kill_shell(&mut self) {
        if let Some(shell) = &self.shells.current {
            let _ = kill(shell.pid, Signal::SIGKILL);
        }
    }

    /// Kills an idle shell and forgets it at once. What it left running keeps its slot.
    pub(super) fn end_shell(&mut self) {
        self.kill_shell();
        if let Some(shell) = self.shells.current.take() {
            let _ = self.epoll.delete(shell.status());
            self.slots.give_back(shell.slot, "");
            self.shells.dying.insert(shell.key, shell.pidfd);
        }
    }

    /// The shell says something.
    pub(super) fn listen_to_shell(&mut self, key: Key) {
        let Some(shell) = self.shells.current.as_mut().filter(|shell| shell.key == key) else { return };
        match shell.listen() {
            Heard::Claims(claims) => {
                for claim in claims {
                    self.hear(claim);
                }
            }
            Heard::Nonsense => self.disbelieve(),
        }
    }

    fn hear(&mut self, claim: Claim) {
        let Some(shell) = &mut self.shells.current else { return };
        if shell.is_hello(&claim) {
            shell.is_ready = true;
            // Where it is, it could not go to the last known directory: say where it is.
            if let Some(directory) = claim.working_directory {
                self.shells.working_directory = directory;
            }
            if let Some(key) = self.running_command() {
                self.drive_command(key);
            }
            return;
        }
        let expected = self.running_command().filter(|key| {
            let body = self.calls.get_mut(key).and_then(Call::running).and_then(Running::shell);
            body.is_some_and(|body| body.nonce.as_deref() == Some(claim.nonce.as_str()))
        });
        let Some(key) = expected else { return self.disbelieve() };
        if let Some(directory) = claim.working_directory {
            self.shells.working_directory = directory;
        }
        self.shells.needs_mark = true;
        self.shells.files.remove(&claim.nonce);
        self.finish(key, End::Claimed(claim.code));
    }

    /// Something other than our line wrote to the status descriptor: nothing this shell says is worth anything now.
    fn disbelieve(&mut self) {
        if self.running_command().is_some() {
            self.shells.doubted = true;
            // The end is reported when the shell is reaped; the call keeps its slot until then.
            self.kill_shell();
        } else {
            self.end_shell();
            self.shells.lost_idle = true;
        }
    }

    /// The shell of this key has ended.
    pub(super) fn reap_shell(&mut self, key: Key) {
        if let Some(pidfd) = self.shells.dying.get(&key) {
            let _ = reap(Which::Process(pidfd.as_fd()));
            self.shells.dying.remove(&key);
            return;
        }
        let Some(shell) = self.shells.current.as_ref().filter(|shell| shell.key == key) else { return };
        if let Ok(Some((_, exit))) = reap(Which::Process(shell.pidfd.as_fd())) {
            self.shell_ended(exit);
        }
    }

    /// The shell has ended and was reaped.
    pub(super) fn shell_ended(&mut self, exit: Exit) {
        // What it said last counts.
        if let Some(key) = self.shells.current.as_ref().map(|shell| shell.key)
            && !self.shells.doubted
        {
            self.listen_to_shell(key);
        }
        let Some(shell) = self.shells.current.take() else { return };
        let doubted = std::mem::take(&mut self.shells.doubted);
        let Some(key) = self.running_command() else {
            self.shells.lost_idle |= shell.is_ready;
            // A shell that was never ready is not tried again before somebody needs it.
            self.shells.wanted &= shell.is_ready || (start_failure(&shell).is_some() && self.fall_back());
            let call_id = self.shells.just_left.take().unwrap_or_default();
            return self.slots.give_back(shell.slot, &call_id);
        };
        let start_failure = start_failure(&shell);
        let may_fall_back = start_failure.is_some() && self.fall_back();
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return };
        let was_written = running.shell().is_some_and(|body| body.nonce.is_some());
        let has_begun =
            was_written && running.outputs.first().and_then(|output| output.reader.as_ref()).is_none_or(was_opened);
        if has_begun {
            running.notes.push(note(NoteKind::ShellRestarted, RESTARTED));
            let end = if doubted {
                End::Unknown("something else than the shell reported the status of the command".to_owned())
            } else if exit == Exit::Code(shell.mute_status) {
                End::Unknown(
                    "the command closed the descriptors of the shell, so its status could not be reported".to_owned(),
                )
            } else {
                End::Process(exit)
            };
            self.forget_files(key);
            return self.finish(key, end);
        }
        self.begin_again(key, &shell, Lost { had_state: was_written && shell.is_ready, start_failure, may_fall_back });
    }

    /// The command never began. It is written to a new shell once; nothing of it can have happened.
    fn begin_again(&mut self, key: Key, shell: &Shell, lost: Lost) {
        self.forget_files(key);
        self.slots.give_back(shell.slot, "");
        let Some(running) = self.calls.get_mut(&key).and_then(Call::running) else { return };
        let ending = running.ending;
        running.slot = None;
        running.outputs.clear();
        running.announced.has_begun = false;
        if lost.had_state {
            running.notes.push(note(NoteKind::ShellRenewed, RESTARTED));
        }
        let Some(body) = running.shell() else { return };
        body.nonce = None;
        let is_first = body.attempts < ATTEMPTS && lost.start_failure.is_none();
        body.attempts = body.attempts.saturating_add(1);
        if let Some(ending) = ending {
            return self.finish_unstarted(key, ending.ender, "the shell ended before the command began");
        }
        if is_first || lost.may_fall_back {
            return self.drive_command(key);
        }
        let (reason, errno) = match lost.start_failure {
            Some(errno) => {
                let path = self.shells.path.display();
                (format!("cannot execute {path}: {}", Errno::from_raw(errno).desc()), errno)
            }
            None => ("the shell ended before the command began, twice".to_owned(), 0),
        };
        self.finish_never(key, End::NeverStarted { reason, errno, code: 125 });
    }

    /// The shell could not be executed, or not in its directory, which is the likelier reason when it is not the first
    /// one: directories are removed. True when there is another directory to try.
    fn fall_back(&mut self) -> bool {
        let root = b"/".to_vec();
        let (next, is_untried) = if self.shells.working_directory == root {
            (self.working_directory.clone(), false)
        } else if self.shells.working_directory == self.working_directory {
            (root, true)
        } else {
            (self.working_directory.clone(), true)
        };
        self.shells.working_directory = next;
        is_untried
    }

    fn forget_files(&mut self, key: Key) {
        let body = self.calls.get_mut(&key).and_then(Call::running).and_then(Running::shell);
        if let Some(nonce) = body.and_then(|body| body.nonce.as_deref()) {
            self.shells.files.remove(nonce);
        }
    }
}

/// What is known of a shell that ended before it had begun a command.
struct Lost {
    /// It had run commands before.
    had_state: bool,
    /// errno, when it could not be executed at all.
    start_failure: Option<i32>,
    /// There is another directory to try it in.
    may_fall_back: bool,
}

/// errno of a shell that could not be executed. The pipe is read, so this answers once.
fn start_failure(shell: &Shell) -> Option<i32> {
    match start_state(&shell.start_error) {
        StartState::Failed(failure) if !shell.is_ready => Some(failure.errno),
        StartState::Failed(_) | StartState::Started | StartState::Starting => None,
    }
}

/// What the model is told.
const RESTARTED: &str =
    "a new shell was started in the last known directory; variables, functions and options are gone";
