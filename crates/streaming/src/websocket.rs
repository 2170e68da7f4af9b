//! Exec and attach over WebSocket: the channels of remotecommand in messages of one connection.
//!
//! A message is a channel's number and bytes; in the base64 protocols a digit and base64 text. In v5 the
//! number 255 and a channel's number close that channel.

use crate::{
    backend::{Output, OutputKind, Streams},
    channels::{self, Sizes, Wanted},
    status::End,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{SinkExt, StreamExt, stream::SplitSink, stream::SplitStream};
use std::{io, sync::Arc};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Mutex, mpsc},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::sync::CancellationToken;

/// Protocols, the best first. Without any, clients mean the last.
pub(crate) const PROTOCOLS: [&str; 5] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "base64.channel.k8s.io",
    "channel.k8s.io",
];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
/// The largest message that is taken; clients send 32 KiB.
const LARGEST_MESSAGE: usize = 4 << 20;
/// Chunks of stdin that nobody has taken yet.
const CHUNKS: usize = 4;

type Io = Box<dyn Connection>;

pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

type Sink = Arc<Mutex<SplitSink<WebSocketStream<Io>, Message>>>;

/// A server's end of a WebSocket whose HTTP part is over.
pub(crate) async fn over(io: impl Connection + 'static) -> WebSocketStream<Io> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(LARGEST_MESSAGE))
        .max_frame_size(Some(LARGEST_MESSAGE));
    WebSocketStream::from_raw_socket(Box::new(io) as Io, Role::Server, Some(config)).await
}

/// How a protocol writes messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Dialect {
    base64: bool,
    /// Channels are closed one by one.
    closes: bool,
    /// The end is JSON.
    json: bool,
}

impl Dialect {
    fn of(protocol: &str) -> Self {
        Self {
            base64: protocol.contains("base64"),
            closes: protocol.starts_with("v5."),
            json: protocol.starts_with("v5.") || protocol.starts_with("v4."),
        }
    }

    fn message(self, channel: u8, bytes: &[u8]) -> Message {
        if self.base64 {
            return Message::text(format!("{channel}{}", STANDARD.encode(bytes)));
        }
        let mut message = Vec::with_capacity(bytes.len() + 1);
        message.push(channel);
        message.extend_from_slice(bytes);
        Message::binary(message)
    }

    /// Channel and bytes; `None`: it is no message of this protocol.
    fn read(self, message: &Message) -> Option<(u8, Bytes)> {
        match message {
            Message::Binary(bytes) if !self.base64 => Some((*bytes.first()?, bytes.slice(1..))),
            Message::Text(text) => {
                let (first, rest) = text.as_str().split_at_checked(1)?;
                let channel = first.parse().ok()?;
                let bytes = if self.base64 {
                    STANDARD.decode(rest).ok()?
                } else {
                    rest.as_bytes().to_vec()
                };
                Some((channel, bytes.into()))
            }
            _ => None,
        }
    }
}

/// One of a client's channels, to write to.
pub(crate) struct Channel {
    number: u8,
    dialect: Dialect,
    sink: Sink,
    gone: CancellationToken,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Channel {
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let message = self.dialect.message(self.number, bytes);
        let send = async { self.sink.lock().await.send(message).await.map_err(io::Error::other) };
        tokio::select! {
            sent = send => sent,
            () = self.gone.cancelled() => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// A client, and where the end is told.
pub(crate) struct Client {
    errors: Channel,
    sink: Sink,
}

/// Takes over a connection.
pub(crate) async fn accept(
    io: impl Connection + 'static,
    protocol: &str,
    wanted: Wanted,
    gone: CancellationToken,
) -> (Client, Streams) {
    let (sink, messages) = over(io).await.split();
    let (sink, dialect) = (Arc::new(Mutex::new(sink)), Dialect::of(protocol));
    let channel = |number| Channel { number, dialect, sink: sink.clone(), gone: gone.clone() };
    let (stdin, input) = mpsc::channel(CHUNKS);
    let (sizes, resizes) = mpsc::channel(channels::SIZES);
    // Clients wait for a first message as a sign that all is well.
    let first = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    channel(first).write(b"").await.ok();
    let output = |number| Output(OutputKind::WebSocket(channel(number)));
    let streams = Streams {
        stdin: wanted.stdin.then_some(input),
        stdout: wanted.stdout.then(|| output(STDOUT)),
        stderr: wanted.stderr.then(|| output(STDERR)),
        resizes,
        gone: gone.clone(),
    };
    let reading =
        Reading { stdin: wanted.stdin.then_some(stdin), sizes, parser: Sizes::default(), dialect };
    let client = Client { errors: channel(ERROR), sink: sink.clone() };
    tokio::spawn(async move {
        tokio::select! {
            () = reading.run(messages) => {}
            () = gone.cancelled() => {}
        }
        gone.cancel();
    });
    (client, streams)
}

impl Client {
    /// Tells the end and closes the connection.
    pub async fn finish(mut self, end: &End) {
        let text = if self.errors.dialect.json { Some(end.json()) } else { end.text() };
        if let Some(text) = text {
            self.errors.write(&text).await.ok();
        }
        let mut sink = self.sink.lock().await;
        let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
        sink.send(Message::Close(Some(normal))).await.ok();
        sink.close().await.ok();
    }
}

struct Reading {
    stdin: Option<mpsc::Sender<Bytes>>,
    sizes: mpsc::Sender<crate::TerminalSize>,
    parser: Sizes,
    dialect: Dialect,
}

impl Reading {
    async fn run(mut self, mut messages: SplitStream<WebSocketStream<Io>>) {
        while let Some(Ok(message)) = messages.next().await {
            let Some((channel, bytes)) = self.dialect.read(&message) else { continue };
            match channel {
                STDIN => {
                    if let Some(stdin) = &self.stdin
                        && !bytes.is_empty()
                        && stdin.send(bytes).await.is_err()
                    {
                        self.stdin = None;
                    }
                }
                RESIZE => {
                    for size in self.parser.read(&bytes) {
                        self.sizes.send(size).await.ok();
                    }
                }
                CLOSE if self.dialect.closes && bytes.first() == Some(&STDIN) => self.stdin = None,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_read_back_as_written_in_every_dialect() {
        for protocol in PROTOCOLS {
            let dialect = Dialect::of(protocol);
            for bytes in [&b""[..], b"x", &[0, 255, 7]] {
                let message = dialect.message(STDOUT, bytes);
                assert_eq!(
                    dialect.read(&message),
                    Some((STDOUT, Bytes::copy_from_slice(bytes))),
                    "{protocol}"
                );
            }
        }
        let base64 = Dialect::of("base64.channel.k8s.io");
        assert_eq!(base64.message(0, b"foo\n"), Message::text("0Zm9vCg=="));
        assert_eq!(base64.read(&Message::text("")), None);
        assert_eq!(base64.read(&Message::text("0*")), None);
        assert_eq!(base64.read(&Message::binary(vec![0])), None);
        assert_eq!(Dialect::of("channel.k8s.io").read(&Message::binary(Vec::new())), None);
        assert!(
            Dialect::of("v5.channel.k8s.io").closes && !Dialect::of("v4.channel.k8s.io").closes
        );
    }
}
