//! RunPodSandbox: kubelet's wish becomes a spec, the spec a sandbox; the answer is only waited for.

use crate::{node::Node, sandbox::SandboxError, sandbox_spec::sandbox_spec};
use a3s_box_api::cri;
use std::sync::Arc;

/// Makes the sandbox, or joins the making of the same one.
pub async fn run_pod_sandbox(
    node: Arc<Node>,
    request: cri::RunPodSandboxRequest,
) -> Result<cri::RunPodSandboxResponse, SandboxError> {
    let Some(config) = &request.config else {
        return Err(SandboxError::invalid("config", "is missing"));
    };
    let handler = node.handler(&request.runtime_handler)?;
    let spec = sandbox_spec(config, (&request.runtime_handler, handler), &node.sizes)?;
    let id = node.sandboxes.run(spec)?.created().await?;
    Ok(cri::RunPodSandboxResponse { pod_sandbox_id: id.to_string() })
}
