//! Exec, attach and port-forward over WebSocket: channels in messages of one connection.
//!
//! A message is a channel's number and bytes; in the base64 protocols a digit and base64 text. In v5 the
//! number 255 and a channel's number close that channel.

use crate::{
    Backend, PortForwardRequest,
    backend::{Output, OutputKind, Streams},
    budget::Budget,
    channels::{self, SizeReader, Wanted},
    port_forward,
    status::End,
    tunnel,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use futures::{
    SinkExt, StreamExt,
    stream::{FuturesUnordered, SplitSink, SplitStream},
};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Mutex, mpsc},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message, Utf8Bytes,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Protocols of remotecommand.
pub(crate) const PROTOCOLS: [&str; 5] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "base64.channel.k8s.io",
    "channel.k8s.io",
];

/// Protocols of port-forward. But for the tunnel, each port has two channels: its data and its errors.
pub(crate) const FORWARD_PROTOCOLS: [&str; 3] =
    [tunnel::PROTOCOL, "v4.channel.k8s.io", "v4.base64.channel.k8s.io"];
/// What a client that names no protocol means.
pub(crate) const UNNAMED: &str = "channel.k8s.io";
/// Ports of one port-forward, so that every channel has a number, in base64 a character too.
const MOST_PORTS: usize = 32;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
/// The largest message that is taken; clients send 32 KiB.
const LARGEST_MESSAGE: usize = 4 << 20;
/// How long a client may take to go once it has been told everything.
const FAREWELL: Duration = Duration::from_secs(5);
/// Chunks of stdin that nobody has taken yet.
const CHUNKS: usize = 64;

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
            let number = char::from(b'0'.wrapping_add(channel));
            return Message::text(format!("{number}{}", STANDARD.encode(bytes)));
        }
        let mut message = Vec::with_capacity(bytes.len() + 1);
        message.push(channel);
        message.extend_from_slice(bytes);
        Message::binary(message)
    }

    /// Channel and bytes; `None`: it is no message of this protocol. Some clients send text as text and
    /// bytes as binary messages: it makes no difference.
    fn read(self, message: Message) -> Option<(u8, Bytes)> {
        if !message.is_text() && !message.is_binary() {
            return None;
        }
        let bytes = message.into_data();
        let (first, rest) = (*bytes.first()?, bytes.slice(1..));
        if !self.base64 {
            return Some((first, rest));
        }
        let bytes = STANDARD.decode(&rest).ok()?;
        Some((first.checked_sub(b'0')?, bytes.into()))
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
    budget: Budget,
    gone: CancellationToken,
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
    let (sizes, resizes) = channels::sizes();
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
    let budget = Budget::default();
    let stdin = wanted.stdin.then_some(stdin);
    let mut reading = Reading { stdin, sizes, dialect, budget: budget.clone() };
    let client = Client { errors: channel(ERROR), sink: sink.clone(), budget, gone: gone.clone() };
    tokio::spawn(async move {
        tokio::select! {
            () = reading.run(messages) => {}
            () = gone.cancelled() => {}
        }
        // Before stdin's end, which alone would mean that the client has no more to send.
        gone.cancel();
        drop(reading);
    });
    (client, streams)
}

impl Client {
    /// Tells the end, says goodbye and lets the client go first, for a while.
    pub async fn finish(mut self, end: &End) {
        self.budget.close();
        let text = if self.errors.dialect.json { Some(end.json()) } else { end.text() };
        let farewell = async {
            if let Some(text) = text {
                self.errors.write(&text).await?;
            }
            let goodbye = Message::Close(Some(goodbye()));
            self.sink.lock().await.send(goodbye).await.map_err(io::Error::other)?;
            self.gone.cancelled().await;
            io::Result::Ok(())
        };
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            debug!("a client does not go when it is done");
        }
        self.gone.cancel();
    }
}

/// All is well. Without it clients take the end of the connection for a failure.
pub(crate) fn goodbye() -> CloseFrame {
    CloseFrame { code: CloseCode::Normal, reason: Utf8Bytes::default() }
}

struct Reading {
    stdin: Option<mpsc::Sender<Bytes>>,
    sizes: SizeReader,
    dialect: Dialect,
    budget: Budget,
}

impl Reading {
    async fn run(&mut self, mut messages: SplitStream<WebSocketStream<Io>>) {
        while let Some(Ok(message)) = messages.next().await {
            let Some((channel, bytes)) = self.dialect.read(message) else { continue };
            match channel {
                STDIN => {
                    if let Some(stdin) = &self.stdin
                        && !bytes.is_empty()
                        && !self.budget.deliver(bytes, stdin).await
                    {
                        self.stdin = None;
                    }
                }
                RESIZE => self.sizes.read(&bytes),
                CLOSE if self.dialect.closes && bytes.first() == Some(&STDIN) => self.stdin = None,
                _ => {}
            }
        }
    }
}

/// Whether there are channels for these ports.
pub(crate) fn has_channels(ports: &[u16]) -> bool {
    (1..=MOST_PORTS).contains(&ports.len())
}

/// Forwards each port of the request once, until all are done or the client is gone. Here an end of the
/// input alone cannot be told.
pub(crate) async fn forward<B: Backend>(
    io: impl Connection + 'static,
    protocol: &str,
    request: &PortForwardRequest,
    backend: &B,
    gone: CancellationToken,
) {
    let (sink, mut messages) = over(io).await.split();
    let (sink, dialect) = (Arc::new(Mutex::new(sink)), Dialect::of(protocol));
    let mut inputs = Vec::new();
    let forwards = FuturesUnordered::new();
    for (number, port) in (0..).step_by(2).zip(&request.ports) {
        let channel = |number| Channel { number, dialect, sink: sink.clone(), gone: gone.clone() };
        let (mut data, mut errors) = (channel(number), channel(number + 1));
        let (sender, input) = mpsc::channel(CHUNKS);
        inputs.push(Some(sender));
        forwards.push(async move {
            let first = port.to_le_bytes();
            data.write(&first).await.ok();
            errors.write(&first).await.ok();
            let output = Output(OutputKind::WebSocket(data));
            let sandbox_id = request.sandbox_id.clone();
            if let Err(error) = backend.port_forward(sandbox_id, *port, input, output).await {
                let text = port_forward::failure(*port, &request.sandbox_id, &error);
                errors.write(text.as_bytes()).await.ok();
            }
        });
    }
    let budget = Budget::default();
    let reading = async {
        while let Some(Ok(message)) = messages.next().await {
            let Some((channel, bytes)) = dialect.read(message) else { continue };
            let input = inputs.get_mut(usize::from(channel / 2)).filter(|_| channel % 2 == 0);
            if let Some(place) = input
                && let Some(input) = place
                && !bytes.is_empty()
                && !budget.deliver(bytes, input).await
            {
                *place = None;
            }
        }
    };
    tokio::pin!(reading);
    tokio::select! {
        () = &mut reading => return,
        () = gone.cancelled() => return,
        () = forwards.collect() => {}
    }
    budget.close();
    let farewell = async {
        let sent = sink.lock().await.send(Message::Close(Some(goodbye()))).await;
        if sent.is_ok() {
            reading.await;
        }
    };
    tokio::time::timeout(FAREWELL, farewell).await.ok();
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
                    dialect.read(message),
                    Some((STDOUT, Bytes::copy_from_slice(bytes))),
                    "{protocol}"
                );
            }
        }
        let base64 = Dialect::of("base64.channel.k8s.io");
        assert_eq!(base64.message(0, b"foo\n"), Message::text("0Zm9vCg=="));
        assert_eq!(base64.message(14, b""), Message::text(">"));
        assert_eq!(base64.read(Message::text("")), None);
        assert_eq!(base64.read(Message::text("0*")), None);
        let raw = Dialect::of("channel.k8s.io");
        assert_eq!(raw.read(Message::text("\0text")), Some((STDIN, "text".into())));
        assert_eq!(raw.read(Message::binary(Vec::new())), None);
        assert_eq!(raw.read(Message::Ping("x".into())), None);
        assert!(
            Dialect::of("v5.channel.k8s.io").closes && !Dialect::of("v4.channel.k8s.io").closes
        );
    }
}
