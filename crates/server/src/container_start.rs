//! StartContainer and RemoveContainer: the driver's work, waited for.

use crate::{node::Node, sandbox::SandboxError};
use a3s_box_api::cri;
use std::sync::Arc;

/// Starts a created container; the error names a command that cannot run.
pub async fn start_container(
    node: Arc<Node>,
    request: cri::StartContainerRequest,
) -> Result<cri::StartContainerResponse, SandboxError> {
    let (sandbox, container) = node.sandboxes.container(&request.container_id)?;
    sandbox.start_container(&container.id).await?;
    Ok(cri::StartContainerResponse {})
}

/// Kills the container if it still runs, and forgets it. OK when there is none.
pub async fn remove_container(
    node: Arc<Node>,
    request: cri::RemoveContainerRequest,
) -> Result<cri::RemoveContainerResponse, SandboxError> {
    match node.sandboxes.container(&request.container_id) {
        Ok((sandbox, container)) => sandbox.remove_container(&container.id).await?,
        Err(SandboxError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(cri::RemoveContainerResponse {})
}
