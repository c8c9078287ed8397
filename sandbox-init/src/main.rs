//! Picks the role by the first argument; nothing else.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;

use sandbox_init::{launcher, stage};

/// What trying again may heal.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    let arguments: Vec<CString> =
        std::env::args_os().skip(1).filter_map(|argument| CString::new(argument.into_vec()).ok()).collect();
    let role = arguments.first().map(|role| role.as_bytes());
    let rest = arguments.get(1..).unwrap_or_default();
    let result = match role {
        Some(b"launcher") => launcher::start::main(rest).map(|()| 0),
        Some(b"init") => stage::main().map_err(|message| (message, FAILED)),
        Some(b"nested") => stage::nested::main().map_err(|message| (message, FAILED)),
        _ => Err(("this program is started by sandbox-runner; roles: launcher, init".to_owned(), FAILED)),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err((message, code)) => {
            use std::io::Write;
            // There is nobody left to tell when standard error is closed.
            let _ = writeln!(std::io::stderr(), "sandbox-init: {message}");
            ExitCode::from(code)
        }
    }
}
