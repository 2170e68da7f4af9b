//! What sessions are made of, and the seam to whoever runs the processes.

use crate::{spdy, websocket};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::io;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// What a client sends on one stream. The channel's end: the client sends no more.
pub type Input = mpsc::Receiver<Bytes>;

/// CRI's ExecRequest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// The container.
    pub container_id: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// On a terminal.
    pub tty: bool,
    /// Streams that are wanted.
    pub stdin: bool,
    /// See `stdin`.
    pub stdout: bool,
    /// See `stdin`; a terminal has none.
    pub stderr: bool,
}

/// CRI's AttachRequest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachRequest {
    /// The container.
    pub container_id: String,
    /// The container has a terminal.
    pub tty: bool,
    /// Streams that are wanted.
    pub stdin: bool,
    /// See `stdin`.
    pub stdout: bool,
    /// See `stdin`; a terminal has none.
    pub stderr: bool,
}

/// CRI's PortForwardRequest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForwardRequest {
    /// The pod sandbox.
    pub sandbox_id: String,
    /// Ports that may be asked for; none: any.
    pub ports: Vec<u16>,
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
pub struct TerminalSize {
    /// Columns.
    #[serde(rename = "Width")]
    pub width: u16,
    /// Lines.
    #[serde(rename = "Height")]
    pub height: u16,
}

/// A client's ends of a process's streams. Those that were not asked for are `None`.
#[derive(Debug)]
pub struct Streams {
    /// From the client.
    pub stdin: Option<Input>,
    /// To the client.
    pub stdout: Option<Output>,
    /// To the client.
    pub stderr: Option<Output>,
    /// Ends when there will be no more.
    pub resizes: mpsc::Receiver<TerminalSize>,
    /// Cancelled when the client is gone.
    pub gone: CancellationToken,
}

/// One stream to a client.
#[derive(Debug)]
pub struct Output(pub(crate) OutputKind);

#[derive(Debug)]
pub(crate) enum OutputKind {
    Spdy(spdy::StreamWriter),
    WebSocket(websocket::Channel),
}

impl Output {
    /// Sends bytes; returns when the connection has taken them.
    ///
    /// # Errors
    /// The client is gone, or has closed this stream.
    pub async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        match &mut self.0 {
            OutputKind::Spdy(stream) => stream.write(bytes).await,
            OutputKind::WebSocket(channel) => channel.write(&bytes).await,
        }
    }
}

/// Why a session could not be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BackendError(pub String);

/// Whoever runs processes and reaches into pods.
pub trait Backend: Send + Sync + 'static {
    /// Runs a command to its end; its exit code. Dropped when the client is gone, which need not be the
    /// command's end.
    fn exec(
        &self,
        request: ExecRequest,
        streams: Streams,
    ) -> BoxFuture<'_, Result<i32, BackendError>>;
    /// Shows a container's own streams until its end or the client's.
    fn attach(
        &self,
        request: AttachRequest,
        streams: Streams,
    ) -> BoxFuture<'_, Result<(), BackendError>>;
    /// Carries one connection to a port of the pod until both sides have closed.
    fn port_forward(
        &self,
        sandbox_id: String,
        port: u16,
        input: Input,
        output: Output,
    ) -> BoxFuture<'_, Result<(), BackendError>>;
}
