//! What an operator should do about a refusal of the server. One text each, for the log, `status` and `doctor`.

use super::http::Failure;

/// For a question that was asked with the key of the environment.
pub(super) fn of_queue(failure: &Failure) -> &'static str {
    match failure {
        Failure::Status { status: 401, .. } => {
            "the key has expired, was revoked or is mistyped: generate a new key for this environment in the Console, write it \
             to the key file, and send SIGHUP"
        }
        Failure::Status { status: 403, .. } => {
            "the key is good, but for another environment: compare environment_id with the environment of the key in the \
             Console"
        }
        Failure::Status { status: 404, .. } => {
            "the server does not know this environment: it was archived or deleted, environment_id is mistyped, or base_url \
             names another server"
        }
        Failure::Status { status: 400..=499, .. } if failure.is_fatal() => {
            "the server does not take this request: compare base_url and api_version with what it speaks"
        }
        Failure::Status { status: 429, .. } => {
            "the server asks for patience; nothing needs to be done unless it stays so"
        }
        Failure::Status { .. } => "the server has trouble of its own; nothing needs to be done unless it stays so",
        Failure::Foreign => {
            "the server, or what is between, has delivered an item of another environment; it was not acknowledged, so its own \
             workers get it. Compare base_url with the environment's server"
        }
        Failure::BadId => {
            "the server, or what is between, has delivered an item whose id has other characters than letters, digits, - and _; it \
             was not acknowledged. Stop that item in the Console"
        }
        Failure::Malformed | Failure::TooLarge(_) => {
            "base_url names something else than this protocol's server, or a proxy answers"
        }
        Failure::Dial(_) | Failure::Transport(_) | Failure::Timeout(_) => {
            "look at name resolution, routes, proxy and the authorities that sign the server's certificate"
        }
    }
}

/// For a request about one work item, which has a credential of its own unless its secret was of no use.
pub(super) fn of_item(failure: &Failure) -> &'static str {
    match failure.status() {
        Some(401) => {
            "the credential of the work item has expired or was revoked: the next delivery brings another one; where the key of \
             the environment was used in its place, generate a new one"
        }
        Some(403) => "the credential is for another work item or environment: pass on the item that was claimed",
        Some(404) => "the server does not know this work item in this environment: compare environment and base URL",
        _ => "the server does not take this request: compare base URL and api_version with what it speaks",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_a_key_are_told_apart() {
        let of = |status| of_queue(&Failure::Status { status, kind: String::new(), retry_after: None });
        assert!(of(401).contains("expired") && of(401).contains("SIGHUP"));
        assert!(of(403).contains("another environment"));
        assert!(of(404).contains("archived"));
        assert!(of(400).contains("api_version") && of(503).contains("of its own") && of(429).contains("patience"));
    }
}
