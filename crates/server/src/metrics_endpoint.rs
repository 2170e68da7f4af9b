//! The HTTP endpoint of the server's own metrics: `GET /metrics`, and nothing else.

use crate::{Server, status::chain};
use anyhow::{Context, Result};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tracing::{debug, info, warn};

/// What Prometheus asks for by that name.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Connections at a time; more wait.
const CONNECTIONS: usize = 16;
/// For a client to say what it wants, and for it to take the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Listens; nobody is answered yet.
pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    let bound = bound.with_context(|| format!("listen on {address} (metrics.address)"))?;
    info!(address = %bound.local_addr().unwrap_or(address), "metrics");
    Ok(bound)
}

/// Answers until it is dropped.
pub async fn serve(listener: TcpListener, server: Arc<Server>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = server.clone();
                tokio::spawn(async move {
                    connection(stream, server).await;
                    drop(place);
                });
            }
            Err(error) => {
                warn!(%error, "metrics: no connection can be taken");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, server: Arc<Server>) {
    let service = service_fn(move |request| {
        let answer = answer(&request, &server);
        async move { Ok::<_, Infallible>(answer) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(2 * PATIENCE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!("metrics: {}", chain(&error)),
        Err(_) => debug!("metrics: the client is too slow"),
    }
}

fn answer(request: &Request<Incoming>, server: &Server) -> Response<Full<Bytes>> {
    let plain = |status, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            let sandboxes = &server.node.sandboxes;
            let text = sandboxes.deps().instruments.text(sandboxes, &*server.images);
            let mut response = Response::new(Full::from(text));
            let kind = header::HeaderValue::from_static(CONTENT_TYPE);
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        (_, "/metrics") => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
        _ => plain(StatusCode::NOT_FOUND, "there is only /metrics\n"),
    }
}
