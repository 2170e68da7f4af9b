//! UpdateContainerResources: other limits for a container that is there.

use crate::{
    container::{Phase, spec::Resources},
    container_spec,
    node::Node,
    oci_spec,
    sandbox::{SandboxError, spec::Boundary},
};
use a3s_box_api::cri;
use a3s_box_types::shim::VmSize;
use std::sync::Arc;

/// Puts the limits that are given in force and saves them. The virtual machine keeps its size:
/// UpdatePodSandboxResources, which kubelet calls first, changes that.
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
    let record = &sandbox.view().record;
    let boundary = record.spec.boundary();
    if boundary == Boundary::Microvm {
        fits(&linux, record.size(), node.sizes.max)?;
    }
    let wanted =
        merge(&container.spec.resources, container_spec::resources("linux", &linux, boundary)?)?;
    let order = serde_json::to_vec(&oci_spec::resources(&wanted, Vec::new(), boundary))
        .map_err(|error| SandboxError::step("write the limits", std::io::Error::other(error)))?;
    sandbox.shim().update_container(container.id.as_str(), order).await?;
    sandbox.save_resources(&container.id, wanted).await?;
    Ok(cri::UpdateContainerResourcesResponse {})
}

/// Refuses memory that the pod's machine does not have, but could.
fn fits(
    linux: &cri::LinuxContainerResources,
    machine: VmSize,
    largest: VmSize,
) -> Result<(), SandboxError> {
    let wanted = linux.memory_limit_in_bytes;
    if machine.memory_mb >= largest.memory_mb || wanted <= i64::from(machine.memory_mb) << 20 {
        return Ok(());
    }
    let why = format!(
        "{wanted} bytes do not fit into the pod's virtual machine of {} MiB; \
         UpdatePodSandboxResources makes it larger",
        machine.memory_mb
    );
    Err(SandboxError::invalid("linux.memory_limit_in_bytes", why))
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
    let mut huge_pages = old.huge_pages.clone();
    huge_pages.extend(new.huge_pages);
    Ok(Resources {
        cpu_period: number(new.cpu_period, old.cpu_period),
        cpu_quota: number(new.cpu_quota, old.cpu_quota),
        cpu_shares: number(new.cpu_shares, old.cpu_shares),
        cpuset_cpus: text(new.cpuset_cpus, &old.cpuset_cpus),
        cpuset_mems: text(new.cpuset_mems, &old.cpuset_mems),
        memory_limit: number(new.memory_limit, old.memory_limit),
        memory_swap_limit: number(new.memory_swap_limit, old.memory_swap_limit),
        oom_score_adj: old.oom_score_adj,
        huge_pages,
        unified,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_the_machine_does_not_have_is_refused_by_name() {
        let size = |memory_mb| VmSize { vcpus: 1, memory_mb };
        let asked = |bytes| cri::LinuxContainerResources {
            memory_limit_in_bytes: bytes,
            ..Default::default()
        };
        assert!(fits(&asked(512 << 20), size(512), size(4096)).is_ok());
        let error = fits(&asked(600 << 20), size(512), size(4096)).unwrap_err().to_string();
        assert!(error.contains("memory_limit_in_bytes") && error.contains("512 MiB"), "{error}");
        let most = fits(&asked(9000 << 20), size(4096), size(4096));
        assert!(most.is_ok(), "Kubernetes' limits may be larger than the node");
    }

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
