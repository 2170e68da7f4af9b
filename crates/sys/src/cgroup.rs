//! The host cgroup of one pod: made, limited, entered by its processes, emptied and removed.
//!
//! cgroup v2, and v1 with one hierarchy per controller (or a mix). A host without any mounted
//! hierarchy has no cgroups, and everything here succeeds with nothing done.

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// The v1 hierarchies that a pod's processes enter; cpuset only when it is limited, because a new
/// cpuset admits nobody.
const V1_CONTROLLERS: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "freezer"];

/// Looks at a cgroup until all its processes have been seen and moved.
const ADMISSIONS: usize = 16;

/// Limits; zero and empty: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// As v1 counts them, 2 to 262144.
    pub cpu_shares: u64,
    /// Microseconds per period; negative: explicitly none.
    pub cpu_quota: i64,
    /// Microseconds; 0: the kernel's default.
    pub cpu_period: u64,
    /// CPU list.
    pub cpuset_cpus: String,
    /// Memory node list.
    pub cpuset_mems: String,
    /// Bytes.
    pub memory_max: u64,
}

/// What a cgroup uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time so far, nanoseconds.
    pub cpu_ns: u64,
    /// Bytes, page cache included.
    pub memory_bytes: u64,
    /// Processes that live.
    pub processes: u64,
    /// Page faults so far, those that had to wait for a disk included.
    pub page_faults: u64,
    /// Page faults so far that had to wait for a disk.
    pub major_page_faults: u64,
}

/// Where the host has its hierarchies mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hierarchies {
    /// cgroup2's mount point.
    v2: Option<PathBuf>,
    /// Controller and mount point of each v1 hierarchy.
    v1: Vec<(String, PathBuf)>,
}

impl Hierarchies {
    /// Those of this process's mount namespace.
    ///
    /// # Errors
    /// /proc is not there.
    pub fn find() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string("/proc/self/mountinfo")?))
    }

    fn parse(mountinfo: &str) -> Self {
        let mut found = Self::default();
        for line in mountinfo.lines() {
            let Some((mount, source)) = line.split_once(" - ") else {
                continue;
            };
            let Some(point) = mount.split(' ').nth(4).map(PathBuf::from) else {
                continue;
            };
            let mut source = source.split(' ');
            match source.next() {
                Some("cgroup2") => found.v2 = Some(point),
                Some("cgroup") => {
                    let options = source.nth(1).unwrap_or_default();
                    let known = options
                        .split(',')
                        .filter(|option| *option == "cpuset" || V1_CONTROLLERS.contains(option));
                    found.v1.extend(known.map(|name| (name.to_owned(), point.clone())));
                }
                _ => {}
            }
        }
        found
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1.iter().find(|(name, _)| name == controller).map(|(_, point)| point.as_path())
    }

    /// Whether there is a cgroup v2 hierarchy, with controllers or without.
    pub fn has_v2(&self) -> bool {
        self.v2.is_some()
    }

    /// Whether the controllers are cgroup v2's.
    fn limits_in_v2(&self) -> bool {
        self.v1.is_empty()
    }
}

/// The cgroup of one pod. Holds no descriptor: it is a name.
#[derive(Debug, Clone)]
pub struct Cgroup {
    hierarchies: Hierarchies,
    /// Relative to each mount point.
    parent: PathBuf,
    name: String,
}

impl Cgroup {
    /// The cgroup `name` under `parent`: an absolute path, or the name of a systemd slice.
    pub fn new(hierarchies: Hierarchies, parent: &str, name: &str) -> Self {
        let parent = if parent.starts_with('/') {
            PathBuf::from(parent.trim_start_matches('/'))
        } else {
            slice(parent)
        };
        Self { hierarchies, parent, name: name.to_owned() }
    }

    /// Makes it, limits it, and opens its `cgroup.procs` files: a process enters by writing `0`.
    ///
    /// Also returns the limits that this host cannot set, with the reason.
    ///
    /// # Errors
    /// The folders cannot be made.
    pub fn create(&self, limits: &Limits) -> io::Result<(Vec<OwnedFd>, Vec<String>)> {
        let mut unset = Vec::new();
        let mut doors = Vec::new();
        for folder in self.folders(!limits.cpuset_cpus.is_empty()) {
            fs::create_dir_all(&folder)?;
        }
        if self.hierarchies.limits_in_v2() {
            self.limit_v2(limits, &mut unset);
        } else {
            self.limit_v1(limits, &mut unset);
        }
        for folder in self.folders(!limits.cpuset_cpus.is_empty()) {
            let door = OpenOptions::new().write(true).open(folder.join("cgroup.procs"))?;
            doors.push(door.into());
        }
        Ok((doors, unset))
    }

    /// Puts other limits in force. Returns those that this host cannot set, with the reason.
    pub fn update(&self, limits: &Limits) -> Vec<String> {
        // None may have to replace one.
        let cpu_quota = if limits.cpu_quota == 0 { -1 } else { limits.cpu_quota };
        let limits = Limits { cpu_quota, ..limits.clone() };
        let mut unset = Vec::new();
        if self.hierarchies.limits_in_v2() {
            self.limit_v2(&limits, &mut unset);
        } else {
            self.limit_v1(&limits, &mut unset);
        }
        unset
    }

    /// Moves every process of `from` here, through the doors that [`Cgroup::create`] has opened.
    ///
    /// # Errors
    /// One cannot be moved.
    pub fn admit(&self, doors: &[OwnedFd], from: &Self) -> io::Result<()> {
        // Again, for those that were forked in between.
        for _ in 0..ADMISSIONS {
            let processes = from.processes()?;
            if processes.is_empty() {
                return Ok(());
            }
            for (door, pid) in
                doors.iter().flat_map(|door| processes.iter().map(move |pid| (door, pid)))
            {
                match rustix::io::write(door, pid.to_string().as_bytes()) {
                    // It has ended.
                    Err(rustix::io::Errno::SRCH) => {}
                    written => drop(written?),
                }
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Its folder in the cgroup v2 hierarchy; `None` where there is no such hierarchy.
    pub fn v2(&self) -> Option<PathBuf> {
        self.hierarchies.v2.as_ref().map(|point| self.at(point))
    }

    /// Controller and folder of each v1 hierarchy that its processes are in.
    pub fn v1(&self) -> Vec<(String, PathBuf)> {
        let entered = self.hierarchies.v1.iter().filter(|(controller, _)| controller != "cpuset");
        entered.map(|(controller, point)| (controller.clone(), self.at(point))).collect()
    }

    /// Moves the calling process to a cgroup below it, in the v2 hierarchy only: there, a cgroup with
    /// processes of its own cannot hand controllers to those below it.
    ///
    /// # Errors
    /// The folder cannot be made, or entered.
    pub fn enter_below(&self, name: &str) -> io::Result<()> {
        let Some(folder) = self.v2().map(|folder| folder.join(name)) else {
            return Ok(());
        };
        fs::create_dir_all(&folder)?;
        let mut door = OpenOptions::new().write(true).open(folder.join("cgroup.procs"))?;
        io::Write::write_all(&mut door, b"0")
    }

    /// What its processes, and those that have ended, use.
    ///
    /// # Errors
    /// As [`Cgroup::processes`].
    pub fn usage(&self) -> io::Result<Usage> {
        let number = |folder: PathBuf, file: &str| {
            fs::read_to_string(folder.join(file)).ok()?.trim().parse::<u64>().ok()
        };
        let v1 = |controller: &str| self.hierarchies.v1(controller).map(|point| self.at(point));
        let cpu_ns = match (v1("cpuacct"), self.v2()) {
            (Some(folder), _) => number(folder, "cpuacct.usage"),
            (None, Some(folder)) => fs::read_to_string(folder.join("cpu.stat"))
                .ok()
                .and_then(|text| {
                    text.lines().find_map(|l| l.strip_prefix("usage_usec ")?.parse().ok())
                })
                .map(|microseconds: u64| microseconds * 1000),
            (None, None) => None,
        };
        let memory_bytes = match (v1("memory"), self.v2()) {
            (Some(folder), _) => number(folder, "memory.usage_in_bytes"),
            (None, Some(folder)) => number(folder, "memory.current"),
            (None, None) => None,
        };
        let faults = match (v1("memory"), self.v2()) {
            (Some(folder), _) => Some((folder, "total_pgfault ", "total_pgmajfault ")),
            (None, Some(folder)) => Some((folder, "pgfault ", "pgmajfault ")),
            (None, None) => None,
        };
        let faults = faults.and_then(|(folder, all, major)| {
            let text = fs::read_to_string(folder.join("memory.stat")).ok()?;
            let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.parse().ok());
            Some((value(all)?, value(major)?))
        });
        let (page_faults, major_page_faults) = faults.unwrap_or_default();
        Ok(Usage {
            cpu_ns: cpu_ns.unwrap_or_default(),
            memory_bytes: memory_bytes.unwrap_or_default(),
            processes: self.processes()?.len() as u64,
            page_faults,
            major_page_faults,
        })
    }

    /// Its processes and those of all cgroups below it.
    ///
    /// # Errors
    /// A list cannot be read.
    pub fn processes(&self) -> io::Result<BTreeSet<u32>> {
        let mut found = BTreeSet::new();
        for folder in self.tree()? {
            match fs::read_to_string(folder.join("cgroup.procs")) {
                Ok(list) => found.extend(list.lines().filter_map(|pid| pid.parse::<u32>().ok())),
                Err(error) if gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        found.remove(&0); // a process of another PID namespace
        Ok(found)
    }

    /// Sends SIGKILL to each of its processes: at once where the kernel can (cgroup v2 since 5.14), and
    /// one by one, held by pidfd while its membership is looked at again, in v1 hierarchies.
    ///
    /// # Errors
    /// As [`Cgroup::processes`].
    pub fn kill(&self) -> io::Result<()> {
        if let Some(folder) = self.v2() {
            let file = OpenOptions::new().write(true).open(folder.join("cgroup.kill"));
            match file.and_then(|mut file| io::Write::write_all(&mut file, b"1")) {
                Err(error) if !gone(&error) => return Err(error),
                _ => {}
            }
        }
        self.kill_each(None)
    }

    /// Sends SIGKILL to each of its processes but the caller's own.
    ///
    /// # Errors
    /// As [`Cgroup::processes`].
    pub fn kill_others(&self) -> io::Result<()> {
        self.kill_each(Some(std::process::id()))
    }

    fn kill_each(&self, but: Option<u32>) -> io::Result<()> {
        let mut held = Vec::new();
        for pid in self.processes()?.into_iter().filter(|pid| Some(*pid) != but) {
            let Some(number) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
                continue;
            };
            if let Ok(fd) = pidfd_open(number, PidfdFlags::empty()) {
                held.push((pid, fd));
            }
        }
        let members = self.processes()?;
        for (_, fd) in held.iter().filter(|(pid, _)| members.contains(pid)) {
            match pidfd_send_signal(fd, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Removes it and all below it. OK when it is gone already.
    ///
    /// # Errors
    /// ResourceBusy while a process is in it.
    pub fn remove(&self) -> io::Result<()> {
        for folder in self.tree()?.iter().rev() {
            match fs::remove_dir(folder) {
                Ok(()) => {}
                Err(error) if gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn folders(&self, cpuset: bool) -> Vec<PathBuf> {
        let mut points: BTreeSet<&Path> =
            self.hierarchies.v2.iter().map(PathBuf::as_path).collect();
        for (controller, point) in &self.hierarchies.v1 {
            if cpuset || controller != "cpuset" {
                points.insert(point);
            }
        }
        points.into_iter().map(|point| self.at(point)).collect()
    }

    fn at(&self, point: &Path) -> PathBuf {
        point.join(&self.parent).join(&self.name)
    }

    /// Its folders and all below them, each after the one it lies in.
    fn tree(&self) -> io::Result<Vec<PathBuf>> {
        let mut all = self.folders(true);
        let mut at = 0;
        while let Some(folder) = all.get(at) {
            at += 1;
            let entries = match fs::read_dir(folder) {
                Err(error) if gone(&error) => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    all.push(entry.path());
                }
            }
        }
        Ok(all)
    }

    fn limit_v2(&self, limits: &Limits, unset: &mut Vec<String>) {
        let Some(point) = &self.hierarchies.v2 else {
            return;
        };
        // From the top: a controller reaches a cgroup only through all its parents.
        let mut folder = point.clone();
        for part in [None].into_iter().chain(self.parent.components().map(Some)) {
            folder.extend(part);
            for controller in ["+cpu", "+memory", "+cpuset", "+pids"] {
                // Fails where a parent holds processes; the limit itself then says so.
                drop(fs::write(folder.join("cgroup.subtree_control"), controller));
            }
        }
        let folder = folder.join(&self.name);
        let period = if limits.cpu_period > 0 { limits.cpu_period } else { 100_000 };
        let weight = weight(limits.cpu_shares);
        let quota = match limits.cpu_quota {
            quota if quota < 0 => "max".to_owned(),
            quota => quota.to_string(),
        };
        let files = [
            ("cpu.weight", limits.cpu_shares > 0, weight.to_string()),
            ("cpu.max", limits.cpu_quota != 0, format!("{quota} {period}")),
            ("memory.max", limits.memory_max > 0, limits.memory_max.to_string()),
            ("cpuset.cpus", !limits.cpuset_cpus.is_empty(), limits.cpuset_cpus.clone()),
            ("cpuset.mems", !limits.cpuset_mems.is_empty(), limits.cpuset_mems.clone()),
        ];
        for (file, wanted, value) in files {
            if wanted {
                set(&folder.join(file), &value, unset);
            }
        }
    }

    fn limit_v1(&self, limits: &Limits, unset: &mut Vec<String>) {
        let files = [
            ("cpu", "cpu.shares", limits.cpu_shares > 0, limits.cpu_shares.to_string()),
            ("cpu", "cpu.cfs_period_us", limits.cpu_period > 0, limits.cpu_period.to_string()),
            ("cpu", "cpu.cfs_quota_us", limits.cpu_quota != 0, limits.cpu_quota.to_string()),
            (
                "memory",
                "memory.limit_in_bytes",
                limits.memory_max > 0,
                limits.memory_max.to_string(),
            ),
        ];
        for (controller, file, wanted, value) in files {
            match self.hierarchies.v1(controller) {
                Some(point) if wanted => {
                    set(&point.join(&self.parent).join(&self.name).join(file), &value, unset);
                }
                None if wanted => unset.push(format!("{file}: no {controller} hierarchy")),
                _ => {}
            }
        }
        if !limits.cpuset_cpus.is_empty() {
            self.limit_v1_cpuset(limits, unset);
        }
    }

    /// Every folder on the way needs CPUs and memory nodes before a process may enter.
    fn limit_v1_cpuset(&self, limits: &Limits, unset: &mut Vec<String>) {
        let Some(point) = self.hierarchies.v1("cpuset") else {
            unset.push("cpuset.cpus: no cpuset hierarchy".to_owned());
            return;
        };
        let mut folder = point.to_owned();
        for part in self.parent.join(&self.name).components() {
            let above = folder.clone();
            folder.push(part);
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let empty =
                    fs::read_to_string(folder.join(file)).is_ok_and(|text| text.trim().is_empty());
                if empty && let Ok(value) = fs::read_to_string(above.join(file)) {
                    set(&folder.join(file), value.trim(), unset);
                }
            }
        }
        set(&folder.join("cpuset.cpus"), &limits.cpuset_cpus, unset);
        if !limits.cpuset_mems.is_empty() {
            set(&folder.join("cpuset.mems"), &limits.cpuset_mems, unset);
        }
    }
}

/// How many processes of the caller's own cgroup the kernel has killed for want of memory; those of
/// cgroups below it do not count. 0 as well where that is not told.
pub fn own_oom_kills() -> u64 {
    let Ok(hierarchies) = Hierarchies::find() else { return 0 };
    let Ok(own) = fs::read_to_string("/proc/self/cgroup") else { return 0 };
    // Number, controllers and path; no controllers: cgroup v2.
    let place = |named: &str| {
        own.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            controllers.split(',').any(|one| one == named).then(|| path.trim_start_matches('/'))
        })
    };
    let file = match (hierarchies.v1("memory"), &hierarchies.v2) {
        (Some(point), _) => place("memory").map(|path| point.join(path).join("memory.oom_control")),
        (None, Some(point)) => place("").map(|path| point.join(path).join("memory.events.local")),
        (None, None) => None,
    };
    let text = file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(0)
}

/// `a-b.slice` lies in `a.slice`.
fn slice(name: &str) -> PathBuf {
    let stem = name.strip_suffix(".slice").unwrap_or(name);
    let mut path = PathBuf::new();
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    for end in ends.filter(|end| *end > 0) {
        path.push(format!("{}.slice", &stem[..end]));
    }
    path
}

/// v2's weight of 1 to 10000 for v1's shares of 2 to 262144, as everywhere in Kubernetes.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn set(file: &Path, value: &str, unset: &mut Vec<String>) {
    let written = File::options()
        .write(true)
        .open(file)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    if let Err(error) = written {
        unset.push(format!("{} = {value}: {error}", file.display()));
    }
}

/// No such folder, or a list of a cgroup that went away while it was read.
fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spawn::Spawn;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn folders(cgroup: &Cgroup) -> Vec<String> {
        cgroup.folders(false).iter().map(|path| path.display().to_string()).collect()
    }

    #[test]
    fn every_hierarchy_is_entered_once() {
        let cgroup = Cgroup::new(Hierarchies::parse(HYBRID), "/kubepods/pod1", "x");
        assert_eq!(
            folders(&cgroup),
            [
                "/sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/x",
                "/sys/fs/cgroup/memory/kubepods/pod1/x",
                "/sys/fs/cgroup/unified/kubepods/pod1/x"
            ]
        );
    }

    #[test]
    fn a_slice_is_where_systemd_puts_it() {
        let v2 = Hierarchies::parse("1 1 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        assert!(v2.limits_in_v2());
        let cgroup = Cgroup::new(v2, "kubepods-burstable-pod1.slice", "x");
        assert_eq!(
            folders(&cgroup),
            [
                "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/x"
            ]
        );
    }

    #[test]
    fn shares_become_the_weight_that_kubernetes_computes() {
        assert_eq!([2, 1024, 262_144].map(weight), [1, 39, 10_000]);
    }

    #[test]
    fn a_child_starts_inside_is_limited_killed_and_leaves_nothing() {
        let hierarchies = Hierarchies::find().unwrap();
        if hierarchies == Hierarchies::default() {
            return; // a host without cgroups: nothing to prove
        }
        let name = format!("a3s-box-test-{}", std::process::id());
        let cgroup = Cgroup::new(hierarchies, "/", &name);
        let limits = Limits { memory_max: 64 << 20, cpu_shares: 100, ..Limits::default() };
        let (doors, _unset) = cgroup.create(&limits).unwrap();
        let mut spawn = Spawn::new("/bin/sleep");
        spawn.arg("100");
        spawn.cgroups = doors;
        let mut child = spawn.start().unwrap();
        assert_eq!(cgroup.processes().unwrap(), [child.id()].into());
        assert_eq!(cgroup.usage().unwrap().processes, 1);
        assert_eq!(cgroup.remove().unwrap_err().kind(), io::ErrorKind::ResourceBusy);
        for folder in cgroup.folders(false) {
            fs::create_dir_all(folder.join("below/it")).unwrap();
        }
        cgroup.kill().unwrap();
        child.wait().unwrap();
        cgroup.remove().unwrap();
        cgroup.remove().unwrap();
        cgroup.kill().unwrap();
        assert!(cgroup.folders(true).iter().all(|folder| !folder.exists()));
    }
}
