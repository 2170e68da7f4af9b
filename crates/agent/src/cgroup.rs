//! A container's cgroup and those of its execs below it.
//!
//! Limits stand on the container's cgroup; init lives in it, each exec in a child of it without
//! controllers, so that the exec's whole process tree can be killed by one write.

use crate::{
    error::{Error, Step},
    limits::Limits,
};
use a3s_box_sys::device_filter::{self, Rule};
use rustix::fd::{AsFd, OwnedFd};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// One cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup(PathBuf);

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
    /// The cgroup `name` below `root`, whether it is there or not.
    pub fn new(root: &Path, name: &str) -> Self {
        Self(root.join(name))
    }

    /// Makes it; an error when it exists.
    pub fn create(&self) -> Result<(), Error> {
        fs::create_dir(&self.0).step(format_args!("cgroup {}", self.0.display()))
    }

    /// Puts limits and device rules in force.
    pub fn limit(&self, limits: &Limits, rules: &[Rule]) -> Result<(), Error> {
        for (file, value) in &limits.0 {
            match write(&self.0.join(file), value) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    // No swap at all and no pages of that size are just what zero asks for.
                    let met =
                        value == "0" && (file == "memory.swap.max" || file.starts_with("hugetlb."));
                    if !met {
                        return Err(Error::Unsupported(format!(
                            "the limit {file}, for which this kernel has no file,"
                        )));
                    }
                }
                result => result.step(format_args!("limit {file} = {value}"))?,
            }
        }
        let folder = self.open()?;
        device_filter::attach(folder.as_fd(), rules).step("device rules")
    }

    /// A descriptor of its folder, to start a process in it.
    pub fn open(&self) -> Result<OwnedFd, Error> {
        fs::File::open(&self.0).map(OwnedFd::from).step(format_args!("cgroup {}", self.0.display()))
    }

    /// A file of it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A cgroup below it.
    pub fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    /// Kills every process in it and below. OK when it is gone.
    pub fn kill(&self) -> Result<(), Error> {
        match write(&self.0.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.step("kill the cgroup"),
        }
    }

    /// Whether a process is left in it or below.
    pub fn populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events"))
            .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
    }

    /// How many processes were killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        fs::read_to_string(self.0.join("memory.events"))
            .ok()
            .and_then(|events| {
                events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
            })
            .unwrap_or(0)
    }

    /// The pids of all processes in it and below.
    pub fn processes(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        let mut folders = vec![self.0.clone()];
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
        remove(&self.0).step(format_args!("remove the cgroup {}", self.0.display()))
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
