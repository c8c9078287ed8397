//! Records as CBOR (RFC 8949), self-describing: fields and variants are named, so what this version does not know is
//! refused by name instead of being taken for something else.

use super::record::Record;

/// Why a record was not understood. Never repeats a value: records hold inputs and outputs of tools.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DecodeError {
    /// A name that this version does not know.
    #[error("written by a newer version: {0}")]
    Newer(String),
    /// Anything else.
    #[error("{0}")]
    Malformed(&'static str),
}

/// The bytes of a record.
///
/// # Errors
/// What the encoder says; nothing of the present records can make it fail.
pub(super) fn encode(record: &Record) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(256);
    ciborium::into_writer(record, &mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// The record in these bytes; identifiers in it are checked like those that come from outside.
///
/// # Errors
/// `DecodeError` tells a record of a newer version from one that is malformed.
pub(super) fn decode(bytes: &[u8]) -> Result<Record, DecodeError> {
    let mut rest = bytes;
    let record = ciborium::from_reader(&mut rest).map_err(|error| match error {
        ciborium::de::Error::Semantic(_, text) if text.starts_with("unknown ") => DecodeError::Newer(text),
        ciborium::de::Error::Semantic(..) => DecodeError::Malformed("a field is missing or has another type"),
        _ => DecodeError::Malformed("it is not CBOR"),
    })?;
    if rest.is_empty() { Ok(record) } else { Err(DecodeError::Malformed("something follows it")) }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;
    use ciborium::Value;
    use proptest::prelude::*;

    fn bytes_of(value: &Value) -> Vec<u8> {
        let mut bytes = Vec::new();
        ciborium::into_writer(value, &mut bytes).unwrap();
        bytes
    }

    fn text(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    fn map(items: &[(&str, Value)]) -> Value {
        Value::Map(items.iter().map(|(name, value)| (text(name), value.clone())).collect())
    }

    #[test]
    fn every_kind_of_record_is_read_back() {
        for record in samples::every_kind() {
            let bytes = encode(&record).unwrap();
            assert_eq!(decode(&bytes), Ok(record));
        }
    }

    #[test]
    fn unknown_records_and_fields_are_refused_by_name() {
        let unknown = bytes_of(&map(&[("Paused", map(&[]))]));
        let error = decode(&unknown).unwrap_err().to_string();
        assert!(error.starts_with("written by a newer version: unknown variant `Paused`"), "{error}");

        let field = bytes_of(&map(&[("Term", map(&[("term", Value::from(1)), ("replica", Value::from(2))]))]));
        let error = decode(&field).unwrap_err().to_string();
        assert!(error.starts_with("written by a newer version: unknown field `replica`"), "{error}");
    }

    #[test]
    fn identifiers_are_checked_and_values_are_not_repeated() {
        let bad = bytes_of(&map(&[("Started", map(&[("call_id", text("../hunter2"))]))]));
        assert_eq!(decode(&bad), Err(DecodeError::Malformed("a field is missing or has another type")));
        let wrong = bytes_of(&map(&[("Term", map(&[("term", text("hunter2"))]))]));
        assert!(!decode(&wrong).unwrap_err().to_string().contains("hunter2"));
    }

    #[test]
    fn bytes_after_a_record_are_refused() {
        let mut bytes = encode(&Record::Term { term: 1 }).unwrap();
        bytes.push(0);
        assert_eq!(decode(&bytes), Err(DecodeError::Malformed("something follows it")));
    }

    #[test]
    fn output_is_kept_as_a_byte_string() {
        let records = samples::every_kind();
        let sizes = records.iter().map(|record| encode(record).unwrap());
        let inline = vec![0xff; 1000];
        assert!(sizes.into_iter().any(|bytes| bytes.windows(inline.len()).any(|window| window == inline)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes);
        }
    }
}
