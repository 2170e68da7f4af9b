//! One at a time per name, so that what two pulls need is fetched once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tokio::sync::OwnedMutexGuard;

/// Names that somebody works on.
#[derive(Debug, Default)]
pub(crate) struct Joins(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Joins {
    /// Waits until nobody works on the name. Whoever waited should look whether the work is done.
    pub async fn enter(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut names = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            names.retain(|_, lock| lock.strong_count() > 0);
            match names.get(name).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::default();
                    names.insert(name.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_name_is_one_at_a_time_and_forgotten_afterwards() {
        let joins = Joins::default();
        let first = joins.enter("a").await;
        let other = joins.enter("b").await;
        {
            let second = joins.enter("a");
            tokio::pin!(second);
            assert!(futures::poll!(&mut second).is_pending());
            drop(first);
            second.await;
        }
        drop(other);
        drop(joins.enter("c").await);
        assert_eq!(joins.0.lock().unwrap().len(), 1);
    }
}
