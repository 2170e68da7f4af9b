//! URLs that are good once: what was asked for over gRPC waits here for its HTTP request.

use rand::distr::{Alphanumeric, SampleString};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Letters and digits of a token: 190 bits.
const LENGTH: usize = 32;
/// Requests that may wait at once.
const MOST: usize = 1000;
/// How long a request waits.
const LIFE: Duration = Duration::from_secs(60);

/// More requests wait than a server keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MOST} streaming requests wait for their clients already; try again within a minute")]
pub struct TooMany;

/// Requests by token.
#[derive(Debug)]
pub(crate) struct Tokens<T>(Mutex<HashMap<String, (Instant, T)>>);

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Tokens<T> {
    /// Keeps a request; its token.
    pub fn keep(&self, request: T) -> Result<String, TooMany> {
        self.keep_at(request, Instant::now())
    }

    /// Takes the request out: a token works once.
    pub fn take(&self, token: &str) -> Option<T> {
        self.take_at(token, Instant::now())
    }

    fn keep_at(&self, request: T, now: Instant) -> Result<String, TooMany> {
        let token = Alphanumeric.sample_string(&mut rand::rng(), LENGTH);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (since, _)| now.duration_since(*since) < LIFE);
        if waiting.len() >= MOST {
            return Err(TooMany);
        }
        waiting.insert(token.clone(), (now, request));
        Ok(token)
    }

    fn take_at(&self, token: &str, now: Instant) -> Option<T> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, request) = waiting.remove(token)?;
        (now.duration_since(since) < LIFE).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once_and_for_a_minute_and_they_are_bounded() {
        let (tokens, start) = (Tokens::default(), Instant::now());
        let token = tokens.keep_at(7, start).unwrap();
        assert_eq!(tokens.take_at("other", start), None);
        assert_eq!(tokens.take_at(&token, start), Some(7));
        assert_eq!(tokens.take_at(&token, start), None);
        let late = tokens.keep_at(8, start).unwrap();
        assert_eq!(tokens.take_at(&late, start + LIFE), None);
        for number in 0..MOST {
            tokens.keep_at(number, start).unwrap();
        }
        assert_eq!(tokens.keep_at(0, start), Err(TooMany));
        tokens.keep_at(0, start + LIFE).unwrap();
    }
}
