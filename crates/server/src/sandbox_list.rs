//! ListPodSandbox: every sandbox that fits all parts of the filter.

use crate::{
    node::Node,
    sandbox::{SandboxError, View},
};
use a3s_box_api::cri;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// Lists sandboxes, the newest first.
pub async fn list_pod_sandbox(
    node: Arc<Node>,
    request: cri::ListPodSandboxRequest,
) -> Result<cri::ListPodSandboxResponse, SandboxError> {
    let filter = request.filter.unwrap_or_default();
    let mut items: Vec<_> = node
        .sandboxes
        .all()
        .into_iter()
        .filter(|(_, view)| view.listed() && fits(view, &filter))
        .map(|(_, view)| item(&view))
        .collect();
    items.sort_by_key(|item| std::cmp::Reverse(item.created_at));
    Ok(cri::ListPodSandboxResponse { items })
}

/// READY or NOTREADY.
pub fn state(view: &View) -> cri::PodSandboxState {
    if view.ready() {
        cri::PodSandboxState::SandboxReady
    } else {
        cri::PodSandboxState::SandboxNotready
    }
}

/// The sandbox's name as CRI has it.
pub fn metadata(view: &View) -> cri::PodSandboxMetadata {
    let name = &view.record.spec.name;
    cri::PodSandboxMetadata {
        name: name.name.clone(),
        uid: name.uid.clone(),
        namespace: name.namespace.clone(),
        attempt: name.attempt,
    }
}

/// Whether every label that is asked for is there with its value.
pub fn has_labels(labels: &BTreeMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn fits(view: &View, filter: &cri::PodSandboxFilter) -> bool {
    let wanted = filter.state.as_ref().map(|value| value.state);
    view.record.id.as_str().starts_with(&filter.id)
        && wanted.is_none_or(|wanted| wanted == i32::from(state(view)))
        && has_labels(&view.record.spec.labels, &filter.label_selector)
}

fn item(view: &View) -> cri::PodSandbox {
    let spec = &view.record.spec;
    cri::PodSandbox {
        id: view.record.id.to_string(),
        metadata: Some(metadata(view)),
        state: state(view).into(),
        created_at: view.record.created_at,
        labels: spec.labels.clone().into_iter().collect(),
        annotations: spec.annotations.clone().into_iter().collect(),
        runtime_handler: spec.runtime_handler.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::tests::view;

    #[test]
    fn every_part_of_the_filter_has_to_fit() {
        let view = view("a", [("app", "web"), ("tier", "1")]);
        let id = view.record.id.to_string();
        let labels = |pairs: &[(&str, &str)]| {
            pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
        };
        let (ready, not_ready) = (Some(0), Some(1));
        let table = [
            ("", None, labels(&[]), true),
            (id.as_str(), None, labels(&[]), true),
            (&id[..10], ready, labels(&[("app", "web")]), true),
            ("ffff", None, labels(&[]), false),
            ("", not_ready, labels(&[]), false),
            ("", ready, labels(&[("app", "web"), ("tier", "1")]), true),
            ("", ready, labels(&[("app", "web"), ("tier", "2")]), false),
            ("", ready, labels(&[("other", "")]), false),
            (&id, not_ready, labels(&[("app", "web")]), false),
        ];
        for (id, state, label_selector, expected) in table {
            let state = state.map(|state| cri::PodSandboxStateValue { state });
            let filter = cri::PodSandboxFilter { id: id.into(), state, label_selector };
            assert_eq!(fits(&view, &filter), expected, "{filter:?}");
        }
    }
}
