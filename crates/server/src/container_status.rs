//! ContainerStatus: the record as CRI has it.

use crate::{
    container::{
        ContainerRecord, Phase,
        spec::{ImageVolume, MountSpec, Propagation, Resources},
    },
    container_list::state,
    node::Node,
    sandbox::{SandboxError, View},
    stop_signal,
};
use a3s_box_api::cri;
use serde_json::json;
use std::{collections::HashMap, sync::Arc};

/// The status of one container; verbose with its OCI spec.
pub async fn container_status(
    node: Arc<Node>,
    request: cri::ContainerStatusRequest,
) -> Result<cri::ContainerStatusResponse, SandboxError> {
    let (_, container) = node.sandboxes.container(&request.container_id)?;
    if container.phase == Phase::Creating {
        return Err(SandboxError::no_container(&request.container_id));
    }
    let mut info = HashMap::new();
    if request.verbose {
        let text = json!({
            "sandboxID": container.sandbox_id,
            "pid": container.guest_pid,
            "removing": matches!(container.phase, Phase::Removing(_)),
            "config": container.spec,
            "runtimeSpec": container.oci_spec,
        });
        info.insert("info".to_owned(), text.to_string());
    }
    Ok(cri::ContainerStatusResponse { status: Some(status(&container)), info })
}

/// The statuses of a sandbox's containers.
pub fn all(view: &View) -> Vec<cri::ContainerStatus> {
    let made = view.containers.values().filter(|container| container.phase != Phase::Creating);
    made.map(|container| status(container)).collect()
}

/// The container's name as CRI has it.
pub fn metadata(container: &ContainerRecord) -> cri::ContainerMetadata {
    cri::ContainerMetadata { name: container.spec.name.clone(), attempt: container.spec.attempt }
}

/// The image, by a name that people know.
pub fn image_spec(container: &ContainerRecord) -> cri::ImageSpec {
    cri::ImageSpec {
        image: container.image_name.clone(),
        annotations: container.spec.image.annotations.clone().into_iter().collect(),
        user_specified_image: container.spec.image.user_specified.clone(),
        ..Default::default()
    }
}

fn status(container: &ContainerRecord) -> cri::ContainerStatus {
    let spec = &container.spec;
    let exit = container.exit().cloned().unwrap_or_default();
    cri::ContainerStatus {
        id: container.id.to_string(),
        metadata: Some(metadata(container)),
        state: state(container).into(),
        created_at: container.created_at,
        started_at: container.started_at(),
        finished_at: exit.finished_at,
        exit_code: exit.code,
        image: Some(image_spec(container)),
        image_ref: container.image_ref.clone(),
        reason: exit.reason,
        message: exit.message,
        labels: spec.labels.clone().into_iter().collect(),
        annotations: spec.annotations.clone().into_iter().collect(),
        mounts: spec.mounts.iter().map(mount).collect(),
        log_path: container.log_path.clone(),
        resources: Some(cri::ContainerResources {
            linux: Some(resources(&spec.resources)),
            windows: None,
        }),
        image_id: container.image_id.clone(),
        user: container.user.as_ref().map(|user| cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: i64::from(user.uid),
                gid: i64::from(user.gid),
                supplemental_groups: user.groups.iter().copied().map(i64::from).collect(),
            }),
        }),
        stop_signal: stop_signal::to_cri(container.stop_signal).into(),
    }
}

fn mount(mount: &MountSpec) -> cri::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => cri::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => cri::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => cri::MountPropagation::PropagationBidirectional,
    };
    cri::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        readonly: mount.readonly,
        recursive_read_only: mount.recursive_readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation.into(),
        image: mount.image.as_ref().map(image_volume),
        image_sub_path: mount.image.as_ref().map_or_else(String::new, |one| one.sub_path.clone()),
        mount_options: mount.options.clone(),
        ..Default::default()
    }
}

/// What was asked for, and the digest that PullImage answers with.
fn image_volume(image: &ImageVolume) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.name.image.clone(),
        annotations: image.name.annotations.clone().into_iter().collect(),
        user_specified_image: image.name.user_specified.clone(),
        image_ref: image.id.clone(),
        ..Default::default()
    }
}

fn resources(resources: &Resources) -> cri::LinuxContainerResources {
    cri::LinuxContainerResources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit_in_bytes: resources.memory_limit,
        memory_swap_limit_in_bytes: resources.memory_swap_limit,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources.huge_pages.iter().map(hugepage_limit).collect(),
        unified: resources.unified.clone().into_iter().collect(),
    }
}

fn hugepage_limit((size, limit): (&String, &u64)) -> cri::HugepageLimit {
    cri::HugepageLimit { page_size: size.clone(), limit: *limit }
}
