//! The driver's network as it is on a node: namespaces, taps and CNI of the `net` crate.

use super::{
    SandboxError, blocking,
    network::{Link, Network},
    record::NetworkStatus,
    spec::{Boundary, Protocol, SandboxSpec},
};
use a3s_box_net::{Attachment, Bandwidth, Cni, bridge, netns, tap};
use a3s_box_types::{SandboxId, network::GuestNetwork};
use std::{collections::BTreeMap, fs::File, sync::Arc};

/// Kubernetes' annotations for traffic limits.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// Pods' networks made by CNI plugins.
pub struct CniNetwork {
    cni: Arc<Cni>,
}

impl CniNetwork {
    /// Over these networks.
    pub fn new(cni: Arc<Cni>) -> Self {
        Self { cni }
    }
}

#[tonic::async_trait]
impl Network for CniNetwork {
    async fn prepare(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<Link, SandboxError> {
        const STEP: &str = "make the pod's network namespace";
        if spec.node_namespaces.network {
            return Ok(Link::Node);
        }
        let (id, boundary) = (id.clone(), spec.boundary());
        blocking(STEP, move || {
            let failed = |error| SandboxError::step(STEP, error);
            let netns = netns::create(&id).map_err(failed)?;
            match boundary {
                Boundary::Microvm => tap::create(&netns).map(Link::Tap).map_err(failed),
                Boundary::Host => File::open(&netns)
                    .map(|netns| Link::Namespace(netns.into()))
                    .map_err(|error| SandboxError::step(STEP, error)),
            }
        })
        .await
    }

    async fn attach(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
    ) -> Result<NetworkStatus, SandboxError> {
        if spec.node_namespaces.network {
            return Ok(NetworkStatus::default());
        }
        let attached = self.cni.add(&attachment(id, spec)?).await;
        let attached =
            attached.map_err(|error| SandboxError::step("attach the pod to its network", error))?;
        Ok(NetworkStatus { interface: attached.interface, ips: attached.ips })
    }

    async fn join(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        status: &NetworkStatus,
    ) -> Result<GuestNetwork, SandboxError> {
        if spec.node_namespaces.network {
            return Ok(GuestNetwork::default());
        }
        let netns = netns::path(id);
        let join = async {
            match spec.boundary() {
                Boundary::Microvm => bridge::join(&netns, &status.interface, tap::NAME).await,
                Boundary::Host => Ok(()),
            }
        };
        let ((), guest) = tokio::try_join!(join, bridge::guest_network(&netns, &status.interface))
            .map_err(|error| SandboxError::step("join the pod with its network", error))?;
        Ok(guest)
    }

    /// The namespace stays as long as a plugin still has to undo something in it.
    async fn teardown(&self, id: &SandboxId, _: &SandboxSpec) -> Result<(), SandboxError> {
        let detached = self.cni.del(id).await;
        detached.map_err(|error| SandboxError::step("detach the pod from its network", error))?;
        let id = id.clone();
        blocking("remove the pod's network namespace", move || {
            netns::remove(&id)
                .map_err(|error| SandboxError::step("remove the pod's network namespace", error))
        })
        .await
    }

    async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError> {
        let cni = self.cni.clone();
        blocking("look for network namespaces", move || {
            let failed = |error| SandboxError::step("look for network namespaces", error);
            let mut found = netns::list().map_err(failed)?;
            found.extend(cni.list().map_err(failed)?);
            Ok(found)
        })
        .await
    }
}

/// What CNI is told of the pod.
pub(crate) fn attachment(id: &SandboxId, spec: &SandboxSpec) -> Result<Attachment, SandboxError> {
    let port = |mapping: &super::spec::PortMapping| a3s_box_net::PortMapping {
        protocol: match mapping.protocol {
            Protocol::Tcp => a3s_box_net::Protocol::Tcp,
            Protocol::Udp => a3s_box_net::Protocol::Udp,
            Protocol::Sctp => a3s_box_net::Protocol::Sctp,
        },
        container_port: mapping.container_port,
        host_port: mapping.host_port,
        host_ip: mapping.host_ip,
    };
    let dns = |dns: &super::spec::Dns| a3s_box_net::Dns {
        servers: dns.servers.clone(),
        searches: dns.searches.clone(),
        options: dns.options.clone(),
    };
    Ok(Attachment {
        sandbox_id: id.clone(),
        netns: netns::path(id),
        network: spec.network.clone(),
        pod_namespace: spec.name.namespace.clone(),
        pod_name: spec.name.name.clone(),
        pod_uid: spec.name.uid.clone(),
        port_mappings: spec.port_mappings.iter().map(port).collect(),
        dns: spec.dns.as_ref().map(dns),
        bandwidth: bandwidth(&spec.annotations)?,
        cgroup_path: spec.cgroup_parent.clone(),
    })
}

fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<Option<Bandwidth>, SandboxError> {
    let limit = |key: &str| {
        let Some(text) = annotations.get(key) else { return Ok(None) };
        match quantity(text) {
            Some(bits) => Ok(Some(bits)),
            None => Err(SandboxError::invalid(
                format!("annotations[{key}]"),
                format!("{text:?} is not an amount of bits per second"),
            )),
        }
    };
    let (ingress, egress) = (limit(INGRESS)?, limit(EGRESS)?);
    Ok((ingress.is_some() || egress.is_some()).then_some(Bandwidth { ingress, egress }))
}

/// A whole number with a Kubernetes suffix: `10M`, `1Gi`.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let factor: u64 = match suffix {
        "" => 1,
        "k" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor).filter(|bits| *bits > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traffic_limits_are_kubernetes_quantities() {
        for (text, bits) in [
            ("10M", Some(10_000_000)),
            ("1Ki", Some(1024)),
            ("5", Some(5)),
            ("0", None),
            ("x", None),
            ("1e3", None),
        ] {
            assert_eq!(quantity(text), bits, "{text}");
        }
        let annotations = [(INGRESS.to_owned(), "fast".to_owned())].into();
        let error = bandwidth(&annotations).unwrap_err().to_string();
        assert!(error.contains(INGRESS), "{error}");
    }
}
