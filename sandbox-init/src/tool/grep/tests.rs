use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::Path,
    process::Command,
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use proptest::prelude::*;
use serde_json::json;

use crate::tool::testing::{Workspace, any_path, ripgrep};

/// What ripgrep prints for the same call, as lines in a fixed order.
fn by_ripgrep(program: &Path, workspace: &Workspace, pattern: &str, path: &Path) -> Vec<String> {
    let output = Command::new(program)
        // Without this a binary file that is named is searched in one piece, and a NUL in it is noticed elsewhere.
        .arg("--no-mmap")
        .args(["--no-config", "-n", "--no-heading", "-e", pattern, "--"])
        .arg(path)
        .current_dir(workspace.root())
        .env_remove("RIPGREP_CONFIG_PATH")
        .stdin(std::process::Stdio::null())
        .output()
        .expect("ripgrep runs");
    sorted(&String::from_utf8_lossy(&output.stdout))
}

fn sorted(text: &str) -> Vec<String> {
    // Versions of ripgrep differ in how they begin these two notes.
    let text = text.replace("Binary file matches", "binary file matches");
    let mut lines: Vec<String> = text.split_inclusive('\n').map(str::to_owned).collect();
    lines.sort();
    lines
}

fn assert_same(program: &Path, workspace: &Workspace, pattern: &str, path: &str) {
    let expected = by_ripgrep(program, workspace, pattern, &workspace.path(path));
    let text = workspace.ok("grep", &json!({"pattern": pattern, "path": path}));
    let found = if text == "no matches" { Vec::new() } else { sorted(&text) };
    let missing: Vec<&String> = expected.iter().filter(|line| !found.contains(line)).take(5).collect();
    let extra: Vec<&String> = found.iter().filter(|line| !expected.contains(line)).take(5).collect();
    assert!(missing.is_empty() && extra.is_empty(), "{pattern} in {path:?}: missing {missing:?}, extra {extra:?}");
    assert_eq!(found.len(), expected.len(), "{pattern} in {path:?}");
}

/// A tree with ignore files, hidden and binary files and every kind of name that has ever broken a program.
fn nasty_tree(workspace: &Workspace) {
    let text = "fn main() {}\n\tlet x = 42; // é\r\nlast line without end";
    let names: [&[u8]; 12] = [
        b"plain.rs",
        b"with space.rs",
        b"-leading",
        b"new\nline.rs",
        "ünï.rs".as_bytes(),
        b"in\xffvalid.rs",
        b".hidden.rs",
        b"ignored.log",
        b"kept.log",
        b"build/out.rs",
        b"x/node_modules/y.rs",
        b"[a].rs",
    ];
    for directory in ["", "a/", "a/b/", "deep/er/and/deep/er/", "-d/"] {
        for name in names {
            let path = workspace.root().join(directory).join(Path::new(OsStr::from_bytes(name)));
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            fs::write(path, text).expect("file");
        }
    }
    workspace.put(".git/config", "fn main() {}\n");
    workspace.put(".git/info/exclude", "plain.rs\n");
    workspace.put(".gitignore", "*.log\n!kept.log\n/build\n");
    workspace.put("a/.gitignore", "b/plain.rs\n[\n");
    workspace.put("a/.ignore", "with*\n");
    workspace.put("deep/.rgignore", "er/and/deep\n");
    workspace.put("binary/early", b"\0fn main() {}\n");
    workspace.put("binary/late", [b"fn main() {}\n".repeat(8000).as_slice(), b"\0\nfn main() {}\n"].concat());
    workspace.put("binary/none", b"nothing\0\n");
    workspace.put(
        "utf16",
        [b"\xff\xfe".to_vec(), "fn main() {}\n".encode_utf16().flat_map(u16::to_le_bytes).collect()].concat(),
    );
    workspace.put("bom", b"\xef\xbb\xbffn main() {}\n");
    workspace.put("latin1", b"fn main() { // \xe9\n");
    workspace.put("empty", b"");
    symlink("../outside", workspace.path("away")).expect("link");
    symlink("plain.rs", workspace.path("link.rs")).expect("link");
    fs::write(workspace.outside().join("secret"), "fn main() {}\n").expect("file");
}

#[test]
fn the_same_lines_are_found_as_by_ripgrep() {
    let Some(program) = ripgrep() else { return };
    let mut workspace = Workspace::new();
    workspace.context.limits.max_grep_output_bytes = 64 * 1024 * 1024;
    nasty_tree(&workspace);

    for pattern in [
        "fn main",
        "x",
        "^",
        "$",
        r"\bé",
        "without end$",
        r"(?i)FN\s+MAIN",
        r"^\tlet \w+ = \d+",
        "e.d",
        "nothing",
        "absent",
        r"\r",
        "-e",
    ] {
        for path in ["", "a", "deep", "a/b", "x", "-d"] {
            assert_same(&program, &workspace, pattern, path);
        }
    }
    for path in [
        "plain.rs",
        "binary/early",
        "binary/late",
        "binary/none",
        "utf16",
        "bom",
        "latin1",
        "empty",
        ".hidden.rs",
        "ignored.log",
    ] {
        for pattern in ["fn main", "nothing", "^"] {
            assert_same(&program, &workspace, pattern, path);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn any_small_tree_gives_the_same_lines_as_ripgrep(
        files in prop::collection::btree_map(any_path(), "([abé \u{0}\t]{0,6}(\n|\r\n)){0,5}[ab]{0,2}", 1..8),
        rules in prop::collection::vec("[!/]?[ab*]{1,3}/?", 0..3),
        ignore_file in prop::sample::select(vec![".gitignore", ".ignore", "a/.gitignore", "b/.rgignore"]),
        repository in any::<bool>(),
        pattern in "[ab.é]{1,2}[*+?]?(\\||\\$)?",
    ) {
        let Some(program) = ripgrep() else { return Ok(()) };
        let workspace = Workspace::new();
        if repository {
            fs::create_dir(workspace.path(".git")).expect("directory");
        }
        let ignore = (ignore_file.to_owned(), rules.join("\n"));
        let ignore = (ignore.0.into_bytes(), ignore.1);
        for (name, content) in files.iter().map(|(name, content)| (name.clone(), content.clone())).chain([ignore]) {
            let path = workspace.root().join(OsStr::from_bytes(&name));
            // A file where a directory should be: the tree is then smaller.
            if fs::create_dir_all(path.parent().expect("parent")).is_ok() {
                let _ = fs::write(path, content);
            }
        }
        assert_same(&program, &workspace, &pattern, "");
    }
}

#[test]
fn line_longer_than_a_read_does_not_change_what_is_found_in_other_files() {
    let mut workspace = Workspace::new();
    workspace.context.limits.max_grep_output_bytes = 1 << 24;
    for number in 0..8 {
        workspace.put(&format!("long{number}"), "x".repeat(300_000) + "match\n");
        workspace.put(&format!("late{number}"), [b"match\n".repeat(20_000).as_slice(), b"\0\n"].concat());
    }

    let text = workspace.ok("grep", &json!({"pattern": "match"}));

    let notes =
        text.lines().filter(|line| line.contains(": WARNING: stopped searching binary file after match")).count();
    assert_eq!((notes, text.lines().filter(|line| line.contains(":1:")).count()), (8, 16));
}

#[test]
fn result_over_the_limit_is_the_beginning_in_the_order_of_paths() {
    let mut workspace = Workspace::new();
    for number in 0..300 {
        workspace.put(&format!("d{}/f{number:03}", number % 10), format!("line of {number} é\n").repeat(number % 5));
    }
    workspace.context.limits.max_grep_output_bytes = 1 << 20;
    let whole = workspace.ok("grep", &json!({"pattern": "line"}));
    let paths: Vec<&str> = whole.lines().map(|line| line.split(':').next().expect("path")).collect();
    assert!(paths.is_sorted() && paths.len() > 500);

    for limit in [1, 100, 1000, 5003, whole.len() - 1] {
        workspace.context.limits.max_grep_output_bytes = limit;
        let cut = workspace.ok("grep", &json!({"pattern": "line"}));
        let kept = cut.strip_suffix(&format!("\n[output truncated at {limit} bytes]")).expect("marked");
        assert!(whole.starts_with(kept) && kept.len() <= limit && kept.len() + 2 > limit, "{limit}");
    }
    workspace.context.limits.max_grep_output_bytes = whole.len();
    assert_eq!(workspace.ok("grep", &json!({"pattern": "line"})), whole);
}

#[test]
fn special_files_neither_block_nor_get_searched() {
    let workspace = Workspace::new();
    workspace.put("good/file", "match\n");
    for name in ["good/fifo", "bad/.gitignore"] {
        let path = workspace.path(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("directory");
        mkfifo(&path, Mode::S_IRWXU).expect("fifo");
    }
    workspace.put("bad/file", "match\n");
    fs::create_dir(workspace.path("zero")).expect("directory");
    symlink("/dev/zero", workspace.path("zero/.ignore")).expect("link");

    let text = workspace.ok("grep", &json!({"pattern": "match"}));

    let why = "because an ignore file in it cannot be read or is too large";
    let first = workspace.path("bad").display().to_string();
    let told = format!("[2 directories were not searched, {why}; the first is {first}]");
    assert_eq!(text, format!("{}:1:match\n{told}", workspace.path("good/file").display()));
    assert_eq!(
        workspace.error("grep", &json!({"pattern": "x", "path": "good/fifo"})),
        "grep: good/fifo: not a regular file"
    );
}

#[test]
fn ignore_file_of_the_search_root_that_cannot_be_read_is_left_out() {
    let workspace = Workspace::new();
    workspace.put("file", "match\n");
    mkfifo(&workspace.path(".ignore"), Mode::S_IRWXU).expect("fifo");

    let text = workspace.ok("grep", &json!({"pattern": "match"}));

    assert_eq!(text, format!("{}:1:match\n", workspace.path("file").display()));
}

#[test]
fn search_that_takes_too_long_returns_what_it_has() {
    let mut workspace = Workspace::new();
    workspace.put("file", "match\n");
    workspace.context.limits.grep_time = Duration::ZERO;

    let text = workspace.ok("grep", &json!({"pattern": "absent"}));

    assert_eq!(text, "no matches\n[the search was cut short after 0 ms]");
}

#[test]
fn search_without_threads_finds_the_same() {
    let workspace = Workspace::new();
    nasty_tree(&workspace);
    let matcher = grep_regex::RegexMatcherBuilder::new().line_terminator(Some(b'\n')).build("main").expect("regex");
    let root = std::os::fd::OwnedFd::from(fs::File::open(workspace.root()).expect("root"));
    let run = |threads: bool| {
        let collector = std::sync::Arc::new(super::collect::Collector::new(1 << 24));
        let search = super::search::Search::new(matcher.clone(), std::sync::Arc::clone(&collector));
        search.walk(workspace.root(), &root, threads);
        collector.finish()
    };

    let (alone, together) = (run(false), run(true));

    let difference = alone.lines().zip(together.lines()).find(|(one, other)| one != other);
    assert_eq!((difference, alone.len()), (None, together.len()));
    assert!(alone.lines().count() > 10);
}

#[test]
fn sparse_file_and_endless_line_are_bounded() {
    let workspace = Workspace::new();
    fs::File::create(workspace.path("huge")).and_then(|file| file.set_len(1 << 40)).expect("file");
    workspace.put("small", "match\n");

    assert_eq!(
        workspace.ok("grep", &json!({"pattern": "match"})),
        format!("{}:1:match\n", workspace.path("small").display())
    );
}

#[test]
fn file_that_is_not_searched_to_its_end_is_counted_and_named() {
    let workspace = Workspace::new();
    let long = "match\n".to_owned() + &"x".repeat(33 << 20) + "\nmatch\n";
    let why = "because a line is too long or reading failed";
    workspace.put("b", &long);
    workspace.put("c", "match\n");
    let path = |name: &str| workspace.path(name).display().to_string();

    let one = workspace.ok("grep", &json!({"pattern": "match"}));
    workspace.put("a", &long);
    let two = workspace.ok("grep", &json!({"pattern": "absent"}));
    let single = workspace.ok("grep", &json!({"pattern": "match", "path": "b"}));

    let found = format!("{}:1:match\n{}:1:match\n", path("b"), path("c"));
    assert_eq!(one, format!("{found}[1 file was not searched to its end, {why}: {}]", path("b")));
    assert_eq!(two, format!("no matches\n[2 files were not searched to their end, {why}; the first is {}]", path("a")));
    assert_eq!(single, format!("1:match\n[1 file was not searched to its end, {why}]"));
}
