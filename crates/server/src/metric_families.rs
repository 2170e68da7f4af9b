//! The table of pods' metrics: name, help, labels, and how each value is read.
//!
//! Names and labels are cAdvisor's, as kubelet's /metrics/cadvisor has always had them; values are whole
//! numbers, so seconds are whole seconds. Huge pages are not in it, because pods have none.

use crate::{container::ContainerRecord, sandbox::View};
use a3s_box_api::{
    agent::v1 as agent,
    cri::MetricType::{self, Counter, Gauge},
    shim::v1 as shim,
};

/// The labels that every series has, before its own.
pub const BASE_LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

/// A container and what its kernel counts of it.
pub struct OfContainer<'a> {
    /// What it was made with.
    pub record: &'a ContainerRecord,
    /// With details.
    pub stats: &'a agent::ContainerStats,
    /// Unix nanoseconds.
    pub now: i64,
}

/// A pod and what it takes of the node.
pub struct OfPod<'a> {
    /// What it was made with.
    pub view: &'a View,
    /// The guest's and the host's.
    pub stats: &'a shim::StatsResponse,
    /// Unix nanoseconds.
    pub now: i64,
}

/// One series' value.
pub struct Value {
    /// Of the family's own labels.
    pub labels: Vec<String>,
    /// In the unit of the family's name.
    pub value: u64,
}

/// One metric.
pub struct Family {
    /// As Prometheus shows it.
    pub name: &'static str,
    /// In one line.
    pub help: &'static str,
    /// Whether it only grows.
    pub kind: MetricType,
    /// Keys of its own, after [`BASE_LABELS`].
    pub labels: &'static [&'static str],
    /// A container's series, when containers have it.
    pub container: Option<fn(&OfContainer<'_>) -> Vec<Value>>,
    /// A pod's own series, when pods have it.
    pub pod: Option<fn(&OfPod<'_>) -> Vec<Value>>,
}

impl Family {
    /// All of its label keys.
    pub fn label_keys(&self) -> impl Iterator<Item = &'static str> {
        BASE_LABELS.into_iter().chain(self.labels.iter().copied())
    }
}

/// All metrics.
pub fn families() -> impl Iterator<Item = &'static Family> {
    [CPU, MEMORY, NETWORK, DISK, PROCESSES, PRESSURE, SPEC, OTHER].into_iter().flatten()
}

const NANOS: u64 = 1_000_000_000;
const MICROS: u64 = 1_000_000;

fn one(value: u64) -> Vec<Value> {
    vec![Value { labels: Vec::new(), value }]
}

fn labelled<const N: usize>(labels: [&str; N], value: u64) -> Value {
    Value { labels: labels.map(str::to_owned).into(), value }
}

/// A number of CRI's, where a negative one stands for none.
fn limit(value: i64) -> Vec<Value> {
    one(u64::try_from(value).unwrap_or(0))
}

impl OfContainer<'_> {
    fn details(&self) -> agent::ContainerDetails {
        self.stats.details.clone().unwrap_or_default()
    }

    fn working_set(&self) -> u64 {
        self.stats.memory_bytes.saturating_sub(self.stats.inactive_file_bytes)
    }

    fn devices(&self, value: fn(&agent::DeviceIo) -> u64) -> Vec<Value> {
        let io = self.details().devices;
        io.iter().map(|one| labelled([&one.device], value(one))).collect()
    }

    fn file_system(&self, value: impl Fn(&agent::FileSystem) -> u64) -> Vec<Value> {
        let file_system = self.details().file_system;
        file_system.iter().map(|one| labelled([&one.device], value(one))).collect()
    }

    fn unified(&self, file: &str) -> u64 {
        let value = self.record.spec.resources.unified.get(file);
        value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
    }
}

impl OfPod<'_> {
    fn interfaces(&self, value: fn(&agent::InterfaceStats) -> u64) -> Vec<Value> {
        let guest = self.stats.guest.iter().flat_map(|guest| &guest.interfaces);
        guest.map(|one| labelled([&one.name], value(one))).collect()
    }

    fn containers(&self, value: fn(&agent::ContainerStats) -> u64) -> u64 {
        self.stats.guest.iter().flat_map(|guest| &guest.containers).map(value).sum()
    }
}

fn stalled(pressure: Option<agent::Pressure>) -> Vec<Value> {
    let full = pressure.map(|pressure| pressure.full.unwrap_or_default());
    full.map(|line| one(line.total_us / MICROS)).unwrap_or_default()
}

fn waiting(pressure: Option<agent::Pressure>) -> Vec<Value> {
    let some = pressure.map(|pressure| pressure.some.unwrap_or_default());
    some.map(|line| one(line.total_us / MICROS)).unwrap_or_default()
}

/// A family of containers alone, without labels of its own.
const fn container(
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    read: fn(&OfContainer<'_>) -> Vec<Value>,
) -> Family {
    Family { name, help, kind, labels: &[], container: Some(read), pod: None }
}

/// A family of pods alone, by interface.
const fn network(
    name: &'static str,
    help: &'static str,
    read: fn(&OfPod<'_>) -> Vec<Value>,
) -> Family {
    Family { name, help, kind: Counter, labels: &["interface"], container: None, pod: Some(read) }
}

/// A family of containers, by block device.
const fn device(
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    read: fn(&OfContainer<'_>) -> Vec<Value>,
) -> Family {
    Family { name, help, kind, labels: &["device"], container: Some(read), pod: None }
}

const CPU: &[Family] = &[
    Family {
        pod: Some(|pod| one(pod.stats.host_cpu_ns / NANOS)),
        ..container(
            "container_cpu_usage_seconds_total",
            "CPU time used; the pod's own is all that its boundary used on the host",
            Counter,
            |one_of| one(one_of.stats.cpu_ns / NANOS),
        )
    },
    container("container_cpu_user_seconds_total", "CPU time used in programs", Counter, |c| {
        one(c.details().cpu_user_ns / NANOS)
    }),
    container("container_cpu_system_seconds_total", "CPU time used in the kernel", Counter, |c| {
        one(c.details().cpu_system_ns / NANOS)
    }),
    container("container_cpu_cfs_periods_total", "Periods of the CPU quota", Counter, |c| {
        one(c.details().cfs_periods)
    }),
    container(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which the CPU quota was used up",
        Counter,
        |c| one(c.details().cfs_throttled_periods),
    ),
    container(
        "container_cpu_cfs_throttled_seconds_total",
        "Time that runnable processes waited for a new period of the CPU quota",
        Counter,
        |c| one(c.details().cfs_throttled_ns / NANOS),
    ),
];

const MEMORY: &[Family] = &[
    Family {
        pod: Some(|pod| one(pod.stats.host_memory_bytes)),
        ..container(
            "container_memory_usage_bytes",
            "Memory in use, page cache included; the pod's own is what its boundary has on the host",
            Gauge,
            |c| one(c.stats.memory_bytes),
        )
    },
    Family {
        pod: Some(|pod| one(pod.stats.host_memory_bytes)),
        ..container(
            "container_memory_working_set_bytes",
            "Memory in use without page cache that was not used lately",
            Gauge,
            |c| one(c.working_set()),
        )
    },
    Family {
        pod: Some(|pod| one(pod.stats.host_memory_bytes)),
        ..container("container_memory_rss", "Memory without a file behind it", Gauge, |c| {
            one(c.stats.anonymous_bytes)
        })
    },
    container("container_memory_cache", "Page cache, in bytes", Gauge, |c| {
        one(c.details().cache_bytes)
    }),
    container(
        "container_memory_kernel_usage",
        "Memory of the kernel's own, in bytes",
        Gauge,
        |c| one(c.details().kernel_bytes),
    ),
    container("container_memory_mapped_file", "Memory of mapped files, in bytes", Gauge, |c| {
        one(c.details().mapped_file_bytes)
    }),
    container("container_memory_swap", "Swap in use, in bytes", Gauge, |c| one(c.stats.swap_bytes)),
    container("container_memory_failcnt", "How often memory was at its limit", Counter, |c| {
        one(c.details().memory_limit_hits)
    }),
    container("container_memory_max_usage_bytes", "The most memory that was in use", Gauge, |c| {
        one(c.details().memory_peak_bytes)
    }),
    container(
        "container_memory_total_active_file_bytes",
        "Page cache that was used lately, in bytes",
        Gauge,
        |c| one(c.details().active_file_bytes),
    ),
    container(
        "container_memory_total_inactive_file_bytes",
        "Page cache that was not used lately, in bytes",
        Gauge,
        |c| one(c.stats.inactive_file_bytes),
    ),
    Family {
        labels: &["failure_type", "scope"],
        pod: Some(|pod| {
            let stats = pod.stats;
            vec![
                labelled(["pgfault", "container"], stats.host_page_faults),
                labelled(["pgmajfault", "container"], stats.host_major_page_faults),
            ]
        }),
        ..container("container_memory_failures_total", "Page faults", Counter, |c| {
            let (all, major) = (c.stats.page_faults, c.stats.major_page_faults);
            vec![
                labelled(["pgfault", "container"], all),
                labelled(["pgmajfault", "container"], major),
                labelled(["pgfault", "hierarchy"], all),
                labelled(["pgmajfault", "hierarchy"], major),
            ]
        })
    },
    container("container_oom_events_total", "Processes killed for want of memory", Counter, |c| {
        one(c.details().oom_kills)
    }),
    Family {
        container: None,
        pod: Some(|pod| {
            let containers = pod.containers(|stats| stats.memory_bytes);
            one(pod.stats.host_memory_bytes.saturating_sub(containers))
        }),
        ..container(
            "a3s_box_overhead_memory_bytes",
            "Memory of the pod's boundary on the host beyond what its containers use: machine, guest \
             kernel, shim",
            Gauge,
            |_| Vec::new(),
        )
    },
];

const NETWORK: &[Family] = &[
    network("container_network_receive_bytes_total", "Bytes received", |pod| {
        pod.interfaces(|one| one.rx_bytes)
    }),
    network("container_network_receive_packets_total", "Packets received", |pod| {
        pod.interfaces(|one| one.rx_packets)
    }),
    network(
        "container_network_receive_packets_dropped_total",
        "Packets dropped while receiving",
        |pod| pod.interfaces(|one| one.rx_dropped),
    ),
    network("container_network_receive_errors_total", "Errors while receiving", |pod| {
        pod.interfaces(|one| one.rx_errors)
    }),
    network("container_network_transmit_bytes_total", "Bytes sent", |pod| {
        pod.interfaces(|one| one.tx_bytes)
    }),
    network("container_network_transmit_packets_total", "Packets sent", |pod| {
        pod.interfaces(|one| one.tx_packets)
    }),
    network(
        "container_network_transmit_packets_dropped_total",
        "Packets dropped while sending",
        |pod| pod.interfaces(|one| one.tx_dropped),
    ),
    network("container_network_transmit_errors_total", "Errors while sending", |pod| {
        pod.interfaces(|one| one.tx_errors)
    }),
];

const DISK: &[Family] = &[
    device("container_fs_usage_bytes", "What the writable layer takes up", Gauge, |c| {
        c.file_system(|_| c.stats.disk_bytes)
    }),
    device(
        "container_fs_limit_bytes",
        "Size of the file system of the writable layer",
        Gauge,
        |c| c.file_system(|one| one.bytes),
    ),
    device(
        "container_fs_inodes_total",
        "Inodes of the file system of the writable layer",
        Gauge,
        |c| c.file_system(|one| one.inodes),
    ),
    device(
        "container_fs_inodes_free",
        "Free inodes of the file system of the writable layer",
        Gauge,
        |c| c.file_system(|one| one.inodes_free),
    ),
    device("container_fs_reads_bytes_total", "Bytes read from the device", Counter, |c| {
        c.devices(|one| one.read_bytes)
    }),
    device("container_fs_reads_total", "Reads from the device", Counter, |c| {
        c.devices(|one| one.reads)
    }),
    device("container_fs_writes_bytes_total", "Bytes written to the device", Counter, |c| {
        c.devices(|one| one.written_bytes)
    }),
    device("container_fs_writes_total", "Writes to the device", Counter, |c| {
        c.devices(|one| one.writes)
    }),
    Family {
        labels: &["device", "major", "minor", "operation"],
        ..container(
            "container_blkio_device_usage_total",
            "Bytes to and from the device, by operation",
            Counter,
            |c| {
                let by_operation = |io: &agent::DeviceIo| {
                    let (major, minor) = (io.major.to_string(), io.minor.to_string());
                    [("Read", io.read_bytes), ("Write", io.written_bytes)]
                        .map(|(what, bytes)| labelled([&io.device, &major, &minor, what], bytes))
                };
                c.details().devices.iter().flat_map(by_operation).collect()
            },
        )
    },
];

const PROCESSES: &[Family] = &[
    Family {
        pod: Some(|pod| one(pod.containers(|stats| stats.processes))),
        ..container("container_processes", "Processes that run", Gauge, |c| one(c.stats.processes))
    },
    container("container_threads", "Threads that run", Gauge, |c| one(c.details().threads)),
    container("container_threads_max", "Threads that may run; 0: no limit", Gauge, |c| {
        one(c.details().threads_limit)
    }),
    container("container_file_descriptors", "Open file descriptors", Gauge, |c| {
        one(c.details().open_files)
    }),
    container("container_sockets", "Open sockets", Gauge, |c| one(c.details().sockets)),
    Family {
        labels: &["ulimit"],
        ..container(
            "container_ulimits_soft",
            "Soft limits of the first process; one without a limit is not told",
            Gauge,
            |c| {
                let limits = c.details().ulimits;
                limits.iter().map(|(name, value)| labelled([name], *value)).collect()
            },
        )
    },
];

const PRESSURE: &[Family] = &[
    Family {
        pod: Some(|pod| stalled(pod.stats.guest.as_ref().and_then(|guest| guest.cpu_pressure))),
        ..container(
            "container_pressure_cpu_stalled_seconds_total",
            "Time in which all processes waited for a CPU",
            Counter,
            |c| stalled(c.stats.cpu_pressure),
        )
    },
    Family {
        pod: Some(|pod| waiting(pod.stats.guest.as_ref().and_then(|guest| guest.cpu_pressure))),
        ..container(
            "container_pressure_cpu_waiting_seconds_total",
            "Time in which some process waited for a CPU",
            Counter,
            |c| waiting(c.stats.cpu_pressure),
        )
    },
    Family {
        pod: Some(|pod| stalled(pod.stats.guest.as_ref().and_then(|guest| guest.memory_pressure))),
        ..container(
            "container_pressure_memory_stalled_seconds_total",
            "Time in which all processes waited for memory",
            Counter,
            |c| stalled(c.stats.memory_pressure),
        )
    },
    Family {
        pod: Some(|pod| waiting(pod.stats.guest.as_ref().and_then(|guest| guest.memory_pressure))),
        ..container(
            "container_pressure_memory_waiting_seconds_total",
            "Time in which some process waited for memory",
            Counter,
            |c| waiting(c.stats.memory_pressure),
        )
    },
    Family {
        pod: Some(|pod| stalled(pod.stats.guest.as_ref().and_then(|guest| guest.io_pressure))),
        ..container(
            "container_pressure_io_stalled_seconds_total",
            "Time in which all processes waited for input or output",
            Counter,
            |c| stalled(c.stats.io_pressure),
        )
    },
    Family {
        pod: Some(|pod| waiting(pod.stats.guest.as_ref().and_then(|guest| guest.io_pressure))),
        ..container(
            "container_pressure_io_waiting_seconds_total",
            "Time in which some process waited for input or output",
            Counter,
            |c| waiting(c.stats.io_pressure),
        )
    },
];

const SPEC: &[Family] = &[
    container("container_spec_cpu_period", "Period of the CPU quota, microseconds", Gauge, |c| {
        limit(c.record.spec.resources.cpu_period)
    }),
    container("container_spec_cpu_quota", "CPU quota, microseconds; 0: none", Gauge, |c| {
        limit(c.record.spec.resources.cpu_quota)
    }),
    container("container_spec_cpu_shares", "CPU shares; 0: the default", Gauge, |c| {
        limit(c.record.spec.resources.cpu_shares)
    }),
    container("container_spec_memory_limit_bytes", "Memory limit; 0: none", Gauge, |c| {
        limit(c.record.spec.resources.memory_limit)
    }),
    container(
        "container_spec_memory_reservation_limit_bytes",
        "Memory that is kept for it (memory.min of unified); 0: none",
        Gauge,
        |c| one(c.unified("memory.min")),
    ),
    container(
        "container_spec_memory_swap_limit_bytes",
        "Limit of memory and swap together; 0: none",
        Gauge,
        |c| limit(c.record.spec.resources.memory_swap_limit),
    ),
];

const OTHER: &[Family] = &[
    Family {
        pod: Some(|pod| limit(pod.view.record.created_at / NANOS as i64)),
        ..container(
            "container_start_time_seconds",
            "When it started, in seconds since 1970",
            Gauge,
            |c| limit(c.record.started_at() / NANOS as i64),
        )
    },
    Family {
        pod: Some(|pod| limit(pod.now / NANOS as i64)),
        ..container(
            "container_last_seen",
            "When these values were read, in seconds since 1970",
            Gauge,
            |c| limit(c.now / NANOS as i64),
        )
    },
];
