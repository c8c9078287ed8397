//! Builds `sandbox-init` and tells the runner where its bytes are, so that one file carries both programs.
//!
//! The nested cargo works in a target directory of its own, because the outer cargo holds the lock of the shared one, and
//! in an environment scrubbed of what the outer cargo, clippy and the user's flags put there: the embedded program is the
//! same whether the runner is checked, tested or released. `SANDBOX_INIT_BINARY` names a ready file and skips the build.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const OVERRIDE: &str = "SANDBOX_INIT_BINARY";
const PROFILE: &str = "init";
/// What the embedded program is made of, relative to the workspace.
const SOURCES: [&str; 10] = [
    "sandbox-init/src",
    "sandbox-init/Cargo.toml",
    "proto/sandbox_runner/init",
    "proto/sandbox_runner/launch",
    "proto/src",
    "proto/build.rs",
    "images/unpack/src",
    "Cargo.lock",
    "Cargo.toml",
    ".cargo/config.toml",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed={OVERRIDE}");
    println!("cargo:rerun-if-changed=build.rs");
    let program = match env::var_os(OVERRIDE).filter(|value| !value.is_empty()) {
        Some(given) => {
            println!("cargo:rerun-if-changed={}", Path::new(&given).display());
            PathBuf::from(given)
        }
        None => build_program()?,
    };
    if !program.is_file() {
        return Err(format!("{} is not a file; set {OVERRIDE} to a built sandbox-init", program.display()).into());
    }
    println!("cargo:rustc-env=SANDBOX_INIT_IMAGE={}", program.display());
    Ok(())
}

fn build_program() -> Result<PathBuf, Box<dyn Error>> {
    let manifest_directory = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_directory.parent().ok_or("the runner is not inside a workspace")?;
    for source in SOURCES {
        println!("cargo:rerun-if-changed={}", workspace.join(source).display());
    }
    let target = env::var("TARGET")?;
    let target_directory = outer_target_directory(workspace, &target)?.join("sandbox-init");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(workspace)
        .args(["build", "--package", "sandbox-init", "--bin", "sandbox-init", "--locked"])
        .args(["--profile", PROFILE, "--target", &target, "--target-dir"])
        .arg(&target_directory);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(must_not_reach_nested_cargo) {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("building sandbox-init failed ({status}); its errors are above").into());
    }
    Ok(target_directory.join(&target).join(PROFILE).join("sandbox-init"))
}

/// The directory above `<target>/<profile>/build/<package>/out`, which holds also for `--target-dir`.
fn outer_target_directory(workspace: &Path, target: &str) -> Result<PathBuf, Box<dyn Error>> {
    let out_directory = PathBuf::from(env::var("OUT_DIR")?);
    let above_profile = out_directory.ancestors().nth(4).unwrap_or(workspace);
    let found =
        if above_profile.ends_with(target) { above_profile.parent().unwrap_or(workspace) } else { above_profile };
    // Cargo marks its target directories; without the mark the layout is not the one assumed here.
    if found.join("CACHEDIR.TAG").is_file() { Ok(found.to_path_buf()) } else { Ok(workspace.join("target")) }
}

/// Variables that describe the outer compilation: inherited, they would make the nested one clippy's, the tests', or differ.
fn must_not_reach_nested_cargo(name: &str) -> bool {
    const EXACT: [&str; 17] = [
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET_DIR",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTC_WRAPPER",
        "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
        "CLIPPY_ARGS",
        "CLIPPY_CONF_DIR",
        "CARGO_MAKEFLAGS",
        "MAKEFLAGS",
        "MFLAGS",
        "OUT_DIR",
        "__CARGO_DEFAULT_LIB_METADATA",
    ];
    EXACT.contains(&name)
        || ["CARGO_FEATURE_", "CARGO_CFG_", "CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_PROFILE_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}
