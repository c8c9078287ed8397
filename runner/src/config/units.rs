//! Sizes, durations and processor counts as people type them.
//!
//! Pure text to number. Every refusal names the text and shows accepted forms; nothing is guessed or rounded silently.

use std::time::Duration;

/// A text that is not the quantity it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a {quantity}: write {examples}")]
pub struct UnitError {
    text: String,
    quantity: &'static str,
    examples: &'static str,
}

/// Reads a size such as `64M`, `512MiB`, `1G`, `1000000`. All suffixes are binary multiples.
///
/// # Errors
/// When the text is not a number with a known suffix, is zero, or does not fit.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let refuse =
        || UnitError { text: text.to_owned(), quantity: "size", examples: "64M, 512MiB, 1G or a number of bytes" };
    let (number, suffix) = split_suffix(text);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(refuse()),
    };
    let thousandths = parse_thousandths(number).ok_or_else(refuse)?;
    let bytes = thousandths.checked_mul(1u128 << shift).ok_or_else(refuse)? / 1000;
    match u64::try_from(bytes) {
        Ok(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(refuse()),
    }
}

/// Reads a duration such as `500ms`, `2s`, `1.5m`, `1h`; a bare number means seconds.
///
/// # Errors
/// When the text is not a number with a known suffix, is zero, or is longer than a year.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    const YEAR_MS: u128 = 366 * 24 * 3600 * 1000;
    let refuse = || UnitError {
        text: text.to_owned(),
        quantity: "duration",
        examples: "500ms, 2s, 5m, 1h or a number of seconds",
    };
    let (number, suffix) = split_suffix(text);
    let milliseconds_each: u128 = match suffix {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return Err(refuse()),
    };
    let thousandths = parse_thousandths(number).ok_or_else(refuse)?;
    let milliseconds = thousandths.checked_mul(milliseconds_each).ok_or_else(refuse)? / 1000;
    match u64::try_from(milliseconds) {
        Ok(value) if value > 0 && milliseconds <= YEAR_MS => Ok(Duration::from_millis(value)),
        _ => Err(refuse()),
    }
}

/// Reads a number of processors such as `2` or `0.5` into thousandths.
///
/// # Errors
/// When the text is not a positive number of at most 4096 processors.
pub fn parse_cpus(text: &str) -> Result<u64, UnitError> {
    let refuse = || UnitError { text: text.to_owned(), quantity: "number of processors", examples: "0.5, 1 or 2" };
    match parse_thousandths(text).and_then(|value| u64::try_from(value).ok()) {
        Some(value) if value > 0 && value <= 4_096_000 => Ok(value),
        _ => Err(refuse()),
    }
}

/// Writes a size the way [`parse_size`] reads it, exact when it is a whole multiple.
pub fn display_size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, name) in UNITS {
        let unit = 1u64 << shift;
        if bytes >= unit {
            let tenths = u128::from(bytes) * 10 / u128::from(unit);
            let exact = bytes.is_multiple_of(unit);
            return if exact || tenths % 10 == 0 {
                format!("{} {name}", tenths / 10)
            } else {
                format!("{}.{} {name}", tenths / 10, tenths % 10)
            };
        }
    }
    format!("{bytes} bytes")
}

fn split_suffix(text: &str) -> (&str, &str) {
    let end = text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    text.split_at(end)
}

/// A decimal number with at most three decimals, times 1000.
fn parse_thousandths(number: &str) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 3 || whole.len() > 20 {
        return None;
    }
    let scale = 10u128.pow(3 - u32::try_from(fraction.len()).ok()?);
    Some(whole.parse::<u128>().ok()? * 1000 + fraction.parse::<u128>().ok()? * scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_binary_suffixes_are_read() {
        let expected =
            [("64M", 64 << 20), ("1G", 1 << 30), ("512MiB", 512 << 20), ("1.5k", 1536), ("77", 77), ("2b", 2)];
        for (text, bytes) in expected {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_sizes_are_refused_with_an_example() {
        for text in ["", "M", "-1M", "0", "1X", "1 G", "1..5G", "1.2345G", "99999999999999999999T", ".5G", "1e9", "²M"]
        {
            let error = parse_size(text).expect_err(text);
            assert!(error.to_string().contains("write 64M, 512MiB"), "{error}");
        }
    }

    #[test]
    fn durations_are_read_and_a_bare_number_means_seconds() {
        let expected =
            [("500ms", 500), ("2s", 2_000), ("2", 2_000), ("5m", 300_000), ("1.5h", 5_400_000), ("0.25s", 250)];
        for (text, milliseconds) in expected {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
    }

    #[test]
    fn zero_endless_and_unknown_durations_are_refused() {
        for text in ["0", "0ms", "9999999h", "5d", "fast", "-1s", ""] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn processors_are_read_in_thousandths() {
        assert_eq!(parse_cpus("0.5"), Ok(500));
        assert_eq!(parse_cpus("2"), Ok(2000));
        for text in ["0", "-1", "5000", "two", "1.0001"] {
            assert!(parse_cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_largest_unit_that_fits() {
        assert_eq!(display_size(64 << 20), "64 MiB");
        assert_eq!(display_size(1536), "1.5 KiB");
        assert_eq!(display_size(12), "12 bytes");
    }
}
