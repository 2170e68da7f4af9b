//! UpdatePodSandboxResources (KEP-1287): another size for a pod that runs. kubelet calls it before it
//! changes the limits of the pod's containers.

use crate::{
    node::Node,
    sandbox::{SandboxError, record::Record, resize::Resized, spec::Boundary},
    sandbox_spec::{host_limits, refuse_overhead, refuse_resources},
    vm_size::{MEMORY_MB, SizeRules, VCPUS, most_vcpus, vm_size},
};
use a3s_box_api::cri;
use a3s_box_types::shim::VmSize;
use std::{collections::BTreeMap, sync::Arc};

/// Gives the virtual machine and the pod's cgroup on the host the size that the request describes.
pub async fn update_pod_sandbox_resources(
    node: Arc<Node>,
    request: cri::UpdatePodSandboxResourcesRequest,
) -> Result<cri::UpdatePodSandboxResourcesResponse, SandboxError> {
    let sandbox = node.sandboxes.get(&request.pod_sandbox_id)?;
    let Some(resources) = &request.resources else {
        return Err(SandboxError::invalid("resources", "is missing"));
    };
    refuse_resources("resources", resources)?;
    if let Some(overhead) = &request.overhead {
        refuse_overhead("overhead", overhead)?;
    }
    let view = sandbox.view();
    let to = resized(&view.record, resources, request.overhead.as_ref(), &node.sizes)?;
    sandbox.resize(to).await?;
    Ok(cri::UpdatePodSandboxResourcesResponse {})
}

/// What the pod is to have; refuses what its machine cannot get.
fn resized(
    record: &Record,
    resources: &cri::LinuxContainerResources,
    overhead: Option<&cri::LinuxContainerResources>,
    rules: &SizeRules,
) -> Result<Resized, SandboxError> {
    let mut host_limits = host_limits(Some(resources), overhead);
    let score = record.spec.host_limits.oom_score_adj;
    if ![0, score].contains(&host_limits.oom_score_adj) {
        let why = "a running process keeps the one it started with";
        return Err(SandboxError::unsupported("resources.oom_score_adj", why));
    }
    host_limits.oom_score_adj = score;
    let size = match record.spec.boundary() {
        Boundary::Microvm => size(record, resources, overhead, rules)?,
        Boundary::Host => record.spec.size,
    };
    Ok(Resized {
        size,
        memory_limit: u64::try_from(resources.memory_limit_in_bytes).unwrap_or(0),
        host_limits,
    })
}

fn size(
    record: &Record,
    resources: &cri::LinuxContainerResources,
    overhead: Option<&cri::LinuxContainerResources>,
    rules: &SizeRules,
) -> Result<VmSize, SandboxError> {
    let start = record.spec.size;
    let needed = vm_size(Some(resources), overhead, &BTreeMap::new(), rules)?;
    let fixed = |key: &str| record.spec.annotations.contains_key(key);
    let most = if fixed(VCPUS) { start.vcpus } else { most_vcpus(start, rules.max.vcpus) };
    let vcpus = match resources.cpu_quota {
        ..=0 => record.size().vcpus,
        _ if needed.vcpus > most => {
            let why = format!(
                "needs {} processors, and the pod's virtual machine was started with {} and may have \
                 {most}{}",
                needed.vcpus,
                start.vcpus,
                if fixed(VCPUS) { ", as its annotation says" } else { "" },
            );
            return Err(SandboxError::unsupported("resources.cpu_quota", why));
        }
        _ => needed.vcpus.max(start.vcpus),
    };
    let memory_mb = match resources.memory_limit_in_bytes {
        0 => record.size().memory_mb,
        _ if fixed(MEMORY_MB) && needed.memory_mb > start.memory_mb => {
            let why = format!(
                "needs {} MiB, and annotations[{MEMORY_MB}] gives the pod's virtual machine {} MiB",
                needed.memory_mb, start.memory_mb
            );
            return Err(SandboxError::unsupported("resources.memory_limit_in_bytes", why));
        }
        _ => needed.memory_mb.max(start.memory_mb),
    };
    Ok(VmSize { vcpus, memory_mb })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::tests::view;

    const RULES: SizeRules = SizeRules {
        default: VmSize { vcpus: 1, memory_mb: 512 },
        min_memory_mb: 128,
        max: VmSize { vcpus: 4, memory_mb: 4096 },
        guest_overhead_mb: 64,
    };

    fn limits(memory_mb: i64, quota: i64) -> cri::LinuxContainerResources {
        cri::LinuxContainerResources {
            memory_limit_in_bytes: memory_mb << 20,
            cpu_quota: quota,
            cpu_period: 100_000,
            ..Default::default()
        }
    }

    fn memory_after(record: &Record, memory_mb: i64) -> u32 {
        resized(record, &limits(memory_mb, 0), None, &RULES).unwrap().size.memory_mb
    }

    #[test]
    fn the_machine_follows_the_pods_limit_but_never_below_what_it_started_with() {
        let mut record = view("a", []).record;
        record.spec.size = VmSize { vcpus: 1, memory_mb: 512 };
        let sizes = [0, 100, 448, 500, 1000, 100_000].map(|limit| memory_after(&record, limit));
        assert_eq!(sizes, [512, 512, 512, 768, 1536, 4096]);
        record.resized = Some(resized(&record, &limits(1000, 0), None, &RULES).unwrap());
        assert_eq!(memory_after(&record, 0), 1536, "no limit says nothing about the size");
        assert_eq!(memory_after(&record, 100), 512);
        assert_eq!(record.spec_in_force().size.memory_mb, 1536);
    }

    #[test]
    fn processors_follow_the_quota_and_what_cannot_be_added_is_refused_by_name() {
        let mut record = view("a", []).record;
        record.spec.size = VmSize { vcpus: 1, memory_mb: 512 };
        let rules = SizeRules { max: VmSize { vcpus: 16, memory_mb: 4096 }, ..RULES };
        let mut after = |quota| {
            let to = resized(&record, &limits(0, quota), None, &rules)?;
            assert_eq!(to.host_limits.cpu_quota.max(0), quota.max(0));
            record.resized = Some(to.clone());
            Ok::<_, SandboxError>(to.size.vcpus)
        };
        for (quota, vcpus) in [(50_000, 1), (150_000, 2), (-1, 2), (400_000, 4), (100_000, 1)] {
            assert_eq!(after(quota).unwrap(), vcpus, "{quota}");
        }
        let error = after(500_000).unwrap_err().to_string();
        assert!(error.contains("cpu_quota") && error.contains("may have 4"), "{error}");
        record.spec.annotations = [(VCPUS.to_owned(), "1".to_owned())].into();
        let error = resized(&record, &limits(0, 150_000), None, &rules).unwrap_err().to_string();
        assert!(error.contains("may have 1, as its annotation says"), "{error}");
    }

    #[test]
    fn another_score_than_that_of_the_running_processes_is_refused_by_name() {
        let mut record = view("a", []).record;
        record.spec.host_limits.oom_score_adj = 5;
        for (score, good) in [(0, true), (5, true), (6, false)] {
            let limits = cri::LinuxContainerResources { oom_score_adj: score, ..limits(0, 0) };
            let resized = resized(&record, &limits, None, &RULES);
            assert_eq!(resized.is_ok(), good, "{score}");
            let Err(error) = resized else { continue };
            assert!(error.to_string().contains("resources.oom_score_adj"), "{error}");
        }
    }

    #[test]
    fn an_annotation_is_not_outgrown() {
        let mut record = view("a", []).record;
        record.spec.size = VmSize { vcpus: 1, memory_mb: 700 };
        record.spec.annotations = [(MEMORY_MB.to_owned(), "700".to_owned())].into();
        assert_eq!(memory_after(&record, 400), 700);
        let error = resized(&record, &limits(800, 0), None, &RULES).unwrap_err().to_string();
        assert!(error.contains(MEMORY_MB), "{error}");
    }
}
