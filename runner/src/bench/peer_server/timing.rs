//! What is measured of a process: the time from spawn to a good end, how many a second, memory.

use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::Failure;

/// Creators of a rate.
pub(super) const CREATORS: usize = 2;

pub(super) fn quiet(command: &[OsString]) -> Command {
    let mut quiet = Command::new(&command[0]);
    quiet.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet
}

pub(super) fn microseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}

/// Whether a command works here; if not, what it says about it.
pub(super) fn probe(command: &[OsString]) -> Result<(), Failure> {
    let Err(failure) = run(command) else { return Ok(()) };
    let output = quiet(command).stderr(Stdio::piped()).output().map_err(|_| failure.clone())?;
    let said = String::from_utf8_lossy(&output.stderr);
    Err(said.lines().rev().find(|line| !line.trim().is_empty()).map_or(failure, |last| last.trim().to_owned()))
}

/// Microseconds from spawn to a good end.
pub(super) fn run(command: &[OsString]) -> Result<f64, Failure> {
    let mut prepared = quiet(command);
    let start = Instant::now();
    let status = prepared.status().map_err(|error| format!("{}: {error}", command[0].display()))?;
    let took = microseconds(start);
    if status.success() { Ok(took) } else { Err(format!("{} ended with {status}", command[0].display())) }
}

pub(super) fn rate(command: &[OsString], each: usize) -> Result<f64, Failure> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let creators: Vec<_> =
            (0..CREATORS).map(|_| scope.spawn(|| (0..each).try_for_each(|_| run(command).map(drop)))).collect();
        creators.into_iter().try_for_each(|creator| creator.join().map_err(|_| "a creator failed".to_owned())?)
    })?;
    let count = u32::try_from(each * CREATORS).map_err(|error| error.to_string())?;
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// What is resident of a process, and what of it is private, in KiB.
pub(super) fn memory(pid: u32) -> Result<Vec<f64>, Failure> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let [resident, clean, dirty] = ["Rss:", "Private_Clean:", "Private_Dirty:"].map(|key| kibibytes(&text, key));
    match (resident, clean, dirty) {
        (Some(resident), Some(clean), Some(dirty)) => Ok(vec![resident, clean + dirty]),
        _ => Err(format!("{path} is not what it should be")),
    }
}

fn kibibytes(text: &str, key: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_command_has_no_time() {
        let error = run(&["false".into()]).expect_err("failed");

        assert!(error.contains("false ended with"), "{error}");
    }

    #[test]
    fn memory_of_a_process_is_what_the_kernel_says() {
        let own = memory(std::process::id()).expect("our own");

        assert!(own[0] >= own[1] && own[1] > 0.0, "{own:?}");
        assert_eq!(kibibytes("Rss:    12 kB\nPss: 1 kB\n", "Rss:"), Some(12.0));
    }
}
