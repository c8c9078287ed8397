//! Calls in a terminal, against a real engine.

use proto::init::v1::{Exec, Resize, Stdin, Stream, Terminal, frame, request, start_call};

use super::testing::{Client, TestSandbox};

fn in_terminal(client: &mut Client, script: &str, columns: u32, rows: u32) -> String {
    let call = client.call(start_call::Work::Exec(Exec {
        argv: ["sh", "-c", script].map(|word| word.as_bytes().to_vec()).to_vec(),
        terminal: Some(Terminal { columns, rows }),
        ..Exec::default()
    }));
    client.start(call)
}

fn wait_for_output(client: &mut Client, call_id: &str) {
    client.wait_for(|event| match event {
        frame::Body::OutputAdvanced(advanced) if advanced.call_id == call_id => Some(()),
        _ => None,
    });
}

fn type_in(client: &mut Client, call_id: &str, offset: u64, data: &[u8], eof: bool) {
    let keys = Stdin { call_id: call_id.to_owned(), offset, data: data.to_vec(), eof };
    assert!(matches!(client.ask(request::Body::Stdin(keys)), frame::Body::StdinAccepted(_)));
}

fn resize(call_id: &str, columns: u32, rows: u32) -> request::Body {
    request::Body::Resize(Resize { call_id: call_id.to_owned(), columns, rows })
}

#[test]
fn a_terminal_is_a_terminal_of_the_size_asked_for() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let script = "test -t 0 && test -t 1 && test -t 2 && stty size; read line; stty size; echo $TERM";
    let call_id = in_terminal(&mut client, script, 100, 30);
    wait_for_output(&mut client, &call_id);
    client.done(resize(&call_id, 120, 40));
    type_in(&mut client, &call_id, 0, b"\n", false);
    let result = client.finish(&call_id);
    let text = String::from_utf8(result.bytes(Stream::Pty)).unwrap().replace('\r', "");
    assert_eq!(text, "30 100\n\n40 120\nxterm\n");
}

#[test]
fn a_size_beyond_what_a_terminal_has_is_refused_by_its_field_and_so_is_one_without_a_terminal() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call_id = in_terminal(&mut client, "stty size; read line; stty size", 0, 0);
    wait_for_output(&mut client, &call_id);
    assert_eq!(client.refused(resize(&call_id, 65_536, 1)).message, "columns is 65536, limit is 65535");
    assert_eq!(client.refused(resize(&call_id, 1, u32::MAX)).message, "rows is 4294967295, limit is 65535");
    assert_eq!(client.refused(resize("nobody", 1, 1)).code, "CALL_UNKNOWN");
    type_in(&mut client, &call_id, 0, b"\n", false);
    let result = client.finish(&call_id);
    assert_eq!(result.bytes(Stream::Pty), b"24 80\r\n\r\n24 80\r\n");
    let plain = client.call(super::testing::exec(&["sleep", "600"]));
    let plain = client.start(plain);
    assert_eq!(client.refused(resize(&plain, 1, 1)).message, "resize.call_id names a call without a terminal");
    client.cancel(&plain, proto::init::v1::CancelMode::Kill);
    client.finish(&plain);
}

#[test]
fn the_end_of_the_input_is_typed_and_the_terminal_stays() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let script = "stty -echo; echo ready; cat; echo over; cat; exit 4";
    let call_id = in_terminal(&mut client, script, 80, 24);
    wait_for_output(&mut client, &call_id);
    type_in(&mut client, &call_id, 0, b"one\n\x04unfinished", true);
    let result = client.finish(&call_id);
    assert_eq!((result.code(), result.bytes(Stream::Pty)), (4, b"ready\r\none\r\nover\r\nunfinished".to_vec()));
}

#[test]
fn a_terminal_that_every_process_has_closed_is_read_on_when_it_is_opened_again() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    // More than a terminal holds: without a reader the program would never end.
    let script = "name=$(tty); exec </dev/null >/dev/null 2>&1; sleep 0.3; seq 50000 > $name";
    let call_id = in_terminal(&mut client, script, 80, 24);
    let result = client.finish(&call_id);
    let wanted: usize = (1..=50_000).map(|number: u32| number.to_string().len() + 2).sum();
    assert_eq!((result.code(), result.finished.streams[0].total_bytes), (0, wanted as u64));
}
