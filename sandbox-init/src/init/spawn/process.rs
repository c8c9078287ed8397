//! Privileged: holds the credentials of process 1, to let its children enter U2.
//!
//! The spawner's loop: an order comes, a hardened spare goes. It reads nothing else, from nobody else.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::stat::{Mode, umask};
use nix::unistd::chdir;
use prost::Message;

use super::{Answer, Confinement, Domain, ORDER, PACKET_BYTES, SpawnStepError, child};
use crate::policy::seccomp::{Arch, BpfProgram, Options, filters};
use crate::policy::{Profile, landlock};
use crate::stage::StageError;
use crate::stage::identity::become_keeper;
use crate::stage::limit::{OomScore, WORKLOAD_OOM_SCORE, apply_nested};
use crate::stage::nested::{Neighbours, WRITABLE};
use crate::sys::process::{CloneArguments, Cloned, clone3, close_range, exit_now, reset_signals, set_affinity};
use crate::sys::socket::{receive, send};

/// Room for the confinement: a path and some numbers.
const CONFINEMENT_BYTES: usize = 16 * 1024;

/// Runs until process 1 is gone.
pub(super) fn run(socket: &OwnedFd, nested: Option<&OwnedFd>) {
    if close_others(socket.as_raw_fd(), nested.unwrap_or(socket).as_raw_fd()).is_err() {
        return;
    }
    reset_signals();
    umask(Mode::from_bits_truncate(0o022));
    // Now: later this process is not dumpable, and its files in /proc belong to somebody else.
    let score = OomScore::open();
    // Nearly every sandbox has these; another profile is compiled when it is asked for.
    let usual = Options { profile: Profile::Standard, shared_identity: false, no_namespaces: nested.is_none() };
    let usual_programs = filters(Arch::NATIVE, &usual);
    let confinement = loop {
        match receive(socket, CONFINEMENT_BYTES) {
            Ok(Some(packet)) => match Confinement::decode(packet.bytes.as_slice()) {
                Ok(confinement) => break confinement,
                Err(_) => return,
            },
            Err(Errno::EINTR) => {}
            Ok(None) | Err(_) => return,
        }
    };
    let answer = match enter(&confinement) {
        Ok(domain) => Answer {
            // Not empty: an empty packet is the end of a connection.
            pid: 1,
            landlock_abi: domain.map_or(0, |domain| domain.abi),
            landlock_scopes: domain.is_ok_and(|domain| domain.scopes),
            landlock_errno: domain.err().unwrap_or(0),
            ..Answer::default()
        },
        Err(error) => Answer { errno: error.source as i32, step: error.step, ..Answer::default() },
    };
    if send(socket, &answer.encode_to_vec(), &[]).is_err() || answer.errno != 0 {
        return;
    }
    let options = Options {
        profile: confinement.profile(),
        shared_identity: confinement.single_id(),
        no_namespaces: confinement.nested.is_some(),
    };
    // Compiled once; every spare inherits the memory.
    let programs = if options == usual { usual_programs } else { filters(Arch::NATIVE, &options) };
    let workshop = Workshop { nested, confinement: &confinement, programs: &programs, score: &score };
    loop {
        match receive(socket, PACKET_BYTES) {
            Ok(Some(packet)) if packet.bytes == ORDER => {
                serve(socket, packet.descriptors.into_iter().next().as_ref(), &workshop);
            }
            Err(Errno::EINTR) => {}
            Ok(_) | Err(_) => break,
        }
    }
    // Process 1 is gone. Where a pid namespace goes with it, so is everybody by now.
    if let Some(nested) = &confinement.nested {
        Neighbours::at(nested.base).end_workload();
    }
}

/// What every spare is made of.
struct Workshop<'a> {
    nested: Option<&'a OwnedFd>,
    confinement: &'a Confinement,
    programs: &'a [BpfProgram; 2],
    score: &'a OomScore,
}

/// Closes every descriptor but 0 to 2 and these two, which may be the same.
fn close_others(one: RawFd, other: RawFd) -> nix::Result<()> {
    let (low, high) = (one.min(other), one.max(other));
    for (first, last) in [(3, low - 1), (low + 1, high - 1), (high + 1, RawFd::MAX)] {
        if first <= last {
            close_range(first, last)?;
        }
    }
    Ok(())
}

/// Takes the credentials of process 1 and enters the landlock domain of the workload, or says with which errno the kernel
/// gives none; 0 when none is asked for.
fn enter(confinement: &Confinement) -> Result<Result<Domain, i32>, SpawnStepError> {
    // `pivot_root` moved the root and, as it was there, the working directory of this process too.
    chdir("/").map_err(SpawnStepError::new("enter the root"))?;
    let stage = |error: StageError| SpawnStepError { step: error.step, source: error.source };
    let refused = |error: landlock::LandlockError| SpawnStepError { step: error.to_string(), source: Errno::EPERM };
    let mut prepared = None;
    match &confinement.nested {
        Some(nested) => {
            if confinement.landlock {
                // As root, who can open every directory of the sandbox.
                let directory = Path::new(&nested.directory);
                let domain = landlock::prepare_nested(confinement.profile(), directory, &WRITABLE).map_err(refused)?;
                prepared = Some(domain);
            }
            apply_nested(nested).map_err(stage)?;
            Neighbours::at(nested.base).become_keeper().map_err(stage)?;
        }
        None => become_keeper(confinement.id_count).map_err(stage)?,
    }
    if !confinement.processors.is_empty() {
        let processors: Vec<usize> = confinement.processors.iter().filter_map(|cpu| (*cpu).try_into().ok()).collect();
        set_affinity(&processors).map_err(SpawnStepError::new("bind the workload to its processors"))?;
    }
    if !confinement.landlock {
        return Ok(Err(0));
    }
    let prepared = match prepared {
        Some(prepared) => prepared,
        None => landlock::prepare(confinement.profile(), Path::new("/")).map_err(refused)?,
    };
    if let Some(reason) = prepared.achieved().not_applied {
        return Ok(Err(reason.errno() as i32));
    }
    let achieved = prepared.restrict_self().map_err(refused)?;
    Ok(Ok(Domain { abi: achieved.abi, scopes: achieved.scopes }))
}

fn serve(socket: &OwnedFd, slot: Option<&OwnedFd>, workshop: &Workshop<'_>) {
    let answer = |answer: &Answer, descriptors: &[i32]| {
        // Process 1 is gone when this fails, and then so is this process.
        let _ = send(socket, &answer.encode_to_vec(), descriptors);
    };
    let failed = |step: &str, errno: Errno| Answer { errno: errno as i32, step: step.to_owned(), ..Answer::default() };
    let (ours, theirs) = match socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC) {
        Ok(pair) => pair,
        Err(errno) => return answer(&failed("make the spare's socket", errno), &[]),
    };
    let flags = u64::try_from(libc::CLONE_PARENT).unwrap_or_default();
    // When memory is short the kernel takes a process of the workload before the spawner and process 1.
    workshop.score.set(WORKLOAD_OOM_SCORE);
    let cloned =
        clone3(&CloneArguments { flags, exit_signal: 0, cgroup: slot.map(AsFd::as_fd), ..CloneArguments::default() });
    if !matches!(cloned, Ok(Cloned::Child)) {
        workshop.score.set(0);
    }
    match cloned {
        Ok(Cloned::Child) => {
            drop(ours);
            child::run(theirs, workshop.nested, workshop.confinement, workshop.programs);
            exit_now(127)
        }
        Ok(Cloned::Parent { pid, pidfd }) => {
            answer(&Answer { pid: pid.as_raw(), ..Answer::default() }, &[pidfd.as_raw_fd(), ours.as_raw_fd()]);
        }
        Err(errno) => answer(&failed("make a process", errno), &[]),
    }
}
