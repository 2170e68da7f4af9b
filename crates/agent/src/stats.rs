//! What containers use, read from the kernel at the moment of asking.
//!
//! Sources: cgroup v2 (kernel documentation, admin-guide/cgroup-v2), PSI (accounting/psi), and
//! /proc/net/dev.

use crate::{
    agent::{Agent, blocking},
    cgroup::Cgroup,
    container::Container,
    error::{Error, Step},
};
use a3s_box_api::agent::v1 as api;
use std::{collections::HashMap, fs, io, os::unix::fs::MetadataExt, path::Path, sync::Arc};

const INTERFACES: &str = "/proc/net/dev";
/// Of the inode sizes in `stat`.
const BLOCK: u64 = 512;

/// Stats of the containers with these ids, or of all.
pub async fn read(
    agent: &Arc<Agent>,
    request: api::StatsRequest,
) -> Result<api::StatsResponse, Error> {
    let ids = if request.container_ids.is_empty() { agent.ids() } else { request.container_ids };
    let containers: Vec<_> = ids.iter().filter_map(|id| agent.container(id).ok()).collect();
    blocking(move || {
        let interfaces = fs::read_to_string(INTERFACES).step(INTERFACES)?;
        Ok(api::StatsResponse {
            containers: containers.iter().filter_map(|container| of(container)).collect(),
            interfaces: read_interfaces(&interfaces),
        })
    })
    .await
}

/// `None` when the container is just going.
fn of(container: &Container) -> Option<api::ContainerStats> {
    let cgroup = &container.cgroup;
    let cpu = table(cgroup, "cpu.stat")?;
    let memory = table(cgroup, "memory.stat").unwrap_or_default();
    let value = |table: &HashMap<String, u64>, key: &str| table.get(key).copied().unwrap_or(0);
    let mut disk = Disk::default();
    // What is removed while it is counted counts for nothing.
    disk.add(container.writable()).ok();
    Some(api::ContainerStats {
        container_id: container.id.clone(),
        cpu_ns: value(&cpu, "usage_usec") * 1000,
        memory_bytes: number(cgroup, "memory.current"),
        inactive_file_bytes: value(&memory, "inactive_file"),
        anonymous_bytes: value(&memory, "anon"),
        memory_limit_bytes: number(cgroup, "memory.max"),
        page_faults: value(&memory, "pgfault"),
        major_page_faults: value(&memory, "pgmajfault"),
        swap_bytes: number(cgroup, "memory.swap.current"),
        swap_limit_bytes: number(cgroup, "memory.swap.max"),
        processes: number(cgroup, "pids.current"),
        disk_bytes: disk.bytes,
        disk_inodes: disk.inodes,
        cpu_pressure: pressure(cgroup, "cpu.pressure"),
        memory_pressure: pressure(cgroup, "memory.pressure"),
        io_pressure: pressure(cgroup, "io.pressure"),
    })
}

/// A file of one number; 0 for `max` and for a file that is not there.
fn number(cgroup: &Cgroup, file: &str) -> u64 {
    fs::read_to_string(cgroup.file(file))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// A file of keys and numbers.
fn table(cgroup: &Cgroup, file: &str) -> Option<HashMap<String, u64>> {
    Some(read_table(&fs::read_to_string(cgroup.file(file)).ok()?))
}

fn read_table(text: &str) -> HashMap<String, u64> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

fn pressure(cgroup: &Cgroup, file: &str) -> Option<api::Pressure> {
    read_pressure(&fs::read_to_string(cgroup.file(file)).ok()?)
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
        // Receive bytes, packets, errors...; transmit the same, from the ninth.
        let &[rx_bytes, _, rx_errors, _, _, _, _, _, tx_bytes, _, tx_errors, ..] = &*numbers else {
            return None;
        };
        let name = name.trim().to_owned();
        (name != "lo").then_some(api::InterfaceStats {
            name,
            rx_bytes,
            rx_errors,
            tx_bytes,
            tx_errors,
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
        let text = "Inter-|   Receive\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 0 0 0 0 0 20 4 5 0 0 0 0 0\n";
        let eth0 = api::InterfaceStats {
            name: "eth0".into(),
            rx_bytes: 10,
            rx_errors: 3,
            tx_bytes: 20,
            tx_errors: 5,
        };
        assert_eq!(read_interfaces(text), [eth0]);
    }
}
