//! One connection and its streams.

use super::{Compressor, Decompressor, Frame, Reader, flag};
use crate::budget::Budget;
use bytes::{Bytes, BytesMut};
use std::{
    collections::HashMap,
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Open streams of one connection; port-forward has two for each of its connections.
const MOST_STREAMS: usize = 1024;
/// New streams that nobody has taken yet.
const MOST_WAITING: usize = 64;
/// Chunks of a stream that nobody has taken yet.
const CHUNKS: usize = 64;
const READ_BUFFER: usize = 32 << 10;
/// Bytes of one data frame, so that streams take turns.
const LARGEST_DATA: usize = 32 << 10;
/// How long a client may take to go once it has been told everything. Closing earlier, with bytes of
/// it unread, would make the kernel throw away what the client has not read yet.
const FAREWELL: Duration = Duration::from_secs(5);
const OK: u32 = 0;
const PROTOCOL_ERROR: u32 = 1;
const REFUSED: u32 = 3;
const CANCEL: u32 = 5;

/// A connection to a client.
#[derive(Debug)]
pub struct Session {
    streams: mpsc::Receiver<Stream>,
    shared: Arc<Shared>,
}

/// A stream that the client began.
#[derive(Debug)]
pub struct Stream {
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// What the client sends.
    pub input: mpsc::Receiver<Bytes>,
    /// The way back.
    pub writer: StreamWriter,
}

impl Stream {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// The way back of one stream. Dropped, it ends the stream in this direction.
#[derive(Debug)]
pub struct StreamWriter {
    id: u32,
    shared: Arc<Shared>,
    reset: CancellationToken,
    closed: bool,
}

type Io = Box<dyn Connection>;

trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

struct Shared {
    sending: tokio::sync::Mutex<Sending>,
    streams: Mutex<HashMap<u32, Open>>,
    budget: Budget,
    gone: CancellationToken,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

struct Sending {
    half: WriteHalf<Io>,
    compressor: Compressor,
    /// What is left of the last frame, when its sender gave up in the middle of it.
    buffer: BytesMut,
}

struct Open {
    /// `None` after the client's last byte.
    input: Option<mpsc::Sender<Bytes>>,
    reset: CancellationToken,
    /// This side has ended it.
    answered: bool,
}

impl Session {
    /// Takes over a connection. Everything ends when `gone` is cancelled, and it is when the connection ends.
    pub fn start(
        io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        gone: CancellationToken,
    ) -> Self {
        let (read, half) = tokio::io::split(Box::new(io) as Io);
        let sending = Sending { half, compressor: Compressor::default(), buffer: BytesMut::new() };
        let shared = Arc::new(Shared {
            sending: tokio::sync::Mutex::new(sending),
            streams: Mutex::default(),
            budget: Budget::default(),
            gone,
        });
        let (accepted, streams) = mpsc::channel(MOST_WAITING);
        let receiving = Receiving {
            shared: shared.clone(),
            accepted,
            decompressor: Decompressor::default(),
            last: 0,
        };
        tokio::spawn(receiving.run(read));
        Self { streams, shared }
    }

    /// The next stream of the client; `None`: it is gone.
    pub async fn accept(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// Cancelled when the connection has ended.
    pub fn gone(&self) -> &CancellationToken {
        &self.shared.gone
    }

    /// No more streams are wanted: those that still come are ended at once.
    pub fn refuse_more(&mut self) {
        self.streams.close();
        while self.streams.try_recv().is_ok() {}
    }

    /// Ends every stream, says goodbye and lets the client go first, for a while.
    pub async fn close(mut self) {
        self.refuse_more();
        self.shared.budget.close();
        let farewell = async {
            if self.shared.say_goodbye().await.is_ok() {
                self.shared.gone.cancelled().await;
            }
        };
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            debug!("a client does not go when it is done");
        }
        self.shared.gone.cancel();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.gone.cancel();
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, HashMap<u32, Open>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, frame: &Frame) -> io::Result<()> {
        self.send_with(|_, buffer| frame.write(buffer)).await
    }

    async fn reply(&self, id: u32) -> io::Result<()> {
        self.send_with(|compressor, buffer| {
            let block = compressor.pack(&[]);
            Frame::SynReply { id, flags: 0, block }.write(buffer);
        })
        .await
    }

    /// Sends what `write` makes. Dropped in the middle, the rest goes before the next frame.
    async fn send_with(
        &self,
        write: impl FnOnce(&mut Compressor, &mut BytesMut),
    ) -> io::Result<()> {
        let send = async {
            let mut sending = self.sending.lock().await;
            let Sending { half, compressor, buffer } = &mut *sending;
            half.write_all_buf(buffer).await?;
            write(compressor, buffer);
            half.write_all_buf(buffer).await?;
            half.flush().await
        };
        tokio::select! {
            sent = send => sent,
            () = self.gone.cancelled() => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    async fn say_goodbye(&self) -> io::Result<()> {
        let unanswered: Vec<_> =
            self.open().iter().filter(|(_, open)| !open.answered).map(|(id, _)| *id).collect();
        for id in unanswered {
            self.finish(id).await?;
        }
        // No stream is ever begun from this side.
        self.send(&Frame::GoAway { last: 0, status: OK }).await?;
        self.sending.lock().await.half.shutdown().await
    }

    /// Ends a stream in this direction, once.
    async fn finish(&self, id: u32) -> io::Result<()> {
        if !self.ended(id, Side::Server) {
            return Ok(());
        }
        self.send(&Frame::Data { id, flags: flag::FIN, bytes: Bytes::new() }).await
    }

    /// Notes that one side has ended a stream; it is forgotten when both have. False: known before.
    fn ended(&self, id: u32, side: Side) -> bool {
        let mut streams = self.open();
        let Some(open) = streams.get_mut(&id) else { return false };
        let new = match side {
            Side::Client => open.input.take().is_some(),
            Side::Server => !std::mem::replace(&mut open.answered, true),
        };
        if open.input.is_none() && open.answered {
            streams.remove(&id);
        }
        new
    }
}

#[derive(Debug, Clone, Copy)]
enum Side {
    Client,
    Server,
}

struct Receiving {
    shared: Arc<Shared>,
    accepted: mpsc::Sender<Stream>,
    decompressor: Decompressor,
    last: u32,
}

impl Receiving {
    async fn run(mut self, mut half: ReadHalf<Io>) {
        let gone = self.shared.gone.clone();
        tokio::select! {
            ended = self.receive(&mut half) => if let Err(why) = ended {
                debug!(%why, "a SPDY connection ends");
                let bye = Frame::GoAway { last: self.last, status: PROTOCOL_ERROR };
                self.shared.send(&bye).await.ok();
            },
            () = gone.cancelled() => {}
        }
        gone.cancel();
        for (_, open) in self.shared.open().drain() {
            open.reset.cancel();
        }
    }

    async fn receive(&mut self, half: &mut ReadHalf<Io>) -> io::Result<()> {
        let (mut reader, mut buffer) = (Reader::default(), BytesMut::new());
        loop {
            while let Some(frame) = reader.next(&mut buffer).map_err(invalid)? {
                self.take(frame).await?;
            }
            buffer.reserve(READ_BUFFER);
            if half.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn take(&mut self, frame: Frame) -> io::Result<()> {
        match frame {
            Frame::SynStream { id, flags, block } => {
                let headers = self.decompressor.unpack(&block).map_err(invalid)?;
                self.begin(id, flags, headers).await?;
            }
            Frame::Headers { id, flags, block } | Frame::SynReply { id, flags, block } => {
                // Only for the decompressor, whose state every block changes.
                self.decompressor.unpack(&block).map_err(invalid)?;
                self.end_if(id, flags);
            }
            Frame::Data { id, flags, bytes } => {
                let input = self.shared.open().get(&id).and_then(|open| open.input.clone());
                if let Some(input) = input
                    && !bytes.is_empty()
                {
                    // Nobody takes it any more: it is thrown away, so that the others go on.
                    self.shared.budget.deliver(bytes, &input).await;
                }
                self.end_if(id, flags);
            }
            Frame::RstStream { id, .. } => {
                if let Some(open) = self.shared.open().remove(&id) {
                    open.reset.cancel();
                }
            }
            Frame::Ping(id) => self.shared.send(&Frame::Ping(id)).await?,
            Frame::GoAway { .. } | Frame::Settings | Frame::WindowUpdate { .. } => {}
        }
        Ok(())
    }

    fn end_if(&self, id: u32, flags: u8) {
        if flags & flag::FIN != 0 {
            self.shared.ended(id, Side::Client);
        }
    }

    async fn begin(
        &mut self,
        id: u32,
        flags: u8,
        headers: Vec<(String, String)>,
    ) -> io::Result<()> {
        if id.is_multiple_of(2) || id <= self.last {
            return Err(invalid(format!("stream {id} is none that a client may begin now")));
        }
        self.last = id;
        let (sender, input) = mpsc::channel(CHUNKS);
        let reset = CancellationToken::new();
        let open = Open { input: Some(sender), reset: reset.clone(), answered: false };
        let full = {
            let mut streams = self.shared.open();
            let full = streams.len() >= MOST_STREAMS;
            if !full {
                streams.insert(id, open);
            }
            full
        };
        if full {
            return self.shared.send(&Frame::RstStream { id, status: REFUSED }).await;
        }
        self.shared.reply(id).await?;
        self.end_if(id, flags);
        let writer = StreamWriter { id, shared: self.shared.clone(), reset, closed: false };
        // Nobody accepts streams any more: dropping it ends it.
        self.accepted.send(Stream { headers, input, writer }).await.ok();
        Ok(())
    }
}

impl StreamWriter {
    /// Sends bytes; returns when the connection has taken them.
    ///
    /// # Errors
    /// The client is gone or has reset the stream.
    pub async fn write(&mut self, mut bytes: Bytes) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.reset.is_cancelled() || self.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let part = bytes.split_to(bytes.len().min(LARGEST_DATA));
            self.shared.send(&Frame::Data { id: self.id, flags: 0, bytes: part }).await?;
        }
        Ok(())
    }

    /// Tells the client that nothing more comes on this stream.
    pub async fn close(&mut self) {
        if !self.closed && !self.reset.is_cancelled() {
            self.closed = true;
            self.shared.finish(self.id).await.ok();
        }
    }

    /// Cancelled when the client has given up this stream.
    pub fn given_up(&self) -> &CancellationToken {
        &self.reset
    }

    /// Ends the stream at once, both ways.
    pub async fn reset(mut self) {
        self.closed = true;
        if let Some(open) = self.shared.open().remove(&self.id) {
            open.reset.cancel();
        }
        self.shared.send(&Frame::RstStream { id: self.id, status: CANCEL }).await.ok();
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if self.closed || self.reset.is_cancelled() || self.shared.gone.is_cancelled() {
            return;
        }
        let (id, shared) = (self.id, self.shared.clone());
        tokio::spawn(async move { shared.finish(id).await.ok() });
    }
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{DuplexStream, duplex};

    /// The client's side: frames by hand.
    struct Client {
        io: DuplexStream,
        reader: Reader,
        buffer: BytesMut,
        compressor: Compressor,
    }

    impl Client {
        async fn send(&mut self, frame: Frame) {
            let mut bytes = BytesMut::new();
            frame.write(&mut bytes);
            self.io.write_all(&bytes).await.unwrap();
        }

        async fn begin(&mut self, id: u32, name: &str) {
            let block = self.compressor.pack(&[("streamtype", name)]);
            self.send(Frame::SynStream { id, flags: 0, block }).await;
            assert!(matches!(self.next().await, Some(Frame::SynReply { .. })));
        }

        async fn next(&mut self) -> Option<Frame> {
            loop {
                if let Some(frame) = self.reader.next(&mut self.buffer).unwrap() {
                    return Some(frame);
                }
                if self.io.read_buf(&mut self.buffer).await.unwrap() == 0 {
                    return None;
                }
            }
        }
    }

    fn pair() -> (Client, Session) {
        pair_with(1 << 20)
    }

    /// With so many bytes on the way at most.
    fn pair_with(room: usize) -> (Client, Session) {
        let (io, far) = duplex(room);
        let client = Client {
            io,
            reader: Reader::default(),
            buffer: BytesMut::new(),
            compressor: Compressor::default(),
        };
        (client, Session::start(far, CancellationToken::new()))
    }

    #[tokio::test]
    async fn streams_carry_both_ways_and_close_by_halves() {
        let (mut client, mut session) = pair();
        client.begin(1, "data").await;
        let mut stream = session.accept().await.unwrap();
        assert_eq!(stream.header("streamtype"), Some("data"));
        client.send(Frame::Data { id: 1, flags: flag::FIN, bytes: "in".into() }).await;
        assert_eq!(stream.input.recv().await.unwrap(), "in");
        assert_eq!(stream.input.recv().await, None);
        stream.writer.write("out".into()).await.unwrap();
        drop(stream.writer);
        let data =
            |flags, bytes: &'static str| Some(Frame::Data { id: 1, flags, bytes: bytes.into() });
        assert_eq!(client.next().await, data(0, "out"));
        assert_eq!(client.next().await, data(flag::FIN, ""));
        client.send(Frame::Ping(1)).await;
        assert_eq!(client.next().await, Some(Frame::Ping(1)));
        assert!(session.shared.open().is_empty());
    }

    #[tokio::test]
    async fn a_reset_stream_is_a_broken_pipe_and_touches_no_other() {
        let (mut client, mut session) = pair();
        client.begin(1, "a").await;
        client.begin(3, "b").await;
        let (mut first, mut second) =
            (session.accept().await.unwrap(), session.accept().await.unwrap());
        client.send(Frame::RstStream { id: 1, status: CANCEL }).await;
        assert_eq!(first.input.recv().await, None);
        assert!(first.writer.write("x".into()).await.is_err());
        second.writer.write("y".into()).await.unwrap();
        assert_eq!(client.next().await, Some(Frame::Data { id: 3, flags: 0, bytes: "y".into() }));
    }

    #[tokio::test]
    async fn a_client_that_goes_or_lies_ends_everything() {
        let (client, mut session) = pair();
        let gone = session.shared.gone.clone();
        drop(client);
        assert!(session.accept().await.is_none());
        assert!(gone.is_cancelled());
        let (mut client, mut session) = pair();
        let block = client.compressor.pack(&[]);
        client.send(Frame::SynStream { id: 2, flags: 0, block }).await;
        assert!(matches!(client.next().await, Some(Frame::GoAway { status: PROTOCOL_ERROR, .. })));
        assert!(session.accept().await.is_none());
    }

    #[tokio::test]
    async fn a_flood_of_streams_is_refused() {
        let (mut client, mut session) = pair();
        let taking = tokio::spawn(async move {
            let mut taken = Vec::new();
            while let Some(stream) = session.accept().await {
                taken.push(stream);
            }
            taken.len()
        });
        for number in 0..MOST_STREAMS as u32 {
            client.begin(number * 2 + 1, "x").await;
        }
        let block = client.compressor.pack(&[]);
        client.send(Frame::SynStream { id: 99_999, flags: 0, block }).await;
        assert_eq!(client.next().await, Some(Frame::RstStream { id: 99_999, status: REFUSED }));
        drop(client);
        assert_eq!(taking.await.unwrap(), MOST_STREAMS);
    }

    #[tokio::test]
    async fn a_write_that_is_abandoned_cuts_no_frame() {
        let (mut client, mut session) = pair_with(100);
        client.begin(1, "a").await;
        client.begin(3, "b").await;
        let (mut first, mut second) =
            (session.accept().await.unwrap(), session.accept().await.unwrap());
        let abandoned = first.writer.write(vec![1; 1000].into());
        assert!(tokio::time::timeout(Duration::from_millis(10), abandoned).await.is_err());
        let writing = tokio::spawn(async move { second.writer.write("whole".into()).await });
        let mut bytes = HashMap::<u32, Vec<u8>>::new();
        while bytes.get(&3).is_none_or(|bytes| bytes.len() < 5) {
            if let Some(Frame::Data { id, bytes: more, .. }) = client.next().await {
                bytes.entry(id).or_default().extend_from_slice(&more);
            }
        }
        writing.await.unwrap().unwrap();
        assert_eq!(bytes[&1], [1; 1000]);
        assert_eq!(bytes[&3], b"whole");
    }

    #[tokio::test]
    async fn a_client_is_told_everything_although_it_still_talks() {
        let (mut client, mut session) = pair_with(100);
        client.begin(1, "a").await;
        let mut stream = session.accept().await.unwrap();
        let closing = tokio::spawn(async move {
            stream.writer.write("the end".into()).await.unwrap();
            session.close().await;
        });
        for _ in 0..100 {
            client.send(Frame::Data { id: 1, flags: 0, bytes: vec![0; 50].into() }).await;
        }
        let end = Frame::Data { id: 1, flags: 0, bytes: "the end".into() };
        assert_eq!(client.next().await, Some(end));
        let end = Frame::Data { id: 1, flags: flag::FIN, bytes: Bytes::new() };
        assert_eq!(client.next().await, Some(end));
        assert_eq!(client.next().await, Some(Frame::GoAway { last: 0, status: OK }));
        assert_eq!(client.next().await, None);
        drop(client);
        closing.await.unwrap();
    }
}
