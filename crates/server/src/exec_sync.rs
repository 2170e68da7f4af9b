//! ExecSync: one command, its whole output, its exit code.

use crate::{
    container::{ContainerRecord, Phase},
    node::Node,
    sandbox::{Sandbox, SandboxError},
};
use a3s_box_api::cri;
use std::{sync::Arc, time::Duration};

/// Runs the command to its end, or kills it and all its descendants when the time is over.
pub async fn exec_sync(
    node: Arc<Node>,
    request: cri::ExecSyncRequest,
) -> Result<cri::ExecSyncResponse, SandboxError> {
    if request.cmd.is_empty() {
        return Err(SandboxError::invalid("cmd", "is empty"));
    }
    let Ok(seconds) = u64::try_from(request.timeout) else {
        return Err(SandboxError::invalid("timeout", "is negative"));
    };
    let (sandbox, container) = running(&node, &request.container_id)?;
    let timeout = (seconds > 0).then(|| Duration::from_secs(seconds));
    let done = sandbox.shim().exec_sync(container.id.as_str(), request.cmd, timeout).await?;
    Ok(cri::ExecSyncResponse {
        stdout: done.stdout,
        stderr: done.stderr,
        exit_code: done.exit_code,
    })
}

/// The container, if it runs.
pub fn running(node: &Node, id: &str) -> Result<(Sandbox, Arc<ContainerRecord>), SandboxError> {
    let (sandbox, container) = node.sandboxes.container(id)?;
    if matches!(container.phase, Phase::Running { .. }) {
        return Ok((sandbox, container));
    }
    Err(SandboxError::State {
        kind: "container",
        id: container.id.to_string(),
        state: container.state_name(),
        needed: "running",
    })
}
