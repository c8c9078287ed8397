//! Promise 1, isolation: every attack of the catalogue through the shipped command, as root and as an ordinary user, and
//! for every layer the proof that the same attack works without it.
#![forbid(unsafe_code)]

mod attacks;
mod calls;
mod controls;
mod expectations;
mod inheritance;
mod neighbours;
mod outside;
mod peers;
mod resources;
mod table;
