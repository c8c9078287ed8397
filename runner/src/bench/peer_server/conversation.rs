//! Peers that stay: one process answers a line after the other.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use super::Failure;
use super::timing::microseconds;

/// A program that answers lines.
pub(super) struct Conversation {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Conversation {
    pub(super) fn start(command: &mut Command) -> Result<Self, Failure> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
        let (input, output) = (child.stdin.take(), child.stdout.take().ok_or("no pipe")?);
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Microseconds from the question to the line that `is_last`, and that line.
    pub(super) fn ask(&mut self, question: &str, is_last: impl Fn(&str) -> bool) -> Result<(f64, String), Failure> {
        let start = Instant::now();
        let input = self.input.as_mut().ok_or("no pipe")?;
        input.write_all(question.as_bytes()).map_err(|error| error.to_string())?;
        let mut line = String::new();
        loop {
            line.clear();
            match self.output.read_line(&mut line) {
                Ok(0) => return Err("the program has ended".to_owned()),
                Ok(_) if is_last(&line) => return Ok((microseconds(start), line)),
                Ok(_) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        // All kinds end with their input.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// The process that serves the SDK's tools, after it has imported them.
pub(super) fn sdk(command: &[OsString]) -> Result<Conversation, Failure> {
    let mut sdk = Conversation::start(Command::new(&command[0]).args(&command[1..]))?;
    let (_, line) = sdk.ask("", |_| true)?;
    numbers(&line).map(|_| sdk)
}

/// The numbers after `ok`; anything else is a failure.
pub(super) fn numbers(line: &str) -> Result<Vec<f64>, Failure> {
    let values = line.strip_prefix("ok").ok_or_else(|| line.trim().to_owned())?;
    values.split_ascii_whitespace().map(|word| word.parse().map_err(|_| line.trim().to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_are_not_numbers_are_failures() {
        assert_eq!(numbers("ok 1.5 2\n"), Ok(vec![1.5, 2.0]));
        assert_eq!(numbers("error ImportError: x\n"), Err("error ImportError: x".to_owned()));
        assert_eq!(numbers("ok many\n"), Err("ok many".to_owned()));
    }
}
