//! The driver's seam to the shims: one process per sandbox, named by the sandbox id.

use super::{SandboxError, network::Link, spec::SandboxSpec};
use crate::shim_client::ShimClient;
use a3s_box_api::shim::v1 as shim;
use a3s_box_types::SandboxId;

/// What the driver needs of the shims. Every call may be repeated.
#[tonic::async_trait]
pub trait Shims: Send + Sync {
    /// Starts the shim, and with it the boundary; returns once its socket listens. May be given up at
    /// any time: [`Shims::end`] finds what was begun.
    async fn start(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
    ) -> Result<(), SandboxError>;
    /// Starts one that no pod needs yet; the spec says its size.
    async fn start_spare(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
    ) -> Result<(), SandboxError>;
    /// Whether it was started so and never claimed.
    fn is_spare(&self, id: &SandboxId) -> bool;
    /// Makes such a shim the sandbox's. `false`: it is of no use any more, and only good to be ended.
    async fn claim(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<bool, SandboxError>;
    /// Gives a claimed shim the sandbox's place and limits on the host.
    async fn move_in(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), SandboxError>;
    /// Whether its boundary never came to life because a template was of no use; the next one of its size
    /// is then made without.
    async fn clone_failed(&self, id: &SandboxId, spec: &SandboxSpec) -> bool;
    /// Gives a running shim other limits on the host, those of the spec.
    async fn limit(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), SandboxError>;
    /// Its socket's client; there need not be a shim.
    fn client(&self, id: &SandboxId) -> ShimClient;
    /// Whether a process of the boundary exists. An error means: could not tell.
    async fn is_alive(&self, id: &SandboxId) -> Result<bool, SandboxError>;
    /// The container states that a dead shim left on disk.
    async fn last_words(&self, id: &SandboxId) -> Vec<shim::ContainerState>;
    /// Ends shim and boundary, removes the cgroup and what containers wrote. OK when there is nothing.
    async fn end(&self, id: &SandboxId) -> Result<(), SandboxError>;
    /// Removes the folder of an ended shim: console, exit records. OK when there is nothing.
    async fn forget(&self, id: &SandboxId) -> Result<(), SandboxError>;
    /// Sandboxes that such folders are left of.
    async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError>;
}
