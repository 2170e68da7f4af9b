//! The streaming forms of the lists (KEP-5825): the same answers in batches, so that a node with many pods
//! needs no message larger than a client takes.

use std::vec;
use tokio_stream::{Stream, StreamExt};
use tonic::Status;

/// So many items of a few kilobytes each are far below the 4 MiB that gRPC takes by default.
const BATCH: usize = 100;

/// The items in batches, each put into a message by `wrap`; without items one empty message.
pub fn in_batches<T, M>(
    items: Vec<T>,
    wrap: impl Fn(Vec<T>) -> M + Send,
) -> impl Stream<Item = Result<M, Status>> + Send
where
    T: Send,
    M: Send,
{
    tokio_stream::iter(Batches(Some(items.into_iter()))).map(move |batch| Ok(wrap(batch)))
}

struct Batches<T>(Option<vec::IntoIter<T>>);

impl<T> Iterator for Batches<T> {
    type Item = Vec<T>;

    fn next(&mut self) -> Option<Vec<T>> {
        let items = self.0.as_mut()?;
        let batch: Vec<T> = items.by_ref().take(BATCH).collect();
        if items.len() == 0 {
            self.0 = None;
        }
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_item_comes_once_in_order_and_none_is_one_empty_message() {
        for count in [0, 1, BATCH, BATCH + 1, 3 * BATCH] {
            let batches: Vec<_> = in_batches((0..count).collect(), |batch| batch).collect().await;
            let batches: Vec<Vec<usize>> = batches.into_iter().map(Result::unwrap).collect();
            assert_eq!(batches.len(), count.div_ceil(BATCH).max(1), "{count}");
            assert_eq!(batches.concat(), (0..count).collect::<Vec<_>>());
        }
    }
}
