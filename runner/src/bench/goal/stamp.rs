//! Moments that a command in a sandbox prints. Its clock is the machine's, so they compare with ours.

use std::time::{Duration, SystemTime};

/// What bash puts in place of the present moment: seconds since 1970 with six digits of a second.
pub(super) const NOW: &str = "$EPOCHREALTIME";

/// The present moment since 1970.
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// Moments of all whole lines that are one, in their order.
pub(super) fn moments(text: &[u8]) -> Vec<Duration> {
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let lines = text[..whole].split(|byte| *byte == b'\n');
    lines.filter_map(|line| moment(std::str::from_utf8(line).ok()?)).collect()
}

fn moment(line: &str) -> Option<Duration> {
    // Some languages have a comma there.
    let (seconds, micros) = line.split_once(['.', ','])?;
    let whole = micros.len() == 6;
    Some(Duration::new(seconds.parse().ok()?, micros.parse::<u32>().ok().filter(|_| whole)?.checked_mul(1000)?))
}

/// Milliseconds from one moment to another. Below 0 when somebody has set the clock.
pub(super) fn milliseconds_between(from: Duration, to: Duration) -> f64 {
    (to.as_secs_f64() - from.as_secs_f64()) * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_with_a_moment_are_found_among_others() {
        let text = b"ready\n1764283200.000250\n1764283200,5\n1764283201,500000\n17642832";

        assert_eq!(moments(text), [Duration::new(1_764_283_200, 250_000), Duration::new(1_764_283_201, 500_000_000)]);
    }

    #[test]
    fn moments_are_a_quarter_of_a_millisecond_apart_when_they_are() {
        let from = Duration::from_secs(1_764_283_200);

        let between = milliseconds_between(from, from + Duration::from_micros(250));

        assert!((between - 0.25).abs() < 0.001, "{between}");
    }
}
