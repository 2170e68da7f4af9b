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

/// Notes every read and write that moved bytes.
pub(crate) struct Watched<T> {
    io: T,
    begin: Instant,
    /// Milliseconds after `begin`.
    last_move: Arc<AtomicU64>,
}

/// Wraps `io`; cancels `gone` when nothing has moved for `idle`. Zero is no bound.
pub(crate) fn watch<T>(io: T, idle: Duration, gone: CancellationToken) -> Watched<T> {
    let (begin, last_move) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let watched = Watched { io, begin, last_move: last_move.clone() };
    if idle.is_zero() {
        return watched;
    }
    tokio::spawn(async move {
        loop {
            let since = Duration::from_millis(last_move.load(Ordering::Relaxed));
            let Some(end) = begin.checked_add(since).and_then(|last| last.checked_add(idle)) else {
                return;
            };
            if end <= Instant::now() {
                return gone.cancel();
            }
            tokio::select! {
                () = sleep_until(end) => {}
                () = gone.cancelled() => return,
            }
        }
    });
    watched
}

impl<T> Watched<T> {
    fn moved<R>(&self, result: Poll<R>) -> Poll<R> {
        if result.is_ready() {
            let now = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.last_move.store(now, Ordering::Relaxed);
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
        tokio::time::sleep(Duration::from_millis(10_001)).await;
        assert!(gone.is_cancelled());
        drop(far);
    }
}
