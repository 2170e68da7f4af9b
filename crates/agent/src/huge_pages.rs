//! Huge pages of a guest, which are part of its memory.
//!
//! The kernel keeps as many ready as all containers' limits allow together, so that each finds what it was
//! promised, as on a node whose huge pages kubelet gives out. Volumes of huge pages are hugetlbfs mounts of
//! the pod's, one for each volume of the host, so that containers share what they put there.

use crate::{
    config::Config,
    error::{Error, Step},
};
use oci_spec::runtime::LinuxResources;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// What x86-64 has without being asked for at boot, in the words of limits and cgroups.
const SIZE: &str = "2MB";
const BYTES: u64 = 2 << 20;
/// Kernel documentation, admin-guide/mm/hugetlbpage.
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// The guest's.
#[derive(Debug)]
pub struct HugePages {
    pool: PathBuf,
    /// Pages by container.
    held: Mutex<BTreeMap<String, u64>>,
    mounted: Mutex<BTreeSet<PathBuf>>,
}

/// How many bytes of them a container may use; none when nothing is said of it.
pub fn limit(resources: &LinuxResources) -> Result<Option<u64>, Error> {
    let mut found = None;
    for limit in resources.hugepage_limits().iter().flatten() {
        match limit.page_size().as_str() {
            SIZE => found = Some(u64::try_from(limit.limit()).unwrap_or(u64::MAX)),
            _ if limit.limit() == 0 => {}
            other => return Err(Error::Unsupported(format!("huge pages of {other} in a guest"))),
        }
    }
    Ok(found)
}

/// Where the mount is that stands for a volume of the host.
pub fn folder(config: &Config, volume: &Path) -> PathBuf {
    let name = volume.to_string_lossy().replace('/', "%");
    config.huge_pages().join(name)
}

impl Default for HugePages {
    fn default() -> Self {
        Self { pool: POOL.into(), held: Mutex::default(), mounted: Mutex::default() }
    }
}

impl HugePages {
    /// Keeps so many bytes ready for a container, instead of what it had before. An error, and nothing
    /// changed, when the guest has no room for them.
    pub fn hold(&self, container: &str, bytes: u64) -> Result<(), Error> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let before = held.values().sum::<u64>();
        let had = held.get(container).copied().unwrap_or(0);
        let pages = bytes / BYTES;
        if pages == had {
            return Ok(());
        }
        let wanted = (before - had).saturating_add(pages);
        let has = self.resize(wanted)?;
        if has < wanted {
            self.resize(before)?;
            return Err(Error::NotNow(format!(
                "the guest has room for {} of {pages} huge pages of {SIZE}: its machine needs more memory",
                has.saturating_sub(before - had)
            )));
        }
        match pages {
            0 => held.remove(container),
            _ => held.insert(container.to_owned(), pages),
        };
        Ok(())
    }

    /// How many there are after so many were asked for.
    fn resize(&self, pages: u64) -> Result<u64, Error> {
        let what = || format!("keep {pages} huge pages");
        fs::write(&self.pool, pages.to_string()).step(what())?;
        let text = fs::read_to_string(&self.pool).step(what())?;
        text.trim().parse().map_err(io::Error::other).step(what())
    }

    /// Makes the mount at such a folder, once.
    pub fn mount(&self, folder: &Path) -> Result<(), Error> {
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if mounted.contains(folder) {
            return Ok(());
        }
        let what = || format!("mount huge pages at {}", folder.display());
        fs::create_dir_all(folder).step(what())?;
        let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV;
        // Everybody's, as kubelet makes volumes in memory.
        rustix::mount::mount("hugetlbfs", folder, "hugetlbfs", flags, c"pagesize=2M,mode=1777")
            .step(what())?;
        mounted.insert(folder.to_owned());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    #[test]
    fn the_pool_is_what_all_containers_may_use() {
        let folder = tempfile::tempdir().unwrap();
        let pool = folder.path().join("nr_hugepages");
        let pages = HugePages { pool: pool.clone(), ..HugePages::default() };
        let now = || fs::read_to_string(&pool).unwrap();
        pages.hold("a", 3 * BYTES).unwrap();
        pages.hold("b", BYTES).unwrap();
        assert_eq!(now(), "4");
        pages.hold("a", 5 * BYTES).unwrap();
        assert_eq!(now(), "6");
        pages.hold("a", 0).unwrap();
        pages.hold("a", 0).unwrap();
        assert_eq!(now(), "1");
    }

    #[test]
    fn pages_of_another_size_are_refused_by_name() {
        let read = |size: &str, bytes: i64| {
            let limits = json!({ "hugepageLimits": [{ "pageSize": size, "limit": bytes }] });
            limit(&serde_json::from_value(limits).unwrap())
        };
        assert_eq!(read("2MB", 4096).unwrap(), Some(4096));
        assert_eq!(read("1GB", 0).unwrap(), None);
        assert!(read("1GB", 1).unwrap_err().to_string().contains("1GB"));
    }
}
