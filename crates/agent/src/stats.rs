//! What containers use, read from the kernel at the moment of asking.
//!
//! Sources: cgroup v2 (kernel documentation, admin-guide/cgroup-v2) or, for controllers that the node
//! has there, cgroup v1 (admin-guide/cgroup-v1), PSI (accounting/psi), and /proc/PID/net/dev.

use crate::{
    agent::{Agent, blocking},
    cgroup::Cgroup,
    container::Container,
    details,
    error::{Error, Step},
};
use a3s_box_api::agent::v1 as api;
use a3s_box_sys::clone3::namespace;
use std::{collections::HashMap, fs, io, os::unix::fs::MetadataExt, path::Path, sync::Arc};

/// Above any limit of memory in a cgroup v1.
const UNLIMITED: u64 = 1 << 60;
/// Of the inode sizes in `stat`.
const BLOCK: u64 = 512;

/// Stats of the containers with these ids, or of all.
pub async fn read(
    agent: &Arc<Agent>,
    request: api::StatsRequest,
) -> Result<api::StatsResponse, Error> {
    let ids = if request.container_ids.is_empty() { agent.ids() } else { request.container_ids };
    let containers: Vec<_> = ids.iter().filter_map(|id| agent.container(id).ok()).collect();
    let own_network = agent.config.owns(namespace::NET);
    let pod = agent.user_namespace().map(|namespace| namespace.holder);
    let (detailed, all) = (request.detailed, agent.config.cgroups.clone());
    blocking(move || {
        // The node's traffic is not the pod's.
        let interfaces = if own_network {
            let process = pod.map_or_else(|| "self".to_owned(), |holder| holder.to_string());
            let file = format!("/proc/{process}/net/dev");
            fs::read_to_string(&file).step(file)?
        } else {
            String::new()
        };
        Ok(api::StatsResponse {
            containers: containers.iter().filter_map(|one| of(one, detailed)).collect(),
            interfaces: read_interfaces(&interfaces),
            cpu_pressure: pressure(&all.join("cpu.pressure")),
            memory_pressure: pressure(&all.join("memory.pressure")),
            io_pressure: pressure(&all.join("io.pressure")),
        })
    })
    .await
}

/// `None` when the container is just going.
fn of(container: &Container, detailed: bool) -> Option<api::ContainerStats> {
    let cgroup = &container.cgroup;
    let cpu_ns = match cgroup.v1("cpuacct") {
        Some(folder) => number(&folder.join("cpuacct.usage")),
        None => table(&cgroup.file("cpu.stat"))?.get("usage_usec").copied()? * 1000,
    };
    let memory = match cgroup.v1("memory") {
        Some(folder) => memory_v1(folder),
        None => memory_v2(cgroup),
    };
    let mut disk = Disk::default();
    // What is removed while it is counted counts for nothing.
    disk.add(container.writable()).ok();
    Some(api::ContainerStats {
        container_id: container.id.clone(),
        cpu_ns,
        processes: cgroup.processes().map_or(0, |pids| pids.len() as u64),
        disk_bytes: disk.bytes,
        disk_inodes: disk.inodes,
        cpu_pressure: pressure(&cgroup.file("cpu.pressure")),
        memory_pressure: pressure(&cgroup.file("memory.pressure")),
        io_pressure: pressure(&cgroup.file("io.pressure")),
        details: detailed.then(|| details::of(container)),
        ..memory
    })
}

fn memory_v2(cgroup: &Cgroup) -> api::ContainerStats {
    let table = table(&cgroup.file("memory.stat")).unwrap_or_default();
    let value = |key: &str| table.get(key).copied().unwrap_or(0);
    let number = |file: &str| number(&cgroup.file(file));
    api::ContainerStats {
        memory_bytes: number("memory.current"),
        inactive_file_bytes: value("inactive_file"),
        anonymous_bytes: value("anon"),
        memory_limit_bytes: number("memory.max"),
        page_faults: value("pgfault"),
        major_page_faults: value("pgmajfault"),
        swap_bytes: number("memory.swap.current"),
        swap_limit_bytes: number("memory.swap.max"),
        ..api::ContainerStats::default()
    }
}

/// `folder` is the container's in the memory controller's hierarchy (admin-guide/cgroup-v1/memory).
fn memory_v1(folder: &Path) -> api::ContainerStats {
    let table = table(&folder.join("memory.stat")).unwrap_or_default();
    let value = |key: &str| table.get(key).copied().unwrap_or(0);
    // What has no limit has the largest number of whole pages.
    let limit = |file: &str| Some(number(&folder.join(file))).filter(|limit| *limit < UNLIMITED);
    let memory_limit = limit("memory.limit_in_bytes").unwrap_or(0);
    let both = limit("memory.memsw.limit_in_bytes").unwrap_or(0);
    api::ContainerStats {
        memory_bytes: number(&folder.join("memory.usage_in_bytes")),
        inactive_file_bytes: value("total_inactive_file"),
        anonymous_bytes: value("total_rss"),
        memory_limit_bytes: memory_limit,
        page_faults: value("total_pgfault"),
        major_page_faults: value("total_pgmajfault"),
        swap_bytes: value("total_swap"),
        swap_limit_bytes: both.saturating_sub(memory_limit),
        ..api::ContainerStats::default()
    }
}

/// A file of one number; 0 for `max` and for a file that is not there.
pub fn number(file: &Path) -> u64 {
    fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// A file of keys and numbers.
pub fn table(file: &Path) -> Option<HashMap<String, u64>> {
    Some(read_table(&fs::read_to_string(file).ok()?))
}

fn read_table(text: &str) -> HashMap<String, u64> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

fn pressure(file: &Path) -> Option<api::Pressure> {
    read_pressure(&fs::read_to_string(file).ok()?)
}

fn read_pressure(text: &str) -> Option<api::Pressure> {
    let mut pressure = api::Pressure::default();
    for line in text.lines() {
        let (kind, rest) = line.split_once(' ')?;
        let fields: HashMap<_, _> =
            rest.split(' ').filter_map(|field| field.split_once('=')).collect();
        let share = |key: &str| fields.get(key).and_then(|value| value.parse().ok()).unwrap_or(0.0);
        let line = api::PressureLine {
            total_us: fields.get("total").and_then(|value| value.parse().ok()).unwrap_or(0),
            avg10: share("avg10"),
            avg60: share("avg60"),
            avg300: share("avg300"),
        };
        match kind {
            "some" => pressure.some = Some(line),
            "full" => pressure.full = Some(line),
            _ => {}
        }
    }
    Some(pressure)
}

fn read_interfaces(text: &str) -> Vec<api::InterfaceStats> {
    let interface = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|n| n.parse().ok()).collect();
        // Receive bytes, packets, errors, drops...; transmit the same, from the ninth.
        let &[
            rx_bytes,
            rx_packets,
            rx_errors,
            rx_dropped,
            _,
            _,
            _,
            _,
            tx_bytes,
            tx_packets,
            tx_errors,
            tx_dropped,
            ..,
        ] = &*numbers
        else {
            return None;
        };
        let name = name.trim().to_owned();
        (name != "lo").then_some(api::InterfaceStats {
            name,
            rx_bytes,
            rx_errors,
            tx_bytes,
            tx_errors,
            rx_packets,
            rx_dropped,
            tx_packets,
            tx_dropped,
        })
    };
    text.lines().filter_map(interface).collect()
}

#[derive(Default)]
struct Disk {
    bytes: u64,
    inodes: u64,
}

impl Disk {
    fn add(&mut self, folder: &Path) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let Ok(data) = entry.metadata() else { continue };
            self.bytes += data.blocks() * BLOCK;
            self.inodes += 1;
            if data.is_dir() {
                self.add(&entry.path()).ok();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        assert_eq!(read_table("usage_usec 7\nuser_usec 3\nnonsense\n")["usage_usec"], 7);
        let text = "some avg10=1.50 avg60=0.00 avg300=0.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.25 total=7\n";
        let pressure = read_pressure(text).unwrap();
        assert_eq!(pressure.some.unwrap().total_us, 42);
        assert_eq!(pressure.full.unwrap().avg300, 0.25);
        let text = "Inter-|   Receive\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 6 0 0 0 0 20 4 5 7 0 0 0 0\n";
        let eth0 = api::InterfaceStats {
            name: "eth0".into(),
            rx_bytes: 10,
            rx_errors: 3,
            tx_bytes: 20,
            tx_errors: 5,
            rx_packets: 2,
            rx_dropped: 6,
            tx_packets: 4,
            tx_dropped: 7,
        };
        assert_eq!(read_interfaces(text), [eth0]);
    }
}
