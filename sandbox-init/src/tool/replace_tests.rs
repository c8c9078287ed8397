use std::fs;

use nix::sys::stat::fstat;

use super::*;
use crate::tool::{
    path::{RequestedPath, Roots},
    testing::Workspace,
};

fn place(workspace: &Workspace, name: &str) -> Place {
    let roots = Roots::open(&workspace.context).expect("roots");
    roots.resolve(&RequestedPath::new(name.to_owned()).expect("path")).expect("place")
}

#[test]
fn file_that_was_changed_after_it_was_read_is_left_alone() {
    let workspace = Workspace::new();
    workspace.put("a", "read");
    let place = place(&workspace, "a");
    let status = fstat(place.entry.as_ref().expect("entry")).expect("status");
    workspace.put("a", "changed");

    let error = replace(&place, b"new", Some(&status), &Notebook::none()).expect_err("conflict");

    assert!(matches!(error, ReplaceError::Changed), "{error}");
    assert_eq!((workspace.content("a"), workspace.leftovers()), ("changed".to_owned(), Vec::new()));
}

#[test]
fn file_that_was_replaced_or_removed_after_it_was_read_is_left_alone() {
    let workspace = Workspace::new();
    workspace.put("a", "read");
    workspace.put("b", "read");
    let place = place(&workspace, "a");
    let status = fstat(place.entry.as_ref().expect("entry")).expect("status");

    fs::rename(workspace.path("b"), workspace.path("a")).expect("rename");
    assert!(matches!(replace(&place, b"new", Some(&status), &Notebook::none()), Err(ReplaceError::Changed)));
    assert_eq!(workspace.content("a"), "read");

    fs::remove_file(workspace.path("a")).expect("remove");
    assert!(replace(&place, b"new", Some(&status), &Notebook::none()).is_err());
    assert!(!workspace.path("a").exists());
}

#[test]
fn link_that_takes_the_name_before_the_rename_is_replaced_and_not_followed() {
    let workspace = Workspace::new();
    let victim = workspace.outside().join("victim");
    fs::write(&victim, "victim").expect("victim");
    let place = place(&workspace, "a");
    std::os::unix::fs::symlink(&victim, workspace.path("a")).expect("link");

    replace(&place, b"new", None, &Notebook::none()).expect("replaced");

    assert_eq!(fs::read_to_string(&victim).expect("victim"), "victim");
    assert_eq!(workspace.content("a"), "new");
    assert!(!workspace.path("a").is_symlink());
}

#[test]
fn link_that_takes_the_name_of_a_missing_directory_stops_the_write() {
    let workspace = Workspace::new();
    let place = place(&workspace, "a/b/c");
    std::os::unix::fs::symlink(workspace.outside(), workspace.path("a")).expect("link");

    assert!(replace(&place, b"new", None, &Notebook::none()).is_err());

    assert!(fs::read_dir(workspace.outside()).expect("outside").next().is_none());
}

#[test]
fn overwrite_in_place_keeps_the_inode_and_shortens_the_file() {
    let workspace = Workspace::new();
    workspace.put("a", "a long content");
    let place = place(&workspace, "a");
    let (entry, slot) = (place.entry.as_ref().expect("entry"), place.slot.as_ref().expect("slot"));
    let status = fstat(entry).expect("status");

    in_place(entry, &status, slot, &New { content: b"short", expected: None, notebook: &Notebook::none() })
        .expect("written");

    let now = fstat(entry).expect("status");
    assert!(same_inode(&now, &status));
    assert_eq!(workspace.content("a"), "short");
}
