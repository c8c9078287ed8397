//! What the operator typed: `config.toml`, read whole, with every problem and not only the first.
//!
//! An unknown key, a value of the wrong type and a syntax error are problems with file, key, what is wrong and what to
//! write instead. Nothing is interpreted here; that is `resolve`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::Table;

use super::problem::Problem;
use super::reader::Reader;
use crate::telemetry::{LogFormat, LogLevel};

/// The whole file. Absent keys are `None`, so that defaults are decided in one place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigFile {
    /// Where work comes from; absent for a runner that only serves local commands.
    pub orchestrator: Option<OrchestratorSection>,
    /// Work queues of Claude Managed Agents, one section for each environment.
    pub claude: Vec<ClaudeSection>,
    /// The runner itself.
    pub runner: RunnerSection,
    /// What sandboxes may use.
    pub limits: LimitsSection,
    /// Sessions without calls.
    pub idle: IdleSection,
    /// When the host is short of something.
    pub pressure: PressureSection,
    /// Logs.
    pub log: LogSection,
}

/// `[orchestrator]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrchestratorSection {
    /// `https://host:port`.
    pub endpoint: Option<String>,
    /// PEM file with the authorities that may sign the orchestrator's certificate.
    pub ca_file: Option<PathBuf>,
    /// PEM file with our certificate chain.
    pub certificate_file: Option<PathBuf>,
    /// PEM file with our private key.
    pub key_file: Option<PathBuf>,
    /// Name the certificate must have, when it is not the host of the endpoint.
    pub server_name: Option<String>,
    /// `http://host:port` of a proxy for CONNECT.
    pub proxy: Option<String>,
    /// Longest wait before the first attempt to connect again, in milliseconds; doubled with each failure.
    pub reconnect_first_ms: Option<u64>,
    /// Longest wait before any attempt to connect again, in milliseconds.
    pub reconnect_most_ms: Option<u64>,
}

/// `[[claude]]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClaudeSection {
    /// The environment whose queue is served.
    pub environment_id: Option<String>,
    /// File with the environment's key.
    pub key_file: Option<PathBuf>,
    /// Name of a credential of the service manager that holds the key.
    pub key_credential: Option<String>,
    /// `https://host:port/prefix`.
    pub base_url: Option<String>,
    /// Whether the base URL may be `http://`.
    pub allow_plain_http: Option<bool>,
    /// PEM file with the only authorities that may sign the server's certificate; public ones when absent.
    pub ca_file: Option<PathBuf>,
    /// `http://host:port` of a proxy for CONNECT.
    pub proxy: Option<String>,
    /// Value of the header `anthropic-version`.
    pub api_version: Option<String>,
    /// Value of the header `anthropic-workspace-id`; not sent when absent.
    pub workspace_id: Option<String>,
    /// What stands between the base URL and `/environments` or `/sessions`.
    pub api_path: Option<String>,
    /// Name of the header that says who asks for work.
    pub worker_id_header: Option<String>,
    /// Work items at once.
    pub max_sessions: Option<u64>,
    /// Seconds after the end of a turn until the work item is given back; 0: never.
    pub max_idle_seconds: Option<u64>,
    /// Seconds for which a work item is held whose session waits for somebody else; 0: for ever.
    pub max_wait_seconds: Option<u64>,
    /// Whether tool uses of different threads of a session run beside each other.
    pub parallel_threads: Option<bool>,
    /// Seconds for which the sandbox of a session is kept after its work item.
    pub keep_seconds: Option<u64>,
    /// Longest time in seconds that a command may ask for.
    pub max_command_seconds: Option<u64>,
}

/// `[runner]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunnerSection {
    /// Name of this runner; when absent that of its certificate, and without one the host name.
    pub id: Option<String>,
    /// Labels that placement may ask for.
    pub labels: BTreeMap<String, String>,
    /// What outlives a boot.
    pub state_directory: Option<PathBuf>,
    /// Sockets.
    pub run_directory: Option<PathBuf>,
    /// Socket of a launcher that runs on its own; without it the runner starts one.
    pub launcher_socket: Option<PathBuf>,
    /// Weakest isolation under which work is accepted.
    pub min_tier: Option<String>,
}

/// `[limits]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LimitsSection {
    /// Sessions at once.
    pub max_sessions: Option<u64>,
    /// Memory of a sandbox that asks for none.
    pub sandbox_memory_bytes: Option<u64>,
    /// Thousandths of a processor of a sandbox that asks for none.
    pub sandbox_cpu_millis: Option<u64>,
    /// Processes of a sandbox that asks for none.
    pub sandbox_pids: Option<u64>,
    /// Disk space of a sandbox that asks for none.
    pub sandbox_disk_bytes: Option<u64>,
    /// Memory that is never given to sandboxes.
    pub host_reserve_memory_bytes: Option<u64>,
    /// Disk space that is never given to sandboxes.
    pub host_reserve_disk_bytes: Option<u64>,
    /// Processes that are never given to sandboxes.
    pub host_reserve_pids: Option<u64>,
}

/// `[idle]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdleSection {
    /// Seconds without a call after which the processes of a session are made to stand still.
    pub freeze_after_seconds: Option<u64>,
    /// Seconds without a call after which the processes of a session are ended and its files stay.
    pub stop_after_seconds: Option<u64>,
    /// Seconds without a call after which a session is ended.
    pub end_after_seconds: Option<u64>,
}

/// `[pressure]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PressureSection {
    /// Free bytes of a disk of the runner below which no session is opened; 0: never.
    pub disk_low_bytes: Option<u64>,
    /// Free bytes of a disk of the runner below which no call is taken that may write; 0: never.
    pub disk_critical_bytes: Option<u64>,
    /// Percent of the time in which some process waits for memory, from which on no session is opened; 0: never.
    pub memory_stall_percent: Option<u64>,
    /// Percent of the time in which all processes wait for block devices, from which on no session is opened; 0: never.
    pub io_stall_percent: Option<u64>,
    /// Percent of the time in which some process waits for a processor, from which on no session is opened; 0: never.
    pub cpu_stall_percent: Option<u64>,
}

/// `[log]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogSection {
    /// Form of the lines.
    pub format: Option<LogFormat>,
    /// Least important line written.
    pub level: Option<LogLevel>,
}

const NUMBER: &str = "a whole number that is not negative";

impl ConfigFile {
    /// Reads the text of `file`.
    ///
    /// # Errors
    /// Every problem found, at least one.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Vec<Problem>> {
        match Self::parse_all(file, text) {
            (read, problems) if problems.is_empty() => Ok(read),
            (_, problems) => Err(problems),
        }
    }

    /// Reads the text of `file` as far as possible: what was read, and every problem with the rest.
    pub fn parse_all(file: &Path, text: &str) -> (Self, Vec<Problem>) {
        let mut root = match text.parse::<Table>() {
            Ok(table) => Reader::new(file, "", table),
            Err(error) => {
                let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
                let what = format!("line {line}: {}", error.message());
                let fix = "correct the TOML syntax".to_owned();
                return (Self::default(), vec![Problem { file: file.to_path_buf(), key: String::new(), what, fix }]);
            }
        };
        let read = Self {
            orchestrator: root.section("orchestrator").map(|mut section| {
                let read = OrchestratorSection::read(&mut section);
                root.close(section);
                read
            }),
            claude: root.read_sections("claude", ClaudeSection::read),
            runner: root.read_section("runner", RunnerSection::read),
            limits: root.read_section("limits", LimitsSection::read),
            idle: root.read_section("idle", IdleSection::read),
            pressure: root.read_section("pressure", PressureSection::read),
            log: root.read_section("log", LogSection::read),
        };
        (read, root.finish())
    }
}

impl OrchestratorSection {
    fn read(section: &mut Reader<'_>) -> Self {
        Self {
            endpoint: section.take("endpoint", "a text such as \"https://orchestrator.example:443\""),
            ca_file: section.take("ca_file", "an absolute path"),
            certificate_file: section.take("certificate_file", "an absolute path"),
            key_file: section.take("key_file", "an absolute path"),
            server_name: section.take("server_name", "a host name"),
            proxy: section.take("proxy", "a text such as \"http://proxy.example:3128\""),
            reconnect_first_ms: section.take("reconnect_first_ms", NUMBER),
            reconnect_most_ms: section.take("reconnect_most_ms", NUMBER),
        }
    }
}

impl ClaudeSection {
    fn read(section: &mut Reader<'_>) -> Self {
        Self {
            environment_id: section.take("environment_id", "the id of an environment, such as \"env_01\""),
            key_file: section.take("key_file", "an absolute path"),
            key_credential: section.take("key_credential", "the name of a credential"),
            base_url: section.take("base_url", "a text such as \"https://api.anthropic.com\""),
            allow_plain_http: section.take("allow_plain_http", "true or false"),
            ca_file: section.take("ca_file", "an absolute path"),
            proxy: section.take("proxy", "a text such as \"http://proxy.example:3128\""),
            api_version: section.take("api_version", "a date such as \"2023-06-01\""),
            workspace_id: section.take("workspace_id", "the id of a workspace, such as \"wrkspc_01\""),
            api_path: section.take("api_path", "a path such as \"/v1\""),
            worker_id_header: section.take("worker_id_header", "the name of a header"),
            max_sessions: section.take("max_sessions", NUMBER),
            max_idle_seconds: section.take("max_idle_seconds", NUMBER),
            max_wait_seconds: section.take("max_wait_seconds", NUMBER),
            parallel_threads: section.take("parallel_threads", "true or false"),
            keep_seconds: section.take("keep_seconds", NUMBER),
            max_command_seconds: section.take("max_command_seconds", NUMBER),
        }
    }
}

impl RunnerSection {
    fn read(section: &mut Reader<'_>) -> Self {
        Self {
            id: section.take("id", "a text of at most 128 characters of [A-Za-z0-9_.:-]"),
            labels: section.take("labels", "a table of texts such as { zone = \"a\" }").unwrap_or_default(),
            state_directory: section.take("state_directory", "an absolute path"),
            run_directory: section.take("run_directory", "an absolute path"),
            launcher_socket: section.take("launcher_socket", "an absolute path"),
            min_tier: section.take("min_tier", "full, pod, rootless, nested, provider or none"),
        }
    }
}

impl LimitsSection {
    fn read(section: &mut Reader<'_>) -> Self {
        Self {
            max_sessions: section.take("max_sessions", NUMBER),
            sandbox_memory_bytes: section.take("sandbox_memory_bytes", NUMBER),
            sandbox_cpu_millis: section.take("sandbox_cpu_millis", NUMBER),
            sandbox_pids: section.take("sandbox_pids", NUMBER),
            sandbox_disk_bytes: section.take("sandbox_disk_bytes", NUMBER),
            host_reserve_memory_bytes: section.take("host_reserve_memory_bytes", NUMBER),
            host_reserve_disk_bytes: section.take("host_reserve_disk_bytes", NUMBER),
            host_reserve_pids: section.take("host_reserve_pids", NUMBER),
        }
    }
}

impl IdleSection {
    fn read(section: &mut Reader<'_>) -> Self {
        Self {
            freeze_after_seconds: section.take("freeze_after_seconds", NUMBER),
            stop_after_seconds: section.take("stop_after_seconds", NUMBER),
            end_after_seconds: section.take("end_after_seconds", NUMBER),
        }
    }
}

impl PressureSection {
    fn read(section: &mut Reader<'_>) -> Self {
        Self {
            disk_low_bytes: section.take("disk_low_bytes", NUMBER),
            disk_critical_bytes: section.take("disk_critical_bytes", NUMBER),
            memory_stall_percent: section.take("memory_stall_percent", NUMBER),
            io_stall_percent: section.take("io_stall_percent", NUMBER),
            cpu_stall_percent: section.take("cpu_stall_percent", NUMBER),
        }
    }
}

impl LogSection {
    fn read(section: &mut Reader<'_>) -> Self {
        Self {
            format: section.take("format", "\"text\" or \"json\""),
            level: section.take("level", "\"error\", \"warn\", \"info\", \"debug\" or \"trace\""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        ConfigFile::parse(Path::new("c.toml"), text).expect_err("problems").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_problem_is_reported_not_only_the_first() {
        let found = problems(
            "colour = 1\n[runner]\nidd = \"x\"\nmin_tier = 3\n[limits]\nsandbox_pids = -1\n[log]\nlevel = \"loud\"\n",
        );

        assert_eq!(found.len(), 5, "{found:#?}");
        assert!(found.iter().any(|p| p.contains("runner.idd: is not a known key; did you mean id?")), "{found:#?}");
        assert!(found.iter().any(|p| p.contains("runner.min_tier: this integer is not what belongs here; write full")));
        assert!(found.iter().any(|p| p.contains("limits.sandbox_pids: ") && p.contains("not negative")));
        assert!(found.iter().any(|p| p.contains("log.level: ") && p.contains("\"trace\"")));
        assert!(found.iter().any(|p| p.contains("colour: is not a known key; remove it; known here: orchestrator")));
    }

    #[test]
    fn syntax_errors_name_the_line() {
        assert!(
            problems("[runner]\nid = \n")[0].starts_with("c.toml: line 2: "),
            "{:?}",
            problems("[runner]\nid = \n")
        );
    }

    #[test]
    fn keys_of_a_list_of_sections_are_named_with_their_number() {
        let found = problems("[[claude]]\nkey_file = 3\n[[claude]]\nkey = \"sk\"\n");

        assert!(found.iter().any(|p| p.contains("claude[0].key_file: this integer")), "{found:#?}");
        assert!(found.iter().any(|p| p.contains("claude[1].key: is not a known key")), "{found:#?}");
        assert!(problems("claude = 3")[0].contains("write [[claude]] on a line of its own"));
    }

    #[test]
    fn section_that_is_no_section_is_refused() {
        assert!(problems("runner = 3")[0].contains("write [runner] on a line of its own"));
    }

    #[test]
    fn empty_file_leaves_everything_to_the_defaults() {
        assert_eq!(ConfigFile::parse(Path::new("c.toml"), ""), Ok(ConfigFile::default()));
    }

    #[test]
    fn all_keys_are_read() {
        let text = r#"
            [orchestrator]
            endpoint = "https://o:1"
            ca_file = "/c"
            certificate_file = "/d"
            key_file = "/k"
            server_name = "o"
            proxy = "http://p:1"
            reconnect_first_ms = 20
            reconnect_most_ms = 30
            [[claude]]
            environment_id = "env_1"
            key_file = "/key"
            base_url = "http://c:1/p"
            allow_plain_http = true
            ca_file = "/ca"
            proxy = "http://q:1"
            api_version = "2026-10-21"
            max_sessions = 21
            workspace_id = "wrkspc_1"
            parallel_threads = true
            max_idle_seconds = 22
            max_wait_seconds = 25
            keep_seconds = 23
            max_command_seconds = 24
            [[claude]]
            environment_id = "env_2"
            key_credential = "second"
            [runner]
            id = "r"
            labels = { zone = "a" }
            state_directory = "/s"
            run_directory = "/r"
            launcher_socket = "/r/l"
            min_tier = "pod"
            [limits]
            max_sessions = 1
            sandbox_memory_bytes = 2
            sandbox_cpu_millis = 3
            sandbox_pids = 4
            sandbox_disk_bytes = 5
            host_reserve_memory_bytes = 6
            host_reserve_disk_bytes = 7
            host_reserve_pids = 8
            [idle]
            freeze_after_seconds = 9
            stop_after_seconds = 19
            end_after_seconds = 10
            [pressure]
            disk_low_bytes = 11
            disk_critical_bytes = 12
            memory_stall_percent = 13
            io_stall_percent = 14
            cpu_stall_percent = 15
            [log]
            format = "json"
            level = "debug"
        "#;

        let read = ConfigFile::parse(Path::new("c.toml"), text).expect("good");

        let orchestrator = read.orchestrator.expect("a section");
        assert_eq!(orchestrator.proxy.as_deref(), Some("http://p:1"));
        assert_eq!((orchestrator.reconnect_first_ms, orchestrator.reconnect_most_ms), (Some(20), Some(30)));
        let [first, second] = &read.claude[..] else { panic!("two environments expected") };
        assert_eq!(
            (first.key_file.as_deref(), first.base_url.as_deref()),
            (Some(Path::new("/key")), Some("http://c:1/p"))
        );
        assert_eq!((first.allow_plain_http, first.api_version.as_deref()), (Some(true), Some("2026-10-21")));
        let numbers = [first.max_sessions, first.max_idle_seconds, first.keep_seconds, first.max_command_seconds];
        assert_eq!(numbers, [21, 22, 23, 24].map(Some));
        assert_eq!((first.max_wait_seconds, first.parallel_threads), (Some(25), Some(true)));
        assert_eq!(first.workspace_id.as_deref(), Some("wrkspc_1"));
        assert_eq!(second.key_credential.as_deref(), Some("second"));
        assert_eq!(read.runner.labels["zone"], "a");
        assert_eq!(read.runner.launcher_socket.as_deref(), Some(Path::new("/r/l")));
        assert_eq!(read.limits.host_reserve_pids, Some(8));
        let idle = read.idle;
        let times = [idle.freeze_after_seconds, idle.stop_after_seconds, idle.end_after_seconds];
        assert_eq!(times, [9, 19, 10].map(Some));
        let pressure = read.pressure;
        assert_eq!((pressure.disk_low_bytes, pressure.disk_critical_bytes), (Some(11), Some(12)));
        let stalls = [pressure.memory_stall_percent, pressure.io_stall_percent, pressure.cpu_stall_percent];
        assert_eq!(stalls, [13, 14, 15].map(Some));
        assert_eq!(read.log.format, Some(LogFormat::Json));
    }
}
