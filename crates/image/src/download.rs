//! A layer's bytes, in order and exactly as many as the manifest says, over any number of interrupted
//! answers of any of the hosts.

use crate::{
    Digest, HostFailure, Kind, RegistryError,
    registry::{Endpoint, Repository, Rounds, Target},
};
use bytes::Bytes;
use http::{Method, StatusCode, header::CONTENT_RANGE};
use reqwest::Response;

/// So many bytes between two interruptions, and hosts get all their rounds again.
const PROGRESS: u64 = 1 << 20;

/// A blob on its way.
pub(crate) struct Download<'a> {
    repository: &'a Repository,
    digest: &'a Digest,
    size: u64,
    offset: u64,
    /// Where the last interruption was.
    interrupted: u64,
    rounds: Rounds<'a>,
    answer: Option<Answer<'a>>,
    /// Hosts whose bytes are among those handed out.
    sources: Vec<usize>,
}

struct Answer<'a> {
    index: usize,
    endpoint: &'a Endpoint,
    response: Response,
    /// Bytes to drop, from a host that cannot start in the middle.
    skip: u64,
}

impl<'a> Download<'a> {
    /// Prepares a download, from all hosts but `without`.
    pub fn new(
        repository: &'a Repository,
        digest: &'a Digest,
        size: u64,
        without: &[usize],
    ) -> Self {
        let mut rounds = Rounds::new(repository, |host| host.pull);
        for &index in without {
            let endpoint = &repository.endpoints[index];
            let why = format!("sent other bytes than {digest}");
            rounds.failed(index, endpoint.failure(Kind::DataLoss, why));
        }
        Self {
            repository,
            digest,
            size,
            offset: 0,
            interrupted: 0,
            rounds,
            answer: None,
            sources: Vec::new(),
        }
    }

    /// Hosts that sent some of the bytes.
    pub fn sources(&self) -> &[usize] {
        &self.sources
    }

    /// The next bytes; `None` when all are there.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        while self.offset < self.size {
            let mut answer = match self.answer.take() {
                Some(answer) => answer,
                None => self.open().await?,
            };
            match self.read(&mut answer).await {
                Ok(bytes) => {
                    self.offset += bytes.len() as u64;
                    if !self.sources.contains(&answer.index) {
                        self.sources.push(answer.index);
                    }
                    self.answer = Some(answer);
                    if !bytes.is_empty() {
                        return Ok(Some(bytes));
                    }
                }
                Err(failure) => self.failed(answer.index, failure),
            }
        }
        Ok(None)
    }

    async fn open(&mut self) -> Result<Answer<'a>, RegistryError> {
        while let Some((index, endpoint)) = self.rounds.next().await {
            match self.ask(endpoint).await {
                Ok((response, skip)) => {
                    return Ok(Answer { index, endpoint, response, skip });
                }
                Err(failure) => self.failed(index, failure),
            }
        }
        let none = Rounds::new(self.repository, |_| false);
        Err(std::mem::replace(&mut self.rounds, none).into_error())
    }

    /// Asks for the rest; how many bytes of the answer are known already.
    async fn ask(&self, endpoint: &Endpoint) -> Result<(Response, u64), HostFailure> {
        let path = self.repository.path(&Target::Blob(self.digest));
        let from = (self.offset > 0).then_some(self.offset);
        let response = endpoint.send(&Method::GET, &path, None, from, true).await?;
        let skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let start = response
                    .headers()
                    .get(CONTENT_RANGE)
                    .and_then(|value| value.to_str().ok()?.strip_prefix("bytes ")?.split_once('-'))
                    .and_then(|(start, _)| start.parse::<u64>().ok());
                if start != from {
                    return Err(
                        endpoint.failure(Kind::Unavailable, "sent another range than asked for")
                    );
                }
                0
            }
            _ => self.offset,
        };
        match response.content_length() {
            Some(length) if length + self.offset - skip != self.size => Err(endpoint.failure(
                Kind::DataLoss,
                format!("has {} bytes instead of {}", length + self.offset - skip, self.size),
            )),
            _ => Ok((response, skip)),
        }
    }

    async fn read(&self, answer: &mut Answer<'_>) -> Result<Bytes, HostFailure> {
        let endpoint = answer.endpoint;
        let Some(mut bytes) = endpoint.chunk(&mut answer.response).await? else {
            let why = format!("the answer ended after {} of {} bytes", self.offset, self.size);
            return Err(endpoint.interrupted(why));
        };
        let known = answer.skip.min(bytes.len() as u64);
        answer.skip -= known;
        let bytes = bytes.split_off(usize::try_from(known).unwrap_or(usize::MAX));
        if bytes.len() as u64 > self.size - self.offset {
            let why = format!("sent more than {} bytes", self.size);
            return Err(endpoint.failure(Kind::DataLoss, why));
        }
        Ok(bytes)
    }

    fn failed(&mut self, index: usize, failure: HostFailure) {
        if failure.transient && self.offset >= self.interrupted + PROGRESS {
            self.interrupted = self.offset;
            self.rounds.progressed();
        }
        self.rounds.failed(index, failure);
    }
}
