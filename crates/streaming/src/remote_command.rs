//! Exec and attach over SPDY (remotecommand v1 to v4): one stream each for stdin, stdout, stderr, resizing
//! and errors, told apart by the header `streamType`.

use crate::{
    backend::{Output, OutputKind, Streams},
    channels::{self, Wanted},
    spdy::{Session, Stream, StreamWriter},
    status::End,
};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Protocol versions, the best first. Without any, clients mean the last.
pub(crate) const PROTOCOLS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

/// A client's streams, and where the end is told.
pub(crate) struct Client {
    pub streams: Streams,
    errors: StreamWriter,
    /// Kept, since clients send nothing more on a stream that was ended from here.
    _stdin_end: Option<StreamWriter>,
    session: Session,
    as_json: bool,
}

/// Waits for all streams that the request calls for; `None`: they did not come in time.
pub(crate) async fn accept(
    mut session: Session,
    protocol: &str,
    wanted: Wanted,
    patience: Duration,
    gone: CancellationToken,
) -> Option<Client> {
    let mut came = Came::default();
    let version =
        PROTOCOLS.len() - PROTOCOLS.iter().position(|known| *known == protocol).unwrap_or(3);
    let resizes = wanted.tty && version >= 3;
    let all = |came: &Came| {
        came.errors.is_some()
            && (!wanted.stdin || came.stdin.is_some())
            && (!wanted.stdout || came.stdout.is_some())
            && (!wanted.stderr || came.stderr.is_some())
            && (!resizes || came.resizes.is_some())
    };
    let collect = async {
        while !all(&came) {
            came.take(session.accept().await?).await;
        }
        Some(())
    };
    tokio::time::timeout(patience, collect).await.ok()??;
    session.refuse_more();
    let (sizes, receiver) = channels::sizes();
    if let Some(stream) = came.resizes {
        tokio::spawn(read_sizes(stream, sizes));
    }
    let output = |stream: Stream| Output(OutputKind::Spdy(stream.writer));
    let (stdin, stdin_end) = came.stdin.map(|stream| (stream.input, stream.writer)).unzip();
    Some(Client {
        streams: Streams {
            stdin,
            stdout: came.stdout.map(output),
            stderr: came.stderr.map(output),
            resizes: receiver,
            gone,
        },
        errors: came.errors?.writer,
        _stdin_end: stdin_end,
        session,
        as_json: version >= 4,
    })
}

impl Client {
    /// Splits off the streams; what is left tells the end.
    pub fn take_streams(&mut self) -> Streams {
        let gone = self.streams.gone.clone();
        std::mem::replace(
            &mut self.streams,
            Streams { stdin: None, stdout: None, stderr: None, resizes: mpsc::channel(1).1, gone },
        )
    }

    /// Tells the end and ends the connection.
    pub async fn finish(mut self, end: &End) {
        let text = if self.as_json { Some(end.json()) } else { end.text() };
        if let Some(text) = text {
            self.errors.write(text.into()).await.ok();
        }
        self.errors.close().await;
        self.session.close().await;
    }
}

#[derive(Default)]
struct Came {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resizes: Option<Stream>,
    errors: Option<Stream>,
}

impl Came {
    async fn take(&mut self, stream: Stream) {
        let place = match stream.header("streamtype") {
            Some("stdin") => &mut self.stdin,
            Some("stdout") => &mut self.stdout,
            Some("stderr") => &mut self.stderr,
            Some("resize") => &mut self.resizes,
            Some("error") => &mut self.errors,
            _ => return stream.writer.reset().await,
        };
        match place {
            None => *place = Some(stream),
            Some(_) => stream.writer.reset().await,
        }
    }
}

/// Reads until the client resizes no more. The way back stays open till then: it is never used.
async fn read_sizes(mut stream: Stream, mut sizes: channels::SizeReader) {
    while let Some(bytes) = stream.input.recv().await {
        sizes.read(&bytes);
    }
}
