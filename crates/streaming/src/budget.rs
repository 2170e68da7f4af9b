//! What a session may hold in memory of what its client has sent and nobody has taken yet.

use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

/// Bytes of all streams of one session together. One stream's channel is full long before; this is
/// for port-forwards with many.
const SESSION: usize = 4 << 20;
/// What a chunk costs beside its bytes.
const CHUNK: usize = 256;
/// Smaller chunks are copied, since a slice would keep the whole buffer it was read into.
const SLICE: usize = 16 << 10;

/// Counts bytes from their arrival until they are dropped.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    left: Arc<Semaphore>,
    closed: CancellationToken,
}

impl Default for Budget {
    fn default() -> Self {
        Self { left: Arc::new(Semaphore::new(SESSION)), closed: CancellationToken::new() }
    }
}

impl Budget {
    /// Nothing is handed on any more: what a client still sends is only read.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Hands bytes to a stream's taker; waits until it has room. False: it takes no more.
    pub async fn deliver(&self, bytes: Bytes, input: &mpsc::Sender<Bytes>) -> bool {
        let deliver = async {
            let place = input.reserve().await.ok()?;
            let cost = u32::try_from((bytes.len() + CHUNK).min(SESSION)).ok()?;
            let permit = self.left.clone().acquire_many_owned(cost).await.ok()?;
            let bytes = if bytes.len() < SLICE { Bytes::copy_from_slice(&bytes) } else { bytes };
            place.send(Bytes::from_owner(Counted { bytes, _permit: permit }));
            Some(())
        };
        tokio::select! {
            biased;
            () = self.closed.cancelled() => false,
            delivered = deliver => delivered.is_some(),
            () = input.closed() => false,
        }
    }
}

struct Counted {
    bytes: Bytes,
    _permit: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test(start_paused = true)]
    async fn bytes_count_until_they_are_dropped_whoever_holds_them() {
        let (budget, chunk) = (Budget::default(), Bytes::from(vec![0; SESSION / 2 - CHUNK]));
        let (sender, mut taker) = mpsc::channel(8);
        assert!(budget.deliver(chunk.clone(), &sender).await);
        assert!(budget.deliver(chunk.clone(), &sender).await);
        let (first, _second) = (taker.recv().await, taker.recv().await);
        let third = budget.deliver(chunk, &sender);
        tokio::pin!(third);
        assert!(timeout(Duration::from_secs(1), &mut third).await.is_err());
        drop(first);
        assert!(third.await);
    }

    #[tokio::test]
    async fn a_taker_that_is_gone_holds_nobody_up() {
        let budget = Budget::default();
        let (sender, taker) = mpsc::channel(1);
        assert!(budget.deliver("a".into(), &sender).await);
        let full = tokio::spawn(async move { budget.deliver("b".into(), &sender).await });
        tokio::task::yield_now().await;
        drop(taker);
        assert!(!full.await.unwrap());
    }

    #[tokio::test]
    async fn once_closed_even_a_taker_that_does_not_take_holds_nobody_up() {
        let budget = Budget::default();
        let (sender, _taker) = mpsc::channel(1);
        assert!(budget.deliver("a".into(), &sender).await);
        let waiting = tokio::spawn({
            let (budget, sender) = (budget.clone(), sender.clone());
            async move { budget.deliver("b".into(), &sender).await }
        });
        tokio::task::yield_now().await;
        budget.close();
        assert!(!waiting.await.unwrap());
    }
}
