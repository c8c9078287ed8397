//! Identifiers as types. All ids that cross the wire are chosen by the caller, so each is checked once, here.

use std::fmt;

/// Why a text is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Nothing was given.
    #[error("{field} is empty; give 1 to 128 characters of [A-Za-z0-9_.:-]")]
    Empty {
        /// The field as the caller knows it.
        field: &'static str,
    },
    /// More than 128 characters.
    #[error("{field} has {length} characters; at most 128 are allowed")]
    TooLong {
        /// The field as the caller knows it.
        field: &'static str,
        /// What was given.
        length: usize,
    },
    /// A character outside the set.
    #[error("{field} contains {character:?}; only [A-Za-z0-9_.:-] is allowed")]
    Character {
        /// The field as the caller knows it.
        field: &'static str,
        /// The first offender.
        character: char,
    },
}

fn check(field: &'static str, text: &str) -> Result<(), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty { field });
    }
    if text.len() > 128 {
        return Err(IdError::TooLong { field, length: text.chars().count() });
    }
    match text.chars().find(|c| !(c.is_ascii_alphanumeric() || "_.:-".contains(*c))) {
        Some(character) => Err(IdError::Character { field, character }),
        None => Ok(()),
    }
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $field:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// Checks `text` and takes it as an identifier.
            ///
            /// # Errors
            /// `IdError` names the field and what is wrong with it.
            pub fn new(text: impl AsRef<str>) -> Result<Self, IdError> {
                let text = text.as_ref();
                check($field, text)?;
                Ok(Self(text.into()))
            }

            /// Whether it came from a work queue.
            #[must_use]
            pub fn is_of_queue(&self) -> bool {
                self.0.starts_with(RESERVED_PREFIX)
            }

            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        /// What is read back is checked like what comes in.
        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                Self::new(text).map_err(serde::de::Error::custom)
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                Self::new(text)
            }
        }
    };
}

/// Begins the ids of sessions and calls that come from a work queue. Nobody else may use it, so an id says who has placed
/// what it names, over any number of runners.
pub const RESERVED_PREFIX: &str = "claude:";

identifier!(
    /// One agent conversation.
    SessionId,
    "session_id"
);
identifier!(
    /// One tool call; unique on this runner for as long as its record is kept.
    CallId,
    "call_id"
);
identifier!(
    /// One sandbox.
    SandboxId,
    "sandbox_id"
);
identifier!(
    /// This runner, as its certificate names it.
    RunnerId,
    "runner_id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifier_of_allowed_characters_is_accepted_and_printed_unchanged() {
        let id = CallId::new("toolu_01.a:b-C").unwrap();
        assert_eq!(id.to_string(), "toolu_01.a:b-C");
    }

    #[test]
    fn bad_identifiers_are_refused_with_field_and_fix() {
        let long = "x".repeat(129);
        for (text, expected) in [
            ("", "session_id is empty; give 1 to 128 characters of [A-Za-z0-9_.:-]"),
            (long.as_str(), "session_id has 129 characters; at most 128 are allowed"),
            ("a/b", "session_id contains '/'; only [A-Za-z0-9_.:-] is allowed"),
            ("a\0", "session_id contains '\\0'; only [A-Za-z0-9_.:-] is allowed"),
            ("é", "session_id contains 'é'; only [A-Za-z0-9_.:-] is allowed"),
        ] {
            assert_eq!(SessionId::new(text).unwrap_err().to_string(), expected);
        }
    }
}
