//! PodSandboxStats and its lists: what a pod takes of the node.
//!
//! CPU and memory are the boundary's on the host, so they hold the guest's kernel and the machine around
//! it, and the containers' own stand below them. Memory counts shared pages in proportion: pods of one
//! template share most of what they have not written to. Pressure is what the pod's processes feel, so it
//! is their own kernel's. No limit stands on the pod's memory on the host, so none is available.

use crate::{
    container_stats::{number, of_all, pressure},
    node::Node,
    sandbox::{Sandbox, SandboxError, View, now},
    sandbox_list::{has_labels, metadata},
    shim_client::Detail,
};
use a3s_box_api::{agent::v1 as agent, cri, shim::v1 as shim};
use futures::future::join_all;
use std::sync::Arc;
use tracing::debug;

/// Stats of one sandbox.
pub async fn pod_sandbox_stats(
    node: Arc<Node>,
    request: cri::PodSandboxStatsRequest,
) -> Result<cri::PodSandboxStatsResponse, SandboxError> {
    let sandbox = node.sandboxes.get(&request.pod_sandbox_id)?;
    let view = sandbox.view();
    let stats = sandbox.shim().stats(Vec::new(), Detail::Plain).await?;
    Ok(cri::PodSandboxStatsResponse { stats: Some(of(&node, &view, stats)) })
}

/// Stats of all ready sandboxes that fit the filter. One that does not answer is left out.
pub async fn list_pod_sandbox_stats(
    node: Arc<Node>,
    request: cri::ListPodSandboxStatsRequest,
) -> Result<cri::ListPodSandboxStatsResponse, SandboxError> {
    let filter = request.filter.unwrap_or_default();
    let sandboxes = node.sandboxes.all();
    node.rates.keep_only(&sandboxes);
    let asked = sandboxes
        .iter()
        .filter(|(_, view)| view.ready() && fits(view, &filter))
        .map(|(sandbox, view)| one(&node, sandbox, view));
    let stats = join_all(asked).await.into_iter().flatten().collect();
    Ok(cri::ListPodSandboxStatsResponse { stats })
}

async fn one(node: &Node, sandbox: &Sandbox, view: &View) -> Option<cri::PodSandboxStats> {
    match sandbox.shim().stats(Vec::new(), Detail::Plain).await {
        Ok(stats) => Some(of(node, view, stats)),
        Err(error) => {
            debug!(id = view.record.id.short(), %error, "no stats of this sandbox");
            None
        }
    }
}

fn fits(view: &View, filter: &cri::PodSandboxStatsFilter) -> bool {
    view.record.id.as_str().starts_with(&filter.id)
        && has_labels(&view.record.spec.labels, &filter.label_selector)
}

fn of(node: &Node, view: &View, stats: shim::StatsResponse) -> cri::PodSandboxStats {
    let (record, timestamp) = (&view.record, now());
    let guest = stats.guest.unwrap_or_default();
    let processes = guest.containers.iter().map(|container| container.processes).sum();
    let linux = cri::LinuxPodSandboxStats {
        cpu: Some(cri::CpuUsage {
            timestamp,
            usage_core_nano_seconds: Some(number(stats.host_cpu_ns)),
            usage_nano_cores: node.rates.sample(record.id.as_str(), stats.host_cpu_ns).map(number),
            psi: guest.cpu_pressure.map(pressure),
        }),
        memory: Some(cri::MemoryUsage {
            timestamp,
            working_set_bytes: Some(number(stats.host_memory_bytes)),
            usage_bytes: Some(number(stats.host_memory_bytes)),
            rss_bytes: Some(number(stats.host_memory_bytes)),
            available_bytes: None,
            page_faults: Some(number(stats.host_page_faults)),
            major_page_faults: Some(number(stats.host_major_page_faults)),
            psi: guest.memory_pressure.map(pressure),
        }),
        network: Some(network(&guest.interfaces, timestamp)),
        process: Some(cri::ProcessUsage { timestamp, process_count: Some(number(processes)) }),
        containers: of_all(node, view, &guest.containers),
        io: Some(cri::IoUsage { timestamp, psi: guest.io_pressure.map(pressure) }),
    };
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: record.id.to_string(),
            metadata: Some(metadata(view)),
            labels: record.spec.labels.clone().into_iter().collect(),
            annotations: record.spec.annotations.clone().into_iter().collect(),
        }),
        linux: Some(linux),
        windows: None,
    }
}

/// The first card is the pod's own; what else there is follows.
fn network(interfaces: &[agent::InterfaceStats], timestamp: i64) -> cri::NetworkUsage {
    let mut usages = interfaces.iter().map(|interface| cri::NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: Some(number(interface.rx_bytes)),
        rx_errors: Some(number(interface.rx_errors)),
        tx_bytes: Some(number(interface.tx_bytes)),
        tx_errors: Some(number(interface.tx_errors)),
    });
    cri::NetworkUsage { timestamp, default_interface: usages.next(), interfaces: usages.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_card_is_the_pods_own() {
        let named = |name: &str| agent::InterfaceStats { name: name.into(), ..Default::default() };
        let usage = network(&[named("eth0"), named("net1")], 1);
        assert_eq!(usage.default_interface.unwrap().name, "eth0");
        assert_eq!(usage.interfaces.len(), 1);
        assert!(network(&[], 1).default_interface.is_none());
    }
}
