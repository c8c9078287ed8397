//! Sections `[[claude]]`: which queues are served, and how they are reached.

use std::path::PathBuf;

use super::{Check, url_host};
use crate::config::file::ClaudeSection;
use crate::config::resolved::{Claude, Host};

/// Where the queue is unless the operator says otherwise.
const PUBLIC_API: &str = "https://api.anthropic.com";
/// The version that all public examples send.
const API_VERSION: &str = "2023-06-01";
/// Where the endpoints are below the base URL.
const API_PATH: &str = "/v1";
/// The header that says who asks for work.
const WORKER_ID_HEADER: &str = "anthropic-worker-id";
/// Headers that say something else.
const TAKEN_HEADERS: [&str; 9] = [
    "accept",
    "anthropic-beta",
    "anthropic-version",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "host",
    "transfer-encoding",
];
/// What the official worker does.
const IDLE_SECONDS: u64 = 60;
const KEEP_SECONDS: u64 = 1800;
const COMMAND_SECONDS: u64 = 3600;
/// Longest id of an environment: with a session's behind it, it is still an id.
pub const LONGEST_ENVIRONMENT_ID: usize = 64;
/// Longest id of a workspace, as of everything else that the server names.
const LONGEST_ID: usize = 128;
const WORKSPACE_FIX: &str = "write the id as the Console shows it, at most 128 of [A-Za-z0-9_-]";
/// Times that the operator may choose; a month is as long as a session may be idle elsewhere.
const LONGEST_SECONDS: u64 = 30 * 24 * 3600;

pub(super) fn resolve(check: &mut Check<'_>, sections: &[ClaudeSection], host: &Host, most: u64) -> Vec<Claude> {
    let mut resolved: Vec<Claude> = Vec::new();
    for (number, section) in sections.iter().enumerate() {
        let key = |name: &str| format!("claude[{number}].{name}");
        let Some(claude) = one(check, &key, section, host, most) else { continue };
        // The id tells the sessions of two queues apart.
        if resolved.iter().any(|other| other.environment_id == claude.environment_id) {
            let what = format!("{} has a section already", claude.environment_id);
            check.report(&key("environment_id"), what, "name each environment once");
        }
        resolved.push(claude);
    }
    resolved
}

/// What was given on a command line or in variables, in place of what a section says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Given<'g> {
    /// Where the server is.
    pub base_url: Option<&'g str>,
    /// Whether that may be `http://`.
    pub allow_plain_http: bool,
    /// Value of the header `anthropic-workspace-id`.
    pub workspace_id: Option<&'g str>,
}

/// Something that was given and does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenError {
    /// Which of them: `base-url` or `workspace-id`, as the flags are called.
    pub name: &'static str,
    /// What is wrong with it.
    pub what: String,
    /// What to do.
    pub fix: String,
}

/// What is in force for an environment whose key comes from elsewhere: its section, where there is one, with what was given in
/// place of what the section says.
///
/// # Errors
/// What is wrong with what was given, and the fix.
pub fn handed_on(sections: &[Claude], environment_id: &str, given: Given<'_>) -> Result<Claude, GivenError> {
    let section = sections.iter().find(|section| section.environment_id == environment_id).cloned();
    let mut claude = section.unwrap_or_else(|| Claude {
        environment_id: environment_id.to_owned(),
        key_file: PathBuf::new(),
        base_url: PUBLIC_API.to_owned(),
        ca_file: None,
        proxy: None,
        api_path: API_PATH.to_owned(),
        api_version: API_VERSION.to_owned(),
        workspace_id: None,
        worker_id_header: WORKER_ID_HEADER.to_owned(),
        max_sessions: 1,
        max_idle_seconds: IDLE_SECONDS,
        max_wait_seconds: 0,
        parallel_threads: false,
        keep_seconds: KEEP_SECONDS,
        max_command_seconds: COMMAND_SECONDS,
    });
    if let Some(url) = given.base_url.filter(|url| !url.is_empty()) {
        claude.base_url = checked_url(url, given.allow_plain_http).map_err(|(what, fix)| GivenError {
            name: "base-url",
            what,
            fix,
        })?;
    }
    if let Some(id) = given.workspace_id.filter(|id| !id.is_empty()) {
        let wrong = || GivenError { name: "workspace-id", what: not_an_id(id), fix: WORKSPACE_FIX.to_owned() };
        claude.workspace_id = Some(Some(id.to_owned()).filter(|id| is_id(id)).ok_or_else(wrong)?);
    }
    Ok(claude)
}

fn one(
    check: &mut Check<'_>,
    key: &dyn Fn(&str) -> String,
    section: &ClaudeSection,
    host: &Host,
    most: u64,
) -> Option<Claude> {
    let environment_id = check.required(&key("environment_id"), section.environment_id.clone());
    let environment_id = environment_id.and_then(|id| environment(check, &key("environment_id"), id));
    let key_file = key_file(check, key, section, host);
    let base_url = base_url(check, key, section);
    let ca_file = section.ca_file.as_deref().and_then(|path| check.absolute(&key("ca_file"), path));
    let proxy = section.proxy.clone();
    check.proxy(&key("proxy"), proxy.as_deref());
    let api_version = section.api_version.clone().unwrap_or_else(|| API_VERSION.to_owned());
    if api_version.is_empty() || !api_version.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        check.report(&key("api_version"), format!("{api_version:?} is no version"), "write for example \"2023-06-01\"");
    }
    let workspace_id = section.workspace_id.clone();
    if let Some(id) = workspace_id.as_deref().filter(|id| !is_id(id)) {
        check.report(&key("workspace_id"), not_an_id(id), WORKSPACE_FIX);
    }
    let api_path = section.api_path.as_deref().unwrap_or(API_PATH).trim_end_matches('/').to_owned();
    if !(api_path.is_empty() || api_path.starts_with('/')) || !is_path(&api_path) {
        check.report(&key("api_path"), format!("{api_path:?} is not a path"), "write for example \"/v1\"");
    }
    let worker_id_header = section.worker_id_header.as_deref().unwrap_or(WORKER_ID_HEADER).to_ascii_lowercase();
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if worker_id_header.is_empty()
        || !worker_id_header.bytes().all(is_token)
        || TAKEN_HEADERS.contains(&worker_id_header.as_str())
    {
        let what = format!("{worker_id_header:?} cannot name the worker");
        check.report(&key("worker_id_header"), what, "write for example \"worker-id\"");
    }
    let mut number = |name: &str, given: Option<u64>, default: u64, least: u64, most: u64| {
        let value = given.unwrap_or(default);
        if !(least..=most).contains(&value) {
            check.report(&key(name), format!("{value} is out of range"), format!("write {least} to {most}"));
        }
        value
    };
    let max_sessions = number("max_sessions", section.max_sessions, most.max(1), 1, most.max(1));
    let max_idle_seconds = number("max_idle_seconds", section.max_idle_seconds, IDLE_SECONDS, 0, LONGEST_SECONDS);
    let max_wait_seconds = number("max_wait_seconds", section.max_wait_seconds, 0, 0, LONGEST_SECONDS);
    let keep_seconds = number("keep_seconds", section.keep_seconds, KEEP_SECONDS, 1, LONGEST_SECONDS);
    let max_command_seconds =
        number("max_command_seconds", section.max_command_seconds, COMMAND_SECONDS, 1, LONGEST_SECONDS);
    Some(Claude {
        environment_id: environment_id?,
        key_file: key_file?,
        base_url: base_url?,
        ca_file,
        proxy,
        api_version,
        workspace_id,
        api_path,
        worker_id_header,
        max_sessions,
        max_idle_seconds,
        max_wait_seconds,
        parallel_threads: section.parallel_threads == Some(true),
        keep_seconds,
        max_command_seconds,
    })
}

/// As the server's ids are.
fn is_id(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(allowed)
}

fn not_an_id(id: &str) -> String {
    format!("{id:?} is not the id of a workspace")
}

fn environment(check: &mut Check<'_>, key: &str, id: String) -> Option<String> {
    if id.len() <= LONGEST_ENVIRONMENT_ID && is_id(&id) {
        return Some(id);
    }
    let fix = format!("write the id as the Console shows it, at most {LONGEST_ENVIRONMENT_ID} of [A-Za-z0-9_-]");
    check.report(key, format!("{id:?} is not the id of an environment"), fix);
    None
}

/// The key is in a file of the operator's, or in one that the service manager has made.
fn key_file(
    check: &mut Check<'_>,
    key: &dyn Fn(&str) -> String,
    section: &ClaudeSection,
    host: &Host,
) -> Option<PathBuf> {
    match (&section.key_file, &section.key_credential) {
        (Some(path), None) => check.absolute(&key("key_file"), path),
        (None, Some(name)) => {
            if name.is_empty() || name.starts_with('.') || name.contains('/') {
                let fix = "write the name that LoadCredential= has before its colon";
                check.report(&key("key_credential"), format!("{name:?} is no name of a credential"), fix);
                return None;
            }
            let Some(directory) = &host.credentials_directory else {
                let what = "the service manager has passed no credentials (CREDENTIALS_DIRECTORY is not set)";
                let fix = "add LoadCredential= to the unit, or name a key_file; beside the service, start it first";
                check.report(&key("key_credential"), what, fix);
                return None;
            };
            Some(directory.join(name))
        }
        (Some(_), Some(_)) => {
            check.report(&key("key_credential"), "is one of two keys", "remove it, or remove key_file");
            None
        }
        (None, None) => {
            check.report(&key("key_file"), "is missing", "add it, or key_credential");
            None
        }
    }
}

fn base_url(check: &mut Check<'_>, key: &dyn Fn(&str) -> String, section: &ClaudeSection) -> Option<String> {
    let url = section.base_url.as_deref().unwrap_or(PUBLIC_API);
    match checked_url(url, section.allow_plain_http == Some(true)) {
        Ok(url) => Some(url),
        Err((what, fix)) => {
            check.report(&key("base_url"), what, fix);
            None
        }
    }
}

/// The address without slashes at its end, or what is wrong with it and the fix.
fn checked_url(url: &str, allow_plain_http: bool) -> Result<String, (String, String)> {
    let url = url.trim_end_matches('/').to_owned();
    let is_plain = url.starts_with("http://");
    if is_plain && !allow_plain_http {
        let fix = "write an https:// address, or allow_plain_http = true where the way there is private";
        return Err(("would send the key and every result unencrypted".to_owned(), fix.to_owned()));
    }
    let scheme = if is_plain { "http://" } else { "https://" };
    let rest = url.strip_prefix(scheme).unwrap_or_default();
    let (authority, prefix) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if url_host(&format!("{scheme}{authority}"), scheme).is_none() || !is_path(prefix) {
        let fix = "write for example \"https://api.anthropic.com\" or \"https://host:8443/prefix\"";
        return Err((format!("{url:?} is not https://HOST:PORT/PREFIX"), fix.to_owned()));
    }
    Ok(url)
}

/// Whether requests can have it before their own path.
fn is_path(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/_.-~".contains(&byte);
    text.bytes().all(plain) && !text.contains("//") && !text.split('/').any(|part| part == "." || part == "..")
}

#[cfg(test)]
mod tests {
    use super::super::tests::resolved;

    const GOOD: &str = "[[claude]]\nenvironment_id = \"env_1\"\nkey_file = \"/k\"\n";

    fn problems(text: &str) -> Vec<String> {
        resolved(text).expect_err("problems")
    }

    #[test]
    fn environment_and_key_are_enough() {
        let config = resolved(GOOD).expect("good");
        let claude = &config.claude[0];
        assert_eq!(
            (claude.base_url.as_str(), claude.api_version.as_str()),
            ("https://api.anthropic.com", "2023-06-01")
        );
        assert_eq!((claude.max_sessions, claude.max_idle_seconds, claude.keep_seconds), (64, 60, 1800));
        // As the official worker does it.
        assert_eq!((claude.max_wait_seconds, claude.parallel_threads, &claude.workspace_id), (0, false, &None));
    }

    #[test]
    fn what_is_given_stands_in_place_of_what_the_section_says_and_is_refused_by_its_name() {
        let section = format!("{GOOD}workspace_id = \"wrkspc_1\"\nparallel_threads = true\n");
        let sections = resolved(&section).expect("good").claude;
        let given = |workspace_id| super::Given { workspace_id, ..super::Given::default() };
        let workspace = |id: &str, given| super::handed_on(&sections, id, given).map(|claude| claude.workspace_id);
        assert_eq!(workspace("env_1", given(None)), Ok(Some("wrkspc_1".to_owned())));
        assert_eq!(workspace("env_1", given(Some(""))), Ok(Some("wrkspc_1".to_owned())), "a variable that is empty");
        assert_eq!(workspace("env_1", given(Some("wrkspc_2"))), Ok(Some("wrkspc_2".to_owned())));
        assert_eq!(workspace("env_2", given(None)), Ok(None));
        let long = "x".repeat(129);
        for bad in ["a b", "a\nb", "\u{e9}", &long] {
            assert_eq!(workspace("env_1", given(Some(bad))).expect_err("refused").name, "workspace-id", "{bad:?}");
        }
        let plain = super::Given { base_url: Some("http://h"), ..super::Given::default() };
        assert_eq!(workspace("env_1", plain).expect_err("refused").name, "base-url");
    }

    #[test]
    fn credential_is_found_where_the_service_manager_has_put_it() {
        let text = "[[claude]]\nenvironment_id = \"env_1\"\nkey_credential = \"claude\"\n";
        let config = resolved(text).expect("good");
        assert_eq!(config.claude[0].key_file, std::path::Path::new("/run/credentials/u/claude"));
    }

    #[test]
    fn every_problem_is_named_with_the_number_of_its_section() {
        let found = problems(
            "[[claude]]\nenvironment_id = \"a/b\"\nkey_file = \"k\"\nbase_url = \"https://h/../x\"\nproxy = \"http://u:hunter2@\"\n\
             api_version = \"x y\"\nmax_sessions = 0\n[[claude]]\nkey_credential = \"../x\"\nbase_url = \"http://h\"\n",
        );
        let expected = [
            "claude[0].environment_id: \"a/b\" is not the id",
            "claude[0].key_file: k is a relative path",
            "claude[0].base_url: \"https://h/../x\" is not https://HOST:PORT/PREFIX",
            "claude[0].proxy: is not http://[USER:PASSWORD@]HOST:PORT",
            "claude[0].api_version: \"x y\" is no version",
            "claude[0].max_sessions: 0 is out of range",
            "claude[1].environment_id: is missing",
            "claude[1].key_credential: \"../x\" is no name",
            "claude[1].base_url: would send the key and every result unencrypted",
        ];
        for text in expected {
            assert!(found.iter().any(|problem| problem.contains(text)), "{text} not in {found:#?}");
        }
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        assert!(!found.iter().any(|problem| problem.contains("hunter2")));
    }

    #[test]
    fn environments_are_named_once_and_keys_as_well() {
        let twice = problems(&format!("{GOOD}{GOOD}"));
        assert!(twice[0].contains("claude[1].environment_id: env_1 has a section already"), "{twice:?}");
        let both = problems(&format!("{GOOD}key_credential = \"c\"\n"));
        assert!(both[0].contains("claude[0].key_credential: is one of two keys"), "{both:?}");
    }

    #[test]
    fn base_urls_may_have_a_prefix_and_plain_http_only_where_it_is_allowed() {
        let with = |more: &str| resolved(&format!("{GOOD}{more}")).map(|config| config.claude[0].base_url.clone());
        assert_eq!(with("base_url = \"https://h:1/api/v1/cloud/\"\n").expect("good"), "https://h:1/api/v1/cloud");
        assert!(with("base_url = \"http://h\"\n").is_err());
        assert_eq!(with("base_url = \"http://h\"\nallow_plain_http = true\n").expect("good"), "http://h");
    }

    #[test]
    fn servers_with_other_paths_and_another_name_for_the_worker_can_be_named() {
        let text = format!("{GOOD}api_path = \"/api/v1/cloud/\"\nworker_id_header = \"Worker-ID\"\n");
        let claude = resolved(&text).expect("good").claude.remove(0);
        assert_eq!((claude.api_path.as_str(), claude.worker_id_header.as_str()), ("/api/v1/cloud", "worker-id"));
        for bad in ["v1", "/a/../b", "/a?b"] {
            let found = problems(&format!("{GOOD}api_path = {bad:?}\n"));
            assert!(found[0].contains("claude[0].api_path: ") && found[0].contains("is not a path"), "{found:?}");
        }
        for bad in ["", "a b", "Authorization", "host"] {
            let found = problems(&format!("{GOOD}worker_id_header = {bad:?}\n"));
            assert!(found[0].contains("claude[0].worker_id_header: "), "{found:?}");
        }
    }

    #[test]
    fn password_of_a_proxy_is_not_shown() {
        let config = resolved(&format!("{GOOD}proxy = \"http://u:hunter2@p:1\"\n")).expect("good");
        let shown = toml::to_string(&config).expect("a text");
        assert!(shown.contains("http://...@p:1") && !shown.contains("hunter2"), "{shown}");
    }
}
