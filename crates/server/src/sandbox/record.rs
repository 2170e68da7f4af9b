//! The sandbox's record: what a restarted server knows of it.

use super::{SandboxError, resize::Resized, spec::SandboxSpec};
use a3s_box_store::Store;
use a3s_box_types::{SandboxId, sandbox::SandboxState};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr};

/// Name of the sandbox's own record in its folder.
pub const SANDBOX: &str = "sandbox";

/// One sandbox as saved. Written by its driver only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Every outside name derives from it.
    pub id: SandboxId,
    /// What was asked for.
    pub spec: SandboxSpec,
    /// Where it stands.
    pub state: SandboxState,
    /// Unix nanoseconds.
    pub created_at: i64,
    /// The host's boot it was created in: after another boot nothing of it runs.
    pub boot_id: String,
    /// What CNI answered; `None` before.
    pub network: Option<NetworkStatus>,
    /// What the shim told once the sandbox was configured.
    pub boundary: Option<BoundaryStatus>,
    /// Why it is not ready any more, when nobody asked for that.
    pub end_reason: Option<String>,
    /// What it was given since; stronger than the spec.
    #[serde(default)]
    pub resized: Option<Resized>,
}

/// The addresses CNI gave to the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// What CNI named the pod's card.
    pub interface: String,
    /// The first one is the pod's IP.
    pub ips: Vec<IpAddr>,
}

/// The boundary as it came up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BoundaryStatus {
    /// The guest's `uname -r`.
    pub kernel_release: String,
    /// Milliseconds by stage, the shim's and the server's.
    pub stages_ms: BTreeMap<String, f64>,
}

impl Record {
    /// Saves it; on return a crash does not take it back.
    pub fn save(&self, store: &Store) -> Result<(), SandboxError> {
        Ok(store.put(self.id.as_str(), SANDBOX, self)?)
    }
}
