//! What the boundary's processes take on the host, from /proc.

use a3s_box_sys::cgroup::Usage;
use std::fs;

/// What these processes have used; one that is gone counts for nothing. Memory is that with shared
/// pages in proportion (PSS).
pub fn of(pids: impl Iterator<Item = u32>) -> Usage {
    let mut used = Usage::default();
    for pid in pids {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let Some(stat) = read("stat").as_deref().and_then(read_stat) else { continue };
        used.processes += 1;
        used.cpu_ns += stat.ticks * (1_000_000_000 / rustix::param::clock_ticks_per_second());
        used.page_faults += stat.page_faults;
        used.major_page_faults += stat.major_page_faults;
        used.memory_bytes += read("smaps_rollup").as_deref().and_then(pss_kib).unwrap_or(0) * 1024;
    }
    used
}

#[derive(Debug, PartialEq)]
struct Stat {
    ticks: u64,
    page_faults: u64,
    major_page_faults: u64,
}

/// minflt, majflt, utime and stime, the 10th, 12th, 14th and 15th field; the second may hold blanks and
/// parentheses.
fn read_stat(stat: &str) -> Option<Stat> {
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let (minor, major) = (field(10)?, field(12)?);
    let ticks = field(14)? + field(15)?;
    Some(Stat { ticks, page_faults: minor + major, major_page_faults: major })
}

fn pss_kib(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let stat = "7 (a) b) c) S 1 1 1 0 -1 4194304 100 0 4 0 11 22 0 0 20 0 1 0 5";
        let read = Stat { ticks: 33, page_faults: 104, major_page_faults: 4 };
        assert_eq!(read_stat(stat), Some(read));
        assert_eq!(pss_kib("x rollup\nRss: 10 kB\nPss:     7 kB\nPss_Anon: 1 kB\n"), Some(7));
    }

    #[test]
    fn this_process_uses_something_and_a_gone_one_nothing() {
        let used = of([std::process::id(), u32::MAX].into_iter());
        assert_eq!(used.processes, 1);
        assert!(used.memory_bytes > 0);
    }
}
