//! What the metrics have beyond the stats: how CPU time and memory divide, and what a container's
//! processes hold open.
//!
//! Sources besides those of [`crate::stats`]: /proc/PID/{fd,limits}, and statvfs of the writable layer.

use crate::{
    cgroup::Cgroup,
    container::Container,
    stats::{number, table},
};
use a3s_box_api::agent::v1 as api;
use rustix::fd::{AsFd, AsRawFd};
use std::{collections::HashMap, fs, os::unix::fs::MetadataExt, path::Path};

/// Nanoseconds of a tick in which cgroup v1 counts user and system time.
const TICK_NS: u64 = 10_000_000;

/// The details of one container; what its kernel does not tell is 0.
pub fn of(container: &Container) -> api::ContainerDetails {
    let cgroup = &container.cgroup;
    let pids = cgroup.processes().unwrap_or_default();
    let (open_files, sockets) = open_files(&pids);
    let pids_file = |name: &str| match cgroup.v1("pids") {
        Some(folder) => folder.join(name),
        None => cgroup.file(name),
    };
    let memory = match cgroup.v1("memory") {
        Some(folder) => memory_v1(folder),
        None => memory_v2(cgroup),
    };
    api::ContainerDetails {
        oom_kills: cgroup.oom_kills(),
        threads: number(&pids_file("pids.current")),
        threads_limit: number(&pids_file("pids.max")),
        open_files,
        sockets,
        ulimits: ulimits(container),
        devices: devices(cgroup),
        file_system: file_system(container.writable()),
        ..cpu(cgroup, memory)
    }
}

fn cpu(cgroup: &Cgroup, rest: api::ContainerDetails) -> api::ContainerDetails {
    let v2 = table(&cgroup.file("cpu.stat")).unwrap_or_default();
    let (used, us) = match cgroup.v1("cpuacct") {
        Some(folder) => (table(&folder.join("cpuacct.stat")).unwrap_or_default(), None),
        None => (v2.clone(), Some(1000)),
    };
    let used = |v1: &str, v2: &str| match us {
        Some(us) => used.get(v2).copied().unwrap_or(0) * us,
        None => used.get(v1).copied().unwrap_or(0) * TICK_NS,
    };
    let (throttled, throttled_ns) = match cgroup.v1("cpu") {
        Some(folder) => {
            let v1 = table(&folder.join("cpu.stat")).unwrap_or_default();
            let ns = v1.get("throttled_time").copied().unwrap_or(0);
            (v1, ns)
        }
        None => {
            let ns = v2.get("throttled_usec").copied().unwrap_or(0) * 1000;
            (v2, ns)
        }
    };
    let periods = |key: &str| throttled.get(key).copied().unwrap_or(0);
    api::ContainerDetails {
        cpu_user_ns: used("user", "user_usec"),
        cpu_system_ns: used("system", "system_usec"),
        cfs_periods: periods("nr_periods"),
        cfs_throttled_periods: periods("nr_throttled"),
        cfs_throttled_ns: throttled_ns,
        ..rest
    }
}

fn memory_v2(cgroup: &Cgroup) -> api::ContainerDetails {
    let stat = table(&cgroup.file("memory.stat")).unwrap_or_default();
    let value = |key: &str| stat.get(key).copied().unwrap_or(0);
    let events = table(&cgroup.file("memory.events")).unwrap_or_default();
    api::ContainerDetails {
        cache_bytes: value("file"),
        kernel_bytes: value("kernel"),
        mapped_file_bytes: value("file_mapped"),
        active_file_bytes: value("active_file"),
        memory_peak_bytes: number(&cgroup.file("memory.peak")),
        memory_limit_hits: events.get("max").copied().unwrap_or(0),
        ..api::ContainerDetails::default()
    }
}

fn memory_v1(folder: &Path) -> api::ContainerDetails {
    let stat = table(&folder.join("memory.stat")).unwrap_or_default();
    let value = |key: &str| stat.get(key).copied().unwrap_or(0);
    let number = |file: &str| number(&folder.join(file));
    api::ContainerDetails {
        cache_bytes: value("total_cache"),
        kernel_bytes: number("memory.kmem.usage_in_bytes"),
        mapped_file_bytes: value("total_mapped_file"),
        active_file_bytes: value("total_active_file"),
        memory_peak_bytes: number("memory.max_usage_in_bytes"),
        memory_limit_hits: number("memory.failcnt"),
        ..api::ContainerDetails::default()
    }
}

/// Descriptors of these processes, and how many of them are sockets. One that ends meanwhile has none.
fn open_files(pids: &[i32]) -> (u64, u64) {
    let (mut files, mut sockets) = (0, 0);
    for pid in pids {
        let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in entries.flatten() {
            files += 1;
            let target = fs::read_link(entry.path());
            let is_socket = |name: &[u8]| name.starts_with(b"socket:[");
            sockets +=
                u64::from(target.is_ok_and(|path| is_socket(path.as_os_str().as_encoded_bytes())));
        }
    }
    (files, sockets)
}

fn ulimits(container: &Container) -> HashMap<String, u64> {
    let read = || {
        let info = format!("/proc/self/fdinfo/{}", container.init.as_fd().as_raw_fd());
        let info = fs::read_to_string(info).ok()?;
        let pid: u32 =
            info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
        fs::read_to_string(format!("/proc/{pid}/limits")).ok()
    };
    read().as_deref().map(read_ulimits).unwrap_or_default()
}

fn read_ulimits(text: &str) -> HashMap<String, u64> {
    let limit = |line: &str| {
        // The name holds single blanks; columns are at least two apart.
        let (name, rest) = line.split_once("  ")?;
        let soft = rest.split_whitespace().next()?.parse().ok()?;
        Some((name.to_lowercase().replace(' ', "_"), soft))
    };
    text.lines().skip(1).filter_map(limit).collect()
}

fn devices(cgroup: &Cgroup) -> Vec<api::DeviceIo> {
    let text = fs::read_to_string(cgroup.file("io.stat")).unwrap_or_default();
    text.lines().filter_map(read_device).collect()
}

fn read_device(line: &str) -> Option<api::DeviceIo> {
    let (numbers, rest) = line.split_once(' ')?;
    let (major, minor) = numbers.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    let fields: HashMap<_, _> = rest.split(' ').filter_map(|field| field.split_once('=')).collect();
    let value = |key: &str| fields.get(key).and_then(|value| value.parse().ok()).unwrap_or(0);
    Some(api::DeviceIo {
        device: device_name(major, minor),
        major,
        minor,
        read_bytes: value("rbytes"),
        written_bytes: value("wbytes"),
        reads: value("rios"),
        writes: value("wios"),
    })
}

/// `/dev/NAME`, or the numbers of what is no device node.
fn device_name(major: u32, minor: u32) -> String {
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"));
    let name = uevent.ok().and_then(|text| {
        text.lines()
            .find_map(|line| line.strip_prefix("DEVNAME=").map(|name| format!("/dev/{name}")))
    });
    name.unwrap_or_else(|| format!("{major}:{minor}"))
}

fn file_system(folder: &Path) -> Option<api::FileSystem> {
    let device = fs::metadata(folder).ok()?.dev();
    let stat = rustix::fs::statvfs(folder).ok()?;
    Some(api::FileSystem {
        device: device_name(rustix::fs::major(device), rustix::fs::minor(device)),
        bytes: stat.f_blocks * stat.f_frsize,
        inodes: stat.f_files,
        inodes_free: stat.f_favail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n\
                    Max open files            1024                 524288               files     \n";
        assert_eq!(read_ulimits(text), HashMap::from([("max_open_files".to_owned(), 1024)]));
        let io = read_device("7:99999 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0").unwrap();
        assert_eq!((io.device.as_str(), io.read_bytes, io.writes), ("7:99999", 10, 2));
        assert!(read_device("nonsense").is_none());
    }

    #[test]
    fn open_files_and_the_sockets_among_them_are_counted() {
        let pid = std::process::id() as i32;
        let (files, sockets) = open_files(&[pid, i32::MAX]);
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let (more, more_sockets) = open_files(&[pid]);
        assert!(files > 0 && more >= files + 2);
        assert!(more_sockets >= sockets + 2);
    }
}
