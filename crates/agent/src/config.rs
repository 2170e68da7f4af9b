//! Where the agent finds and puts things. One struct, so that the same program runs as PID 1 of a
//! guest and as an ordinary process.

use a3s_box_sys::clone3::namespace;
use std::{collections::BTreeMap, path::PathBuf};

/// Whose kernel this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// The sandbox's own: clock, hostname, interfaces and sysctls are the agent's to set.
    Guest,
    /// The node's: only what is in namespaces of the sandbox's own may be touched.
    Host,
}

/// Folders and boundary.
#[derive(Debug, Clone)]
pub struct Config {
    /// The pod's share: image layers and volumes.
    pub share: PathBuf,
    /// Writable layers.
    pub scratch: PathBuf,
    /// Small files that live as long as the sandbox: resolv.conf, mount points of layers.
    pub runtime: PathBuf,
    /// Folder of a cgroup v2 in which containers get cgroups of their own.
    pub cgroups: PathBuf,
    /// The same for controllers in cgroup v1 hierarchies: controller and folder.
    pub cgroups_v1: BTreeMap<String, PathBuf>,
    /// Namespaces that are the pod's and not the node's (`clone3::namespace` bits).
    pub namespaces: u64,
    /// Whose kernel this is.
    pub boundary: Boundary,
}

impl Config {
    /// The layout of a guest.
    pub fn guest() -> Self {
        Self {
            share: "/share".into(),
            scratch: "/scratch".into(),
            runtime: "/run/a3s-box".into(),
            cgroups: "/sys/fs/cgroup/pod".into(),
            cgroups_v1: BTreeMap::new(),
            namespaces: namespace::NET | namespace::IPC | namespace::UTS,
            boundary: Boundary::Guest,
        }
    }

    /// Whether the pod has this namespace for itself (a `clone3::namespace` bit).
    pub fn owns(&self, namespace: u64) -> bool {
        self.namespaces & namespace != 0
    }

    /// Mount points of image layers.
    pub fn layers(&self) -> PathBuf {
        self.runtime.join("layers")
    }

    /// Where a container's root is mounted before it becomes the root; in the container's own
    /// mount namespace, so one folder serves all.
    pub fn staging(&self) -> PathBuf {
        self.runtime.join("rootfs")
    }

    /// The /dev/shm of the pod.
    pub fn shm(&self) -> PathBuf {
        self.runtime.join("shm")
    }

    /// Mounts of huge pages.
    pub fn huge_pages(&self) -> PathBuf {
        self.runtime.join("huge-pages")
    }

    /// The pod's version of a file of /etc.
    pub fn etc(&self, name: &str) -> PathBuf {
        self.runtime.join(name)
    }
}
