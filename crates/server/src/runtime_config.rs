//! RuntimeConfig and UpdateRuntimeConfig.

use crate::{Server, status::Failure};
use a3s_box_api::cri;
use a3s_box_net::NetError;
use std::{net::IpAddr, path::Path, sync::Arc};
use tonic::Code;

/// The CNI capability by which a network takes the pods' subnets from its caller.
const IP_RANGES: &str = "ipRanges";
const FIELD: &str = "runtime_config.network_config.pod_cidr";

/// The node's configuration cannot be told or changed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeConfigError {
    /// Not subnets.
    #[error("{FIELD}: {0:?} is not a subnet")]
    Subnet(String),
    /// Nobody would act on it.
    #[error(
        "{FIELD} has no effect: CNI network {0:?} takes its subnets from its own configuration"
    )]
    NoEffect(String),
    /// There is no network to tell it to, or it could not be kept.
    #[error("{FIELD}")]
    Network(#[source] NetError),
}

impl Failure for RuntimeConfigError {
    fn code(&self) -> Code {
        match self {
            Self::Subnet(_) => Code::InvalidArgument,
            Self::NoEffect(_) | Self::Network(_) => Code::FailedPrecondition,
        }
    }
}

/// How pods' cgroups are made here, which kubelet must do in the same way.
pub async fn runtime_config(
    _: Arc<Server>,
    _: cri::RuntimeConfigRequest,
) -> Result<cri::RuntimeConfigResponse, RuntimeConfigError> {
    let cgroup_driver = cgroup_driver(Path::new("/")).into();
    Ok(cri::RuntimeConfigResponse { linux: Some(cri::LinuxRuntimeConfiguration { cgroup_driver }) })
}

/// Takes the pods' subnets, when the node's network wants to be told them.
pub async fn update_runtime_config(
    server: Arc<Server>,
    request: cri::UpdateRuntimeConfigRequest,
) -> Result<cri::UpdateRuntimeConfigResponse, RuntimeConfigError> {
    let network = request.runtime_config.unwrap_or_default().network_config.unwrap_or_default();
    if !network.pod_cidr.is_empty() {
        let ranges = subnets(&network.pod_cidr)?;
        let name = server.cni.ready().map_err(RuntimeConfigError::Network)?;
        if !server.cni.asks_for(IP_RANGES).map_err(RuntimeConfigError::Network)? {
            return Err(RuntimeConfigError::NoEffect(name));
        }
        server.cni.set_ip_ranges(ranges).map_err(RuntimeConfigError::Network)?;
    }
    Ok(cri::UpdateRuntimeConfigResponse {})
}

/// `10.0.0.0/24,fd00::/64`
fn subnets(text: &str) -> Result<Vec<String>, RuntimeConfigError> {
    let good = |subnet: &str| {
        let (address, length) = subnet.split_once('/')?;
        let (address, length): (IpAddr, u8) = (address.parse().ok()?, length.parse().ok()?);
        (length <= if address.is_ipv4() { 32 } else { 128 }).then(|| subnet.to_owned())
    };
    text.split(',')
        .map(|subnet| good(subnet).ok_or_else(|| RuntimeConfigError::Subnet(subnet.to_owned())))
        .collect()
}

/// systemd owns the cgroup tree only where it is PID 1 and there is but one tree.
fn cgroup_driver(root: &Path) -> cri::CgroupDriver {
    let systemd = root.join("run/systemd/system").is_dir();
    let unified = root.join("sys/fs/cgroup/cgroup.controllers").is_file();
    if systemd && unified { cri::CgroupDriver::Systemd } else { cri::CgroupDriver::Cgroupfs }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_cgroup_driver_is_systemd_only_where_systemd_owns_the_one_tree() {
        let root = tempfile::tempdir().unwrap();
        let driver = || cgroup_driver(root.path());
        assert_eq!(driver(), cri::CgroupDriver::Cgroupfs);
        fs::create_dir_all(root.path().join("run/systemd/system")).unwrap();
        assert_eq!(driver(), cri::CgroupDriver::Cgroupfs);
        fs::create_dir_all(root.path().join("sys/fs/cgroup")).unwrap();
        fs::write(root.path().join("sys/fs/cgroup/cgroup.controllers"), "cpu").unwrap();
        assert_eq!(driver(), cri::CgroupDriver::Systemd);
    }

    #[test]
    fn a_pod_cidr_is_one_or_more_subnets() {
        assert_eq!(subnets("10.0.0.0/24,fd00::/64").unwrap(), ["10.0.0.0/24", "fd00::/64"]);
        for bad in ["10.0.0.0", "10.0.0.0/33", "x/8", "10.0.0.0/8,"] {
            assert!(matches!(subnets(bad), Err(RuntimeConfigError::Subnet(_))), "{bad}");
        }
    }
}
