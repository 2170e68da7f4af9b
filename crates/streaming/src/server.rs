//! The HTTP server: a URL for each request that came over gRPC, and what becomes of it.

use crate::{
    AttachRequest, Backend, BackendError, ExecRequest, PortForwardRequest, Streams, Tls, TooMany,
    activity,
    channels::Wanted,
    hangup::{self, Hangup},
    port_forward, remote_command,
    spdy::Session,
    status::End,
    threads::{self, Threads},
    token::Tokens,
    tunnel::{self, Tunnel},
    upgrade::{self, Answer, Wish},
    websocket,
};
use http::{Method, Request, StatusCode, header};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use std::{convert::Infallible, fmt, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// How long a client may take for the head of its request, and for a TLS handshake before.
const HEAD: Duration = Duration::from_secs(10);
/// Connections that have not shown a token yet. More wait outside.
const MOST_UNKNOWN: usize = 1024;

/// How the server listens and how patient it is.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen; port 0 takes a free one.
    pub address: SocketAddr,
    /// What URLs begin with; `None`: `http://` (or `https://`) and the address.
    pub advertised: Option<String>,
    /// A session on which nothing moves for so long ends; zero: never. A client's pings move.
    pub idle: Duration,
    /// How long a client may take to open its streams.
    pub creation: Duration,
}

/// Gives out URLs. Cheap to clone.
#[derive(Clone)]
pub struct Urls {
    base: Arc<str>,
    tokens: Arc<Tokens<Wanting>>,
}

impl fmt::Debug for Urls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Urls").field("base", &self.base).finish_non_exhaustive()
    }
}

#[derive(Debug)]
enum Wanting {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

impl Wanting {
    fn path(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Attach(_) => "attach",
            Self::PortForward(_) => "portforward",
        }
    }
}

impl Urls {
    /// Where this exec can be had, once, within a minute.
    ///
    /// # Errors
    /// Too many requests wait for their clients.
    pub fn exec(&self, request: ExecRequest) -> Result<String, TooMany> {
        self.keep(Wanting::Exec(request))
    }

    /// Where this attach can be had, once, within a minute.
    ///
    /// # Errors
    /// Too many requests wait for their clients.
    pub fn attach(&self, request: AttachRequest) -> Result<String, TooMany> {
        self.keep(Wanting::Attach(request))
    }

    /// Where this port-forward can be had, once, within a minute.
    ///
    /// # Errors
    /// Too many requests wait for their clients.
    pub fn port_forward(&self, request: PortForwardRequest) -> Result<String, TooMany> {
        self.keep(Wanting::PortForward(request))
    }

    fn keep(&self, wanting: Wanting) -> Result<String, TooMany> {
        let path = wanting.path();
        Ok(format!("{}/{path}/{}", self.base, self.tokens.keep(wanting)?))
    }
}

/// A server that listens already.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    config: Config,
    tls: Option<Tls>,
    urls: Urls,
    threads: Threads,
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// The address cannot be had, or threads for the sessions.
    pub async fn bind(config: Config) -> io::Result<Self> {
        let listener = TcpListener::bind(config.address).await?;
        let mut server = Self {
            listener,
            config,
            tls: None,
            urls: Urls { base: "".into(), tokens: Arc::default() },
            threads: Threads::start()?,
        };
        server.urls.base = server.base()?;
        Ok(server)
    }

    /// Speaks TLS only. URLs given out before are worthless then.
    ///
    /// # Errors
    /// The listener's address cannot be told.
    pub fn with_tls(mut self, tls: Tls) -> io::Result<Self> {
        self.tls = Some(tls);
        self.urls.base = self.base()?;
        Ok(self)
    }

    fn base(&self) -> io::Result<Arc<str>> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        Ok(match &self.config.advertised {
            Some(base) => base.trim_end_matches('/').into(),
            None => format!("{scheme}://{}", self.listener.local_addr()?).into(),
        })
    }

    /// Gives out this server's URLs.
    pub fn urls(&self) -> Urls {
        self.urls.clone()
    }

    /// Serves until dropped, and ends its sessions then.
    pub async fn serve<B: Backend>(self, backend: Arc<B>) {
        let Self { listener, config, tls, urls, mut threads } = self;
        let shared = Arc::new(Shared { tokens: urls.tokens, config, tls, backend });
        let places = Arc::new(Semaphore::new(MOST_UNKNOWN));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let shared = shared.clone();
            let work: threads::Work = Box::new(|stream| {
                Box::pin(async move {
                    connection(stream, shared).await;
                    drop(place);
                })
            });
            let given = match listener.accept().await {
                Ok((stream, _)) => threads.give(stream, work).await,
                Err(error) => Err(error),
            };
            if let Err(error) = given {
                // Out of descriptors: others may be closed meanwhile.
                debug!(%error, "a streaming connection cannot be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

struct Shared<B> {
    tokens: Arc<Tokens<Wanting>>,
    config: Config,
    tls: Option<Tls>,
    backend: Arc<B>,
}

/// One connection as its requests see it.
struct Caller<B> {
    shared: Arc<Shared<B>>,
    hangup: Hangup,
}

impl<B> Clone for Caller<B> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), hangup: self.hangup.clone() }
    }
}

async fn connection<B: Backend>(stream: TcpStream, shared: Arc<Shared<B>>) {
    let hangup = match hangup::prepare(&stream) {
        Ok(hangup) => hangup,
        Err(error) => return debug!(%error, "a streaming connection cannot be set up"),
    };
    let tls = shared.tls.clone();
    let caller = Caller { shared, hangup };
    match tls {
        None => serve_http(stream, caller).await,
        Some(tls) => match timeout(HEAD, tls.accept(stream)).await {
            Ok(Ok(stream)) => serve_http(stream, caller).await,
            Ok(Err(error)) => debug!(%error, "a TLS handshake fails"),
            Err(_) => debug!("a TLS handshake takes too long"),
        },
    }
}

async fn serve_http<B: Backend>(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    caller: Caller<B>,
) {
    let service = hyper::service::service_fn(move |request| {
        let answer = answer(request, &caller);
        async move { Ok::<_, Infallible>(answer) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(hyper_util::rt::TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        debug!(%error, "a streaming connection ends");
    }
}

/// Answers the request and, after a yes, starts its session.
fn answer<B: Backend>(request: Request<Incoming>, caller: &Caller<B>) -> Answer {
    let parts: Vec<_> = request.uri().path().trim_start_matches('/').split('/').collect();
    let &[kind @ ("exec" | "attach" | "portforward"), token] = &*parts else {
        return upgrade::answer(StatusCode::NOT_FOUND, "404 page not found");
    };
    if !matches!(*request.method(), Method::GET | Method::POST) {
        let mut no = upgrade::answer(StatusCode::METHOD_NOT_ALLOWED, "405: only GET and POST");
        no.headers_mut().insert(header::ALLOW, http::HeaderValue::from_static("GET, POST"));
        return no;
    }
    let wanting = caller.shared.tokens.take(token).filter(|wanting| wanting.path() == kind);
    let Some(wanting) = wanting else {
        return upgrade::answer(StatusCode::NOT_FOUND, "404 page not found");
    };
    let Some(wish) = upgrade::wish(request.headers()) else {
        let text = "unable to upgrade: the request asks for neither SPDY/3.1 nor a WebSocket";
        return upgrade::answer(StatusCode::BAD_REQUEST, text);
    };
    begin(request, wanting, wish, caller.clone()).unwrap_or_else(|refusal| *refusal)
}

fn begin<B: Backend>(
    mut request: Request<Incoming>,
    wanting: Wanting,
    wish: Wish,
    caller: Caller<B>,
) -> Result<Answer, Box<Answer>> {
    let headers = request.headers();
    let (yes, protocol) = match wish {
        Wish::Spdy => {
            let ours = match wanting {
                Wanting::PortForward(_) => &[port_forward::PROTOCOL][..],
                _ => &remote_command::PROTOCOLS,
            };
            let Some(protocol) = upgrade::choose(headers, &upgrade::PROTOCOL, ours)? else {
                let text = "unable to upgrade: X-Stream-Protocol-Version is required";
                return Err(Box::new(upgrade::answer(StatusCode::BAD_REQUEST, text)));
            };
            (upgrade::to_spdy(protocol), protocol)
        }
        Wish::WebSocket => {
            let ours = match &wanting {
                Wanting::PortForward(_) => &websocket::FORWARD_PROTOCOLS[..],
                _ => &websocket::PROTOCOLS,
            };
            let named = upgrade::choose(headers, &header::SEC_WEBSOCKET_PROTOCOL, ours)?;
            let protocol = named.unwrap_or(websocket::UNNAMED);
            if let Wanting::PortForward(request) = &wanting
                && protocol != tunnel::PROTOCOL
                && !websocket::has_channels(&request.ports)
            {
                let text = "unable to upgrade: between 1 and 32 ports must be asked for";
                return Err(Box::new(upgrade::answer(StatusCode::BAD_REQUEST, text)));
            }
            (upgrade::to_websocket(headers, named)?, protocol)
        }
    };
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgraded.await {
            Ok(io) => session(TokioIo::new(io), wanting, wish, protocol, caller).await,
            Err(error) => debug!(%error, "a client goes while it is answered"),
        }
    });
    Ok(yes)
}

async fn session<B: Backend>(
    io: TokioIo<hyper::upgrade::Upgraded>,
    wanting: Wanting,
    wish: Wish,
    protocol: &'static str,
    Caller { shared, hangup }: Caller<B>,
) {
    let Shared { config, backend, .. } = &*shared;
    let gone = CancellationToken::new();
    let _gone = gone.clone().drop_guard();
    hangup.watch(gone.clone());
    let io = activity::watch(io, config.idle, gone.clone());
    let wanted = match &wanting {
        Wanting::Exec(request) => Wanted::from(request),
        Wanting::Attach(request) => Wanted::from(request),
        Wanting::PortForward(request) => {
            let session = match wish {
                Wish::Spdy => Session::start(io, gone),
                Wish::WebSocket if protocol == tunnel::PROTOCOL => {
                    Session::start(Tunnel::over(io).await, gone)
                }
                Wish::WebSocket => {
                    return websocket::forward(io, protocol, request, &**backend, gone).await;
                }
            };
            return port_forward::serve(session, request.clone(), backend.clone(), config.creation)
                .await;
        }
    };
    match wish {
        Wish::Spdy => {
            let session = Session::start(io, gone.clone());
            let client =
                remote_command::accept(session, protocol, wanted, config.creation, gone.clone())
                    .await;
            let Some(mut client) = client else {
                return debug!("a client did not open its streams in time");
            };
            let streams = client.take_streams();
            if let Some(end) = run(&**backend, wanting, streams, &gone).await {
                client.finish(&end).await;
            }
        }
        Wish::WebSocket => {
            let (client, streams) = websocket::accept(io, protocol, wanted, gone.clone()).await;
            if let Some(end) = run(&**backend, wanting, streams, &gone).await {
                client.finish(&end).await;
            }
        }
    }
}

/// How it ended; `None`: the client went first, and nobody is left to tell.
async fn run<B: Backend>(
    backend: &B,
    wanting: Wanting,
    streams: Streams,
    gone: &CancellationToken,
) -> Option<End> {
    let work = async {
        match wanting {
            Wanting::Exec(request) => {
                let command = request.command.clone();
                match backend.exec(request, streams).await {
                    Ok(0) => End::Success,
                    Ok(code) => End::Code(code, command),
                    Err(error) => End::Failed("error executing command in container", error),
                }
            }
            Wanting::Attach(request) => match backend.attach(request, streams).await {
                Ok(()) => End::Success,
                Err(error) => End::Failed("error attaching to container", error),
            },
            // Served elsewhere.
            Wanting::PortForward(_) => End::Failed("port-forward", BackendError(String::new())),
        }
    };
    tokio::select! {
        end = work => Some(end),
        () = gone.cancelled() => None,
    }
}
