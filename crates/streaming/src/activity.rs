//! A connection that notices when nothing moves on it.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

/// Counts every read and write that moved bytes.
pub(crate) struct Watched<T> {
    io: T,
    moves: Arc<AtomicU64>,
}

/// Wraps `io`; cancels `gone` when nothing moved for `idle`.
pub(crate) fn watch<T>(io: T, idle: Duration, gone: CancellationToken) -> Watched<T> {
    let moves = Arc::new(AtomicU64::new(0));
    let counter = moves.clone();
    tokio::spawn(async move {
        let mut seen = 0;
        loop {
            let next = Instant::now() + idle;
            tokio::select! {
                () = sleep_until(next) => {}
                () = gone.cancelled() => return,
            }
            let now = counter.load(Ordering::Relaxed);
            if now == seen {
                return gone.cancel();
            }
            seen = now;
        }
    });
    Watched { io, moves }
}

impl<T> Watched<T> {
    fn moved<R>(&self, result: Poll<R>) -> Poll<R> {
        if result.is_ready() {
            self.moves.fetch_add(1, Ordering::Relaxed);
        }
        result
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.io).poll_read(cx, buffer);
        self.moved(result)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.moved(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test(start_paused = true)]
    async fn only_a_connection_without_bytes_is_idle() {
        let gone = CancellationToken::new();
        let (far, near) = tokio::io::duplex(64);
        let mut near = watch(near, Duration::from_secs(10), gone.clone());
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_secs(6)).await;
            near.write_all(b"x").await.unwrap();
        }
        assert!(!gone.is_cancelled());
        tokio::time::sleep(Duration::from_secs(25)).await;
        assert!(gone.is_cancelled());
        drop(far);
    }
}
