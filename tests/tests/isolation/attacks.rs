//! The attack catalogue, each attack in a fresh sandbox, canaries compared afterwards.

use sandbox_runner_tests::canary::{self, Canaries};
use sandbox_runner_tests::host;
use sandbox_runner_tests::prober::{Row, Verdict};
use sandbox_runner_tests::rootfs::{Rootfs, SET_UID_PROBER};
use sandbox_runner_tests::runner::{Caller, Exec, finish};

use crate::expectations::assert_held;

/// Performs one attack in a sandbox of its own and returns what it reported. The canaries are compared here.
fn attack(caller: Caller, id: &str) -> Vec<Row> {
    let _host = host::shared();
    let rootfs = Rootfs::owned_by(caller.uid());
    let before = rootfs.listing();
    let mut canaries = Canaries::plant();
    let exec =
        Exec::in_rootfs(caller, rootfs.path()).variable(canary::VARIABLE, "secret").variable("RUNNER_TOKEN", "secret");
    let mut arguments = canaries.options();
    arguments.push("--external".to_owned());
    arguments.extend(["--string".to_owned(), rootfs.path().display().to_string()]);
    arguments.extend(["only".to_owned(), id.to_owned()]);

    let rows = exec.prober(arguments).rows();

    canaries.assert_untouched();
    assert_eq!(rootfs.listing(), before, "the sandbox wrote to its root filesystem on the host");
    rows
}

/// One test per attack and caller.
macro_rules! attacks {
    ($($name:ident: $id:literal;)*) => {
        mod as_root {
            $(#[test]
            fn $name() {
                super::run(super::Caller::Root, $id);
            })*
        }
        mod as_uid_65534 {
            $(#[test]
            fn $name() {
                super::run(super::Caller::Nobody, $id);
            })*
        }
    };
}

fn run(caller: Caller, id: &str) {
    if let Some(obstacle) = caller.obstacle() {
        sandbox_runner_tests::skip!("{obstacle}");
    }
    assert_held(&attack(caller, id));
}

attacks! {
    host_files_do_not_exist_by_their_absolute_paths: "F01";
    dotdot_ends_at_the_sandbox_root: "F02";
    links_and_proc_roots_do_not_lead_to_host_files: "F03";
    no_directory_descriptor_is_inherited: "F05";
    nothing_can_be_mounted: "F07";
    no_mount_can_be_undone_or_changed: "F08";
    new_mount_calls_are_refused: "F10";
    root_cannot_be_pivoted: "F11";
    chroot_does_not_lead_out: "F12";
    every_mount_ignores_set_uid_files_and_device_nodes: "F16";
    file_capabilities_cannot_be_set: "F17";
    read_only_files_stay_unchanged: "F18";
    overlay_attributes_mean_nothing: "F19";
    whiteouts_are_inert: "F20";
    file_handles_are_refused: "F21";

    kernel_settings_cannot_be_written: "P01";
    kernel_triggers_cannot_be_written: "P02";
    sysfs_shows_nothing_and_takes_nothing: "P04";
    kernel_secrets_cannot_be_read: "P05";
    processes_of_the_host_are_invisible: "P07";
    mount_tables_and_cgroups_show_no_host_path: "P08";
    id_maps_and_scores_cannot_be_rewritten: "P10";

    no_namespace_can_be_unshared: "N01";
    no_namespace_can_be_cloned: "N09";
    clone3_does_not_exist_and_fork_works: "N10";
    no_namespace_can_be_joined: "N11";

    no_capability_leads_out: "C01";
    capabilities_cannot_be_regained: "C02";
    no_new_privileges_and_two_filters_are_irrevocable: "C03";
    set_uid_programs_gain_nothing: "C04";
    user_of_process_1_cannot_be_taken: "C05";

    process_1_and_spawner_cannot_be_traced: "C07.trace";
    memory_of_process_1_and_spawner_is_unreadable: "C07.memory";
    descriptors_of_process_1_and_spawner_are_out_of_reach: "C07.descriptors";
    limits_of_process_1_and_spawner_cannot_be_changed: "C07.limits";
    workload_cannot_signal_process_1_or_the_spawner: "I01";
    only_descriptors_0_to_2_are_open: "I04";
    no_variable_of_the_runner_is_inherited: "I08";
    there_is_no_controlling_terminal: "I09";

    calls_without_use_for_agents_are_refused: "S01";
    other_system_call_tables_are_closed: "S21";
    anonymous_programs_gain_nothing: "S19";
    hard_limits_cannot_be_raised: "R15";

    device_nodes_cannot_be_made: "D01";
    devices_of_the_machine_do_not_exist: "D03";
    dev_holds_only_harmless_nodes: "D04";
    terminals_of_others_are_out_of_reach: "D05";

    addresses_outside_are_refused_at_once: "W01";
    listeners_of_the_host_are_unreachable: "W02";
    unix_sockets_of_the_host_are_unreachable: "W03";
    loopback_is_the_only_interface: "W05";
    raw_sockets_are_refused: "W06";
    netlink_changes_nothing: "W07";
    hypervisor_sockets_are_refused: "W13";
    unusual_socket_families_are_refused: "W15";
}

/// The list above is complete: an attack that is added to the prober and forgotten here would never run.
#[test]
fn every_attack_of_the_prober_has_a_test() {
    let source = include_str!("attacks.rs");
    let mut known = Vec::new();
    for file in ["filesystem", "proc", "namespace", "keeper", "syscall", "device", "network"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("attack").join(file).with_extension("c");
        let text = std::fs::read_to_string(&path).expect("source of the prober");
        for table in text.split("const struct attack ").skip(1) {
            let rows = table.lines().skip(1).take_while(|line| !line.contains("{0}"));
            known.extend(rows.filter_map(|line| Some(line.split('"').nth(1)?.to_owned())));
        }
    }
    assert!(known.len() > 45, "the tables of the prober were not found: {known:?}");
    // The two that only landlock stops are made with their negative controls.
    known.retain(|id| !id.starts_with('L'));
    let missing: Vec<_> = known.iter().filter(|id| !source.contains(&format!("\"{id}\";"))).collect();
    assert!(missing.is_empty(), "no test runs {missing:?}");
}

/// All profiles keep the same walls; what differs is who the workload is and which calls it has.
#[test]
fn every_profile_holds_against_the_whole_catalogue() {
    sandbox_runner_tests::needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    for profile in ["root", "user", "strict"] {
        let mut canaries = Canaries::plant();
        let exec = Exec::in_rootfs(Caller::Root, rootfs.path()).option("--profile", profile);
        let mut arguments = canaries.options();
        arguments.extend(["--external".to_owned(), "all".to_owned()]);

        let rows = exec.prober(arguments).rows();

        canaries.assert_untouched();
        assert!(rows.len() > 300, "profile {profile}: only {} rows", rows.len());
        assert_held(&rows);
    }
}

/// Programs that are set-uid for root come with most images, and root inside can make more of them.
#[test]
fn set_uid_files_of_the_image_and_of_the_workload_gain_nothing() {
    for (caller, profile, gifts) in
        [(Caller::Root, "root", 2), (Caller::Root, "user", 2), (Caller::Root, "strict", 2), (Caller::Nobody, "root", 0)]
    {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let rootfs = Rootfs::with_set_uid_prober();
        let exec = Exec::in_rootfs(caller, rootfs.path()).option("--profile", profile);

        let rows = exec.prober(["--set-uid", SET_UID_PROBER, "only", "C04"]).rows();

        assert_held(&rows);
        // With a single id there is no second user to start as.
        let held = rows.iter().filter(|row| row.id == "C04.gift" && row.result == Verdict::Held).count();
        assert_eq!(held, gifts, "{caller:?} {profile}: {rows:#?}");
    }
}

/// The capability sets are those of the table, bit by bit.
#[test]
fn capabilities_are_exactly_those_of_the_profile() {
    use sandbox_init::policy::capability::{Profile, mask};
    for (caller, profile, table) in [
        (Caller::Root, "root", Profile::Root),
        (Caller::Root, "user", Profile::None),
        (Caller::Root, "strict", Profile::None),
        (Caller::Nobody, "root", Profile::Root),
    ] {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let rootfs = Rootfs::owned_by(caller.uid());
        let exec = Exec::in_rootfs(caller, rootfs.path()).option("--profile", profile);

        let rows = exec.prober(["only", "C01"]).rows();

        let kept = mask(table);
        for (id, expected) in
            [("C01.CapInh", 0), ("C01.CapPrm", kept), ("C01.CapEff", kept), ("C01.CapBnd", kept), ("C01.CapAmb", 0)]
        {
            let row = rows.iter().find(|row| row.id == id).unwrap_or_else(|| panic!("no {id} in {rows:?}"));
            assert_eq!(row.detail, format!("{expected:016x}"), "{caller:?} {profile}: {row}");
        }
    }
}

/// The root filesystem that `exec` has by default shows the host's programs, so it gets the whole catalogue as well. The
/// prober comes in through standard input.
#[test]
fn host_rootfs_holds_against_the_whole_catalogue() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let mut canaries = Canaries::plant();
        let exec = Exec::new(caller).flag("--stdin");
        let mut arguments = canaries.options();
        arguments.extend(["--string", "/etc/", "--external", "all"].map(str::to_owned));
        let script = "cat > /workspace/prober && chmod 755 /workspace/prober && exec /workspace/prober \"$@\"";
        let mut command = exec.command(["sh", "-c", script, "prober"].into_iter().map(String::from).chain(arguments));
        command.stdin(std::fs::File::open(sandbox_runner_tests::prober::path()).expect("the prober is readable"));

        let finished = finish(command, std::time::Duration::from_secs(60)).expect("the command ends");

        canaries.assert_untouched();
        let rows = finished.rows();
        assert!(rows.len() > 300, "{caller:?}: only {} rows: {}", rows.len(), finished.errors());
        assert_held(&rows);
    }
}
