//! Privileged: holds the credentials of process 1, to let its children enter U2.
//!
//! The spawner's loop: an order comes, a hardened spare goes. It reads nothing else, from nobody else.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;

use super::{Answer, Confinement, ORDER, PACKET_BYTES, SpawnStepError, child};
use crate::policy::seccomp::{Arch, BpfProgram, Options, filters};
use crate::policy::{Profile, landlock};
use crate::stage::limit::{OomScore, WORKLOAD_OOM_SCORE};
use crate::sys::process::{CloneArguments, Cloned, clone3, exit_now, reset_signals, set_affinity};
use crate::sys::socket::{receive, send};

/// Opens the ruleset while this process may still look around.
pub(super) fn prepare_landlock(profile: Profile) -> Result<Option<landlock::Prepared>, SpawnStepError> {
    if landlock::kernel_abi().is_none() {
        return Ok(None);
    }
    match landlock::prepare(profile, Path::new("/")) {
        Ok(prepared) if prepared.achieved().not_applied.is_some() => Ok(None),
        Ok(prepared) => Ok(Some(prepared)),
        Err(error) => Err(SpawnStepError { step: error.to_string(), source: Errno::EPERM }),
    }
}

/// Runs until process 1 is gone.
pub(super) fn run(socket: OwnedFd, landlock: Option<landlock::Prepared>, confinement: Confinement) {
    // Before any process of the workload exists: the own score can be opened only while this process is dumpable.
    let score = nix::sys::prctl::set_dumpable(true).ok().map(|()| OomScore::open());
    let hidden = nix::sys::prctl::set_dumpable(false);
    let failure = prepare(landlock, &confinement)
        .and_then(|()| hidden.map_err(SpawnStepError::new("protect the spawner's memory")))
        .err();
    let answer = match &failure {
        // Not empty: an empty packet is the end of a connection.
        None => Answer { pid: 1, ..Answer::default() },
        Some(error) => Answer { pid: 0, errno: error.source as i32, step: error.step.clone() },
    };
    if send(&socket, &answer.encode_to_vec(), &[]).is_err() || failure.is_some() {
        return;
    }
    // Compiled once; every spare inherits the memory.
    let options = Options { profile: confinement.profile, shared_identity: confinement.single_id };
    let programs = filters(Arch::NATIVE, &options);
    loop {
        match receive(&socket, PACKET_BYTES) {
            Ok(Some(packet)) if packet.bytes == ORDER => {
                let slot = packet.descriptors.into_iter().next();
                serve(&socket, slot.as_ref(), &confinement, &programs, score.as_ref());
            }
            Err(Errno::EINTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

fn prepare(landlock: Option<landlock::Prepared>, confinement: &Confinement) -> Result<(), SpawnStepError> {
    reset_signals();
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    if !confinement.processors.is_empty() {
        set_affinity(&confinement.processors).map_err(SpawnStepError::new("bind the workload to its processors"))?;
    }
    if let Some(prepared) = landlock {
        prepared.restrict_self().map_err(|error| SpawnStepError { step: error.to_string(), source: Errno::EPERM })?;
    }
    Ok(())
}

fn serve(
    socket: &OwnedFd,
    slot: Option<&OwnedFd>,
    confinement: &Confinement,
    programs: &[BpfProgram; 2],
    score: Option<&OomScore>,
) {
    let answer = |answer: &Answer, descriptors: &[i32]| {
        // Process 1 is gone when this fails, and then so is this process.
        let _ = send(socket, &answer.encode_to_vec(), descriptors);
    };
    let failed = |step: &str, errno: Errno| Answer { pid: 0, errno: errno as i32, step: step.to_owned() };
    let (ours, theirs) = match socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC) {
        Ok(pair) => pair,
        Err(errno) => return answer(&failed("make the spare's socket", errno), &[]),
    };
    let flags = u64::try_from(libc::CLONE_PARENT).unwrap_or_default();
    // When memory is short the kernel takes a process of the workload before the spawner and process 1.
    let set_score = |value| score.map_or((), |score| score.set(value));
    set_score(WORKLOAD_OOM_SCORE);
    let cloned =
        clone3(&CloneArguments { flags, exit_signal: 0, cgroup: slot.map(AsFd::as_fd), ..CloneArguments::default() });
    if !matches!(cloned, Ok(Cloned::Child)) {
        set_score(0);
    }
    match cloned {
        Ok(Cloned::Child) => {
            drop(ours);
            child::run(theirs, confinement, programs);
            exit_now(127)
        }
        Ok(Cloned::Parent { pid, pidfd }) => {
            answer(&Answer { pid: pid.as_raw(), ..Answer::default() }, &[pidfd.as_raw_fd(), ours.as_raw_fd()]);
        }
        Err(errno) => answer(&failed("make a process", errno), &[]),
    }
}
