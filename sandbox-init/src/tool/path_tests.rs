use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    sync::atomic::{AtomicBool, Ordering},
};

use nix::fcntl::{RenameFlags, renameat2};
use proptest::prelude::*;

use super::open::open_beneath_by_steps;
use super::walk::MAX_LINKS;
use super::*;
use crate::tool::testing::Workspace;

fn requested(path: &str) -> RequestedPath {
    RequestedPath::new(path.to_owned()).expect("no NUL")
}

/// Ends the other side of a race, also when this side fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn directory_that_is_exchanged_for_a_link_never_leads_outside() {
    let workspace = Workspace::new();
    workspace.put("d/e/f", "inside");
    fs::create_dir(workspace.outside().join("e")).expect("directory");
    fs::write(workspace.outside().join("e/f"), "outside").expect("file");
    symlink(workspace.outside(), workspace.path("l")).expect("link");
    symlink("d/e/f", workspace.path("through")).expect("link");
    let roots = Roots::open(&workspace.context).expect("roots");
    let over = AtomicBool::new(false);
    let (mut inside, mut refused) = (0, 0);

    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let (d, l) = (workspace.path("d"), workspace.path("l"));
                renameat2(AT_FDCWD, &d, AT_FDCWD, &l, RenameFlags::RENAME_EXCHANGE).expect("exchange");
            }
        });
        let _end = Ends(&over);
        for round in 0..10_000 {
            let path = requested(["d/e/f", "through"][round % 2]);
            match roots.resolve(&path).and_then(|place| place.open_file()) {
                Ok(opened) => {
                    assert_eq!(std::io::read_to_string(opened.file).expect("content"), "inside");
                    inside += 1;
                }
                Err(_) => refused += 1,
            }
        }
    });

    assert!(inside > 0 && refused > 0, "no race took place: {inside} inside, {refused} refused");
}

#[test]
fn edit_under_an_exchanged_directory_never_changes_the_outside() {
    let workspace = Workspace::new();
    workspace.put("d/f", "old");
    fs::write(workspace.outside().join("f"), "old").expect("file");
    symlink(workspace.outside(), workspace.path("l")).expect("link");
    let over = AtomicBool::new(false);

    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let (d, l) = (workspace.path("d"), workspace.path("l"));
                renameat2(AT_FDCWD, &d, AT_FDCWD, &l, RenameFlags::RENAME_EXCHANGE).expect("exchange");
            }
        });
        let _end = Ends(&over);
        for round in 0..2_000 {
            let (old, new) = if round % 2 == 0 { ("old", "new") } else { ("new", "old") };
            let input = serde_json::json!({"file_path": "d/f", "old_string": old, "new_string": new});
            workspace.call("edit", &input);
            workspace.call("write", &serde_json::json!({"file_path": "d/made", "content": "x"}));
        }
    });

    let names: Vec<_> =
        fs::read_dir(workspace.outside()).expect("outside").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(names, ["f"]);
    assert_eq!(fs::read_to_string(workspace.outside().join("f")).expect("content"), "old");
}

#[test]
fn forty_links_are_followed_and_one_more_is_not() {
    let workspace = Workspace::new();
    workspace.put("link0", "end");
    for number in 1..=41 {
        symlink(format!("link{}", number - 1), workspace.path(&format!("link{number}"))).expect("link");
    }
    let roots = Roots::open(&workspace.context).expect("roots");

    assert!(roots.resolve(&requested("link40")).expect("place").open_file().is_ok());
    assert!(matches!(roots.resolve(&requested("link41")), Err(PathError::TooManyLinks)));
}

#[test]
fn dots_of_the_request_are_removed_before_links_are_followed() {
    let workspace = Workspace::new();
    workspace.put("deep/er/file", "deep");
    workspace.put("file", "top");
    symlink("deep/er", workspace.path("link")).expect("link");
    symlink("link/../er/file", workspace.path("climbing")).expect("link");
    let roots = Roots::open(&workspace.context).expect("roots");
    let end = |path: &str| roots.resolve(&requested(path)).expect("place").canonical;

    assert_eq!(end("link/../file"), workspace.path("file"));
    assert_eq!(end("nowhere/./../file"), workspace.path("file"));
    // In the text of a link they mean what they mean to the kernel.
    assert_eq!(end("climbing"), workspace.path("deep/er/file"));
}

/// What a tree of the property test consists of: small names, so that they meet.
#[derive(Clone, Debug)]
enum Item {
    Directory,
    File,
    Link(String),
}

fn any_path() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "c", "..", ".", "missing"]);
    let names = prop::collection::vec(name, 1..5).prop_map(|names| names.join("/"));
    let start = prop::sample::select(vec!["", "", "ROOT/", "ROOT/../", "OUTSIDE/", "/"]);
    (start, names).prop_map(|(start, names)| format!("{start}{names}"))
}

fn any_item() -> impl Strategy<Value = Item> {
    prop_oneof![
        Just(Item::Directory),
        Just(Item::File),
        any_path().prop_map(Item::Link),
        any_path().prop_map(Item::Link)
    ]
}

fn lexical(root: &Path, request: &str) -> PathBuf {
    let mut path = PathBuf::new();
    for part in root.join(request).components() {
        match part {
            Component::ParentDir => _ = path.pop(),
            part => path.push(part),
        }
    }
    path
}

/// The toolset's rule on path texts alone, with the file system asked for one name at a time.
fn reference(root: &Path, request: &str) -> Option<PathBuf> {
    fn follow(path: &Path, links: &mut u32) -> Option<PathBuf> {
        let mut done = PathBuf::from("/");
        let mut parts = path.components();
        while let Some(part) = parts.next() {
            match part {
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
                Component::ParentDir => drop(done.pop()),
                Component::Normal(name) => {
                    let next = done.join(name);
                    match fs::read_link(&next) {
                        Ok(target) => {
                            *links += 1;
                            if *links > MAX_LINKS {
                                return None;
                            }
                            return follow(&done.join(target).join(parts.as_path()), links);
                        }
                        Err(_) => done = next,
                    }
                }
            }
        }
        Some(done)
    }
    let end = follow(&lexical(root, request), &mut 0)?;
    end.starts_with(root).then_some(end)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn place_is_inside_and_where_the_rule_says(
        tree in prop::collection::btree_map("[abc](/[abc]){0,2}", any_item(), 0..10),
        requests in prop::collection::vec(any_path(), 1..8),
    ) {
        let workspace = Workspace::new();
        fs::write(workspace.outside().join("a"), "secret").expect("file");
        let spell = |text: &str| {
            let outside = workspace.outside();
            text.replace("ROOT", &workspace.root().to_string_lossy()).replace("OUTSIDE", &outside.to_string_lossy())
        };
        let tree: BTreeMap<String, Item> = tree;
        for (name, item) in &tree {
            let path = workspace.path(name);
            // A name below a link or file cannot be made; the tree is then smaller.
            let parent = path.parent().expect("parent");
            if parent.is_symlink() || !parent.canonicalize().is_ok_and(|real| real == parent) {
                continue;
            }
            match item {
                Item::Directory => drop(fs::create_dir(&path)),
                Item::File => drop(fs::write(&path, "inside")),
                Item::Link(target) => drop(symlink(spell(target), &path)),
            }
        }
        let roots = Roots::open(&workspace.context).expect("roots");
        for request in requests {
            let request = spell(&request);
            let wanted = reference(workspace.root(), &request);
            match roots.resolve(&requested(&request)) {
                Ok(place) => {
                    prop_assert!(place.canonical.starts_with(workspace.root()));
                    prop_assert_eq!(Some(&place.canonical), wanted.as_ref());
                    prop_assert_eq!(place.entry.is_some(), place.canonical.symlink_metadata().is_ok());
                    if let Some(entry) = &place.entry {
                        let named = nix::sys::stat::lstat(&place.canonical).expect("status");
                        prop_assert!(same_inode(&fstat(entry).expect("status"), &named));
                    }
                }
                Err(PathError::Outside { .. } | PathError::TooManyLinks) => prop_assert_eq!(wanted, None),
                // A file or nothing in the middle: the kernel says the same.
                Err(PathError::System(Errno::ENOTDIR | Errno::ENOENT)) => {
                    prop_assert!(fs::metadata(lexical(workspace.root(), &request)).is_err());
                }
                Err(other) => prop_assert!(false, "{request}: {other}"),
            }
        }
    }

    #[test]
    fn steps_open_what_the_kernel_opens_beneath(relative in "[abl](/[abl]){0,3}") {
        let workspace = Workspace::new();
        workspace.put("a/b/a", "x");
        workspace.put("b", "y");
        symlink("a", workspace.path("l")).expect("link");
        symlink("b", workspace.path("a/l")).expect("link");
        let root = openat(AT_FDCWD, workspace.root(), DIRECTORY, Mode::empty()).expect("root");
        let path = Path::new(&relative);

        let by_kernel = open_beneath_in_kernel(root.as_fd(), path, OFlag::O_RDONLY);
        let by_steps = open_beneath_by_steps(root.as_fd(), path, OFlag::O_RDONLY);

        match (by_kernel, by_steps) {
            (Ok(one), Ok(other)) => {
                prop_assert!(same_inode(&fstat(&one).expect("status"), &fstat(&other).expect("status")));
            }
            (Err(_), Err(_)) => {}
            (one, other) => prop_assert!(false, "{relative}: {one:?} and {other:?}"),
        }
    }
}
