//! A container's cgroup and those of its execs below it.
//!
//! Limits stand on the container's cgroup; init lives in it, each exec in a child of it without
//! controllers, so that the exec's whole process tree can be killed by one write.
//!
//! Who belongs to a container is always told by cgroup v2. On a node whose controllers are in v1
//! hierarchies, the container has a folder in each of these as well, for its limits and its use;
//! all its processes enter them before they exec.

use crate::{
    config::Config,
    error::{Error, Step},
    limits::{Limit, Limits},
};
use a3s_box_sys::device_filter;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

/// One cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    folder: PathBuf,
    /// By controller; several may share a folder.
    v1: BTreeMap<String, PathBuf>,
}

/// Lets children of `root` have every controller that is there.
pub fn delegate(root: &Path) -> Result<(), Error> {
    let what = || format!("cgroup {}", root.display());
    let controllers = fs::read_to_string(root.join("cgroup.controllers")).step(what())?;
    for controller in controllers.split_whitespace() {
        // One by one: a controller that cannot be enabled is missed by the limit that needs it.
        if let Err(error) = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
        {
            crate::log::error(format_args!("{}: controller {controller}: {error}", what()));
        }
    }
    Ok(())
}

impl Cgroup {
    /// The container's cgroup of that name, whether it is there or not.
    pub fn new(config: &Config, name: &str) -> Self {
        let below =
            |(controller, folder): (&String, &PathBuf)| (controller.clone(), folder.join(name));
        Self {
            folder: config.cgroups.join(name),
            v1: config.cgroups_v1.iter().map(below).collect(),
        }
    }

    /// Makes it; an error when it exists.
    pub fn create(&self) -> Result<(), Error> {
        for folder in self.folders() {
            fs::create_dir(folder).step(format_args!("cgroup {}", folder.display()))?;
        }
        Ok(())
    }

    /// Puts limits and loaded device rules in force.
    pub fn limit(&self, limits: &Limits, rules: BorrowedFd<'_>) -> Result<(), Error> {
        self.update(limits)?;
        let folder = self.open()?;
        device_filter::attach(folder.as_fd(), rules).step("device rules")
    }

    /// Puts limits in force, in their order; those that are not among them stay.
    pub fn update(&self, limits: &Limits) -> Result<(), Error> {
        for limit in &limits.0 {
            match self.v1(limit.controller()) {
                Some(folder) => limit_v1(folder, limit)?,
                None => put(&self.folder, &limit.file, &limit.value, limit)?,
            }
        }
        Ok(())
    }

    /// Lets another user move processes in it and divide it, as the kernel says a cgroup is handed
    /// over.
    pub fn give(&self, uid: u32, gid: u32) -> Result<(), Error> {
        let files = ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];
        for path in [self.folder.clone()].into_iter().chain(files.map(|file| self.file(file))) {
            std::os::unix::fs::chown(&path, Some(uid), Some(gid))
                .step(format_args!("give away {}", path.display()))?;
        }
        Ok(())
    }

    /// Its folder in the v1 hierarchy of that controller; `None` where the controller is v2's.
    pub fn v1(&self, controller: &str) -> Option<&Path> {
        self.v1.get(controller).map(PathBuf::as_path)
    }

    /// Files of v1 hierarchies that a process writes `0` to, to enter.
    pub fn doors(&self) -> Vec<PathBuf> {
        let v1: BTreeSet<_> = self.v1.values().collect();
        v1.into_iter().map(|folder| folder.join("cgroup.procs")).collect()
    }

    fn folders(&self) -> BTreeSet<&Path> {
        self.v1.values().chain([&self.folder]).map(PathBuf::as_path).collect()
    }

    /// A descriptor of its folder, to start a process in it.
    pub fn open(&self) -> Result<OwnedFd, Error> {
        let folder = fs::File::open(&self.folder).map(OwnedFd::from);
        folder.step(format_args!("cgroup {}", self.folder.display()))
    }

    /// A cgroup v2 file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A cgroup below it, without limits and so without folders in v1 hierarchies.
    pub fn child(&self, name: &str) -> Self {
        Self { folder: self.folder.join(name), v1: BTreeMap::new() }
    }

    /// Kills every process in it and below. OK when it is gone.
    pub fn kill(&self) -> Result<(), Error> {
        match write(&self.file("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.step("kill the cgroup"),
        }
    }

    /// Whether a process is left in it or below.
    pub fn populated(&self) -> bool {
        fs::read_to_string(self.file("cgroup.events"))
            .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
    }

    /// How many processes were killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        let file = match self.v1("memory") {
            Some(folder) => folder.join("memory.oom_control"),
            None => self.file("memory.events"),
        };
        count(&file, "oom_kill ")
    }

    /// Whether its own memory limit was ever reached for good.
    pub fn reached_its_limit(&self) -> bool {
        match self.v1("memory") {
            Some(folder) => count(&folder.join("memory.failcnt"), "") > 0,
            None => count(&self.file("memory.events"), "oom ") > 0,
        }
    }

    /// The pids of all processes in it and below.
    pub fn processes(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            let list = match fs::read_to_string(folder.join("cgroup.procs")) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                list => list?,
            };
            pids.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
            folders.extend(subfolders(&folder)?);
        }
        Ok(pids)
    }

    /// Removes it and all below; they must be empty. OK when it is gone.
    pub fn remove(&self) -> Result<(), Error> {
        fn remove(folder: &Path) -> io::Result<()> {
            match fs::remove_dir(folder) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                // Cgroups of its own, made by us or by the container.
                Err(error)
                    if rustix::io::Errno::from_io_error(&error)
                        == Some(rustix::io::Errno::BUSY) => {}
                result => return result,
            }
            for child in subfolders(folder)? {
                remove(&child)?;
            }
            fs::remove_dir(folder)
        }
        for folder in self.folders() {
            remove(folder).step(format_args!("remove the cgroup {}", folder.display()))?;
        }
        Ok(())
    }
}

/// The number behind `key` in a file of the kernel's; 0 when there is none.
pub fn count(file: &Path, key: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix(key)?.parse().ok()).unwrap_or(0)
}

fn limit_v1(folder: &Path, limit: &Limit) -> Result<(), Error> {
    if limit.v1.is_empty() {
        let file = &limit.file;
        return Err(Error::Unsupported(format!("{file} on a node with cgroup v1")));
    }
    limit.v1.iter().try_for_each(|(file, value)| put(folder, file, value, limit))
}

fn put(folder: &Path, file: &str, value: &str, limit: &Limit) -> Result<(), Error> {
    match write(&folder.join(file), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // No swap at all and no pages of that size are just what zero asks for.
            let zero = limit.value == "0";
            let met =
                zero && (limit.file == "memory.swap.max" || limit.file.starts_with("hugetlb."));
            if met {
                return Ok(());
            }
            Err(Error::Unsupported(format!("the limit {file}, for which this kernel has no file,")))
        }
        result => result.step(format_args!("limit {file} = {value}")),
    }
}

fn subfolders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            all.push(entry.path());
        }
    }
    Ok(all)
}

/// Writes a file of the kernel's, which is there or not and is never made.
fn write(file: &Path, text: &str) -> io::Result<()> {
    io::Write::write_all(&mut fs::File::options().write(true).open(file)?, text.as_bytes())
}
