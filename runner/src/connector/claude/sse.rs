//! Server-sent events, byte by byte: what arrives in any pieces becomes whole frames. Pure.

/// Largest frame; the input of one tool call is far below it.
const MOST_FRAME_BYTES: usize = 16 * 1024 * 1024;

/// A frame is larger than anybody has a reason for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event has more than {MOST_FRAME_BYTES} bytes")]
pub(super) struct TooLarge;

/// One frame.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Frame {
    /// The field `event`; empty when there was none.
    pub(super) name: String,
    /// The fields `data`, joined by line ends.
    pub(super) data: String,
}

/// What has arrived and is no whole frame yet.
#[derive(Debug, Default)]
pub(super) struct Parser {
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed behind it belongs to it.
    after_return: bool,
    frame: Frame,
    has_data: bool,
}

impl Parser {
    /// Takes the next bytes, and returns the frames that they complete. Frames without data are none.
    ///
    /// # Errors
    /// [`TooLarge`]; then the stream is of no use any more.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Frame>, TooLarge> {
        let mut frames = Vec::new();
        for byte in bytes {
            let ends = match byte {
                b'\n' => !std::mem::take(&mut self.after_return),
                b'\r' => {
                    self.after_return = true;
                    true
                }
                other => {
                    self.after_return = false;
                    self.line.push(*other);
                    false
                }
            };
            if ends {
                frames.extend(self.end_line());
            } else if self.line.len() + self.frame.data.len() > MOST_FRAME_BYTES {
                return Err(TooLarge);
            }
        }
        Ok(frames)
    }

    fn end_line(&mut self) -> Option<Frame> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let frame = std::mem::take(&mut self.frame);
            return std::mem::take(&mut self.has_data).then_some(frame);
        }
        let text = String::from_utf8_lossy(&line);
        let (field, value) = text.split_once(':').unwrap_or((&text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.frame.name),
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.frame.data.push('\n');
                }
                self.frame.data.push_str(value);
            }
            // A comment has no name; `id` and `retry` mean nothing where nothing is replayed.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: &[u8] =
        b": hello\n\nevent: a\r\ndata: {\"x\":\r\ndata: 1}\r\n\r\ndata:bare\rdata\r\rid: 7\nevent: nothing\n\nevent: b\ndata:  two\n\n";

    fn frame(name: &str, data: &str) -> Frame {
        Frame { name: name.to_owned(), data: data.to_owned() }
    }

    fn expected() -> Vec<Frame> {
        vec![frame("a", "{\"x\":\n1}"), frame("", "bare\n"), frame("b", " two")]
    }

    #[test]
    fn all_line_ends_comments_and_frames_without_data_are_understood() {
        assert_eq!(Parser::default().feed(SAMPLE), Ok(expected()));
    }

    #[test]
    fn frame_without_end_is_refused_before_it_fills_the_memory() {
        let mut parser = Parser::default();
        let piece = vec![b'x'; 1024 * 1024];
        let refused = (0..20).find_map(|_| parser.feed(&piece).err());
        assert_eq!(refused, Some(TooLarge));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(cuts in proptest::collection::vec(0..SAMPLE.len(), 0..12)) {
            let mut cuts = cuts;
            cuts.extend([0, SAMPLE.len()]);
            cuts.sort_unstable();
            let mut parser = Parser::default();
            let mut frames = Vec::new();
            for pair in cuts.windows(2) {
                frames.extend(parser.feed(&SAMPLE[pair[0]..pair[1]]).expect("small"));
            }
            prop_assert_eq!(frames, expected());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Parser::default().feed(&bytes);
        }
    }
}
