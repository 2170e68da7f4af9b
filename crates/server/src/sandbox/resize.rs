//! The driver's part in another size for a sandbox that runs: intent saved, the machine and the host's
//! cgroup changed beside the driver, and the old size again where that failed.

use super::{
    Deps, Reply, SandboxError,
    containers::Done,
    create::save,
    driver::{Driver, answer},
    record::Record,
    spec::{Boundary, HostLimits, SandboxSpec},
};
use crate::{shim_client::ShimClient, status::chain};
use a3s_box_api::{agent::v1 as agent, shim::v1 as shim};
use a3s_box_types::{SandboxId, shim::VmSize};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use tracing::{info, warn};

/// What UpdatePodSandboxResources asked for last; stronger than the spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resized {
    /// Of the virtual machine.
    pub size: VmSize,
    /// Of all containers together, in bytes; 0: none.
    pub memory_limit: u64,
    /// Of the pod's processes on the host.
    pub host_limits: HostLimits,
}

/// A change under way.
pub(super) struct Resizing {
    before: Option<Resized>,
    /// None when a former server was asked.
    reply: Option<Reply>,
}

impl Record {
    /// The spec as it is in force after every resize.
    pub fn spec_in_force(&self) -> SandboxSpec {
        let mut spec = self.spec.clone();
        if let Some(resized) = &self.resized {
            spec.size = resized.size;
            spec.host_limits = resized.host_limits.clone();
        }
        spec
    }

    /// The size that the virtual machine is to have.
    pub fn size(&self) -> VmSize {
        self.resized.as_ref().map_or(self.spec.size, |resized| resized.size)
    }
}

impl Driver {
    pub(super) async fn resize(&mut self, to: Resized, reply: Reply) -> ControlFlow<()> {
        match self.begin_resize(to).await {
            Ok(before) => self.run_resize(Resizing { before, reply: Some(reply) }),
            Err(error) => answer(reply, Err(error)),
        }
        ControlFlow::Continue(())
    }

    /// Saves the intent; what was in force before.
    async fn begin_resize(&mut self, to: Resized) -> Result<Option<Resized>, SandboxError> {
        self.needs_ready()?;
        if self.jobs.resizing.is_some() {
            let id = &self.record.id;
            return Err(SandboxError::Busy(format!("sandbox {id} is being resized")));
        }
        let before = self.record.resized.replace(to);
        if let Err(error) = save(&self.record, &self.deps).await {
            self.record.resized = before;
            return Err(error);
        }
        self.publish();
        crate::failpoint::hit("sandbox-resize-saved");
        Ok(before)
    }

    /// A former server may have saved an intent and no more.
    pub(super) fn resume_resize(&mut self, state: &shim::StateResponse) {
        let VmSize { vcpus, memory_mb } = self.record.size();
        let done = (state.vcpus, state.memory_mb) == (vcpus, memory_mb);
        if let Some(resized) = self.record.resized.clone().filter(|_| !done) {
            self.run_resize(Resizing { before: Some(resized), reply: None });
        }
    }

    fn run_resize(&mut self, resizing: Resizing) {
        let (deps, shim) = (self.deps.clone(), self.shim.clone());
        let (id, spec) = (self.record.id.clone(), self.record.spec_in_force());
        let before = resizing.before.as_ref().map_or(self.record.spec.size, |before| before.size);
        let to = self.record.resized.clone();
        self.jobs.resizing = Some(resizing);
        self.jobs.run(async move {
            let Some(to) = to else { return Done::Resized(Ok(())) };
            Done::Resized(apply(&deps, &shim, &id, spec, &to, before).await)
        });
    }

    pub(super) async fn resized(&mut self, result: Result<(), SandboxError>) {
        let Some(Resizing { before, reply }) = self.jobs.resizing.take() else { return };
        match &result {
            Ok(()) => {
                let VmSize { vcpus, memory_mb } = self.record.size();
                info!(vcpus, memory_mb, "sandbox resized");
            }
            Err(error) => {
                self.record.resized = before;
                warn!(error = chain(error), "sandbox not resized");
                // A record that stays wrong is put right by the next resize.
                if let Err(error) = save(&self.record, &self.deps).await {
                    warn!(error = chain(&error), "record not saved");
                }
            }
        }
        self.publish();
        if let Some(reply) = reply {
            answer(reply, result);
        }
    }
}

/// The host's limit is above what the machine has at every moment.
async fn apply(
    deps: &Deps,
    shim: &ShimClient,
    id: &SandboxId,
    mut spec: SandboxSpec,
    to: &Resized,
    before: VmSize,
) -> Result<(), SandboxError> {
    if spec.boundary() == Boundary::Host {
        return deps.shims.limit(id, &spec).await;
    }
    let grows = to.size.memory_mb > before.memory_mb;
    if grows {
        deps.shims.limit(id, &spec).await?;
    }
    let order = shim::ResizeRequest {
        memory_mb: to.size.memory_mb,
        vcpus: to.size.vcpus,
        limits: Some(agent::LimitPodRequest { memory_bytes: to.memory_limit }),
    };
    let has = shim.resize(order).await?.memory_mb;
    if has > to.size.memory_mb {
        warn!(has, wanted = to.size.memory_mb, "the guest gives memory back when it can spare it");
        spec.size.memory_mb = has;
    }
    if grows { Ok(()) } else { deps.shims.limit(id, &spec).await }
}
