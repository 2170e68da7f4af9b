//! Port-forward over SPDY: a pair of streams, data and error, for each connection of the client.

use crate::{
    Backend, BackendError, PortForwardRequest,
    backend::{Output, OutputKind},
    spdy::{Session, Stream, StreamWriter},
};
use std::{collections::HashMap, sync::Arc};
use tokio::{
    task::JoinSet,
    time::{Duration, Instant, timeout_at},
};
use tracing::debug;

/// The only protocol.
pub(crate) const PROTOCOL: &str = "portforward.k8s.io";
/// Serves the connection until the client is gone, and what it forwards with it. How many there can
/// be follows from the session's bound on its streams.
pub(crate) async fn serve<B: Backend>(
    mut session: Session,
    request: PortForwardRequest,
    backend: Arc<B>,
    patience: Duration,
) {
    let mut halves: HashMap<String, Half> = HashMap::new();
    // Dropped at the end, which ends all that is left.
    let mut forwards = JoinSet::new();
    loop {
        while forwards.try_join_next().is_some() {}
        let oldest = halves.values().map(|half| half.until).min();
        let next = match oldest {
            Some(until) => timeout_at(until, session.accept()).await,
            None => Ok(session.accept().await),
        };
        let Ok(next) = next else {
            expire(&mut halves).await;
            continue;
        };
        let Some(stream) = next else { return };
        let (port, id) = match read(&stream, &request) {
            Ok(found) => found,
            Err(why) => {
                debug!(why, "a port-forward stream is refused");
                stream.writer.reset().await;
                continue;
            }
        };
        let half = halves.entry(id.clone()).or_insert_with(|| Half {
            data: None,
            errors: None,
            until: Instant::now() + patience,
        });
        let place = match stream.header("streamtype") {
            Some("data") => &mut half.data,
            _ => &mut half.errors,
        };
        match place {
            None => *place = Some(stream),
            Some(_) => stream.writer.reset().await,
        }
        if let Half { data: Some(_), errors: Some(_), .. } = half
            && let Some(Half { data: Some(data), errors: Some(errors), .. }) = halves.remove(&id)
        {
            let sandbox_id = request.sandbox_id.clone();
            forwards.spawn(forward(backend.clone(), sandbox_id, port, data, errors.writer));
        }
    }
}

struct Half {
    data: Option<Stream>,
    errors: Option<Stream>,
    until: Instant,
}

async fn expire(halves: &mut HashMap<String, Half>) {
    let now = Instant::now();
    let late: Vec<_> = halves.extract_if(|_, half| half.until <= now).collect();
    for stream in late.into_iter().flat_map(|(_, half)| [half.data, half.errors]).flatten() {
        stream.writer.reset().await;
    }
}

/// Port and connection that a stream belongs to.
fn read(stream: &Stream, request: &PortForwardRequest) -> Result<(u16, String), String> {
    let kind = stream.header("streamtype").unwrap_or_default();
    if !matches!(kind, "data" | "error") {
        return Err(format!("stream type {kind:?}"));
    }
    let text = stream.header("port").unwrap_or_default();
    let port: u16 =
        text.parse().ok().filter(|port| *port > 0).ok_or_else(|| format!("port {text:?}"))?;
    if !request.ports.is_empty() && !request.ports.contains(&port) {
        return Err(format!("port {port} was not asked for"));
    }
    // Clients before 1.3 sent none; the port tells their connections apart.
    Ok((port, stream.header("requestid").unwrap_or(text).to_owned()))
}

async fn forward<B: Backend>(
    backend: Arc<B>,
    sandbox_id: String,
    port: u16,
    data: Stream,
    mut errors: StreamWriter,
) {
    let given_up = data.writer.given_up().clone();
    let output = Output(OutputKind::Spdy(data.writer));
    let done = tokio::select! {
        done = backend.port_forward(sandbox_id.clone(), port, data.input, output) => done,
        // Both of the connection's ends at once, unlike an end of the input alone.
        () = given_up.cancelled() => Ok(()),
    };
    if let Err(error) = done {
        let text = failure(port, &sandbox_id, &error);
        errors.write(text.into()).await.ok();
    }
    errors.close().await;
}

/// What a client is told when a connection fails.
pub(crate) fn failure(port: u16, sandbox_id: &str, error: &BackendError) -> String {
    format!("error forwarding port {port} to pod {sandbox_id}, uid : {error}")
}
