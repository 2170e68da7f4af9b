//! HTTP/2 on one connection.

use crate::{agent::Agent, rpc};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// Calls at once: streams of containers and execs.
const CALLS: u32 = 4096;
/// What a call may have waiting in the connection.
const SEND_BUFFER: usize = 64 << 10;

/// Serves until the other side is gone.
pub async fn serve(
    agent: &Arc<Agent>,
    connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Result<(), hyper::Error> {
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(CALLS)
        .max_send_buf_size(SEND_BUFFER)
        .serve_connection(TokioIo::new(connection), TowerToHyperService::new(rpc::service(agent)))
        .await
}
