//! Compiles the schemas with protox, so that no protoc is needed on the building machine.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=sandbox_runner");
    let local = protox::compile(["sandbox_runner/init/v1/init.proto", "sandbox_runner/launch/v1/launch.proto"], ["."])?;
    prost_build::Config::new().compile_fds(local)?;
    #[cfg(feature = "grpc")]
    {
        let services =
            protox::compile(["sandbox_runner/runner/v1/runner.proto", "sandbox_runner/admin/v1/admin.proto"], ["."])?;
        // Values of secrets never reach a Debug rendering, and so never a log. prost ignores `debug_redact`, so each
        // message that holds one is listed here and gets a hand-written rendering in src/redact.rs.
        let mut config = prost_build::Config::new();
        config.skip_debug([
            "sandbox_runner.runner.v1.SecretValue",
            "sandbox_runner.runner.v1.EnrollRequest",
            "sandbox_runner.runner.v1.OpenSession",
            "sandbox_runner.runner.v1.ExecInput",
        ]);
        tonic_prost_build::configure().compile_fds_with_config(services, config)?;
    }
    Ok(())
}
