//! What a sandbox is to be, free of CRI types: the part of the record that never changes.

use crate::user_namespace::UserNamespace;
use a3s_box_types::shim::VmSize;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, net::IpAddr};

/// Everything RunPodSandbox asked for and this server honours. Two requests mean the same sandbox
/// exactly when their specs are equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// What no two sandboxes share.
    pub name: SandboxName,
    /// The configured runtime handler; may be empty.
    pub runtime_handler: String,
    /// Namespaces of the node that the pod shares; any of them puts it on the node's own kernel.
    #[serde(default)]
    pub node_namespaces: NodeNamespaces,
    /// Empty: the guest is called as the pod.
    pub hostname: String,
    /// Host folder of the containers' logs; empty: containers have no log file.
    pub log_directory: String,
    /// Written to the containers' resolv.conf; `None`: the node's own.
    pub dns: Option<Dns>,
    /// For the CNI plugins that map ports.
    pub port_mappings: Vec<PortMapping>,
    /// Selected on by lists.
    pub labels: BTreeMap<String, String>,
    /// Echoed, and the place of `a3s.box/...` options.
    pub annotations: BTreeMap<String, String>,
    /// The pod's cgroup, as kubelet named it; empty: the host's root cgroup.
    pub cgroup_parent: String,
    /// Set in the guest before any container.
    pub sysctls: BTreeMap<String, String>,
    /// Containers may ask for the pod's shared PID namespace.
    pub shared_pid: bool,
    /// The user namespace of all its containers; `None`: the guest's own.
    #[serde(default)]
    pub user_namespace: Option<UserNamespace>,
    /// Privileged containers may be created in it.
    pub privileged: bool,
    /// Name of the CNI network, from `a3s.box/network`; `None`: the default one.
    pub network: Option<String>,
    /// Limits of the pod's processes on the host.
    pub host_limits: HostLimits,
    /// Size of the virtual machine, if it has one.
    pub size: VmSize,
}

impl SandboxSpec {
    /// A virtual machine of this size, and nothing else asked for.
    pub fn plain(name: SandboxName, size: VmSize) -> Self {
        Self {
            name,
            runtime_handler: String::new(),
            node_namespaces: NodeNamespaces::default(),
            hostname: String::new(),
            log_directory: String::new(),
            dns: None,
            port_mappings: Vec::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            cgroup_parent: String::new(),
            sysctls: BTreeMap::new(),
            shared_pid: false,
            user_namespace: None,
            privileged: false,
            network: None,
            host_limits: HostLimits::default(),
            size,
        }
    }

    /// What separates the pod from the node.
    pub fn boundary(&self) -> Boundary {
        if self.node_namespaces == NodeNamespaces::default() {
            Boundary::Microvm
        } else {
            Boundary::Host
        }
    }

    /// What `hostname` prints in the pod.
    pub fn effective_hostname(&self) -> &str {
        if self.hostname.is_empty() { &self.name.name } else { &self.hostname }
    }
}

/// What separates a pod from the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// A virtual machine of its own.
    Microvm,
    /// The node's own kernel, with namespaces and cgroups.
    Host,
}

impl fmt::Display for Boundary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Microvm => "microvm",
            Self::Host => "host",
        })
    }
}

/// Namespaces of the node that a pod shares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeNamespaces {
    /// Network, and the host name with it.
    pub network: bool,
    /// Processes.
    pub pid: bool,
    /// System V IPC, POSIX message queues, /dev/shm.
    pub ipc: bool,
}

/// The key that a sandbox holds from RunPodSandbox to RemovePodSandbox.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SandboxName {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// Pod uid.
    pub uid: String,
    /// Counts the sandboxes of one pod.
    pub attempt: u32,
}

impl fmt::Display for SandboxName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} (uid {:?}, attempt {})", self.namespace, self.name, self.uid, self.attempt)
    }
}

/// resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// One port of the node that leads to the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Transport.
    pub protocol: Protocol,
    /// Inside.
    pub container_port: u16,
    /// Outside.
    pub host_port: u16,
    /// `None`: every address of the node.
    pub host_ip: Option<IpAddr>,
}

/// Transport of a port mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// What the pod's host cgroup gets; 0 and empty mean: no limit of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    /// As cgroup v1 counts them, 2 to 262144.
    pub cpu_shares: u64,
    /// Microseconds per period.
    pub cpu_quota: i64,
    /// Microseconds.
    pub cpu_period: u64,
    /// CPU list.
    pub cpuset_cpus: String,
    /// Memory node list.
    pub cpuset_mems: String,
    /// Of the shim and the VM, -1000 to 1000.
    pub oom_score_adj: i32,
}
