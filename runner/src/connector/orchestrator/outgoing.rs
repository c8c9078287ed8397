//! The order in which frames leave: control first, then events, then output.
//!
//! Three bounded lanes. A heartbeat therefore never waits behind output, however slow the orchestrator reads; frames
//! are numbered where they leave, so the numbers on the wire have no gaps.

use std::pin::Pin;
use std::task::{Context, Poll};

use proto::runner::v1::RunnerFrame;
use proto::runner::v1::runner_frame::Body;
use tokio::sync::mpsc;
use tokio_stream::Stream;

/// Frames per lane. A full control lane means that the peer does not read: the link is given up. Full lanes of events
/// and output make their sources wait.
pub(super) const CONTROL: usize = 1024;
const EVENTS: usize = 64;
const OUTPUT: usize = 16;

/// The filling ends.
#[derive(Debug)]
pub(super) struct Lanes {
    pub(super) control: mpsc::Sender<Body>,
    pub(super) events: mpsc::Sender<Body>,
    pub(super) output: mpsc::Sender<Body>,
}

/// What the transport reads.
#[derive(Debug)]
pub(super) struct Outgoing {
    control: mpsc::Receiver<Body>,
    events: mpsc::Receiver<Body>,
    output: mpsc::Receiver<Body>,
    frame_no: u64,
}

/// A fresh set of lanes.
pub(super) fn lanes() -> (Lanes, Outgoing) {
    let (control, control_end) = mpsc::channel(CONTROL);
    let (events, events_end) = mpsc::channel(EVENTS);
    let (output, output_end) = mpsc::channel(OUTPUT);
    let outgoing = Outgoing { control: control_end, events: events_end, output: output_end, frame_no: 0 };
    (Lanes { control, events, output }, outgoing)
}

impl Stream for Outgoing {
    type Item = RunnerFrame;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<RunnerFrame>> {
        let this = &mut *self;
        let mut all_closed = true;
        for lane in [&mut this.control, &mut this.events, &mut this.output] {
            match lane.poll_recv(context) {
                Poll::Ready(Some(body)) => {
                    this.frame_no += 1;
                    return Poll::Ready(Some(RunnerFrame {
                        frame_no: this.frame_no,
                        kind: kind_of(&body),
                        must_understand: !matches!(body, Body::Heartbeat(_) | Body::DrainStatus(_)),
                        body: Some(body),
                    }));
                }
                Poll::Ready(None) => {}
                Poll::Pending => all_closed = false,
            }
        }
        if all_closed { Poll::Ready(None) } else { Poll::Pending }
    }
}

/// Field number of a body.
pub(super) fn kind_of(body: &Body) -> u32 {
    match body {
        Body::Hello(_) => 10,
        Body::ResumePage(_) => 11,
        Body::Heartbeat(_) => 12,
        Body::SessionOpened(_) => 13,
        Body::SessionEnded(_) => 14,
        Body::CallAccepted(_) => 15,
        Body::CallStarted(_) => 16,
        Body::Output(_) => 17,
        Body::CallFinished(_) => 18,
        Body::CancelNoted(_) => 19,
        Body::DrainStatus(_) => 20,
        Body::Goodbye(_) => 21,
        Body::Unsupported(_) => 22,
        Body::RequestRefused(_) => 23,
        Body::StdinAccepted(_) => 24,
        Body::QueryReply(_) => 25,
        Body::EgressDecision(_) => 26,
        Body::ForwardData(_) => 27,
    }
}

#[cfg(test)]
mod tests {
    use super::super::link::control;
    use super::*;
    use prost::Message;
    use proto::runner::v1::{CallStarted, Heartbeat, OutputChunk};
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn control_leaves_before_events_and_events_before_output() {
        let (lanes, mut outgoing) = lanes();
        lanes.output.try_send(Body::Output(OutputChunk::default())).unwrap();
        lanes.events.try_send(Body::CallStarted(CallStarted::default())).unwrap();
        lanes.control.try_send(Body::Heartbeat(Heartbeat::default())).unwrap();
        drop(lanes);
        let mut seen = Vec::new();
        while let Some(frame) = outgoing.next().await {
            seen.push((frame.frame_no, frame.kind));
        }
        assert_eq!(seen, [(1, 12), (2, 16), (3, 17)]);
    }

    #[test]
    fn lane_of_control_that_nobody_empties_gives_the_link_up_and_is_told_apart_from_a_transport_that_has_ended() {
        let heartbeat = || Body::Heartbeat(Heartbeat::default());
        let (lanes, outgoing) = lanes();
        for _ in 0..CONTROL {
            control(&lanes, heartbeat()).unwrap();
        }
        assert_eq!(control(&lanes, heartbeat()).unwrap_err().reason(), "unread");
        drop(outgoing);
        assert_eq!(control(&lanes, heartbeat()).unwrap_err().reason(), "ended");
    }

    #[test]
    fn kind_is_the_field_number_on_the_wire() {
        for body in
            [Body::Hello(Default::default()), Body::ForwardData(Default::default()), Body::Output(Default::default())]
        {
            let kind = kind_of(&body);
            let bytes = RunnerFrame { body: Some(body), ..Default::default() }.encode_to_vec();
            let (tag, _) = prost::encoding::decode_key(&mut &bytes[..]).unwrap();
            assert_eq!(tag, kind);
        }
    }
}
