//! What is said when a host does not reach the floor: one line for each missing layer, and the setting that accepts it.

use super::doctor;
use crate::sandbox::launch::HostReport;
use crate::sandbox::receipt::{LAYERS, Tier, missing_for};
use crate::work::Receipt;

/// The lines. `setting` is what asked for the floor, and what would accept the tier that was reached.
pub(super) fn lines(
    receipt: &Receipt,
    host: &HostReport,
    wanted: Tier,
    reached: Tier,
    setting: (&str, &str),
) -> Vec<String> {
    let (name, accept) = setting;
    let mut lines = vec![format!("this host reaches tier {reached}, {name} asks for {wanted}")];
    for name in missing_for(&receipt.layers, wanted) {
        let about = LAYERS.iter().find(|(layer, _)| *layer == name).map_or("", |(_, about)| about);
        let layer = receipt.layers.iter().find(|layer| layer.name == name);
        let errno = layer.map_or(0, |layer| layer.errno);
        let remedy = layer.map(|layer| doctor::remedy(layer, host)).filter(|remedy| !remedy.is_empty());
        let remedy = remedy.unwrap_or_else(|| "run sandbox-runner doctor".to_owned());
        lines.push(format!("missing: {name} ({}), needed so that {about}; {remedy}", doctor::errno_name(errno)));
    }
    if lines.len() == 1 {
        lines.push(
            "missing: ranges of 65536 ids for each sandbox; run on the host or in a container with all ids".to_owned(),
        );
    }
    lines.push(format!("to accept what this host has, {accept}"));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::launch::MissingLayer;
    use crate::sandbox::receipt::receipt;

    #[test]
    fn every_missing_layer_has_a_line_with_its_remedy_and_the_last_one_names_the_setting() {
        let missing = MissingLayer {
            layer: "cgroup_memory".into(),
            attempt: "mkdir".into(),
            errno: 13,
            remedy: "run as root".into(),
        };
        let host = HostReport { missing: vec![missing], ..HostReport::default() };
        let receipt = receipt(&[], 1, &host);

        let lines = lines(
            &receipt,
            &host,
            Tier::Full,
            Tier::None,
            ("runner.min_tier", "write min_tier = \"none\" into [runner]"),
        );

        assert_eq!(lines.len(), missing_for(&receipt.layers, Tier::Full).len() + 2, "{lines:#?}");
        assert!(lines.iter().any(|line| line.starts_with("missing: cgroup_memory") && line.ends_with("run as root")));
        assert!(lines.last().is_some_and(|line| line.contains("min_tier = \"none\"")), "{lines:#?}");
    }

    #[test]
    fn a_floor_that_only_the_ids_miss_has_a_line_too() {
        let reported: Vec<_> = LAYERS
            .iter()
            .map(|(name, _)| crate::sandbox::launch::ReportedLayer {
                name: (*name).into(),
                requested: "yes".into(),
                enforced: Some("yes".into()),
                errno: 0,
            })
            .collect();
        let host = HostReport::default();
        let receipt = receipt(&reported, 4096, &host);

        let lines = lines(&receipt, &host, Tier::Full, Tier::Pod, ("--min-tier", "use --min-tier pod"));

        assert_eq!(lines.len(), 3, "{lines:#?}");
        assert!(lines[1].contains("ids"), "{lines:#?}");
    }
}
