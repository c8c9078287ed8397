//! Renderings of the messages that hold secrets: they name what is there and never show it.
//!
//! The environment of a session or program counts as secret: that is where people put tokens.

use std::fmt;

use crate::runner::v1::{EnrollRequest, ExecInput, OpenSession, SecretValue};

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretValue({} bytes)", self.value.len())
    }
}

impl fmt::Debug for EnrollRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrollRequest")
            .field("token", &"redacted")
            .field("csr_der", &self.csr_der.len())
            .field("labels", &self.labels)
            .field("state_id", &self.state_id)
            .finish()
    }
}

impl fmt::Debug for OpenSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: std::collections::BTreeSet<_> = self.variables.keys().collect();
        f.debug_struct("OpenSession")
            .field("session_id", &self.session_id)
            .field("epoch", &self.epoch)
            .field("environment", &self.environment)
            .field("limits", &self.limits)
            .field("network", &self.network)
            .field("variables", &names)
            .field("secrets", &self.secrets)
            .field("tenant", &self.tenant)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ExecInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExecInput")
            .field("argv", &self.argv.len())
            .field("env", &self.env.len())
            .field("stdin", &self.stdin)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use crate::runner::v1 as pb;

    /// The list that matters is in the schema, so the test reads the schema: a message that gains a redacted field
    /// without a rendering of its own fails here.
    #[test]
    fn every_message_with_a_redacted_field_has_a_rendering_of_its_own() {
        let schema = include_str!("../sandbox_runner/runner/v1/runner.proto");
        let build = include_str!("../build.rs");
        let mut message = "";
        let mut found = 0;
        for line in schema.lines() {
            if let Some(rest) = line.strip_prefix("message ") {
                message = rest.split_whitespace().next().unwrap();
            }
            if line.contains("debug_redact = true") {
                found += 1;
                assert!(build.contains(&format!("runner.v1.{message}\"")), "{message} is not in skip_debug");
            }
        }
        assert_eq!(found, 2);
    }

    #[test]
    fn renderings_do_not_contain_the_secret() {
        let secret = pb::SecretValue { value: b"hunter2".to_vec() };
        let binding = pb::SecretBinding { value: Some(secret.clone()), ..Default::default() };
        let open = pb::OpenSession {
            secrets: vec![binding],
            variables: [("TOKEN".to_owned(), "hunter2".to_owned())].into(),
            ..Default::default()
        };
        let exec = pb::ExecInput { env: vec![b"TOKEN=hunter2".to_vec()], ..Default::default() };
        let enroll = pb::EnrollRequest { token: "hunter2".into(), ..Default::default() };
        for text in [format!("{secret:?}"), format!("{open:?}"), format!("{exec:?}"), format!("{enroll:?}")] {
            assert!(!text.contains("hunter2") && !text.contains("104, 117"), "{text}");
        }
    }
}
