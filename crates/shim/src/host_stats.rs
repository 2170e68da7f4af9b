//! What the boundary's processes take on the host, from /proc.

use a3s_box_sys::cgroup::Usage;
use std::fs;

/// What these processes have used; one that is gone counts for nothing. Memory is that with shared
/// pages in proportion (PSS).
pub fn of(pids: impl Iterator<Item = u32>) -> Usage {
    let mut used = Usage::default();
    for pid in pids {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let Some(ticks) = read("stat").as_deref().and_then(cpu_ticks) else { continue };
        used.processes += 1;
        used.cpu_ns += ticks * (1_000_000_000 / rustix::param::clock_ticks_per_second());
        used.memory_bytes += read("smaps_rollup").as_deref().and_then(pss_kib).unwrap_or(0) * 1024;
    }
    used
}

/// utime and stime, the 14th and 15th field; the second may hold blanks and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11).map(str::parse::<u64>);
    Some(fields.next()?.ok()? + fields.next()?.ok()?)
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
        let stat = "7 (a) b) c) S 1 1 1 0 -1 4194304 100 0 0 0 11 22 0 0 20 0 1 0 5";
        assert_eq!(cpu_ticks(stat), Some(33));
        assert_eq!(pss_kib("x rollup\nRss: 10 kB\nPss:     7 kB\nPss_Anon: 1 kB\n"), Some(7));
    }

    #[test]
    fn this_process_uses_something_and_a_gone_one_nothing() {
        let used = of([std::process::id(), u32::MAX].into_iter());
        assert_eq!(used.processes, 1);
        assert!(used.memory_bytes > 0);
    }
}
