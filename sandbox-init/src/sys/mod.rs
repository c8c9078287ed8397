//! THE ONLY UNSAFE CODE: raw system calls that nix does not wrap, each behind a safe function.
//!
//! Rules of this module: no policy, no path decisions, no loops over input. A function here takes typed values, makes one
//! system call (or one that needs a buffer of its own), and returns what the kernel said.
#![allow(unsafe_code, reason = "raw system calls")]

pub mod capability;
pub mod child;
pub mod landlock;
pub mod mount;
pub mod network;
pub mod process;
pub mod seccomp;
pub mod socket;
pub mod terminal;
