//! CNI, specification 0.3.0 to 1.1.0: which plugins a network has, running them in order, and enough
//! memory to take back what they did.
//!
//! What is asked of the plugins is saved before the first one runs, with the network's configuration
//! as it was then; the result is saved after the last. DEL is told exactly that, whatever has become
//! of the configuration file since, and runs the plugins in reverse order, all of them even when one
//! fails. Both records go only when every plugin said that it is done.

mod network;
mod plugin;
mod result;

use self::{
    network::Network,
    plugin::{Call, Lock},
};
use crate::{NetError, netlink::Netlink};
use a3s_box_store::Store;
use a3s_box_types::SandboxId;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// The pod's interface, as Kubernetes has it everywhere.
pub const INTERFACE: &str = "eth0";

const REQUEST: &str = "request";
const RESULT: &str = "result";
/// Object and record of what is not one sandbox's.
const NODE: &str = "node";
const IP_RANGES: &str = "ip-ranges";

/// The node's CNI networks. Configuration files are read anew each time.
#[derive(Debug)]
pub struct Cni {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    records: Store,
    plugin_timeout: Duration,
    ip_ranges: Mutex<Vec<String>>,
}

/// A pod that wants an interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// CNI's container id.
    pub sandbox_id: SandboxId,
    /// Where the interface is to be.
    pub netns: PathBuf,
    /// The network's name; `None`: the node's default one.
    pub network: Option<String>,
    /// Kubernetes namespace.
    pub pod_namespace: String,
    /// Pod name.
    pub pod_name: String,
    /// Pod uid.
    pub pod_uid: String,
    /// For plugins with the capability `portMappings`.
    pub port_mappings: Vec<PortMapping>,
    /// For plugins with the capability `dns`.
    pub dns: Option<Dns>,
    /// For plugins with the capability `bandwidth`.
    pub bandwidth: Option<Bandwidth>,
    /// For plugins with the capability `cgroupPath`; empty: not told.
    pub cgroup_path: String,
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

/// A resolver's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Resolver options.
    pub options: Vec<String>,
}

/// Limits of the pod's traffic, in bits per second; `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Towards the pod.
    pub ingress: Option<u64>,
    /// From the pod.
    pub egress: Option<u64>,
}

/// What the plugins gave to the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Name of the CNI network.
    pub network: String,
    /// Name inside the namespace.
    pub interface: String,
    /// The first one is the pod's address: an IPv4 one when there is any.
    pub ips: Vec<IpAddr>,
    /// The resolver the network wants, for pods that bring none.
    pub dns: Dns,
}

/// What DEL must know.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Request {
    network: Network,
    attachment: Attachment,
    ip_ranges: Vec<String>,
}

impl Cni {
    /// `records` is this program's own folder, on a disk that survives a reboot, as the plugins'
    /// address leases do.
    pub fn new(
        conf_dir: &Path,
        bin_dirs: &[PathBuf],
        records: &Path,
        plugin_timeout: Duration,
    ) -> Result<Self, NetError> {
        let records = Store::open(records)?;
        let ip_ranges = records.read(NODE)?.get(IP_RANGES).and_then(Result::ok);
        Ok(Self {
            conf_dir: conf_dir.to_owned(),
            bin_dirs: bin_dirs.to_owned(),
            records,
            plugin_timeout,
            ip_ranges: Mutex::new(ip_ranges.unwrap_or_default()),
        })
    }

    /// Tells pods' subnets on this node, in CIDR notation, to all plugins with the capability
    /// `ipRanges` from now on, also after a restart.
    pub fn set_ip_ranges(&self, ranges: Vec<String>) -> Result<(), NetError> {
        let mut kept = self.ip_ranges.lock().unwrap_or_else(PoisonError::into_inner);
        self.records.put(NODE, IP_RANGES, &ranges)?;
        *kept = ranges;
        Ok(())
    }

    /// Whether pods can get a network: the default configuration means something and its plugins are
    /// there. Answers the network's name.
    pub fn ready(&self) -> Result<String, NetError> {
        let network = Network::find(&self.conf_dir, None)?;
        for plugin in network.programs() {
            plugin::find(&plugin, &self.bin_dirs)?;
        }
        Ok(network.name)
    }

    /// Whether a plugin of the default network takes this capability from its caller.
    pub fn asks_for(&self, capability: &str) -> Result<bool, NetError> {
        let network = Network::find(&self.conf_dir, None)?;
        Ok(network.plugins.iter().any(|plugin| network::asks_for(plugin, capability)))
    }

    /// Gives the pod its interface. After an error [`Cni::del`] is owed.
    pub async fn add(&self, attachment: &Attachment) -> Result<Attached, NetError> {
        let arguments = arguments(attachment)?;
        let network = Network::find(&self.conf_dir, attachment.network.as_deref())?;
        let id = attachment.sandbox_id.as_str();
        let ip_ranges = self.ip_ranges.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let request = Request { network, attachment: attachment.clone(), ip_ranges };
        self.records.put(id, REQUEST, &request)?;
        let network = &request.network;
        let lock = self.lock(id).await?;

        let netlink = Netlink::open(&attachment.netns)?;
        let loopback = netlink.link("lo").await?;
        netlink.up("lo", loopback.index, None).await?;
        drop(netlink);

        let mut result = None;
        for plugin in &network.plugins {
            let input = input(&request, plugin, result.as_ref());
            let call = self.call("ADD", network, plugin, &request, &arguments);
            result = Some(call.run(&input, &lock, &self.bin_dirs).await?);
        }
        let result = result.unwrap_or_default();
        self.records.put(id, RESULT, &result)?;
        let attached = result::read(&result, &network.name, INTERFACE);
        attached.map_err(|why| NetError::Plugin {
            plugin: network.programs().pop().unwrap_or_default(),
            command: "ADD",
            network: network.name.clone(),
            why,
        })
    }

    /// Takes back everything [`Cni::add`] did or began for this sandbox. OK when there is nothing.
    pub async fn del(&self, sandbox_id: &SandboxId) -> Result<(), NetError> {
        let id = sandbox_id.as_str();
        let saved = self.records.read(id)?;
        let Some(request) = saved.get::<Request>(REQUEST) else {
            if !saved.set_aside.is_empty() {
                return Err(NetError::Record(format!("of {id} is damaged and was set aside")));
            }
            return Ok(self.records.remove(id)?);
        };
        let request = request.map_err(|error| NetError::Record(error.to_string()))?;
        let result = saved.records.get(RESULT);
        let arguments = arguments(&request.attachment)?;
        let lock = self.lock(id).await?;
        let mut errors = Vec::new();
        for plugin in request.network.plugins.iter().rev() {
            // Since 0.4.0 DEL is told the result.
            let result = result.filter(|_| request.network.tells_del_the_result());
            let input = input(&request, plugin, result);
            let call = self.call("DEL", &request.network, plugin, &request, &arguments);
            errors.extend(call.run(&input, &lock, &self.bin_dirs).await.err());
        }
        match errors.len() {
            0 => Ok(self.records.remove(id)?),
            1 => Err(errors.remove(0)),
            _ => Err(NetError::Several(errors)),
        }
    }

    /// Every sandbox for which something may have to be taken back.
    pub fn list(&self) -> Result<Vec<SandboxId>, NetError> {
        let objects = self.records.scan()?;
        Ok(objects.into_keys().filter_map(|id| id.parse().ok()).collect())
    }

    /// Waits for plugins that an earlier server started for this sandbox.
    async fn lock(&self, id: &str) -> Result<Lock, NetError> {
        Lock::take(&self.records.folder(id)?.join("plugin.stderr"), self.plugin_timeout).await
    }

    fn call<'a>(
        &self,
        command: &'static str,
        network: &'a Network,
        plugin: &Map<String, Value>,
        request: &'a Request,
        arguments: &'a str,
    ) -> Call<'a> {
        Call {
            command,
            network: &network.name,
            plugin: network::program(plugin),
            sandbox_id: request.attachment.sandbox_id.as_str(),
            netns: &request.attachment.netns,
            interface: INTERFACE,
            arguments,
            timeout: self.plugin_timeout,
        }
    }
}

/// What a plugin reads: its own part of the configuration, and what only its caller knows.
fn input(request: &Request, plugin: &Map<String, Value>, previous: Option<&Value>) -> Value {
    let network = &request.network;
    let mut input = plugin.clone();
    input.insert("cniVersion".to_owned(), json!(network.version));
    input.insert("name".to_owned(), json!(network.name));
    if let Some(previous) = previous {
        input.insert("prevResult".to_owned(), previous.clone());
    }
    let told: Map<String, Value> = capabilities(&request.attachment, &request.ip_ranges)
        .into_iter()
        .filter(|(capability, _)| network::asks_for(plugin, capability))
        .map(|(capability, value)| (capability.to_owned(), value))
        .collect();
    if !told.is_empty() {
        input.insert("runtimeConfig".to_owned(), Value::Object(told));
    }
    Value::Object(input)
}

/// What can be told to plugins that ask for it, by capability; nothing that is empty.
fn capabilities(attachment: &Attachment, ip_ranges: &[String]) -> Vec<(&'static str, Value)> {
    let mut told = Vec::new();
    if !attachment.port_mappings.is_empty() {
        let ports: Vec<_> = attachment.port_mappings.iter().map(port_mapping).collect();
        told.push(("portMappings", json!(ports)));
    }
    if let Some(dns) = &attachment.dns {
        told.push(("dns", json!(dns)));
    }
    if let Some(Bandwidth { ingress, egress }) = attachment.bandwidth {
        // The burst that containerd and CRI-O allow; bits.
        let burst = u32::MAX;
        let mut limits = Map::new();
        if let Some(rate) = ingress {
            limits.insert("ingressRate".to_owned(), json!(rate));
            limits.insert("ingressBurst".to_owned(), json!(burst));
        }
        if let Some(rate) = egress {
            limits.insert("egressRate".to_owned(), json!(rate));
            limits.insert("egressBurst".to_owned(), json!(burst));
        }
        told.push(("bandwidth", Value::Object(limits)));
    }
    if !ip_ranges.is_empty() {
        // One address out of each inner list.
        let ranges: Vec<_> = ip_ranges.iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
        told.push(("ipRanges", json!(ranges)));
    }
    if !attachment.cgroup_path.is_empty() {
        told.push(("cgroupPath", json!(attachment.cgroup_path)));
    }
    told
}

fn port_mapping(mapping: &PortMapping) -> Value {
    let protocol = match mapping.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    let mut value = json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": protocol,
    });
    if let Some(ip) = mapping.host_ip {
        value["hostIP"] = json!(ip);
    }
    value
}

/// `CNI_ARGS` as Kubernetes' plugins read it.
fn arguments(attachment: &Attachment) -> Result<String, NetError> {
    let pairs = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", attachment.pod_namespace.as_str()),
        ("K8S_POD_NAME", attachment.pod_name.as_str()),
        ("K8S_POD_INFRA_CONTAINER_ID", attachment.sandbox_id.as_str()),
        ("K8S_POD_UID", attachment.pod_uid.as_str()),
    ];
    for (key, value) in pairs {
        if value.contains([';', '=', '\0']) {
            let why = format!("{key}: {value:?} cannot be said to a CNI plugin: it has ; or =");
            return Err(NetError::Argument(why));
        }
    }
    Ok(pairs.map(|(key, value)| format!("{key}={value}")).join(";"))
}

#[cfg(test)]
mod tests;
