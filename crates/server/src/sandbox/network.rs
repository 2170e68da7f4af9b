//! The driver's seam to the network: namespace, tap and CNI, all named by the sandbox id.

use super::{SandboxError, record::NetworkStatus, spec::SandboxSpec};
use a3s_box_types::{SandboxId, network::GuestNetwork};
use std::os::fd::OwnedFd;

/// What the driver needs of the network. Every call may be repeated.
#[tonic::async_trait]
pub trait Network: Send + Sync {
    /// Makes the namespace and the tap in it, before and without CNI.
    async fn prepare(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<OwnedFd, SandboxError>;
    /// CNI ADD. Must be let run to its end: a half-done ADD cannot be undone.
    async fn attach(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
    ) -> Result<NetworkStatus, SandboxError>;
    /// Joins the tap with what CNI made and reads what the guest has to look like.
    async fn join(
        &self,
        id: &SandboxId,
        status: &NetworkStatus,
    ) -> Result<GuestNetwork, SandboxError>;
    /// CNI DEL, then the namespace. OK when there is nothing.
    async fn teardown(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), SandboxError>;
    /// Sandboxes that namespaces are left of.
    async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError>;
}
