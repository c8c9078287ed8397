//! Privileged: CAP_SYSLOG, where the kernel shows its log to nobody else.
//!
//! Whom the kernel has killed for memory, by the kernel's own log: nothing else names a victim that the launcher is not the
//! parent of. The log is that of the whole host, so a record counts only when its group is that of one of our sandboxes and
//! its user one of that sandbox's ids; nothing else of it is kept or told. It has gaps, because the kernel limits its rate and
//! forgets the oldest, and many hosts do not show it: what it says is information, and never a condition.
//!
//! The name of a process is chosen by the workload, and may look like any of the fields around it. It is at most
//! fifteen bytes long: fields are found from the end, and by words that do not fit into it. Other records of the kernel begin
//! with such a name and have longer ones of the workload behind it (`NAME[PID]: segfault ... in FILE`), so what a record must
//! begin with is longer than a name as well.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use super::host::in_user_namespace;

/// Where the kernel shows its log, one record for each read.
const LOG: &str = "/dev/kmsg";
/// Longest record (`PRINTK_MESSAGE_MAX` is 2048, and what cannot be printed takes four times its room).
const RECORD_BYTES: usize = 16 * 1024;
/// Records that are read at once: some milliseconds. What lies behind more of them is given up.
const MOST_RECORDS: u32 = 16 * 1024;
/// Longest name of a process: fifteen bytes, each written as `\x00`.
const LONGEST_NAME: usize = 60;
/// What the kernel calls a process that executes our image from memory.
const OWN_IMAGE: &str = "memfd:sandbox-i";

/// The kernel's log, from where it was opened.
#[derive(Debug, Default)]
pub struct KernelLog {
    file: Option<File>,
}

/// What the log says of one kill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Who was chosen.
    Victim(Victim),
    /// What it had, told right behind.
    Used {
        /// Its pid on the host.
        pid: u32,
        /// Its user on the host.
        uid: u32,
        /// Bytes that were its own.
        bytes: u64,
    },
    /// Records were lost here.
    Gap,
}

/// A process that the kernel has killed for memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Victim {
    /// Name of the sandbox below our base.
    pub sandbox: String,
    /// Its pid on the host.
    pub pid: u32,
    /// Its user on the host.
    pub uid: u32,
    /// Its name, printable ASCII.
    pub process: String,
}

impl KernelLog {
    /// Opens the log at its end. Where this host does not show it to us, nothing is ever read.
    #[must_use]
    pub fn open() -> Self {
        // The ids in the log are those of the host: seen from a user namespace they would be somebody else's.
        if in_user_namespace() {
            return Self::default();
        }
        let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(LOG);
        Self { file: opened.ok().filter(|mut file| file.seek(SeekFrom::End(0)).is_ok()) }
    }

    /// The log that the program before has opened.
    #[must_use]
    pub fn handed_over(descriptor: Option<OwnedFd>) -> Self {
        Self { file: descriptor.map(File::from) }
    }

    /// The same log, for the program after this one.
    #[must_use]
    pub fn for_later(&self) -> Option<OwnedFd> {
        self.file.as_ref()?.try_clone().ok().map(OwnedFd::from)
    }

    /// What was written since the last time about sandboxes that have a group below a base of this name.
    pub fn read(&mut self, base: &str) -> Vec<Entry> {
        let mut entries = Vec::new();
        let Some(file) = &mut self.file else { return entries };
        let mut buffer = vec![0; RECORD_BYTES];
        for _ in 0..MOST_RECORDS {
            match file.read(&mut buffer) {
                Ok(0) => return entries,
                Ok(length) => entries.extend(entry(&String::from_utf8_lossy(&buffer[..length]), base)),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    // Records were overwritten (EPIPE), or one is longer than it can be: reading goes on behind them.
                    ErrorKind::BrokenPipe | ErrorKind::InvalidInput => entries.push(Entry::Gap),
                    _ => return entries,
                },
            }
        }
        let _ = file.seek(SeekFrom::End(0));
        entries.push(Entry::Gap);
        entries
    }
}

/// Reads one record: `priority,sequence,time,flags;text`, then lines of its dictionary.
fn entry(record: &str, base: &str) -> Option<Entry> {
    let (head, rest) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    // Above 7 it has a facility: it was written by a program.
    let text = rest.lines().next().filter(|_| priority < 8)?;
    victim(text, base).map(Entry::Victim).or_else(|| used(text))
}

/// Reads `oom-kill:…,oom_memcg=GROUP,task_memcg=GROUP,task=NAME,pid=PID,uid=UID`.
fn victim(text: &str, base: &str) -> Option<Victim> {
    let text = text.strip_prefix("oom-kill:constraint=")?;
    let (text, uid) = text.rsplit_once(",uid=")?;
    let (text, pid) = text.rsplit_once(",pid=")?;
    // No name of a process has room for the base and its slashes, so this is the last group.
    let (before, after) = text.rsplit_once(&format!("/{base}/"))?;
    let (_, above) = before.rsplit_once(",task_memcg=")?;
    let (group, process) = after.split_once(",task=")?;
    let sandbox = group.split('/').next().filter(|name| !name.is_empty())?;
    if above.contains(',') || group.contains(',') {
        return None;
    }
    Some(Victim {
        sandbox: sandbox.to_owned(),
        pid: pid.parse().ok()?,
        uid: uid.parse().ok()?,
        process: shown(process),
    })
}

/// Reads `…: Killed process PID (NAME) total-vm:…kB, anon-rss:…kB, file-rss:…kB, shmem-rss:…kB, UID:… …`.
fn used(text: &str) -> Option<Entry> {
    let text = text
        .strip_prefix("Memory cgroup out of memory: Killed process ")
        .or_else(|| text.strip_prefix("Out of memory: Killed process "))?;
    let (pid, text) = text.split_once(" (")?;
    let (_, fields) = text.rsplit_once(") total-vm:")?;
    let value = |name: &str| fields.split([' ', ',']).find_map(|field| field.strip_prefix(name));
    let kib = |name| value(name)?.strip_suffix("kB")?.parse::<u64>().ok();
    let bytes = kib("anon-rss:")?.saturating_add(kib("shmem-rss:").unwrap_or(0)).saturating_mul(1024);
    Some(Entry::Used { pid: pid.parse().ok()?, uid: value("UID:")?.parse().ok()?, bytes })
}

/// A name as others may see it. The kernel has written as `\x00` what cannot be printed.
fn shown(process: &str) -> String {
    if process == OWN_IMAGE {
        return "sandbox-init".to_owned();
    }
    let printable = |character: char| if character.is_ascii_graphic() || character == ' ' { character } else { '?' };
    process.chars().take(LONGEST_NAME).map(printable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "sandbox-runner-6867e7a6";

    fn record(task_group: &str, process: &str) -> String {
        format!(
            "6,76718,16868683495,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,\
             oom_memcg=/a/{BASE}/e23959-942ba283-5,task_memcg={task_group},task={process},pid=24060,uid=2013396992\n"
        )
    }

    fn found(record: &str) -> Option<(String, String, u32, u32)> {
        match entry(record, BASE)? {
            Entry::Victim(victim) => Some((victim.sandbox, victim.process, victim.pid, victim.uid)),
            Entry::Used { .. } | Entry::Gap => panic!("not a victim: {record}"),
        }
    }

    fn in_sandbox(name: &str, process: &str) -> Option<(String, String, u32, u32)> {
        Some((name.to_owned(), process.to_owned(), 24060, 2_013_396_992))
    }

    #[test]
    fn victim_is_found_in_the_group_of_its_sandbox_and_in_its_slots() {
        let of_v1 = record(&format!("/a/{BASE}/e23959-942ba283-5"), "tail");
        let of_v2 = record(&format!("/a/{BASE}/e23959-942ba283-5/work/c7"), "tail");
        let at_the_root = record(&format!("/{BASE}/e23959-942ba283-5/init"), "memfd:sandbox-i");

        assert_eq!(found(&of_v1), in_sandbox("e23959-942ba283-5", "tail"));
        assert_eq!(found(&of_v2), in_sandbox("e23959-942ba283-5", "tail"));
        assert_eq!(found(&at_the_root), in_sandbox("e23959-942ba283-5", "sandbox-init"));
    }

    #[test]
    fn nothing_is_told_of_groups_that_are_not_ours() {
        for group in [
            "/",
            "/system.slice/secret.service",
            "/a/sandbox-runner-6867e7a",
            "/a/sandbox-runner-6867e7a60/e23959-942ba283-5",
            "/a/other-sandbox-runner-6867e7a6/e23959-942ba283-5",
            "/a/sandbox-runner-6867e7a6",
            "/a/sandbox-runner-6867e7a6/",
            "",
        ] {
            assert_eq!(found(&record(group, "secret")), None, "{group}");
        }
    }

    #[test]
    fn a_name_that_begins_alike_is_another_sandbox() {
        let longer = record(&format!("/a/{BASE}/e23959-942ba283-55"), "tail");
        assert_eq!(found(&longer), in_sandbox("e23959-942ba283-55", "tail"));
    }

    #[test]
    fn name_of_a_process_is_taken_whole_whatever_it_looks_like() {
        let group = format!("/a/{BASE}/e23959-942ba283-5");
        for process in ["x,pid=1,uid=0", ",task=y", ",uid=0", "a;b", "(x) total-vm:1k", "/", "", ",task_memcg=/b", " "]
        {
            assert_eq!(found(&record(&group, process)), in_sandbox("e23959-942ba283-5", process), "{process}");
        }
        let escaped = record(&group, r"\x0a6,1,1,-;oom-kil");
        assert_eq!(found(&escaped), in_sandbox("e23959-942ba283-5", r"\x0a6,1,1,-;oom-kil"));
        let unescaped = record(&group, "a\u{1b}[2Jé");
        assert_eq!(found(&unescaped), in_sandbox("e23959-942ba283-5", "a?[2J?"));
        assert_eq!(shown(&"x".repeat(4096)).len(), LONGEST_NAME);
    }

    #[test]
    fn record_of_a_program_that_writes_into_the_log_is_no_record_of_the_kernel() {
        let kernel = record(&format!("/a/{BASE}/e23959-942ba283-5"), "tail");
        let program = kernel.replacen('6', "14", 1);
        assert!(found(&kernel).is_some());
        assert_eq!(found(&program), None);
    }

    #[test]
    fn records_that_are_cut_or_of_another_kind_are_passed_over() {
        let whole = record(&format!("/a/{BASE}/e23959-942ba283-5"), "tail");
        for length in 0..whole.trim_end().len() {
            if let Some((sandbox, _, pid, _)) = found(&whole[..length]) {
                // Only the last number can be cut without anybody seeing it; the launcher compares it with the ids.
                assert_eq!((sandbox.as_str(), pid), ("e23959-942ba283-5", 24060), "{}", &whole[..length]);
            }
        }
        for text in ["", ";", "6", "6,1,1,-;", "6,1,1,-;oom-kill:", "x,1,1,-;oom-kill:constraint=1", "6,1,1,-;usb 1-1"]
        {
            assert_eq!(entry(text, BASE), None, "{text}");
        }
    }

    /// The name of the process and that of the file are the workload's own.
    #[test]
    fn record_of_a_fault_whose_names_look_like_a_kill_is_none() {
        for text in [
            "Out of memory[16899]: segfault at 0 ip 0 sp 0 error 6 in x: Killed process 77 (y) total-vm:1kB, anon-rss:9kB, \
             UID:4294967290 z[2,7f24+1000] likely on CPU 0 (core 0, socket 0)",
            "oom-kill:constr[16899]: segfault at 0 ip 0 sp 0 error 6 in x,task_memcg=/sandbox-runner-6867e7a6/s,task=y,\
             pid=1,uid=1",
        ] {
            assert_eq!(entry(&format!("6,1,1,-;{text}\n"), BASE), None, "{text}");
        }
    }

    #[test]
    fn what_a_victim_had_is_read_behind_its_name() {
        let line = |process: &str| {
            format!(
                "3,76719,16868683511,-;Memory cgroup out of memory: Killed process 24060 ({process}) total-vm:99336kB, \
                 anon-rss:96512kB, file-rss:1560kB, shmem-rss:8kB, UID:2013396992 pgtables:236kB oom_score_adj:500\n"
            )
        };
        let expected = Entry::Used { pid: 24060, uid: 2_013_396_992, bytes: 96_520 * 1024 };

        for process in ["tail", ") total-vm:1kB,", "anon-rss:1kB, U", "UID:0 (a)", "", ": Killed proces"] {
            assert_eq!(entry(&line(process), BASE), Some(expected.clone()), "{process}");
        }
        let global = line("tail").replace("Memory cgroup out of memory", "Out of memory");
        assert_eq!(entry(&global, BASE), Some(expected));
        let of_an_old_kernel = line("tail").replace("UID:2013396992 ", "");
        assert_eq!(entry(&of_an_old_kernel, BASE), None);
    }
}
