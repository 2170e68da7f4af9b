//! What of a CNI result matters to the pod.

use super::{Attached, Dns};
use serde::Deserialize;
use serde_json::Value;
use std::net::IpAddr;

#[derive(Deserialize)]
struct CniResult {
    #[serde(default)]
    interfaces: Vec<CniInterface>,
    #[serde(default)]
    ips: Vec<CniIp>,
    #[serde(default)]
    dns: CniDns,
}

#[derive(Deserialize)]
struct CniInterface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct CniIp {
    address: String,
    interface: Option<usize>,
}

#[derive(Default, Deserialize)]
struct CniDns {
    #[serde(default)]
    nameservers: Vec<String>,
    #[serde(default)]
    search: Vec<String>,
    #[serde(default)]
    options: Vec<String>,
}

/// The pod's part of the result: addresses of its interface, or of none in particular.
pub(super) fn read(result: &Value, network: &str, interface: &str) -> Result<Attached, String> {
    let result = CniResult::deserialize(result).map_err(|error| format!("its result: {error}"))?;
    let mut ips = Vec::new();
    for ip in &result.ips {
        let on = ip.interface.map(|at| result.interfaces.get(at));
        let pods = match on {
            None => true,
            Some(Some(on)) => !on.sandbox.is_empty() && on.name == interface,
            Some(None) => return Err("its result names an interface that is not there".to_owned()),
        };
        if pods {
            let address = ip.address.split('/').next().unwrap_or_default();
            let address: Result<IpAddr, _> = address.parse();
            ips.push(address.map_err(|_| format!("its result has the address {:?}", ip.address))?);
        }
    }
    if ips.is_empty() {
        return Err(format!("its result has no address for {interface}"));
    }
    ips.sort_by_key(IpAddr::is_ipv6);
    Ok(Attached {
        network: network.to_owned(),
        interface: interface.to_owned(),
        ips,
        dns: Dns {
            servers: result.dns.nameservers,
            searches: result.dns.search,
            options: result.dns.options,
        },
    })
}
