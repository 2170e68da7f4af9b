//! UpdateContainerResources: other limits for a container that is there.

use crate::{
    container::{Phase, spec::Resources},
    container_spec,
    node::Node,
    oci_spec,
    sandbox::SandboxError,
};
use a3s_box_api::cri;
use std::sync::Arc;

/// Puts the limits that are given in force and saves them. The virtual machine keeps its size: a limit
/// above it holds as far as the machine reaches.
pub async fn update_container_resources(
    node: Arc<Node>,
    request: cri::UpdateContainerResourcesRequest,
) -> Result<cri::UpdateContainerResourcesResponse, SandboxError> {
    if request.windows.is_some() {
        return Err(SandboxError::unsupported("windows", "this is Linux"));
    }
    let Some(linux) = request.linux else {
        return Err(SandboxError::invalid("linux", "is missing"));
    };
    let (sandbox, container) = node.sandboxes.container(&request.container_id)?;
    if !matches!(container.phase, Phase::Created | Phase::Running { .. }) {
        return Err(SandboxError::State {
            kind: "container",
            id: container.id.to_string(),
            state: container.state_name(),
            needed: "created or running",
        });
    }
    let boundary = sandbox.view().record.spec.boundary();
    let wanted = merge(&container.spec.resources, container_spec::resources(&linux, boundary)?)?;
    let order = serde_json::to_vec(&oci_spec::resources(&wanted, Vec::new()))
        .map_err(|error| SandboxError::step("write the limits", std::io::Error::other(error)))?;
    sandbox.shim().update_container(container.id.as_str(), order).await?;
    sandbox.save_resources(&container.id, wanted).await?;
    Ok(cri::UpdateContainerResourcesResponse {})
}

/// What is not given stays.
fn merge(old: &Resources, new: Resources) -> Result<Resources, SandboxError> {
    if new.oom_score_adj != 0 && new.oom_score_adj != old.oom_score_adj {
        let why = "a running process keeps the one it started with";
        return Err(SandboxError::unsupported("linux.oom_score_adj", why));
    }
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: String, old: &String| if new.is_empty() { old.clone() } else { new };
    let mut unified = old.unified.clone();
    unified.extend(new.unified);
    Ok(Resources {
        cpu_period: number(new.cpu_period, old.cpu_period),
        cpu_quota: number(new.cpu_quota, old.cpu_quota),
        cpu_shares: number(new.cpu_shares, old.cpu_shares),
        cpuset_cpus: text(new.cpuset_cpus, &old.cpuset_cpus),
        cpuset_mems: text(new.cpuset_mems, &old.cpuset_mems),
        memory_limit: number(new.memory_limit, old.memory_limit),
        memory_swap_limit: number(new.memory_swap_limit, old.memory_swap_limit),
        oom_score_adj: old.oom_score_adj,
        unified,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_stays() {
        let old = Resources { cpu_shares: 512, memory_limit: 1 << 30, ..Resources::default() };
        let new = Resources { cpu_quota: 50_000, memory_limit: 2 << 30, ..Resources::default() };
        let merged = merge(&old, new).unwrap();
        assert_eq!(
            (merged.cpu_shares, merged.cpu_quota, merged.memory_limit),
            (512, 50_000, 2 << 30)
        );
        let other = Resources { oom_score_adj: 7, ..Resources::default() };
        assert!(merge(&old, other).is_err());
    }
}
