//! ReopenContainerLog: after kubelet renamed the log file, the shim opens a new one.

use crate::{exec_sync::running, node::Node, sandbox::SandboxError};
use a3s_box_api::cri;
use std::sync::Arc;

/// Opens the log of a running container anew.
pub async fn reopen_container_log(
    node: Arc<Node>,
    request: cri::ReopenContainerLogRequest,
) -> Result<cri::ReopenContainerLogResponse, SandboxError> {
    let (sandbox, container) = running(&node, &request.container_id)?;
    sandbox.shim().reopen_log(container.id.as_str()).await?;
    Ok(cri::ReopenContainerLogResponse {})
}
