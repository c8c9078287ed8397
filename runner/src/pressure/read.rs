//! Measures the host. What this kernel or this user cannot see is absent from the reading.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;

use super::judge::{Disk, Reading, Stalls};

/// Measures everything once. `places` are directories and what they hold; of several on one file system the first counts.
#[must_use]
pub fn read(at: Duration, places: &[(&'static str, PathBuf)]) -> Reading {
    let mut seen = Vec::new();
    let mut disks = Vec::new();
    for (name, path) in places {
        let device = fs::metadata(path).map(|found| found.dev());
        if let Ok(device) = device
            && !seen.contains(&device)
            && let Some(disk) = disk(name, path)
        {
            seen.push(device);
            disks.push(disk);
        }
    }
    Reading {
        at,
        disks,
        stalls: stalls(Path::new("/proc/pressure")),
        descriptors: descriptors(),
        journal_is_full: false,
    }
}

fn disk(name: &'static str, path: &Path) -> Option<Disk> {
    let found = statvfs(path).ok()?;
    let block = found.fragment_size();
    Some(Disk {
        name,
        free_bytes: found.blocks_available().saturating_mul(block),
        total_bytes: found.blocks().saturating_mul(block),
        free_inodes: found.files_available(),
        total_inodes: found.files(),
    })
}

/// `None` where the kernel does not count, as with `psi=0`.
fn stalls(directory: &Path) -> Option<Stalls> {
    let total = |file: &str, line: &str| total_of(&fs::read_to_string(directory.join(file)).ok()?, line);
    Some(Stalls { memory: total("memory", "some")?, io: total("io", "full")?, processor: total("cpu", "some")? })
}

/// The total of one line of a pressure file.
fn total_of(text: &str, line: &str) -> Option<u64> {
    let fields = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '))?;
    fields.split(' ').find_map(|field| field.strip_prefix("total=")?.parse().ok())
}

/// Descriptors in use and how many there can be.
fn descriptors() -> Option<(u64, u64)> {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).ok()?.0;
    let directory = "/proc/self/fd";
    // From Linux 6.2 on the size says how many there are; asking for it takes none.
    let counted = fs::metadata(directory).ok()?.len();
    if counted > 0 {
        return Some((counted, limit));
    }
    match fs::read_dir(directory) {
        Ok(entries) => Some((u64::try_from(entries.count()).unwrap_or(u64::MAX), limit)),
        // There is not even one left to count with.
        Err(error)
            if [Errno::EMFILE, Errno::ENFILE].map(|errno| Some(errno as i32)).contains(&error.raw_os_error()) =>
        {
            Some((limit, limit))
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_found_by_line_and_nonsense_is_absent() {
        let text =
            "some avg10=4.71 avg60=6.26 avg300=5.47 total=99615027\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!((total_of(text, "some"), total_of(text, "full")), (Some(99_615_027), Some(7)));
        for text in ["", "some", "some total=", "some total=-1", "someone total=1", "full total=1"] {
            assert_eq!(total_of(text, "some"), None, "{text:?}");
        }
    }

    #[test]
    fn this_host_can_be_read_and_a_file_system_counts_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().to_path_buf();
        let missing = path.join("missing");
        let reading = read(Duration::ZERO, &[("state", path.clone()), ("run", path), ("gone", missing)]);
        assert_eq!(reading.disks.len(), 1);
        // An empty file system in memory has all of its bytes free.
        let disk = &reading.disks[0];
        assert!(disk.total_bytes > 0 && disk.free_bytes <= disk.total_bytes, "{disk:?}");
        let (used, limit) = reading.descriptors.expect("counted");
        assert!(used > 2 && used < limit, "{used} of {limit}");
    }
}
