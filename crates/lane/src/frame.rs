//! What is said on a lane: the session's mark, then frames.
//!
//! A frame is its kind (1 byte), its length (3 bytes, big endian, at most [`LARGEST`]) and so many bytes.

use crate::Mark;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of the largest frame, without its head.
pub const LARGEST: usize = (16 << 10) - HEAD;
const HEAD: usize = 4;
/// More than this before the mark was not left by an earlier session: both sides' buffers are smaller.
const STALE_MOST: usize = 16 << 20;

/// What a frame has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of stdin, or of stdout, which is also a terminal's.
    Main,
    /// Bytes of stderr.
    Stderr,
    /// Nothing: stdin is at its end, or both outputs are.
    End,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Main, Self::Stderr, Self::End];
}

/// Makes frames of what arrives, whoever brings it.
#[derive(Debug)]
pub struct Parser {
    mark: Mark,
    begun: bool,
    /// Bytes before the mark.
    skipped: usize,
    buffer: Box<[u8]>,
    /// What of the buffer has come and not been taken.
    start: usize,
    end: usize,
}

impl Parser {
    /// For a session with this mark; everything before it is skipped.
    pub fn new(mark: &Mark) -> Self {
        let buffer = vec![0; HEAD + LARGEST].into();
        Self { mark: *mark, begun: false, skipped: 0, buffer, start: 0, end: 0 }
    }

    /// Another session: its mark may be in what has come already.
    pub fn begin(&mut self, mark: &Mark) {
        (self.mark, self.begun, self.skipped) = (*mark, false, 0);
    }

    /// Where to put what comes next; then call [`Self::came`]. Not empty once [`Self::frame`] has said `None`.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// So many bytes are in the room now.
    pub fn came(&mut self, count: usize) {
        self.end += count;
    }

    /// The next frame, when all of it has come.
    ///
    /// # Errors
    /// `InvalidData` for what is no frame, or when there is too much before the mark.
    pub fn frame(&mut self) -> io::Result<Option<(Kind, &[u8])>> {
        Ok(self.head()?.map(|(kind, length)| (kind, self.take(length))))
    }

    /// The next frame's kind and length, when all of it has come.
    fn head(&mut self) -> io::Result<Option<(Kind, usize)>> {
        if !self.begun()? {
            return Ok(None);
        }
        let &[kind, a, b, c, ..] = self.waiting() else { return Ok(None) };
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        let kind = Kind::ALL.get(usize::from(kind)).filter(|_| length <= LARGEST);
        let kind = *kind.ok_or_else(|| broken("the other side sent what is no frame"))?;
        Ok((self.waiting().len() >= HEAD + length).then_some((kind, length)))
    }

    /// The bytes of the frame with this length.
    fn take(&mut self, length: usize) -> &[u8] {
        let first = self.start + HEAD;
        self.start = first + length;
        &self.buffer[first..first + length]
    }

    /// Whether the mark has come; it and what is before it are taken.
    ///
    /// # Errors
    /// `InvalidData` when there is too much before it.
    pub fn begun(&mut self) -> io::Result<bool> {
        if self.begun {
            return Ok(true);
        }
        let mark = &self.mark;
        if let Some(at) = self.waiting().windows(mark.len()).position(|window| window == mark) {
            self.start += at + self.mark.len();
            self.begun = true;
            return Ok(true);
        }
        // The mark's first bytes may be there.
        let useless = self.waiting().len().saturating_sub(mark.len() - 1);
        self.start += useless;
        self.skipped += useless;
        match self.skipped > STALE_MOST {
            true => Err(broken("the other side does not begin the session")),
            false => Ok(false),
        }
    }

    fn waiting(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }
}

/// One frame on its way out.
#[derive(Debug)]
pub struct Frame(Box<[u8]>);

impl Frame {
    /// Where its bytes may be put, [`LARGEST`] of them.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.0[HEAD..]
    }

    /// The whole frame, of the first `count` bytes in the room.
    pub fn bytes(&mut self, kind: Kind, count: usize) -> &[u8] {
        // No more than LARGEST, which has three bytes.
        let [_, a, b, c] = (count as u32).to_be_bytes();
        self.0[..HEAD].copy_from_slice(&[kind as u8, a, b, c]);
        &self.0[..HEAD + count]
    }
}

impl Default for Frame {
    fn default() -> Self {
        Self(vec![0; HEAD + LARGEST].into())
    }
}

/// The half that listens.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    parser: Parser,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Skips everything before the mark.
    ///
    /// # Errors
    /// The lane's, its end among them, or `InvalidData` when there is too much to skip.
    pub async fn begin(from: R, mark: &Mark) -> io::Result<Self> {
        let mut reader = Self { from, parser: Parser::new(mark) };
        while !reader.parser.begun()? {
            if !reader.more().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(reader)
    }

    /// The next frame; `None` when the lane is gone.
    ///
    /// # Errors
    /// The lane's, or `InvalidData` for what is no frame.
    pub async fn next(&mut self) -> io::Result<Option<(Kind, &[u8])>> {
        loop {
            if let Some((kind, length)) = self.parser.head()? {
                return Ok(Some((kind, self.parser.take(length))));
            }
            if !self.more().await? {
                return Ok(None);
            }
        }
    }

    /// False at the lane's end.
    async fn more(&mut self) -> io::Result<bool> {
        let count = self.from.read(self.parser.room()).await?;
        self.parser.came(count);
        Ok(count > 0)
    }
}

/// The half that speaks.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    frame: Frame,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// Says the mark.
    ///
    /// # Errors
    /// The lane's.
    pub async fn begin(mut to: W, mark: &Mark) -> io::Result<Self> {
        to.write_all(mark).await?;
        Ok(Self { to, frame: Frame::default() })
    }

    /// Sends bytes, in as many frames as they need.
    ///
    /// # Errors
    /// The lane's.
    pub async fn send(&mut self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(LARGEST) {
            self.frame.room()[..piece.len()].copy_from_slice(piece);
            self.to.write_all(self.frame.bytes(kind, piece.len())).await?;
        }
        Ok(())
    }

    /// Says that there is no more.
    ///
    /// # Errors
    /// The lane's.
    pub async fn end(&mut self) -> io::Result<()> {
        self.to.write_all(self.frame.bytes(Kind::End, 0)).await
    }
}

fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Mark = *b"0123456789abcdef";

    /// What a listener makes of these bytes.
    async fn heard(bytes: &[u8]) -> io::Result<Vec<(Kind, Vec<u8>)>> {
        let mut reader = Reader::begin(bytes, &MARK).await?;
        let mut frames = Vec::new();
        while let Some((kind, bytes)) = reader.next().await? {
            frames.push((kind, bytes.to_vec()));
        }
        Ok(frames)
    }

    async fn said(speech: impl AsyncFnOnce(&mut Writer<&mut Vec<u8>>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        speech(&mut Writer::begin(&mut bytes, &MARK).await.unwrap()).await;
        bytes
    }

    #[tokio::test]
    async fn what_is_said_is_heard_with_its_ends() {
        let long: Vec<u8> = (0..50_000_u32).map(|n| (n % 251) as u8).collect();
        let bytes = said(async |writer| {
            writer.send(Kind::Main, b"out").await.unwrap();
            writer.send(Kind::Stderr, &long).await.unwrap();
            writer.end().await.unwrap();
        })
        .await;
        let frames = heard(&bytes).await.unwrap();
        assert_eq!(frames.first().unwrap(), &(Kind::Main, b"out".to_vec()));
        assert_eq!(frames.last().unwrap(), &(Kind::End, Vec::new()));
        let middle = &frames[1..frames.len() - 1];
        assert!(middle.iter().all(|(kind, bytes)| *kind == Kind::Stderr && bytes.len() <= LARGEST));
        assert!(middle.iter().flat_map(|(_, bytes)| bytes).eq(&long));
    }

    #[tokio::test]
    async fn what_an_earlier_session_left_is_skipped() {
        let frame = said(async |writer| writer.send(Kind::Main, b"new").await.unwrap()).await;
        for stale in [0, 1, 15, 16, LARGEST - 3, LARGEST, 3 * LARGEST + 7] {
            // Half a mark among it, and right before the whole one.
            let mut bytes = MARK[..9].to_vec();
            bytes.resize(9 + stale, b'x');
            bytes.extend_from_slice(&MARK[..7]);
            bytes.extend_from_slice(&frame);
            assert_eq!(heard(&bytes).await.unwrap(), [(Kind::Main, b"new".to_vec())], "{stale}");
        }
    }

    #[tokio::test]
    async fn a_side_that_never_begins_is_given_up() {
        let error = Reader::begin(tokio::io::repeat(b'x'), &MARK).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let error = Reader::begin(&b"short"[..], &MARK).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn what_is_no_frame_is_refused() {
        let too_long = (LARGEST as u32 + 1).to_be_bytes();
        for head in [[3, 0, 0, 0], [0, too_long[1], too_long[2], too_long[3]]] {
            let error = heard(&[&MARK[..], &head].concat()).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
