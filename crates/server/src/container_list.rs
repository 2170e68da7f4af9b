//! ListContainers: every container that fits all parts of the filter.

use crate::{
    container::{ContainerRecord, Phase},
    container_status::{image_spec, metadata},
    node::Node,
    sandbox::SandboxError,
    sandbox_list::has_labels,
};
use a3s_box_api::cri;
use std::sync::Arc;

/// Lists containers, the newest first.
pub async fn list_containers(
    node: Arc<Node>,
    request: cri::ListContainersRequest,
) -> Result<cri::ListContainersResponse, SandboxError> {
    let filter = request.filter.unwrap_or_default();
    let mut containers: Vec<_> = node
        .sandboxes
        .all()
        .into_iter()
        .flat_map(|(_, view)| view.containers.values().cloned().collect::<Vec<_>>())
        .filter(|container| container.phase != Phase::Creating && fits(container, &filter))
        .map(|container| item(&container))
        .collect();
    containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    Ok(cri::ListContainersResponse { containers })
}

/// CRI's state of a container.
pub fn state(container: &ContainerRecord) -> cri::ContainerState {
    match container.phase {
        Phase::Creating | Phase::Created => cri::ContainerState::ContainerCreated,
        Phase::Running { .. } => cri::ContainerState::ContainerRunning,
        Phase::Exited(_) | Phase::Removing(_) => cri::ContainerState::ContainerExited,
    }
}

fn fits(container: &ContainerRecord, filter: &cri::ContainerFilter) -> bool {
    let wanted = filter.state.as_ref().map(|value| value.state);
    container.id.as_str().starts_with(&filter.id)
        && container.sandbox_id.as_str().starts_with(&filter.pod_sandbox_id)
        && wanted.is_none_or(|wanted| wanted == i32::from(state(container)))
        && has_labels(&container.spec.labels, &filter.label_selector)
}

fn item(container: &ContainerRecord) -> cri::Container {
    cri::Container {
        id: container.id.to_string(),
        pod_sandbox_id: container.sandbox_id.to_string(),
        metadata: Some(metadata(container)),
        image: Some(image_spec(container)),
        image_ref: container.image_ref.clone(),
        state: state(container).into(),
        created_at: container.created_at,
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
        image_id: container.image_id.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::record::{Exit, tests::record};

    #[test]
    fn every_part_of_the_filter_has_to_fit() {
        let mut container = record(Phase::Running { started_at: 1 });
        container.spec.labels = [("app".to_owned(), "web".to_owned())].into();
        let (id, sandbox) = (container.id.to_string(), container.sandbox_id.to_string());
        for bits in 0..16_u8 {
            let part = |bit: u8| bits & (1 << bit) != 0;
            let matching = cri::ContainerFilter {
                id: if part(0) { id[..12].to_owned() } else { String::new() },
                pod_sandbox_id: if part(1) { sandbox.clone() } else { String::new() },
                state: part(2).then_some(cri::ContainerStateValue { state: 1 }),
                label_selector: part(3)
                    .then(|| ("app".to_owned(), "web".to_owned()))
                    .into_iter()
                    .collect(),
            };
            assert!(fits(&container, &matching), "{matching:?}");
            let others = [
                cri::ContainerFilter { id: "f".repeat(64), ..matching.clone() },
                cri::ContainerFilter { pod_sandbox_id: "f".into(), ..matching.clone() },
                cri::ContainerFilter {
                    state: Some(cri::ContainerStateValue { state: 2 }),
                    ..matching.clone()
                },
                cri::ContainerFilter {
                    label_selector: [("app".to_owned(), "db".to_owned())].into(),
                    ..matching.clone()
                },
            ];
            for other in others {
                assert!(!fits(&container, &other), "{other:?}");
            }
        }
    }

    #[test]
    fn a_container_under_removal_has_exited() {
        assert_eq!(state(&record(Phase::Removing(Exit::default()))) as i32, 2);
        assert_eq!(state(&record(Phase::Created)) as i32, 0);
    }
}
