//! Privileged: reads the mounts and the groups of the launcher itself.
//!
//! Where the hierarchies are mounted, and where in them this process is. A container may be shown a part of the tree only, from a
//! root above or beside its own group.

use std::path::{Path, PathBuf};

use super::V1_CONTROLLERS;
use super::files::read;

/// One place where a hierarchy is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// The group that is the root of the mount, as this process names it. A container may be shown a part of the tree.
    pub(super) root: String,
    pub(super) point: PathBuf,
}

impl Mount {
    /// Whether the group at `path` can be seen here.
    pub(super) fn holds(&self, path: &str) -> bool {
        Path::new(path).strip_prefix(&self.root).is_ok()
    }

    /// Where the group at `path` is; the mount point itself when it is not below it.
    pub(super) fn locate(&self, path: &str) -> PathBuf {
        match Path::new(path).strip_prefix(&self.root) {
            Ok(below) if below.as_os_str().is_empty() => self.point.clone(),
            Ok(below) => self.point.join(below),
            Err(_) => self.point.clone(),
        }
    }
}

/// Where the hierarchies are mounted, in the order in which they were.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    pub(super) unified: Vec<Mount>,
    pub(super) v1: Vec<(String, Mount)>,
}

impl Mounts {
    pub(super) fn read() -> Self {
        Self::parse(&read(Path::new("/proc/self/mountinfo")))
    }

    /// Reads proc(5) mountinfo: root and mount point are fields 4 and 5, type and super options follow the lone dash.
    fn parse(text: &str) -> Self {
        let mut mounts = Self::default();
        for line in text.lines() {
            let Some((front, back)) = line.split_once(" - ") else { continue };
            let mut fields = front.split(' ').skip(3);
            let (Some(root), Some(point)) = (fields.next(), fields.next()) else { continue };
            let mount = Mount { root: root.to_owned(), point: PathBuf::from(point) };
            let mut back = back.split(' ');
            match back.next() {
                Some("cgroup2") => mounts.unified.push(mount),
                Some("cgroup") => {
                    for option in back.nth(1).unwrap_or_default().split(',') {
                        if V1_CONTROLLERS.contains(&option) {
                            mounts.v1.push((option.to_owned(), mount.clone()));
                        }
                    }
                }
                _ => {}
            }
        }
        mounts
    }
}

/// `/proc/self/cgroup` as (controllers, path); the unified hierarchy has no controllers.
pub(super) fn own_paths() -> Vec<(String, String)> {
    read(Path::new("/proc/self/cgroup"))
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            Some((controllers.to_owned(), path.to_owned()))
        })
        .collect()
}

pub(super) fn own_path<'a>(own: &'a [(String, String)], controller: &str) -> &'a str {
    own.iter()
        .find(|(controllers, _)| controllers.split(',').any(|name| name == controller))
        .map_or("/", |(_, path)| path.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_host_is_read_from_mountinfo() {
        let mounts = Mounts::parse(
            "30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
             31 30 0:27 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
             32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 - cgroup cgroup rw,cpuacct,x\n\
             33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        );
        assert_eq!(mounts.unified, [Mount { root: "/".to_owned(), point: PathBuf::from("/sys/fs/cgroup/unified") }]);
        let names: Vec<&str> = mounts.v1.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["cpu", "cpuacct"]);
    }

    #[test]
    fn the_own_group_is_found_below_the_part_of_the_tree_that_a_container_is_shown() {
        let at = |root: &str| Mount { root: root.to_owned(), point: PathBuf::from("/c") };
        assert_eq!(at("/").locate("/pod/a"), PathBuf::from("/c/pod/a"));
        assert_eq!(at("/pod/a").locate("/pod/a"), PathBuf::from("/c"));
        assert_eq!(at("/pod").locate("/pod/a/b"), PathBuf::from("/c/a/b"));
        assert!(!at("/pod/a").holds("/pod/ab"), "a name that begins alike is another group");
        // The tree above the root of our own cgroup namespace: where in it we are cannot be told.
        assert!(!at("/../..").holds("/"));
    }

    #[test]
    fn the_own_path_is_found_in_a_joined_hierarchy() {
        let own = vec![("cpu,cpuacct".to_owned(), "/a".to_owned()), (String::new(), "/b".to_owned())];
        assert_eq!(own_path(&own, "cpuacct"), "/a");
        assert_eq!(own_path(&own, ""), "/b");
        assert_eq!(own_path(&own, "memory"), "/");
    }
}
