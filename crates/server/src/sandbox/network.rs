//! The driver's seam to the network: namespace, tap and CNI, all named by the sandbox id.

use super::{SandboxError, record::NetworkStatus, spec::SandboxSpec};
use a3s_box_types::{SandboxId, network::GuestNetwork};
use std::os::fd::OwnedFd;

/// How a boundary reaches the pod's network.
#[derive(Debug)]
pub enum Link {
    /// A virtual machine's card, in the pod's network namespace.
    Tap(OwnedFd),
    /// The pod's network namespace itself.
    Namespace(OwnedFd),
    /// The node's network; there is nothing to hand over.
    Node,
}

/// What the driver needs of the network. Every call may be repeated.
#[tonic::async_trait]
pub trait Network: Send + Sync {
    /// Makes the namespace and what the boundary needs of it, before and without CNI. Nothing for a
    /// pod in the node's network.
    async fn prepare(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<Link, SandboxError>;
    /// CNI ADD; nothing for a pod in the node's network. Must be let run to its end: a half-done ADD
    /// cannot be undone.
    async fn attach(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
    ) -> Result<NetworkStatus, SandboxError>;
    /// Joins the boundary with what CNI made, and reads what a guest has to look like.
    async fn join(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        status: &NetworkStatus,
    ) -> Result<GuestNetwork, SandboxError>;
    /// CNI DEL, then the namespace. OK when there is nothing.
    async fn teardown(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), SandboxError>;
    /// Sandboxes that namespaces are left of.
    async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError>;
}
