//! SPDY inside a WebSocket (`SPDY/3.1+portforward.k8s.io`): binary messages, put together, are the
//! connection's bytes.

use crate::websocket::{self, Connection};
use bytes::{Buf, Bytes};
use futures::{Sink, SinkExt, Stream};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::{WebSocketStream, tungstenite::Message};

/// The protocol's name in the handshake.
pub(crate) const PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";

/// A WebSocket as a stream of bytes.
pub(crate) struct Tunnel {
    messages: WebSocketStream<Box<dyn Connection>>,
    rest: Bytes,
    ended: bool,
}

impl Tunnel {
    pub async fn over(io: impl Connection + 'static) -> Self {
        Self { messages: websocket::over(io).await, rest: Bytes::new(), ended: false }
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.messages).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => self.rest = bytes,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
        let count = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..count]);
        self.rest.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut messages = Pin::new(&mut self.messages);
        ready!(messages.as_mut().poll_ready(cx)).map_err(io::Error::other)?;
        messages.as_mut().start_send(Message::binary(bytes.to_vec())).map_err(io::Error::other)?;
        // The message is taken; what cannot be sent yet is sent by the next call.
        if let Poll::Ready(Err(error)) = messages.poll_flush(cx) {
            return Poll::Ready(Err(io::Error::other(error)));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.messages.poll_flush_unpin(cx).map_err(io::Error::other)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.ended {
            ready!(self.messages.poll_ready_unpin(cx)).map_err(io::Error::other)?;
            self.ended = true;
            let goodbye = Message::Close(Some(websocket::goodbye()));
            self.messages.start_send_unpin(goodbye).map_err(io::Error::other)?;
        }
        self.messages.poll_flush_unpin(cx).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_tungstenite::tungstenite::protocol::Role;

    #[tokio::test]
    async fn messages_are_bytes_and_bytes_are_messages() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let mut tunnel = Tunnel::over(far).await;
        let mut client = WebSocketStream::from_raw_socket(near, Role::Client, None).await;
        client.send(Message::binary("ab".as_bytes())).await.unwrap();
        client.send(Message::binary("c".as_bytes())).await.unwrap();
        let mut bytes = [0; 3];
        tunnel.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"abc");
        tunnel.write_all(b"out").await.unwrap();
        tunnel.flush().await.unwrap();
        assert_eq!(client.next().await.unwrap().unwrap(), Message::binary("out".as_bytes()));
        client.close(None).await.unwrap();
        assert_eq!(tunnel.read(&mut bytes).await.unwrap(), 0);
    }
}
