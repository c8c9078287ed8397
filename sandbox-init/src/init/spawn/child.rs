//! The spare child: hardened first, then parked, then the program or the tool it was asked to be.
//!
//! Everything after the hardening runs as the workload: it holds nothing that the program it becomes may not have.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{chdir, setsid};
use prost::Message;
use proto::init::v1::{ContentBlock, ToolResult};

use super::Confinement;
use crate::init::tool_worker::{INTENTS, read_all, serve};
use crate::policy::seccomp::BpfProgram;
use crate::stage::identity::become_workload;
use crate::stage::nested::Neighbours;
use crate::sys::process::{
    close_range_on_exec, duplicate_above, execute_path, exit_now, inherited_descriptor, place_descriptor,
    set_controlling_terminal,
};
use crate::sys::socket::{Packet, receive, send};
use crate::tool;

/// What a spare becomes.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Task {
    /// Program and arguments; empty for a tool.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub argv: Vec<Vec<u8>>,
    /// The whole environment.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub environment: Vec<Vec<u8>>,
    /// Where it starts.
    #[prost(bytes = "vec", tag = "3")]
    pub working_directory: Vec<u8>,
    /// Tool name; empty for a program.
    #[prost(string, tag = "4")]
    pub tool: String,
    /// Input of the tool.
    #[prost(bytes = "vec", tag = "5")]
    pub input_json: Vec<u8>,
    /// Descriptor 0 becomes the controlling terminal.
    #[prost(bool, tag = "6")]
    pub terminal: bool,
    /// Number of each descriptor after the first, which is for start errors.
    #[prost(int32, repeated, tag = "7")]
    pub targets: Vec<RawFd>,
    /// Answers file tools on descriptor 0.
    #[prost(bool, tag = "8")]
    pub worker: bool,
}

/// Packet that says: the last descriptor is a memory file that holds the task.
pub(super) const IN_FILE: &[u8] = b"file";
/// A spare says this when it is hardened.
pub(super) const HARDENED: &[u8] = b"hardened";
/// Largest task that travels in the packet itself.
pub(super) const INLINE_BYTES: usize = 64 * 1024;
/// Name of the built-in that attacks the sandbox from inside, for `doctor`.
const PROBE: &str = "probe";
/// Received descriptors first move here, out of the way of every number they may get.
const ABOVE: RawFd = 256;

/// Runs the whole life of a spare. Returns only when there is nothing to do.
pub(super) fn run(socket: OwnedFd, nested: Option<&OwnedFd>, confinement: &Confinement, programs: &[BpfProgram; 2]) {
    let socket = match harden(socket, nested, confinement, programs) {
        Ok(socket) => socket,
        Err(errno) => exit_now(errno as i32 & 0x7f),
    };
    // Nobody listens when the task was sent ahead.
    let _ = send(&socket, HARDENED, &[]);
    let packet = loop {
        match receive(&socket, INLINE_BYTES + 1024) {
            Ok(Some(packet)) => break packet,
            // unix(7): a peer that closes with our packet unread resets us once; its task is in our queue all the same.
            Err(Errno::ECONNRESET | Errno::EINTR) => {}
            Ok(None) | Err(_) => return,
        }
    };
    drop(socket);
    perform(packet, confinement);
}

fn harden(
    socket: OwnedFd,
    nested: Option<&OwnedFd>,
    confinement: &Confinement,
    programs: &[BpfProgram; 2],
) -> nix::Result<OwnedFd> {
    setsid()?;
    match (&confinement.nested, nested) {
        (Some(users), _) => Neighbours::at(users.base).become_workload(confinement.capabilities)?,
        (None, Some(nested)) => {
            become_workload(nested, confinement.root, confinement.single_id(), confinement.capabilities)?;
        }
        (None, None) => return Err(Errno::EBADF),
    }
    // Only now, because everything else of the spawner may go: its socket, U2.
    let socket = keep_only(socket)?;
    if confinement.seccomp {
        for program in programs {
            crate::sys::seccomp::install(program)?;
        }
    }
    Ok(socket)
}

/// Closes every descriptor but 0 to 2 and this one.
fn keep_only(socket: OwnedFd) -> nix::Result<OwnedFd> {
    let high = duplicate_above(socket.as_fd(), ABOVE)?;
    std::mem::forget(socket);
    let number = high.as_raw_fd();
    crate::sys::process::close_range(3, number - 1)?;
    crate::sys::process::close_range(number + 1, RawFd::MAX)?;
    Ok(high)
}

fn perform(packet: Packet, confinement: &Confinement) {
    let mut descriptors = packet.descriptors;
    let bytes = if packet.bytes == IN_FILE {
        let Some(file) = descriptors.pop() else { return };
        match read_all(file) {
            Ok(bytes) => bytes,
            Err(_) => return,
        }
    } else {
        packet.bytes
    };
    let Ok(task) = Task::decode(bytes.as_slice()) else { return };
    let mut descriptors = descriptors.into_iter();
    let Some(errors) = descriptors.next() else { return };
    let errors = match place(errors, descriptors.collect(), &task.targets) {
        Ok(errors) => errors,
        Err(_) => return,
    };
    let number = match begin(&task) {
        Ok(()) if task.worker => {
            drop(errors);
            exit_now(i32::from(work(confinement).is_err()));
        }
        Ok(()) if task.tool.is_empty() => execute(&task) as i32,
        Ok(()) => {
            drop(errors);
            exit_now(run_tool(&task, confinement));
        }
        Err(number) => number,
    };
    // The reader takes the number; when it is gone so is the call.
    let _ = nix::unistd::write(&errors, &number.to_ne_bytes());
    exit_now(127)
}

/// Gives each descriptor its number. Returns the one for start errors, close-on-exec.
fn place(errors: OwnedFd, descriptors: Vec<OwnedFd>, targets: &[RawFd]) -> nix::Result<OwnedFd> {
    let mut high = Vec::new();
    for descriptor in &descriptors {
        high.push(duplicate_above(descriptor.as_fd(), ABOVE)?);
    }
    let errors_high = duplicate_above(errors.as_fd(), ABOVE)?;
    drop((errors, descriptors));
    close_range_on_exec(3)?;
    for (descriptor, target) in high.iter().zip(targets) {
        if *target < 0 || *target >= ABOVE {
            return Err(Errno::EBADF);
        }
        place_descriptor(descriptor.as_raw_fd(), *target)?;
    }
    Ok(errors_high)
}

/// The number is what the start-error pipe gets: negative for the directory.
fn begin(task: &Task) -> Result<(), i32> {
    if task.terminal {
        set_controlling_terminal(0).map_err(|errno| errno as i32)?;
    }
    chdir(OsStr::from_bytes(&task.working_directory)).map_err(|errno| -(errno as i32))
}

/// `execve`, with the search of `execvp(3)`: a candidate that may not be executed is remembered, the search goes on.
fn execute(task: &Task) -> Errno {
    let strings =
        |list: &[Vec<u8>]| list.iter().filter_map(|item| CString::new(item.as_slice()).ok()).collect::<Vec<_>>();
    let (argv, environment) = (strings(&task.argv), strings(&task.environment));
    let Some(program) = argv.first() else { return Errno::ENOENT };
    if program.as_bytes().contains(&b'/') {
        return execute_path(program, &argv, &environment);
    }
    let path = task
        .environment
        .iter()
        .find_map(|entry| entry.strip_prefix(b"PATH="))
        .unwrap_or(b"/usr/local/bin:/usr/bin:/bin");
    let mut refused = Errno::ENOENT;
    for directory in path.split(|byte| *byte == b':').filter(|directory| !directory.is_empty()) {
        let mut candidate = directory.to_vec();
        candidate.push(b'/');
        candidate.extend_from_slice(program.as_bytes());
        let Ok(candidate) = CString::new(candidate) else { continue };
        match execute_path(&candidate, &argv, &environment) {
            Errno::ENOENT | Errno::ENOTDIR => {}
            Errno::EACCES => refused = Errno::EACCES,
            other => return other,
        }
    }
    refused
}

fn run_tool(task: &Task, confinement: &Confinement) -> i32 {
    // Tools reopen their own descriptors through /proc/self, which the kernel gives to the owner of a dumpable process only.
    // A process of the workload may trace this one now; both are the same principal.
    if nix::sys::prctl::set_dumpable(true).is_err() {
        return 1;
    }
    let context = context(confinement);
    let result = if task.tool == PROBE {
        let text = Some(proto::init::v1::content_block::Kind::Text(crate::probe::run(confinement.nested.is_none())));
        ToolResult { is_error: false, content: vec![ContentBlock { kind: text }] }
    } else {
        tool::run(&task.tool, &task.input_json, &context)
    };
    let Ok(output) = inherited_descriptor(1) else { return 1 };
    let written = File::from(output).write_all(&result.encode_to_vec());
    i32::from(written.is_err())
}

fn context(confinement: &Confinement) -> tool::Context {
    let mut context = tool::Context::new(PathBuf::from(OsStr::from_bytes(&confinement.working_directory)));
    context.read_only_roots.push(confinement.output_directory());
    context
}

/// Not dumpable, other than a tool that runs alone: nobody else of the workload looks into it or changes it between calls.
fn work(confinement: &Confinement) -> nix::Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    let mut context = context(confinement);
    let socket = inherited_descriptor(0)?;
    context.intents = Some(Arc::new(File::from(inherited_descriptor(INTENTS)?)));
    serve(&socket, |request, answer| {
        if !request.intent.is_empty() {
            return answer.extend(tool::settle(&request.tool, &request.input_json, &request.intent, &context));
        }
        let result = tool::run(&request.tool, &request.input_json, &context);
        answer.reserve(result.encoded_len());
        // A vector takes any length.
        let _ = result.encode(answer);
    })
}
