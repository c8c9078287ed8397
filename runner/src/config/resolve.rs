//! From what the operator typed to a configuration that holds, or to every reason why it does not. Pure.

mod claude;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustls_pki_types::ServerName;

use super::file::{ConfigFile, IdleSection, LimitsSection, OrchestratorSection, PressureSection};
use super::problem::Problem;
use super::resolved::{Capacity, CertificateFiles, Config, Host, Idle, Orchestrator, Pressure, SandboxDefaults};
use crate::sandbox::receipt::Tier;
use crate::work::RunnerId;

pub use claude::{Given, GivenError, LONGEST_ENVIRONMENT_ID, handed_on};

/// As long as the longest time that a session may ask for.
const LONGEST_IDLE_SECONDS: u64 = 30 * 24 * 3600;
const SYSTEM_STATE: &str = "/var/lib/sandbox-runner";
const SYSTEM_RUN: &str = "/run/sandbox-runner";

/// Checks `file`, which was read from `path`, against this host.
///
/// # Errors
/// Every problem found, at least one.
pub fn resolve(path: &Path, file: &ConfigFile, host: &Host) -> Result<Config, Vec<Problem>> {
    let mut check = Check { path, problems: Vec::new() };
    let orchestrator = file.orchestrator.as_ref().and_then(|section| check.orchestrator(section));
    let runner_id = check.runner_id(file.runner.id.as_deref(), &host.hostname);
    check.labels(&file.runner.labels);
    let state_directory =
        check.directory("runner.state_directory", file.runner.state_directory.as_deref(), SYSTEM_STATE);
    let run_directory = check.directory("runner.run_directory", file.runner.run_directory.as_deref(), SYSTEM_RUN);
    let launcher_socket = file.runner.launcher_socket.as_deref();
    let launcher_socket = launcher_socket.and_then(|path| check.absolute("runner.launcher_socket", path));
    let min_tier = check.tier(file.runner.min_tier.as_deref());
    let sandbox = check.sandbox_defaults(&file.limits, host);
    let capacity = check.capacity(&file.limits, host, sandbox);
    let claude = claude::resolve(&mut check, &file.claude, host, capacity.max_sessions);
    let idle = check.idle(&file.idle);
    let pressure = check.pressure(&file.pressure);
    let config = Config {
        orchestrator,
        claude,
        runner_id,
        runner_id_is_given: file.runner.id.is_some(),
        labels: file.runner.labels.clone(),
        state_directory,
        run_directory,
        launcher_socket,
        min_tier,
        sandbox,
        capacity,
        idle,
        pressure,
        log_format: file.log.format.unwrap_or_default(),
        log_level: file.log.level.unwrap_or_default(),
    };
    if check.problems.is_empty() { Ok(config) } else { Err(check.problems) }
}

struct Check<'a> {
    path: &'a Path,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn report(&mut self, key: &str, what: impl Into<String>, fix: impl Into<String>) {
        let problem = Problem { file: self.path.to_path_buf(), key: key.into(), what: what.into(), fix: fix.into() };
        self.problems.push(problem);
    }

    fn orchestrator(&mut self, section: &OrchestratorSection) -> Option<Orchestrator> {
        let endpoint = self.required("orchestrator.endpoint", section.endpoint.clone())?;
        let host = url_host(&endpoint, "https://");
        if host.is_none() {
            let what = format!("{endpoint:?} is not https://HOST:PORT");
            self.report("orchestrator.endpoint", what, "write for example \"https://orchestrator.example:443\"");
        }
        let proxy = section.proxy.clone();
        self.proxy("orchestrator.proxy", proxy.as_deref());
        let files = self.certificate_files(section);
        let first = section.reconnect_first_ms.unwrap_or(500);
        let most = section.reconnect_most_ms.unwrap_or(first.max(30_000));
        for (key, value) in [("orchestrator.reconnect_first_ms", first), ("orchestrator.reconnect_most_ms", most)] {
            if !(1..=3_600_000).contains(&value) {
                self.report(key, format!("{value} is no useful time"), "write 1 to 3600000");
            }
        }
        if most < first {
            let what = format!("{most} is less than orchestrator.reconnect_first_ms, which is {first}");
            self.report("orchestrator.reconnect_most_ms", what, "write the larger of the two here");
        }
        let server_name = section.server_name.clone().or(host)?;
        if ServerName::try_from(server_name.as_str()).is_err() {
            let what = format!("{server_name:?} is neither a host name nor an address");
            self.report("orchestrator.server_name", what, "write the name that the orchestrator's certificate has");
        }
        Some(Orchestrator { endpoint, files, server_name, proxy, reconnect_first_ms: first, reconnect_most_ms: most })
    }

    /// All three, or none.
    fn certificate_files(&mut self, section: &OrchestratorSection) -> Option<CertificateFiles> {
        let given = [&section.ca_file, &section.certificate_file, &section.key_file];
        if given.iter().all(|path| path.is_none()) {
            return None;
        }
        let names = ["orchestrator.ca_file", "orchestrator.certificate_file", "orchestrator.key_file"];
        for (key, _) in names.iter().zip(given).filter(|(_, path)| path.is_none()) {
            self.report(
                key,
                "is missing",
                "add it, or remove the other two to use what sandbox-runner enroll has stored",
            );
        }
        let [ca, certificate, key] = [0, 1, 2].map(|part| self.absolute(names[part], given[part].as_deref()?));
        Some(CertificateFiles { ca_file: ca?, certificate_file: certificate?, key_file: key? })
    }

    /// Its text may hold a password, so no problem repeats it.
    fn proxy(&mut self, key: &str, given: Option<&str>) {
        if given.is_some_and(|proxy| !is_proxy(proxy)) {
            let fix = "write for example \"http://proxy.example:3128\"";
            self.report(key, "is not http://[USER:PASSWORD@]HOST:PORT", fix);
        }
    }

    fn required<T>(&mut self, key: &str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.report(key, "is missing", "add it, or remove the whole section");
        }
        value
    }

    fn absolute(&mut self, key: &str, path: &Path) -> Option<PathBuf> {
        if path.is_absolute() {
            return Some(path.to_path_buf());
        }
        self.report(
            key,
            format!("{} is a relative path", path.display()),
            "write an absolute path, which starts with /",
        );
        None
    }

    fn directory(&mut self, key: &str, value: Option<&Path>, default: &str) -> PathBuf {
        value.and_then(|path| self.absolute(key, path)).unwrap_or_else(|| PathBuf::from(default))
    }

    fn runner_id(&mut self, given: Option<&str>, hostname: &str) -> String {
        let id = given.unwrap_or(hostname);
        if let Err(error) = RunnerId::new(id) {
            self.report("runner.id", error.to_string(), "write a name of [A-Za-z0-9_.:-]");
        }
        id.to_owned()
    }

    fn labels(&mut self, labels: &BTreeMap<String, String>) {
        for (name, value) in labels {
            if name.is_empty() || name.len() > 63 || value.len() > 253 {
                let key = format!("runner.labels.{name}");
                self.report(&key, "is too long or has no name", "use at most 63 characters of name and 253 of value");
            }
        }
    }

    fn tier(&mut self, given: Option<&str>) -> String {
        let text = given.unwrap_or(Tier::Full.as_str());
        if let Err(problem) = text.parse::<Tier>() {
            self.report("runner.min_tier", problem, "run sandbox-runner doctor to see what this host reaches");
        }
        text.to_owned()
    }

    fn sandbox_defaults(&mut self, limits: &LimitsSection, host: &Host) -> SandboxDefaults {
        let processors = host.size.processors.max(1) * 1000;
        let memory = (host.size.memory_bytes / 4).clamp(256 << 20, 2 << 30);
        SandboxDefaults {
            memory_bytes: self.at_least("limits.sandbox_memory_bytes", limits.sandbox_memory_bytes, memory, 16 << 20),
            cpu_millis: self.at_least("limits.sandbox_cpu_millis", limits.sandbox_cpu_millis, processors.min(2000), 10),
            pids: self.at_least("limits.sandbox_pids", limits.sandbox_pids, 1024, 16),
            disk_bytes: self.at_least("limits.sandbox_disk_bytes", limits.sandbox_disk_bytes, 4 << 30, 1 << 20),
        }
    }

    fn idle(&mut self, section: &IdleSection) -> Idle {
        let IdleSection { freeze_after_seconds, stop_after_seconds, end_after_seconds } = *section;
        let times = [
            ("idle.freeze_after_seconds", freeze_after_seconds),
            ("idle.stop_after_seconds", stop_after_seconds),
            ("idle.end_after_seconds", end_after_seconds),
        ];
        for (key, value) in times {
            if value.is_some_and(|seconds| !(1..=LONGEST_IDLE_SECONDS).contains(&seconds)) {
                let fix = format!("write 1 to {LONGEST_IDLE_SECONDS}, or leave it out for never");
                self.report(key, "is no useful time", fix);
            }
        }
        // Each with the one before it that is there.
        let given: Vec<_> = times.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
        for pair in given.windows(2) {
            if let [(before, sooner), (key, later)] = pair
                && later <= sooner
            {
                let what = format!("{later} is not more than {before}, which is {sooner}");
                self.report(key, what, "write the larger of the two here, or leave the other out");
            }
        }
        Idle { freeze_after_seconds, stop_after_seconds, end_after_seconds }
    }

    fn pressure(&mut self, section: &PressureSection) -> Pressure {
        let PressureSection { disk_low_bytes, disk_critical_bytes, .. } = *section;
        if let (Some(low), Some(critical)) = (disk_low_bytes, disk_critical_bytes)
            && critical > low
        {
            let what = format!("{critical} is more than pressure.disk_low_bytes, which is {low}");
            self.report("pressure.disk_critical_bytes", what, "write the smaller of the two here");
        }
        Pressure {
            disk_low_bytes,
            disk_critical_bytes,
            memory_stall_percent: self.percent("pressure.memory_stall_percent", section.memory_stall_percent, 20),
            io_stall_percent: self.percent("pressure.io_stall_percent", section.io_stall_percent, 80),
            // A host whose processors are all in use may be just that: in use.
            cpu_stall_percent: self.percent("pressure.cpu_stall_percent", section.cpu_stall_percent, 0),
        }
    }

    fn percent(&mut self, key: &str, given: Option<u64>, default: u64) -> u64 {
        let value = given.unwrap_or(default);
        if value > 100 {
            self.report(key, format!("{value} is more than all of the time"), "write 1 to 100, or 0 for never");
        }
        value
    }

    fn at_least(&mut self, key: &str, given: Option<u64>, default: u64, least: u64) -> u64 {
        let value = given.unwrap_or(default);
        if value < least {
            self.report(key, format!("{value} is too little for a sandbox"), format!("write at least {least}"));
        }
        value
    }

    fn capacity(&mut self, limits: &LimitsSection, host: &Host, sandbox: SandboxDefaults) -> Capacity {
        let reserve_memory = limits.host_reserve_memory_bytes.unwrap_or((host.size.memory_bytes / 10).max(256 << 20));
        let reserve_disk = limits.host_reserve_disk_bytes.unwrap_or((host.free_disk_bytes / 10).max(1 << 30));
        let reserve_pids = limits.host_reserve_pids.unwrap_or(2048);
        let capacity = Capacity {
            max_sessions: limits.max_sessions.unwrap_or(64),
            memory_bytes: host.size.memory_bytes.saturating_sub(reserve_memory),
            disk_bytes: host.free_disk_bytes.saturating_sub(reserve_disk),
            pids: host.pids.saturating_sub(reserve_pids),
        };
        if capacity.max_sessions == 0 {
            self.report("limits.max_sessions", "0 sessions can do nothing", "write at least 1");
        }
        // Only what was written down is a mistake; a small or full host is a fact that doctor reports.
        if limits.sandbox_memory_bytes.is_some() && sandbox.memory_bytes > capacity.memory_bytes {
            let what =
                format!("{} is more than the {} left for sandboxes", sandbox.memory_bytes, capacity.memory_bytes);
            self.report("limits.sandbox_memory_bytes", what, "lower it, or lower limits.host_reserve_memory_bytes");
        }
        capacity
    }
}

fn is_proxy(text: &str) -> bool {
    let address = text.strip_prefix("http://").map(|rest| rest.rsplit_once('@').map_or(rest, |(_, address)| address));
    address.is_some_and(|address| url_host(&format!("http://{address}"), "http://").is_some())
}

/// Host of `scheme` + host + optional port, nothing behind it.
fn url_host(url: &str, scheme: &str) -> Option<String> {
    let authority = url.strip_prefix(scheme)?;
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            (host, rest.strip_prefix(':').or(rest.is_empty().then_some("443"))?)
        }
        None => authority.split_once(':').unwrap_or((authority, "443")),
    };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'_');
    let good = !host.is_empty() && host.bytes().all(allowed) && port.parse::<u16>().is_ok_and(|port| port != 0);
    good.then(|| host.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::launcher_policy::HostSize;

    fn host() -> Host {
        Host {
            size: HostSize { memory_bytes: 16 << 30, processors: 4 },
            free_disk_bytes: 100 << 30,
            pids: 32_768,
            hostname: "machine-7".into(),
            credentials_directory: Some("/run/credentials/u".into()),
        }
    }

    pub(crate) fn resolved(text: &str) -> Result<Config, Vec<String>> {
        let path = Path::new("c.toml");
        let file = ConfigFile::parse(path, text).expect("readable");
        resolve(path, &file, &host()).map_err(|problems| problems.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn empty_file_gives_the_documented_defaults() {
        let config = resolved("").expect("good");

        assert_eq!(config.runner_id, "machine-7");
        assert_eq!(config.min_tier, "full");
        assert_eq!(config.state_directory, Path::new(SYSTEM_STATE));
        assert_eq!(config.capacity.memory_bytes, (16 << 30) - (16 << 30) / 10);
        assert!(config.orchestrator.is_none());
    }

    #[test]
    fn every_problem_is_collected_and_says_what_to_write() {
        let problems = resolved(
            "[orchestrator]\nendpoint = \"http://o\"\nca_file = \"ca.pem\"\nproxy = \"p:1\"\n[runner]\nid = \"a b\"\n\
             state_directory = \"state\"\nmin_tier = \"best\"\n[limits]\nmax_sessions = 0\nsandbox_pids = 1\n",
        )
        .expect_err("problems");

        let expected = [
            "orchestrator.endpoint: \"http://o\" is not https://HOST:PORT",
            "orchestrator.proxy: is not http://[USER:PASSWORD@]HOST:PORT",
            "orchestrator.ca_file: ca.pem is a relative path; write an absolute path",
            "orchestrator.certificate_file: is missing",
            "orchestrator.key_file: is missing",
            "runner.id: runner_id contains ' '",
            "runner.state_directory: state is a relative path",
            "runner.min_tier: \"best\" is not a tier",
            "limits.max_sessions: 0 sessions can do nothing",
            "limits.sandbox_pids: 1 is too little",
        ];
        for text in expected {
            assert!(problems.iter().any(|problem| problem.contains(text)), "{text} not in {problems:#?}");
        }
        assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    }

    #[test]
    fn times_to_connect_again_are_checked_against_each_other() {
        let files = "ca_file = \"/c\"\ncertificate_file = \"/d\"\nkey_file = \"/k\"\n";
        let with = |more: &str| resolved(&format!("[orchestrator]\nendpoint = \"https://o\"\n{files}{more}"));

        let orchestrator = with("").expect("good").orchestrator.expect("a section");
        assert_eq!((orchestrator.reconnect_first_ms, orchestrator.reconnect_most_ms), (500, 30_000));

        let problems = with("reconnect_first_ms = 0\nreconnect_most_ms = 9999999\n").expect_err("problems");
        assert!(problems.iter().any(|p| p.contains("orchestrator.reconnect_first_ms: 0 is no useful time; write 1")));
        assert!(problems.iter().any(|p| p.contains("orchestrator.reconnect_most_ms: 9999999 is no useful time")));
        let problems = with("reconnect_first_ms = 20\nreconnect_most_ms = 10\n").expect_err("problems");
        assert!(problems[0].contains("10 is less than orchestrator.reconnect_first_ms"), "{problems:?}");
    }

    #[test]
    fn times_of_idle_sessions_are_checked_against_each_other() {
        let idle =
            |freeze, stop, end| Idle { freeze_after_seconds: freeze, stop_after_seconds: stop, end_after_seconds: end };
        let config = resolved("[idle]\nfreeze_after_seconds = 60\nend_after_seconds = 3600\n").expect("good");
        assert_eq!(config.idle, idle(Some(60), None, Some(3600)));
        let config = resolved("[idle]\nstop_after_seconds = 60\n").expect("good");
        assert_eq!(config.idle, idle(None, Some(60), None));
        assert_eq!(resolved("").expect("good").idle, idle(None, None, None));

        let problems =
            resolved("[idle]\nfreeze_after_seconds = 0\nend_after_seconds = 9999999\n").expect_err("problems");
        assert!(problems[0].contains("idle.freeze_after_seconds: is no useful time; write 1"), "{problems:?}");
        assert!(problems[1].contains("idle.end_after_seconds: is no useful time"), "{problems:?}");
        let problems = resolved("[idle]\nfreeze_after_seconds = 60\nend_after_seconds = 60\n").expect_err("problems");
        assert!(problems[0].contains("60 is not more than idle.freeze_after_seconds"), "{problems:?}");
        let text = "[idle]\nfreeze_after_seconds = 9\nstop_after_seconds = 9\nend_after_seconds = 8\n";
        let problems = resolved(text).expect_err("problems");
        assert!(problems[0].contains("idle.stop_after_seconds: 9 is not more than idle.freeze_after"), "{problems:?}");
        assert!(problems[1].contains("idle.end_after_seconds: 8 is not more than idle.stop_after"), "{problems:?}");
    }

    #[test]
    fn marks_of_pressure_are_checked_and_have_defaults() {
        let pressure = resolved("").expect("good").pressure;
        assert_eq!((pressure.memory_stall_percent, pressure.io_stall_percent, pressure.cpu_stall_percent), (20, 80, 0));
        assert_eq!((pressure.disk_low_bytes, pressure.disk_critical_bytes), (None, None));

        let problems =
            resolved("[pressure]\ndisk_low_bytes = 1\ndisk_critical_bytes = 2\nmemory_stall_percent = 101\n")
                .expect_err("problems");
        assert!(problems[0].contains("pressure.disk_critical_bytes: 2 is more than"), "{problems:?}");
        assert!(problems[1].contains("pressure.memory_stall_percent: 101 is more than all"), "{problems:?}");
    }

    #[test]
    fn without_certificate_files_it_is_the_stored_identity_and_some_of_them_are_a_mistake() {
        let text = "[orchestrator]\nendpoint = \"https://o\"\n";
        assert_eq!(resolved(text).expect("good").orchestrator.expect("a section").files, None);

        let problems = resolved(&format!("{text}key_file = \"/k\"\n")).expect_err("problems");
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(
            problems[0].contains("orchestrator.ca_file: is missing; add it, or remove the other two"),
            "{problems:?}"
        );
    }

    #[test]
    fn server_name_defaults_to_the_host_of_the_endpoint() {
        let files = "ca_file = \"/c\"\ncertificate_file = \"/d\"\nkey_file = \"/k\"\n";
        let config =
            resolved(&format!("[orchestrator]\nendpoint = \"https://o.example:8443\"\n{files}")).expect("good");

        assert_eq!(config.orchestrator.map(|orchestrator| orchestrator.server_name).as_deref(), Some("o.example"));
    }

    #[test]
    fn server_names_that_no_certificate_can_have_are_refused() {
        let with = |more: &str| resolved(&format!("[orchestrator]\nendpoint = \"https://o\"\n{more}"));
        for good in ["o.example", "10.0.0.1", "::1", "a_b"] {
            assert!(with(&format!("server_name = {good:?}\n")).is_ok(), "{good}");
        }
        for bad in ["two words", "", "a..b", "https://o"] {
            let problems = with(&format!("server_name = {bad:?}\n")).expect_err("problems");
            let expected = format!("orchestrator.server_name: {bad:?} is neither a host name nor an address; write");
            assert!(problems[0].contains(&expected), "{problems:?}");
        }
        let problems = resolved("[orchestrator]\nendpoint = \"https://a..b\"\n").expect_err("problems");
        assert!(problems[0].contains("orchestrator.server_name: \"a..b\""), "{problems:?}");
    }

    #[test]
    fn password_of_a_proxy_of_the_link_is_taken_and_not_shown() {
        let with = |proxy: &str| resolved(&format!("[orchestrator]\nendpoint = \"https://o\"\nproxy = {proxy:?}\n"));
        let config = with("http://u:hunter2@p:1").expect("good");
        let shown = toml::to_string(&config).expect("a text");
        assert!(shown.contains("http://...@p:1") && !shown.contains("hunter2"), "{shown}");
        let orchestrator = config.orchestrator.expect("a section");
        assert_eq!(orchestrator.proxy.as_deref(), Some("http://u:hunter2@p:1"));
        let problems = with("http://u:hunter2@").expect_err("problems");
        assert!(problems[0].contains("orchestrator.proxy: is not http://[USER:PASSWORD@]HOST:PORT"), "{problems:?}");
        assert!(!problems[0].contains("hunter2"), "{problems:?}");
    }

    #[test]
    fn hosts_are_taken_from_urls_and_nothing_else_is() {
        let cases = [
            ("https://a", Some("a")),
            ("https://a/", Some("a")),
            ("https://a:1", Some("a")),
            ("https://[::1]:1", Some("::1")),
            ("https://[::1]", Some("::1")),
            ("https://", None),
            ("https://a:0", None),
            ("https://a:99999", None),
            ("https://a/b", None),
            ("https://u@a", None),
            ("http://a", None),
        ];
        for (url, expected) in cases {
            assert_eq!(url_host(url, "https://").as_deref(), expected, "{url}");
        }
    }

    #[test]
    fn sandbox_larger_than_what_is_left_of_the_host_is_refused_when_written_down() {
        let problems = resolved("[limits]\nsandbox_memory_bytes = 99999999999\n").expect_err("problems");

        assert!(problems[0].contains("is more than the"), "{problems:?}");
    }
}
