//! The file tools on equal trees.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use proto::init::v1::content_block::Kind;
use sandbox_init::tool::{Context, run};
use sandbox_runner_tests::daemon::{Random, number};
use sandbox_runner_tests::needs_official_sdk;
use serde_json::{Value, json};

use crate::{Answer, Case, Difference, Official, ROOT, Verdict, pick, placed};

/// Calls on one tree; then it is planted again.
const CALLS_A_TREE: u64 = 12;
const DIFFERENCES: &[Difference] = &[
    Difference {
        name: "unknown fields",
        reason: "the official tool refuses a field that it does not know; an API that is newer may send some, and the rest of the call is clear",
        fits: |case| case.input.get("unknown").is_some() && case.official.is_invalid_arguments(),
    },
    Difference {
        name: "named fields",
        reason: "the official text says only that arguments are invalid; ours names the field, so that the model can put it right",
        fits: |case| case.official.is_invalid_arguments() && case.ours.is_error && case.ours.begins(case.tool),
    },
    Difference {
        name: "empty is missing",
        reason: "the official Python tool takes an empty path for the working directory, an empty pattern for every line and an empty old_string for the place between any two characters; TypeScript and Go say of the last that it is required, and so do we of all",
        fits: |case| {
            let missing = |field: &&str| {
                case.input[field] == "" && case.ours.text() == format!("{}: {field} is required", case.tool)
            };
            case.ours.is_error && ["file_path", "old_string", "pattern"].iter().any(missing)
        },
    },
    Difference {
        name: "negative lines",
        reason: "the official tool counts a negative first line as the first; it is a mistake of the model, and ours says so before it looks at the file",
        fits: |case| {
            let negative = case.input["view_range"][0].as_i64().is_some_and(|line| line < 0);
            negative && case.ours.text().starts_with("read: view_range start_line must not be negative")
        },
    },
    Difference {
        name: "lines are decoded, not files",
        reason: "the official tool decodes a short file whole before it takes lines of it; ours decodes the lines, as both do with a long file",
        fits: |case| {
            case.tool == "read"
                && case.input["view_range"].is_array()
                && !case.ours.is_error
                && case.official.text().contains(": not valid UTF-8 text")
        },
    },
    Difference {
        name: "file where a directory should be",
        reason: "the official tool tells what mkdir said about the parent; both refuse",
        fits: |case| {
            case.tool == "write" && case.official.ends("file already exists") && case.ours.ends("not a directory")
        },
    },
    Difference {
        name: "bytes are bytes",
        reason: "the official Python tool counts characters and calls them bytes; TypeScript and Go count bytes, and so do we",
        fits: |case| {
            let content = case.input["content"].as_str().unwrap_or_default();
            let path = case.input["file_path"].as_str().unwrap_or_default();
            case.tool == "write"
                && !content.is_ascii()
                && case.official.text() == format!("wrote {} bytes to {path}", content.chars().count())
                && case.ours.text() == format!("wrote {} bytes to {path}", content.len())
        },
    },
    Difference {
        name: "search in this process",
        reason: "the official tool shows the standard error of rg; ours has no rg, says the same about pattern and path in the words of the other tools, and of a call that is wrong twice tells of the pattern",
        fits: |case| {
            let path = case.ours.ends("no such file or directory") || case.ours.ends("not a directory");
            let pattern = case.ours.text().starts_with("grep: invalid regex: ");
            let of_rg = case.official.text().starts_with("grep: rg failed: ") && (path || pattern);
            let of_both = case.official.text().starts_with("grep: path '") && pattern;
            case.ours.is_error && (of_rg || of_both)
        },
    },
    Difference {
        name: ORDER,
        reason: "rg searches files at the same time and prints them as they are done: its order is not defined, nor what is left when both cut at the same size",
        fits: |case| {
            let full = case.official.ends(TRUNCATED) && case.ours.ends(TRUNCATED);
            case.tool == "grep" && !case.ours.is_error && (full || case.official.lines() == case.ours.lines())
        },
    },
    Difference {
        name: MAPPED,
        reason: "rg maps a file that is named into memory, where a NUL ends no line; in a file that it finds one does, and with ours in both, so that a file is searched alike however it is reached",
        fits: |case| {
            let binary = case.input["path"].as_str().is_some_and(|path| path.ends_with("binary.bin"));
            let told = case.ours.text().starts_with("binary file matches");
            case.tool == "grep" && binary && case.official.text() == "no matches" && told
        },
    },
    Difference {
        name: "search of nothing",
        reason: "the official glob finds nothing where there is no directory; ours says that there is none, so that a mistyped path is not taken for an answer",
        fits: |case| {
            let told = case.ours.ends("no such file or directory") || case.ours.ends("not a directory");
            case.tool == "glob" && case.official.text() == "no matches" && case.ours.is_error && told
        },
    },
    Difference {
        name: "** is everything below",
        reason: "pathlib takes a last ** for directories; TypeScript, Go and every shell take it for everything below, and so do we",
        fits: |case| {
            let last = case.input["pattern"].as_str().is_some_and(|pattern| pattern.ends_with("**"));
            case.tool == "glob" && last && !case.official.is_error && !case.ours.is_error
        },
    },
    Difference {
        name: "linked directories",
        reason: "the official glob goes through a link that the pattern names; ours goes through none, so that no search can go in circles",
        fits: |case| {
            let named = case.input["pattern"].as_str().is_some_and(|pattern| pattern.starts_with("linked/"));
            case.tool == "glob" && named && !case.official.is_error && case.ours.text() == "no matches"
        },
    },
    Difference {
        name: "files only",
        reason: "the official Python glob lists directories, links to nothing, and what is in .git and node_modules; the TypeScript glob lists files and skips both, and so do we",
        fits: |case| {
            let (official, mut ours) = (case.official.lines(), case.ours.lines());
            ours.remove("no matches");
            let left_out = |line: &String| {
                let path = PathBuf::from(line.replace(ROOT, &case.root.display().to_string()));
                let kept_out = line.contains("/.git/") || line.contains("/node_modules/");
                kept_out || path.is_dir() || !path.exists()
            };
            case.tool == "glob"
                && !case.official.is_error
                && !case.ours.is_error
                && ours.is_subset(&official)
                && official.difference(&ours).all(left_out)
        },
    },
    Difference {
        name: "braces",
        reason: "the official Python glob takes braces as they are; the TypeScript glob expands them, and so do we",
        fits: |case| {
            let braces = case.input["pattern"].as_str().is_some_and(|pattern| pattern.contains('{'));
            case.tool == "glob" && braces && case.official.text() == "no matches" && !case.ours.is_error
        },
    },
];
/// Rows that a run may not meet: rg may print in our order by chance, and few calls look for what is between two NULs.
const ORDER: &str = "order of files";
const MAPPED: &str = "lines of a named file";
/// Last line of a search that found too much.
const TRUNCATED: &str = "[output truncated at 102400 bytes]";

fn ours(tool: &str, input: &Value, root: &Path) -> Answer {
    let result = run(tool, input.to_string().as_bytes(), &Context::new(root));
    let media = |kind: &str, media: proto::init::v1::Media| {
        let data = STANDARD.encode(media.data);
        json!({"type": kind, "source": {"type": "base64", "media_type": media.media_type, "data": data}})
    };
    let block = |kind: Kind| match kind {
        // What the connector does as well.
        Kind::Text(text) if text.is_empty() => json!({"type": "text", "text": "(no output)"}),
        Kind::Text(text) => json!({"type": "text", "text": text}),
        Kind::Image(image) => media("image", image),
        Kind::Document(document) => media("document", document),
    };
    let content = result.content.into_iter().filter_map(|one| one.kind).map(block).collect();
    Answer::of(result.is_error, content, root)
}

/// Thirty directories, one in the other.
const DEEP: &str = "d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d";

/// Makes the tree anew; each file is a second newer than the one before.
fn plant(root: &Path) {
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
    }
    let long: String = (0..9000).fold(String::new(), |mut text, number| {
        writeln!(text, "line {number} of a file that is too long to be read at once").unwrap();
        text
    });
    let wide = format!("foo {}\nl2\n", "wide ".repeat(1000));
    let deep = format!("{DEEP}/e.txt");
    let files: [(&str, &[u8]); 21] = [
        ("a.txt", b"l1\nl2\nl3\n"),
        ("no-newline.txt", b"first\nlast"),
        ("empty.txt", b""),
        ("crlf.txt", b"one\r\ntwo\r\n"),
        ("unicode.txt", "h\u{e9}llo\nw\u{f6}rld \u{1f600}\n".as_bytes()),
        ("latin1.txt", b"h\xe9llo\n"),
        ("bom.txt", b"\xef\xbb\xbfl1\nfoo\n"),
        ("wide.txt", wide.as_bytes()),
        (&deep, b"foo deep\n"),
        ("binary.bin", b"\x00\x01foo\x02\n"),
        ("long.txt", long.as_bytes()),
        ("picture.png", b"\x89PNG\r\n\x1a\nnot really"),
        ("PAPER.PDF", b"%PDF-1.4 not really"),
        (".hidden", b"hidden foo\n"),
        ("sub/b.txt", b"foo bar\nfoo baz\n"),
        ("sub/deep/c.rs", b"fn foo() {}\n"),
        ("sub/.gitignore", b"ignored.txt\n"),
        ("sub/ignored.txt", b"foo ignored\n"),
        (".git/config", b"foo = 1\n"),
        ("node_modules/x.js", b"foo()\n"),
        ("with blank [x].txt", b"foo\n"),
    ];
    let begin = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    for (number, (name, content)) in files.iter().enumerate() {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        File::options()
            .append(true)
            .open(&path)
            .unwrap()
            .set_modified(begin + Duration::from_secs(number as u64))
            .unwrap();
    }
    fs::create_dir(root.join("empty")).unwrap();
    for (target, name) in [
        ("sub/b.txt", "link.txt"),
        ("sub", "linked"),
        ("/etc", "outside"),
        ("/etc/passwd", "outside.txt"),
        ("nowhere/new.txt", "dangling"),
        ("loop-b", "loop-a"),
        ("loop-a", "loop-b"),
    ] {
        symlink(target, root.join(name)).unwrap();
    }
}

/// Contents of all regular files.
fn tree(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() {
                open.push(path);
            } else if kind.is_file() {
                files.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

const PATHS: &[&str] = &[
    "a.txt",
    "no-newline.txt",
    "empty.txt",
    "crlf.txt",
    "unicode.txt",
    "latin1.txt",
    "bom.txt",
    "wide.txt",
    DEEP,
    "binary.bin",
    "long.txt",
    "picture.png",
    "PAPER.PDF",
    ".hidden",
    "sub/b.txt",
    "sub",
    "empty",
    "nope",
    "nope/nope.txt",
    "a.txt/x",
    "./a.txt",
    "sub/../a.txt",
    "../a.txt",
    "$W/a.txt",
    "$W/../x",
    "$W",
    "/etc/passwd",
    "/",
    "",
    ".",
    "link.txt",
    "linked/b.txt",
    "outside",
    "outside/passwd",
    "outside.txt",
    "dangling",
    "loop-a",
    "new/deep/file.txt",
    "with blank [x].txt",
    "sub//b.txt",
    "sub/b.txt/",
];
const TEXTS: &[&str] = &["l", "l1", "l2\nl3", "foo", "foo bar", "zzz", "", "\r\n", "\u{e9}", "last", "line 5 of"];
const NEW_TEXTS: &[&str] = &["", "X", "two\nlines\n", "\u{e9}\u{1f600}", "l1", "$1\\0"];
const GLOBS: &[&str] = &[
    "*",
    "**",
    "**/*",
    "*.txt",
    "**/*.txt",
    "sub/*",
    "sub/**",
    "*.{txt,rs}",
    "**/*.rs",
    ".*",
    "[a-c]*",
    "[!a]*.txt",
    "?.txt",
    "",
    "/etc/*",
    "../*",
    "sub/../*",
    "a.txt",
    "nope*",
    "outside/*",
    "linked/*",
    "*[x]*",
    "**/deep/**",
    "*.TXT",
    "**/b.txt",
    "./*.txt",
];
const PATTERNS: &[&str] = &[
    "foo",
    "^foo",
    "l[0-9]",
    "foo|bar",
    "zzz",
    "",
    "(",
    "\\bfoo\\b",
    "(?i)FOO",
    "h.llo",
    "\\r$",
    "o{2}",
    "^$",
    "last$",
    "[",
    "foo\\d",
    "line 12 ",
    "w\u{f6}rld",
    "\\p{L}+",
    "-n",
];
const RANGES: &[[i64; 2]] =
    &[[1, 1], [2, 2], [2, -1], [1, 0], [3, 1], [0, 2], [-3, 2], [2, 100], [100, 200], [10, 12], [1, 8000]];

/// Draws a call; now and then one whose input is wrong.
fn draw(random: &mut Random) -> (&'static str, Value) {
    let tool = pick(random, &["read", "read", "write", "edit", "edit", "glob", "glob", "grep", "grep"]);
    let path = pick(random, PATHS);
    let mut input = match tool {
        "read" => json!({"file_path": path}),
        "write" => json!({"file_path": path, "content": pick(random, NEW_TEXTS)}),
        "edit" => json!({"file_path": path, "old_string": pick(random, TEXTS), "new_string": pick(random, NEW_TEXTS)}),
        "glob" => json!({"pattern": pick(random, GLOBS)}),
        _ => json!({"pattern": pick(random, PATTERNS)}),
    };
    match (tool, random.below(3)) {
        ("read", 0 | 1) => input["view_range"] = json!(pick(random, RANGES)),
        ("edit", 0) => input["replace_all"] = json!(random.below(2) == 0),
        ("glob" | "grep", 0 | 1) => input["path"] = json!(path),
        _ => {}
    }
    if random.below(12) == 0 {
        let fields: Vec<String> = input.as_object().map(|fields| fields.keys().cloned().collect()).unwrap_or_default();
        let field = pick(random, &fields);
        match random.below(4) {
            0 => _ = input.as_object_mut().and_then(|fields| fields.remove(&field)),
            1 => input[&field] = Value::Null,
            2 => input[&field] = json!(["x", {}]),
            _ => input["unknown"] = json!(1),
        }
    }
    (tool, input)
}

#[test]
fn file_tools_answer_as_the_official_ones_but_for_what_is_meant() {
    let python = needs_official_sdk!();
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, other) = (one.path().canonicalize().unwrap(), other.path().canonicalize().unwrap());
    let mut official = Official::start(&python, &one);
    let mut random = Random::new(number("SEED", 7));
    let mut verdict = Verdict::default();
    let mut begin = true;
    for number in 0..number("TOOLSET_CALLS", 3000) {
        if begin || number % CALLS_A_TREE == 0 {
            plant(&one);
            plant(&other);
        }
        let (tool, input) = draw(&mut random);
        let official = official.call(tool, &placed(&input, &one), &one);
        let ours = ours(tool, &placed(&input, &other), &other);
        let case = Case { tool, input, official, ours, root: one.clone() };
        let changed = matches!(tool, "write" | "edit");
        let differs = case.official != case.ours;
        if !differs && changed && tree(&one) != tree(&other) {
            verdict.unknown.push(format!("the trees differ after {} {}", case.tool, case.input));
            begin = true;
            continue;
        }
        // What one of them may have changed must not be the reason of the next difference.
        begin = differs && changed;
        verdict.judge(&case, DIFFERENCES);
    }
    verdict.assert(DIFFERENCES, &[ORDER, MAPPED], "TOOLSET_CALLS");
}
