use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        process::CommandExt,
    },
    process::Command,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::json;

use crate::tool::testing::Workspace;

/// Modes do not bind root: its test runs once more in a process of an ordinary user. True when that was done, and well.
fn ran_as_ordinary_user(test: &str) -> bool {
    if !nix::unistd::geteuid().is_root() {
        return false;
    }
    let name = format!("{}::{test}", module_path!().split_once("::").expect("a crate").1);
    // By this name it is found where the directories above it are closed to others.
    let mut command = Command::new("/proc/self/exe");
    let output = command.args(["--exact", &name]).uid(65_534).gid(65_534).output().expect("it can be executed");
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("1 passed"), "{told}{}", String::from_utf8_lossy(&output.stderr));
    true
}

#[test]
fn new_files_and_directories_get_their_modes_whatever_the_umask_is() {
    let workspace = Workspace::new();

    let text = workspace.ok("write", &json!({"file_path": "a/b/c.txt", "content": "é"}));

    assert_eq!(text, "wrote 2 bytes to a/b/c.txt");
    assert_eq!((workspace.mode("a"), workspace.mode("a/b"), workspace.mode("a/b/c.txt")), (0o755, 0o755, 0o644));
    assert_eq!(workspace.content("a/b/c.txt"), "é");
}

#[test]
fn existing_file_keeps_mode_and_owner_but_not_set_id_bits() {
    let workspace = Workspace::new();
    let path = workspace.put("run.sh", "old");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6751)).expect("mode");
    let before = fs::metadata(&path).expect("metadata");

    workspace.ok("write", &json!({"file_path": "run.sh", "content": ""}));

    let after = fs::metadata(&path).expect("metadata");
    assert_eq!(workspace.mode("run.sh"), 0o751);
    assert_eq!((after.uid(), after.gid()), (before.uid(), before.gid()));
    assert_ne!(after.ino(), before.ino(), "not replaced by a rename");
    assert_eq!(workspace.content("run.sh"), "");
}

#[test]
fn owner_of_an_existing_file_is_kept_by_who_may_do_so() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can give a file away");
        return;
    }
    let workspace = Workspace::new();
    let path = workspace.put("a", "old");
    std::os::unix::fs::chown(&path, Some(12_345), Some(12_346)).expect("chown");

    workspace.ok("write", &json!({"file_path": "a", "content": "new"}));

    let after = fs::metadata(&path).expect("metadata");
    assert_eq!((after.uid(), after.gid()), (12_345, 12_346));
}

#[test]
fn write_protected_file_is_refused_to_who_is_bound_by_modes() {
    if ran_as_ordinary_user("write_protected_file_is_refused_to_who_is_bound_by_modes") {
        return;
    }
    let workspace = Workspace::new();
    let path = workspace.put("a", "old");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).expect("mode");

    let text = workspace.error("write", &json!({"file_path": "a", "content": "new"}));

    assert_eq!((text.as_str(), workspace.content("a").as_str()), ("write: a: permission denied", "old"));
}

#[test]
fn file_in_a_directory_that_takes_no_names_is_overwritten_in_place() {
    if ran_as_ordinary_user("file_in_a_directory_that_takes_no_names_is_overwritten_in_place") {
        return;
    }
    let workspace = Workspace::new();
    let path = workspace.put("d/a", "an old text");
    let inode = fs::metadata(&path).expect("metadata").ino();
    fs::set_permissions(workspace.path("d"), fs::Permissions::from_mode(0o555)).expect("mode");

    workspace.ok("write", &json!({"file_path": "d/a", "content": "new"}));
    workspace.ok("edit", &json!({"file_path": "d/a", "old_string": "new", "new_string": "edited"}));
    let missing = workspace.error("write", &json!({"file_path": "d/b", "content": "x"}));

    fs::set_permissions(workspace.path("d"), fs::Permissions::from_mode(0o755)).expect("mode");
    assert_eq!(workspace.content("d/a"), "edited");
    assert_eq!(fs::metadata(&path).expect("metadata").ino(), inode);
    assert_eq!(missing, "write: d/b: permission denied");
}

#[test]
fn links_are_followed_also_when_they_point_to_nothing_yet() {
    let workspace = Workspace::new();
    workspace.put("real", "old");
    symlink("real", workspace.path("link")).expect("link");
    symlink(workspace.path("made/new"), workspace.path("dangling")).expect("link");

    workspace.ok("write", &json!({"file_path": "link", "content": "new"}));
    workspace.ok("write", &json!({"file_path": "dangling", "content": "made"}));

    assert_eq!((workspace.content("real"), workspace.content("made/new")), ("new".to_owned(), "made".to_owned()));
    assert!(workspace.path("link").is_symlink() && workspace.path("dangling").is_symlink());
}

#[test]
fn write_through_links_to_the_outside_is_refused() {
    let workspace = Workspace::new();
    let outside = workspace.outside();
    symlink(&outside, workspace.path("directory")).expect("link");
    symlink(outside.join("new"), workspace.path("dangling")).expect("link");
    symlink("../outside/new", workspace.path("relative")).expect("link");
    symlink("/proc/self/root", workspace.path("magic")).expect("link");
    symlink("/proc/self/cwd/new", workspace.path("cwd")).expect("link");

    for name in ["directory/new", "dangling", "relative", "../outside/new", "magic/tmp/new", "cwd", "/proc/1/root/new"]
    {
        let text = workspace.error("write", &json!({"file_path": name, "content": "x"}));
        assert_eq!(text, format!("write: path '{name}' is outside the session's working directory"));
    }
    assert!(fs::read_dir(outside).expect("outside").next().is_none());
}

#[test]
fn directories_and_special_files_are_not_written() {
    let workspace = Workspace::new();
    workspace.put("directory/file", "x");
    mkfifo(&workspace.path("fifo"), Mode::S_IRWXU).expect("fifo");
    symlink("loop", workspace.path("loop")).expect("link");

    let cases = [
        ("directory", "write: directory: is a directory"),
        (".", "write: .: is a directory"),
        ("fifo", "write: fifo: not a regular file"),
        ("directory/file/x", "write: directory/file/x: not a directory"),
        ("loop", "write: path 'loop': too many levels of symbolic links"),
    ];
    for (name, expected) in cases {
        assert_eq!(workspace.error("write", &json!({"file_path": name, "content": "x"})), expected);
    }
    let long = "x".repeat(256);
    assert_eq!(
        workspace.error("write", &json!({"file_path": long, "content": "x"})),
        format!("write: {long}: file name too long")
    );
}

#[test]
fn read_only_roots_can_be_read_and_not_written() {
    let mut workspace = Workspace::new();
    workspace.put("inputs/data", "data");
    workspace.put("inputs/out/x", "");
    symlink("inputs/data", workspace.path("link")).expect("link");
    workspace.context.read_only_roots = vec![workspace.path("inputs")];
    workspace.context.allowed_roots = vec![workspace.path("inputs/out")];
    let root = workspace.path("inputs").display().to_string();

    for name in ["inputs/data", "inputs/new/file", "link"] {
        assert_eq!(
            workspace.error("write", &json!({"file_path": name, "content": "x"})),
            format!("write: {name} is inside read-only directory {root}")
        );
    }
    assert_eq!(
        workspace
            .error("edit", &json!({"file_path": "link", "old_string": "d", "new_string": "x", "replace_all": true})),
        format!("edit: link is inside read-only directory {root}")
    );
    assert_eq!(workspace.ok("read", &json!({"file_path": "link"})), "data");
    workspace.ok("write", &json!({"file_path": "inputs/out/x", "content": "x"}));
    assert_eq!(
        workspace.error("read", &json!({"file_path": "/etc/passwd"})),
        "read: path '/etc/passwd' is outside the session's working directory and its other permitted directories"
    );
}

#[test]
fn failed_and_successful_writes_leave_no_draft_behind() {
    let workspace = Workspace::new();
    workspace.put("a", "old");
    workspace.put("directory/file", "x");

    workspace.ok("write", &json!({"file_path": "a", "content": "new"}));
    workspace.error("write", &json!({"file_path": "directory", "content": "new"}));

    assert_eq!(workspace.leftovers(), Vec::<String>::new());
}
