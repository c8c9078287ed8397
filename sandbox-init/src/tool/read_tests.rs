use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    os::unix::{fs::symlink, net::UnixListener},
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::tool::testing::Workspace;

/// A file of `size` bytes without any data, with `tail` behind it.
fn sparse(workspace: &Workspace, name: &str, size: u64, tail: &[u8]) {
    let mut file = File::create(workspace.path(name)).expect("file");
    file.set_len(size).expect("length");
    file.seek(SeekFrom::Start(size)).expect("seek");
    file.write_all(tail).expect("tail");
}

#[test]
fn special_files_are_refused_without_being_opened() {
    let mut workspace = Workspace::new();
    mkfifo(&workspace.path("fifo"), Mode::S_IRWXU).expect("fifo");
    let _listener = UnixListener::bind(workspace.path("socket")).expect("socket");
    workspace.context.allowed_roots = vec!["/dev".into(), "/proc".into()];

    for name in ["fifo", "socket", "/dev/zero", "/dev/null", "/dev/tty", "/dev"] {
        assert_eq!(workspace.error("read", &json!({"file_path": name})), format!("read: {name}: not a regular file"));
    }
}

#[test]
fn link_to_device_outside_is_outside() {
    let workspace = Workspace::new();
    symlink("/dev/zero", workspace.path("zero")).expect("link");

    let text = workspace.error("read", &json!({"file_path": "zero"}));

    assert_eq!(text, "read: path 'zero' is outside the session's working directory");
}

#[test]
fn sparse_file_of_a_tebibyte_is_answered_from_its_size_and_its_data() {
    let workspace = Workspace::new();
    sparse(&workspace, "huge", 1 << 40, b"\nsecond\n");

    let whole = workspace.error("read", &json!({"file_path": "huge"}));
    let first = workspace.error("read", &json!({"file_path": "huge", "view_range": [1, 1]}));
    let second = workspace.ok("read", &json!({"file_path": "huge", "view_range": [2, 2]}));

    let size = (1_u64 << 40) + 8;
    assert!(whole.starts_with(&format!("read: huge is {size} bytes, exceeds 262144-byte limit.")), "{whole}");
    assert!(first.starts_with("read: line 1 of huge alone exceeds 262144-byte limit."), "{first}");
    assert_eq!(second, "second");
}

#[test]
fn range_behind_the_last_line_of_a_hole_is_empty() {
    let workspace = Workspace::new();
    sparse(&workspace, "huge", 1 << 40, b"");

    assert_eq!(workspace.ok("read", &json!({"file_path": "huge", "view_range": [2, 9]})), "");
}

#[test]
fn text_over_the_limit_is_refused_with_the_way_out() {
    let workspace = Workspace::new();
    workspace.put("exact", vec![b'x'; 262_144]);
    workspace.put("over", vec![b'x'; 262_145]);

    assert_eq!(workspace.ok("read", &json!({"file_path": "exact"})).len(), 262_144);
    assert_eq!(
        workspace.error("read", &json!({"file_path": "over"})),
        "read: over is 262145 bytes, exceeds 262144-byte limit. Use the view_range parameter to read specific line \
         ranges, e.g. view_range: [1, 500]."
    );
}

#[test]
fn range_over_the_limit_is_refused_and_the_line_named_if_it_is_one() {
    let workspace = Workspace::new();
    workspace.put("lines", "y".repeat(200_000) + "\n" + &"z".repeat(200_000) + "\n" + &"x".repeat(262_145));

    assert_eq!(
        workspace.error("read", &json!({"file_path": "lines", "view_range": [1, 2]})),
        "read: view_range [1, 2] of lines exceeds 262144-byte limit. Narrow the view_range to read a smaller portion."
    );
    assert_eq!(
        workspace.error("read", &json!({"file_path": "lines", "view_range": [3, -1]})),
        "read: line 3 of lines alone exceeds 262144-byte limit. The read tool cannot return part of a line, so \
         view_range cannot narrow this further."
    );
    assert_eq!(workspace.ok("read", &json!({"file_path": "lines", "view_range": [2, 2]})).len(), 200_000);
}

#[test]
fn line_that_is_not_found_in_time_is_given_up() {
    let mut workspace = Workspace::new();
    workspace.put("lines", "y\n".repeat(100_000));
    workspace.context.limits.read_time = Duration::ZERO;

    assert_eq!(
        workspace.error("read", &json!({"file_path": "lines", "view_range": [99_999, -1]})),
        "read: gave up looking for line 99999 of lines after 0 ms"
    );
}

#[test]
fn bytes_that_are_not_text_are_refused_but_only_where_they_are_selected() {
    let workspace = Workspace::new();
    workspace.put("mixed", b"good\nbad \xff\n");

    assert_eq!(
        workspace.error("read", &json!({"file_path": "mixed"})),
        "read: mixed: not valid UTF-8 text (binary files are only supported for image/PDF extensions)"
    );
    assert_eq!(workspace.ok("read", &json!({"file_path": "mixed", "view_range": [1, 1]})), "good");
}

#[test]
fn images_and_documents_are_returned_as_they_are() {
    let workspace = Workspace::new();
    let cases: [(&str, &[u8], &str); 6] = [
        ("a.png", b"\x89PNG\r\n\x1a\nrest", "image/png"),
        ("a.JPG", b"\xff\xd8\xff\xe0rest", "image/jpeg"),
        ("a.jpeg", b"\x89PNG\r\n\x1a\nrest", "image/png"),
        ("a.gif", b"GIF89a rest", "image/gif"),
        ("a.webp", b"RIFF\x01\x02\x03\x04WEBPVP8 ", "image/webp"),
        ("a.pdf", b"%PDF-1.7\nrest", "application/pdf"),
    ];
    for (name, content, media_type) in cases {
        workspace.put(name, content);

        let result = workspace.call("read", &json!({"file_path": name}));

        let (Some(Kind::Image(media)) | Some(Kind::Document(media))) = &result.content[0].kind else {
            panic!("{name}: {result:?}")
        };
        assert_eq!((media.media_type.as_str(), media.data.as_slice()), (media_type, content));
        assert_eq!(matches!(result.content[0].kind, Some(Kind::Document(_))), name.ends_with("pdf"));
    }
}

#[test]
fn file_that_is_not_what_its_extension_says_is_refused() {
    let mut workspace = Workspace::new();
    workspace.put("a.png", "version https://git-lfs.github.com/spec/v1\n");
    workspace.put("a.pdf", "text");
    workspace.put("big.gif", b"GIF89a too long");
    workspace.context.limits.max_image_bytes = 10;

    assert_eq!(
        workspace.error("read", &json!({"file_path": "big.gif"})),
        "read: big.gif is 15 bytes, exceeds 10-byte limit for image/PDF files."
    );
    workspace.context.limits.max_image_bytes = 100;
    assert_eq!(
        workspace.error("read", &json!({"file_path": "a.png"})),
        "read: a.png: not a PNG, JPEG, GIF or WebP image, although its name ends in .png"
    );
    assert_eq!(
        workspace.error("read", &json!({"file_path": "a.pdf"})),
        "read: a.pdf: not a PDF document, although its name ends in .pdf"
    );
    assert_eq!(
        workspace.error("read", &json!({"file_path": "a.pdf", "view_range": [1, 2]})),
        "read: view_range is not supported for image/PDF files"
    );
}

#[test]
fn content_that_grows_behind_its_size_is_still_limited() {
    let mut workspace = Workspace::new();
    // Files below /proc say that they are empty.
    workspace.context.allowed_roots = vec!["/proc/self".into()];
    workspace.context.limits.max_text_bytes = 10;

    let text = workspace.error("read", &json!({"file_path": "/proc/self/status"}));

    assert!(text.starts_with("read: /proc/self/status is 11 bytes, exceeds 10-byte limit."), "{text}");
    assert_eq!(fs::metadata("/proc/self/status").expect("metadata").len(), 0);
}

/// The lines `start` to `end` of a text, the slow way.
fn naive(text: &str, start: usize, end: i64) -> String {
    let lines: Vec<&str> = text.split('\n').collect();
    let last = usize::try_from(end).ok().filter(|end| *end > 0).unwrap_or(lines.len()).min(lines.len());
    let first = start.max(1) - 1;
    if first < last { lines[first..last].join("\n") } else { String::new() }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn range_is_what_splitting_at_line_ends_gives(
        text in "(\n|\r\n|[a-zé]{1,4}|\u{0}{1,3}){0,24}",
        long in 0_usize..3,
        start in 0_usize..12,
        end in -2_i64..14,
    ) {
        // Longer than one read, so that ranges begin and end in different pieces.
        let text = text.repeat(1 + long * 900);
        let workspace = Workspace::new();
        workspace.put("f", &text);

        let read = workspace.ok("read", &json!({"file_path": "f", "view_range": [start, end]}));

        prop_assert_eq!(read, naive(&text, start, end));
    }
}
