//! The first exchange with a launcher: which version of the protocol it speaks, and what its host allows.
//!
//! An embedded launcher is greeted before the async runtime exists, so the packets are to be had without a connection as well.

use prost::Message;
use proto::launch::v1 as wire;

use super::HostReport;
use super::frames::host_report;

const PROTOCOL_MAJOR: u32 = 1;

/// A first answer that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// Not a message of the protocol.
    #[error("the answer cannot be decoded")]
    Decode(#[source] prost::DecodeError),
    /// Refused.
    #[error("{message} ({code}); {remediation}")]
    Refused {
        /// From the protocol's closed list.
        code: String,
        /// What failed.
        message: String,
        /// What to do.
        remediation: String,
    },
    /// Another protocol.
    #[error("the launcher speaks version {major} of the protocol, this runner speaks {PROTOCOL_MAJOR}")]
    Version {
        /// What it speaks.
        major: u32,
    },
    /// Another message.
    #[error("the answer is not a welcome")]
    Unexpected,
}

pub(super) fn hello() -> wire::request::Body {
    wire::request::Body::Hello(wire::Hello { major: PROTOCOL_MAJOR })
}

/// Whether we understand each other.
pub(super) fn is_ours(welcome: &wire::Welcome) -> bool {
    welcome.major == PROTOCOL_MAJOR
}

/// The greeting as a packet, for the one exchange that happens before the async runtime exists.
pub fn encoded_hello() -> Vec<u8> {
    wire::Request { request_id: 1, body: Some(hello()) }.encode_to_vec()
}

/// Reads the answer to [`encoded_hello`].
///
/// # Errors
/// [`ReplyError`].
pub fn decode_welcome(bytes: &[u8]) -> Result<HostReport, ReplyError> {
    let reply = wire::Reply::decode(bytes).map_err(ReplyError::Decode)?;
    match reply.body {
        Some(wire::reply::Body::Welcome(welcome)) if is_ours(&welcome) => Ok(host_report(welcome)),
        Some(wire::reply::Body::Welcome(welcome)) => Err(ReplyError::Version { major: welcome.major }),
        Some(wire::reply::Body::Failure(failure)) => {
            Err(ReplyError::Refused { code: failure.code, message: failure.message, remediation: failure.remediation })
        }
        _ => Err(ReplyError::Unexpected),
    }
}
