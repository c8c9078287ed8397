//! A work item that somebody else has polled and acknowledged, and handed on: in variables, in files, or as the JSON of the
//! server on standard input. Everything is checked before anything is asked of the server, and no credential is repeated.

use std::path::PathBuf;

use serde::Deserialize;
use zeroize::Zeroizing;

use super::secret::{Secret, SecretError};
use super::wire::{self, BadDelivery, Delivery, Order, is_id};
use crate::config::resolve::LONGEST_ENVIRONMENT_ID;

/// What was handed on, as it was found.
#[derive(Default)]
pub struct Handed {
    /// The environment of the item.
    pub environment_id: Option<String>,
    /// The item.
    pub work_id: Option<String>,
    /// The session that it asks to serve.
    pub session_id: Option<String>,
    /// The key of the environment.
    pub environment_key: Option<Zeroizing<String>>,
    /// The `secret` of the item.
    pub secret: Option<Zeroizing<String>>,
    /// A file that holds it.
    pub secret_file: Option<PathBuf>,
    /// The item as a poll has brought it.
    pub item: Option<Zeroizing<Vec<u8>>>,
}

/// An item that can be served.
#[derive(Debug, Clone)]
pub struct Claim {
    pub(super) environment_id: String,
    pub(super) delivery: Delivery,
    /// For what is not asked with the token of the item.
    pub(super) key: Secret,
}

/// Why what was handed on cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Nobody has said it.
    #[error("{what} is not known: set {variable}, use {flag}, or pass the work item on standard input")]
    Missing {
        /// In words.
        what: &'static str,
        /// Its variable.
        variable: &'static str,
        /// Its flag.
        flag: &'static str,
    },
    /// It is no id. It is shown as a log may show it.
    #[error("{field}: {shown:?} is no id of the server, which has at most {most} of [A-Za-z0-9_-]")]
    Id {
        /// Where it stands.
        field: &'static str,
        /// The characters of it that are harmless.
        shown: String,
        /// Longest one that is taken.
        most: usize,
    },
    /// Two sources name two things.
    #[error("{field} is {given}, but the work item on standard input says {found}: pass on the item that was claimed")]
    Differs {
        /// The flag.
        field: &'static str,
        /// What it says.
        given: String,
        /// What the item says.
        found: String,
    },
    /// Standard input holds something else.
    #[error("standard input holds no work item: pass on the JSON of the poll as it is, or nothing (</dev/null)")]
    NoItem,
    /// There is nothing to serve it with.
    #[error(
        "no credential: set ANTHROPIC_WORK_SECRET to the secret of the work item (or name its file with --work-secret-file), pass \
         the item on standard input, or set ANTHROPIC_ENVIRONMENT_KEY"
    )]
    NoCredential,
    /// The secret is there and of no use, and nothing else is there.
    #[error(
        "the secret of the work item holds no sessions token (it must be base64 of an object with \"sessions_token\"), and there \
         is no ANTHROPIC_ENVIRONMENT_KEY to use in its place"
    )]
    BadSecret,
    /// The key is no token.
    #[error(
        "ANTHROPIC_ENVIRONMENT_KEY: is not one line of printable characters; set it to the key as the Console showed it"
    )]
    BadKey,
    /// The file with the secret.
    #[error(transparent)]
    File(#[from] SecretError),
}

impl Claim {
    /// Puts together what was handed on.
    ///
    /// # Errors
    /// [`ClaimError`] names the field and what to do; it holds no credential.
    pub fn read(handed: Handed) -> Result<Self, ClaimError> {
        let item = handed.item.as_ref().map(|item| Named::read(item)).transpose()?.unwrap_or_default();
        let environment_id = known(&ENVIRONMENT, handed.environment_id, item.environment_id.as_deref())?;
        let work_id = known(&WORK, handed.work_id, item.id.as_deref())?;
        let order = match item.data.as_ref().filter(|data| data.kind != "session") {
            Some(data) => Order::Nothing(wire::printable(&data.kind)),
            None => {
                let found = item.data.as_ref().and_then(|data| data.id.as_deref());
                Order::Session(known(&SESSION, handed.session_id, found)?)
            }
        };
        let given = match (&handed.secret, &handed.secret_file) {
            (Some(secret), _) => Some(Zeroizing::new(secret.trim().to_owned())),
            (None, Some(path)) => Some(Secret::text(path)?),
            (None, None) => None,
        };
        let mut token = given.as_ref().and_then(|secret| Secret::of_work_item(secret));
        let has_secret = given.is_some() || item.has_secret;
        if let (None, Some(bytes)) = (&token, &handed.item) {
            let delivery = wire::delivery(bytes, &environment_id).map_err(|error| match error {
                BadDelivery::Malformed | BadDelivery::BadId | BadDelivery::Foreign => ClaimError::NoItem,
            })?;
            token = delivery.and_then(|delivery| delivery.token);
        }
        let key = handed.environment_key.filter(|key| !key.trim().is_empty());
        let key = key.map(|key| Secret::new(&key).ok_or(ClaimError::BadKey)).transpose()?;
        let key = match (key, &token) {
            (Some(key), None) => {
                if has_secret {
                    tracing::warn!(work_id, "the secret of the work item holds no sessions token, the key is used");
                }
                key
            }
            (Some(key), Some(_)) => key,
            (None, Some(token)) => token.clone(),
            (None, None) if has_secret => return Err(ClaimError::BadSecret),
            (None, None) => return Err(ClaimError::NoCredential),
        };
        Ok(Self { environment_id, delivery: Delivery { work_id, order, token }, key })
    }

    /// The environment of the item.
    #[must_use]
    pub fn environment_id(&self) -> &str {
        &self.environment_id
    }

    /// The session that it asks to serve, if it asks for one.
    #[must_use]
    pub fn session_id(&self) -> Option<&str> {
        match &self.delivery.order {
            Order::Session(session_id) => Some(session_id),
            Order::Nothing(_) => None,
        }
    }
}

/// Where a name of the claim comes from.
struct Field {
    what: &'static str,
    variable: &'static str,
    flag: &'static str,
    most: usize,
}

const ENVIRONMENT: Field = Field {
    what: "the environment",
    variable: "ANTHROPIC_ENVIRONMENT_ID",
    flag: "--environment-id",
    most: LONGEST_ENVIRONMENT_ID,
};
const WORK: Field =
    Field { what: "the work item", variable: "ANTHROPIC_WORK_ID", flag: "--work-id", most: wire::LONGEST_ID };
const SESSION: Field =
    Field { what: "the session", variable: "ANTHROPIC_SESSION_ID", flag: "--session-id", most: wire::LONGEST_ID };

/// The name that was given, or that the item has; both must be the same.
fn known(field: &Field, given: Option<String>, found: Option<&str>) -> Result<String, ClaimError> {
    let given = given.filter(|given| !given.is_empty());
    let Field { what, variable, flag, most } = *field;
    let id = given.as_deref().or(found).ok_or(ClaimError::Missing { what, variable, flag })?;
    for id in given.as_deref().into_iter().chain(found) {
        if !is_id(id) || id.len() > most {
            let shown = wire::printable(id);
            return Err(ClaimError::Id { field: flag, shown, most });
        }
    }
    match (given.as_deref(), found) {
        (Some(given), Some(found)) if given != found => {
            Err(ClaimError::Differs { field: flag, given: given.to_owned(), found: found.to_owned() })
        }
        _ => Ok(id.to_owned()),
    }
}

/// What a work item says of itself.
#[derive(Debug, Default, Deserialize)]
struct Named {
    id: Option<String>,
    environment_id: Option<String>,
    data: Option<Data>,
    #[serde(default, rename = "secret", deserialize_with = "is_there")]
    has_secret: bool,
}

#[derive(Debug, Deserialize)]
struct Data {
    #[serde(rename = "type")]
    kind: String,
    id: Option<String>,
}

impl Named {
    fn read(item: &[u8]) -> Result<Self, ClaimError> {
        let named: Self = serde_json::from_slice(item).map_err(|_| ClaimError::NoItem)?;
        if named.id.is_none() { Err(ClaimError::NoItem) } else { Ok(named) }
    }
}

/// Whether something stands there; what it is is overwritten when it was looked at.
fn is_there<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(Zeroizing::new).is_some())
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use serde_json::{Value, json};

    use super::*;

    fn secret(token: &str) -> String {
        base64::engine::general_purpose::URL_SAFE.encode(json!({"sessions_token": token}).to_string())
    }

    fn item(change: impl FnOnce(&mut Value)) -> Option<Zeroizing<Vec<u8>>> {
        let mut item = json!({"type": "work", "id": "work_1", "environment_id": "env_1", "state": "queued",
            "data": {"type": "session", "id": "sesn_1"}, "secret": secret("sk-ant-req-hunter2")});
        change(&mut item);
        Some(Zeroizing::new(item.to_string().into_bytes()))
    }

    fn named() -> Handed {
        Handed {
            environment_id: Some("env_1".into()),
            work_id: Some("work_1".into()),
            session_id: Some("sesn_1".into()),
            ..Handed::default()
        }
    }

    fn text(value: &str) -> Option<Zeroizing<String>> {
        Some(Zeroizing::new(value.to_owned()))
    }

    fn refusal(handed: Handed) -> String {
        let text = Claim::read(handed).expect_err("it is refused").to_string();
        assert!(!text.contains("hunter2"), "{text}");
        text
    }

    #[test]
    fn item_on_standard_input_is_enough() {
        let claim = Claim::read(Handed { item: item(|_| ()), ..Handed::default() }).expect("a claim");
        assert_eq!((claim.environment_id(), claim.session_id()), ("env_1", Some("sesn_1")));
        assert_eq!(claim.delivery.token, Secret::new("sk-ant-req-hunter2"));
        assert_eq!(claim.key, Secret::new("sk-ant-req-hunter2").expect("a token"));
        assert!(!format!("{claim:?}").contains("hunter2"));
    }

    #[test]
    fn names_and_any_one_credential_are_enough() {
        let key = Claim::read(Handed { environment_key: text("sk-hunter2\n"), ..named() }).expect("a claim");
        assert_eq!((key.delivery.token, key.key), (None, Secret::new("sk-hunter2").expect("a token")));
        let token = Claim::read(Handed { secret: text(&secret("t-hunter2")), ..named() }).expect("a claim");
        assert_eq!(token.delivery.token, Secret::new("t-hunter2"));
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("secret");
        std::fs::write(&path, format!("\n{}\n", secret("f-hunter2"))).expect("written");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
        let file = Claim::read(Handed { secret_file: Some(path.clone()), ..named() }).expect("a claim");
        assert_eq!(file.delivery.token, Secret::new("f-hunter2"));
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o604)).expect("chmod");
        assert!(refusal(Handed { secret_file: Some(path), ..named() }).contains("chmod o-rwx"));
    }

    #[test]
    fn secret_of_no_use_gives_way_to_the_key_and_is_refused_without_one() {
        for bad in ["%%% not base64 hunter2 %%%", "aHVudGVyMg=="] {
            let handed = |environment_key| Handed { secret: text(bad), environment_key, ..named() };
            assert!(refusal(handed(None)).contains("holds no sessions token"), "{bad}");
            assert!(Claim::read(handed(text("sk-1"))).expect("a claim").delivery.token.is_none());
        }
        assert!(refusal(named()).contains("no credential: set ANTHROPIC_WORK_SECRET"));
        assert!(
            refusal(Handed { environment_key: text("two hunter2"), ..named() }).contains("ANTHROPIC_ENVIRONMENT_KEY")
        );
    }

    #[test]
    fn ids_that_do_not_belong_into_a_path_are_refused_by_their_field() {
        let environment_key = || text("sk-1");
        for (handed, field) in [
            (Handed { session_id: Some("a/b".into()), environment_key: environment_key(), ..named() }, "--session-id"),
            (Handed { work_id: Some("..".into()), environment_key: environment_key(), ..named() }, "--work-id"),
            (
                Handed { environment_id: Some("e".repeat(65)), environment_key: environment_key(), ..named() },
                "--environment-id",
            ),
            (Handed { item: item(|item| item["data"]["id"] = json!("a/b")), ..Handed::default() }, "--session-id"),
        ] {
            assert!(refusal(handed).starts_with(&format!("{field}: ")), "{field}");
        }
    }

    #[test]
    fn what_is_missing_is_named_with_all_its_sources() {
        let handed = Handed { session_id: None, environment_key: text("sk-1"), ..named() };
        let expected = "the session is not known: set ANTHROPIC_SESSION_ID, use --session-id, or pass the work item on standard \
                        input";
        assert_eq!(refusal(handed), expected);
    }

    #[test]
    fn item_that_is_another_one_than_the_variables_say_is_refused() {
        for (handed, field) in [
            (Handed { environment_id: Some("env_2".into()), ..named() }, "--environment-id is env_2"),
            (Handed { work_id: Some("work_2".into()), ..named() }, "--work-id is work_2"),
            (Handed { session_id: Some("sesn_2".into()), ..named() }, "--session-id is sesn_2"),
        ] {
            assert!(refusal(Handed { item: item(|_| ()), ..handed }).starts_with(field), "{field}");
        }
        for no_item in ["{}", "null", "[1]", "not JSON", "{\"id\": 3}"] {
            let item = Some(Zeroizing::new(no_item.as_bytes().to_vec()));
            assert!(refusal(Handed { item, ..named() }).starts_with("standard input holds no work item"), "{no_item}");
        }
    }

    #[test]
    fn item_of_another_kind_asks_for_nothing() {
        let check = item(|item| item["data"] = json!({"type": "healthcheck", "id": "check_1"}));
        let claim = Claim::read(Handed { item: check, ..Handed::default() }).expect("a claim");
        assert_eq!(claim.session_id(), None);
        assert_eq!(claim.delivery.order, Order::Nothing("healthcheck".into()));
    }
}
