//! Resource limits as files of a cgroup: v2's, and those that say the same in a v1 hierarchy. Pure.

use crate::error::Error;
use oci_spec::runtime as oci;

/// The limits, in the order they are to be written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits(pub Vec<Limit>);

/// One limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Name of the cgroup v2 file; it begins with the controller's.
    pub file: String,
    /// Its content.
    pub value: String,
    /// Names and contents of the v1 files; none when v1 has no such limit.
    pub v1: Vec<(String, String)>,
}

impl Limit {
    /// The controller that enforces it.
    pub fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// Reads the spec's resources.
pub fn read(resources: Option<&oci::LinuxResources>) -> Result<Limits, Error> {
    let mut limits = Vec::new();
    let mut put = |file: &str, value: String, v1: Vec<(&str, String)>| {
        let v1 = v1.into_iter().map(|(file, value)| (file.to_owned(), value)).collect();
        limits.push(Limit { file: file.to_owned(), value, v1 });
    };
    let Some(resources) = resources else {
        return Ok(Limits::default());
    };
    if let Some(memory) = resources.memory() {
        let limit = memory.limit().filter(|limit| *limit != 0);
        if let Some(limit) = limit {
            let v1 = vec![("memory.limit_in_bytes", limit.to_string())];
            put("memory.max", bytes(limit), v1);
        }
        if let Some(low) = memory.reservation().filter(|low| *low != 0) {
            let v1 = vec![("memory.soft_limit_in_bytes", low.to_string())];
            put("memory.low", bytes(low), v1);
        }
        if let Some(both) = memory.swap().filter(|both| *both != 0) {
            let v1 = vec![("memory.memsw.limit_in_bytes", both.to_string())];
            put("memory.swap.max", swap(both, limit)?, v1);
        }
    }
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            let v1 = vec![("cpu.shares", shares.to_string())];
            put("cpu.weight", weight(shares).to_string(), v1);
        }
        if cpu.quota().is_some() || cpu.period().is_some() {
            let quota = cpu.quota().filter(|quota| *quota > 0);
            let period = cpu.period().filter(|period| *period != 0).unwrap_or(100_000);
            let v1 = vec![
                ("cpu.cfs_period_us", period.to_string()),
                ("cpu.cfs_quota_us", quota.unwrap_or(-1).to_string()),
            ];
            let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
            put("cpu.max", format!("{quota} {period}"), v1);
        }
        if let Some(burst) = cpu.burst() {
            put("cpu.max.burst", burst.to_string(), vec![("cpu.cfs_burst_us", burst.to_string())]);
        }
        if let Some(idle) = cpu.idle() {
            put("cpu.idle", idle.to_string(), vec![("cpu.idle", idle.to_string())]);
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
            put("cpuset.cpus", cpus.clone(), vec![("cpuset.cpus", cpus.clone())]);
        }
        if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
            put("cpuset.mems", mems.clone(), vec![("cpuset.mems", mems.clone())]);
        }
    }
    if let Some(limit) = resources.pids().map(|pids| pids.limit()).filter(|limit| *limit != 0) {
        put("pids.max", bytes(limit), vec![("pids.max", bytes(limit))]);
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        let size = huge.page_size();
        if !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(Error::invalid(format!("hugepage size {size:?}")));
        }
        let v1 = format!("hugetlb.{size}.limit_in_bytes");
        put(
            &format!("hugetlb.{size}.max"),
            bytes(huge.limit()),
            vec![(v1.as_str(), huge.limit().to_string())],
        );
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        // A file of the cgroup itself; those without a controller's name move and kill processes.
        let plain = file.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !plain || !file.contains('.') || file.starts_with('.') || file.starts_with("cgroup.") {
            return Err(Error::invalid(format!("linux.resources.unified: {file:?}")));
        }
        put(file, value.clone(), Vec::new());
    }
    Ok(Limits(limits))
}

fn bytes(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

/// The spec counts memory and swap together, the kernel swap alone.
fn swap(both: i64, memory: Option<i64>) -> Result<String, Error> {
    match memory {
        _ if both < 0 => Ok("max".to_owned()),
        Some(memory) if memory >= 0 && both >= memory => Ok((both - memory).to_string()),
        Some(memory) if memory >= 0 => Err(Error::invalid(
            "linux.resources.memory: the limit with swap is below the limit without",
        )),
        _ => Err(Error::invalid("linux.resources.memory: a swap limit needs a memory limit")),
    }
}

/// Shares (2 to 262144, 1024 is the default) to weight (1 to 10000, 100 is the default), on the
/// curve that runc and crun use since 2025: it meets both ends and the default.
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let log = (shares as f64).log2();
            10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil() as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn files(resources: Value) -> Result<Vec<(String, String)>, Error> {
        let resources = serde_json::from_value(resources).unwrap();
        let pair = |limit: Limit| (limit.file, limit.value);
        read(Some(&resources)).map(|limits| limits.0.into_iter().map(pair).collect())
    }

    #[test]
    fn limits_of_a_v1_hierarchy_say_the_same() {
        let resources = json!({
            "memory": { "limit": 1000, "swap": 1500 },
            "cpu": { "shares": 512, "quota": -1, "period": 50000 },
            "pids": { "limit": -1 },
            "unified": { "memory.oom.group": "1" },
        });
        let resources = serde_json::from_value(resources).unwrap();
        let limits = read(Some(&resources)).unwrap().0;
        let files: Vec<_> = limits
            .iter()
            .flat_map(|limit| &limit.v1)
            .map(|(file, value)| format!("{file}={value}"))
            .collect();
        let expected = [
            "memory.limit_in_bytes=1000",
            "memory.memsw.limit_in_bytes=1500",
            "cpu.shares=512",
            "cpu.cfs_period_us=50000",
            "cpu.cfs_quota_us=-1",
            "pids.max=max",
        ];
        assert_eq!(files, expected);
        assert_eq!(limits.last().unwrap().controller(), "memory");
    }

    #[test]
    fn limits_become_the_kernels_files() {
        let all = files(json!({
            "memory": { "limit": 1000, "reservation": 500, "swap": 1500 },
            "cpu": { "shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1" },
            "pids": { "limit": 10 },
            "hugepageLimits": [{ "pageSize": "2MB", "limit": 4096 }],
            "unified": { "memory.oom.group": "1" },
        }))
        .unwrap();
        let expected = [
            ("memory.max", "1000"),
            ("memory.low", "500"),
            ("memory.swap.max", "500"),
            ("cpu.weight", "100"),
            ("cpu.max", "50000 100000"),
            ("cpuset.cpus", "0-1"),
            ("pids.max", "10"),
            ("hugetlb.2MB.max", "4096"),
            ("memory.oom.group", "1"),
        ];
        assert_eq!(all, expected.map(|(file, value)| (file.to_owned(), value.to_owned())));
    }

    #[test]
    fn no_limit_is_said_with_a_negative_number_and_unset_is_zero() {
        let all = files(
            json!({ "memory": { "limit": -1, "swap": -1 }, "cpu": { "quota": -1, "shares": 0 }, "pids": { "limit": -1 } }),
        );
        let values: Vec<_> =
            all.unwrap().into_iter().map(|(file, value)| format!("{file}={value}")).collect();
        assert_eq!(
            values,
            ["memory.max=max", "memory.swap.max=max", "cpu.max=max 100000", "pids.max=max"]
        );
    }

    #[test]
    fn shares_keep_their_ends_and_their_default() {
        assert_eq!([2, 1024, 262_144, 1 << 40].map(weight), [1, 100, 10_000, 10_000]);
    }

    #[test]
    fn a_file_that_is_no_limit_is_refused() {
        for file in ["cgroup.procs", "../memory.max", "memory", ".x"] {
            assert!(files(json!({ "unified": { file: "1" } })).is_err(), "{file}");
        }
    }
}
