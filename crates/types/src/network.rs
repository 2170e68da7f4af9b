//! A pod's network as CNI made it in the network namespace, and as the guest takes it over.

use serde::{Deserialize, Serialize};

/// Everything the guest needs to look like the pod's end of the veth.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// Without loopback.
    pub interfaces: Vec<Interface>,
    /// All routes of the namespace's main table but the kernel's own local ones.
    pub routes: Vec<Route>,
    /// Permanent neighbour entries only.
    pub neighbours: Vec<Neighbour>,
}

/// One network card of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name inside the pod: `eth0`.
    pub name: String,
    /// `aa:bb:cc:dd:ee:ff`; the guest's card takes over the veth's.
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
    /// CIDR notation, IPv4 and IPv6.
    pub addresses: Vec<String>,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// CIDR notation; `0.0.0.0/0` or `::/0` for the default.
    pub destination: String,
    /// `None`: on link.
    pub gateway: Option<String>,
    /// Name of the interface it leaves by.
    pub interface: String,
    /// Preferred source address.
    pub source: Option<String>,
    /// Bytes; `None`: the interface's.
    pub mtu: Option<u32>,
    /// rtnetlink scope: 0 universe, 253 link.
    pub scope: u8,
    /// The gateway is on link though no address says so.
    pub onlink: bool,
}

/// One permanent neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// IP address.
    pub address: String,
    /// `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Name of the interface.
    pub interface: String,
}
