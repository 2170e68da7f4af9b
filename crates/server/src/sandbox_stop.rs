//! StopPodSandbox and RemovePodSandbox: what is not there is stopped and removed already.

use crate::{node::Node, sandbox::SandboxError};
use a3s_box_api::cri;
use std::sync::Arc;

/// Ends the sandbox with its containers; kubelet repeats it until it succeeds.
pub async fn stop_pod_sandbox(
    node: Arc<Node>,
    request: cri::StopPodSandboxRequest,
) -> Result<cri::StopPodSandboxResponse, SandboxError> {
    match node.sandboxes.get(&request.pod_sandbox_id) {
        Ok(sandbox) => sandbox.stop().await?,
        Err(SandboxError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(cri::StopPodSandboxResponse {})
}

/// Ends the sandbox if it still runs, and forgets it and its containers.
pub async fn remove_pod_sandbox(
    node: Arc<Node>,
    request: cri::RemovePodSandboxRequest,
) -> Result<cri::RemovePodSandboxResponse, SandboxError> {
    match node.sandboxes.get(&request.pod_sandbox_id) {
        Ok(sandbox) => sandbox.remove().await?,
        Err(SandboxError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(cri::RemovePodSandboxResponse {})
}
