//! ListMetricDescriptors, ListPodSandboxMetrics and its stream: what kubelet's /metrics/cadvisor tells of
//! pods, by the names that it has from cAdvisor (KEP-2371).
//!
//! [`crate::metric_families`] is the one table: descriptors and values both come from it, so what is
//! announced is delivered, with as many labels. A pod's own series are what its boundary takes on the
//! host, the machine included; its containers' are what the pod's kernel counts.

use crate::{
    container_stats::number,
    metric_families::{BASE_LABELS, Family, OfContainer, OfPod, Value, families},
    node::Node,
    sandbox::{Sandbox, SandboxError, View, now},
    shim_client::Detail,
};
use a3s_box_api::cri;
use futures::future::join_all;
use std::sync::Arc;
use tracing::debug;

/// Every metric that is told of pods and containers.
pub async fn list_metric_descriptors(
    _: Arc<Node>,
    _: cri::ListMetricDescriptorsRequest,
) -> Result<cri::ListMetricDescriptorsResponse, SandboxError> {
    let descriptor = |family: &Family| cri::MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: family.label_keys().map(str::to_owned).collect(),
    };
    let descriptors = families().map(descriptor).collect();
    Ok(cri::ListMetricDescriptorsResponse { descriptors })
}

/// The metrics of all ready sandboxes. One that does not answer is left out.
pub async fn list_pod_sandbox_metrics(
    node: Arc<Node>,
    _: cri::ListPodSandboxMetricsRequest,
) -> Result<cri::ListPodSandboxMetricsResponse, SandboxError> {
    let sandboxes = node.sandboxes.all();
    let ready = sandboxes.iter().filter(|(_, view)| view.ready());
    let asked = ready.map(|(sandbox, view)| of_sandbox(sandbox, view));
    let pod_metrics = join_all(asked).await.into_iter().flatten().collect();
    Ok(cri::ListPodSandboxMetricsResponse { pod_metrics })
}

async fn of_sandbox(sandbox: &Sandbox, view: &View) -> Option<cri::PodSandboxMetrics> {
    match sandbox.shim().stats(Vec::new(), Detail::Full).await {
        Ok(stats) => Some(metrics(&OfPod { view, stats: &stats, now: now() })),
        Err(error) => {
            debug!(id = view.record.id.short(), %error, "no metrics of this sandbox");
            None
        }
    }
}

fn metrics(pod: &OfPod<'_>) -> cri::PodSandboxMetrics {
    let guest = pod.stats.guest.as_ref();
    let containers = guest.into_iter().flat_map(|guest| &guest.containers);
    let container_metrics = containers.filter_map(|stats| {
        let id = stats.container_id.parse().ok()?;
        let container = OfContainer { record: pod.view.containers.get(&id)?, stats, now: pod.now };
        let labels = container_labels(pod, &container);
        let values = |family: &Family| family.container.map(|read| read(&container));
        Some(cri::ContainerMetrics {
            container_id: stats.container_id.clone(),
            metrics: series(pod.now, &labels, values),
        })
    });
    cri::PodSandboxMetrics {
        pod_sandbox_id: pod.view.record.id.to_string(),
        metrics: series(pod.now, &pod_labels(pod), |family| family.pod.map(|read| read(pod))),
        container_metrics: container_metrics.collect(),
    }
}

fn series(
    timestamp: i64,
    base: &[String; BASE_LABELS.len()],
    values: impl Fn(&Family) -> Option<Vec<Value>>,
) -> Vec<cri::Metric> {
    let of_family = |family: &'static Family| {
        values(family).unwrap_or_default().into_iter().map(move |Value { labels, value }| {
            cri::Metric {
                name: family.name.to_owned(),
                timestamp,
                metric_type: family.kind.into(),
                label_values: base.iter().cloned().chain(labels).collect(),
                value: Some(number(value)),
            }
        })
    };
    families().flat_map(of_family).collect()
}

fn container_labels(pod: &OfPod<'_>, container: &OfContainer<'_>) -> [String; BASE_LABELS.len()] {
    let (name, record) = (&pod.view.record.spec.name, container.record);
    [
        record.spec.name.clone(),
        record.id.to_string(),
        record.image_name.clone(),
        record.id.to_string(),
        name.namespace.clone(),
        name.name.clone(),
    ]
}

/// As cAdvisor has them for a pod's cgroup: without a container.
fn pod_labels(pod: &OfPod<'_>) -> [String; BASE_LABELS.len()] {
    let (name, id) = (&pod.view.record.spec.name, pod.view.record.id.to_string());
    let nothing = String::new();
    [nothing.clone(), id.clone(), nothing, id, name.namespace.clone(), name.name.clone()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        container::{ContainerRecord, Phase, record::tests::record},
        sandbox::tests::view,
    };
    use a3s_box_api::{agent::v1 as agent, shim::v1 as shim};
    use std::collections::BTreeSet;

    fn stats(container: &ContainerRecord) -> shim::StatsResponse {
        let pressure = agent::Pressure {
            some: Some(agent::PressureLine { total_us: 5_000_000, ..Default::default() }),
            full: Some(agent::PressureLine { total_us: 3_000_000, ..Default::default() }),
        };
        let details = agent::ContainerDetails {
            cpu_user_ns: 2_000_000_000,
            ulimits: [("max_open_files".to_owned(), 1024)].into(),
            devices: vec![agent::DeviceIo { device: "/dev/sda".into(), ..Default::default() }],
            file_system: Some(agent::FileSystem {
                device: "/dev/sda".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let stats = agent::ContainerStats {
            container_id: container.id.to_string(),
            cpu_ns: 7_900_000_000,
            memory_bytes: 100,
            inactive_file_bytes: 30,
            cpu_pressure: Some(pressure),
            memory_pressure: Some(pressure),
            io_pressure: Some(pressure),
            details: Some(details),
            ..Default::default()
        };
        let interface =
            agent::InterfaceStats { name: "eth0".into(), rx_bytes: 9, ..Default::default() };
        shim::StatsResponse {
            guest: Some(agent::StatsResponse {
                containers: vec![stats],
                interfaces: vec![interface],
                ..Default::default()
            }),
            host_memory_bytes: 1000,
            ..Default::default()
        }
    }

    fn told() -> cri::PodSandboxMetrics {
        let container = record(Phase::Running { started_at: 3_000_000_000 });
        let stats = stats(&container);
        let mut view = view("web", []);
        view.containers.insert(container.id.clone(), Arc::new(container));
        metrics(&OfPod { view: &view, stats: &stats, now: 1 })
    }

    #[test]
    fn what_is_announced_is_delivered_with_the_announced_labels() {
        let told = told();
        let all: Vec<_> = told
            .metrics
            .iter()
            .chain(told.container_metrics.iter().flat_map(|one| &one.metrics))
            .collect();
        for family in families() {
            let series: Vec<_> = all.iter().filter(|metric| metric.name == family.name).collect();
            assert!(!series.is_empty(), "{} is announced and not delivered", family.name);
            for one in series {
                let announced = family.label_keys().count();
                assert_eq!(one.label_values.len(), announced, "labels of {}", family.name);
            }
        }
        let names: BTreeSet<_> = families().map(|family| family.name).collect();
        assert_eq!(names.len(), families().count(), "a name stands in the table twice");
        assert!(all.iter().all(|metric| names.contains(metric.name.as_str())));
    }

    #[test]
    fn values_are_in_the_units_of_their_names() {
        let told = told();
        let value = |list: &[cri::Metric], name: &str| {
            list.iter()
                .find(|metric| metric.name == name)
                .and_then(|one| one.value)
                .map(|v| v.value)
        };
        let container = &told.container_metrics[0].metrics;
        assert_eq!(value(container, "container_cpu_usage_seconds_total"), Some(7));
        assert_eq!(value(container, "container_cpu_user_seconds_total"), Some(2));
        assert_eq!(value(container, "container_memory_working_set_bytes"), Some(70));
        assert_eq!(value(container, "container_start_time_seconds"), Some(3));
        assert_eq!(value(container, "container_pressure_io_waiting_seconds_total"), Some(5));
        assert_eq!(value(&told.metrics, "container_network_receive_bytes_total"), Some(9));
        assert_eq!(value(&told.metrics, "container_memory_usage_bytes"), Some(1000));
        assert_eq!(value(&told.metrics, "a3s_box_overhead_memory_bytes"), Some(900));
    }
}
