//! The stream of a session's events, from the bytes of the server to what the machine takes.

use tokio::sync::mpsc;

use super::api::Api;
use super::http::Failure;
use super::machine::Event;
use super::secret::Secret;
use super::sse::{Frame, Parser};
use super::task::report;
use super::wire;

/// Reads it until it ends, and reports its beginning and every event.
///
/// # Errors
/// Why it has ended, unless the server has ended it in order.
pub(super) async fn read_stream(
    api: &Api,
    secret: &Secret,
    work_id: &str,
    session_id: &str,
    link: u64,
    reports: &mpsc::Sender<Event>,
) -> Result<(), Failure> {
    let mut pieces = api.stream(secret, session_id).await?;
    report(reports, Event::Connected { work_id: work_id.to_owned(), link }).await;
    let mut parser = Parser::default();
    while let Some(bytes) = pieces.next().await? {
        for frame in parser.feed(&bytes).map_err(|error| Failure::Transport(error.to_string()))? {
            if let Some(event) = event_of(&frame)? {
                report(reports, Event::Live { work_id: work_id.to_owned(), link, event }).await;
            }
        }
    }
    Ok(())
}

/// The event of a frame. What it is stands in its data, and its name is of use only where there is something else in it.
fn event_of(frame: &Frame) -> Result<Option<wire::Event>, Failure> {
    match frame.name.as_str() {
        "ping" => return Ok(None),
        "error" => {
            let envelope: serde_json::Value = serde_json::from_str(&frame.data).unwrap_or_default();
            let kind = wire::printable(envelope["error"]["type"].as_str().unwrap_or("unknown"));
            let status = match kind.as_str() {
                "authentication_error" => 401,
                "permission_error" => 403,
                "not_found_error" => 404,
                _ => 500,
            };
            return Err(Failure::Status { status, kind, retry_after: None });
        }
        _ => {}
    }
    Ok(serde_json::from_str(&frame.data).ok().map(wire::event))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connector::claude::testing;

    fn frame(name: &str, data: &str) -> Frame {
        Frame { name: name.to_owned(), data: data.to_owned() }
    }

    #[test]
    fn what_an_event_is_stands_in_its_data() {
        let interrupt = r#"{"type":"user.interrupt"}"#;
        let expected = wire::Event::Interrupt { thread_id: None };
        for name in ["", "message", "user.interrupt", "agent.message"] {
            assert_eq!(event_of(&frame(name, interrupt)).expect("no failure"), Some(expected.clone()));
        }
        assert_eq!(event_of(&frame("ping", "{}")).expect("no failure"), None);
        assert_eq!(event_of(&frame("message", "not JSON")).expect("no failure"), None);
    }

    #[tokio::test]
    async fn event_without_an_end_ends_the_stream_and_says_so() {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: ";
        let server = testing::Server::start(testing::Answer::endless(head, vec![b'x'; 65_536]), None).await;
        let (reports, mut heard) = mpsc::channel(4);
        let api = testing::api(server.plain());
        let read = read_stream(&api, &testing::secret(), "work_1", "sesn_1", 1, &reports).await;
        assert_eq!(
            read.expect_err("an end").to_string(),
            "the connection failed: an event has more than 16777216 bytes"
        );
        assert!(matches!(heard.try_recv(), Ok(Event::Connected { .. })));
        assert!(heard.try_recv().is_err());
    }

    #[test]
    fn errors_on_a_stream_are_final_only_where_the_runner_is_refused() {
        let fatal = |kind: &str| {
            let data = format!(r#"{{"type":"error","error":{{"type":"{kind}","message":"m"}}}}"#);
            event_of(&frame("error", &data)).expect_err("a failure").is_fatal()
        };
        assert!(fatal("authentication_error") && fatal("permission_error") && fatal("not_found_error"));
        assert!(!fatal("overloaded_error") && !fatal("api_error") && !fatal("novel"));
    }
}
