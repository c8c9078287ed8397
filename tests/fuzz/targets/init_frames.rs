//! What process 1 sends is hostile to the runner, and what the runner sends is parsed beside the workload: bytes that
//! decode must survive a round trip unchanged, bytes that do not must be refused without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use proto::init::v1::{Frame, Request};

/// Decodes, encodes and decodes again.
fn round_trip<M: Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let Ok(first) = M::decode(bytes) else { return };
    let encoded = first.encode_to_vec();
    assert_eq!(encoded.len(), first.encoded_len());
    // Unknown fields are dropped and the last of a repeated singular field wins, so only the second encoding is stable.
    let second = M::decode(encoded.as_slice()).expect("an encoded message decodes");
    assert_eq!(second.encode_to_vec(), encoded);
}

fuzz_target!(|bytes: &[u8]| {
    round_trip::<Frame>(bytes);
    round_trip::<Request>(bytes);
});
