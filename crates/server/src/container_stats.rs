//! ContainerStats and its lists: what containers use, as their guest's kernel counts it.

use crate::{
    container::{ContainerRecord, Phase},
    container_status::metadata,
    node::Node,
    sandbox::{Sandbox, SandboxError, View, now},
    sandbox_list::has_labels,
    shim_client::Detail,
};
use a3s_box_api::{agent::v1 as agent, cri};
use futures::future::join_all;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tracing::debug;

/// Rates over a shorter time say more about the moment of asking than about the load.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// Stats of one container; it must not have ended.
pub async fn container_stats(
    node: Arc<Node>,
    request: cri::ContainerStatsRequest,
) -> Result<cri::ContainerStatsResponse, SandboxError> {
    let (sandbox, container) = node.sandboxes.container(&request.container_id)?;
    let stats = sandbox.shim().stats(vec![container.id.to_string()], Detail::Plain).await?;
    let guest = stats.guest.unwrap_or_default();
    let stats = guest.containers.first().map(|stats| of(&node, &container, stats));
    Ok(cri::ContainerStatsResponse { stats: Some(stats.unwrap_or_else(|| nothing(&container))) })
}

/// Stats of all containers that fit the filter. Those of a sandbox that does not answer are left out.
pub async fn list_container_stats(
    node: Arc<Node>,
    request: cri::ListContainerStatsRequest,
) -> Result<cri::ListContainerStatsResponse, SandboxError> {
    let filter = request.filter.unwrap_or_default();
    let sandboxes = node.sandboxes.all();
    node.rates.keep_only(&sandboxes);
    let asked = sandboxes.into_iter().map(|(sandbox, view)| {
        let (node, filter) = (&node, &filter);
        async move { of_sandbox(node, &sandbox, &view, filter).await }
    });
    let stats = join_all(asked).await.into_iter().flatten().collect();
    Ok(cri::ListContainerStatsResponse { stats })
}

async fn of_sandbox(
    node: &Node,
    sandbox: &Sandbox,
    view: &View,
    filter: &cri::ContainerStatsFilter,
) -> Vec<cri::ContainerStats> {
    let fitting: Vec<_> = view.containers.values().filter(|one| fits(one, filter)).collect();
    if fitting.is_empty() || !view.ready() {
        return Vec::new();
    }
    let ids = fitting.iter().map(|container| container.id.to_string()).collect();
    match sandbox.shim().stats(ids, Detail::Plain).await {
        Ok(stats) => of_all(node, view, &stats.guest.unwrap_or_default().containers),
        Err(error) => {
            debug!(id = view.record.id.short(), %error, "no stats of this sandbox");
            Vec::new()
        }
    }
}

/// The containers of a sandbox whose stats came, each as CRI has it.
pub fn of_all(
    node: &Node,
    view: &View,
    stats: &[agent::ContainerStats],
) -> Vec<cri::ContainerStats> {
    let known = |stats: &agent::ContainerStats| {
        let container =
            view.containers.values().find(|one| one.id.as_str() == stats.container_id)?;
        Some(of(node, container, stats))
    };
    stats.iter().filter_map(known).collect()
}

/// Created or running: what has ended uses nothing any more.
fn fits(container: &ContainerRecord, filter: &cri::ContainerStatsFilter) -> bool {
    matches!(container.phase, Phase::Created | Phase::Running { .. })
        && container.id.as_str().starts_with(&filter.id)
        && container.sandbox_id.as_str().starts_with(&filter.pod_sandbox_id)
        && has_labels(&container.spec.labels, &filter.label_selector)
}

fn nothing(container: &ContainerRecord) -> cri::ContainerStats {
    cri::ContainerStats { attributes: Some(attributes(container)), ..Default::default() }
}

fn attributes(container: &ContainerRecord) -> cri::ContainerAttributes {
    cri::ContainerAttributes {
        id: container.id.to_string(),
        metadata: Some(metadata(container)),
        labels: container.spec.labels.clone().into_iter().collect(),
        annotations: container.spec.annotations.clone().into_iter().collect(),
    }
}

fn of(
    node: &Node,
    container: &ContainerRecord,
    stats: &agent::ContainerStats,
) -> cri::ContainerStats {
    let timestamp = now();
    let working_set = stats.memory_bytes.saturating_sub(stats.inactive_file_bytes);
    let left = |limit: u64, used: u64| (limit > 0).then(|| number(limit.saturating_sub(used)));
    cri::ContainerStats {
        attributes: Some(attributes(container)),
        cpu: Some(cri::CpuUsage {
            timestamp,
            usage_core_nano_seconds: Some(number(stats.cpu_ns)),
            usage_nano_cores: node.rates.sample(container.id.as_str(), stats.cpu_ns).map(number),
            psi: stats.cpu_pressure.map(pressure),
        }),
        memory: Some(cri::MemoryUsage {
            timestamp,
            working_set_bytes: Some(number(working_set)),
            available_bytes: left(stats.memory_limit_bytes, working_set),
            usage_bytes: Some(number(stats.memory_bytes)),
            rss_bytes: Some(number(stats.anonymous_bytes)),
            page_faults: Some(number(stats.page_faults)),
            major_page_faults: Some(number(stats.major_page_faults)),
            psi: stats.memory_pressure.map(pressure),
        }),
        writable_layer: Some(cri::FilesystemUsage {
            timestamp,
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: node.root.display().to_string() }),
            used_bytes: Some(number(stats.disk_bytes)),
            inodes_used: Some(number(stats.disk_inodes)),
        }),
        swap: Some(cri::SwapUsage {
            timestamp,
            swap_available_bytes: left(stats.swap_limit_bytes, stats.swap_bytes),
            swap_usage_bytes: Some(number(stats.swap_bytes)),
        }),
        io: Some(cri::IoUsage { timestamp, psi: stats.io_pressure.map(pressure) }),
    }
}

/// CRI's number that may be missing.
pub fn number(value: u64) -> cri::UInt64Value {
    cri::UInt64Value { value }
}

/// PSI as CRI has it.
pub fn pressure(pressure: agent::Pressure) -> cri::PsiStats {
    let line = |line: agent::PressureLine| cri::PsiData {
        total: line.total_us,
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    cri::PsiStats { full: pressure.full.map(line), some: pressure.some.map(line) }
}

/// CPU use per second, from one asking to the next.
#[derive(Debug, Default)]
pub struct Rates(Mutex<HashMap<String, Sample>>);

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Instant,
    cpu_ns: u64,
    nano_cores: Option<u64>,
}

impl Rates {
    /// Notes what `id` has used so far; its rate in billionths of a CPU once there is one.
    pub fn sample(&self, id: &str, cpu_ns: u64) -> Option<u64> {
        self.sample_at(id, cpu_ns, Instant::now())
    }

    fn sample_at(&self, id: &str, cpu_ns: u64, at: Instant) -> Option<u64> {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = samples.get(id).copied();
        let nano_cores = match last {
            Some(last) if at.duration_since(last.at) < RATE_WINDOW => return last.nano_cores,
            Some(last) => {
                let used = u128::from(cpu_ns.saturating_sub(last.cpu_ns));
                let rate = used * 1_000_000_000 / at.duration_since(last.at).as_nanos().max(1);
                u64::try_from(rate).ok()
            }
            None => None,
        };
        samples.insert(id.to_owned(), Sample { at, cpu_ns, nano_cores });
        nano_cores
    }

    /// Forgets all but these sandboxes and their containers.
    pub fn keep_only(&self, sandboxes: &[(Sandbox, Arc<View>)]) {
        let mut samples = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        samples.retain(|id, _| {
            sandboxes.iter().any(|(_, view)| {
                view.record.id.as_str() == id
                    || view.containers.keys().any(|container| container.as_str() == id)
            })
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_samples_and_some_time_between_them() {
        let (rates, start) = (Rates::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(rates.sample_at("a", 1_000, start), None);
        assert_eq!(rates.sample_at("a", 2_000, start + Duration::from_millis(10)), None);
        assert_eq!(rates.sample_at("a", 1_000_001_000, after(2)), Some(500_000_000));
        assert_eq!(rates.sample_at("a", 9, after(2)), Some(500_000_000));
        assert_eq!(rates.sample_at("b", 9, after(2)), None);
        rates.keep_only(&[]);
        assert_eq!(rates.sample_at("a", 1_000_001_000, after(4)), None);
    }
}
