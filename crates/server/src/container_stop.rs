//! StopContainer: the stop signal, the grace period, then SIGKILL to everything in it.

use crate::{
    container::{ContainerRecord, Phase},
    node::Node,
    sandbox::{Sandbox, SandboxError, View},
    shim_client::Whom,
};
use a3s_box_api::cri;
use a3s_box_types::ContainerId;
use std::{sync::Arc, time::Duration};

const SIGKILL: u32 = 9;
/// How long a killed container may take to be reported as ended.
const KILL_WAIT: Duration = Duration::from_secs(30);

/// Ends the container. OK when it has ended, never ran, or does not exist.
pub async fn stop_container(
    node: Arc<Node>,
    request: cri::StopContainerRequest,
) -> Result<cri::StopContainerResponse, SandboxError> {
    match node.sandboxes.container(&request.container_id) {
        Ok((sandbox, container)) => {
            let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
            stop(&sandbox, &container, grace).await?;
        }
        Err(SandboxError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    Ok(cri::StopContainerResponse {})
}

async fn stop(
    sandbox: &Sandbox,
    container: &ContainerRecord,
    grace: Duration,
) -> Result<(), SandboxError> {
    if !matches!(container.phase, Phase::Running { .. }) {
        return Ok(());
    }
    let id = &container.id;
    if !grace.is_zero() {
        let signal = container.stop_signal;
        signalled(sandbox, id, signal, Whom::Init).await?;
        if ended_within(sandbox, id, grace).await? {
            return Ok(());
        }
    }
    signalled(sandbox, id, SIGKILL, Whom::All).await?;
    if ended_within(sandbox, id, KILL_WAIT).await? {
        return Ok(());
    }
    let step = "wait for the killed container";
    Err(SandboxError::Timeout { step, within: KILL_WAIT })
}

/// A container that ended before the signal came is as wanted.
async fn signalled(
    sandbox: &Sandbox,
    id: &ContainerId,
    signal: u32,
    whom: Whom,
) -> Result<(), SandboxError> {
    match sandbox.shim().signal_container(id.as_str(), signal, whom).await {
        Err(error) if !ended(&sandbox.view(), id) => Err(error),
        _ => Ok(()),
    }
}

async fn ended_within(
    sandbox: &Sandbox,
    id: &ContainerId,
    time: Duration,
) -> Result<bool, SandboxError> {
    match tokio::time::timeout(time, sandbox.wait_for(|view| ended(view, id))).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Ok(false),
    }
}

fn ended(view: &View, id: &ContainerId) -> bool {
    view.removed || view.containers.get(id).is_none_or(|container| container.exit().is_some())
}
