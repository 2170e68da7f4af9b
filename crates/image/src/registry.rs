//! One repository as its registries serve it (OCI distribution API, pull side).
//!
//! Hosts are asked in their order, in rounds: a host that gave a definite answer is not asked again, one
//! that could not be reached or was not well is, after a pause, in the next round. Nothing is believed:
//! documents and layers are checked against their digests by whoever asked for them.
//!
//! Not here: which hosts (`hosts.rs`), resuming a layer (`download.rs`), what documents mean (`manifest.rs`).

use crate::{
    Auth, Digest, HostFailure, ImageError, Kind, Reference, RegistryError,
    auth::{Credentials, basic, bearer, challenges},
    error::chain,
    hosts::{self, Host},
};
use http::{
    HeaderValue, Method, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use rand::RngExt;
use reqwest::{Certificate, Client, Identity, Response};
use std::{
    error::Error,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};
use tokio::{
    sync::Mutex,
    time::{sleep, timeout},
};
use url::Url;

/// Documents that describe images; anything else is refused later with its name.
const DOCUMENTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";
const CONTENT_DIGEST: &str = "docker-content-digest";
const MOST_REDIRECTS: usize = 10;
/// Tokens and error texts are small.
const LARGEST_ANSWER: usize = 1 << 20;

/// How long a registry may take, and how often it is asked.
#[derive(Debug, Clone)]
pub struct Limits {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// From a request to the head of its answer.
    pub answer: Duration,
    /// Without a byte of an answer's body.
    pub stall: Duration,
    /// How often the list of hosts is gone through.
    pub rounds: u32,
    /// Before the second round; doubled for each further one.
    pub pause: Duration,
    /// The longest pause, also when a registry asks for a longer one.
    pub longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(15),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(60),
            rounds: 4,
            pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(20),
        }
    }
}

/// A repository and the hosts that may serve it.
pub(crate) struct Repository {
    reference: Reference,
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) limits: Limits,
}

/// One host, with the state of talking to it about one repository.
pub(crate) struct Endpoint {
    host: Host,
    client: Client,
    credentials: Credentials,
    /// `Authorization` that worked last. Held while a new one is fetched, so that it is fetched once.
    authorization: Mutex<Option<HeaderValue>>,
    /// An ambiguous host turned out not to speak TLS.
    plain: AtomicBool,
    /// `?ns=` for a stand-in.
    namespace: Option<String>,
    scope: String,
    limits: Limits,
}

/// What to ask for, below the repository.
#[derive(Debug, Clone)]
pub(crate) enum Target<'a> {
    /// What a tag means.
    Tag(&'a str),
    /// A manifest or index.
    Manifest(&'a Digest),
    /// A configuration or layer.
    Blob(&'a Digest),
}

impl Target<'_> {
    fn path(&self) -> String {
        match self {
            Self::Tag(tag) => format!("manifests/{tag}"),
            Self::Manifest(digest) => format!("manifests/{digest}"),
            Self::Blob(digest) => format!("blobs/{digest}"),
        }
    }
}

/// What a tag meant.
pub(crate) struct Resolved {
    /// What the registry calls it; `None` when it did not say.
    pub digest: Option<Digest>,
}

impl Repository {
    /// Prepares to ask; reads the node's registry configuration but no network.
    pub fn new(
        reference: &Reference,
        config: Option<&Path>,
        auth: Option<&Auth>,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        let image = reference.to_string();
        let endpoints = hosts::hosts(config, reference.host())?
            .into_iter()
            .map(|host| {
                let credentials = match auth {
                    Some(auth) if auth.is_for(&host, reference.host()) => {
                        auth.credentials(&image)?
                    }
                    _ => Credentials::Anonymous,
                };
                Endpoint::new(host, credentials, reference, limits)
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { reference: reference.clone(), endpoints, limits: limits.clone() })
    }

    /// Asks what a tag means, without fetching it: registries count fetches, not questions.
    pub async fn resolve(&self, tag: &str) -> Result<Resolved, RegistryError> {
        let mut rounds = Rounds::new(self, |host| host.resolve);
        while let Some((index, endpoint)) = rounds.next().await {
            let path = self.path(&Target::Tag(tag));
            match endpoint.send(&Method::HEAD, &path, Some(DOCUMENTS), None, false).await {
                Ok(response) => {
                    let digest = response
                        .headers()
                        .get(CONTENT_DIGEST)
                        .and_then(|value| value.to_str().ok())
                        .and_then(|text| text.parse().ok());
                    return Ok(Resolved { digest });
                }
                Err(failure) => rounds.failed(index, failure),
            }
        }
        Err(rounds.into_error())
    }

    /// Fetches a document of at most `most` bytes. By digest it is verified; by tag it cannot be.
    pub async fn document(
        &self,
        target: &Target<'_>,
        most: usize,
    ) -> Result<Vec<u8>, RegistryError> {
        let by_tag = matches!(target, Target::Tag(_));
        let mut rounds = Rounds::new(self, |host| if by_tag { host.resolve } else { host.pull });
        while let Some((index, endpoint)) = rounds.next().await {
            match self.document_from(endpoint, target, most).await {
                Ok(bytes) => return Ok(bytes),
                Err(failure) => rounds.failed(index, failure),
            }
        }
        Err(rounds.into_error())
    }

    async fn document_from(
        &self,
        endpoint: &Endpoint,
        target: &Target<'_>,
        most: usize,
    ) -> Result<Vec<u8>, HostFailure> {
        let (accept, digest) = match target {
            Target::Tag(_) => (Some(DOCUMENTS), None),
            Target::Manifest(digest) => (Some(DOCUMENTS), Some(*digest)),
            Target::Blob(digest) => (None, Some(*digest)),
        };
        let response =
            endpoint.send(&Method::GET, &self.path(target), accept, None, digest.is_some()).await?;
        let bytes = endpoint.body(response, most).await?;
        match digest {
            Some(digest) if !digest.matches(&bytes) => {
                Err(endpoint.failure(Kind::DataLoss, format!("sent other bytes than {digest}")))
            }
            _ => Ok(bytes),
        }
    }

    /// The path of a target, below a host's API.
    pub(crate) fn path(&self, target: &Target<'_>) -> String {
        format!("{}/{}", self.reference.repository(), target.path())
    }
}

/// Goes through the hosts that may be asked, pausing between rounds.
pub(crate) struct Rounds<'a> {
    repository: &'a Repository,
    hosts: Vec<Asked>,
    position: usize,
    round: u32,
}

struct Asked {
    index: usize,
    done: bool,
    failure: Option<HostFailure>,
}

impl<'a> Rounds<'a> {
    pub fn new(repository: &'a Repository, may: impl Fn(&Host) -> bool) -> Self {
        let hosts = repository.endpoints.iter().enumerate();
        Self {
            repository,
            hosts: hosts
                .filter(|(_, endpoint)| may(&endpoint.host))
                .map(|(index, _)| Asked { index, done: false, failure: None })
                .collect(),
            position: 0,
            round: 1,
        }
    }

    /// The next host to ask; `None` when all have had their last word.
    pub async fn next(&mut self) -> Option<(usize, &'a Endpoint)> {
        loop {
            if let Some(host) = self.hosts[self.position..].iter().find(|host| !host.done) {
                let index = host.index;
                self.position = self.hosts.iter().position(|host| host.index == index)? + 1;
                return Some((index, &self.repository.endpoints[index]));
            }
            if self.round >= self.repository.limits.rounds
                || self.hosts.iter().all(|host| host.done)
            {
                return None;
            }
            sleep(self.pause()).await;
            self.round += 1;
            self.position = 0;
        }
    }

    fn pause(&self) -> Duration {
        let limits = &self.repository.limits;
        let wished = self.hosts.iter().filter_map(|host| host.failure.as_ref()?.retry_after).min();
        let doubled = limits.pause.saturating_mul(1 << (self.round - 1).min(16));
        let pause = wished.unwrap_or_default().max(doubled).min(limits.longest_pause);
        // Pods of one node that failed together should not come back together.
        pause.mul_f64(rand::rng().random_range(1.0..1.25))
    }

    pub fn failed(&mut self, index: usize, failure: HostFailure) {
        tracing::debug!(host = %failure.host, why = %failure.why, transient = failure.transient, "registry failed");
        if let Some(host) = self.hosts.iter_mut().find(|host| host.index == index) {
            host.done = !failure.transient;
            host.failure = Some(failure);
        }
    }

    /// The work goes on: what failed before counts no more.
    pub fn progressed(&mut self) {
        self.round = 1;
        self.position = 0;
    }

    pub fn into_error(self) -> RegistryError {
        RegistryError { failures: self.hosts.into_iter().filter_map(|host| host.failure).collect() }
    }
}

impl Endpoint {
    fn new(
        host: Host,
        credentials: Credentials,
        reference: &Reference,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        let client = client(&host, limits)?;
        let authorization = match &credentials {
            Credentials::Bearer(token) => bearer(token),
            _ => None,
        };
        Ok(Self {
            namespace: host.proxy.then(|| reference.host().to_owned()),
            scope: format!("repository:{}:pull", reference.repository()),
            authorization: Mutex::new(authorization),
            plain: AtomicBool::new(false),
            limits: limits.clone(),
            credentials,
            client,
            host,
        })
    }

    /// Sends one request, authenticates when asked to, follows redirects; an answer that is no success is
    /// an error.
    pub async fn send(
        &self,
        method: &Method,
        path: &str,
        accept: Option<&'static str>,
        from: Option<u64>,
        by_digest: bool,
    ) -> Result<Response, HostFailure> {
        let mut used = self.authorization.lock().await.clone();
        let mut response =
            self.follow(method, path, accept, from, by_digest, used.as_ref()).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            used = Some(self.authenticate(&response, used.as_ref()).await?);
            response = self.follow(method, path, accept, from, by_digest, used.as_ref()).await?;
        }
        if response.status().is_success() {
            return Ok(response);
        }
        let credentials_refused = response.status() == StatusCode::UNAUTHORIZED
            && self.credentials != Credentials::Anonymous;
        let mut failure = self.refused(response).await;
        if credentials_refused {
            failure.why = format!("refuses the credentials: {}", failure.why);
        }
        Err(failure)
    }

    /// One request and its redirects. Credentials and configured headers stay with the host they are for.
    async fn follow(
        &self,
        method: &Method,
        path: &str,
        accept: Option<&'static str>,
        from: Option<u64>,
        by_digest: bool,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, HostFailure> {
        let mut url = self.url(path);
        let origin = url.origin();
        for _ in 0..=MOST_REDIRECTS {
            let own = url.origin() == origin;
            let mut request = self.client.request(method.clone(), url.clone());
            if own {
                request = request.headers(self.host.headers.clone());
                if let Some(authorization) = authorization {
                    request = request.header(AUTHORIZATION, authorization);
                }
            }
            if let Some(accept) = accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some(from) = from {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = match timeout(self.limits.answer, request.send()).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) if own && self.may_be_plain(&error) => {
                    tracing::debug!(host = %self.name(), "speaks no TLS; trying without");
                    self.plain.store(true, Ordering::Relaxed);
                    return Box::pin(self.follow(
                        method,
                        path,
                        accept,
                        from,
                        by_digest,
                        authorization,
                    ))
                    .await;
                }
                Ok(Err(error)) => return Err(self.broken(error)),
                Err(_) => return Err(self.silent("no answer")),
            };
            let location = match response.headers().get(LOCATION) {
                Some(location) if response.status().is_redirection() => location,
                _ => return Ok(response),
            };
            let next = location
                .to_str()
                .ok()
                .and_then(|text| url.join(text).ok())
                .filter(|next| matches!(next.scheme(), "http" | "https"))
                .ok_or_else(|| self.failure(Kind::Unavailable, "redirects to no web address"))?;
            if !by_digest && url.scheme() == "https" && next.scheme() == "http" {
                let why = "redirects to plain HTTP, where nothing vouches for what a tag means";
                return Err(self.failure(Kind::Unavailable, why));
            }
            url = next;
        }
        Err(self.failure(Kind::Unavailable, format!("more than {MOST_REDIRECTS} redirects")))
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.host.base.clone();
        if self.plain.load(Ordering::Relaxed) {
            // From https to http, both special schemes: cannot fail.
            if url.set_scheme("http").is_err() {
                tracing::debug!(%url, "scheme kept");
            }
        }
        let base = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{base}/{path}"));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }

    fn may_be_plain(&self, error: &reqwest::Error) -> bool {
        self.host.ambiguous && error.is_connect() && !self.plain.load(Ordering::Relaxed)
    }

    /// A new `Authorization` for a refused request; someone else may have fetched it meanwhile.
    async fn authenticate(
        &self,
        response: &Response,
        used: Option<&HeaderValue>,
    ) -> Result<HeaderValue, HostFailure> {
        let mut current = self.authorization.lock().await;
        if let Some(newer) = current.as_ref().filter(|current| Some(*current) != used) {
            return Ok(newer.clone());
        }
        let offered: Vec<_> = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenges)
            .collect();
        let offer = |scheme: &str| offered.iter().find(|challenge| challenge.scheme == scheme);
        let value = match (&self.credentials, offer("bearer"), offer("basic")) {
            (Credentials::Bearer(_), ..) => None,
            (_, Some(challenge), _) => {
                let realm = challenge.get("realm").unwrap_or_default();
                let scope = challenge.get("scope").unwrap_or(&self.scope);
                Some(self.token(realm, challenge.get("service"), scope).await?)
            }
            // The same password again would be refused again.
            (Credentials::Password { username, password }, None, Some(_)) => {
                basic(username, password).filter(|value| Some(value) != used)
            }
            _ => None,
        };
        match value {
            Some(value) => {
                *current = Some(value.clone());
                Ok(value)
            }
            None if self.credentials == Credentials::Anonymous => {
                Err(self
                    .failure(Kind::Unauthenticated, "wants credentials and none were given for it"))
            }
            None => Err(self.failure(Kind::Unauthenticated, "refuses the credentials")),
        }
    }

    /// Fetches an access token from the realm of a challenge.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
    ) -> Result<HeaderValue, HostFailure> {
        let mut url = Url::parse(realm)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| self.failure(Kind::Unauthenticated, "names no token server"))?;
        let secret = self.credentials != Credentials::Anonymous;
        if secret
            && self.host.base.scheme() == "https"
            && url.scheme() == "http"
            && !self.plain.load(Ordering::Relaxed)
        {
            let why = format!("wants the credentials sent without TLS to {realm}");
            return Err(self.failure(Kind::Unauthenticated, why));
        }
        let mut form = vec![("scope", scope)];
        form.extend(service.map(|service| ("service", service)));
        let request = match &self.credentials {
            Credentials::Refresh(token) => {
                form.extend([
                    ("grant_type", "refresh_token"),
                    ("refresh_token", token),
                    ("client_id", env!("CARGO_PKG_NAME")),
                ]);
                let body = url::form_urlencoded::Serializer::new(String::new())
                    .extend_pairs(form)
                    .finish();
                self.client
                    .post(url)
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(body)
            }
            Credentials::Password { username, password } => {
                form.push(("account", username));
                url.query_pairs_mut().extend_pairs(form);
                let request = self.client.get(url);
                match basic(username, password) {
                    Some(value) => request.header(AUTHORIZATION, value),
                    None => request,
                }
            }
            Credentials::Anonymous | Credentials::Bearer(_) => {
                url.query_pairs_mut().extend_pairs(form);
                self.client.get(url)
            }
        };
        let response = match timeout(self.limits.answer, request.send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                let mut failure = self.broken(error);
                failure.why = format!("token server: {}", failure.why);
                return Err(failure);
            }
            Err(_) => return Err(self.silent("no answer from its token server")),
        };
        if !response.status().is_success() {
            let status = response.status();
            let mut failure = self.refused(response).await;
            failure.why = format!("token server: {}", failure.why);
            if status.is_client_error() && !failure.transient {
                failure.kind = Kind::Unauthenticated;
            }
            return Err(failure);
        }
        #[derive(serde::Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let bytes = self.body(response, LARGEST_ANSWER).await?;
        serde_json::from_slice::<Answer>(&bytes)
            .ok()
            .and_then(|answer| {
                answer.token.filter(|token| !token.is_empty()).or(answer.access_token)
            })
            .and_then(|token| bearer(&token))
            .ok_or_else(|| self.failure(Kind::Unauthenticated, "its token server sent no token"))
    }

    /// A whole body of at most `most` bytes.
    async fn body(&self, mut response: Response, most: usize) -> Result<Vec<u8>, HostFailure> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk(&mut response).await? {
            if bytes.len() + chunk.len() > most {
                return Err(
                    self.failure(Kind::FailedPrecondition, format!("sent more than {most} bytes"))
                );
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// The next bytes of a body; `None` at its end.
    pub async fn chunk(
        &self,
        response: &mut Response,
    ) -> Result<Option<bytes::Bytes>, HostFailure> {
        match timeout(self.limits.stall, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(self.broken(error)),
            Err(_) => Err(self.silent("nothing came")),
        }
    }

    /// What an answer that is no success means.
    async fn refused(&self, response: Response) -> HostFailure {
        let status = response.status();
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.trim().parse().ok())
            .map(Duration::from_secs);
        let kind = match status {
            StatusCode::NOT_FOUND => Kind::NotFound,
            StatusCode::UNAUTHORIZED => Kind::Unauthenticated,
            StatusCode::FORBIDDEN => Kind::PermissionDenied,
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Kind::DeadlineExceeded,
            _ => Kind::Unavailable,
        };
        let words = self.body(response, LARGEST_ANSWER).await.ok().and_then(|bytes| words(&bytes));
        HostFailure {
            transient: status.is_server_error()
                || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT),
            retry_after,
            ..self.failure(
                kind,
                match words {
                    Some(words) => format!("{status}: {words}"),
                    None => status.to_string(),
                },
            )
        }
    }

    /// The connection failed.
    pub fn broken(&self, error: reqwest::Error) -> HostFailure {
        let kind = if error.is_timeout() { Kind::DeadlineExceeded } else { Kind::Unavailable };
        // A certificate that is not trusted now is not trusted in a second.
        let certificate = causes(&error).any(|cause| {
            matches!(
                cause.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref()),
                Some(inner) if inner.to_string().contains("certificate")
            )
        });
        HostFailure {
            transient: !certificate,
            // Addresses of redirects may carry signatures.
            ..self.failure(kind, chain(&error.without_url()))
        }
    }

    fn silent(&self, what: &str) -> HostFailure {
        HostFailure {
            transient: true,
            ..self.failure(Kind::DeadlineExceeded, format!("{what} in time"))
        }
    }

    /// A definite failure.
    pub fn failure(&self, kind: Kind, why: impl Into<String>) -> HostFailure {
        HostFailure {
            host: self.name(),
            why: why.into(),
            kind,
            transient: false,
            retry_after: None,
        }
    }

    /// What is wrong with this answer may be right in the next.
    pub fn interrupted(&self, why: impl Into<String>) -> HostFailure {
        HostFailure { transient: true, ..self.failure(Kind::Unavailable, why) }
    }

    fn name(&self) -> String {
        let name = self.host.base.host_str().unwrap_or_default();
        match self.host.base.port() {
            Some(port) => format!("{name}:{port}"),
            None => name.to_owned(),
        }
    }
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// What a registry says in its own words, cut to what fits in a line.
fn words(body: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Body {
        errors: Vec<Item>,
    }
    #[derive(serde::Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    let texts: Vec<_> =
        body.errors.iter().map(|item| format!("{} {}", item.code, item.message)).collect();
    let text: String = texts.join(", ").chars().filter(|c| !c.is_control()).take(256).collect();
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn client(host: &Host, limits: &Limits) -> Result<Client, ImageError> {
    let unusable =
        |path: &Path, why: String| ImageError::RegistryConfig { path: path.to_owned(), why };
    let read = |path: &Path| fs::read(path).map_err(|error| ImageError::io("read", path, error));
    // The streaming server's is the same; a second call changes nothing.
    rustls::crypto::ring::default_provider().install_default().ok();
    let mut builder = Client::builder()
        .user_agent(concat!("a3s-box/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(limits.connect)
        .tls_danger_accept_invalid_certs(host.skip_verify);
    for path in &host.ca {
        let found = Certificate::from_pem_bundle(&read(path)?)
            .map_err(|error| unusable(path, chain(&error)))?;
        if found.is_empty() {
            return Err(unusable(path, "it holds no certificate in PEM".into()));
        }
        builder = builder.tls_certs_merge(found);
    }
    // rustls shows one certificate; of several the first is it.
    if let Some((certificate, key)) = host.client.first() {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        let identity =
            Identity::from_pem(&pem).map_err(|error| unusable(certificate, chain(&error)))?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|error| ImageError::RegistryConfig {
        path: host.ca.first().cloned().unwrap_or_else(|| host.base.as_str().into()),
        why: chain(&error),
    })
}
