//! What must stay in this process: the key of an environment, and the tokens of its work items.
//!
//! Neither is ever part of a rendering, and both are overwritten when they are dropped. They are read from files and from
//! answers of the server, and go into one header, which is marked so that no log of the HTTP library shows it. Nothing of
//! it reaches an environment, an argument, a sandbox, the journal or a spool.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use hyper::header::HeaderValue;
use serde_json::Value;
use zeroize::Zeroizing;

/// A key is some hundred bytes.
const MOST_BYTES: u64 = 64 * 1024;

/// Servers leave the padding out, or not.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A bearer credential.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(Arc<Zeroizing<String>>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// Why a file is no key.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It cannot be read.
    #[error("cannot read key file {}: {source}", path.display())]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others could read it, or replace it.
    #[error("key file {} is open to every user (mode {mode:o}); take the rights of others away with chmod o-rwx", path.display())]
    Open {
        /// The file.
        path: std::path::PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// What it holds is no key. The text is not repeated.
    #[error("key file {} does not hold one line of printable characters", path.display())]
    Content {
        /// The file.
        path: std::path::PathBuf,
    },
}

impl Secret {
    /// A text that can stand in a header; white space around it does not belong to it.
    pub(super) fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        let is_token = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_token.then(|| Self(Arc::new(Zeroizing::new(text.to_owned()))))
    }

    /// Reads the key of an environment.
    ///
    /// # Errors
    /// `SecretError` names the file, and never what it holds.
    pub(super) fn read(path: &Path) -> Result<Self, SecretError> {
        Self::new(&Self::text(path)?).ok_or_else(|| SecretError::Content { path: path.to_owned() })
    }

    /// What such a file holds, without the white space around it.
    ///
    /// # Errors
    /// As above.
    pub(super) fn text(path: &Path) -> Result<Zeroizing<String>, SecretError> {
        let failed = |source| SecretError::Read { path: path.to_owned(), source };
        let file = fs::File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
        if mode & 0o007 != 0 {
            return Err(SecretError::Open { path: path.to_owned(), mode });
        }
        let mut text = Zeroizing::new(String::new());
        file.take(MOST_BYTES).read_to_string(&mut text).map_err(failed)?;
        Ok(Zeroizing::new(text.trim().to_owned()))
    }

    /// The sessions token in the `secret` of a work item: base64 of an object. `None` for anything else.
    pub(super) fn of_work_item(secret: &str) -> Option<Self> {
        let bytes = Zeroizing::new(LENIENT.decode(secret.trim()).ok()?);
        let mut object: Value = serde_json::from_slice(&bytes).ok()?;
        let Some(Value::String(token)) = object.get_mut("sessions_token").map(Value::take) else { return None };
        Self::new(&Zeroizing::new(token))
    }

    /// The value of `Authorization`.
    pub(super) fn header(&self) -> HeaderValue {
        let text = Zeroizing::new(format!("Bearer {}", self.0.as_str()));
        let mut value = HeaderValue::from_str(&text).expect("only printable characters are taken");
        value.set_sensitive(true);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(text: &str) -> String {
        base64::engine::general_purpose::URL_SAFE.encode(text)
    }

    #[test]
    fn token_is_found_with_and_without_padding() {
        let secret = encoded(r#"{"sessions_token":"sk-ant-req-1","other":1}"#);
        assert!(secret.ends_with('='), "the sample must be padded");
        let expected = Secret::new("sk-ant-req-1");
        assert_eq!(Secret::of_work_item(&secret), expected);
        assert_eq!(Secret::of_work_item(secret.trim_end_matches('=')), expected);
    }

    #[test]
    fn anything_else_is_no_token() {
        for text in
            ["{\"sessions_token\":\"\"}", "{\"sessions_token\":3}", "{}", "[1]", "no", "{\"sessions_token\":\"a b\"}"]
        {
            assert_eq!(Secret::of_work_item(&encoded(text)), None, "{text}");
        }
        assert_eq!(Secret::of_work_item("not base64!"), None);
    }

    #[test]
    fn secrets_are_in_no_rendering() {
        let secret = Secret::new("hunter2").expect("a token");
        let shown = format!("{secret:?} {:?}", secret.header());
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn key_that_others_can_read_or_that_is_no_token_is_refused_without_being_repeated() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("key");
        let with = |text: &str, mode| {
            fs::write(&path, text).expect("written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            Secret::read(&path).map_err(|error| error.to_string())
        };
        assert_eq!(with("sk-1\n", 0o640), Ok(Secret::new("sk-1").expect("a token")));
        assert!(with("sk-1\n", 0o644).expect_err("refused").contains("(mode 644)"));
        let text = with("two hunter2\nlines", 0o600).expect_err("refused");
        assert!(text.contains("one line") && !text.contains("hunter2"), "{text}");
        assert!(with("", 0o600).is_err());
    }
}
