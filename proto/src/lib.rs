//! The schemas of sandbox-runner as Rust types. No logic lives here.
//!
//! `init` and `launch` are local protocols over `SOCK_SEQPACKET` unix sockets (one packet, one message). `runner` and
//! `admin` are gRPC and exist only with the `grpc` feature: the privileged program must not contain a network stack.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "generated types carry the documentation of the .proto files")]
#![allow(clippy::all, clippy::pedantic, reason = "generated code")]

#[cfg(feature = "grpc")]
mod redact;

/// Between the runner and process 1 of a sandbox.
pub mod init {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/sandbox_runner.init.v1.rs"));
    }
}

/// Between the runner and the launcher.
pub mod launch {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/sandbox_runner.launch.v1.rs"));
    }
}

/// Between the runner and an orchestrator.
#[cfg(feature = "grpc")]
pub mod runner {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/sandbox_runner.runner.v1.rs"));
    }
}

/// Between the runner and local tools.
#[cfg(feature = "grpc")]
pub mod admin {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/sandbox_runner.admin.v1.rs"));
    }
}
