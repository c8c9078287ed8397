//! Lists of byte strings, serialized as byte strings and not as lists of numbers.

use serde::{Deserialize, Deserializer, Serializer};
use serde_bytes::{ByteBuf, Bytes};

pub(super) fn serialize<S: Serializer>(items: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(items.iter().map(|item| Bytes::new(item)))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
    let items = Vec::<ByteBuf>::deserialize(deserializer)?;
    Ok(items.into_iter().map(ByteBuf::into_vec).collect())
}
