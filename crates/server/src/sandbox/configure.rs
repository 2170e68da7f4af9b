//! What the agent is told once: the spec and the network, as the agent's request. Pure but for the
//! node's resolv.conf, which pods without a DNS config share.

use super::spec::{Dns, SandboxSpec};
use a3s_box_api::agent::v1 as agent;
use a3s_box_types::{SandboxId, network::GuestNetwork};

const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTNAME_MAX: usize = 64;

/// The order that makes a fresh boundary this sandbox.
pub fn configure(
    id: &SandboxId,
    spec: &SandboxSpec,
    network: &GuestNetwork,
) -> agent::ConfigureSandboxRequest {
    let dns = spec.dns.clone().unwrap_or_else(|| {
        parse_resolv_conf(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
    });
    let mut hostname = spec.effective_hostname().to_owned();
    hostname.truncate(HOSTNAME_MAX);
    agent::ConfigureSandboxRequest {
        sandbox_id: id.to_string(),
        hostname,
        // The node's interfaces are nobody's to take over.
        network: (!spec.node_namespaces.network).then(|| guest_network(network)),
        dns: Some(agent::Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        sysctls: spec.sysctls.clone().into_iter().collect(),
        shared_pid_namespace: spec.shared_pid,
        user_namespace: spec.user_namespace.map(|ids| agent::UserNamespace {
            uid: ids.uid,
            gid: ids.gid,
            length: ids.length,
        }),
        ..Default::default()
    }
}

fn guest_network(network: &GuestNetwork) -> agent::Network {
    let interface = |interface: &a3s_box_types::network::Interface| agent::Interface {
        name: interface.name.clone(),
        mac: interface.mac.clone(),
        mtu: interface.mtu,
        addresses: interface.addresses.clone(),
    };
    let route = |route: &a3s_box_types::network::Route| agent::Route {
        destination: route.destination.clone(),
        gateway: route.gateway.clone().unwrap_or_default(),
        interface: route.interface.clone(),
        source: route.source.clone().unwrap_or_default(),
        mtu: route.mtu.unwrap_or_default(),
        scope: u32::from(route.scope),
        onlink: route.onlink,
    };
    let neighbour = |neighbour: &a3s_box_types::network::Neighbour| agent::Neighbour {
        address: neighbour.address.clone(),
        mac: neighbour.mac.clone(),
        interface: neighbour.interface.clone(),
    };
    agent::Network {
        interfaces: network.interfaces.iter().map(interface).collect(),
        routes: network.routes.iter().map(route).collect(),
        neighbours: network.neighbours.iter().map(neighbour).collect(),
    }
}

fn parse_resolv_conf(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(words.next()),
            // As in the C library: the last line counts.
            Some("search" | "domain") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_resolver_is_taken_over_as_the_c_library_reads_it() {
        let text =
            "# c\nnameserver 1.1.1.1\nsearch a\nsearch b c\noptions ndots:2 rotate\nnameserver\n";
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let dns = parse_resolv_conf(text);
        assert_eq!(dns.servers, words(&["1.1.1.1"]));
        assert_eq!(dns.searches, words(&["b", "c"]));
        assert_eq!(dns.options, words(&["ndots:2", "rotate"]));
    }
}
