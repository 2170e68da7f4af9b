//! The filters of the lists in every combination, against what is known of each sandbox and container.

use crate::{
    container_flows::{container, create, node, pod, run, start, stop},
    container_list::list_containers,
    container_stats::list_container_stats,
    node::Node,
    sandbox::fakes::FakeHost,
    sandbox_list::list_pod_sandbox,
    sandbox_stats::list_pod_sandbox_stats,
    sandbox_stop::stop_pod_sandbox,
};
use a3s_box_api::cri;
use std::{collections::HashMap, sync::Arc};

type Labels = HashMap<String, String>;

/// A sandbox, or a container in one.
struct Known {
    id: String,
    sandbox: String,
    state: i32,
    labels: Labels,
}

/// A filter; an empty id and no state let all through.
struct Filter {
    id: String,
    sandbox: String,
    state: Option<i32>,
    labels: Labels,
}

const READY: i32 = cri::PodSandboxState::SandboxReady as i32;
const NOT_READY: i32 = cri::PodSandboxState::SandboxNotready as i32;
const CREATED: i32 = cri::ContainerState::ContainerCreated as i32;
const RUNNING: i32 = cri::ContainerState::ContainerRunning as i32;
const EXITED: i32 = cri::ContainerState::ContainerExited as i32;

fn labels(words: &[&str]) -> Labels {
    let pair = |word: &&str| {
        let (key, value) = word.split_once('=').unwrap();
        (key.to_owned(), value.to_owned())
    };
    words.iter().map(pair).collect()
}

/// A sandbox that is ready with a container in each state, and one that is stopped.
async fn things(node: &Arc<Node>, host: &FakeHost) -> (Vec<Known>, Vec<Known>) {
    let (mut sandboxes, mut containers) = (Vec::new(), Vec::new());
    for (name, words, state) in
        [("web", ["app=web", "tier=1"], READY), ("db", ["app=db", "tier=1"], NOT_READY)]
    {
        let mut config = pod(host.folder.path());
        config.metadata.as_mut().unwrap().name = name.to_owned();
        config.labels = labels(&words);
        let id = run(node, config).await.unwrap();
        for (name, words, state) in [
            ("created", ["app=web", "part=a"].as_slice(), CREATED),
            ("running", &["app=web", "part=b"], RUNNING),
            ("exited", &["app=db"], EXITED),
        ] {
            let mut config = container(name);
            config.labels = labels(words);
            let made = create(node, &id, config).await.unwrap();
            if state != CREATED {
                start(node, &made).await.unwrap();
            }
            if state == EXITED {
                stop(node, &made, 0).await.unwrap();
            }
            let (sandbox, labels) = (id.clone(), labels(words));
            containers.push(Known { id: made, sandbox, state, labels });
        }
        if state == NOT_READY {
            let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
            stop_pod_sandbox(node.clone(), request).await.unwrap();
            // With the sandbox its containers have ended, all of them.
            containers
                .iter_mut()
                .filter(|one| one.sandbox == id)
                .for_each(|one| one.state = EXITED);
        }
        sandboxes.push(Known { id: id.clone(), sandbox: id, state, labels: labels(&words) });
    }
    (sandboxes, containers)
}

/// Each value of each part with each of the others.
fn filters(sandboxes: &[Known], things: &[Known]) -> Vec<Filter> {
    let ids = |things: &[Known]| {
        let mut ids = vec![String::new(), "f".repeat(64)];
        for thing in things {
            ids.extend([thing.id.clone(), thing.id[..13].to_owned()]);
        }
        ids
    };
    let wanted: [&[&str]; 6] = [
        &[],
        &["app=web"],
        &["tier=1"],
        &["app=web", "part=b"],
        &["app=db", "tier=1"],
        &["app=web", "other=1"],
    ];
    let mut all = Vec::new();
    for id in ids(things) {
        for sandbox in ids(sandboxes) {
            for state in [None, Some(0), Some(1), Some(2)] {
                all.extend(wanted.map(|words| Filter {
                    id: id.clone(),
                    sandbox: sandbox.clone(),
                    state,
                    labels: labels(words),
                }));
            }
        }
    }
    all
}

/// The ids of those that fit, in order.
fn fitting<'a>(things: impl IntoIterator<Item = &'a Known>, filter: &Filter) -> Vec<String> {
    let fits = |thing: &&Known| {
        thing.id.starts_with(&filter.id)
            && thing.sandbox.starts_with(&filter.sandbox)
            && filter.state.is_none_or(|state| state == thing.state)
            && filter.labels.iter().all(|pair| thing.labels.iter().any(|label| label == pair))
    };
    sorted(things.into_iter().filter(fits).map(|thing| thing.id.clone()))
}

fn sorted(ids: impl Iterator<Item = String>) -> Vec<String> {
    let mut ids: Vec<_> = ids.collect();
    ids.sort_unstable();
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_containers_have_what_fits_every_part_of_the_filter() {
    let host = FakeHost::new();
    let node = node(&host);
    let (sandboxes, containers) = things(&node, &host).await;
    for filter in filters(&sandboxes, &containers) {
        let request = cri::ListContainersRequest {
            filter: Some(cri::ContainerFilter {
                id: filter.id.clone(),
                pod_sandbox_id: filter.sandbox.clone(),
                state: filter.state.map(|state| cri::ContainerStateValue { state }),
                label_selector: filter.labels.clone(),
            }),
        };
        let listed = list_containers(node.clone(), request).await.unwrap().containers;
        let listed = sorted(listed.into_iter().map(|one| one.id));
        assert_eq!(listed, fitting(&containers, &filter));
    }
    // Stats have no filter for the state: what has ended has none.
    let living: Vec<_> = containers.iter().filter(|one| one.state != EXITED).collect();
    let filters = filters(&sandboxes, &containers);
    for filter in filters.iter().filter(|filter| filter.state.is_none()) {
        let request = cri::ListContainerStatsRequest {
            filter: Some(cri::ContainerStatsFilter {
                id: filter.id.clone(),
                pod_sandbox_id: filter.sandbox.clone(),
                label_selector: filter.labels.clone(),
            }),
        };
        let listed = list_container_stats(node.clone(), request).await.unwrap().stats;
        let listed = sorted(listed.into_iter().map(|one| one.attributes.unwrap().id));
        assert_eq!(listed, fitting(living.iter().copied(), filter));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_sandboxes_have_what_fits_every_part_of_the_filter() {
    let host = FakeHost::new();
    let node = node(&host);
    let (sandboxes, _) = things(&node, &host).await;
    let ready: Vec<_> = sandboxes.iter().filter(|one| one.state == READY).collect();
    let filters = filters(&[], &sandboxes);
    for filter in filters.iter().filter(|filter| filter.sandbox.is_empty()) {
        let request = cri::ListPodSandboxRequest {
            filter: Some(cri::PodSandboxFilter {
                id: filter.id.clone(),
                state: filter.state.map(|state| cri::PodSandboxStateValue { state }),
                label_selector: filter.labels.clone(),
            }),
        };
        let listed = list_pod_sandbox(node.clone(), request).await.unwrap().items;
        assert_eq!(sorted(listed.into_iter().map(|one| one.id)), fitting(&sandboxes, filter));
        if filter.state.is_some() {
            continue;
        }
        let request = cri::ListPodSandboxStatsRequest {
            filter: Some(cri::PodSandboxStatsFilter {
                id: filter.id.clone(),
                label_selector: filter.labels.clone(),
            }),
        };
        let listed = list_pod_sandbox_stats(node.clone(), request).await.unwrap().stats;
        let listed = sorted(listed.into_iter().map(|one| one.attributes.unwrap().id));
        assert_eq!(listed, fitting(ready.iter().copied(), filter));
    }
}
