//! HTTP/2 on one connection.

use crate::{agent::Agent, rpc};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use std::{io, sync::Arc};
use tokio::io::{AsyncRead, AsyncWrite};

/// Calls at once: streams of containers and execs.
const CALLS: u32 = 4096;
/// What a call may have waiting in the connection.
const SEND_BUFFER: usize = 64 << 10;
/// What the other side may send ahead on one call, and on all: a call that is not read must not hold up
/// the others.
const CALL_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// Serves until the other side is gone.
pub async fn serve(
    agent: &Arc<Agent>,
    connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> io::Result<()> {
    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(CALLS)
        .max_send_buf_size(SEND_BUFFER)
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .serve_connection(TokioIo::new(connection), TowerToHyperService::new(rpc::service(agent)));
    // A task, as those it works with: before the runtime's root future they would each time be followed by
    // a look at every descriptor.
    tokio::spawn(served).await?.map_err(io::Error::other)
}
