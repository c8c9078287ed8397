//! Frames to bytes and back, in a way that one bad frame does not end the link.
//!
//! A frame that is too large or cannot be decoded becomes `Incoming::Bad` with as much of its envelope as could be read,
//! so that its sender hears which field of which request was wrong.

use prost::Message;
use prost::bytes::Buf;
use prost::encoding::{WireType, decode_key, decode_varint};
use proto::runner::v1::{OrchestratorFrame, RunnerFrame};
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::work::limits::FRAME_BYTES;

/// What arrived.
#[derive(Debug)]
pub(super) enum Incoming {
    Frame(Box<OrchestratorFrame>),
    Bad(BadFrame),
}

/// A frame that could not be taken.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct BadFrame {
    pub(super) frame_no: u64,
    pub(super) kind: u32,
    /// First two fields of the body when they are texts: call_id and session_id of a call, session_id of a session.
    pub(super) ids: [String; 2],
    pub(super) too_large: Option<usize>,
    pub(super) problem: String,
}

/// The codec of the link.
#[derive(Debug, Default)]
pub(super) struct FrameCodec;

impl Codec for FrameCodec {
    type Encode = RunnerFrame;
    type Decode = Incoming;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for FrameCodec {
    type Item = RunnerFrame;
    type Error = Status;

    fn encode(&mut self, item: RunnerFrame, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(buffer).map_err(|error| Status::internal(format!("frame cannot be encoded: {error}")))
    }
}

impl Decoder for FrameCodec {
    type Item = Incoming;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Incoming>, Status> {
        let length = buffer.remaining();
        let bytes = buffer.copy_to_bytes(length);
        Ok(Some(take(&bytes)))
    }
}

/// Decodes one frame.
pub(super) fn take(bytes: &[u8]) -> Incoming {
    if bytes.len() > FRAME_BYTES {
        let mut bad = salvage(bytes);
        bad.too_large = Some(bytes.len());
        return Incoming::Bad(bad);
    }
    match OrchestratorFrame::decode(bytes) {
        Ok(frame) => Incoming::Frame(Box::new(frame)),
        Err(error) => Incoming::Bad(BadFrame { problem: error.to_string(), ..salvage(bytes) }),
    }
}

/// Reads the envelope of a broken frame as far as it goes.
fn salvage(bytes: &[u8]) -> BadFrame {
    let mut bad = BadFrame::default();
    for_each_field(bytes, |tag, field| match (tag, field) {
        (1, Field::Number(number)) => bad.frame_no = number,
        (2, Field::Number(number)) => bad.kind = u32::try_from(number).unwrap_or(0),
        (10.., Field::Bytes(body)) => {
            for_each_field(body, |tag, field| {
                if let (1 | 2, Field::Bytes(text)) = (tag, field) {
                    let text = String::from_utf8_lossy(&text[..text.len().min(128)]).into_owned();
                    bad.ids[(tag - 1) as usize] = text;
                }
            });
        }
        _ => {}
    });
    bad
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Visits the fields that are numbers or bytes until something cannot be read.
fn for_each_field(mut bytes: &[u8], mut visit: impl FnMut(u32, Field<'_>)) {
    while !bytes.is_empty() {
        let Ok((tag, wire)) = decode_key(&mut bytes) else { return };
        match wire {
            WireType::Varint => match decode_varint(&mut bytes) {
                Ok(number) => visit(tag, Field::Number(number)),
                Err(_) => return,
            },
            WireType::LengthDelimited => {
                let Ok(length) = decode_varint(&mut bytes) else { return };
                let length = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
                let (field, rest) = bytes.split_at(length);
                visit(tag, Field::Bytes(field));
                bytes = rest;
            }
            WireType::ThirtyTwoBit if bytes.len() >= 4 => bytes = &bytes[4..],
            WireType::SixtyFourBit if bytes.len() >= 8 => bytes = &bytes[8..],
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::runner::v1::orchestrator_frame::Body;
    use proto::runner::v1::{BashInput, Call, call};

    fn call_frame(command: &str) -> Vec<u8> {
        let input = BashInput { command: Some(command.into()), ..Default::default() };
        let call = Call {
            call_id: "call-1".into(),
            session_id: "session-1".into(),
            input: Some(call::Input::Bash(input)),
            ..Default::default()
        };
        OrchestratorFrame { frame_no: 7, kind: 15, must_understand: true, body: Some(Body::Call(call)) }.encode_to_vec()
    }

    #[test]
    fn text_that_is_not_utf8_is_refused_with_its_field_and_its_call() {
        let mut bytes = call_frame("echo XYZ");
        let at = bytes.windows(3).position(|w| w == b"XYZ").unwrap();
        bytes[at] = 0xff;
        let Incoming::Bad(bad) = take(&bytes) else { panic!("frame must be refused") };
        assert_eq!((bad.frame_no, bad.kind), (7, 15));
        assert_eq!(bad.ids, ["call-1", "session-1"]);
        assert!(bad.problem.contains("BashInput.command") && bad.problem.contains("UTF-8"), "{}", bad.problem);
    }

    #[test]
    fn oversized_frame_is_refused_with_its_call_and_its_size() {
        let bytes = call_frame(&"x".repeat(FRAME_BYTES));
        let Incoming::Bad(bad) = take(&bytes) else { panic!("frame must be refused") };
        assert_eq!((bad.ids[0].as_str(), bad.too_large), ("call-1", Some(bytes.len())));
    }

    #[test]
    fn length_of_two_gigabytes_is_refused_without_allocating_it() {
        // Field 15, length-delimited, length 2^31.
        let bytes = [0x08, 0x05, 0x7a, 0x80, 0x80, 0x80, 0x80, 0x08, b'x'];
        let Incoming::Bad(bad) = take(&bytes) else { panic!("frame must be refused") };
        assert_eq!(bad.frame_no, 5);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = take(&bytes);
        }
    }
}
