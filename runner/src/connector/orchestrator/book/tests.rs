//! Which piece is due under which credit, and when a call is delivered.

use super::output::{FLUSH_AFTER, FLUSH_BYTES};
use super::*;

const NOW: Duration = Duration::from_secs(1);

fn call() -> CallId {
    CallId::new("c").unwrap()
}

fn book(credit: u64, bytes: u64) -> Book {
    let mut book = Book::default();
    book.call_requested(call(), SessionId::new("s").unwrap(), RequestDigest([1; 32]), false);
    book.link_opened(credit, None);
    report(&mut book, bytes);
    book
}

#[test]
fn quiet_call_of_an_earlier_runner_is_sent_when_it_is_over_and_not_before() {
    let mut book = Book::default();
    let asked = (RequestDigest([1; 32]), true);
    book.call_restored(call(), SessionId::new("s").unwrap(), asked, CallPhase::Started);
    book.link_opened(1 << 20, None);
    report(&mut book, FLUSH_BYTES * 4);
    assert!(read(&mut book, NOW).is_none());
    end(&mut book, FLUSH_BYTES * 4, false);
    assert!(read(&mut book, NOW).is_some());
}

fn report(book: &mut Book, bytes: u64) {
    let mut lengths = StreamLengths::default();
    lengths.advance(Stream::Stdout, bytes);
    book.advanced(&call(), &lengths);
}

fn end(book: &mut Book, total: u64, inline: bool) {
    let summary = StreamSummary {
        stream: Stream::Stdout,
        total_bytes: total,
        head_bytes: total,
        tail_bytes: 0,
        sha256: [0; 32],
        inline: inline.then(Vec::new),
        spool_path: String::new(),
    };
    book.finished(&call(), &[summary], false);
}

fn read(book: &mut Book, now: Duration) -> Option<Piece> {
    match book.next_piece(now) {
        Next::Read(piece) => Some(piece),
        Next::Wait(_) | Next::Idle => None,
    }
}

#[test]
fn no_credit_means_no_output() {
    assert_eq!(book(0, 100).next_piece(NOW), Next::Idle);
}

#[test]
fn pieces_never_exceed_credit_and_unused_credit_is_given_back() {
    let mut book = book(100, 1000);
    let piece = read(&mut book, NOW).unwrap();
    assert_eq!((piece.offset, piece.max_bytes), (0, 100));
    book.piece_read(&piece, 0, 60, NOW).unwrap();
    let piece = read(&mut book, NOW + FLUSH_AFTER).unwrap();
    assert_eq!((piece.offset, piece.max_bytes), (60, 40));
}

#[test]
fn small_pieces_wait_for_company_and_large_ones_do_not() {
    let mut book = book(1 << 20, 10);
    let piece = read(&mut book, NOW).unwrap();
    book.piece_read(&piece, 0, 10, NOW).unwrap();
    report(&mut book, 20);
    assert_eq!(book.next_piece(NOW), Next::Wait(NOW + FLUSH_AFTER));
    report(&mut book, 10 + FLUSH_BYTES);
    assert!(read(&mut book, NOW).is_some());
}

#[test]
fn call_is_forgotten_when_result_and_output_are_stored() {
    let mut book = book(1 << 20, 50);
    end(&mut book, 50, false);
    assert!(!book.result_acknowledged(&call()));
    let piece = read(&mut book, NOW).unwrap();
    assert_eq!(book.piece_read(&piece, 0, 50, NOW), Some((0, 0, true)));
    assert!(!book.output_acknowledged(&call(), Stream::Stdout, 49));
    assert!(book.output_acknowledged(&call(), Stream::Stdout, 50));
}

#[test]
fn acknowledgement_of_bytes_that_were_never_sent_counts_for_nothing() {
    let mut book = book(1 << 20, 50);
    end(&mut book, 50, false);
    book.result_acknowledged(&call());
    assert!(!book.output_acknowledged(&call(), Stream::Stdout, 50));
}

#[test]
fn output_that_travels_with_the_end_is_not_sent_again() {
    let mut book = book(1 << 20, 50);
    end(&mut book, 50, true);
    assert_eq!(book.next_piece(NOW), Next::Idle);
    assert!(book.result_acknowledged(&call()));
}

#[test]
fn new_link_sends_again_from_what_is_acknowledged() {
    let mut book = book(1 << 20, 50);
    let piece = read(&mut book, NOW).unwrap();
    book.piece_read(&piece, 0, 50, NOW).unwrap();
    book.output_acknowledged(&call(), Stream::Stdout, 20);
    book.link_opened(1 << 20, None);
    assert_eq!(read(&mut book, NOW).unwrap().offset, 20);
}

#[test]
fn calls_keep_their_turn_over_short_links() {
    let mut book = book(1 << 20, 1 << 20);
    let other = CallId::new("d").unwrap();
    book.call_requested(other.clone(), SessionId::new("s").unwrap(), RequestDigest([2; 32]), false);
    let mut lengths = StreamLengths::default();
    lengths.advance(Stream::Stdout, 1 << 20);
    book.advanced(&other, &lengths);
    let first = read(&mut book, NOW).unwrap();

    book.link_opened(1 << 20, None);
    let second = read(&mut book, NOW).unwrap();
    book.link_opened(1 << 20, None);
    let third = read(&mut book, NOW).unwrap();

    assert_eq!([first.call_id, second.call_id, third.call_id], [call(), other, call()]);
}

#[test]
fn call_whose_last_acknowledgement_was_lost_is_forgotten_when_the_next_link_says_so() {
    let mut book = book(1 << 20, 50);
    end(&mut book, 50, false);
    assert!(!book.result_acknowledged(&call()));
    let piece = read(&mut book, NOW).unwrap();
    book.piece_read(&piece, 0, 50, NOW).unwrap();
    book.link_opened(1 << 20, None);
    assert!(book.stored_through(&call(), Stream::Stdout, 50));
    assert!(book.is_empty());
}

#[test]
fn dropped_bytes_are_declared() {
    let mut book = book(1 << 20, 500);
    let piece = read(&mut book, NOW).unwrap();
    assert_eq!(book.piece_read(&piece, 300, 10, NOW), Some((300, 300, false)));
}

#[test]
fn stream_that_was_read_before_its_end_was_known_still_gets_its_mark() {
    let mut book = book(50, 50);
    let piece = read(&mut book, NOW).unwrap();
    assert_eq!(book.piece_read(&piece, 0, 50, NOW), Some((0, 0, false)));
    end(&mut book, 50, false);
    let piece = read(&mut book, NOW + FLUSH_AFTER).unwrap();
    assert_eq!(book.piece_read(&piece, 50, 0, NOW), Some((50, 0, true)));
    assert_eq!(book.next_piece(NOW + FLUSH_AFTER), Next::Idle);
}

fn session() -> SessionId {
    SessionId::new("s").unwrap()
}

/// What a new link is told: each session with its epoch, its phase and its number of calls.
fn told(book: &Book) -> Vec<(String, u64, &'static str, usize)> {
    let sessions = book.resume_pages().into_iter().flat_map(|page| page.sessions);
    sessions
        .map(|state| (state.session_id.clone(), state.epoch, state.phase().as_str_name(), state.calls.len()))
        .collect()
}

const OPENING: &str = "SESSION_PHASE_OPENING";
const READY: &str = "SESSION_PHASE_READY";

#[test]
fn refused_repeat_of_an_open_takes_nothing_from_the_session_that_is_being_made() {
    let mut book = Book::default();
    book.session_requested(session(), 1);
    book.call_requested(call(), session(), RequestDigest([1; 32]), false);
    book.call_accepted(&call());
    // With another environment: a conflict. And of an older placement.
    book.session_requested(session(), 1);
    book.open_refused(&session(), 1);
    book.session_requested(session(), 0);
    book.open_refused(&session(), 0);

    assert_eq!(told(&book), [("s".to_owned(), 1, OPENING, 1)]);
    assert_eq!(book.session_of(&call()), Some((session(), 1)), "its call can be cancelled by a new link");
    book.session_opened(session(), 1);
    assert_eq!(told(&book), [("s".to_owned(), 1, READY, 1)]);
    book.session_requested(session(), 1);
    book.open_refused(&session(), 1);
    assert_eq!(told(&book), [("s".to_owned(), 1, READY, 1)]);
}

#[test]
fn session_whose_every_open_was_refused_is_none() {
    let mut book = Book::default();
    book.session_requested(session(), 1);
    book.session_requested(session(), 2);
    book.open_refused(&session(), 1);
    assert_eq!(told(&book), [("s".to_owned(), 2, OPENING, 0)], "the other one is on its way");
    book.open_refused(&session(), 2);
    assert_eq!(told(&book), []);
    book.open_refused(&session(), 2);
    assert_eq!(told(&book), []);
}

#[test]
fn end_of_a_placement_leaves_the_one_that_was_asked_for_since() {
    let mut book = Book::default();
    book.session_requested(session(), 1);
    book.session_opened(session(), 1);
    // On its way to the sessions while they say that the first is over.
    book.session_requested(session(), 2);
    book.session_ended(&session(), 1);
    assert_eq!(told(&book), [("s".to_owned(), 2, OPENING, 0)]);
    book.session_ended(&session(), 2);
    assert_eq!(told(&book), []);
}

#[test]
fn repeats_that_are_answered_together_leave_nothing_behind() {
    let mut book = Book::default();
    book.session_restored(session(), 1, false, 0);
    for epoch in [1, 1, 2, 3] {
        book.session_requested(session(), epoch);
    }
    book.session_opened(session(), 3);
    assert_eq!(told(&book), [("s".to_owned(), 3, READY, 0)]);
    book.session_ended(&session(), 3);
    assert_eq!(told(&book), []);
}

#[test]
fn new_link_is_told_how_many_calls_a_placement_has_accepted_also_when_they_are_forgotten() {
    let accepted = |book: &Book| book.resume_pages()[0].sessions[0].calls_accepted;
    let id = |text: &str| CallId::new(text).unwrap();
    let digest = RequestDigest([1; 32]);
    let mut book = Book::default();
    book.session_restored(session(), 1, true, 7);
    book.call_restored(id("restored"), session(), (digest, false), CallPhase::Started);
    assert_eq!(accepted(&book), 8);
    for _ in 0..2 {
        book.call_requested(id("new"), session(), digest, false);
        book.call_accepted(&id("new"));
    }
    book.call_requested(id("refused"), session(), digest, false);
    book.call_refused(&id("refused"));
    assert_eq!(accepted(&book), 9);
    book.session_requested(session(), 2);
    book.session_ended(&session(), 1);
    book.session_opened(session(), 2);
    assert_eq!(accepted(&book), 0, "another placement");
}

/// Sent under a stale epoch and, before the answer, under the right one; or to a full queue that had room a moment later.
#[test]
fn call_that_is_sent_again_before_its_refusal_has_come_is_known_by_the_request_that_is_accepted() {
    let mut book = Book::default();
    book.session_restored(session(), 1, true, 0);
    for digest in [[1; 32], [2; 32], [3; 32]] {
        book.call_requested(call(), session(), RequestDigest(digest), false);
    }
    book.call_refused(&call());
    book.call_refused(&call());
    book.call_accepted(&call());

    let page = book.resume_pages().remove(0).sessions.remove(0);
    assert_eq!((page.calls_accepted, page.calls.len()), (1, 1));
    assert_eq!(page.calls[0].request_sha256, [3; 32]);
    book.link_opened(1 << 20, None);
    report(&mut book, 100);
    assert!(read(&mut book, NOW).is_some(), "its output is sent");
    // A repeat that is refused late, with a session that has gone on.
    book.call_requested(call(), session(), RequestDigest([3; 32]), false);
    book.call_refused(&call());
    assert_eq!(told(&book)[0].3, 1);
}

#[test]
fn call_whose_every_request_was_refused_is_none() {
    let mut book = Book::default();
    for _ in 0..3 {
        book.call_requested(call(), session(), RequestDigest([1; 32]), false);
    }
    for _ in 0..3 {
        assert!(!book.is_empty());
        book.call_refused(&call());
    }
    assert!(book.is_empty());
}
