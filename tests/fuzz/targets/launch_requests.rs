//! A launch request is the only input of the privileged process: decoding it must never panic and never change it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use proto::launch::v1::{Reply, Request};

/// Decodes, encodes and decodes again.
fn round_trip<M: Message + Default>(bytes: &[u8]) {
    let Ok(first) = M::decode(bytes) else { return };
    let encoded = first.encode_to_vec();
    assert_eq!(encoded.len(), first.encoded_len());
    let second = M::decode(encoded.as_slice()).expect("an encoded message decodes");
    assert_eq!(second.encode_to_vec(), encoded);
}

fuzz_target!(|bytes: &[u8]| {
    round_trip::<Request>(bytes);
    round_trip::<Reply>(bytes);
});
