//! A test that cannot run here says so. Where the capability is promised it fails instead, so that a broken CI machine
//! never looks like a passing one.

/// Whether this run promises every capability: `CI` is set to anything but empty or `0`.
#[must_use]
pub fn everything_is_promised() -> bool {
    std::env::var("CI").is_ok_and(|value| !value.is_empty() && value != "0")
}

/// Leaves the test with a printed reason, or fails it where the capability is promised.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {{
        let reason = format!($($reason)+);
        assert!(!$crate::skip::everything_is_promised(), "promised here, but: {reason}");
        #[allow(clippy::print_stderr, reason = "the test runner shows it")]
        {
            eprintln!("SKIPPED: {reason}");
        }
        return;
    }};
}

/// Leaves the test unless it runs as root.
#[macro_export]
macro_rules! needs_root {
    () => {
        if !nix::unistd::geteuid().is_root() {
            $crate::skip!("this test needs root");
        }
    };
}
