//! Logs to standard error, as text for people or JSON for collectors.
//!
//! Standard output belongs to data. Tool input, file contents, environment values and credentials never reach a log line;
//! the types that carry them refuse to be shown.

mod counters;

use std::fmt;
use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;

pub use counters::Counters;

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Least important kind of line that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// An operator must act.
    Error,
    /// Unexpected and handled.
    Warn,
    /// Life cycle.
    #[default]
    Info,
    /// One decision.
    Debug,
    /// One frame.
    Trace,
}

/// Starts logging for the whole process. A second call is ignored, so that tests may share a process.
pub fn start(format: LogFormat, level: LogLevel) {
    // Libraries are quieter than we are: their debug lines show addresses and headers.
    let filter = EnvFilter::new(format!("warn,runner={level},sandbox_runner={level}"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    let _ = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}

impl fmt::Display for LogLevel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        })
    }
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace]
            .into_iter()
            .find(|level| level.to_string() == text)
            .ok_or_else(|| format!("{text:?} is not a level: write error, warn, info, debug or trace"))
    }
}
