use std::{
    fs::{self, FileTimes},
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use proptest::prelude::*;
use serde_json::json;

use crate::tool::testing::{Workspace, any_path, ripgrep};

fn set_time(path: &Path, seconds: u64) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let file = fs::File::options().write(true).open(path).expect("file");
    file.set_times(FileTimes::new().set_modified(time)).expect("time");
}

/// Paths of a result, from the workspace.
fn listed(workspace: &Workspace, text: &str) -> Vec<String> {
    if text == "no matches" {
        return Vec::new();
    }
    let root = format!("{}/", workspace.root().display());
    text.lines().map(|line| line.strip_prefix(&root).expect("absolute path").to_owned()).collect()
}

#[test]
fn newest_files_come_first_and_no_more_than_the_limit() {
    let workspace = Workspace::new();
    for number in 0..250 {
        let path = workspace.put(&format!("d{}/f{number:03}", number % 7), "");
        set_time(&path, 1_000_000 + (number * 37) % 250);
    }
    let mut expected: Vec<(u64, String)> =
        (0..250).map(|number| ((number * 37) % 250, format!("d{}/f{number:03}", number % 7))).collect();
    expected.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    let expected: Vec<String> = expected.into_iter().take(200).map(|(_, name)| name).collect();

    let text = workspace.ok("glob", &json!({"pattern": "**/f*"}));

    assert_eq!(listed(&workspace, &text), expected);
}

#[test]
fn files_of_the_same_age_are_sorted_by_name() {
    let workspace = Workspace::new();
    for name in ["c", "a", "b/x", "b.x"] {
        set_time(&workspace.put(name, ""), 5);
    }

    let text = workspace.ok("glob", &json!({"pattern": "**"}));

    assert_eq!(listed(&workspace, &text), ["a", "b.x", "b/x", "c"]);
}

#[test]
fn links_count_when_they_lead_to_a_regular_file_inside_the_search_root() {
    let workspace = Workspace::new();
    fs::write(workspace.outside().join("secret.txt"), "").expect("file");
    let inside = workspace.put("src/a.txt", "");
    workspace.put("other.txt", "");
    for (name, target) in [
        ("src/inside.txt", inside.clone()),
        ("src/outside.txt", workspace.outside().join("secret.txt")),
        ("src/other.txt", "../other.txt".into()),
        ("src/dangling.txt", "nowhere".into()),
        ("src/directory.txt", "..".into()),
        ("src/away", workspace.outside()),
    ] {
        symlink(target, workspace.path(name)).expect("link");
    }
    let sorted = |path: &str| {
        let mut found = listed(&workspace, &workspace.ok("glob", &json!({"pattern": "**/*.txt", "path": path})));
        found.sort();
        found
    };

    assert_eq!(sorted("src"), ["src/a.txt", "src/inside.txt"]);
    assert_eq!(sorted("."), ["other.txt", "src/a.txt", "src/inside.txt", "src/other.txt"]);
}

#[test]
fn search_root_has_to_be_a_directory_inside() {
    let workspace = Workspace::new();
    workspace.put("file", "");
    symlink(workspace.outside(), workspace.path("away")).expect("link");
    let glob = |path: &str| workspace.error("glob", &json!({"pattern": "*", "path": path}));

    assert_eq!(glob("file"), "glob: file: not a directory");
    assert_eq!(glob("away"), "glob: path 'away' is outside the session's working directory");
    assert_eq!(glob("../.."), "glob: path '../..' is outside the session's working directory");
}

#[test]
fn search_that_is_cut_short_says_so() {
    let mut workspace = Workspace::new();
    for number in 0..50 {
        workspace.put(&format!("f{number}"), "");
    }
    workspace.context.limits.max_glob_entries = 10;
    let entries = workspace.ok("glob", &json!({"pattern": "*"}));
    workspace.context.limits.glob_time = Duration::ZERO;
    let time = workspace.ok("glob", &json!({"pattern": "*"}));

    assert_eq!(entries.lines().count(), 11);
    assert!(entries.ends_with("\n[the search was cut short after 10 directory entries]"), "{entries}");
    assert_eq!(time, "no matches\n[the search was cut short after 0 ms]");
}

#[test]
fn names_that_are_not_text_are_shown_as_well_as_possible() {
    let workspace = Workspace::new();
    fs::write(workspace.root().join(std::ffi::OsStr::from_bytes(b"a\xff.txt")), "").expect("file");

    assert_eq!(listed(&workspace, &workspace.ok("glob", &json!({"pattern": "*.txt"}))), ["a\u{fffd}.txt"]);
}

/// One name against one segment of a pattern, by trying every way.
fn naive_name(pattern: &[char], name: &[char]) -> bool {
    match (pattern.first(), name.first()) {
        (None, None) => true,
        (Some('*'), _) => naive_name(&pattern[1..], name) || (!name.is_empty() && naive_name(pattern, &name[1..])),
        // A class of one character stands for that character.
        (Some('['), Some(given)) if pattern.get(2) == Some(&']') => {
            pattern[1] == *given && naive_name(&pattern[3..], &name[1..])
        }
        (Some('?'), Some(_)) => naive_name(&pattern[1..], &name[1..]),
        (Some(wanted), Some(given)) if wanted == given => naive_name(&pattern[1..], &name[1..]),
        _ => false,
    }
}

fn naive(pattern: &[&str], path: &[&str]) -> bool {
    match (pattern.first(), path.first()) {
        (None, None) => true,
        // At the end "**" is everything below, and not the directory itself.
        (Some(&"**"), _) if pattern.len() == 1 => !path.is_empty(),
        (Some(&"**"), _) => naive(&pattern[1..], path) || (!path.is_empty() && naive(pattern, &path[1..])),
        (Some(segment), Some(name)) => {
            let (segment, name): (Vec<char>, Vec<char>) = (segment.chars().collect(), name.chars().collect());
            naive_name(&segment, &name) && naive(&pattern[1..], &path[1..])
        }
        _ => false,
    }
}

/// `{a,b}` written out.
fn expand(pattern: &str) -> Vec<String> {
    let Some((before, rest)) = pattern.split_once('{') else { return vec![pattern.to_owned()] };
    let (inside, after) = rest.split_once('}').expect("closed");
    inside.split(',').flat_map(|part| expand(&format!("{before}{part}{after}"))).collect()
}

/// The same for a whole pattern and a path, with nothing of the code under test.
fn naively_matches(pattern: &str, path: &Path) -> bool {
    let path = path.to_string_lossy();
    let path: Vec<&str> = path.split('/').collect();
    expand(pattern).iter().any(|variant| naive(&variant.split('/').collect::<Vec<_>>(), &path))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn result_is_what_a_naive_matcher_finds(
        files in prop::collection::btree_set("[ab.](/[ab]{1,2}){0,3}", 1..12),
        segments in prop::collection::vec("\\*\\*|([ab*?]|\\{a,b\\}|\\{ab,b/a\\}){1,3}", 1..4),
    ) {
        let workspace = Workspace::new();
        fs::create_dir(workspace.path("x")).expect("directory");
        let mut made = Vec::new();
        for file in &files {
            let path = workspace.path(&format!("x/{file}"));
            if !file.starts_with('.') && fs::create_dir_all(path.parent().expect("parent")).is_ok() && fs::write(&path, "").is_ok() {
                made.push(file.as_str());
            }
        }
        // Three and more stars in a row have no agreed meaning.
        prop_assume!(!segments.iter().any(|segment| segment != "**" && segment.contains("**")));
        let pattern = segments.join("/");
        let matches = |file: &str| naively_matches(&pattern, Path::new(file));
        let mut expected: Vec<String> = made.iter().filter(|file| matches(file)).map(|file| format!("x/{file}")).collect();
        expected.sort();

        let text = workspace.ok("glob", &json!({"pattern": pattern, "path": "x"}));
        let mut found = listed(&workspace, &text);
        found.sort();

        prop_assert_eq!(found, expected, "{}", pattern);
    }
}

/// A tree with every kind of name that has ever broken a program.
fn nasty_tree(workspace: &Workspace) {
    let deep = "d/".repeat(40);
    let names: [&[u8]; 16] = [
        b"plain.txt",
        b"with space.txt",
        b"-leading.txt",
        b"--files.txt",
        "ünïcödé.txt".as_bytes(),
        b"in\xffvalid.txt",
        b"$(x)`y`.txt",
        b"quote'\".txt",
        b"back\\slash.txt",
        b"[class].txt",
        b"{brace}.txt",
        b"star*.txt",
        b".hidden.txt",
        b".dir/inner.txt",
        b"no_extension",
        b"UPPER.TXT",
    ];
    for directory in ["", "a/", "a/b.txt/", deep.as_str(), "-d/", "sp ace/"] {
        for name in names {
            let path = workspace.root().join(directory).join(Path::new(std::ffi::OsStr::from_bytes(name)));
            fs::create_dir_all(path.parent().expect("parent")).expect("directory");
            fs::write(path, "x\n").expect("file");
        }
    }
    workspace.put(".gitignore", "*.txt\n");
    workspace.put("a/.ignore", "*\n");
}

#[test]
fn the_same_files_are_found_as_by_ripgrep() {
    let Some(ripgrep) = ripgrep() else { return };
    let mut workspace = Workspace::new();
    workspace.context.limits.max_glob_results = 10_000;
    nasty_tree(&workspace);
    let root = workspace.root().to_owned();

    for pattern in
        ["**/*.txt", "**", "**/a/*", "*", "*.txt", "a/**/*.txt", "**/*e.txt", "{a,-d}/*", "**/[[]*", "**/UPPER.*"]
    {
        // A leading slash anchors the pattern for ripgrep, which takes "*" as "at any depth" otherwise.
        let output = Command::new(&ripgrep)
            .args(["--no-config", "--files", "-uu", "--null", "-g"])
            .arg(format!("/{pattern}"))
            .current_dir(&root)
            .output()
            .expect("ripgrep runs");
        let paths = output.stdout.split(|byte| *byte == 0).filter(|path| !path.is_empty());
        let absolute = |path: &[u8]| root.join(Path::new(std::ffi::OsStr::from_bytes(path)));
        let mut expected: Vec<PathBuf> = paths.map(absolute).collect();
        // ripgrep searches a directory that the pattern names; this tool lists files that match it.
        expected.retain(|path| naively_matches(pattern, path.strip_prefix(&root).expect("inside")));
        let mut expected: Vec<String> = expected.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        expected.sort();
        assert!(!expected.is_empty(), "{pattern} finds nothing");

        let mut found: Vec<String> =
            workspace.ok("glob", &json!({"pattern": pattern})).lines().map(str::to_owned).collect();
        found.sort();

        assert_eq!(found, expected, "{pattern}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn any_small_tree_is_listed_as_by_ripgrep(files in prop::collection::btree_set(any_path(), 1..8)) {
        let Some(ripgrep) = ripgrep() else { return Ok(()) };
        let workspace = Workspace::new();
        for file in &files {
            let path = workspace.root().join(std::ffi::OsStr::from_bytes(file));
            // A file where a directory should be: the tree is then smaller.
            if fs::create_dir_all(path.parent().expect("parent")).is_ok() {
                let _ = fs::write(path, "");
            }
        }
        let output = Command::new(&ripgrep)
            .args(["--no-config", "--files", "-uu", "--null"])
            .current_dir(workspace.root())
            .output()
            .expect("ripgrep runs");
        let listed = String::from_utf8_lossy(&output.stdout);
        let absolute = |path: &str| format!("{}/{path}", workspace.root().display());
        // Names may have line ends in them, so lines are compared and not names.
        let expected = listed.split_terminator('\0').map(absolute).collect::<Vec<String>>().join("\n");
        let mut expected: Vec<&str> = expected.lines().collect();
        expected.sort_unstable();

        let text = workspace.ok("glob", &json!({"pattern": "**"}));
        let mut found: Vec<&str> = text.lines().filter(|line| *line != "no matches").collect();
        found.sort_unstable();

        prop_assert_eq!(found, expected);
    }
}
