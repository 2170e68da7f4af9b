//! Frames: bytes in, frames out, without any I/O.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The largest control frame that is taken. Streams of these clients have a handful of short headers.
pub const LARGEST_CONTROL: usize = 64 << 10;

const VERSION: u16 = 3;
const HEAD: usize = 8;
const CONTROL: u16 = 0x8000;
const STREAM_ID: u32 = 0x7fff_ffff;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Flags of frames.
pub mod flag {
    /// The sender sends no more on this stream.
    pub const FIN: u8 = 1;
}

/// A frame. Header blocks are still compressed: they must be unpacked in the order of arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A new stream.
    SynStream {
        /// Its id; odd from clients.
        id: u32,
        /// See [`flag`].
        flags: u8,
        /// Compressed headers.
        block: Bytes,
    },
    /// A new stream is accepted.
    SynReply {
        /// The stream.
        id: u32,
        /// See [`flag`].
        flags: u8,
        /// Compressed headers.
        block: Bytes,
    },
    /// A stream ends at once.
    RstStream {
        /// The stream.
        id: u32,
        /// Why; 5 is CANCEL.
        status: u32,
    },
    /// Settings; none of them matters here.
    Settings,
    /// Wants the same back.
    Ping(u32),
    /// The sender starts no more streams.
    GoAway {
        /// The last stream it knows.
        last: u32,
        /// 0: nothing is wrong.
        status: u32,
    },
    /// More headers of a stream.
    Headers {
        /// The stream.
        id: u32,
        /// See [`flag`].
        flags: u8,
        /// Compressed headers.
        block: Bytes,
    },
    /// The sender can take more.
    WindowUpdate {
        /// The stream; 0 for the session.
        id: u32,
        /// Bytes.
        delta: u32,
    },
    /// Bytes of a stream. A large frame is handed out in pieces; only the last has the frame's flags.
    Data {
        /// The stream.
        id: u32,
        /// See [`flag`].
        flags: u8,
        /// The bytes.
        bytes: Bytes,
    },
}

/// The bytes are no SPDY/3.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another protocol's version.
    #[error("SPDY version {0} is not spoken")]
    Version(u16),
    /// A frame that this program has no use for.
    #[error("frame type {0} is not known")]
    Type(u16),
    /// A frame whose length does not fit its type.
    #[error("a frame of type {0} has {1} bytes")]
    Length(u16, usize),
    /// Stream 0 is nobody's.
    #[error("a frame is about stream 0")]
    Stream,
}

/// Takes frames out of bytes as they arrive.
#[derive(Debug, Default)]
pub struct Reader {
    /// What is left of a data frame: stream, flags, bytes.
    data: Option<(u32, u8, usize)>,
}

impl Reader {
    /// The next frame in `buffer`; `None`: more bytes are needed.
    ///
    /// # Errors
    /// The bytes are no frame; the connection cannot go on.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some((id, flags, left)) = self.data {
            return Ok(self.piece(id, flags, left, buffer));
        }
        let Some(mut head) = buffer.get(..HEAD) else { return Ok(None) };
        let (first, second, rest) = (head.get_u16(), head.get_u16(), head.get_u32());
        let (flags, length) = ((rest >> 24) as u8, (rest & 0xff_ffff) as usize);
        if first & CONTROL == 0 {
            let id = (u32::from(first) << 16) | u32::from(second);
            if id == 0 {
                return Err(FrameError::Stream);
            }
            buffer.advance(HEAD);
            return Ok(self.piece(id, flags, length, buffer));
        }
        if first != CONTROL | VERSION {
            return Err(FrameError::Version(first & !CONTROL));
        }
        if length > LARGEST_CONTROL {
            return Err(FrameError::Length(second, length));
        }
        if buffer.len() < HEAD + length {
            return Ok(None);
        }
        buffer.advance(HEAD);
        control(second, flags, buffer.split_to(length).freeze()).map(Some)
    }

    fn piece(&mut self, id: u32, flags: u8, left: usize, buffer: &mut BytesMut) -> Option<Frame> {
        let bytes = buffer.split_to(left.min(buffer.len())).freeze();
        let left = left - bytes.len();
        self.data = (left > 0).then_some((id, flags, left));
        if left > 0 && bytes.is_empty() {
            return None;
        }
        Some(Frame::Data { id, flags: if left > 0 { 0 } else { flags }, bytes })
    }
}

fn control(kind: u16, flags: u8, mut body: Bytes) -> Result<Frame, FrameError> {
    let length = body.len();
    let least = match kind {
        SYN_STREAM => 10,
        SYN_REPLY | HEADERS | SETTINGS | PING => 4,
        RST_STREAM | GOAWAY | WINDOW_UPDATE => 8,
        other => return Err(FrameError::Type(other)),
    };
    let exact = matches!(kind, PING | RST_STREAM | GOAWAY | WINDOW_UPDATE);
    if length < least || (exact && length != least) {
        return Err(FrameError::Length(kind, length));
    }
    let first = body.get_u32();
    let id = first & STREAM_ID;
    if id == 0 && matches!(kind, SYN_STREAM | SYN_REPLY | HEADERS | RST_STREAM) {
        return Err(FrameError::Stream);
    }
    Ok(match kind {
        SYN_STREAM => {
            // The associated stream, priority and slot say nothing here.
            body.advance(6);
            Frame::SynStream { id, flags, block: body }
        }
        SYN_REPLY => Frame::SynReply { id, flags, block: body },
        RST_STREAM => Frame::RstStream { id, status: body.get_u32() },
        SETTINGS => Frame::Settings,
        PING => Frame::Ping(first),
        GOAWAY => Frame::GoAway { last: id, status: body.get_u32() },
        HEADERS => Frame::Headers { id, flags, block: body },
        _ => Frame::WindowUpdate { id, delta: body.get_u32() & STREAM_ID },
    })
}

impl Frame {
    /// Appends the frame's bytes. Longer data than a frame's length can tell must be cut before.
    pub fn write(&self, out: &mut BytesMut) {
        let mut head = |kind: u16, flags: u8, length: usize| {
            out.put_u16(CONTROL | VERSION);
            out.put_u16(kind);
            out.put_u32((u32::from(flags) << 24) | (length as u32 & 0xff_ffff));
        };
        match self {
            Self::SynStream { id, flags, block } => {
                head(SYN_STREAM, *flags, block.len() + 10);
                out.put_u32(*id);
                out.put_bytes(0, 6);
                out.put_slice(block);
            }
            Self::SynReply { id, flags, block } => {
                head(SYN_REPLY, *flags, block.len() + 4);
                out.put_u32(*id);
                out.put_slice(block);
            }
            Self::Headers { id, flags, block } => {
                head(HEADERS, *flags, block.len() + 4);
                out.put_u32(*id);
                out.put_slice(block);
            }
            Self::RstStream { id, status } => {
                head(RST_STREAM, 0, 8);
                out.put_u32(*id);
                out.put_u32(*status);
            }
            Self::Settings => {
                head(SETTINGS, 0, 4);
                out.put_u32(0);
            }
            Self::Ping(id) => {
                head(PING, 0, 4);
                out.put_u32(*id);
            }
            Self::GoAway { last, status } => {
                head(GOAWAY, 0, 8);
                out.put_u32(*last);
                out.put_u32(*status);
            }
            Self::WindowUpdate { id, delta } => {
                head(WINDOW_UPDATE, 0, 8);
                out.put_u32(*id);
                out.put_u32(*delta);
            }
            Self::Data { id, flags, bytes } => {
                out.put_u32(*id & STREAM_ID);
                out.put_u32((u32::from(*flags) << 24) | (bytes.len() as u32 & 0xff_ffff));
                out.put_slice(bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> Vec<Frame> {
        let block = Bytes::from_static(b"block");
        vec![
            Frame::SynStream { id: 1, flags: 0, block: block.clone() },
            Frame::SynReply { id: 1, flags: flag::FIN, block: block.clone() },
            Frame::Headers { id: 3, flags: 0, block: block.clone() },
            Frame::RstStream { id: 3, status: 5 },
            Frame::Settings,
            Frame::Ping(7),
            Frame::GoAway { last: 9, status: 0 },
            Frame::WindowUpdate { id: 0, delta: 65536 },
            Frame::Data { id: 1, flags: flag::FIN, bytes: block },
            Frame::Data { id: 1, flags: flag::FIN, bytes: Bytes::new() },
        ]
    }

    #[test]
    fn frames_read_back_as_written() {
        let mut bytes = BytesMut::new();
        frames().iter().for_each(|frame| frame.write(&mut bytes));
        let mut reader = Reader::default();
        for frame in frames() {
            assert_eq!(reader.next(&mut bytes), Ok(Some(frame)));
        }
        assert_eq!(reader.next(&mut bytes), Ok(None));
    }

    #[test]
    fn a_large_data_frame_comes_in_pieces_and_ends_once() {
        let mut bytes = BytesMut::new();
        Frame::Data { id: 5, flags: flag::FIN, bytes: vec![7; 1000].into() }.write(&mut bytes);
        let mut rest = bytes.split_off(600);
        let mut reader = Reader::default();
        let first = reader.next(&mut bytes).unwrap().unwrap();
        assert_eq!(first, Frame::Data { id: 5, flags: 0, bytes: vec![7; 592].into() });
        assert_eq!(reader.next(&mut bytes), Ok(None));
        let last = reader.next(&mut rest).unwrap().unwrap();
        assert_eq!(last, Frame::Data { id: 5, flags: flag::FIN, bytes: vec![7; 408].into() });
    }

    #[test]
    fn other_protocols_and_bombs_are_refused() {
        let next = |bytes: &[u8]| Reader::default().next(&mut BytesMut::from(bytes));
        assert_eq!(next(&[0x80, 2, 0, 1, 0, 0, 0, 10]), Err(FrameError::Version(2)));
        assert_eq!(next(b"\x80\x03\0\x63\0\0\0\0"), Err(FrameError::Type(0x63)));
        assert_eq!(
            next(&[0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]),
            Err(FrameError::Length(1, 0xff_ffff))
        );
        assert_eq!(next(&[0x80, 3, 0, 6, 0, 0, 0, 0]), Err(FrameError::Length(6, 0)));
        assert_eq!(next(&[0, 0, 0, 0, 0, 0, 0, 1, 7]), Err(FrameError::Stream));
    }

    proptest! {
        #[test]
        fn no_bytes_upset_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..200) {
            let mut reader = Reader::default();
            let mut buffer = BytesMut::from(&bytes[..cut.min(bytes.len())]);
            while let Ok(Some(_)) = reader.next(&mut buffer) {}
            buffer.extend_from_slice(&bytes[cut.min(bytes.len())..]);
            while let Ok(Some(_)) = reader.next(&mut buffer) {}
        }

        #[test]
        fn frames_survive_any_cut(cut in 0usize..150) {
            let mut all = BytesMut::new();
            frames().iter().for_each(|frame| frame.write(&mut all));
            let (mut reader, mut buffer, mut got) = (Reader::default(), BytesMut::new(), 0);
            for part in [&all[..cut.min(all.len())], &all[cut.min(all.len())..]] {
                buffer.extend_from_slice(part);
                while let Some(frame) = reader.next(&mut buffer).unwrap() {
                    // A piece of a data frame without its flags is not its end.
                    got += usize::from(!matches!(frame, Frame::Data { flags: 0, .. }));
                }
            }
            prop_assert_eq!(got, frames().len());
        }
    }
}
